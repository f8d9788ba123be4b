"""Patching a diffusers UNet: `apply(unet)` makes its modules run on our kernels, `remove(unet)` undoes it.

What is swapped. A module is patched by changing its class, which replaces its forward pass and nothing else:

    ResnetBlock2D           -> PatchedResnetBlock        kernels/unet/patched_resnet.py
    Upsample2D              -> PatchedUpsample
    conv_in                 -> PatchedConvIn
    conv_norm_out, conv_act -> PassThrough, and conv_out -> PatchedConvOut, which computes all three
    time_embed_act          -> TimeProjections           the one new module; it has no Parameters
    Transformer2DModel      -> PatchedTransformer        kernels/unet/patched_transformer.py
    BasicTransformerBlock   -> PatchedTransformerBlock
    UNet2DConditionModel    -> PatchedUNet

Every Parameter keeps its identity, its name and its module, so state dict, optimizer and checkpoints are the same with
and without the patch, and a run can resume either way. A module that differs in any detail from what its patched class
computes (`why_unsupported`) keeps its class and is reported.

What is packed. Weights that project the same input are moved next to each other in one buffer, so that one matmul
computes all their projections (kernels/ops/packed_linear.py). `_packed_groups` lists the groups: each self-attention's
q, k, v; the keys and values of cross-attentions; the time projections of all residual blocks. The last two can be
computed once per step for all blocks, because every block gets the same text and the same time embedding; each block
then picks its own by text_index or time_index. That requires that no unpatched module sees the text or the time
embedding (`_can_share`).

`pack` changes where a Parameter's data lives, not the Parameter. Whatever moves the data later (casting to 16 bits, a
deep copy) undoes it; `repack` restores it, and `remove` gives every Parameter its own contiguous memory again.

The third change is memory order: convolution weights become channels-last.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from safelight.kernels.ops.packed_linear import adjacent_view, pack, unpack
from safelight.kernels.ops.quantized_weight import QuantizedWeight
from safelight.kernels.unet.attention import AttentionChoice, attention_cases, choose_attention
from safelight.kernels.unet.low_rank import has_adapter, packed_adapters
from safelight.kernels.unet.patched_resnet import (
    PassThrough,
    PatchedConvIn,
    PatchedConvOut,
    PatchedModule,
    PatchedResnetBlock,
    PatchedUpsample,
    TimeProjections,
    is_norm,
    is_plain_conv,
    time_parameters,
)
from safelight.kernels.unet.patched_transformer import (
    PatchedTransformer,
    PatchedTransformerBlock,
    PatchedUNet,
    qkv_layers,
    qkv_parameters,
    text_layers,
    text_parameters,
)

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# blocks that pass the time embedding and the text through unchanged
FORWARDING_BLOCKS = (
    "CrossAttnDownBlock2D",
    "CrossAttnUpBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
)
# per matmul of keys and values: the gradient of all its weights is allocated at once, at the end of the backward pass
MAX_TEXT_BYTES = 64 << 20


@functools.cache
def _patches() -> dict[type[nn.Module], type[PatchedModule]]:
    """Return diffusers' class -> the class that replaces it."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    return {
        ResnetBlock2D: PatchedResnetBlock,
        Transformer2DModel: PatchedTransformer,
        BasicTransformerBlock: PatchedTransformerBlock,
        Upsample2D: PatchedUpsample,
    }


@functools.cache
def _patched_class(patched: type[PatchedModule], original: type[nn.Module]) -> type:
    # keep the original's name, which save_pretrained writes and from_pretrained reads
    return type(original.__name__, (patched, original), {"original": original})


def _swap(module: nn.Module, patched: type[PatchedModule]) -> None:
    module.__class__ = _patched_class(patched, type(module))


@dataclass(frozen=True)
class Patch:
    """What `apply` did.

    swapped: (name, original class) of each module that now runs on kernels.
    unsupported: (name, reason) of each module of a patchable class that differs in some detail.
    unpatched: (name, class) of all other modules with Parameters of their own.
    packed: (description, number of tensors, bytes) of each group of weights that shares a buffer.
    """

    swapped: tuple[tuple[str, str], ...]
    unsupported: tuple[tuple[str, str], ...]
    unpatched: tuple[tuple[str, str], ...]
    packed: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        counts = Counter(kind for _, kind in self.swapped)
        text = "kernels in " + ", ".join(f"{n} {kind}" for kind, n in counts.items())
        unsupported = "".join(f"; not in {name}: {why}" for name, why in self.unsupported)
        return text + unsupported + (f"; {len(self.unpatched)} other modules unchanged" if self.unpatched else "")


def should_patch(setting: str, device: torch.device) -> bool:
    """Return whether `train.kernels` = auto | on | off asks for the patch on a device; auto means on a GPU only.

    On a CPU the ops run their references, which are slower than PyTorch's own operators.
    """
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def is_patched(unet: nn.Module) -> bool:
    """Return whether `apply` was called on a UNet."""
    return isinstance(unet, PatchedUNet)


def apply(unet: UNet2DConditionModel, choice: AttentionChoice | None = None, *, recompute: bool = False) -> Patch:
    """Make a UNet run on our kernels, in place, and return what was patched. Call `repack` if its weights move later.

    choice: the attention backends; None probes them here. recompute: feed-forward blocks save nothing between their two
    matmuls, which costs one more matmul in the backward pass.
    Raises ValueError for anything but an unpatched UNet2DConditionModel.
    """
    from diffusers import UNet2DConditionModel

    if type(unet) is not UNet2DConditionModel:
        what = "patched already" if is_patched(unet) else f"a {type(unet).__name__}"
        raise ValueError(
            f"the UNet is {what}; safelight.kernels.unet.patch.apply takes an unpatched UNet2DConditionModel"
        )
    first = next(unet.parameters())
    if choice is None:
        choice = choose_attention(first.device, first.dtype, attention_cases(unet))
    swapped, unsupported = [], []
    for name, module in unet.named_modules():
        patched = _patches().get(type(module))
        if patched is None:
            continue
        why = patched.why_unsupported(module)
        if why:
            unsupported.append((name, why))
            continue
        swapped.append((name, type(module).__name__))
        _swap(module, patched)
    _swap(unet, PatchedUNet)
    swapped += _patch_ends(unet)
    for module in unet.modules():
        if isinstance(module, PatchedTransformerBlock):
            module.choice, module.recompute = choice, recompute
        if isinstance(module, PatchedTransformer) and isinstance(module.transformer_blocks[0], PatchedTransformerBlock):
            # in a tuple, or the projection would appear in the state dict a second time
            module.transformer_blocks[0].input_proj = (module.proj_in,)
    _share_projections(unet)
    repack(unet)
    _to_channels_last(unet)
    reported = tuple(name + "." for name, _ in [*swapped, *unsupported])
    unpatched = [
        (name, type(module).__name__)
        for name, module in unet.named_modules()
        if next(module.parameters(recurse=False), None) is not None and not f"{name}.".startswith(reported)
    ]
    packed = tuple(
        (what, len(group), sum(p.numel() * p.element_size() for p in group)) for what, group in _packed_groups(unet)
    )
    return Patch(tuple(swapped), tuple(unsupported), tuple(unpatched), packed)


def _patch_ends(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Swap conv_in, and conv_out together with the norm and activation before it; yield (name, class) of each."""
    if is_plain_conv(unet.conv_in, unet.conv_in.kernel_size[0]):
        _swap(unet.conv_in, PatchedConvIn)
        yield "conv_in", "Conv2d"
    norm, act, conv = unet.conv_norm_out, unet.conv_act, unet.conv_out
    if norm is not None and is_norm(norm, nn.GroupNorm) and type(act) is nn.SiLU and is_plain_conv(conv, 3):
        _swap(norm, PassThrough), _swap(act, PassThrough), _swap(conv, PatchedConvOut)
        # in a tuple, or the norm would appear in the state dict a second time
        conv.fused_norm = (norm,)
        yield "conv_norm_out", "GroupNorm"
        yield "conv_out", "Conv2d"


def _share_projections(unet: nn.Module) -> None:
    """Give each block its index into the shared time and text projections, if the UNet supports sharing them."""
    resnets = [m for m in unet.modules() if isinstance(m, PatchedResnetBlock)]
    blocks = [m for m in unet.modules() if isinstance(m, PatchedTransformerBlock)]
    can_share = _can_share(unet)
    if can_share and unet.time_embed_act is None:
        for index, resnet in enumerate(resnets):
            resnet.time_index = index
        unet.time_embed_act = TimeProjections(resnets)
    unet.text_groups = tuple(map(tuple, _text_groups(blocks))) if can_share else ()
    for index, block in enumerate(block for group in unet.text_groups for block in group):
        block.text_index = index


def _packed_groups(unet: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield (description, Parameters) of every group that shares a buffer in a patched UNet."""
    blocks = [m for m in unet.modules() if isinstance(m, PatchedTransformerBlock)]
    for block in blocks:
        yield "q, k, v of a self-attention", qkv_parameters(block)
    if isinstance(unet.time_embed_act, TimeProjections):
        weights, *biases = time_parameters(unet.time_embed_act.blocks)
        yield "time embeddings of a step", weights
        for group in biases:
            yield "biases of time embeddings", group
    for group in unet.text_groups:
        yield "keys and values of all cross-attentions", text_parameters(group)
    if not unet.text_groups:
        for block in blocks:
            yield "keys and values of a cross-attention", text_parameters([block])
    for layers in _sharing_layers(unet):
        if adapters := packed_adapters(layers):
            yield "adapters of layers with one input", [adapter.lora_A for adapter in adapters]


def _sharing_layers(unet: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the linear layers that project one input together."""
    blocks = [m for m in unet.modules() if isinstance(m, PatchedTransformerBlock)]
    yield from map(qkv_layers, blocks)
    if isinstance(unet.time_embed_act, TimeProjections):
        yield [block.time_emb_proj for block in unet.time_embed_act.blocks]
    yield from map(text_layers, unet.text_groups or [[block] for block in blocks])


def shared_projections(unet: nn.Module) -> dict[str, str]:
    """Return parameter name -> shared projection, for Parameters projected once per step for several blocks.

    The gradients of one shared projection arrive together, at the end of the backward pass instead of with their
    blocks'. Empty for an unpatched UNet.
    """
    if not is_patched(unet):
        return {}
    projection_of: dict[nn.Parameter, str] = {}
    if isinstance(unet.time_embed_act, TimeProjections):
        for group in time_parameters(unet.time_embed_act.blocks):
            projection_of |= dict.fromkeys(group, "time projections")
        projection_of |= _adapter_parameters(
            [block.time_emb_proj for block in unet.time_embed_act.blocks], "time projections"
        )
    for index, blocks in enumerate(unet.text_groups):
        projection_of |= dict.fromkeys(text_parameters(blocks), f"text projections {index}")
        projection_of |= _adapter_parameters(text_layers(blocks), f"text projections {index}")
    return {name: projection_of[p] for name, p in unet.named_parameters() if p in projection_of}


def _adapter_parameters(layers: list[nn.Module], projection: str) -> dict[nn.Parameter, str]:
    return {p: projection for layer in layers if has_adapter(layer) for p in layer.adapter.parameters()}


def repack(unet: nn.Module) -> None:
    """Pack weights again after something moved them, such as an optimizer that casts them to 16 bits.

    Anything that holds the weights' addresses or detached views must be created afterwards.
    """
    for _, parameters in _packed_groups(unet):
        # quantized weights are put together when they are dequantized
        if not isinstance(parameters[0], QuantizedWeight) and adjacent_view(parameters, 0) is None:
            pack(parameters)


def _can_share(unet: nn.Module) -> bool:
    """Return whether only patched modules receive the time embedding and the text.

    Only then can the projections shared by all blocks be passed in their place.
    """
    from diffusers.models.unets import unet_2d_blocks

    parts = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
    attentions = [a for part in parts for a in getattr(part, "attentions", ())]
    return (
        all(type(part) in [getattr(unet_2d_blocks, name) for name in FORWARDING_BLOCKS] for part in parts)
        and all(isinstance(resnet, PatchedResnetBlock) for part in parts for resnet in part.resnets)
        and all(isinstance(a, PatchedTransformer) for a in attentions)
        and all(isinstance(block, PatchedTransformerBlock) for a in attentions for block in a.transformer_blocks)
    )


def _text_groups(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Group blocks whose keys and values are one matmul: same text width, at most MAX_TEXT_BYTES of weights."""
    groups: list[list[nn.Module]] = []
    bytes_left, width = 0, 0
    for block in blocks:
        weights = text_parameters([block])
        size = sum(w.numel() * w.element_size() for w in weights)
        if not groups or size > bytes_left or weights[0].shape[1] != width:
            groups.append([])
            bytes_left, width = MAX_TEXT_BYTES, weights[0].shape[1]
        groups[-1].append(block)
        bytes_left -= size
    return groups


@torch.no_grad()
def _to_channels_last(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.detach().contiguous(memory_format=torch.channels_last)


def remove(unet: nn.Module) -> None:
    """Restore the original classes, and give every weight its own contiguous memory. No-op if the UNet is unpatched."""
    if not is_patched(unet):
        return
    if isinstance(unet.time_embed_act, TimeProjections):
        del unet.time_embed_act
        unet.time_embed_act = None
    del unet.text_groups
    for module in unet.modules():
        for name in ("fused_norm", "input_proj", "time_index", "text_index", "choice", "recompute"):
            module.__dict__.pop(name, None)
        if isinstance(module, PatchedModule):
            module.__class__ = type(module).original
    unpack(list(unet.parameters()))
