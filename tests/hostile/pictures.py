"""Hostile pictures, names and captions for `safelight prepare`; each is put beside good photographs.

A case writes its files into the folder of the originals. Files that are `left out` are listed with name and reason;
`taken` ones are in the manifest, with a caption if that is what the case is about; `ignored` ones leave no trace. The
good photographs are prepared in every case.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

LEFT_OUT, TAKEN, IGNORED = "left out", "taken", "ignored"


@dataclass(frozen=True)
class Picture:
    """One case. make(folder): writes the files. says: part of the reason or the note. shown: its name as printed.

    caption: of a taken photo, None if not checked. denied: names that cannot be read during the test, even by root.
    """

    name: str
    make: Callable[[Path], object]
    outcome: str
    says: str = ""
    shown: str = "x."
    caption: str | None = None
    denied: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


# with pillow-heif it gets as far as the decoder
NO_HEIC = "not an image" if importlib.util.find_spec("pillow_heif") else "HEIC files need pillow-heif"


def noise(seed: int = 99, size: tuple[int, int] = (40, 30), channels: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values)


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def write(name: str | bytes, content: bytes) -> Callable[[Path], object]:
    """Return a function that writes one file."""

    def make(folder: Path) -> None:
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as file:
            file.write(content)

    return make


def with_text_bomb() -> bytes:
    """Return a PNG whose comment is 64 MiB of zeros, compressed to 64 KiB."""
    whole = saved(noise(), "PNG")
    return whole[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)) + whole[33:]


def with_chunk(kind: bytes, data: bytes) -> bytes:
    whole = saved(noise(), "PNG")
    return whole[:33] + chunk(kind, data) + whole[33:]


def of_400_scans() -> bytes:
    whole = saved(noise(), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * 400 + b"\xff\xd9"


def with_damaged_pixels() -> bytes:
    """Return an LZW TIFF of which libtiff says on the terminal what is wrong."""
    whole = bytearray(saved(noise(), "TIFF", compression="tiff_lzw"))
    whole[8:108] = b"\xff" * 100
    return bytes(whole)


def with_bad_checksum() -> bytes:
    content = bytearray(saved(noise(), "PNG"))
    content[content.index(b"IDAT") + 40] ^= 1
    return bytes(content)


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(noise(), "JPEG", exif=exif)


def animated(image_format: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:], duration=50)


def a_pipe(folder: Path, name: str = "x.jpg") -> None:
    os.mkfifo(folder / name)


def a_socket(folder: Path) -> None:
    # the path of a socket is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(folder, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{here}/x.jpg")
        finally:
            os.close(here)


def a_folder_named_like_a_photo(folder: Path) -> None:
    (folder / "x.jpg").mkdir()
    noise().save(folder / "x.jpg" / "inside.png")


def a_loop_of_folders(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "up").symlink_to(folder)


def a_locked_folder(folder: Path) -> None:
    (folder / "x.d").mkdir()
    noise().save(folder / "x.d" / "inside.png")


def a_huge_file(folder: Path) -> None:
    with open(folder / "x.jpg", "wb") as file:
        file.write(saved(noise(), "JPEG"))
        # a sparse file: takes no disk space
        file.truncate(2**30 + 1)


def two_of_one_safe_name(folder: Path) -> None:
    noise(1).save(folder / "x é.png")
    noise(1).rotate(180).save(folder / "x ê.png")


PHOTO = saved(noise(), "PNG")
BROKEN = saved(noise(7, (200, 200)), "JPEG")[:3000]
TO_LONG = "long " * 50

PICTURES = [
    Picture("truncated JPEG", write("x.jpg", BROKEN), LEFT_OUT, "truncated"),
    Picture("PNG with a flipped bit", write("x.png", with_bad_checksum()), LEFT_OUT, "damaged"),
    Picture("PNG of a header alone", write("x.png", png_header(400, 300)), LEFT_OUT, "not an image"),
    Picture("1 x 1", write("x.png", saved(noise(1, (1, 1)), "PNG")), LEFT_OUT, "1 x 1 px is too small"),
    Picture(
        "30,000 px wide",
        write("x.png", saved(noise(1, (30000, 100)), "PNG")),
        TAKEN,
        "training crops away more than half",
    ),
    Picture(
        "too wide for a JPEG",
        write("x.png", saved(Image.new("RGBA", (66000, 18)), "PNG")),
        LEFT_OUT,
        "jpeg allows at most 65500 px a side",
    ),
    Picture(
        "too wide for a WebP",
        write("x.png", saved(Image.new("RGBA", (17000, 18)), "PNG")),
        LEFT_OUT,
        "webp allows at most 16383 px a side",
        options=("--image-format", "webp"),
    ),
    Picture(
        "decompression bomb",
        write("x.png", png_header(60000, 60000) + chunk(b"IDAT", b"")),
        LEFT_OUT,
        "the limit that guards against decompression bombs",
    ),
    Picture("bomb in a text chunk", write("x.png", with_text_bomb()), TAKEN),
    Picture("a file of more than a GiB", a_huge_file, LEFT_OUT, "the file is 1.0 GiB, over the limit of 1 GiB"),
    Picture("JPEG of 400 scans", write("x.jpg", of_400_scans()), LEFT_OUT, "has more than 32 scans"),
    Picture(
        "PNG whose colour profile is huge",
        write("x.png", with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(20 << 20)))),
        TAKEN,
        "its colour profile is damaged or larger than 16 MiB and was not used",
    ),
    Picture("PNG with damaged EXIF", write("x.png", with_chunk(b"eXIf", b"MM\0*" + b"\xff" * 99)), TAKEN),
    Picture("raw file by its name", write("x.NEF", saved(noise(), "TIFF")), LEFT_OUT, "a camera's raw file (NEF)"),
    Picture(
        "raw file by its content",
        write("x.tif", saved(noise(), "TIFF", tiffinfo={50706: b"\1\4\0\0"})),
        LEFT_OUT,
        "a camera's raw file (DNG)",
    ),
    Picture(
        "TIFF that begins with a preview",
        write("x.tif", saved(noise(), "TIFF", tiffinfo={254: 1})),
        LEFT_OUT,
        "its first page is a reduced preview",
    ),
    Picture("TIFF whose pixels are damaged", write("x.tif", with_damaged_pixels()), LEFT_OUT, "damaged"),
    Picture("CMYK", write("x.jpg", saved(Image.new("CMYK", (40, 30), (0, 200, 200, 9)), "JPEG")), TAKEN),
    Picture(
        "palette with alpha", write("x.png", saved(noise(5).convert("P"), "PNG", transparency=bytes(range(256)))), TAKEN
    ),
    Picture(
        "16-bit PNG",
        write("x.png", saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG")),
        TAKEN,
    ),
    Picture(
        "TIFF of floats that are not finite",
        write("x.tiff", saved(Image.fromarray(np.full((30, 40), np.nan, np.float32)), "TIFF")),
        LEFT_OUT,
        "infinite or NaN pixels",
    ),
    Picture("animated GIF", write("x.gif", animated("GIF")), TAKEN),
    Picture("animated WebP", write("x.webp", animated("WEBP")), TAKEN),
    Picture("lossy WebP with alpha", write("x.webp", saved(noise(3, channels=4), "WEBP", quality=50)), TAKEN),
    Picture(
        "MPO of two pictures", write("x.mpo", saved(noise(3), "MPO", save_all=True, append_images=[noise(4)])), TAKEN
    ),
    Picture("text named .jpg", write("x.jpg", b"this is text\n" * 9), LEFT_OUT, "not an image"),
    Picture("a web page named .png", write("x.png", b"<!doctype html><title>404</title>"), LEFT_OUT, "not an image"),
    Picture(
        "PostScript named .jpg",
        write("x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"),
        LEFT_OUT,
        "not an image",
    ),
    Picture(
        "not a HEIC inside",
        write("x.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)),
        LEFT_OUT,
        NO_HEIC,
    ),
    Picture(
        "HEIC by a brand that is not the first",
        write("x.heif", b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(99)),
        LEFT_OUT,
        NO_HEIC,
    ),
    Picture(
        "not an AVIF inside",
        write("x.avif", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99)),
        LEFT_OUT,
        "not an image",
    ),
    Picture("0 bytes", write("x.jpg", b""), LEFT_OUT, "the file is empty"),
    Picture("unreadable", write("x.png", PHOTO), LEFT_OUT, "Permission denied", denied=("x.png",)),
    Picture(
        "unreadable folder",
        a_locked_folder,
        LEFT_OUT,
        "a folder that cannot be read: Permission denied",
        denied=("x.d",),
    ),
    Picture("link to itself", lambda folder: (folder / "x.jpg").symlink_to("x.jpg"), LEFT_OUT, "Too many levels"),
    Picture("link to nothing", lambda folder: (folder / "x.jpg").symlink_to("gone.jpg"), LEFT_OUT, "No such file"),
    Picture("loop of folders", a_loop_of_folders, IGNORED),
    Picture("pipe", a_pipe, LEFT_OUT, "not a regular file"),
    Picture("device", lambda folder: (folder / "x.jpg").symlink_to("/dev/zero"), LEFT_OUT, "not a regular file"),
    Picture("socket", a_socket, LEFT_OUT, "not a regular file"),
    Picture("folder named like a photo", a_folder_named_like_a_photo, TAKEN, caption="inside"),
    Picture(
        "colour profile of garbage",
        write("x.jpg", saved(noise(), "JPEG", icc_profile=b"\xff" * 200)),
        TAKEN,
        "its colour profile is damaged",
    ),
    Picture(
        "EXIF of garbage",
        write("x.jpg", saved(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)),
        TAKEN,
    ),
    Picture("EXIF orientation 9", write("x.jpg", with_orientation(9)), TAKEN),
    Picture("EXIF orientation 0", write("x.jpg", with_orientation(0)), TAKEN),
    Picture("name with a newline", write("x\ny.jpg", BROKEN), LEFT_OUT, "truncated", shown=r"x\ny.jpg"),
    Picture(
        "name that steers the terminal", write("x\x1b[2J.jpg", BROKEN), LEFT_OUT, "truncated", shown=r"x\x1b[2J.jpg"
    ),
    Picture(
        "name that reverses the text direction",
        write("x\u202egpj.exe", BROKEN),
        LEFT_OUT,
        "truncated",
        shown=r"x\u202egpj.exe",
    ),
    Picture("name with a newline, good", write("x\ny_1.png", PHOTO), TAKEN, caption="x y"),
    Picture("name with quotes", write("x '\"`$(id)\\ [bold].png", PHOTO), TAKEN, caption="x '\"`$(id)\\ [bold]"),
    Picture("name beyond ASCII", write("x 猫 🐈 é.png", PHOTO), TAKEN, caption="x 猫 🐈 é"),
    Picture("name of 255 bytes", write(TO_LONG[:251] + ".png", PHOTO), TAKEN, caption=TO_LONG[:251].strip()),
    Picture("name that is not UTF-8", write(b"x caf\xe9_1.png", PHOTO), TAKEN, caption="x caf\ufffd"),
    Picture(
        "name that is not UTF-8, broken",
        write(b"x caf\xe9.jpg", BROKEN),
        LEFT_OUT,
        "truncated",
        shown=r"x caf\udce9.jpg",
    ),
    Picture("name like an option", write("-rf.png", PHOTO), TAKEN, caption="-rf"),
    Picture(
        "name without a word", write("_x.png", PHOTO), TAKEN, "it will be trained on with an empty one", caption=""
    ),
    Picture("two names, one safe name", two_of_one_safe_name, TAKEN, caption="x ê"),
]


def sidecar(content: bytes, suffix: str = ".txt") -> Callable[[Path], object]:
    """Return a function that writes a photograph `x.png` and its sidecar."""

    def make(folder: Path) -> None:
        write("x.png", PHOTO)(folder)
        write(f"x{suffix}", content)(folder)

    return make


def with_sidecar(make_sidecar: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        write("x.png", PHOTO)(folder)
        make_sidecar(folder)

    return make


def two_sidecars(folder: Path) -> None:
    sidecar(b"of the text file")(folder)
    sidecar(b"of the caption file", ".caption")(folder)


def caption_table(*lines: bytes | dict) -> Callable[[Path], object]:
    """Return a function that writes a photograph `x.png` and a captions.jsonl of these lines."""
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]

    def make(folder: Path) -> None:
        write("x.png", PHOTO)(folder)
        # outside the folder: a row may name it, but it must not be read
        a_pipe(folder.parent, "outside.png")
        write("captions.jsonl", b"\n".join(rows) + b"\n")(folder)

    return make


GOOD_ROW = {"file_name": "x.png", "text": "good"}
PAGE = "<b>bold</b> & <script>alert(1)</script> [red]x[/red] {0} %s"

CAPTIONS = [
    Picture("no caption", write("x.png", PHOTO), TAKEN, caption="x"),
    Picture("empty caption", sidecar(b""), TAKEN, "is empty", caption="x"),
    Picture("caption of white space", sidecar(b" \r\n\t\xe2\x80\xa8 \n"), TAKEN, "is empty", caption="x"),
    Picture("caption of 100 KB", sidecar(b"word " * 20_000), TAKEN, caption=("word " * 20_000).strip()),
    Picture("caption of one word of 100 KB", sidecar(b"w" * 100_000), TAKEN, caption="w" * 100_000),
    Picture(
        "a log beside the photo",
        sidecar(b"line\n" * 300_000),
        TAKEN,
        "was ignored: 1,500,000 bytes are too many",
        caption="x",
    ),
    Picture("caption that is not UTF-8", sidecar(b"caf\xe9 noir"), TAKEN, "is not UTF-8 (byte 3)", caption="café noir"),
    Picture("caption in UTF-16", sidecar("ein Käfer".encode("utf-16")), TAKEN, caption="ein Käfer"),
    Picture(
        "caption in UTF-16, cut",
        sidecar("ein Käfer".encode("utf-16")[:-1]),
        TAKEN,
        "is not UTF-16",
        caption="ein Käfe\ufffd",
    ),
    Picture("caption with markup", sidecar(PAGE.encode()), TAKEN, caption=PAGE),
    Picture("caption with CRLF", sidecar(b"one\r\ntwo\r\n"), TAKEN, caption="one two"),
    Picture("caption with an escape", sidecar(b"one\x1b[31mtwo"), TAKEN, caption="one [31mtwo"),
    Picture("caption with NUL", sidecar(b"one\0two"), TAKEN, "not text", caption="x"),
    Picture("two sidecars", two_sidecars, TAKEN, caption="of the text file"),
    Picture("sidecar is a folder", with_sidecar(lambda folder: (folder / "x.txt").mkdir()), TAKEN, caption="x"),
    Picture(
        "sidecar is a pipe",
        with_sidecar(lambda folder: a_pipe(folder, "x.txt")),
        TAKEN,
        "x.txt: not a regular file but a device or pipe",
        caption="x",
    ),
    Picture(
        "sidecar is a link to itself",
        with_sidecar(lambda folder: (folder / "x.txt").symlink_to("x.txt")),
        TAKEN,
        "x.txt cannot be read: Too many levels of symbolic links",
        caption="x",
    ),
    Picture(
        "unreadable sidecar",
        sidecar(b"secret"),
        TAKEN,
        "cannot be read: Permission denied",
        caption="x",
        denied=("x.txt",),
    ),
    Picture(
        "row that is not JSON",
        caption_table(b"{not json", GOOD_ROW),
        TAKEN,
        "captions.jsonl:1: it is not JSON",
        caption="good",
    ),
    Picture(
        "row that is a list",
        caption_table(b"[1]", GOOD_ROW),
        TAKEN,
        "captions.jsonl:1: it is a list",
        caption="good",
    ),
    Picture("row without a name", caption_table({"text": "a"}, GOOD_ROW), TAKEN, "has no 'file_name'", caption="good"),
    Picture(
        "row without a text",
        caption_table({"file_name": "x.png"}),
        TAKEN,
        "has neither 'text' nor 'caption'",
        caption="x",
    ),
    Picture(
        "row with a text of numbers",
        caption_table({"file_name": "x.png", "text": [1] * 9999}),
        TAKEN,
        "is neither a string nor",
        caption="x",
    ),
    Picture(
        "row of another photo",
        caption_table({"file_name": "gone.png", "text": "a"}, GOOD_ROW),
        TAKEN,
        "does not exist",
        caption="good",
    ),
    Picture(
        "row a second time",
        caption_table(GOOD_ROW, {**GOOD_ROW, "text": "other"}),
        TAKEN,
        "is a second row",
        caption="good",
    ),
    Picture(
        "row that leads out by ..",
        caption_table({"file_name": "../outside.png", "text": "a"}, GOOD_ROW),
        TAKEN,
        "is outside the table's folder",
        caption="good",
    ),
    Picture(
        "row that leads out and in again",
        caption_table({"file_name": "a/../../outside.png", "text": "a"}, GOOD_ROW),
        TAKEN,
        "is outside the table's folder",
        caption="good",
    ),
    Picture(
        "row that leads out by a root",
        caption_table({"file_name": "/etc/passwd", "text": "a"}, GOOD_ROW),
        TAKEN,
        "is outside the table's folder",
        caption="good",
    ),
    Picture(
        "row nested without end",
        caption_table(b'{"file_name": ' + b"[" * 100_000, GOOD_ROW),
        TAKEN,
        "nested too deeply",
        caption="good",
    ),
    Picture(
        "row of half a surrogate pair",
        caption_table(b'{"file_name": "x.png", "text": "a \\ud83d b"}'),
        TAKEN,
        caption="a \ufffd b",
    ),
    Picture(
        "row of an endless number",
        caption_table(b'{"file_name": "x.png", "text": ' + b"9" * 5000 + b"}", GOOD_ROW),
        TAKEN,
        "captions.jsonl:1: it",
        caption="good",
    ),
    Picture(
        "row of a name that no file can have",
        caption_table({"file_name": "a" * 300, "text": "a"}, GOOD_ROW),
        TAKEN,
        "does not exist",
        caption="good",
    ),
    Picture(
        "row of a name with NUL",
        caption_table({"file_name": "x\0.png", "text": "a"}, GOOD_ROW),
        TAKEN,
        "captions.jsonl:1: it",
        caption="good",
    ),
    Picture(
        "table that is not UTF-8",
        caption_table(b'{"file_name": "x.png", "text": "caf\xe9"}'),
        TAKEN,
        "captions.jsonl is not UTF-8",
        caption="café",
    ),
    Picture(
        "table is a pipe",
        with_sidecar(lambda folder: a_pipe(folder, "captions.jsonl")),
        TAKEN,
        "captions.jsonl: not a regular file but a device or pipe",
        caption="x",
    ),
    Picture(
        "table is a device",
        with_sidecar(lambda folder: (folder / "metadata.jsonl").symlink_to("/dev/zero")),
        TAKEN,
        "metadata.jsonl: a link out of this folder, which is not followed",
        caption="x",
    ),
    Picture("table is a folder", with_sidecar(lambda folder: (folder / "captions.jsonl").mkdir()), TAKEN, caption="x"),
]
