"""Optimizer state of weights that are cut into pieces (distributed.shard = full), put together and cut for checkpoints.

A checkpoint holds the state of whole weights. Quantization blocks of 256 elements never cross a piece. Where a piece
begins at a multiple of 256 elements, its blocks are blocks of the whole weight and are carried over bit for bit; where
one does not, the moments of that weight are requantized: each is off by at most half the code map's widest gap times
its block's absmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.moment_blocks import BLOCK_SIZE, num_blocks
from safelight.kernels.optim.adamw8bit_state import SIGNED, strides_of
from safelight.kernels.optim.blockwise_8bit import dequantize, in_memory_order, quantize
from safelight.trainer.distributed.sharded import joined, rows_of
from safelight.trainer.distributed.world import World


def is_aligned(p: Tensor) -> bool:
    """Return whether every piece of a cut weight begins at a multiple of the block size."""
    rows = -(-p.shape[0] // p.device_mesh.size())
    return rows >= p.shape[0] or rows * (p.numel() // p.shape[0]) % BLOCK_SIZE == 0


def whole_parts(world: World, p: Tensor, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of a whole weight, part by part, on the CPU. All processes must call it.

    p: the weight, cut. parts: of this process's piece, as in `state_of`; of an empty piece they are empty tensors.
    """
    for number, signed in enumerate(SIGNED, start=1):
        codes, absmax = parts[f"state{number}"], parts.get(f"absmax{number}")
        if absmax is None:
            yield f"state{number}", joined(world, codes, p)
        elif is_aligned(p):
            yield f"state{number}", joined(world, codes, p)
            yield f"absmax{number}", torch.cat(world.gather_rows(absmax))
        else:
            values = dequantize(in_memory_order(codes), absmax, signed) if codes.numel() else codes.float()
            whole, scales = quantize(joined(world, values, p).view(-1), signed)
            yield f"state{number}", whole.view(p.shape)
            yield f"absmax{number}", scales
    for name in ("remainder", "master"):
        if name in parts:
            yield name, joined(world, parts[name], p)
    # a piece with a non-finite gradient may have been skipped on its own
    yield "step", torch.cat(world.gather_rows(parts["step"].reshape(1))).max()


def cut_parts(p: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of this process's piece of a weight from that of the whole one, which a checkpoint holds.

    Raises UserError if it is not of this weight.
    """
    first, end = rows_of(p)
    inner, cut = p.numel() // p.shape[0], {}
    for name, x in parts.items():
        if name in ("remainder", "master", "state1", "state2"):
            if x.shape != p.shape:
                raise UserError(f"{name} has shape {tuple(x.shape)}, its weight {tuple(p.shape)}")
            cut[name] = x[first:end]
        elif name == "step":
            cut[name] = x
    for number, signed in enumerate(SIGNED, start=1):
        if (absmax := parts.get(f"absmax{number}")) is None or f"state{number}" not in parts:
            continue
        codes = parts[f"state{number}"]
        if absmax.shape != (num_blocks(p.numel()),) or absmax.dtype != torch.float32 or codes.dtype != torch.uint8:
            raise UserError(f"absmax{number} is {tuple(absmax.shape)} {absmax.dtype} for codes of {codes.dtype}")
        strides = strides_of(parts, codes)
        if strides == codes.contiguous().stride() and first * inner % BLOCK_SIZE == 0:
            cut[f"absmax{number}"] = absmax[first * inner // BLOCK_SIZE : num_blocks(end * inner)]
            continue
        like = torch.empty_strided(tuple(p.shape), strides, dtype=torch.uint8).copy_(codes)
        values = torch.empty_like(like, dtype=torch.float32)
        in_memory_order(values).copy_(dequantize(in_memory_order(like), absmax.cpu(), signed))
        requantized, cut[f"absmax{number}"] = quantize(values[first:end].reshape(-1), signed)
        cut[f"state{number}"] = requantized.view(end - first, *p.shape[1:])
    return cut
