"""Embed image files in the page as small WebP pictures.

Reports are mailed and archived, so their size is bounded: each group of pictures has a budget in bytes and is embedded
at the largest size at which the whole group fits. A run folder may come from somebody else, so only what a run writes
is decoded, 8-bit grey, colour or palette, and the cost of decoding is bounded, for each picture and for the whole page.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from safelight.data.headers import MAX_JPEG_SCANS
from safelight.data.images import RejectedImage, decode, open_image
from safelight.trainer.report.markup import Markup, tag
from safelight.untrusted import UnsafeFile, read_bytes

WEBP_QUALITY = 82
# format of a picture -> how often a decoder may pass over its pixels. A run writes PNG, and small JPEG examples.
PASSES = {"PNG": 1, "WEBP": 4, "JPEG": MAX_JPEG_SCANS}
# how a PNG stores a pixel: 8-bit grey, colour or palette
PNG_PIXELS = {"L", "RGB", "P"}
# of one picture, in all passes; the largest side of a sample is 4096 px
MAX_PIXELS = 4096 * 4096
MAX_FILE_BYTES = 2**26
# of a page; 288 samples and 24 pairs of 2048 x 2048 px have 1.41 * 10^9
MAX_PAGE_PIXELS = 1_500_000_000
BYTES_PER_PIXEL = 3
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


@dataclass
class Work:
    """What decoding the rest of a page's pictures may cost. num_pixels: in all passes; 3 bytes of a file are one."""

    num_pixels: int = MAX_PAGE_PIXELS

    def take(self, num_pixels: int) -> None:
        """Raise RejectedImage if this is more than is left, or more than one picture may have."""
        if num_pixels > min(MAX_PIXELS, self.num_pixels):
            raise RejectedImage(f"decoding {num_pixels:,} pixels would take long")
        self.num_pixels -= num_pixels


def embed_all(
    paths: Sequence[Path | None], edges_px: Sequence[int], budget_bytes: int, work: Work
) -> list[Picture | None]:
    """Return a picture for each path, all at the largest of edges_px (longest side) that fits the budget.

    The result is None for a path that is None or cannot be read, for pictures that no run writes or that cost more than
    `work` has left, and for those that exceed the budget even at the smallest size.
    """
    return embed_images(_decode_all(paths, max(edges_px), work), edges_px, budget_bytes)


def embed_images(
    images: Sequence[Image.Image | None], edges_px: Sequence[int], budget_bytes: int
) -> list[Picture | None]:
    """Return a picture for each image, as `embed_all`."""
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


def _decode_all(paths: Sequence[Path | None], edge_px: int, work: Work) -> list[Image.Image | None]:
    """Return the images, at most edge_px on their longest side; None for what is not decoded."""
    by_path: dict[Path, Image.Image | None] = {}
    for path in paths:
        if path is None or path in by_path:
            continue
        try:
            content = read_bytes(path, MAX_FILE_BYTES)
            num_taken = len(content) // BYTES_PER_PIXEL
            # before the header is looked at, which of a large file takes a while
            work.take(num_taken)
            work.take(max(0, _num_pixels(content) - num_taken))
            # a JPEG is decoded at a fraction of its size: decoding is most of the time spent on a folder of photographs
            image = decode(content, max_megapixels=(2 * edge_px) ** 2 / 1e6).image
        except (RejectedImage, UnsafeFile, OSError):
            by_path[path] = None
            continue
        image.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
        by_path[path] = image
    return [by_path.get(path) if path is not None else None for path in paths]


def _num_pixels(content: bytes) -> int:
    """Return how many pixels decoding passes over. Raises RejectedImage for what no run writes."""
    with open_image(content) as opened:
        kind = opened.format or ""
        # of a PNG, whose mode is RGB for 16-bit colour too
        stored = {tile[3] for tile in opened.tile} if kind == "PNG" else set()
        if kind not in PASSES or not stored <= PNG_PIXELS:
            raise RejectedImage("no picture that a run writes")
        return opened.width * opened.height * PASSES[kind]


def _embed(image: Image.Image, edge_px: int) -> Picture:
    small = image.copy()
    small.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    lossless = max(small.size) <= LOSSLESS_EDGE_PX
    small.save(buffer, "WEBP", quality=WEBP_QUALITY, lossless=lossless, method=3)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, *small.size)
