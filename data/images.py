"""Read one image file: check it, decode it to upright RGB, shrink it, encode it; and crop it to training pixels.

A file that cannot be used is rejected as a whole, with the reason.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from safelight.data.colour import to_srgb
from safelight.data.decode_memory import Cancelled, available_bytes, decode_budget, end_if_set
from safelight.data.headers import Checked, RejectedImage, check, check_kind, jpeg2000_shape, jpeg_without_metadata
from safelight.errors import UserError
from safelight.text import collapse, printable
from safelight.units import GIB
from safelight.untrusted import UnsafeFile, open_regular, read_bytes

MIN_SIDE_PX = 16
EXIF_ORIENTATION = 0x0112
COPYABLE_FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
# formats of photographs. Pillow opens more; EPS, for one, by passing the file to Ghostscript, which executes it
READABLE_FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "AVIF",
    "HEIF",
    "JPEG2000",
    "PPM",
    "TGA",
    "QOI",
    "PSD",
)
MAX_FILE_BYTES = GIB
LARGE_FILE_BYTES = 2**26
# longest side, in px, that the formats allow
MAX_SIDE_PX = {"jpeg": 65500, "webp": 16383}
# Pillow decodes some kinds of files in Python, at 1 to 4 s a megapixel
MAX_SLOW_PIXELS = 1_500_000
MAX_JPEG2000_CHANNELS = 5
# draft mode keeps at least this many times the target size, so that LANCZOS does the last part, which is visible
DRAFT_GAP = 2
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# pixels are hashed and converted in strips that fit the CPU cache: copying a whole photo takes as long as hashing it
STRIP_BYTES = 2**18
# a copy of a picture's metadata may be stored with it, but not more than a camera writes
MAX_COPIED_METADATA_BYTES = 2**20
_GREY_MODES = ("1", "L", "LA", "La")
# bytes a pixel in Pillow's memory: 4 for every mode of several channels
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
# bytes a pixel that the decoders of some formats need beside Pillow's image: canvases, planes, coefficients
_DECODER_BYTES = {"WEBP": 12, "AVIF": 12, "HEIF": 12, "JPEG2000": 20, "PPM": 16, "QOI": 16}
# the modules whose warnings are not shown
_PILLOW = re.compile(r"PIL\.")
_COEFFICIENT_BYTES = 2
_FIXED_BYTES = 2**24
# pictures that take more are worth the milliseconds that returning their memory to the system takes
TRIM_BYTES = 2**27
_one_large_file = threading.Lock()
# a colour, red, green and blue from 0 to 255, that transparency is composited over
Backdrop = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class PackedFile(Protocol):
    """A file inside another. size: in bytes, 0 if it is not known before it is read."""

    name: str
    size: int

    def read(self) -> bytes:
        """Return its content. Raises UserError or OSError if it cannot be read."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image. image: RGB, upright, within the size limit. format: Pillow's name for the file's format.

    is_copyable: the file needs no change, so its bytes can be stored as they are. is_shrunk: it was over the limit.
    full_size: upright (width, height) in px before shrinking. content_sha256: hash of the decoded pixels before
    shrinking, equal for equal pictures. warning: may be empty. alpha: 8-bit grey, of the image's size, None if all of
    the file's picture is opaque.
    """

    image: Image.Image
    format: str
    is_copyable: bool
    is_shrunk: bool
    full_size: tuple[int, int]
    content_sha256: str
    warning: str = ""
    alpha: Image.Image | None = None


def shrunk_size(width: int, height: int, max_megapixels: float | None) -> tuple[int, int]:
    """Return (width, height) in px scaled down, if need be, to at most max_megapixels * 10^6 pixels."""
    if max_megapixels is None or width * height <= max_megapixels * 1e6:
        return width, height
    scale = math.sqrt(max_megapixels * 1e6 / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def open_image(source: Path | bytes) -> Image.Image:
    """Return a picture that is open but not yet decoded. source: a file, or the bytes of one.

    Only regular files, only READABLE_FORMATS, only up to Pillow's pixel limit. Raises RejectedImage with the reason;
    decoding it (`load`, `convert`) may still raise anything that Pillow raises for damaged files.
    """
    with _rejecting():
        if isinstance(source, bytes):
            return _open(check(source, has_heif=_has_heif()))
        return _open(check(read_bytes(source, MAX_FILE_BYTES), source.name, _has_heif()))


@functools.cache
def _add_plugins() -> None:
    """Let Pillow read HEIC files if pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)


def _formats() -> list[str]:
    _add_plugins()
    return [name for name in READABLE_FORMATS if name in Image.OPEN]


def _has_heif() -> bool:
    return "HEIF" in _formats()


def _open(checked: Checked) -> Image.Image:
    """Return the opened file. Adds a note if its metadata had to be left out."""
    _silence_libraries()
    try:
        opened = Image.open(io.BytesIO(checked.content), formats=_formats())
    except Image.DecompressionBombError:
        raise
    # damaged metadata can raise anything in Pillow's plugins
    except Exception:
        if not checked.content.startswith(b"\xff\xd8"):
            raise
        opened = Image.open(io.BytesIO(jpeg_without_metadata(checked.content)), formats=_formats())
        checked.has_sound_metadata = False
        checked.notes.append("its metadata is damaged and was not read, so that it may lie on its side")
    width, height = opened.size
    if opened.format == "PNG":
        opened.info |= checked.info
        _scale_transparency(opened, depth=checked.content[24])
    if opened.format == "JPEG2000":
        *size, num_channels = jpeg2000_shape(checked.content)
        if tuple(size) != opened.size or num_channels > MAX_JPEG2000_CHANNELS:
            raise RejectedImage("damaged: its header and its code stream are of different sizes")
    is_slow = any(tile[0] in Image.DECODERS for tile in getattr(opened, "tile", ()))
    if is_slow and width * height > MAX_SLOW_PIXELS:
        raise RejectedImage(
            f"{width * height / 1e6:.1f} megapixels in this kind of {opened.format} would take long to decode; convert "
            "it to PNG"
        )
    return opened


def _scale_transparency(png: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent grey or colour, which is stored at the file's depth, to the depth of the pixels."""
    value = png.info.get("transparency")
    if png.mode == "L" and depth < 8 and isinstance(value, int):
        png.info["transparency"] = (value & (2**depth - 1)) * 255 // (2**depth - 1)
    elif png.mode == "RGB" and depth == 16 and isinstance(value, tuple):
        png.info["transparency"] = tuple(channel >> 8 for channel in value)


def _silence_libraries() -> None:
    """Keep the lines of Pillow and libtiff off the terminal: what matters is said by RejectedImage or a note."""
    if not any(module == _PILLOW for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
    logger = logging.getLogger("PIL")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    _silence_libtiff()


@lru_cache(maxsize=1)
def _silence_libtiff() -> None:
    """Take away libtiff's handlers, which write to file descriptor 2 whatever sys.stderr is."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
        paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libtiff" in line}
        for path in paths:
            library = ctypes.CDLL(path)
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                function = getattr(library, name)
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
                function(None)
    except (OSError, AttributeError):
        # a Pillow whose libtiff is linked in: its lines are shown
        return


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    # a damaged EXIF block can raise anything, while the pixels are still good
    except Exception:
        return 1


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of whole rows, of STRIP_BYTES of pixels each or a little less."""
    width, height = image.size
    num_rows = max(1, STRIP_BYTES // (len(image.getbands()) * width))
    for top in range(0, height, num_rows):
        yield 0, top, width, min(height, top + num_rows)


def _in_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return convert(image), of this mode, without a second copy of the image beside the result."""
    converted = Image.new(mode, image.size)
    for box in _strips(image):
        converted.paste(convert(image.crop(box)), box)
    return converted


def _grey_of_16_bits() -> np.ndarray:
    return np.rint(np.arange(2**16) * (255.0 / 65535.0)).astype(np.uint8)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit, 32-bit or float image as 8-bit grey, scaled by its bit depth, or by its range if it has none."""
    if image.mode.startswith("I;16"):
        grey_of = _grey_of_16_bits()
        return _in_strips(image, "L", lambda strip: Image.fromarray(grey_of[np.asarray(strip)]))
    peak = 0.0
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        if not np.isfinite(values).all():
            raise RejectedImage("contains infinite or NaN pixels; convert it to 8 or 16 bits")
        peak = max(peak, float(values.max(initial=0)))
    white = next((level for level in (1.0, 255.0, 65535.0) if peak <= level), peak)
    # integers of at most 1 are a dark picture, not a float image
    white = 255.0 if white == 1.0 and image.mode == "I" else white

    def scaled(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip).astype(np.float64) * (255.0 / white)
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))

    return _in_strips(image, "L", scaled)


def _layers(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """Return what converts a strip of the image to RGBA, None if the image cannot be transparent."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") and isinstance(transparent, int):
        grey_of = _grey_of_16_bits()

        def layer(strip: Image.Image) -> Image.Image:
            values = np.asarray(strip)
            alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
            return Image.merge("LA", [Image.fromarray(grey_of[values]), Image.fromarray(alpha)]).convert("RGBA")

        return layer
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return None
    if transparent is not None or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return lambda strip: strip.convert("RGBA")
    return None


def _flatten(image: Image.Image, backdrop: Backdrop) -> tuple[Image.Image, Image.Image | None]:
    """Return (the image as L or RGB, transparency composited over the backdrop; its alpha, None if all is opaque).

    CMYK and LAB are returned unchanged.
    """
    layer_of = _layers(image)
    if layer_of is None:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _to_8_bit(image), None
        mode = "L" if image.mode in _GREY_MODES else "RGB"
        return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert(mode), None
    is_grey = image.mode in _GREY_MODES or image.mode.startswith("I;16")
    mode = "L" if is_grey and len(set(backdrop)) == 1 else "RGB"
    flat, alpha, is_opaque = Image.new(mode, image.size), Image.new("L", image.size), True
    for box in _strips(image):
        layer = layer_of(image.crop(box))
        opacity = layer.getchannel("A")
        is_opaque = is_opaque and opacity.getextrema() == (255, 255)
        flat.paste(Image.alpha_composite(Image.new("RGBA", layer.size, backdrop), layer).convert(mode), box)
        alpha.paste(opacity, box)
    return flat, None if is_opaque else alpha


def _decode(
    content: bytes, max_megapixels: float | None, stop: threading.Event | None, backdrop: Backdrop = WHITE
) -> Decoded:
    checked = check(content, has_heif=_has_heif())
    opened = _open(checked)
    width, height = opened.size
    if min(width, height) < MIN_SIDE_PX:
        raise RejectedImage(f"{width} x {height} px is too small; each side needs at least {MIN_SIDE_PX} px")
    target = shrunk_size(width, height, max_megapixels)
    is_shrunk = target != (width, height)
    if is_shrunk:
        # for JPEG only, a no-op for other formats: the decoder scales by 1/2, 1/4 or 1/8, which is several times faster
        opened.draft(None, (target[0] * DRAFT_GAP, target[1] * DRAFT_GAP))
    num_bytes = decode_bytes(opened, (width, height), checked, is_shrunk)
    _refuse_if_memory_is_short(num_bytes, (width, height))
    with decode_budget().reserved(num_bytes, stop):
        opened.load()
        end_if_set(stop)
        file_format, info, orientation = opened.format or "", dict(opened.info), _orientation(opened)
        is_plain = opened.mode == "RGB" and "transparency" not in info
        is_animated = checked.is_animated or (file_format == "WEBP" and getattr(opened, "is_animated", False))
        image, alpha = _flatten(opened, backdrop)
        # frees the decoded pixels if flattening copied them
        del opened
        end_if_set(stop)
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
            alpha = alpha and alpha.transpose(_TRANSPOSE[orientation])
        digest = _digest(image)
        end_if_set(stop)
        if is_shrunk:
            image = image.resize(shrunk_size(*image.size, max_megapixels), Image.Resampling.LANCZOS)
            alpha = alpha and alpha.resize(image.size, Image.Resampling.BOX)
        image, is_converted, warning = to_srgb(image, info)
        if num_bytes > TRIM_BYTES:
            _return_freed_memory()
    # what is written from it is sRGB: no profile may follow it into a file
    image.info = {}
    is_copyable = (
        file_format in COPYABLE_FORMATS
        and is_plain
        and not is_animated
        and not is_shrunk
        and orientation not in _TRANSPOSE
        and not is_converted
        and checked.has_sound_metadata
        and len(content) <= 3 * width * height + MAX_COPIED_METADATA_BYTES
    )
    # the image may have been read at a fraction of its size
    full_size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    notes = dict.fromkeys([*checked.notes, *([warning] if warning else [])])
    warning = printable("; ".join(notes))
    return Decoded(image, file_format, is_copyable, is_shrunk, full_size, digest, warning, alpha)


def _return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps it, for each thread what its largest picture took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _refuse_if_memory_is_short(num_bytes: int, size: tuple[int, int]) -> None:
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise RejectedImage(
            f"{size[0]} x {size[1]} px need {num_bytes / GIB:.1f} GiB to decode, but only {available / GIB:.1f} GiB of "
            "memory are free; shrink it, or close other programs"
        )


def decode_bytes(opened: Image.Image, full_size: tuple[int, int], checked: Checked, is_shrunk: bool) -> int:
    """Return the most memory that decoding takes, estimated from the header.

    opened: the image, in draft mode or not. full_size: (width, height) in px without draft mode.
    """
    is_grey = opened.mode in _GREY_MODES or opened.mode in ("I", "F") or opened.mode.startswith("I;16")
    is_flat = opened.mode in ("L", "RGB", "CMYK", "LAB") and "transparency" not in opened.info
    stored, flat = _STORED_BYTES.get(opened.mode, 4), 1 if is_grey else 4
    # the decoded image, a flattened copy and its alpha, and an upright one or, of an image that is not shrunk, one in
    # sRGB
    per_pixel = stored + (0 if is_flat else flat + 1) + (flat if is_shrunk else 4)
    per_pixel += _DECODER_BYTES.get(opened.format or "", 0)
    num_bytes = opened.width * opened.height * per_pixel
    if checked.is_progressive:
        num_bytes += full_size[0] * full_size[1] * _COEFFICIENT_BYTES * len(opened.getbands())
    return num_bytes + checked.buffer_bytes + 2 * len(checked.content) + _FIXED_BYTES


def _digest(image: Image.Image) -> str:
    """Return the SHA-256 of mode, size and pixels of a flattened image. Grey counts as RGB."""
    mode = "RGB" if image.mode == "L" else image.mode
    digest = hashlib.sha256(f"{mode} {image.size}".encode())
    for box in _strips(image):
        strip = image.crop(box)
        digest.update((strip if strip.mode == mode else strip.convert(mode)).tobytes())
    return digest.hexdigest()


@contextmanager
def _rejecting() -> Iterator[None]:
    """Turn any exception that Pillow raises into RejectedImage with a reason."""
    try:
        yield
    except RejectedImage:
        raise
    except Cancelled as error:
        raise RejectedImage("not decoded, because this call was interrupted") from error
    except UserError as error:
        raise RejectedImage(str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise RejectedImage("not an image that Pillow can read; convert it to JPEG or PNG") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        reason = f"has more than {limit:.0f} megapixels, the limit that guards against decompression bombs"
        raise RejectedImage(reason) from error
    # Pillow's plugins raise SyntaxError, struct.error, KeyError and more for damaged files, and one bad file among
    # thousands must not stop `safelight prepare`
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise RejectedImage(f"cannot be read: {error.strerror}") from error
        # libheif's end with a line break
        raise RejectedImage(f"damaged: {collapse(str(error)) or type(error).__name__}") from error


def decode(content: bytes, max_megapixels: float | None = None, stop: threading.Event | None = None) -> Decoded:
    """Return the first frame of an image file as upright sRGB, shrunk to max_megapixels (10^6 px; None: no limit).

    content: the file's bytes. stop: once it is set, a call that waits for memory or is between two steps ends with
    RejectedImage. Threads that decode at the same time share one memory budget. Raises RejectedImage with the reason.
    """
    with _rejecting():
        return _decode(content, max_megapixels, stop)


def decode_mask(content: bytes, stop: threading.Event | None = None) -> Image.Image:
    """Return the first frame of an image file as an upright 8-bit grey mask: its luma, black where it is transparent.

    The values are those of the file: no colour profile is applied. content, stop: as for `decode`. Raises RejectedImage
    with the reason.
    """
    with _rejecting():
        checked = check(content, has_heif=_has_heif())
        opened = _open(checked)
        num_bytes = decode_bytes(opened, opened.size, checked, is_shrunk=False)
        _refuse_if_memory_is_short(num_bytes, opened.size)
        with decode_budget().reserved(num_bytes, stop):
            opened.load()
            end_if_set(stop)
            mask = _flatten(opened, BLACK)[0].convert("L")
            orientation = _orientation(opened)
            return mask.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else mask


def upright_size(content: bytes) -> tuple[int, int]:
    """Return (width, height) of an image file in px as it is shown. Raises RejectedImage as `decode_mask`."""
    with _rejecting():
        opened = _open(check(content, has_heif=_has_heif()))
        width, height = opened.size
        # those from 5 on swap the sides
        return (height, width) if _orientation(opened) >= 5 else (width, height)


def decode_file(
    path: Path | PackedFile,
    max_megapixels: float | None = None,
    stop: threading.Event | None = None,
    backdrop: Backdrop = WHITE,
) -> tuple[bytes, Decoded]:
    """Return (the bytes of an image file, the decoded image), as `read_file` and `decode` do.

    Large files are read and decoded one at a time, since their bytes count as well. backdrop: what transparency is
    composited over.
    """
    with _rejecting():
        size = os.stat(path).st_size if isinstance(path, Path) else path.size
        is_large = size > LARGE_FILE_BYTES
        with _one_large_file if is_large else nullcontext():
            end_if_set(stop)
            content = read_file(path)
            return content, _decode(content, max_megapixels, stop, backdrop)


def _opened(path: Path | PackedFile) -> tuple[BinaryIO, int]:
    """Return (a regular file, opened for reading; its size). The reason against it does not repeat the path."""
    if not isinstance(path, Path):
        _check_size(path.size)
        content = path.read()
        return io.BytesIO(content), len(content)
    try:
        file = open_regular(path)
        return file, os.fstat(file.fileno()).st_size
    except UnsafeFile as error:
        raise RejectedImage(str(error).removeprefix(f"{printable(path)} is ")) from error


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        limit_gib = MAX_FILE_BYTES / GIB
        raise RejectedImage(f"the file is {size / GIB:.1f} GiB, over the limit of {limit_gib:.0f} GiB; shrink it")


def read_file(path: Path | PackedFile) -> bytes:
    """Return the bytes of an image file. Raises RejectedImage if it cannot be read or is not an image by its header."""
    with _rejecting():
        file, size = _opened(path)
    with _rejecting(), file:
        if size == 0:
            raise RejectedImage("the file is empty")
        _check_size(size)
        # check the header first, so that a video or an archive is not read into memory
        header = file.read(256)
        check_kind(header, path.name, _has_heif())
        accepts = {name: Image.OPEN[name][1] for name in _formats()}
        if not any(accept is not None and accept(header[:16]) for accept in accepts.values()):
            # formats without a signature
            Image.open(file, formats=[name for name, accept in accepts.items() if accept is None])
        file.seek(0)
        # a limit in place of the size would be allocated first, in every thread
        return file.read(size)


def encode(image: Image.Image, image_format: str, quality: int) -> tuple[bytes, str]:
    """Return (bytes, file suffix) of an RGB image encoded as "jpeg" (no chroma subsampling) or "webp".

    quality: 1 to 100. Raises RejectedImage if a side is longer than the format allows.
    """
    if max(image.size) > MAX_SIDE_PX[image_format]:
        raise RejectedImage(
            f"{image_format} allows at most {MAX_SIDE_PX[image_format]} px a side; crop it, or lower --max-megapixels"
        )
    buffer = io.BytesIO()
    if image_format == "webp":
        image.save(buffer, "WEBP", quality=quality)
        return buffer.getvalue(), ".webp"
    # no chroma subsampling, which would blur saturated red edges before the VAE sees them
    options = {"quality": quality, "subsampling": 0}
    image.save(buffer, "JPEG", **options)
    # Pillow optimizes in one buffer of this size. Noise exceeds it: an error, and a line of libjpeg's on the terminal
    room = image.width * image.height * (2 if quality >= 95 else 1)
    if buffer.tell() <= room:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options, optimize=True)
    return buffer.getvalue(), ".jpg"


def crop_pixels(
    image: Image.Image, crop_box: tuple[int, int, int, int], size_wh: tuple[int, int], flip: bool
) -> np.ndarray:
    """Return the crop of an RGB image resampled to size_wh with LANCZOS: (3, H, W) float32 in [-1, 1].

    crop_box: left, top, right, bottom in px. size_wh: (W, H) in px. flip: mirror left to right.
    """
    resized = image.resize(size_wh, Image.Resampling.LANCZOS, box=crop_box)
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels_HWC = np.asarray(resized, dtype=np.float32)
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1.0)
