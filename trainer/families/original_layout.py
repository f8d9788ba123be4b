"""Maps each tensor of a diffusers model to its name in Stable Diffusion's original files, for import and export.

The mappings are made of names and shapes only, for any number of blocks. The original layout numbers all layers of the
UNet's down path in one sequence (`input_blocks.7`) and keeps the VAE's attention as 1x1 convolutions. OpenCLIP's text
encoders (SD 2.x, the second of SDXL) have q, k and v stacked and their projection transposed.
Source: CompVis/stable-diffusion (openaimodel.py, model.py), Stability-AI/generative-models (encoders/modules.py),
mlfoundations/open_clip (transformer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
# merges made with transformers before version 4 name the text encoder's tensors without text_model
OLD_CLIP_PREFIX = CLIP_PREFIX.removesuffix("text_model.")
OPEN_CLIP_PREFIX = "cond_stage_model.model."
# SDXL's text encoders
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer.text_model."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a diffusers tensor is in an original file.

    name: of the original tensor, with its prefix. third: which third of it along the first axis, 0, 1 or 2, if q, k and
    v are stacked; None if the tensor is separate. as_conv: whether a (C, C) matrix is kept as a 1x1 convolution,
    (C, C, 1, 1). transposed: whether a matrix is kept with its rows as columns.
    """

    name: str
    third: int | None = None
    as_conv: bool = False
    transposed: bool = False

    def original_shape(self, shape: Shape) -> Shape:
        """Return the shape of the original tensor. shape: of the diffusers tensor."""
        if self.third is not None:
            return (3 * shape[0], *shape[1:])
        if self.transposed:
            return shape[::-1]
        return (*shape, 1, 1) if self.as_conv else tuple(shape)


Layout = dict[str, Place]

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    # SDXL's pooled embedding and sizes
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _inner(kind: str, rest: str) -> str:
    """Return the original name of a tensor in a resnet or attention block; attention names are the same in both."""
    if kind != "resnets":
        return rest
    module, _, tensor = rest.rpartition(".")
    return f"{_UNET_RESNET[module]}.{tensor}"


def unet_layout(names: Iterable[str], layers_per_block: int) -> Layout:
    """Return the places of a UNet2DConditionModel's tensors, by name. Raises KeyError for a name without a place."""
    names = list(names)
    attended = {
        match[2] for match in map(_UNET_BLOCK.match, names) if match and match[1] == "up" and match[3] == "attentions"
    }
    layout = {}
    for name in names:
        if match := _UNET_BLOCK.fullmatch(name):
            way, block, kind, layer, rest = match.groups()
            # a down block is numbered by its layers and its down-sampler; an up-sampler has its last layer's number
            row = int(block) * (layers_per_block + 1) + (
                int(layer) if kind in ("resnets", "attentions") else layers_per_block
            )
            if kind == "downsamplers":
                original = f"input_blocks.{row + 1}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                original = f"output_blocks.{row}.{2 if block in attended else 1}.{rest}"
            else:
                blocks = f"input_blocks.{row + 1}" if way == "down" else f"output_blocks.{row}"
                original = f"{blocks}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"
        elif match := _UNET_MIDDLE.fullmatch(name):
            kind, layer, rest = match.groups()
            original = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{_inner(kind, rest)}"
        else:
            module, _, tensor = name.rpartition(".")
            original = f"{_UNET_ENDS[module]}.{tensor}"
        layout[name] = Place(UNET_PREFIX + original)
    return layout


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def vae_layout(names: Iterable[str]) -> Layout:
    """Return the places of an AutoencoderKL's tensors."""
    names = list(names)
    last = max(int(match[2]) for match in map(_VAE_BLOCK.match, names) if match)
    layout = {}
    for name in names:
        as_conv = False
        if match := _VAE_BLOCK.fullmatch(name):
            half, block, kind, layer, rest = match.groups()
            # the original decoder numbers its blocks from the image inwards
            way, number = ("down", int(block)) if half == "encoder" else ("up", last - int(block))
            inner = f"block.{layer}" if kind == "resnets" else f"{way}sample"
            original = f"{half}.{way}.{number}.{inner}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        elif match := _VAE_MIDDLE.fullmatch(name):
            half, kind, layer, rest = match.groups()
            if kind == "attentions":
                module, _, tensor = rest.rpartition(".")
                as_conv = module != "group_norm" and tensor == "weight"
                original = f"{half}.mid.attn_1.{_VAE_ATTENTION[module]}.{tensor}"
            else:
                original = f"{half}.mid.block_{int(layer) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        else:
            original = name.replace("conv_norm_out", "norm_out")
        layout[name] = Place(VAE_PREFIX + original, as_conv=as_conv)
    return layout


def older_vae_name(name: str) -> str:
    """Return the name that a tensor of the autoencoder's attention had in diffusers before version 0.15."""
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def clip_layout(names: Iterable[str], prefix: str = CLIP_PREFIX) -> Layout:
    """Return the places of OpenAI's CLIPTextModel. transformers 4 prefixes names with `text_model.`, 5 does not."""
    return {name: Place(prefix + name.removeprefix("text_model.")) for name in names}


_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_STACK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def open_clip_layout(names: Iterable[str], prefix: str = OPEN_CLIP_PREFIX) -> Layout:
    """Return the places of a text encoder of OpenCLIP's.

    SD 2.x's lacks the original's last layer and its projection, because they are unused.
    """
    layout = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", bare):
            layer, module, tensor = match.groups()
            block = f"{prefix}transformer.resblocks.{layer}"
            if module in _OPEN_CLIP_STACK:
                place = Place(f"{block}.attn.in_proj_{tensor}", third=_OPEN_CLIP_STACK.index(module))
            else:
                place = Place(f"{block}.{_OPEN_CLIP_LAYER[module]}.{tensor}")
        elif bare == "text_projection.weight":
            place = Place(f"{prefix}text_projection", transposed=True)
        else:
            place = Place(prefix + _OPEN_CLIP_ENDS[bare])
        layout[name] = place
    return layout


def to_original(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return a diffusers model's tensors under their original names and in original shapes; stacked ones are copies."""
    original: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        place = layout[name]
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = tensor
        elif place.transposed:
            original[place.name] = tensor.T.contiguous()
        else:
            original[place.name] = tensor.reshape(place.original_shape(tuple(tensor.shape)))
    return original | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
