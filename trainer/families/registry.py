"""The model families, one row each. A new family is a subclass of Family and a row here (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping

from safelight.trainer.families.family import Family
from safelight.trainer.families.sdxl import StableDiffusionXL
from safelight.trainer.families.stable_diffusion import StableDiffusion1, StableDiffusion2

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


def trainable_titles() -> str:
    """Return the families that can be trained, for messages: `Stable Diffusion 1.x and 2.x`."""
    common = "Stable Diffusion "
    names = [family.title.removeprefix(common) for family in reversed(FAMILIES.values()) if not family.untrainable]
    return common + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
