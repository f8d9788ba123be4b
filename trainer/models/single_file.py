"""Single .safetensors files: recognizes what a file contains, and loads its parts as modules.

A file is recognized by the names and shapes of its tensors, from the header only. Buffers of the original training code
(`betas`, `model_ema.*`) are ignored: the UNet's weights are those of `model.diffusion_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.families.family import Family
from safelight.trainer.families.original_layout import (
    UNET_PREFIX,
    VAE_PREFIX,
    Layout,
    Place,
    Shape,
    older_vae_name,
    unet_layout,
    vae_layout,
)
from safelight.trainer.families.registry import FAMILIES, REFINER, REFINER_WIDTH, family_of_text_width, supported_titles
from safelight.trainer.models.build import build, shapes_of, text_encoder_with
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.tensor_files import FLOATS, TensorFile, read_state
from safelight.untrusted import UnsafeFile

PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
# empty tensors that A1111, Forge and ComfyUI look for: the UNet predicts v, its schedule has zero terminal SNR
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"

_GIVE_FULL_MODEL = "give the full model that it was made for"
_LORA = f"a LoRA, which only contains changes to a model; {_GIVE_FULL_MODEL}"
_CONTROLNET = f"a ControlNet; {_GIVE_FULL_MODEL}"
_UNSUPPORTED = f"only {supported_titles()} are supported"
_EDM = f"a model with a noise schedule of another kind (EDM); {_UNSUPPORTED}"
_VAE = "only an autoencoder; set model.vae to it, and model.base to a full model"
_OTHER_SIZE = (
    "a file can only be an autoencoder of the base's size; give its diffusers folder, or leave model.vae empty for the "
    "base's own"
)
_TEXT_ENCODER = "only the text encoder of a model; give the full model"
# models of other kinds, by a part of any tensor's name; the first match counts
OTHER_MODELS = {
    "lora_unet_": _LORA,
    "lora_te": _LORA,
    ".lora_down.": _LORA,
    ".lora_A.": _LORA,
    "control_model.": _CONTROLNET,
    "controlnet_cond_embedding.": _CONTROLNET,
    "joint_blocks.": f"Stable Diffusion 3; {_UNSUPPORTED}",
    "double_blocks.": f"Flux; {_UNSUPPORTED}",
    "single_transformer_blocks.": f"Flux; {_UNSUPPORTED}",
    "motion_modules.": f"an AnimateDiff motion module; {_GIVE_FULL_MODEL}",
    # Playground 2.5 and CosXL
    "edm_mean": _EDM,
    "edm_vpred.": _EDM,
}
# the tensors of a textual inversion embedding, of SD 1.x and 2.x or of SDXL's two text encoders
EMBEDDINGS = {"emb_params", "clip_l", "clip_g"}
EMBEDDING_WIDTHS = {(768,), (1024,), (1280,)}
# single parts of a model, by how a tensor's name begins
PARTS_ONLY = {
    "input_blocks.": f"only the UNet of a model, without the prefix {UNET_PREFIX[:-1]}; give the full model",
    "down_blocks.": (
        "only the UNet of a model, with diffusers' names; save it in the model's diffusers folder as "
        "unet/diffusion_pytorch_model.safetensors, and set model.base to the folder"
    ),
    VAE_PREFIX: _VAE,
    "encoder.down": _VAE,
    "decoder.": _VAE,
    "cond_stage_model.": _TEXT_ENCODER,
    "conditioner.embedders.": _TEXT_ENCODER,
    "text_model.": _TEXT_ENCODER,
}


def schedule_markers(schedule: NoiseSchedule) -> list[str]:
    """Return the names of the empty tensors that tell other programs of a schedule."""
    markers = {V_MARKER: schedule.prediction_type == "v_prediction", ZERO_SNR_MARKER: schedule.zero_terminal_snr}
    return [name for name, is_set in markers.items() if is_set]


@dataclass(eq=False)
class SingleFile:
    """A .safetensors file and its header. shapes: of the tensors, by name.

    setting: the setting that named the file, for messages. Raises UserError if the file is missing or damaged.
    """

    path: Path
    setting: str
    file: TensorFile = field(init=False)
    shapes: dict[str, Shape] = field(init=False)

    def __post_init__(self):
        if not self.path.is_file():
            raise UserError(f"{self} does not exist; give the path of a .safetensors file, or a folder")
        try:
            self.file = TensorFile(self.path)
        except (UnsafeFile, OSError) as error:
            raise UserError(f"{self} is damaged or not a safetensors file; get it again ({error})") from None
        self.shapes = {name: entry.shape for name, entry in self.file.entries.items()}

    def __str__(self) -> str:
        return f"{self.setting} {str(self.path)!r}"

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    @property
    def has_vae(self) -> bool:
        return self.has(VAE_PREFIX)

    @property
    def has_text_encoder(self) -> bool:
        return any(self.has(prefix) for family in FAMILIES.values() for prefix in family.text_prefixes)

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the UNet attends to; 0 without cross-attention.

        Raises UserError if that matrix is none.
        """
        keys = (n for n in self.shapes if n.startswith(UNET_PREFIX) and n.endswith(".attn2.to_k.weight"))
        name = next(keys, None)
        return 0 if name is None else self._sizes(name, 2, "matrix")[1]

    def _sizes(self, name: str, num: int, kind: str) -> Shape:
        """Return the shape of a tensor. Raises UserError unless it has num dimensions, none of them 0.

        kind: what such a tensor is called.
        """
        shape = self.shapes[name]
        if len(shape) != num or 0 in shape:
            raise UserError(f"{self} is damaged: {name} is {shape}, not a {kind}; get it again")
        return shape

    @property
    def family(self) -> Family | None:
        """The family, by the width of the text embeddings; None if no family has that width."""
        return family_of_text_width(self.text_width)

    @property
    def schedule(self) -> dict[str, str | bool]:
        """What the file says of its noise schedule, as values of a scheduler's config; the weights do not show it."""
        # ComfyUI saves the second one
        words = (self.file.metadata.get(f"modelspec.{key}", "").lower() for key in ("prediction_type", "predict_key"))
        prediction = next((PREDICTIONS[word] for word in words if word in PREDICTIONS), "")
        # other programs go by the marker
        prediction = "v_prediction" if V_MARKER in self.shapes else prediction
        config: dict[str, str | bool] = {"prediction_type": prediction} if prediction else {}
        # without the marker the config's own value holds: few files have it
        return {**config, "rescale_betas_zero_snr": True} if ZERO_SNR_MARKER in self.shapes else config

    def check_base(self) -> None:
        """Raise UserError, saying what the file is, unless it is a text-to-image model of a family."""
        for word, description in OTHER_MODELS.items():
            if any(word in name for name in self.shapes):
                raise UserError(f"{self} is {description}")
        # diffusers' files and ours call the vectors by their word
        is_word = len(self.shapes) == 1 and next(iter(self.shapes.values()))[-1:] in EMBEDDING_WIDTHS
        if self.shapes and (self.shapes.keys() <= EMBEDDINGS or is_word):
            raise UserError(
                f"{self} is a textual inversion embedding, which prompts name: --embedding and sample.embeddings take "
                f"it; {_GIVE_FULL_MODEL}"
            )
        if not self.has(UNET_PREFIX):
            for prefix, description in PARTS_ONLY.items():
                if self.has(prefix):
                    raise UserError(f"{self} is {description}")
            contents = f"its first tensor is {min(self.shapes)}" if self.shapes else "it is empty"
            raise UserError(
                f"{self} is not a Stable Diffusion model: no tensor's name begins with {UNET_PREFIX} ({contents}); "
                f"{_UNSUPPORTED}"
            )
        if self.text_width == 0:
            raise UserError(
                f"{self} is not a Stable Diffusion model: it has no cross-attention to text; {_UNSUPPORTED}"
            )
        if self.text_width == REFINER_WIDTH:
            raise UserError(f"{self} is {REFINER}")
        first = f"{UNET_PREFIX}input_blocks.0.0.weight"
        channels = self._sizes(first, 4, "convolution")[1] if first in self.shapes else 4
        if channels != 4:
            raise UserError(
                f"{self} is an inpainting or editing model, whose UNet has {channels} input channels; "
                "give a text-to-image model, which has 4"
            )

    def _check(self, layout: Layout, shapes: dict[str, Shape], part: str, source: str, fix: str = "") -> None:
        """Raise UserError unless the file has the tensors of a part, in the shapes of its config.

        fix: what to do about it; '' for what to do about a file of a whole model.
        """
        missing = [place.name for place in layout.values() if place.name not in self.shapes]
        if missing:
            raise UserError(
                f"{self}: its {part} does not fit {source}: it lacks {counted(len(missing), 'tensor')}, the first is "
                f"{min(missing)}; {fix or 'give a file that is complete, or the config that it was made with'}"
            )
        for name, place in layout.items():
            dtype = self.file.entries[place.name].dtype
            if dtype not in FLOATS:
                raise UserError(f"{self} is quantized ({place.name} is {dtype}); give the fp16, bf16 or fp32 model")
            expected, actual = place.original_shape(shapes[name]), self.shapes[place.name]
            # files have an autoencoder's attention as 1x1 convolutions or as matrices
            if actual != expected and not (place.as_conv and actual == shapes[name]):
                raise UserError(
                    f"{self}: its {part} does not fit {source}: {place.name} is {actual}, not {expected}; "
                    f"{fix or 'give a file and a config that belong together'}"
                )

    def _read(self, layout: Layout, shapes: dict[str, Shape], dtype: torch.dtype) -> dict[str, Tensor]:
        return read_state(dict.fromkeys(self.shapes, self.file), layout, shapes, dtype)

    def check_unet(self, unet: nn.Module, source: str) -> Layout:
        """Return where the file has a UNet's tensors.

        unet: on the meta device, made from its config. source: the setting that named the config, for messages.
        Raises UserError if tensors are missing, unexpected or of another shape.
        """
        shapes = shapes_of(unet)
        layout = unet_layout(shapes, unet.config.layers_per_block)
        self._check(layout, shapes, "UNet", source)
        self._check_nothing_else(layout, UNET_PREFIX, "UNet", source)
        return layout

    def load_unet(self, make: Callable[[], nn.Module], dtype: torch.dtype, source: str) -> nn.Module:
        """Return the UNet on the CPU. make: builds it from its config; source: the setting that named the config."""
        unet = build(make, source)
        layout = self.check_unet(unet, source)
        unet.load_state_dict(self._read(layout, shapes_of(unet), dtype), assign=True)
        return unet.eval()

    def load_vae(self, make: Callable[[], nn.Module], source: str) -> nn.Module:
        """Return the AutoencoderKL in fp32 on the CPU, from a full model or a file of its own in either layout.

        make: builds it from its config; source: the setting that named the config.
        """
        vae = build(make, source)
        shapes = shapes_of(vae)
        layout = vae_layout(shapes)
        if self.has("encoder.down_blocks."):
            layout = {
                name: Place(name if name in self.shapes else older_vae_name(name), as_conv=p.as_conv)
                for name, p in layout.items()
            }
        elif not self.has_vae:
            if self.has("encoder.layers.") or self.has("decoder.layers."):
                raise UserError(f"{self} is an AutoencoderTiny; give its diffusers folder, with config.json, instead")
            layout = {name: Place(p.name.removeprefix(VAE_PREFIX), as_conv=p.as_conv) for name, p in layout.items()}
            if not self.has("encoder.down."):
                contents = f"its first tensor is {min(self.shapes)}" if self.shapes else "it is empty"
                raise UserError(
                    f"{self} does not contain an autoencoder ({contents}); give one in a .safetensors file, or its "
                    "diffusers folder"
                )
        self._check(layout, shapes, "autoencoder", source, _OTHER_SIZE if self.setting == "model.vae" else "")
        vae.load_state_dict(self._read(layout, shapes, torch.float32), assign=True)
        return vae

    def load_text_encoder(self, family: Family, part: str, config, source: str) -> nn.Module:
        """Return a text encoder in fp32 on the CPU. part: as in family.text_encoders. config: a CLIPTextConfig."""
        import transformers

        kind = getattr(transformers, family.text_encoders[part])
        shapes = shapes_of(build(lambda: kind(config), source))
        layouts = family.text_layouts_in_files(part, shapes)
        # of one that fits in no layout, the message names what it lacks of the usual one
        fits = (one for one in layouts if any(place.name in self.shapes for place in one.values()))
        layout = next(fits, layouts[0])
        self._check(layout, shapes, "text encoder", source)
        return text_encoder_with(kind, config, self._read(layout, shapes, torch.float32))

    def _check_nothing_else(self, layout: Layout, prefix: str, part: str, source: str) -> None:
        used = {place.name for place in layout.values()}
        others = [name for name in self.shapes if name.startswith(prefix) and name not in used]
        if others:
            raise UserError(
                f"{self}: its {part} does not fit {source}: it has {counted(len(others), 'tensor')} more, the first is "
                f"{min(others)}; give the config that it was made with"
            )
