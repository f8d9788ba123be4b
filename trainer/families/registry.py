"""The registry of model families. A new family is a subclass of Family and a row here (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping

from safelight.trainer.families.family import Family
from safelight.trainer.families.sdxl import StableDiffusionXL
from safelight.trainer.families.stable_diffusion import StableDiffusion1, StableDiffusion2

# searched in this order; the last one owns every UNet that no other family owns
FAMILIES: dict[str, Family] = {
    family.name: family for family in (StableDiffusionXL(), StableDiffusion2(), StableDiffusion1())
}
# how the names of networks begin in a diffusers model_index.json, without autoencoder and safety checker
_NETWORKS = ("unet", "text_encoder", "transformer", "prior")
_EDITING = ("InpaintPipeline", "InstructPix2PixPipeline")
_COMMON = "Stable Diffusion "
# text width of a UNet that Stability AI published with SDXL
REFINER_WIDTH = 1280
REFINER = "the refiner of Stable Diffusion XL, which only finishes pictures that the base began; give the base"


def family_of(unet_config: Mapping) -> Family:
    """Return the family of a UNet2DConditionModel. unet_config: has at least cross_attention_dim."""
    return next(family for family in FAMILIES.values() if family.owns(unet_config))


def family_of_text_width(text_width: int) -> Family | None:
    """Return the family whose published UNets attend to text embeddings of this width, None if there is none."""
    return next((family for family in FAMILIES.values() if text_width in family.text_widths), None)


def why_unsupported(unet_config: Mapping) -> str:
    """Return what a UNet is that no family trains, and what to do, in words that follow its name; '' if it is fine."""
    channels = unet_config["in_channels"]
    if channels > unet_config.get("out_channels", 4):
        return (
            f"an inpainting or editing model, whose UNet has {channels} input channels; give a text-to-image model, "
            "which has as many as its autoencoder makes"
        )
    if unet_config["cross_attention_dim"] == REFINER_WIDTH:
        return REFINER
    if unet_config.get("time_cond_proj_dim") is not None:
        return (
            "a latent consistency model, distilled for a few sampling steps, whose UNet is told the guidance scale; "
            "give the model that it was distilled from"
        )
    return ""


def is_supported_pipeline(model_index: Mapping) -> bool:
    """Return whether a diffusers model_index.json describes a text-to-image model of one of the families.

    Every network has to be a UNet or a text encoder of a family, and UNets without text encoders are of other models.
    Pipelines that edit pictures have the same networks, and are recognized by the name of their class.
    """
    known = {"unet", *(folder for family in FAMILIES.values() for folder in family.text_encoders)}
    networks = {name for name in model_index if name.startswith(_NETWORKS)}
    return networks <= known and networks != {"unet"} and not model_index.get("_class_name", "").endswith(_EDITING)


def text_widths() -> str:
    """Return the text widths of the families, for messages: `768 (1.x), 1024 (2.x) or 2048 (XL)`."""
    widths = [
        f"{width} ({family.title.removeprefix(_COMMON)})"
        for family in reversed(FAMILIES.values())
        for width in family.text_widths
    ]
    return f"{', '.join(widths[:-1])} or {widths[-1]}"


def supported_titles() -> str:
    """Return the families, for messages: `Stable Diffusion 1.x, 2.x and XL`."""
    names = [family.title.removeprefix(_COMMON) for family in reversed(FAMILIES.values())]
    return f"{_COMMON}{', '.join(names[:-1])} and {names[-1]}"
