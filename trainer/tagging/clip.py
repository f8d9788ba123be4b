"""CLIP's zero-shot classification: how well `a photo of a WORD` fits a photo, for each of many words.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.trainer.captioning.model_files import ModelFiles
from safelight.trainer.captioning.models import load_weights, made_of_files, read_config
from safelight.trainer.captioning.processors import load_processor
from safelight.trainer.captioning.prompts import tried
from safelight.trainer.models.device import pick_dtype

TEMPLATE = "a photo of a {}"
NUM_TEXTS = 64


@dataclass(frozen=True)
class Clip:
    """A CLIP with its processor."""

    model: nn.Module
    processor: object
    device: torch.device
    dtype: torch.dtype

    def embed_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return the embedding of each picture: (D,), fp16, of length 1, on the CPU."""
        return list(_normalized(self.image_features(images)).half())

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """Return the embeddings of `a photo of a NAME`: (N, D), fp32, of length 1, on the CPU."""
        return _normalized(self.text_features([TEMPLATE.format(name) for name in names]))

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the features of pictures in the space shared with texts: (N, D), fp32, on the CPU."""
        inputs = self.processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        return _features(self.model.get_image_features(pixel_values=pixels))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the features of texts, which are cut to what the model reads: (N, D), fp32, on the CPU."""
        parts, tokenizer = [], self.processor.tokenizer
        all_texts = tried(tokenizer, texts)
        for start in range(0, len(all_texts), NUM_TEXTS):
            inputs = tokenizer(
                all_texts[start : start + NUM_TEXTS],
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            ids, mask = (inputs[name].to(self.device) for name in ("input_ids", "attention_mask"))
            parts.append(_features(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        return torch.cat(parts)

    def probabilities(self, image_D: Tensor, texts_ND: Tensor) -> list[float]:
        """Return how probable each text is for a picture, if it is one of them. They add up to 1."""
        scale = self.model.logit_scale.detach().float().exp().cpu()
        return (scale * (texts_ND @ image_D.float())).softmax(dim=0).tolist()


def _features(output) -> Tensor:
    # transformers 4 returned the tensor itself
    return (output if isinstance(output, Tensor) else output.pooler_output).float().cpu()


def _normalized(features_ND: Tensor) -> Tensor:
    return features_ND / features_ND.norm(dim=-1, keepdim=True)


def load_clip(
    files: ModelFiles, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> Clip:
    """Return the CLIP of checked files on a device. Raises UserError.

    dtype: of its weights; None for fp32 on a CPU and 16 bits on a GPU.
    """
    from transformers import CLIPModel

    dtype, config = dtype or pick_dtype("auto", device), read_config(files)
    model = load_weights(files, config, CLIPModel, tensors, dtype)
    processor = made_of_files(files, lambda: load_processor(files.staged, config, files.values))
    return Clip(model.to(device), processor, device, dtype)


def row_of_embedding(embedding: Tensor) -> dict:
    """Return an embedding as the values of a journal's row."""
    return {"embedding": base64.b64encode(embedding.numpy().astype("<f2").tobytes()).decode()}


def embedding_of_row(row: dict, num_dimensions: int) -> Tensor | None:
    """Return the embedding of a journal's row, None if it is damaged."""
    text = row.get("embedding")
    # four characters for three bytes
    if not isinstance(text, str) or len(text) > 3 * num_dimensions + 4:
        return None
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2")
    except (ValueError, binascii.Error):
        return None
    if len(values) != num_dimensions or not np.isfinite(values).all():
        return None
    return torch.from_numpy(values.astype(np.float16))
