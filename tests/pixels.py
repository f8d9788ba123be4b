"""Load the pixels of a crop from an image file."""

from pathlib import Path

import numpy as np

from safelight.data.images import crop_pixels, decode


def load_pixels(path: Path, crop_box: tuple[int, int, int, int], size_wh: tuple[int, int], flip: bool) -> np.ndarray:
    return crop_pixels(decode(Path(path).read_bytes()).image, crop_box, size_wh, flip)
