"""Embed image files in the page as small WebP pictures.

Reports are mailed and archived, so their size is bounded: each group of pictures has a budget in bytes and is embedded
at the largest size at which the whole group fits. A run folder may come from somebody else, so only what a run writes
is decoded, 8-bit grey, colour or palette, and the cost of decoding is bounded, for each picture and for the whole page.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

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

_T = TypeVar("_T")


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


# a file as it was (path, time of its last change, size), the largest edge that was asked for, and that of the picture
Known = dict[tuple[str, int, int, int, int], Picture]


@dataclass
class Work:
    """What decoding the rest of a page's pictures may cost. num_pixels: in all passes; 3 bytes of a file are one.

    known: the pictures that this page has embedded. before: those of an earlier rendering, which cost nothing again.
    """

    num_pixels: int = MAX_PAGE_PIXELS
    known: Known = field(default_factory=dict)
    before: Known = field(default_factory=dict)

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
    sources = {path: _Source(path, max(edges_px), work) for path in paths if path is not None}
    return _fitting([sources.get(path) for path in paths], edges_px, budget_bytes, _Source.embed)


def embed_images(
    images: Sequence[Image.Image | None], edges_px: Sequence[int], budget_bytes: int
) -> list[Picture | None]:
    """Return a picture for each image, as `embed_all`."""
    return _fitting(images, edges_px, budget_bytes, _embed)


def placeholder(text: str) -> Markup:
    """Return an element that takes the place of a missing picture."""
    return tag("span", text, class_="missing", role="img", aria_label=text)


class _Source:
    """A file, decoded only if its picture is not known. edge_px: of the largest picture."""

    def __init__(self, path: Path, edge_px: int, work: Work):
        self._path, self._edge_px, self._work = path, edge_px, work
        self._image: Image.Image | None = None
        self._is_decoded = False

    def embed(self, edge_px: int) -> Picture | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        key = (str(self._path), status.st_mtime_ns, status.st_size, self._edge_px, edge_px)
        work = self._work
        picture = work.known.get(key) or work.before.get(key)
        if picture is None:
            if not self._is_decoded:
                self._image, self._is_decoded = _decoded(self._path, self._edge_px, work), True
            picture = _embed(self._image, edge_px) if self._image else None
        if picture is not None:
            work.known[key] = picture
        return picture


def _fitting(
    items: Sequence[_T | None], edges_px: Sequence[int], budget_bytes: int, embed: Callable[[_T, int], Picture | None]
) -> list[Picture | None]:
    """Return the pictures at the largest edge at which they fit; at the smallest, those that fit."""
    for edge_px in edges_px[:-1]:
        pictures = _embed_within(items, edge_px, budget_bytes, embed)
        if pictures is not None:
            return pictures
    return _embed_within(items, edges_px[-1], budget_bytes, embed, leave_out=True)


def _embed_within(
    items: Sequence[_T | None],
    edge_px: int,
    budget_bytes: int,
    embed: Callable[[_T, int], Picture | None],
    leave_out: bool = False,
) -> list[Picture | None] | None:
    pictures: list[Picture | None] = []
    used = 0
    for item in items:
        picture = embed(item, edge_px) if item is not None else None
        size = len(picture.uri) if picture else 0
        if used + size > budget_bytes:
            if not leave_out:
                return None
            picture, size = None, 0
        used += size
        pictures.append(picture)
    return pictures


def _decoded(path: Path, edge_px: int, work: Work) -> Image.Image | None:
    """Return an image, at most edge_px on its longest side; None for what is not decoded."""
    try:
        content = read_bytes(path, MAX_FILE_BYTES)
        num_taken = len(content) // BYTES_PER_PIXEL
        # before the header is looked at, which of a large file takes a while
        work.take(num_taken)
        work.take(max(0, _num_pixels(content) - num_taken))
        # a JPEG is decoded at a fraction of its size: decoding is most of the time spent on a folder of photographs
        image = decode(content, max_megapixels=(2 * edge_px) ** 2 / 1e6).image
    except (RejectedImage, UnsafeFile, OSError):
        return None
    image.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    return image


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
