"""Features by models of transformers: CLIP (pictures and texts), DINOv2, and the vision tower of a BLIP.

Pictures are prepared as the model's own preprocessor_config.json says. Weights are fp32 on every device: in 16 bits the
features of a GPU would differ from those of a CPU by more than small differences between models.
Sources: Radford et al. 2021, arXiv:2103.00020 (CLIP); Oquab et al. 2023, arXiv:2304.07193 (DINOv2), whose class token
Stein et al. 2023, arXiv:2306.04675, compare.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.text import shortened
from safelight.trainer.captioning.model_files import ModelFiles, opened
from safelight.trainer.captioning.models import load_weights, made_of_files, read_config
from safelight.trainer.features.extractor import PictureModel, PictureTextModel, fingerprint_of
from safelight.trainer.tagging.clip import load_clip

TITLES = {"clip": "CLIP", "dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "blip": "BLIP"}


def open_transformers(spec: str, device: torch.device, setting: str) -> PictureModel:
    """Return the extractor in a local folder or a hub repository, which is downloaded if need be. Raises UserError."""
    with opened(spec, setting, "a CLIP or DINOv2") as files:
        kind = files.config.get("model_type")
        if kind not in TITLES:
            raise UserError(
                f"{setting} {spec!r} is of the kind {shortened(str(kind), 60)!r}, which is no feature extractor here; "
                "give a CLIP, a DINOv2 or a BLIP of transformers, or an .onnx file"
            )
        tensors, fingerprint = files.read_weights()
        name = "the built-in captioner" if spec == "tiny" else f"{TITLES[kind]} {shortened(spec)}"
        fingerprint = fingerprint_of(kind, "fp32, version 1", fingerprint)
        if kind == "clip":
            return _clip(name, fingerprint, files, tensors, device)
        return _tower(name, fingerprint, files, tensors, device)


def _clip(
    name: str, fingerprint: str, files: ModelFiles, tensors: dict[str, Tensor], device: torch.device
) -> PictureTextModel:
    clip = load_clip(files, tensors, device, torch.float32)
    return PictureTextModel(
        name,
        fingerprint,
        clip.model.config.projection_dim,
        lambda image: clip.image_features([image])[0].numpy(),
        lambda text: clip.text_features([text])[0].numpy(),
    )


def _tower(
    name: str, fingerprint: str, files: ModelFiles, tensors: dict[str, Tensor], device: torch.device
) -> PictureModel:
    """Return DINOv2, of which the class token counts, or a BLIP's vision tower, of which all tokens' mean does.

    A captioner reads all tokens, and nothing trains its class token by itself.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

    config, is_blip = read_config(files), files.config["model_type"] == "blip"
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if is_blip else MODEL_MAPPING
    whole = load_weights(files, config, mapping[type(config)], tensors, torch.float32)
    model = (whole.vision_model if is_blip else whole).to(device)
    prepare = made_of_files(files, lambda: _image_processor(files))

    def look(image: Image.Image) -> np.ndarray:
        tokens = _tokens(model, prepare(image).to(device))
        return (tokens.mean(dim=0) if is_blip else tokens[0]).cpu().numpy()

    width = (config.vision_config if is_blip else config).hidden_size
    return PictureModel(name, fingerprint, width, look)


@torch.inference_mode()
def _tokens(model: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Return the tokens of one picture after the last normalization, the class token first: (T, width)."""
    return model(pixel_values=pixels_BCHW).last_hidden_state[0]


def _image_processor(files: ModelFiles) -> Callable[[Image.Image], Tensor]:
    """Return what prepares a picture with Pillow and numpy alone."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(
        files.staged, local_files_only=True, trust_remote_code=False, backend="pil"
    )
    return lambda image: processor(images=[image], return_tensors="pt")["pixel_values"]
