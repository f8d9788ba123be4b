"""What differs between the families of Stable Diffusion. A new family is one subclass and one row of the registry.

A family is recognized by its UNet's config. It defines its text encoders, the conditioning that their cached output
becomes, the names of its tensors in single files, the diffusers pipeline that it is exported as, and how its files
describe themselves. Code outside this folder calls these methods and never compares names or sizes of families.
docs/architecture.md has the recipe for adding one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.original_layout import Layout


class Family:
    """A family of models. A subclass sets the class attributes and overrides the methods that differ.

    The methods of this class are those of Stable Diffusion 1.x; `architecture` and `text_encoder_layout` have none.
    """

    # unique, lower case
    name: ClassVar[str]
    # as in messages
    title: ClassVar[str]
    # cross_attention_dim of the published UNets, different from every other family's
    text_widths: ClassVar[tuple[int, ...]]
    # block_out_channels of the published UNets, the only size that other tools support
    published_channels: ClassVar[list[int]]
    # folders of a diffusers model with its text encoders, in order
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # class of diffusers
    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    # a part of tensor names that only single files of this family have; "" if text_widths are enough
    file_marker: ClassVar[str] = ""
    # why `train` refuses the family; "" if it can be trained
    untrainable: ClassVar[str] = ""
    # hub id with the configs that fit every single file of the family; None if there is no such one
    default_configs: ClassVar[str | None] = None
    # prediction type that A1111 and ComfyUI assume for a single file; "" if they detect it
    assumed_prediction: ClassVar[str] = ""
    # for ModelSpec: where the original implementation is published
    implementation: ClassVar[str]

    def owns(self, unet_config: Mapping) -> bool:
        """Return whether the config of a UNet2DConditionModel belongs to this family."""
        return unet_config["cross_attention_dim"] in self.text_widths

    def has_published_size(self, unet_config: Mapping) -> bool:
        """Return whether a UNet has the published size, which A1111 and ComfyUI require."""
        has_published_width = unet_config["cross_attention_dim"] in self.text_widths
        return has_published_width and list(unet_config["block_out_channels"]) == self.published_channels

    def architecture(self, prediction_type: str) -> str:
        """Return ModelSpec's name for the architecture. prediction_type: epsilon | v_prediction."""
        raise NotImplementedError

    def native_px(self, unet_config: Mapping, latent_factor: int) -> int:
        """Return the side in px of the images that the base was trained on. latent_factor: px per latent."""
        return unet_config["sample_size"] * latent_factor

    def text_encoder_layout(self, names: Iterable[str]) -> Layout:
        """Return the names that the text encoder's tensors have in a single file. names: those of transformers."""
        raise NotImplementedError

    def text_encoder_extras(self, num_tokens: int) -> dict[str, Tensor]:
        """Return constants that a single file contains in addition to the text encoder's weights, by name."""
        return {}

    def conditioning(self, rows_BTD: Tensor) -> TextConditioning:
        """Return the UNet's conditioning from cached text embeddings, (B, T, D) float32."""
        return TextConditioning(rows_BTD)

    def stand_in_conditioning(
        self, unet_config: Mapping, rows_BTD: Tensor, latent_size: tuple[int, int]
    ) -> TextConditioning:
        """Return plausible conditioning for plans and benchmarks, which run no encoders.

        rows_BTD: text embeddings. latent_size: (height, width) of the latents.
        """
        return TextConditioning(rows_BTD)

    def pipeline_of(self, unet, vae, scheduler, tokenizer, text_encoder):
        """Return a diffusers pipeline with these parts, to be saved as a folder."""
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
