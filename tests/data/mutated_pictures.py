"""Decode mutated pictures of every format and print, as JSON, what came of them.

Run in a process of its own, so that a crash, a line on file descriptor 2 or memory that grows is seen by the caller:
python mutated_pictures.py files|profiles FIRST_SEED NUM_PICTURES
"""

from __future__ import annotations

import io
import json
import resource
import struct
import sys
import time
import zlib

import numpy as np
from PIL import Image, ImageCms

from safelight.data.images import RejectedImage, decode

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# the first mutations of a file are in its header, where the fields are
HEADER_BYTES = 400


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def psd(image: Image.Image) -> bytes:
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, image.height, image.width, 8, 3)
    planes = b"".join(band.tobytes() for band in image.split())
    return header + struct.pack(">III", 0, 0, 0) + b"\0\0" + planes


def bmp_rle(size: int) -> bytes:
    rows = bytes([size, 7, 0, 0]) * size + b"\0\1"
    info = struct.pack("<IiiHHIIiiII", 40, size, size, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(rows), 0, 0, 54 + 1024) + info + bytes(1024) + rows


def interlaced_png() -> bytes:
    """Return an Adam7 PNG of 16 x 16 grey pixels of 16 bits."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(
        b"\0" + bytes(2 * len(range(left, 16, right)))
        for left, top, right, down in passes
        for _ in range(top, 16, down)
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def originals() -> dict[str, bytes]:
    """Return name -> bytes of small pictures: every format that is read, with metadata where it has any."""
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(values), Image.fromarray(values[..., :3])
    grey, deep = Image.fromarray(values[..., 0]), Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    about = {"exif": exif, "icc_profile": icc}
    png = saved(rgb, "PNG")
    extra = chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"cHRM", struct.pack(">8I", *range(10000, 90000, 10000)))
    extra += chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(999))) + chunk(b"cICP", bytes([9, 8, 0, 1]))
    plain = b"P3\n# comment\n24 20\n255\n" + b" ".join(b"%d" % value for value in values[..., :3].ravel())
    return {
        "jpeg": saved(rgb, "JPEG", **about),
        "progressive": saved(rgb, "JPEG", progressive=True, **about),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "grey": saved(grey, "JPEG"),
        "mpo": saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "png": saved(rgb, "PNG", **about),
        "png of chunks": png[:33] + extra + png[33:],
        "png of 16 bits": saved(deep, "PNG"),
        "interlaced png": interlaced_png(),
        "palette": saved(rgb.convert("P"), "PNG", transparency=bytes(range(256))),
        "apng": saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)], duration=9),
        "webp": saved(rgb, "WEBP", **about),
        "lossless webp": saved(rgba, "WEBP", lossless=True),
        "animated webp": saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]),
        "gif": saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)], comment=b"a comment"),
        "tiff": saved(rgb, "TIFF", **about),
        "tiff lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": saved(deep, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff packbits": saved(grey, "TIFF", compression="packbits"),
        "tiff zstd": saved(rgb.convert("CMYK"), "TIFF", compression="zstd"),
        "tiff fax": saved(grey.convert("1"), "TIFF", compression="group4"),
        "tiff of floats": saved(Image.fromarray(values[..., 0].astype(np.float32)), "TIFF"),
        "big tiff": saved(rgb, "TIFF", big_tiff=True),
        "bmp": saved(rgb, "BMP"),
        "bmp rle": bmp_rle(20),
        "avif": saved(rgba, "AVIF", **about),
        "jp2": saved(rgb, "JPEG2000"),
        "j2k": saved(rgba, "JPEG2000", no_jp2=True, irreversible=True),
        "ppm": saved(rgb, "PPM"),
        "pgm of 16 bits": saved(deep, "PPM"),
        "plain ppm": plain,
        "tga": saved(rgba, "TGA", compression="tga_rle"),
        "qoi": saved(rgba, "QOI"),
        "psd": psd(rgb),
    }


def with_checksums(content: bytes) -> bytes:
    """Return a PNG whose chunks have the right checksums, so that a decoder looks at what they contain."""
    fixed, position = bytearray(content), 8
    while position + 12 <= len(fixed):
        end = position + 8 + struct.unpack_from(">I", fixed, position)[0]
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Return the content with one to four damages: bytes, fields of extreme values, parts cut, doubled or moved."""
    mutated = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        reach = min(len(mutated), HEADER_BYTES) if rng.random() < 0.7 else len(mutated)
        at = int(rng.integers(0, max(1, reach)))
        kind = rng.integers(0, 6)
        if kind <= 1:
            mutated[at : at + 1] = bytes([rng.integers(256)])
        elif kind == 2:
            width = int(rng.choice([1, 2, 4]))
            value = int(rng.choice(EXTREMES)) & (256**width - 1)
            mutated[at : at + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))
        elif kind == 3:
            del mutated[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            part = mutated[at : at + int(rng.integers(1, 60))]
            mutated[at:at] = part * int(rng.integers(1, 30))
        elif rng.random() < 0.3:
            del mutated[at:]
    if content.startswith(b"\x89PNG") and rng.random() < 0.7:
        return with_checksums(bytes(mutated))
    return bytes(mutated)


def table_profile(channels: bytes) -> bytes:
    """Return an ICC profile of tables, from "RGB ", "CMYK" or "GRAY" to Lab, whose colours are random."""
    num, points = {b"RGB ": (3, 5), b"CMYK": (4, 3), b"GRAY": (1, 9)}[channels]
    colours = np.random.default_rng(num).integers(0, 65281, 3 * points**num).astype(">u2").tobytes()
    identity = struct.pack(">9i", *(65536 * int(i in (0, 4, 8)) for i in range(9)))
    line = struct.pack(">HH", 0, 65535)
    element = b"mft2" + bytes(4) + bytes([num, 3, points, 0]) + identity + struct.pack(">HH", 2, 2)
    element += line * num + colours + line * 3
    header = struct.pack(">I4xI4s4s4s12x4s", 144 + len(element), 0x02400000, b"prtr", channels, b"Lab ", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(element)) + element


def with_mutated_profile(seed: int) -> tuple[str, bytes]:
    """Return (name, a sound TIFF whose colour profile is mutated)."""
    rng = np.random.default_rng(seed)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = {"RGB": table_profile(b"RGB "), "CMYK": table_profile(b"CMYK"), "L": table_profile(b"GRAY")}
    mode = ("RGB", "CMYK", "L", "RGB")[seed % 4]
    profile = mutate(srgb if seed % 4 == 3 else profiles[mode], rng)
    # a wrong size in the header is all that the decoder would look at
    if rng.random() < 0.8:
        profile = struct.pack(">I", len(profile)) + profile[4:]
    return mode, saved(Image.new(mode, (20, 20), 99 if mode == "L" else (99,) * len(mode)), "TIFF", icc_profile=profile)


def with_mutations(seed: int, pictures: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    name, content = pictures[seed % len(pictures)]
    return name, mutate(content, np.random.default_rng(seed))


def main(kind: str, first_seed: int, num_pictures: int) -> None:
    pictures = list(originals().items())
    for name, content in pictures:
        assert decode(content).image.mode == "RGB", name
    result = {"decoded": 0, "rejected": 0, "slowest_s": 0.0, "slowest": ""}
    start_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for seed in range(first_seed, first_seed + num_pictures):
        name, mutated = with_mutations(seed, pictures) if kind == "files" else with_mutated_profile(seed)
        start = time.process_time()
        try:
            image = decode(mutated).image
            assert image.mode == "RGB"
            assert min(image.size) >= 16
            result["decoded"] += 1
        except RejectedImage:
            result["rejected"] += 1
        duration = time.process_time() - start
        if duration > result["slowest_s"]:
            result["slowest_s"], result["slowest"] = duration, f"{name}, seed {seed}"
    result["grown_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start_bytes
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
