"""What differs between the families of Stable Diffusion. A new family is one subclass and one row of the registry.

A family is recognized by its UNet's config. It defines its text encoders, the conditioning that their cached output
becomes, the names of its tensors in single files, the diffusers pipeline that it is exported as, and how its files
describe themselves. Code outside this folder calls these methods and never compares names or sizes of families.
docs/architecture.md has the recipe for adding one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

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
    # folders of a diffusers model with its text encoders, in order -> class of transformers
    text_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel"}
    # how many layers of a text encoder are above the one whose output the UNet attends to, at clip_skip 0
    skipped_layers: ClassVar[int] = 0
    # whether the embeddings of the empty text are zeros, unless the base's model_index.json says otherwise
    zeroes_empty_text: ClassVar[bool] = False
    # whether the published autoencoders may compute in fp16
    vae_allows_fp16: ClassVar[bool] = True
    # class of diffusers
    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    # how the names of a text encoder's tensors begin in a single file, one of them in every file that has the encoders
    text_prefixes: ClassVar[tuple[str, ...]]
    # hub id with the configs that fit every single file of the family; None if there is no such one
    default_configs: ClassVar[str | None] = None
    # prediction type that A1111 and ComfyUI assume for a single file; "" if they detect it
    assumed_prediction: ClassVar[str] = ""
    # whether A1111 heeds its setting Clip skip; Forge does for every family
    heeds_clip_skip: ClassVar[bool] = False
    # kohya's ss_base_model_version, and whether its LoRA files name layers as the original files do, not as diffusers
    kohya_version: ClassVar[str]
    kohya_uses_original_names: ClassVar[bool] = False
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

    def text_encoder_layout(self, part: str, names: Iterable[str]) -> Layout:
        """Return the names that a text encoder's tensors have in a single file.

        part: as in text_encoders. names: those of transformers.
        """
        raise NotImplementedError

    def text_layouts_in_files(self, part: str, names: Iterable[str]) -> list[Layout]:
        """Return the layouts that files of others may have, the usual one first. Arguments of text_encoder_layout."""
        return [self.text_encoder_layout(part, names)]

    def text_encoder_extras(self, part: str, num_tokens: int) -> dict[str, Tensor]:
        """Return constants that a single file contains in addition to a text encoder's weights, by name."""
        return {}

    def encode_ids(self, text_encoder: nn.Module, ids_BT: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """Return what a text encoder says of token ids: embeddings (B, T, D), and a pooled one (B, P) or None.

        The embeddings are the last hidden state after the final norm; with clip_skip they are the hidden state of that
        many layers before, after the same norm.
        """
        output = text_encoder(ids_BT, output_hidden_states=clip_skip > 0)
        if clip_skip == 0:
            return output.last_hidden_state, None
        inner = getattr(text_encoder, "text_model", text_encoder)
        return inner.final_layer_norm(output.hidden_states[-1 - clip_skip]), None

    def read_parts(self, text_encoder: nn.Module, clip_skip: int) -> tuple[int, bool]:
        """Return of how many layers, and whether of the final norm, what `encode_ids` returns depends."""
        return text_encoder.config.num_hidden_layers - clip_skip, True

    def clip_skip_elsewhere(self, clip_skip: int) -> int:
        """Return model.clip_skip as A1111 and Forge count it, where 1 is the last layer; 0 if nothing is skipped."""
        return clip_skip + self.skipped_layers + 1 if clip_skip else 0

    def pooled_width(self, unet_config: Mapping) -> int:
        """Return the width of the pooled embedding that the UNet takes, 0 for none."""
        return 0

    def text_row(self, embeddings_BTD: Tensor, pooled_BP: Tensor | None) -> Tensor:
        """Return the rows that the cache keeps of texts, from what `encode_ids` returned of all text encoders."""
        return embeddings_BTD

    def text_row_shape(self, num_tokens: int, width: int, pooled_width: int) -> tuple[int, ...]:
        """Return the shape of the cached row of one text. width: of the embeddings."""
        return num_tokens, width

    def conditioning(self, unet_config: Mapping, rows: Tensor, sizes_B6: Tensor) -> TextConditioning:
        """Return the UNet's conditioning from cached rows of texts, float32, and the sizes of the images.

        sizes_B6: as `Sample.sizes` returns them; families that are not conditioned on sizes ignore them.
        """
        return TextConditioning(rows)

    def stand_in_conditioning(
        self, unet_config: Mapping, rows_BTD: Tensor, latent_size: tuple[int, int]
    ) -> TextConditioning:
        """Return plausible conditioning for plans and benchmarks, which run no encoders.

        rows_BTD: text embeddings. latent_size: (height, width) of the latents.
        """
        return TextConditioning(rows_BTD)

    def pipeline_of(self, unet, vae, scheduler, texts: Sequence[tuple[object, nn.Module]], *, zeroes_empty_text: bool):
        """Return a diffusers pipeline with these parts, to be saved as a folder.

        texts: (tokenizer, text encoder), in the order of `text_encoders`. zeroes_empty_text: as the base's.
        """
        import diffusers

        ((tokenizer, text_encoder),) = texts
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


def tokenizer_folder(text_encoder: str) -> str:
    """Return the folder of the tokenizer that goes with a text encoder's: `tokenizer_2` with `text_encoder_2`."""
    return text_encoder.replace("text_encoder", "tokenizer")


def uncropped_sizes(num: int, height: int, width: int) -> Tensor:
    """Return the sizes of images that were neither scaled nor cropped, (num, 6) float32. height, width: px."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(num, 1)
