"""Embed image files in the page as small WebP pictures.

Reports are mailed and archived, so their size is bounded: each group of pictures has a budget in bytes and is embedded
at the largest size at which the whole group fits. A run folder may come from somebody else, so only formats that a run
writes are opened, and decoding is bounded in pixels.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from safelight.data.images import RejectedImage, decode
from safelight.trainer.report.markup import Markup, tag
from safelight.untrusted import UnsafeFile, read_bytes

WEBP_QUALITY = 82
# Pillow opens more; EPS, for one, by passing the file to Ghostscript, which executes it
FORMATS = ("JPEG", "PNG", "WEBP")
# the largest side of a sample is 4096 px
MAX_PIXELS = 4096 * 4096
MAX_FILE_BYTES = 2**26
# of a group of pictures; 288 samples of 2048 x 2048 px have 1.2 * 10^9
MAX_GROUP_PIXELS = 2**31
# Smaller pictures come from a tiny model: lossy coding would smear their few pixels, and lossless costs little.
LOSSLESS_EDGE_PX = 160


@dataclass(frozen=True)
class Picture:
    """One embedded image."""

    uri: str
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        return max(self.width, self.height) <= LOSSLESS_EDGE_PX

    def img(self, alt: str, **attributes: object) -> Markup:
        """Return the <img> element, with its size so that the page does not jump while it loads."""
        return tag(
            "img",
            src=self.uri,
            alt=alt,
            width=self.width,
            height=self.height,
            class_="tiny" if self.is_tiny else None,
            **attributes,
        )


def embed_all(paths: Sequence[Path | None], edges_px: Sequence[int], budget_bytes: int) -> list[Picture | None]:
    """Return a picture for each path, all at the largest of edges_px (longest side) that fits the budget.

    The result is None for a path that is None or cannot be read, and for pictures that exceed the budget even at the
    smallest size.
    """
    images = _decode_all(paths, max(edges_px))
    for edge_px in edges_px[:-1]:
        pictures = _embed_within(images, edge_px, budget_bytes)
        if pictures is not None:
            return pictures
    return _embed_within(images, edges_px[-1], budget_bytes, leave_out=True)


def placeholder(text: str) -> Markup:
    """Return an element that takes the place of a missing picture."""
    return tag("span", text, class_="missing", role="img", aria_label=text)


def _embed_within(
    images: Sequence[Image.Image | None], edge_px: int, budget_bytes: int, leave_out: bool = False
) -> list[Picture | None] | None:
    pictures: list[Picture | None] = []
    used = 0
    for image in images:
        picture = _embed(image, edge_px) if image is not None else None
        size = len(picture.uri) if picture else 0
        if used + size > budget_bytes:
            if not leave_out:
                return None
            picture, size = None, 0
        used += size
        pictures.append(picture)
    return pictures


def _decode_all(paths: Sequence[Path | None], edge_px: int) -> list[Image.Image | None]:
    """Return the images, at most edge_px on their longest side; None for what cannot be read."""
    by_path: dict[Path, Image.Image | None] = {}
    num_pixels = 0
    for path in paths:
        if path is None or path in by_path:
            continue
        by_path[path] = None
        try:
            content = read_bytes(path, MAX_FILE_BYTES)
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                num_pixels += opened.width * opened.height
                if opened.width * opened.height > MAX_PIXELS or num_pixels > MAX_GROUP_PIXELS:
                    continue
            # a JPEG is decoded at a fraction of its size: decoding is most of the time spent on a folder of photographs
            image = decode(content, max_megapixels=(2 * edge_px) ** 2 / 1e6).image
        except (RejectedImage, UnsafeFile, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        image.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
        by_path[path] = image
    return [by_path.get(path) if path is not None else None for path in paths]


def _embed(image: Image.Image, edge_px: int) -> Picture:
    small = image.copy()
    small.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    lossless = max(small.size) <= LOSSLESS_EDGE_PX
    small.save(buffer, "WEBP", quality=WEBP_QUALITY, lossless=lossless, method=3)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, *small.size)
