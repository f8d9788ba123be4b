"""The model families, one row each. A new family is a subclass of Family and a row here (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping

from safelight.trainer.families.family import Family
from safelight.trainer.families.sdxl import StableDiffusionXL
from safelight.trainer.families.stable_diffusion import StableDiffusion1, StableDiffusion2

# a diffusers model's networks by the beginning of their folders' names, autoencoder and safety checker left out
NETWORKS = ("unet", "text_encoder", "transformer", "prior")
# asked in this order; the last one takes every UNet that nobody else owns
FAMILIES: dict[str, Family] = {
    family.name: family for family in (StableDiffusionXL(), StableDiffusion2(), StableDiffusion1())
}


def family_of(unet_config: Mapping) -> Family:
    """Return the family of a UNet2DConditionModel by its config, a mapping with cross_attention_dim."""
    return next(family for family in FAMILIES.values() if family.owns(unet_config))


def family_of_text_width(text_width: int) -> Family | None:
    """Return the family whose published UNets attend to text of a width, None where there is none."""
    return next((family for family in FAMILIES.values() if text_width in family.text_widths), None)


def can_train_pipeline(model_index: Mapping) -> bool:
    """Return whether a diffusers model is of a family that can be trained, by its model_index.json.

    Looks at the pipeline's class (variants such as StableDiffusionXLImg2ImgPipeline included) and at the parts that
    hold networks: a second text encoder or a transformer belongs to no family that can be trained.
    """
    pipeline = model_index.get("_class_name", "")
    refused = [family for family in FAMILIES.values() if family.untrainable]
    if any(pipeline.startswith(family.pipeline.removesuffix("Pipeline")) for family in refused):
        return False
    known = {part for family in FAMILIES.values() if not family.untrainable for part in family.text_encoders}
    return {part for part in model_index if part.startswith(NETWORKS)} <= {"unet", *known}


def trainable_titles() -> str:
    """Return the families that can be trained, for messages: `Stable Diffusion 1.x and 2.x`."""
    common = "Stable Diffusion "
    names = [family.title.removeprefix(common) for family in reversed(FAMILIES.values()) if not family.untrainable]
    return common + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
