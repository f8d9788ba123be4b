"""Weights that are cut into one piece for each process (distributed.shard = full), by torch's FSDP2.

A weight is cut along its first dimension; the process of rank r has rows r c to (r + 1) c, where c is the number of
rows over that of processes, rounded up. Pieces are contiguous, and those of the last processes may be empty.
`fully_shard` gathers the weights of a block for its forward and its backward pass, and sums its gradients over the
processes so that each has those of its pieces.
Source: Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelight.trainer.distributed.world import World

# classes of the modules that are gathered as one, from small to large
UNITS = ("BasicTransformerBlock", "ResnetBlock2D")
BLOCKS = ("down_blocks", "mid_block", "up_blocks")


def is_cut(x: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process has a piece."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """Return this process's piece of a tensor, which shares its memory; of a whole one itself."""
    return x.to_local() if is_cut(x) else x


def group_of(x: Tensor) -> dist.ProcessGroup:
    """Return the processes that have the pieces of a tensor."""
    return x.device_mesh.get_group()


def rows_of(x: Tensor) -> tuple[int, int]:
    """Return the first row of this process's piece of a tensor, and the row after its last."""
    mesh, num = x.device_mesh, x.shape[0]
    rows = -(-num // mesh.size())
    return min(mesh.get_local_rank() * rows, num), min((mesh.get_local_rank() + 1) * rows, num)


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return what this process has of a whole tensor if it is cut like another; all of it if that is not cut."""
    return whole[slice(*rows_of(like))] if is_cut(like) else whole


def whole_of(x: Tensor) -> Tensor:
    """Return a tensor put together from its pieces. All processes must call it if it is cut."""
    return x.full_tensor() if is_cut(x) else x


def joined(world: World, piece: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor, on the CPU, of which each process has a piece cut like another tensor."""
    # as bytes, because gloo knows no int16
    flat = piece.detach().cpu().reshape(-1).view(torch.uint8)
    return torch.cat(world.gather_rows(flat)).view(piece.dtype).view(like.shape)


def cut(unet: nn.Module, world: World, device: torch.device, sum_in_fp32: bool) -> None:
    """Cut a UNet's weights among processes, in place, and move the pieces to a device, a block at a time.

    sum_in_fp32: sum gradients in fp32 instead of their own dtype. Afterwards its parameters are DTensors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for p in unet.parameters():
        p.data = p.detach().contiguous()
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if sum_in_fp32 else None)
    units = [m for m in unet.modules() if type(m).__name__ in UNITS]
    for name in BLOCKS:
        blocks = getattr(unet, name, None)
        units += [] if blocks is None else list(blocks) if isinstance(blocks, nn.ModuleList) else [blocks]
    kind = type(unet).__name__
    for unit in (*units, unet):
        # also the outermost: what stays gathered after a pass would outlive a change of the weights
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # diffusers writes it into config.json
    type(unet).__name__ = kind
    for unit in unet.modules():
        if isinstance(unit, FSDPModule):
            # samples weigh by the number in the whole step, so gradients are summed, not averaged
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    # frozen buffers, if there are any
    for buffer in unet.buffers():
        buffer.data = buffer.data.to(device)


@contextmanager
def gathered_weights(unet: nn.Module) -> Iterator[None]:
    """Let every process have all weights of a UNet inside the block, so that each can run it without the others.

    All processes must enter the block. Nothing may change the weights inside of it. A UNet that is not cut is left as
    it is.
    """
    if not is_cut(next(unet.parameters())):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [unit for unit in unet.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
