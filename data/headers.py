"""Read what a picture file says about itself, before a decoder sees it: what no decoder may get is refused here.

Decoders trust headers: a JPEG may order 400 passes over its pixels, a PNG unpack a comment of a GiB, a TIFF have a
million strips, a raw file pass for its thumbnail of 160 x 120. Metadata that a decoder would stumble over is taken
out, since the pixels beside it are sound.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from safelight.errors import UserError

# libjpeg writes 10 scans, 18 for CMYK; programs that search for the best, such as mozjpeg, write about as many
MAX_JPEG_SCANS = 32
# no encoder writes more than a few dozen segments before the pixels
MAX_JPEG_SEGMENTS = 10_000
# encoders write chunks of 8 KiB or more: 1 GiB has 131,072 of them
MAX_PNG_CHUNKS = 200_000
MAX_GIF_BLOCKS = 200_000
MAX_TIFF_PIECES = 100_000
MAX_JPEG2000_BOXES = 1000
# directories of a TIFF that are searched for sensor data
MAX_TIFF_DIRECTORIES = 16
# the largest colour profiles, for printing presses, have 4 MB; EXIF blocks of cameras have at most 64 KiB
MAX_PROFILE_BYTES = 2**24
MAX_METADATA_BYTES = 2**20
# metadata of a PNG that is copied as it is: Pillow refuses texts and profiles that unpack to more than 1 MiB
MAX_SOUND_BYTES = 2**18
MAX_UNPACKED_BYTES = 2**20
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AVIF_BRANDS = {b"avif", b"avis"}
# brands of the container that HEIC and AVIF share
SHARED_BRANDS = {b"mif1", b"mif2", b"msf1", b"miaf"}
RAW_SUFFIXES = frozenset(
    ".3fr .ari .arw .bay .cap .cr2 .cr3 .crw .dcr .dcs .dng .drf .eip .erf .fff .gpr .iiq .k25 .kdc .mdc .mef .mos "
    ".mrw .nef .nrw .obm .orf .pef .ptx .pxn .r3d .raf .raw .rw2 .rwl .rwz .sr2 .srf .srw .x3f".split()
)
RAW_SIGNATURES = {
    b"FUJIFILMCCD-RAW": "RAF",
    b"IIRO": "ORF",
    b"IIRS": "ORF",
    b"MMOR": "ORF",
    b"IIU\0": "RW2",
    b"FOVb": "X3F",
    b"\0MRM": "MRW",
}
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
# tags of a TIFF directory
NEW_SUBFILE_TYPE, SUBFILE_TYPE, IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, PHOTOMETRIC = 254, 255, 256, 257, 258, 262
STRIP_OFFSETS, SAMPLES_PER_PIXEL, ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH = 273, 277, 278, 322, 323
TILE_OFFSETS, SUB_DIRECTORIES = 324, 330
DNG_VERSION = 50706
SENSOR_PHOTOMETRICS = (32803, 34892)
_TIFF_TYPE_BYTES = dict(zip(range(1, 19), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), strict=True))
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q", 18: "Q"}

JPEG2000_STREAM = b"\xff\x4f\xff\x51"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# all that decides about the pixels of the first frame
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_MIN_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"acTL": 8, b"fcTL": 26, b"fdAT": 4}
_PNG_METADATA = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"eXIf", b"acTL")
# where EXIF may be, besides eXIf -> Pillow's name for it
_PNG_TEXTS = {b"XML:com.adobe.xmp": "xmp", b"Raw profile type exif": "Raw profile type exif"}
# any number of bytes FF may stand before it
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xfe])")
# within a scan, FF 00 is a byte FF, and FF D0 to FF D7 separate restart intervals
_JPEG_END_OF_SCAN = re.compile(rb"\xff(?=[\x01-\xcf\xd8-\xfe])")
_GIF_MARK = re.compile(rb"[!,;]")
_PNM_HEADER = re.compile(rb"P\w{1,5}(?:(?:\s|#[^\r\n]*[\r\n])+[-+.\w]+){2,3}\s")
_PNM_HEADER_BYTES = 2**16
_ADVICE = "export it as JPEG or 16-bit TIFF"


UNUSED_PROFILE = f"its colour profile is damaged or larger than {MAX_PROFILE_BYTES >> 20} MiB and was not used"


class RejectedImage(UserError):
    """An image file that cannot be used. The message is the reason shown to the user."""


@dataclass
class Checked:
    """A file that may be decoded. content: its bytes, of a PNG or GIF without what does not decide about pixels.

    info: a PNG's metadata, under Pillow's names; of other formats Pillow reads it. notes: metadata that is not used.
    is_animated: a PNG has more than one frame. is_progressive: the decoder of a JPEG holds all coefficients at once.
    """

    content: bytes
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_animated: bool = False
    is_progressive: bool = False
    buffer_bytes: int = 0
    has_sound_metadata: bool = True


def check(content: bytes, name: str = "", has_heif: bool = False) -> Checked:
    """Return the file's content, ready for a decoder. Raises RejectedImage with the reason if it must not get one.

    name: the file's name, if it has one. has_heif: HEIC files can be decoded. The time is linear in the file's size
    and takes less than a second.
    """
    check_kind(content, name, has_heif)
    if content.startswith(PNG_SIGNATURE):
        return _check_png(content)
    if content.startswith(b"\xff\xd8"):
        return _check_jpeg(content)
    if content.startswith((b"GIF87a", b"GIF89a")):
        return _check_gif(content)
    if content.startswith(TIFF_SIGNATURES):
        return Checked(content, buffer_bytes=_check_tiff(content))
    if content.startswith(b"8BPS"):
        _check_psd(content)
    elif content[:1] == b"P" and content[1:2].isalnum() and not _PNM_HEADER.match(content[:_PNM_HEADER_BYTES]):
        raise RejectedImage("not an image that Pillow can read; convert it to JPEG or PNG")
    return Checked(content)


def check_kind(header: bytes, name: str = "", has_heif: bool = False) -> None:
    """Raise RejectedImage for raw files and formats without a decoder, by name and first bytes (256 or more)."""
    suffix = PurePath(name).suffix.lower()
    # a JPEG that somebody named .nef is a photograph all the same
    is_raw = suffix in RAW_SUFFIXES and not header.startswith((b"\xff\xd8\xff", PNG_SIGNATURE))
    kind = suffix[1:].upper() if is_raw else _raw_kind(header)
    if kind:
        raise RejectedImage(f"a camera's raw file ({kind}), which cannot be developed here; {_ADVICE}")
    brands = _brands(header)
    if not has_heif and (brands & HEIC_BRANDS or brands & SHARED_BRANDS) and not brands & AVIF_BRANDS:
        raise RejectedImage("HEIC files need pillow-heif: pip install pillow-heif, or convert it to JPEG")
    if header.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        raise RejectedImage("JPEG XL files cannot be decoded here; convert it to JPEG or PNG")


def _raw_kind(header: bytes) -> str:
    for signature, kind in RAW_SIGNATURES.items():
        if header.startswith(signature):
            return kind
    if header.startswith(TIFF_SIGNATURES) and header[8:10] == b"CR":
        return "CR2"
    if header[6:14] == b"HEAPCCDR":
        return "CRW"
    return "CR3" if b"crx " in _brands(header) else ""


def _brands(header: bytes) -> set[bytes]:
    """Return the brands in the first box of an ISO media file, the family of HEIC, AVIF, CR3 and MP4."""
    if header[4:8] != b"ftyp":
        return set()
    end = min(len(header), struct.unpack(">I", header[:4])[0], 256)
    return {header[8:12], *(header[start : start + 4] for start in range(16, end - 3, 4))}


def _check_jpeg(content: bytes) -> Checked:
    """Count the scans: each is a pass over all pixels, however few bytes it has."""
    checked = Checked(content)
    num_scans = num_segments = 0
    position = 2
    while marker := _JPEG_MARKER.search(content, position):
        position = marker.end()
        kind = marker[1][0]
        if kind == 0xD9:
            break
        # markers without a length
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:
            continue
        num_segments += 1
        checked.is_progressive |= kind in (0xC2, 0xC6, 0xCA, 0xCE)
        position += max(2, int.from_bytes(content[position : position + 2], "big"))
        if kind == 0xDA:
            num_scans += 1
            end = _JPEG_END_OF_SCAN.search(content, position)
            position = end.start() if end else len(content)
        if num_scans > MAX_JPEG_SCANS or num_segments > MAX_JPEG_SEGMENTS:
            what = f"{MAX_JPEG_SCANS} scans" if num_scans > MAX_JPEG_SCANS else f"{MAX_JPEG_SEGMENTS:,} segments"
            raise RejectedImage(f"has more than {what}, more than any camera or program writes; save it again")
    # the decoder also holds all coefficients if the colours come one after another
    checked.is_progressive |= num_scans > 1
    return checked


def jpeg_without_metadata(content: bytes) -> bytes:
    """Return a JPEG without its APP and comment segments, except those that say how its colours are encoded."""
    parts, position = [b"\xff\xd8"], 2
    while marker := _JPEG_MARKER.search(content, position):
        kind = marker[1][0]
        if kind in (0xDA, 0xD9):
            parts.append(content[marker.end() - 2 :])
            break
        position = marker.end()
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:
            continue
        end = position + max(2, int.from_bytes(content[position : position + 2], "big"))
        segment, position = content[position - 2 : end], end
        is_metadata = 0xE0 <= kind <= 0xEF or kind == 0xFE
        if not is_metadata or segment[4:9] == b"Adobe" or segment[4:8] == b"JFIF":
            parts.append(segment)
    return b"".join(parts)


def _check_gif(content: bytes) -> Checked:
    """Cut the comments before the first frame, which Pillow joins in quadratic time, and what follows that frame."""
    head = position = 13 + _gif_palette_bytes(content, 10)
    control = b""
    # as Pillow does, skip what is no block
    while (mark := _GIF_MARK.search(content, position)) and mark[0] == b"!":
        position = _after_gif_blocks(content, mark.end() + 1, MAX_GIF_BLOCKS)
        if content[mark.end() : mark.end() + 1] == b"\xf9":
            control = content[mark.start() : position]
    if mark is None or mark[0] == b";":
        raise RejectedImage("damaged: it has no frame")
    frame = mark.start()
    # a descriptor, a palette and the size of LZW codes, then blocks of up to 255 bytes
    blocks = frame + 10 + _gif_palette_bytes(content, frame + 9) + 1
    end = _after_gif_blocks(content, blocks, MAX_GIF_BLOCKS + len(content) // 64)
    return Checked(content[:head] + control + content[frame:end] + b";")


def _gif_palette_bytes(content: bytes, at: int) -> int:
    """Return the size of the palette that the flags at a position announce."""
    flags = content[at] if at < len(content) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_gif_blocks(content: bytes, start: int, max_blocks: int) -> int:
    """Return the position after a chain of blocks, each preceded by its length, the last of which is empty."""
    for _ in range(max_blocks):
        length = content[start] if start < len(content) else 0
        start += 1 + length
        if not length:
            return start
    raise RejectedImage(f"has more than {max_blocks:,} blocks in a row, which no program writes; convert it to PNG")


def jpeg2000_shape(content: bytes) -> tuple[int, int, int]:
    """Return (width, height, channels) by the code stream, which decides about memory; zeros if there is none."""
    start = 0
    if not content.startswith(JPEG2000_STREAM):
        for _ in range(MAX_JPEG2000_BOXES):
            length, kind = struct.unpack(">I4s", content[start : start + 8].ljust(8, b"\0"))
            if kind == b"jp2c":
                start += 16 if length == 1 else 8
                break
            start += int.from_bytes(content[start + 8 : start + 16], "big") if length == 1 else max(8, length)
    if content[start : start + 4] != JPEG2000_STREAM or start + 42 > len(content):
        return 0, 0, 0
    right, bottom, left, top, _, _, _, _, channels = struct.unpack_from(">8IH", content, start + 8)
    return right - left, bottom - top, channels


def _check_psd(content: bytes) -> None:
    """Refuse a list of resources so long that reading it takes seconds."""
    start = 26 + 4 + int.from_bytes(content[26:30], "big")
    if int.from_bytes(content[start : start + 4], "big") > MAX_PROFILE_BYTES:
        raise RejectedImage("has more than 16 MiB of Photoshop resources; convert it to PNG or TIFF")


@dataclass(frozen=True)
class _Entry:
    """An entry of a TIFF directory. values: its first 16, if they are integers."""

    type: int
    count: int
    num_bytes: int
    values: tuple[int, ...]


def _read_directory(content: bytes, offset: int, order: str, is_big: bool) -> tuple[dict[int, _Entry], int]:
    """Return (tag -> entry, offset of the next directory or 0). A cut directory gives the entries that are there."""
    entries: dict[int, _Entry] = {}
    size, count_format, entry_format = (20, "Q", "HHQ") if is_big else (12, "H", "HHL")
    head = struct.calcsize("=" + count_format)
    word = 8 if is_big else 4
    if offset + head > len(content):
        return entries, 0
    (count,) = struct.unpack_from(order + count_format, content, offset)
    position = offset + head
    for _ in range(min(count, 65536)):
        if position + size > len(content):
            return entries, 0
        tag, kind, num = struct.unpack_from(order + entry_format, content, position)
        num_bytes = num * _TIFF_TYPE_BYTES.get(kind, 0)
        start = position + size - word
        if num_bytes > word:
            (start,) = struct.unpack_from(order + ("Q" if is_big else "L"), content, start)
        values: tuple[int, ...] = ()
        if kind in _TIFF_INTEGERS:
            length = min(num, 16)
            if start + length * _TIFF_TYPE_BYTES[kind] <= len(content):
                values = struct.unpack_from(f"{order}{length}{_TIFF_INTEGERS[kind]}", content, start)
        entries.setdefault(tag, _Entry(kind, num, num_bytes, values))
        position += size
    if position + word > len(content):
        return entries, 0
    return entries, struct.unpack_from(order + ("Q" if is_big else "L"), content, position)[0]


def _check_tiff(content: bytes) -> int:
    """Return the bytes of a strip or tile. Raw files, previews and directories that take long to read are refused."""
    order = "<" if content[:2] == b"II" else ">"
    is_big = content[2:4] in (b"+\0", b"\0+")
    if len(content) < 16:
        return 0
    (offset,) = struct.unpack_from(order + ("Q" if is_big else "L"), content, 8 if is_big else 4)
    first, following = _read_directory(content, offset, order, is_big)

    def value(entries: dict[int, _Entry], tag: int) -> int:
        return next(iter(entries[tag].values), 0) if tag in entries else 0

    directories, seen = [first], {offset}
    pending = [*(first[SUB_DIRECTORIES].values if SUB_DIRECTORIES in first else ()), following]
    while pending and len(directories) < MAX_TIFF_DIRECTORIES:
        offset = pending.pop(0)
        if offset and offset not in seen:
            seen.add(offset)
            entries, following = _read_directory(content, offset, order, is_big)
            directories.append(entries)
            pending.append(following)
    if DNG_VERSION in first:
        raise RejectedImage(f"a camera's raw file (DNG), which cannot be developed here; {_ADVICE}")
    if any(value(entries, PHOTOMETRIC) in SENSOR_PHOTOMETRICS for entries in directories):
        raise RejectedImage(f"a camera's raw file, which cannot be developed here; {_ADVICE}")
    if value(first, NEW_SUBFILE_TYPE) & 1 or value(first, SUBFILE_TYPE) == 2:
        reason = "its first page is a reduced preview of the photograph, as in a camera's raw file"
        raise RejectedImage(f"{reason}; {_ADVICE} of one page")
    num_pieces = max((first[tag].count for tag in (STRIP_OFFSETS, TILE_OFFSETS) if tag in first), default=0)
    if num_pieces > MAX_TIFF_PIECES:
        raise RejectedImage(f"has {num_pieces:,} strips or tiles, over the limit of {MAX_TIFF_PIECES:,}; save it again")
    if sum(entry.num_bytes for entry in first.values()) > len(content):
        raise RejectedImage("damaged: its tags claim more bytes than the file has")
    width, height = value(first, IMAGE_WIDTH), value(first, IMAGE_LENGTH)
    rows = min(height, value(first, ROWS_PER_STRIP) or height)
    num_pixels = value(first, TILE_WIDTH) * value(first, TILE_LENGTH) if TILE_WIDTH in first else width * rows
    return num_pixels * (value(first, SAMPLES_PER_PIXEL) or 1) * max(8, value(first, BITS_PER_SAMPLE)) // 8


def _inflated(data: bytes, limit: int) -> bytes | None:
    """Return zlib data unpacked, None if it is damaged or larger than the limit."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, limit)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None


def _png_text(kind: bytes, data: bytes) -> bytes:
    """Return the value in a tEXt, zTXt or iTXt chunk, data being what follows its keyword; empty if it is damaged."""
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":
        is_packed = data[:1] == b"\1"
        # flag, method, language, translated keyword
        data = data[1:2] + data[2:].split(b"\0", 2)[-1]
    if is_packed:
        return (_inflated(data[1:], MAX_METADATA_BYTES) or b"") if data[:1] == b"\0" else b""
    return data[kind == b"iTXt" :][: MAX_METADATA_BYTES + 1]


def _check_png(content: bytes) -> Checked:
    """Keep the chunks that decide about pixels. The others are read here, within bounds; damage in them is ignored."""
    checked = Checked(content)
    kept = [(0, 8)]
    metadata: dict[bytes, bytes] = {}
    position, num_chunks, num_metadata_bytes = 8, 0, 0
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        num_chunks += 1
        if num_chunks > MAX_PNG_CHUNKS:
            raise RejectedImage(f"has more than {MAX_PNG_CHUNKS:,} chunks, which no program writes; save it again")
        if kind in _PNG_PIXELS or end > len(content):
            if kept[-1][1] == position:
                kept[-1] = (kept[-1][0], end)
            else:
                kept.append((position, end))
        else:
            data = content[position + 8 : end - 4]
            _read_png_metadata(kind, data, metadata)
            if checked.has_sound_metadata:
                num_metadata_bytes += length
                checked.has_sound_metadata = num_metadata_bytes <= MAX_SOUND_BYTES and _is_sound(
                    kind, data, content[end - 4 : end]
                )
        position = end
        if kind == b"IEND":
            break
    if kept != [(0, len(content))]:
        view = memoryview(content)
        checked.content = b"".join(view[start:end] for start, end in kept)
    _interpret_png(checked, metadata)
    return checked


def _is_sound(kind: bytes, data: bytes, checksum: bytes) -> bool:
    """Return whether every decoder takes this chunk of metadata: whole, and not too large when it is unpacked."""
    is_whole = zlib.crc32(kind + data).to_bytes(4, "big") == checksum and len(data) >= _PNG_MIN_BYTES.get(kind, 0)
    if not is_whole or not kind.isalpha():
        return False
    _, _, value = data.partition(b"\0")
    if kind == b"iTXt":
        return value[:1] != b"\1" or _inflated(value[2:].split(b"\0", 2)[-1], MAX_UNPACKED_BYTES) is not None
    if kind not in (b"zTXt", b"iCCP"):
        return True
    return value[:1] == b"\0" and _inflated(value[1:], MAX_UNPACKED_BYTES) is not None


def _read_png_metadata(kind: bytes, data: bytes, metadata: dict[bytes, bytes]) -> None:
    """Add the first chunk of its kind; of texts, the value of the first with its keyword."""
    if kind in (b"zTXt", b"tEXt", b"iTXt"):
        keyword = data[:80].partition(b"\0")[0]
        if keyword in _PNG_TEXTS and keyword not in metadata:
            metadata[keyword] = _png_text(kind, data[len(keyword) + 1 :])
    elif kind in _PNG_METADATA:
        metadata.setdefault(kind, data)


def _interpret_png(checked: Checked, metadata: dict[bytes, bytes]) -> None:
    """Put the metadata under the names that Pillow gives it. Values of a wrong length are left out."""
    info = checked.info
    checked.is_animated = b"acTL" in metadata
    if b"iCCP" in metadata:
        data = metadata[b"iCCP"].partition(b"\0")[2]
        profile = _inflated(data[1:], MAX_PROFILE_BYTES) if data[:1] == b"\0" else None
        if profile is None:
            checked.notes.append(UNUSED_PROFILE)
        else:
            info["icc_profile"] = profile
    if len(data := metadata.get(b"sRGB", b"")) == 1:
        info["srgb"] = data[0]
    if len(data := metadata.get(b"cICP", b"")) == 4:
        info["cicp"] = tuple(data)
    if len(data := metadata.get(b"gAMA", b"")) == 4:
        info["gamma"] = int.from_bytes(data, "big") / 100_000
    if len(data := metadata.get(b"cHRM", b"")) == 32:
        info["chromaticity"] = tuple(value / 100_000 for value in struct.unpack(">8I", data))
    if 0 < len(data := metadata.get(b"eXIf", b"")) <= MAX_METADATA_BYTES:
        info["exif"] = b"Exif\0\0" + data
    for keyword, name in _PNG_TEXTS.items():
        if 0 < len(data := metadata.get(keyword, b"")) <= MAX_METADATA_BYTES:
            info[name] = data if name == "xmp" else data.decode("latin-1")
