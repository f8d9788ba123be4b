"""Single .safetensors files: what one is, by its tensors' names and shapes, and its parts as modules.

Only the header is read to tell; tensors are read one at a time, straight into the dtype wanted. Buffers of the original
training code (`betas`, `model_ema.*`) are left alone: the weights taken are those of `model.diffusion_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.families.family import Family
from safelight.trainer.families.original_layout import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Layout,
    Place,
    Shape,
    clip_layout,
    open_clip_layout,
    unet_layout,
    vae_layout,
)
from safelight.trainer.families.registry import family_of_text_width, trainable_titles

DTYPES = {"F64", "F32", "F16", "BF16"}
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
# merges from before transformers 4 named the text encoder's tensors so
OLD_CLIP_PREFIX = CLIP_PREFIX.removesuffix("text_model.")

# by a word of some tensor's name; the first that is found counts
FOREIGN = {
    "lora_unet_": "a LoRA, which holds differences only; give the full model",
    "lora_te": "a LoRA, which holds differences only; give the full model",
    ".lora_down.": "a LoRA, which holds differences only; give the full model",
    ".lora_A.": "a LoRA, which holds differences only; give the full model",
    "emb_params": "a textual inversion embedding; give the full model",
    "control_model.": "a ControlNet; give the full model",
    "controlnet_cond_embedding.": "a ControlNet; give the full model",
    "conditioner.embedders.": f"Stable Diffusion XL; only {trainable_titles()} are supported yet",
    "joint_blocks.": f"Stable Diffusion 3; only {trainable_titles()} are supported yet",
    "double_blocks.": f"Flux; only {trainable_titles()} are supported yet",
    "single_transformer_blocks.": f"Flux; only {trainable_titles()} are supported yet",
    "motion_modules.": "an AnimateDiff motion module; give the full model",
}
# files of one part, by the start of a name
BARE = {
    "input_blocks.": f"a bare UNet without the prefix {UNET_PREFIX[:-1]}; give the full model",
    "down_blocks.": "a bare UNet with diffusers' names; put it into a diffusers folder as unet/diffusion_pytorch_model.safetensors",
    VAE_PREFIX: "an autoencoder alone; give it as model.vae, and a whole model as model.base",
    "encoder.down": "an autoencoder alone; give it as model.vae, and a whole model as model.base",
    "decoder.": "an autoencoder alone; give it as model.vae, and a whole model as model.base",
    "cond_stage_model.": "a text encoder alone; give the full model",
    "text_model.": "a text encoder alone; give the full model",
}


@dataclass(eq=False)
class SingleFile:
    """A .safetensors file and what its header says: shapes and dtypes by tensor. setting: who named it, for messages."""

    path: Path
    setting: str
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.path.is_file():
            raise UserError(f"{self} does not exist; give a .safetensors file, or a folder")
        try:
            with safe_open(self.path, "pt") as file:
                self.metadata = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self} is damaged or no safetensors file: {str(error).splitlines()[0]}") from None

    def __str__(self) -> str:
        return f"{self.setting} {str(self.path)!r}"

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    @property
    def has_vae(self) -> bool:
        return self.has(VAE_PREFIX)

    @property
    def has_text_encoder(self) -> bool:
        return self.has(OLD_CLIP_PREFIX) or self.has(OPEN_CLIP_PREFIX)

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the UNet attends to; 0 if it attends to none."""
        keys = (n for n in self.shapes if n.startswith(UNET_PREFIX) and n.endswith(".attn2.to_k.weight"))
        return next((self.shapes[name][1] for name in keys), 0)

    @property
    def family(self) -> Family | None:
        """The family by the width of the text that the UNet attends to; None for a size of its own."""
        return family_of_text_width(self.text_width)

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction by the file's own metadata, '' where that does not say: the weights do not tell."""
        return PREDICTIONS.get(self.metadata.get("modelspec.prediction_type", "").lower(), "")

    def check_base(self) -> None:
        """Raise UserError, saying what the file is, unless it is a text-to-image model of a family that can be trained."""
        for word, what in FOREIGN.items():
            if any(word in name for name in self.shapes):
                raise UserError(f"{self} is {what}")
        if not self.has(UNET_PREFIX):
            for prefix, what in BARE.items():
                if self.has(prefix):
                    raise UserError(f"{self} is {what}")
            raise UserError(
                f"{self} is no Stable Diffusion: no tensor's name begins with {UNET_PREFIX} (the first is {min(self.shapes, default='missing')})"
            )
        if self.text_width == 0:
            raise UserError(f"{self} is no Stable Diffusion: its network has no cross-attention to text as a UNet has")
        if self.family is not None and self.family.untrainable:
            raise UserError(f"{self} is {self.family.title}; only {trainable_titles()} are supported yet")
        channels = self.shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", (0, 4))[1]
        if channels != 4:
            raise UserError(
                f"{self} takes {channels} latent channels, as inpainting and editing models do; give a text-to-image model, which takes 4"
            )

    def _check(self, layout: Layout, shapes: dict[str, Shape], part: str, source: str) -> None:
        """Raise UserError unless the tensors of a part are here, in the shapes of its config."""
        missing = [place.name for place in layout.values() if place.name not in self.shapes]
        if missing:
            raise UserError(
                f"{self}: its {part} lacks {len(missing)} of the tensors of {source}, the first is {min(missing)}"
            )
        for name, place in layout.items():
            if self.dtypes[place.name] not in DTYPES:
                dtype = self.dtypes[place.name]
                raise UserError(f"{self} is quantised ({place.name} is {dtype}); give the fp16, bf16 or fp32 model")
            wanted, found = place.original_shape(shapes[name]), self.shapes[place.name]
            # attention of an autoencoder is found as convolution and as matrix
            if found != wanted and not (place.as_conv and found == shapes[name]):
                raise UserError(f"{self}: its {part} does not fit {source}: {place.name} is {found}, not {wanted}")

    def _read(self, layout: Layout, shapes: dict[str, Shape], dtype: torch.dtype) -> dict[str, Tensor]:
        state = {}
        with safe_open(self.path, "pt") as file:
            for name, place in layout.items():
                rows = shapes[name][0]
                if place.third is None:
                    tensor = file.get_tensor(place.name)
                else:
                    tensor = file.get_slice(place.name)[place.third * rows : (place.third + 1) * rows]
                state[name] = tensor.reshape(shapes[name]).to(dtype)
        return state

    def check_unet(self, unet: nn.Module, source: str) -> Layout:
        """Return where a UNet's tensors are. unet: on the meta device, by its config; source: names that in messages.

        Raises UserError where tensors are missing, too many or of another shape.
        """
        shapes = _shapes(unet)
        layout = unet_layout(shapes, unet.config.layers_per_block)
        self._check(layout, shapes, "UNet", source)
        self._check_nothing_else(layout, UNET_PREFIX, "UNet", source)
        return layout

    def load_unet(self, make: Callable[[], nn.Module], dtype: torch.dtype, source: str) -> nn.Module:
        """Return the UNet on the CPU. make: builds it by a config; source: names that config in messages."""
        with torch.device("meta"):
            unet = make()
        layout = self.check_unet(unet, source)
        unet.load_state_dict(self._read(layout, _shapes(unet), dtype), assign=True)
        return unet.eval()

    def load_vae(self, make: Callable[[], nn.Module], source: str) -> nn.Module:
        """Return the AutoencoderKL in fp32 on the CPU, of a whole model or of an autoencoder's own file in either layout."""
        with torch.device("meta"):
            vae = make()
        shapes = _shapes(vae)
        layout = vae_layout(shapes)
        if self.has("encoder.down_blocks."):
            layout = {
                name: Place(name if name in self.shapes else _older_name(name), as_conv=p.as_conv)
                for name, p in layout.items()
            }
        elif not self.has_vae:
            if self.has("encoder.layers.") or self.has("decoder.layers."):
                raise UserError(f"{self} is an AutoencoderTiny; give its diffusers folder, with config.json")
            layout = {name: Place(p.name.removeprefix(VAE_PREFIX), as_conv=p.as_conv) for name, p in layout.items()}
            if not self.has("encoder.down."):
                raise UserError(
                    f"{self} holds no autoencoder (its first tensor is {min(self.shapes, default='missing')})"
                )
        self._check(layout, shapes, "autoencoder", source)
        vae.load_state_dict(self._read(layout, shapes, torch.float32), assign=True)
        return vae

    def load_text_encoder(self, config, source: str) -> nn.Module:
        """Return the CLIPTextModel in fp32 on the CPU. config: a CLIPTextConfig."""
        from transformers import CLIPTextModel

        with torch.device("meta"):
            shapes = _shapes(CLIPTextModel(config))
        if self.has(OPEN_CLIP_PREFIX):
            layout = open_clip_layout(shapes)
        else:
            layout = clip_layout(shapes)
            if not self.has(CLIP_PREFIX):
                layout = {name: Place(OLD_CLIP_PREFIX + p.name.removeprefix(CLIP_PREFIX)) for name, p in layout.items()}
        self._check(layout, shapes, "text encoder", source)
        state = self._read(layout, shapes, torch.float32)
        # the way in that also fills buffers no file holds
        return CLIPTextModel.from_pretrained(None, config=config, state_dict=state, torch_dtype=torch.float32)

    def _check_nothing_else(self, layout: Layout, prefix: str, part: str, source: str) -> None:
        used = {place.name for place in layout.values()}
        others = [name for name in self.shapes if name.startswith(prefix) and name not in used]
        if others:
            raise UserError(
                f"{self}: its {part} has {len(others)} tensors more than {source}, the first is {min(others)}"
            )


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _older_name(name: str) -> str:
    """Return what diffusers called a tensor of the autoencoder's attention before version 0.15."""
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name
