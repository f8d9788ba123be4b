"""What differs between the families of Stable Diffusion. A new family is one subclass and one row of the registry.

A family is told by its UNet's config. It says which text encoders it has and how their output is cached and given to the
UNet, where its text encoder stands in the original single-file layout, which diffusers pipeline it is exported as, and how
its files describe themselves. Nothing outside this folder asks which family a model belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.original_layout import Layout


class Family:
    """A family of models. Subclasses fill in the class attributes; see registry.py for the rows.

    name: unique, lower case. title: for people. text_widths: cross_attention_dim of UNets that are surely this family's.
    text_encoders: folders of a diffusers model that hold text encoders, in order. pipeline: name of diffusers' class.
    untrainable: why `train` refuses the family; '' where it can be trained.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    text_widths: ClassVar[tuple[int, ...]]
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    untrainable: ClassVar[str] = ""
    # a hub id with the configs of the family's single files, None where a file does not tell which it needs
    default_configs: ClassVar[str | None] = None
    # what A1111 and ComfyUI take a single file to predict, '' where they look at something else
    assumed_prediction: ClassVar[str] = ""
    # ModelSpec: where the original implementation is published
    implementation: ClassVar[str]

    # block_out_channels of the published UNets; other tools know no other size
    published_channels: ClassVar[list[int]]

    def owns(self, unet_config: Mapping) -> bool:
        """Return whether a UNet2DConditionModel's config is this family's."""
        return unet_config["cross_attention_dim"] in self.text_widths

    def has_published_size(self, unet_config: Mapping) -> bool:
        """Return whether A1111 and ComfyUI know a UNet of this size as one of the family."""
        is_wide = unet_config["cross_attention_dim"] in self.text_widths
        return is_wide and list(unet_config["block_out_channels"]) == self.published_channels

    def architecture(self, prediction_type: str) -> str:
        """Return ModelSpec's identifier of the architecture."""
        raise NotImplementedError

    def native_px(self, unet_config: Mapping, latent_factor: int) -> int:
        """Return the side in px of the pictures that the base was trained on. latent_factor: px a latent."""
        return unet_config["sample_size"] * latent_factor

    def text_encoder_layout(self, names: Iterable[str]) -> Layout:
        """Return where the text encoder's tensors stand in a single file of the original layout."""
        raise NotImplementedError

    def text_encoder_extras(self, num_tokens: int) -> dict[str, Tensor]:
        """Return the constants that a single file holds beside the text encoder's weights."""
        return {}

    def conditioning(self, rows_BTD: Tensor) -> TextConditioning:
        """Return what the UNet is told, from the text rows of the cache, float32."""
        return TextConditioning(rows_BTD)

    def stand_in_conditioning(
        self, unet_config: Mapping, rows_BTD: Tensor, latent_size: tuple[int, int]
    ) -> TextConditioning:
        """Return plausible conditioning around given text embeddings, for plans and benchmarks, which run no encoders.

        latent_size: (height, width) of the latents.
        """
        return TextConditioning(rows_BTD)

    def pipeline_of(self, unet, vae, scheduler, tokenizer, text_encoder):
        """Return a diffusers pipeline of the parts, to be saved as a folder."""
        import diffusers

        return getattr(diffusers, self.pipeline)(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
