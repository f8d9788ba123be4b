"""10,000 damaged inputs of each form that prepare reads: each gives captions or is listed, none crashes or hangs."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from safelight.data.photo import MAX_TAGS, Photo, photo_of_row, row_of_photo
from safelight.data.sources.arrow import ArrowFile, ArrowProcess
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.packed import Packed
from safelight.data.sources.tag_text import split_tags
from safelight.data.sources.tar import Tar
from safelight.errors import UserError
from safelight.text import collapse, storable
from tests.hostile.test_fuzz_prepare import NUM_INPUTS, mutated

pytestmark = pytest.mark.slow
KEYS = "file_name text caption main_prompt tags multiply repeats cond_dropout caption_dropout flip_p loss_scale".split()
KEYS += "shuffle_tags keep_tags batch_id photographer page rating max_caption_length more tag weight".split()
WORDS = ["a.png", "a dog", "a | b:1.5, c", "0.5", "-1", "1e999", "nan", "true", "", " ", "\ud800", "\0", "é", "x" * 300]
TEXTS = [
    ".inf",
    "0x1F",
    "1:30",
    "2001-99-99",
    "!!binary x",
    "&a b",
    "*a",
    "<<",
    "? x",
    "- y",
    "{",
    "[",
    "|",
    ">",
    "# c",
]


VALID = {"text": "a dog | b:1.5, c", "caption": ["a", "b"], "main_prompt": "a dog, big"}
VALID |= {"tags": ["a", {"tag": "b", "weight": 2}]}
VALID |= {"multiply": 2.5, "cond_dropout": 0.1, "flip_p": 0.5, "shuffle_tags": True, "batch_id": "x", "page": "p"}


def any_value(pick: random.Random, depth: int = 0) -> object:
    how = pick.randrange(8 if depth < 3 else 6)
    if how < 3:
        return pick.choice(WORDS)
    if how < 6:
        return pick.choice([None, True, False, 0, 1, 3, -1, 0.5, 1.5, 1e308, 10**18])
    if how == 6:
        return [any_value(pick, depth + 1) for _ in range(pick.randrange(4))]
    return {pick.choice(KEYS): any_value(pick, depth + 1) for _ in range(pick.randrange(4))}


def any_row(pick: random.Random) -> dict:
    """Return a row of which most values are sound."""
    row = {key: any_value(pick) for key in pick.sample(KEYS, pick.randrange(2))}
    row |= {key: VALID[key] for key in pick.sample(list(VALID), pick.randrange(1, 5))}
    return row if pick.random() < 0.2 else {**row, "file_name": "a.png"}


def check(reader: CaptionReader, num_of: Counter) -> None:
    """Read the caption of a.png; check that a manifest can hold it."""
    began = time.monotonic()
    caption = reader.read(reader.root / "a.png")
    assert time.monotonic() - began < 5
    photo = Photo("images/a.png", "0" * 64, 64, 64, caption.texts, "p/a.png", caption.source)
    photo = dataclasses.replace(photo, tags=caption.tags, settings=caption.settings, credit=caption.credit)
    line = json.dumps(row_of_photo(photo))
    assert photo_of_row(json.loads(line)) == photo
    assert all(storable(item.reason) == item.reason for item in reader.rejections)
    num_of["used" if caption.source != "file name" or caption.tags else "plain"] += 1
    num_of["listed"] += bool(reader.rejections)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.png").touch()
    return tmp_path


@pytest.mark.parametrize(
    "name", ["metadata.csv", "a.json", "a.yaml", "local.yaml", "global.yml", "metadata.jsonl", "multiply.txt", "a.txt"]
)
def test_files_of_any_bytes(folder, name):
    pick, num_of = random.Random(name), Counter()
    for _ in range(NUM_INPUTS):
        row = any_row(pick)
        if name.endswith(".csv"):
            cells = [str(value) for value in row.values()]
            content = ",".join(row) + "\n" + ",".join(f'"{cell}"' if pick.random() < 0.7 else cell for cell in cells)
        elif name.endswith(".txt"):
            content = " ".join(pick.choices([*WORDS, "a:1", ",", "|", ":", "2"], k=pick.randrange(1, 9)))
        elif name.endswith((".json", ".jsonl")):
            content = json.dumps(row)
        else:
            lines = [f"{key}: {pick.choice([json.dumps(value)] * 9 + TEXTS)}" for key, value in row.items()]
            content = "\n".join(lines)
        content = content.encode("utf-8", "backslashreplace")
        (folder / name).write_bytes(mutated(content, pick) if pick.random() < 0.7 else content)
        check(CaptionReader(folder), num_of)
    kinds = {"a.txt": ("used", "plain"), "multiply.txt": ("plain", "listed")}.get(name, ("used", "listed"))
    assert min(num_of[kind] for kind in kinds) > NUM_INPUTS // 100, num_of


def test_tags_of_any_text():
    pick = random.Random(1)
    pieces = ["a", "dog", " ", ",", "|", ":", ": ", "1", "1.5", ".5", "-1", "1e9", "9" * 400, "\n", "é", "\0", "\ud800"]
    for _ in range(NUM_INPUTS):
        text = "".join(pick.choices(pieces, k=pick.randrange(1, 20)))
        caption, tags = split_tags(text)
        assert tags or caption == collapse(text)
        assert len(tags) <= MAX_TAGS
        assert all(0 <= tag.weight <= 1000 and storable(tag.name) == tag.name != "" for tag in tags)


def use(packed: Packed) -> int:
    """Return how many members were read."""
    names = [f"{place}/{name}".lstrip("/") for place, (_, files) in packed.folders.items() for name in files]
    num = 0
    for name in names[:50]:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        try:
            num += len(packed.read(name)) >= 0
        except UserError:
            continue
    return num


def test_tars_of_any_bytes(tmp_path):
    pick, num_of = random.Random(2), Counter()
    for number in range(NUM_INPUTS):
        out = io.BytesIO()
        kind = pick.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            for _ in range(3):
                name = pick.choice(["a.png", "a.txt", "b/c.png", "../x", "/x", "é.png", "n" * 150, "./a.png", "b"])
                info = tarfile.TarInfo(name)
                info.type = pick.choice([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE])
                info.linkname = "../../x"
                content = pick.randbytes(pick.choice([0, 3, 600])) if info.isreg() else b""
                info.size = len(content)
                if kind == tarfile.PAX_FORMAT and pick.random() < 0.5:
                    key = pick.choice(["size", "path", "GNU.sparse.map", "GNU.sparse.major", "mtime", "x"])
                    info.pax_headers = {key: pick.choice(["-1", "5", "1,2", "9" * 30, "../x", "x"])}
                tar.addfile(info, io.BytesIO(content))
        content = bytearray(out.getvalue()[:8192])
        for _ in range(pick.choice([0, 1, 1, 2, 4])):
            place = pick.randrange(min(len(content), 3072))
            content[place : place + pick.choice([0, 1, 12])] = pick.choice(
                [b"\x80", b"\xff" * 12, b"7", b"0", b"\0", b"S"]
            )
            if pick.random() < 0.7:
                for start in range(0, len(content) - 511, 512):
                    # make the header's checksum right again, or nothing behind it is looked at
                    header = content[start : start + 512]
                    header[148:156] = b" " * 8
                    if header[257:262] == b"ustar":
                        content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        (tmp_path / "x.tar").write_bytes(content)
        began = time.monotonic()
        try:
            tar_file = Tar(tmp_path / "x.tar")
            num_of["read"] += use(tar_file) > 0
            num_of["listed"] += bool(tar_file.rejections)
        except UserError:
            num_of["refused"] += 1
        assert time.monotonic() - began < 5, number
        assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert min(num_of.values()) > NUM_INPUTS // 100


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_arrow_files_of_any_bytes(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[parquet]'")
    pytest.importorskip("pyarrow.parquet")
    pick, num_of = random.Random(3), Counter()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": pick.randbytes(100), "path": f"{i}.png"} for i in range(12)]
    table = pa.table(
        {
            "image": pa.array(images, kind),
            "text": [f"a dog {i % 3}" for i in range(12)],
            "tags": [["x", "y"]] * 12,
            "repeats": [1.5] * 12,
            "file_name": ["a.png"] * 12,
        }
    )
    path = tmp_path / f"x.{suffix}"
    process = ArrowProcess()
    for number in range(NUM_INPUTS):
        out = io.BytesIO()
        if suffix == "parquet":
            compression = pick.choice(["snappy", "zstd", "none", "gzip"])
            pa.parquet.write_table(table, out, row_group_size=5, compression=compression)
        else:
            options = pa.ipc.IpcWriteOptions(compression=pick.choice([None, None, "zstd", "lz4"]))
            with pa.ipc.new_stream(out, table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=5)
        content = bytearray(out.getvalue())
        for _ in range(pick.choice([0, 1, 1, 2, 4, 8])):
            # most of what matters stands at the end of the one and the start of the other
            near = pick.randrange(min(len(content), 1500))
            place = len(content) - 1 - near if suffix == "parquet" else near
            place = pick.choice([place, place, pick.randrange(len(content))])
            content[place] = pick.choice([0, 1, 127, 128, 255, content[place] ^ 1 << pick.randrange(8)])
        path.write_bytes(content[: pick.choice([None, None, None, pick.randrange(len(content))])])
        began = time.monotonic()
        try:
            # as a new file: the process keeps the last one open
            file = ArrowFile(path, process)
            file.read_pictures()
            num_of["read"] += use(file) > 0
            num_of["listed"] += bool(file.rejections)
        except UserError as error:
            num_of["refused"] += 1
            num_of["crashed"] += "survive" in str(error)
        path = path.rename(tmp_path / f"{number}.{suffix}")
        assert time.monotonic() - began < 20, number
    process.close()
    assert min(num_of["read"], num_of["refused"]) > NUM_INPUTS // 100
