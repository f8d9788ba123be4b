"""Read one image file: check it, decode it to upright RGB, shrink it, encode it; and crop it to training pixels.

A file that cannot be used is rejected as a whole, with the reason.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from safelight.errors import UserError
from safelight.units import GIB
from safelight.untrusted import UnsafeFile, read_bytes

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
    "ICO",
    "PSD",
)
MAX_FILE_BYTES = GIB
# longest side, in px, that the formats allow
MAX_SIDE_PX = {"jpeg": 65500, "webp": 16383}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
# decoding an image of this many pixels can take a GiB, so larger ones are decoded one at a time
LARGE_PIXELS = 40_000_000
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
# pixels are hashed in strips that fit the CPU cache: copying a whole photo takes as long as hashing it
STRIP_BYTES = 2**18
_one_large_image = threading.Lock()


class RejectedImage(UserError):
    """An image file that cannot be used. The message is the reason shown to the user."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image. image: RGB, upright, within the size limit. format: Pillow's name for the file's format.

    is_copyable: the file needs no change, so its bytes can be stored as they are. is_shrunk: it was over the limit.
    content_sha256: hash of the decoded pixels before shrinking, equal for equal pictures. warning: may be empty.
    """

    image: Image.Image
    format: str
    is_copyable: bool
    is_shrunk: bool
    content_sha256: str
    warning: str = ""


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
        return _open(source if isinstance(source, bytes) else read_bytes(source, MAX_FILE_BYTES))


def _formats() -> list[str]:
    Image.init()
    # plugins, such as the one for HEIF, may be missing
    return [name for name in READABLE_FORMATS if name in Image.OPEN]


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=_formats())


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    # a damaged EXIF block can raise anything, while the pixels are still good
    except Exception:
        return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit, 32-bit or float image as 8-bit grey, scaled by its bit depth, or by its range if it has none."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise RejectedImage("contains infinite or NaN pixels; convert it to 8 or 16 bits")
    peak = float(values.max(initial=0.0))
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        white = next((level for level in (1.0, 255.0, 65535.0) if peak <= level), peak)
        # integers of at most 1 are a dark picture, not a float image
        white = 255.0 if white == 1.0 and image.mode == "I" else white
    return Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8), "L")


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as RGB, transparency composited over white. CMYK is returned unchanged."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.mode == "CMYK" or (image.mode == "RGB" and "transparency" not in image.info):
        return image
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _foreign_profile(icc: bytes | None) -> ImageCms.ImageCmsProfile | None:
    """Return the colour profile if it is an RGB or CMYK profile other than sRGB, else None."""
    if not icc:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        description = profile.profile.profile_description or ""
        space = profile.profile.xcolor_space.strip()
    except (OSError, ImageCms.PyCMSError):
        return None
    return None if space not in ("RGB", "CMYK") or "srgb" in description.lower() else profile


def _to_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> tuple[Image.Image, str]:
    """Return (the RGB or CMYK image converted to sRGB, a warning or "")."""
    if profile is None or profile.profile.xcolor_space.strip() != image.mode:
        return image.convert("RGB"), ""
    try:
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        return image.convert("RGB"), f"its colour profile cannot be used ({error}); the colours are treated as sRGB"
    return converted, ""


def _decode(content: bytes, max_megapixels: float | None) -> Decoded:
    with _open(content) as opened:
        width, height = opened.size
        if min(width, height) < MIN_SIDE_PX:
            raise RejectedImage(f"{width} x {height} px is too small; each side needs at least {MIN_SIDE_PX} px")
        with _one_large_image if width * height > LARGE_PIXELS else nullcontext():
            return _load(opened, max_megapixels)


def _digest(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB or CMYK image's mode, size and pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    width, height = image.size
    num_rows = max(1, STRIP_BYTES // (len(image.mode) * width))
    for top in range(0, height, num_rows):
        digest.update(image.crop((0, top, width, min(height, top + num_rows))).tobytes())
    return digest.hexdigest()


def _load(opened: Image.Image, max_megapixels: float | None) -> Decoded:
    """Decode an opened image as described at `decode`."""
    width, height = opened.size
    file_format = opened.format or ""
    target = shrunk_size(width, height, max_megapixels)
    is_shrunk = target != (width, height)
    if is_shrunk:
        # for JPEG only, a no-op for other formats: the decoder scales by 1/2, 1/4 or 1/8, which is several times faster
        opened.draft(None, (target[0] * DRAFT_GAP, target[1] * DRAFT_GAP))
    is_animated = getattr(opened, "is_animated", False)
    opened.load()
    orientation = _orientation(opened)
    icc = opened.info.get("icc_profile")
    is_plain = opened.mode == "RGB" and "transparency" not in opened.info
    image = _flatten(opened)
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    digest = _digest(image)
    if is_shrunk:
        image = image.resize(shrunk_size(*image.size, max_megapixels), Image.Resampling.LANCZOS)
    profile = _foreign_profile(icc)
    image, warning = _to_srgb(image, profile)
    is_copyable = (
        file_format in COPYABLE_FORMATS
        and is_plain
        and not is_animated
        and not is_shrunk
        and orientation not in _TRANSPOSE
        and profile is None
    )
    return Decoded(image, file_format, is_copyable, is_shrunk, digest, warning)


@contextmanager
def _rejecting() -> Iterator[None]:
    """Turn any exception that Pillow raises into RejectedImage with a reason."""
    try:
        yield
    except RejectedImage:
        raise
    except UnsafeFile as error:
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
        raise RejectedImage(f"damaged: {error or type(error).__name__}") from error


def decode(content: bytes, max_megapixels: float | None = None) -> Decoded:
    """Return the first frame of an image file as upright sRGB, shrunk to max_megapixels (10^6 px; None: no limit).

    content: the file's bytes. Raises RejectedImage with the reason.
    """
    with _rejecting():
        return _decode(content, max_megapixels)


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file. Raises RejectedImage if it cannot be read or is not an image by its header."""
    with _rejecting():
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            # opening a pipe blocks until someone writes to it, and reading a device may never end
            raise RejectedImage("not a regular file but a device, pipe or socket")
        if status.st_size == 0:
            raise RejectedImage("the file is empty")
        if status.st_size > MAX_FILE_BYTES:
            size_gib, limit_gib = status.st_size / GIB, MAX_FILE_BYTES / GIB
            raise RejectedImage(f"the file is {size_gib:.1f} GiB, over the limit of {limit_gib:.0f} GiB; shrink it")
        # check the header first, so that a video or an archive is not read into memory
        with open(path, "rb") as file:
            header = file.read(16)
        if header[4:8] == b"ftyp" and header[8:12] in HEIC_BRANDS and "HEIF" not in Image.OPEN:
            raise RejectedImage("HEIC files cannot be decoded here; convert it to JPEG")
        with Image.open(path, formats=_formats()):
            pass
        return path.read_bytes()


def encode(image: Image.Image, image_format: str, quality: int) -> tuple[bytes, str]:
    """Return (bytes, file suffix) of an RGB image encoded as "jpeg" (no chroma subsampling) or "webp".

    quality: 1 to 100. Raises RejectedImage if a side is longer than the format allows.
    """
    if max(image.size) > MAX_SIDE_PX[image_format]:
        raise RejectedImage(
            f"{image.size[0]} x {image.size[1]} px: {image_format} allows at most {MAX_SIDE_PX[image_format]} px "
            "a side; crop it, or lower --max-megapixels"
        )
    buffer = io.BytesIO()
    if image_format == "webp":
        image.save(buffer, "WEBP", quality=quality)
        return buffer.getvalue(), ".webp"
    # no chroma subsampling, which would blur saturated red edges before the VAE sees them
    image.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
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
