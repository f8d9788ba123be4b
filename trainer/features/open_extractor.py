"""Opens what the user names as a feature extractor."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.captioning.models import blamed_on
from safelight.trainer.features.extractor import Extractor
from safelight.trainer.features.inception import MARK, open_inception
from safelight.trainer.features.onnx_features import open_onnx_features
from safelight.trainer.features.transformers_features import open_transformers
from safelight.trainer.features.weights_file import open_weights


def open_extractor(spec: str, device: torch.device, setting: str = "--features") -> Extractor:
    """Return the extractor that a text names; it has looked at a grey picture. Raises UserError.

    spec: the folder or hub id of a CLIP, DINOv2 or BLIP of transformers; "tiny", the embedded captioner; an .onnx file,
    with `#OUTPUT` behind it to choose one of its outputs; or a .safetensors file with FID's Inception v3. One whose
    pictures can be compared with texts is a TextExtractor. setting: that named it, for messages.
    """
    try:
        with blamed_on(spec, "it cannot be loaded"):
            extractor = _opened(spec, device, setting)
        extractor.features([Image.new("RGB", (64, 48), "grey")])
    except torch.OutOfMemoryError:
        raise UserError(
            f"{spec!r} does not fit the GPU's memory; close other programs, choose a smaller model, or add --device cpu"
        ) from None
    return extractor


def _opened(spec: str, device: torch.device, setting: str) -> Extractor:
    name, _, output = spec.rpartition("#") if ".onnx#" in spec.lower() else (spec, "", "")
    path = Path(os.path.expanduser(name))
    suffix = path.suffix.lower()
    if suffix not in (".onnx", ".safetensors"):
        return open_transformers(spec, device, setting)
    if not os.path.isfile(path):
        raise UserError(f"{setting} {spec!r} does not exist; give an .onnx or .safetensors file, a folder or a hub id")
    if suffix == ".onnx":
        return open_onnx_features(path, output)
    file = open_weights(path)
    if MARK not in file.entries:
        raise UserError(
            f"{setting} {spec!r} is not FID's Inception v3: it has no tensor {MARK}; give a .safetensors file with the "
            "names of pytorch-fid, or a model's folder"
        )
    return open_inception(file, device)
