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


def family_of(unet_config: Mapping) -> Family:
    """Return the family of a UNet2DConditionModel. unet_config: has at least cross_attention_dim."""
    return next(family for family in FAMILIES.values() if family.owns(unet_config))


def family_of_text_width(text_width: int) -> Family | None:
    """Return the family whose published UNets attend to text embeddings of this width, None if there is none."""
    return next((family for family in FAMILIES.values() if text_width in family.text_widths), None)


def _trainable() -> list[Family]:
    return [family for family in reversed(FAMILIES.values()) if not family.untrainable]


def is_trainable_pipeline(model_index: Mapping) -> bool:
    """Return whether a diffusers model_index.json describes a model of a family that can be trained.

    Every network has to be a UNet or a text encoder of a trainable family. Pipelines of an untrainable family, such as
    StableDiffusionXLInpaintPipeline, are recognized by the name of their class.
    """
    known = {"unet", *(folder for family in _trainable() for folder in family.text_encoders)}
    untrainable = tuple(f.pipeline.removesuffix("Pipeline") for f in FAMILIES.values() if f.untrainable)
    networks = {name for name in model_index if name.startswith(_NETWORKS)}
    return networks <= known and not model_index.get("_class_name", "").startswith(untrainable)


def text_widths() -> str:
    """Return the text widths of the families that can be trained, for messages: `768 (1.x) or 1024 (2.x)`."""
    return " or ".join(
        f"{width} ({family.title.removeprefix('Stable Diffusion ')})"
        for family in _trainable()
        for width in family.text_widths
    )


def trainable_titles() -> str:
    """Return the families that can be trained, for messages: `Stable Diffusion 1.x and 2.x`."""
    common = "Stable Diffusion "
    names = [family.title.removeprefix(common) for family in _trainable()]
    return common + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
