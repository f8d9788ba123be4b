"""Damage to existing datasets, caches and run folders, by accident, by hand or by the disk.

A case gets a folder with `dataset/` (eight photographs and a complete cache), `run/` (a finished run with checkpoints
of steps 1 and 2) and the `run.toml` they were made with.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Damage:
    """One case. make(place): does the damage. words: the command run afterwards; {place} is the folder.

    says: part of a line of its output. check(place): assertions on what the command left. touches: paths below the
    folder that the command may change.
    """

    name: str
    make: Callable[[Path], object]
    words: str
    says: str
    status: int = 2
    check: Callable[[Path], None] = lambda place: None
    touches: tuple[str, ...] = ()


CACHE, RESUME = "cache {place}/run.toml", "train {place}/run.toml --resume"
# the run is finished, so a third step is needed to go on with it. That rewrites the files of its start
LONGER = f"{RESUME} --train.max-steps 3"
STARTS = ("run/",)


def flip(pattern: str, bit: int | None = None) -> Callable[[Path], object]:
    """Return a function that flips one bit, by default in the middle, of the last file that matches a pattern."""

    def make(place: Path) -> None:
        path = sorted(place.glob(pattern))[-1]
        content = bytearray(path.read_bytes())
        position = 4 * len(content) if bit is None else bit
        content[position // 8] ^= 1 << (position % 8)
        path.write_bytes(content)

    return make


def replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(content)


def manifest_line(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Return a function that edits line 2 of the manifest. change: modifies the row, or returns the line to write."""

    def make(place: Path) -> None:
        path = place / "dataset" / "manifest.jsonl"
        lines = path.read_text().split("\n")
        row = json.loads(lines[1])
        line = change(row)
        lines[1] = line if isinstance(line, str) else json.dumps(row)
        path.write_text("\n".join(lines))

    return make


def first_photo(place: Path) -> Path:
    return sorted((place / "dataset" / "images").glob("*.png"))[0]


def edit_photo(place: Path) -> None:
    path = first_photo(place)
    Image.open(path).rotate(180).save(path)


def cut_last_shard(place: Path) -> None:
    path = sorted((place / "dataset" / "cache" / "shards").glob("posterior*"))[-1]
    path.write_bytes(path.read_bytes()[:-1])


def lose_text_shards(place: Path) -> None:
    for path in (place / "dataset" / "cache" / "shards").glob("text*"):
        path.unlink()


def set_format(place: Path) -> None:
    with sqlite3.connect(place / "dataset" / "cache" / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 99")
    index.close()


def cut_index(place: Path) -> None:
    path = place / "dataset" / "cache" / "index.sqlite"
    path.write_bytes(path.read_bytes()[:5000])


def a_file_for_the_cache(place: Path) -> None:
    (place / "dataset" / "cache").rename(place / "old")
    (place / "dataset" / "cache").write_text("a file")


def metrics_garbage(place: Path) -> None:
    path = place / "run" / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'\xff\xfe garbage {"kind"\n' + b"17\n" + b"".join(rest) + b'{"kind": "tr')


def metrics_are_whole(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]


def half_a_checkpoint(place: Path) -> None:
    partial = place / "run" / "checkpoints" / ".step-00000003.partial" / "unet"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{")
    (place / "run" / "checkpoints" / "step-00000003").mkdir()


def a_newer_format(place: Path) -> None:
    path = place / "run" / "checkpoints" / "step-00000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def add_a_photo(place: Path) -> None:
    from safelight.data.prepare.ingest import ingest

    (place / "more").mkdir()
    values = np.random.default_rng(77).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(place / "more" / "more.png")
    ingest([place / "more"], place / "dataset")


def rows_are_sound(place: Path) -> None:
    from safelight.data.shards import Cache
    from tests.data.damaged_rows import damaged_rows

    with Cache(place / "dataset" / "cache") as cache:
        assert damaged_rows(cache) == []


def files_are_json(place: Path) -> None:
    for name in ("split.json", "data.json", "model.json"):
        assert json.loads((place / "run" / name).read_text())


LINE_2 = "manifest.jsonl line 2: "
GO_ON = "resume from step 1, the newest intact one before it: mv "

DAMAGES = [
    Damage("manifest line of garbage", manifest_line(lambda row: "garbage"), CACHE, LINE_2),
    Damage("manifest line that is a list", manifest_line(lambda row: "[]"), CACHE, LINE_2 + "is a list"),
    Damage(
        "manifest line nested without end",
        manifest_line(lambda row: "[" * 100_000),
        CACHE,
        LINE_2 + "it is nested too deeply",
    ),
    Damage(
        "manifest without captions", manifest_line(lambda row: row.update(captions=[])), CACHE, LINE_2 + "captions []"
    ),
    Damage(
        "manifest with a caption of a number",
        manifest_line(lambda row: row.update(captions=[3])),
        CACHE,
        LINE_2 + "'captions' holds 3",
    ),
    Damage(
        "manifest that leads out by ..",
        manifest_line(lambda row: row.update(file="../x.png")),
        CACHE,
        "is not a path inside the dataset folder",
    ),
    Damage(
        "manifest that leads out by a root",
        manifest_line(lambda row: row.update(file="/etc/passwd")),
        CACHE,
        "is not a path inside the dataset folder",
    ),
    Damage(
        "manifest with NUL in a name",
        manifest_line(lambda row: row.update(file="images/\0")),
        CACHE,
        "is not a path inside the dataset folder",
    ),
    Damage(
        "manifest with half a surrogate pair in a name",
        manifest_line(lambda row: row.update(file="images/\ud83d")),
        CACHE,
        "is not a text that UTF-8 can hold",
    ),
    Damage("manifest with a side of 0", manifest_line(lambda row: row.update(width=0)), CACHE, "is not positive"),
    Damage(
        "manifest with an endless side",
        manifest_line(lambda row: row.update(width=10**400)),
        CACHE,
        LINE_2 + "the number 10000000000000000000 is too large",
    ),
    Damage(
        "manifest with a side of 10^18",
        manifest_line(lambda row: row.update(width=10**18)),
        CACHE,
        "is over the limit of 1,000,000 px a side",
    ),
    Damage(
        "manifest with another side",
        manifest_line(lambda row: row.update(width=row["width"] + 8)),
        CACHE,
        "but the manifest says",
    ),
    Damage(
        "manifest with another hash",
        manifest_line(lambda row: row.update(sha256="0" * 64)),
        CACHE,
        "changed since it was prepared",
    ),
    Damage(
        "manifest with a photo twice",
        manifest_line(lambda row: json.dumps(row) + "\n" + json.dumps(row)),
        CACHE,
        "is already listed on line 2",
    ),
    Damage("manifest of nothing", replace("dataset/manifest.jsonl", b""), CACHE, "lists no photos"),
    Damage("manifest of bytes", replace("dataset/manifest.jsonl", bytes(range(256))), CACHE, "manifest.jsonl line 1: "),
    Damage(
        "manifest of garbage, prepared again",
        replace("dataset/manifest.jsonl", b"garbage"),
        "prepare {place}/photos -o {place}/dataset",
        "move the file away and run `safelight prepare` again",
    ),
    Damage(
        "manifest of nothing, prepared again",
        replace("dataset/manifest.jsonl", b""),
        "prepare {place}/photos -o {place}/dataset",
        "photos 8/8",
        0,
        touches=("dataset/",),
    ),
    Damage(
        "photo that is gone",
        lambda place: first_photo(place).unlink(),
        CACHE,
        "cannot be read (No such file or directory); run `safelight prepare`",
    ),
    Damage(
        "photo edited in the dataset", edit_photo, CACHE, "changed since it was prepared; run `safelight prepare` again"
    ),
    Damage("photo with a flipped bit", flip("dataset/images/*.png"), CACHE, "changed since it was prepared"),
    Damage(
        "cache row with a flipped bit",
        flip("dataset/cache/shards/posterior*"),
        CACHE,
        "1 damaged row in the cache re-encoded",
        0,
        rows_are_sound,
        ("dataset/cache",),
    ),
    Damage(
        "cache row with a flipped bit, resumed",
        flip("dataset/cache/shards/text*"),
        RESUME,
        "1 damaged row in the cache re-encoded",
        0,
        rows_are_sound,
        ("dataset/cache",),
    ),
    Damage(
        "cache shard that was cut",
        cut_last_shard,
        CACHE,
        "1 damaged row in the cache re-encoded",
        0,
        rows_are_sound,
        ("dataset/cache",),
    ),
    Damage(
        "cache shards that are gone",
        lose_text_shards,
        CACHE,
        "damaged rows in the cache re-encoded",
        0,
        rows_are_sound,
        ("dataset/cache",),
    ),
    Damage(
        "cache index of garbage",
        replace("dataset/cache/index.sqlite", b"garbage" * 999),
        CACHE,
        "index.sqlite is damaged",
    ),
    Damage("cache index that was cut", cut_index, CACHE, "index"),
    Damage("cache of another format", set_format, CACHE, "has format 99, not 1; delete the cache folder"),
    Damage(
        "cache that is a file",
        a_file_for_the_cache,
        CACHE,
        "cache/shards is not a folder; delete the cache folder",
        touches=("old",),
    ),
    Damage(
        "list of the left out of garbage",
        replace("dataset/rejected.jsonl", b'\xff\n[1]\n{"path": 3, "reason": "\xe2\x80\xa8"}\n'),
        LONGER,
        "resumed at step 2",
        0,
        files_are_json,
        STARTS,
    ),
    Damage("finished run resumed", lambda place: None, RESUME, "is finished, at step 2, and is left as", 0),
    Damage("weights with a flipped bit", flip("run/checkpoints/*/unet/*.safetensors"), RESUME, GO_ON),
    Damage("moments with a flipped bit", flip("run/checkpoints/*/state.safetensors"), RESUME, GO_ON),
    Damage("weights' header with a flipped bit", flip("run/checkpoints/*/unet/*.safetensors", bit=9), RESUME, GO_ON),
    Damage("record with a flipped bit", flip("run/checkpoints/*/state.json"), RESUME, GO_ON),
    Damage("record of garbage", replace("run/checkpoints/step-00000002/state.json", b"\xff garbage"), RESUME, GO_ON),
    Damage("record of a list", replace("run/checkpoints/step-00000002/state.json", b"[1, 2]"), RESUME, GO_ON),
    Damage(
        "record nested without end", replace("run/checkpoints/step-00000002/state.json", b"[" * 100_000), RESUME, GO_ON
    ),
    Damage("record of a newer version", a_newer_format, RESUME, "has format 99, this version reads 1"),
    Damage(
        "drawn from weights with a flipped bit",
        flip("run/checkpoints/*/unet/*.safetensors"),
        "sample {place}/run --prompt x",
        "use --checkpoint 1, the newest intact one",
    ),
    Damage("half a checkpoint beside", half_a_checkpoint, LONGER, "resumed at step 2", 0, touches=STARTS),
    Damage(
        "checkpoint of another model",
        lambda place: None,
        RESUME + " --model.base random:small",
        "/small' in the checkpoint",
    ),
    Damage(
        "checkpoint of another seed",
        lambda place: None,
        RESUME + " --run.seed 5",
        "run.seed is 5, but 6 in the checkpoint",
    ),
    Damage(
        "checkpoint of another batch",
        lambda place: None,
        RESUME + " --train.batch-size 3",
        "train.batch_size cannot change in the middle of an epoch",
    ),
    Damage(
        "checkpoint of other photographs",
        add_a_photo,
        RESUME,
        "was trained on other photographs",
        touches=("dataset/", "more"),
    ),
    Damage(
        "run that is there",
        lambda place: None,
        "train {place}/run.toml",
        "already holds a run (at step 2); add --resume",
    ),
    Damage(
        "metrics with garbage in the middle",
        metrics_garbage,
        LONGER,
        "2 unreadable lines of",
        0,
        metrics_are_whole,
        STARTS,
    ),
    Damage(
        "metrics of bytes", replace("run/metrics.jsonl", bytes(range(256)) * 9), LONGER, "lines of", 0, touches=STARTS
    ),
    Damage(
        "split of garbage", replace("run/split.json", b"\xff{"), LONGER, "resumed at step 2", 0, files_are_json, STARTS
    ),
    Damage(
        "split of garbage, drawn from",
        replace("run/split.json", b"\xff{"),
        "compare {place}/run --num 1",
        "so the held-out captions are unknown; set sample.prompts in",
    ),
    Damage(
        "split of a list, drawn from",
        replace("run/split.json", b"[]"),
        "compare {place}/run --num 1",
        "so the held-out captions are unknown; set sample.prompts in",
    ),
    Damage(
        "best of a record of garbage",
        replace("run/checkpoints/step-00000002/state.json", b"[]"),
        "sample {place}/run --prompt x --checkpoint best",
        "use --checkpoint 1, the newest intact one",
    ),
    Damage(
        "run's config of garbage",
        replace("run/config.toml", b"\xff{"),
        "train {place}/run/config.toml --resume",
        "is not valid TOML",
    ),
    Damage(
        "run's config of garbage, drawn from",
        replace("run/config.toml", b"\xff{"),
        "sample {place}/run --prompt x",
        "is not valid TOML",
    ),
    Damage(
        "lock of a dead process",
        replace("run/.lock", b'{"pid": 1, "host": "gone", "started": "1970", "command": "x"}'),
        RESUME,
        "is finished, at step 2, and is left as",
        0,
        touches=("run/.lock",),
    ),
    Damage(
        "lock of garbage",
        replace("run/.lock", b"\xff" * 99),
        RESUME,
        "is finished, at step 2, and is left as",
        0,
        touches=("run/.lock",),
    ),
]
