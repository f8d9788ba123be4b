"""Embed image files in the page as small WebP pictures.

Reports are mailed and archived, so their size is bounded: each group of pictures has a budget in bytes and is embedded
at the largest size at which the whole group fits.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from safelight.trainer.report.markup import Markup, tag

WEBP_QUALITY = 82
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
    for edge_px in edges_px[:-1]:
        pictures = _embed_within(paths, edge_px, budget_bytes)
        if pictures is not None:
            return pictures
    return _embed_within(paths, edges_px[-1], budget_bytes, leave_out=True)


def placeholder(text: str) -> Markup:
    """Return an element that takes the place of a missing picture."""
    return tag("span", text, class_="missing", role="img", aria_label=text)


def _embed_within(
    paths: Sequence[Path | None], edge_px: int, budget_bytes: int, leave_out: bool = False
) -> list[Picture | None] | None:
    pictures: list[Picture | None] = []
    used = 0
    for path in paths:
        picture = _embed(path, edge_px) if path is not None else None
        size = len(picture.uri) if picture else 0
        if used + size > budget_bytes:
            if not leave_out:
                return None
            picture, size = None, 0
        used += size
        pictures.append(picture)
    return pictures


def _embed(path: Path, edge_px: int) -> Picture | None:
    try:
        with Image.open(path) as opened:
            # decode JPEG at a fraction of its size: decoding is most of the time spent on a folder of photographs
            opened.draft("RGB", (2 * edge_px, 2 * edge_px))
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    lossless = max(image.size) <= LOSSLESS_EDGE_PX
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, lossless=lossless, method=3)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, *image.size)
