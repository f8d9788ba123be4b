"""10,000 captions, table rows, file names and records of sources each: none crashes or hangs, none is lost unsaid."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from safelight.data.photo import FINGERPRINT_BYTES
from safelight.data.prepare.near_copies import find_near_copies, merge_groups
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.encodings import decode_text
from safelight.data.sources.listing import list_folder
from safelight.data.sources.roots import SourceFile, name_roots, read_sources
from safelight.errors import UserError
from safelight.text import collapse, storable
from tests.data.test_near_copies import photo

NUM_INPUTS = 10_000
WORDS = ("a red barn", "café noir", "кот на крыше", "红色的谷仓", "🐈 naïve", "a\u0301e\u0308", "x" * 300, "\u2028", "")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "shift-jis", "koi8-r")
pytestmark = pytest.mark.slow


def mutated(content: bytes, pick: random.Random) -> bytes:
    """Return the bytes with a few of them changed, inserted or cut off."""
    changed = bytearray(content)
    for _ in range(pick.choice((0, 1, 1, 2, 5))):
        where = pick.randrange(len(changed) + 1)
        how = pick.randrange(4)
        if how == 0:
            changed[where:where] = pick.randbytes(pick.randrange(1, 5))
        elif how == 1 and where < len(changed):
            changed[where] ^= 1 << pick.randrange(8)
        elif how == 2:
            del changed[where:]
        else:
            changed[where : where + 3] = pick.choice(
                (b"\0", b"\xff", b"\x80\x81", b"\xd8\x00", b"[[[[", b'"', b"1e999")
            )
    return bytes(changed)


def test_captions_of_any_bytes():
    pick = random.Random(1)
    for _ in range(NUM_INPUTS):
        text = " ".join(pick.choices(WORDS, k=pick.randrange(1, 6)))
        content = mutated(text.encode(pick.choice(ENCODINGS), errors="replace"), pick)
        began = time.monotonic()
        decoded, note = decode_text(content)
        assert collapse(decoded).encode("utf-8").decode("utf-8") == collapse(decoded)
        assert note.isprintable()
        assert time.monotonic() - began < 1
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        # without a mark, Chinese needs a line end to be told from other encodings
        for text in (*WORDS[:3], WORDS[3] + "\n"):
            assert decode_text(text.encode(encoding))[0].removeprefix("\ufeff") == text, (encoding, text)


def test_table_rows_of_any_bytes(tmp_path):
    pick = random.Random(2)
    for name in ("x.png", "é.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path.parent / "outside.png").write_bytes(b"")
    values = (
        "x.png",
        "É.PNG",
        "../outside.png",
        "/etc/passwd",
        "",
        5,
        None,
        [],
        {},
        ["a", "b"],
        ["a", 1],
        "\ud800",
        "\0",
    )
    for start in range(0, NUM_INPUTS, 500):
        lines = []
        for _ in range(500):
            row = {
                pick.choice(("file_name", "text", "caption", "caption_source")): pick.choice(values) for _ in range(4)
            }
            lines.append(mutated(json.dumps(row).encode(), pick).replace(b"\n", b" "))
        (tmp_path / f"{'captions' if start % 1000 else 'metadata'}.jsonl").write_bytes(b"\n".join(lines))
        reader = CaptionReader(tmp_path)
        for name in ("x.png", "é.png"):
            caption = reader.read(tmp_path / name)
            assert all(storable(text) == text for text in caption.texts)
        assert all(storable(item.reason) == item.reason and item.kind == "row" for item in reader.rejections)


def any_name(pick: random.Random) -> bytes:
    alphabet = (
        "a",
        "A",
        "ß",
        "SS",
        "é",
        "e\u0301",
        "İ",
        "ı",
        "ﬁ",
        "IMG_1",
        ".",
        " ",
        "\n",
        "\x1b[",
        "\u202e",
        "猫",
        "🐈",
    )
    stem = "".join(pick.choices(alphabet, k=pick.randrange(1, 6))).encode()
    if pick.random() < 0.1:
        stem += bytes([pick.randrange(128, 256)])
    suffixes = (
        ".jpg",
        ".JPG",
        ".png",
        ".txt",
        ".TXT",
        ".jpg.txt",
        ".caption",
        ".csv",
        ".jsonl",
        "",
        ".",
        ".jpg.TXT.txt",
        ".tar",
        ".json",
    )
    return (stem + pick.choice(suffixes).encode())[:255].replace(b"..", b"_")


def test_names_of_any_form(tmp_path):
    """Every file of a folder is a picture, a sidecar of one, or listed; a sidecar belongs to pictures of its name."""
    pick = random.Random(3)

    def same(a: str, b: str) -> bool:
        return (
            unicodedata.normalize("NFC", storable(a)).casefold() == unicodedata.normalize("NFC", storable(b)).casefold()
        )

    for number in range(NUM_INPUTS // 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(40):
            name = any_name(pick)
            if name != b".":
                with open(os.path.join(os.fsencode(folder), name), "wb") as file:
                    file.write(b"words")
        listing = list_folder(folder)
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
        claimed = {sidecar for sidecars in listing.sidecars.values() for sidecar in sidecars}
        parts = (listing.pictures, listing.tables, listing.packed, listing.others, listing.unclaimed, claimed)
        assert sum(map(len, parts)) == len(names)
        assert {name for part in parts for name in part} == names
        for picture, sidecars in listing.sidecars.items():
            for sidecar in sidecars:
                base = os.path.splitext(sidecar)[0]
                assert same(base, picture) or same(base, os.path.splitext(picture)[0])
        reader = CaptionReader(folder)
        for picture in listing.pictures:
            # "words" are no JSON
            has_sidecar = any(not name.endswith(".json") for name in listing.sidecars.get(picture, ()))
            assert reader.read(Path(folder, picture)).source.startswith("sidecar") == has_sidecar
            assert listing.find(storable(picture)) in (picture, None)
        shutil.rmtree(folder)


def test_records_of_sources_of_any_bytes(tmp_path):
    pick = random.Random(4)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.png").write_bytes(b"x")
    file = SourceFile(tmp_path / "p" / "0.png", tmp_path / "p", "0.png", CaptionReader(tmp_path / "p"))
    record = json.dumps({"p": str(tmp_path / "p"), "p (2)": "/gone", "": "relative", "\u202e": "\x1b"}).encode()
    num_read = 0
    for _ in range(NUM_INPUTS):
        (tmp_path / "sources.json").write_bytes(mutated(record, pick))
        try:
            folders = read_sources(tmp_path)
        except UserError:
            continue
        num_read += 1
        sources = [
            pick.choice(("p/0.png", "/0.png", "0.png", "q/../../0.png", "\0/\0", "p (2)/0.png")) for _ in range(3)
        ]
        photos = [dataclasses.replace(photo(number), source=s) for number, s in enumerate(sources)]
        names = name_roots([file.root], [file], folders, photos)
        assert "/" not in names[file.root]
    assert num_read > NUM_INPUTS // 10


def test_fingerprints_and_groups_of_any_bytes(tmp_path):
    pick, bits = random.Random(5), np.random.default_rng(5)
    texts = [bits.bytes(FINGERPRINT_BYTES).hex() for _ in range(NUM_INPUTS)]
    texts[::7] = [""] * len(texts[::7])
    texts[::11] = [texts[1]] * len(texts[::11])
    aspects = [pick.choice((1e-6, 1.0, 1.5, 1e6)) for _ in texts]
    assert find_near_copies(texts, aspects, [pick.random() < 0.1 for _ in texts], lambda index: None, tmp_path) == []
    groups = [pick.choice(("", "", "a", "b")) for _ in texts]
    pairs = [(pick.randrange(NUM_INPUTS), pick.randrange(NUM_INPUTS)) for _ in range(3000)]
    merged = merge_groups(groups, [str(number) for number in range(NUM_INPUTS)], pairs)
    assert all(merged[i] == merged[j] for i, j in pairs if i != j)
