"""Features by any .onnx file that turns one picture into one vector, run by onnxruntime on the CPU.

The input is fp32, (1 or any number, 3, H, W); sizes that are not fixed are taken as 224. The picture is resized to
cover 8/7 of the input, 256 px for 224, of which the centre is cut out; RGB, with ImageNet's mean and standard
deviation, as torchvision's and timm's classifiers are evaluated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from safelight.errors import UserError
from safelight.text import shortened
from safelight.trainer.features.extractor import PictureModel, fingerprint_of
from safelight.trainer.tagging.onnx_file import EXTRACTOR, open_onnx

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
USUAL_SIDE_PX, MIN_SIDE_PX, MAX_SIDE_PX = 224, 8, 2048
# the short side before the centre is cut out, over the input's
MARGIN = 256 / 224
MAX_WIDTH = 2**16


def open_onnx_features(path: Path, output: str) -> PictureModel:
    """Return the extractor of a file. output: the name of one of its outputs, "" for the first of rank 2.

    Raises UserError if it has no such input or output.
    """
    session, weights = open_onnx(path, EXTRACTOR)
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    # a size that is not fixed is a name, or None
    if len(shape) != 4 or shape[1] != 3 or not (shape[0] == 1 or not isinstance(shape[0], int)):
        raise _refused(path, f"its inputs are {[one.shape for one in inputs]}, not one of (1, 3, height, width)")
    height, width = (side if isinstance(side, int) else USUAL_SIDE_PX for side in shape[2:])
    is_size = all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in (height, width))
    if inputs[0].type != "tensor(float)" or not is_size:
        raise _refused(
            path,
            f"its input is {height} x {width} px of {inputs[0].type}; expected {MIN_SIDE_PX} to {MAX_SIDE_PX} px, fp32",
        )
    vectors = {
        one.name: one.shape[1]
        for one in session.get_outputs()
        if one.type == "tensor(float)" and len(one.shape) == 2 and isinstance(one.shape[1], int)
    }
    chosen = output or next(iter(vectors), "")
    if chosen not in vectors or not 1 <= vectors[chosen] <= MAX_WIDTH:
        names = ", ".join(f"{name} ({size})" for name, size in vectors.items()) or "none"
        wanted = f"output {output!r}" if output else "output"
        raise _refused(path, f"it has no {wanted} of (1, up to {MAX_WIDTH:,}) in fp32; its vectors are: {names}")

    def look(image: Image.Image) -> np.ndarray:
        return session.run([chosen], {inputs[0].name: prepared(image, width, height)[None]})[0][0]

    preparation = f"onnx, version 1, {chosen}, {width} x {height}"
    return PictureModel(shortened(path.name), fingerprint_of(preparation, weights), vectors[chosen], look)


def prepared(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Return an RGB picture as a model's input: (3, height, width), fp32."""
    scale = MARGIN * max(width / image.width, height / image.height)
    size = round(image.width * scale), round(image.height * scale)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = np.asarray(resized, dtype=np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not used: {reason}; {EXTRACTOR.fix}")
