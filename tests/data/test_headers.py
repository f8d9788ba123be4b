"""Raw files, previews and headers that cost minutes are refused by name; damaged metadata is no damaged picture."""

import io
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from safelight.data.headers import MAX_JPEG_SCANS, RAW_SUFFIXES, check, check_kind
from safelight.data.images import RejectedImage, decode, read_file
from tests.data.mutated_pictures import chunk, saved

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)


def tiff(entries: dict[int, tuple[int, int, int]], tail: bytes = b"", order: str = "<") -> bytes:
    """Return a TIFF of one directory at byte 8. entries: tag -> (type, count, value or offset). tail: follows it."""
    rows = []
    for tag, (kind, count, value) in sorted(entries.items()):
        inline = struct.pack(order + "HH", value, 0) if kind == 3 and count == 1 else struct.pack(order + "L", value)
        rows.append(struct.pack(order + "HHL", tag, kind, count) + inline)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "LH", 8, len(rows)) + b"".join(rows) + bytes(4) + tail


def grey_page(order: str = "<", **more: tuple[int, int, int]) -> bytes:
    """Return a TIFF of 20 x 20 grey pixels with more entries, named t254 for tag 254."""
    page = {256: (4, 1, 20), 257: (4, 1, 20), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    page |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, 20), 279: (4, 1, 400)}
    page |= {int(name[1:]): entry for name, entry in more.items()}
    return tiff(page, bytes(500), order)


@pytest.mark.parametrize(
    "start",
    [
        b"FUJIFILMCCD-RAW 0201",
        b"IIRO\x08\0\0\0",
        b"MMOR\0\0\0\x08",
        b"IIU\0\x18\0\0\0",
        b"FOVb\0\0\x02\0",
        b"\0MRM\0\0\0\0",
        b"II\x1a\0\0\0HEAPCCDR",
        b"II*\0\x10\0\0\0CR\x02\0",
        b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom",
    ],
)
def test_raw_files_are_known_by_their_first_bytes(start):
    with pytest.raises(RejectedImage, match=r"raw file \(\w+\).*export it as JPEG or 16-bit TIFF"):
        decode(start.ljust(400, b"\0"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_raw_files_and_previews_are_known_by_their_tags(order):
    assert decode(grey_page(order)).image.size == (20, 20)
    for name, entry in (("t50706", (1, 4, 4)), ("t262", (3, 1, 32803)), ("t262", (3, 1, 34892))):
        with pytest.raises(RejectedImage, match="raw file"):
            decode(grey_page(order, **{name: entry}))
    for name, entry in (("t254", (4, 1, 1)), ("t255", (3, 1, 2))):
        with pytest.raises(RejectedImage, match=r"first page is a reduced preview.*export it as JPEG or 16-bit TIFF"):
            decode(grey_page(order, **{name: entry}))


def test_sensor_data_is_found_in_a_directory_below_the_first():
    start = len(grey_page(t330=(4, 1, 0)))
    below = struct.pack("<HHHLHHL", 1, 262, 3, 1, 32803, 0, 0)
    with pytest.raises(RejectedImage, match="raw file"):
        decode(grey_page(t330=(4, 1, start)) + below)


def test_raw_files_are_known_by_their_names(tmp_path):
    """A raw file that is a sound TIFF as well; but a JPEG is a photograph whatever its name."""
    assert {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"} <= RAW_SUFFIXES
    for name in ("a.NEF", "b.arw"):
        (tmp_path / name).write_bytes(grey_page())
        with pytest.raises(RejectedImage, match=rf"raw file \({name[2:].upper()}\)"):
            read_file(tmp_path / name)
    (tmp_path / "c.nef").write_bytes(saved(PHOTO, "JPEG"))
    assert decode(read_file(tmp_path / "c.nef")).format == "JPEG"


def test_heic_is_told_from_avif_by_all_its_brands():
    def header(major: bytes, *others: bytes) -> bytes:
        return struct.pack(">I", 16 + 4 * len(others)) + b"ftyp" + major + bytes(4) + b"".join(others) + bytes(300)

    for brands in ((b"heic", b"mif1"), (b"mif1", b"heic"), (b"msf1", b"hevc"), (b"mif1", b"miaf"), (b"heix",)):
        with pytest.raises(RejectedImage, match="HEIC files need pillow-heif"):
            check_kind(header(*brands))
        check_kind(header(*brands), has_heif=True)
    for brands in ((b"avif", b"mif1"), (b"mif1", b"avif", b"miaf"), (b"msf1", b"avis")):
        check_kind(header(*brands))
    with pytest.raises(RejectedImage, match="JPEG XL"):
        check_kind(b"\xff\x0a".ljust(300, b"\0"))


def with_scans(num_more: int) -> bytes:
    """Return a progressive JPEG whose last scan is there num_more times more."""
    content = saved(Image.new("RGB", (64, 64), (120, 90, 30)), "JPEG", progressive=True)
    last = content[[match.start() for match in re.finditer(rb"\xff\xda", content)][-1] : -2]
    return content[:-2] + last * num_more + b"\xff\xd9"


def test_jpeg_of_more_scans_than_encoders_write_is_refused():
    assert check(with_scans(0)).is_progressive
    assert decode(with_scans(MAX_JPEG_SCANS - 10)).image.size == (64, 64)
    for num_more in (MAX_JPEG_SCANS - 9, 400):
        with pytest.raises(RejectedImage, match="more than 32 scans"):
            decode(with_scans(num_more))
    assert not check(saved(PHOTO, "JPEG")).is_progressive


def test_pixels_are_taken_from_a_jpeg_with_damaged_metadata():
    content = saved(PHOTO, "JPEG")
    # a part of a colour profile that ends before its number
    damaged = content[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0" + content[2:]
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(damaged))
    decoded = decode(damaged)
    assert decoded.image.tobytes() == Image.open(io.BytesIO(content)).tobytes()
    assert "metadata is damaged" in decoded.warning
    assert not decoded.is_copyable


def bad(kind: bytes, data: bytes) -> bytes:
    """Return a chunk with a wrong checksum."""
    return chunk(kind, data)[:-4] + b"\0\0\0\0"


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"zTXt", b"Comment\0\0no zlib"),
        chunk(b"zTXt", b"Comment\0\x07" + zlib.compress(b"unknown method")),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"tEXt", b"Comment\0" + bytes(2**21)),
        chunk(b"eXIf", b"II*\0" + b"\xff" * 2**21),
        chunk(b"iCCP", b"icc\0\x05" + zlib.compress(b"unknown method")),
        chunk(b"gAMA", b"\0"),
        chunk(b"cHRM", b"\0\0"),
        chunk(b"sRGB", b""),
        bad(b"tEXt", b"Comment\0text"),
        bad(b"eXIf", b"II*\0"),
        chunk(b"cICP", b"\1"),
        chunk(b"a!XY", b""),
    ],
    ids=lambda extra: extra[4:8].decode(),
)
def test_pixels_are_taken_from_a_png_with_damaged_or_huge_metadata(extra, is_last):
    content = saved(PHOTO, "PNG")
    whole = content[:-12] + extra + content[-12:] if is_last else content[:33] + extra + content[33:]
    decoded = decode(whole)
    assert decoded.image.tobytes() == PHOTO.tobytes()
    assert bool(decoded.warning) == (extra[4:8] == b"iCCP")
    if decoded.is_copyable:
        # what is stored can be opened by any program
        assert Image.open(io.BytesIO(whole)).tobytes() == PHOTO.tobytes()


def test_what_decides_about_pixels_still_counts_in_a_png():
    content = saved(PHOTO, "PNG")
    assert decode(content).is_copyable
    at = content.index(b"IDAT")
    for damaged in (content[: at + 40], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:-40]):
        with pytest.raises(RejectedImage):
            decode(damaged)


def test_orientation_in_a_png_is_heeded_wherever_it_stands():
    content = saved(PHOTO, "PNG")
    exif = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    raw_profile = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  32\n" + (b"Exif\0\0" + exif).hex().encode())
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation='6' tiff:Orientation=\"6\"/>"
    for extra in (chunk(b"eXIf", exif), chunk(b"zTXt", raw_profile), chunk(b"iTXt", xmp)):
        assert decode(content[:33] + extra + content[33:]).image.size == (30, 40), extra
        assert decode(content[:-12] + extra + content[-12:]).image.size == (30, 40), extra


def gif_with(extra: bytes, num_frames: int = 1) -> bytes:
    content = saved(PHOTO.quantize(16), "GIF")
    head = 13 + (3 << ((content[10] & 7) + 1))
    return content[:head] + extra + content[head:-1] * num_frames + b";"


HUGE = {
    "PNG chunks": lambda: saved(PHOTO, "PNG")[:33] + chunk(b"tEXt", b"a\0b") * 250_000 + saved(PHOTO, "PNG")[33:],
    "GIF comments without a frame": lambda: gif_with(b"\x21\xfe" + (b"\xff" + b"c" * 255) * 99_000 + b"\0;", 0),
    "GIF comments": lambda: gif_with(b"\x21\xfe" + b"\1c" * 250_000 + b"\0"),
    "PPM comment": lambda: b"P6\n#" + b"c" * 30_000_000 + b"\n40 30\n255\n" + bytes(3600),
    "TIFF strips": lambda: grey_page(t273=(4, 4_000_000, 300), t279=(4, 4_000_000, 300)) + bytes(16_000_000),
    "TIFF tags": lambda: grey_page(**{f"t{tag}": (7, 1_000_000, 8) for tag in range(300, 320)}) + bytes(1_000_000),
    "JPEG segments": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 20_000 + saved(PHOTO, "JPEG")[2:],
    "QOI pixels": lambda: b"qoif" + struct.pack(">IIBB", 9000, 9000, 3, 0) + b"\xfd" * 1_300_000 + bytes(7) + b"\1",
    "PPM of 16 bits": lambda: b"P6\n9000 9000\n65535\n" + bytes(1000),
    "PSD resources": lambda: struct.pack(">4sH6xHIIHHII", b"8BPS", 1, 3, 30, 40, 8, 3, 0, 2**31 - 1) + bytes(1000),
    "JPEG 2000 sizes": lambda: with_size(saved(PHOTO, "JPEG2000", no_jp2=False)),
}


def with_size(jp2: bytes) -> bytes:
    """Return a JP2 file whose code stream is larger than its header says."""
    at = jp2.index(b"\xff\x4f\xff\x51") + 8
    return jp2[:at] + struct.pack(">II", 12000, 12000) + jp2[at + 8 :]


@pytest.mark.parametrize("kind", HUGE)
def test_headers_that_cost_minutes_are_refused_at_once(kind):
    content = HUGE[kind]()
    start = time.process_time()
    with pytest.raises(RejectedImage):
        decode(content)
    assert time.process_time() - start < 1


def test_only_the_first_frame_is_read():
    """100,000 frames, and a comment of 5 MB that Pillow would join in quadratic time."""
    comment = b"\x21\xfe" + (b"\xff" + b"c" * 255) * 20_000 + b"\0"
    start = time.process_time()
    decoded = decode(gif_with(comment, num_frames=100_000))
    assert time.process_time() - start < 1
    assert decoded.image.tobytes() == decode(gif_with(b"")).image.tobytes()


def test_what_is_no_block_is_skipped_in_a_gif():
    assert decode(gif_with(b"\0\0\x21\xfe\3abc\0\0")).image.tobytes() == decode(gif_with(b"")).image.tobytes()


def test_a_gif_keeps_its_transparent_colour():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    image.paste(0, (0, 0, 10, 20))
    out = decode(saved(image, "GIF", transparency=0)).image
    assert out.getpixel((2, 2)) == (255, 255, 255)
    assert out.getpixel((15, 5)) == (10, 200, 30)
