"""Damages a cache or a manifest at random and uses it: python fuzz.py TARGET FOLDER SEED NUM.

Prints what came of the inputs. Ends with a traceback at the first input that ends otherwise than well or in a
UserError, that takes longer than 20 s, more than 4 GiB, or touches a file outside the folder. The input's seed is
printed before.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from safelight.data.buckets import make_buckets
from safelight.data.cache import Cache, decode_photo
from safelight.data.index import INDEX_NAME, KINDS
from safelight.data.manifest import read_manifest, split_validation
from safelight.data.placement import place_photos
from safelight.data.samples import plan_samples
from safelight.errors import UserError

MAX_BYTES = 4 * 2**30
MAX_SECONDS = 20
KEYS = [f"{i:064x}" for i in range(12)]
TEXT = np.arange(12 * 6, dtype=np.float32).reshape(12, 2, 3)
NAMES = [INDEX_NAME, *(f"{INDEX_NAME}{end}" for end in ("-journal", "-wal", "-shm")), "shards", "shards/a.bin"]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Return bytes with a few places changed, cut out, repeated or inserted."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16, 64])):
        place, length = chance.randrange(len(changed) + 1), chance.choice([1, 1, 2, 4, 8, 100, 4096])
        how = chance.randrange(6)
        if how <= 2 and place < len(changed):
            # most fields of SQLite's format that matter are single bytes
            changed[place] = chance.choice([0, 1, 2, 127, 128, 255, changed[place] ^ 1 << chance.randrange(8)])
        elif how == 3:
            changed[place : place + length] = chance.randbytes(length)
        elif how == 4:
            source = chance.randrange(len(changed) + 1)
            changed[place : place + length] = changed[source : source + length]
        elif chance.random() < 0.2:
            del changed[place : place + length]
    return bytes(changed)


def any_value(chance: random.Random) -> object:
    return chance.choice(
        [
            None,
            chance.randrange(-3, 20),
            chance.choice([-(2**63), 2**63 - 1, 2**32, 2**31]),
            chance.choice([0.5, -1.0, 1e300, float("inf")]),
            chance.choice(["", "x", "../../precious", "/etc/passwd", "text", "latent", "float16", "float32", "object"]),
            chance.choice(
                ["2x3", "3", "0x3", "99999x99999", "1x1x1x1x1x1x1", "-1", "2x", "\ud83d".encode("utf-8", "replace")]
            ),
            f"text-2x3-float16-{chance.randrange(3):04d}.bin",
            chance.choice(KEYS),
            chance.randbytes(chance.randrange(40)),
            "y" * chance.choice([100, 10_000, 100_000]),
        ]
    )


def change_values(path: Path, chance: random.Random) -> None:
    """Change rows and tables by SQL, within what SQLite itself allows or beyond."""
    with closing(sqlite3.connect(path, isolation_level=None)) as index:
        index.execute("PRAGMA synchronous = OFF")
        columns = {
            "shards": ("id", "file", "kind", "shape", "dtype", "num_rows"),
            "rows": ("key", "shard", "row", "crc32"),
            "photos": ("file", "sha256", "size", "mtime_ns"),
        }
        for _ in range(chance.randrange(1, 5)):
            table = chance.choice(list(columns))
            column = chance.choice(columns[table])
            schema_column = chance.choice(["type", "name", "tbl_name", "rootpage", "sql"])
            marks = ",".join("?" * len(columns[table]))
            definition = chance.choice(
                [
                    f"{table} (a)",
                    f"{table} ({', '.join(columns[table])})",
                    "more (x)",
                    f"v{table} AS SELECT * FROM {table}",
                ]
            )
            statement, values = chance.choice(
                [
                    (f"UPDATE {table} SET {column} = ?", [any_value(chance)]),
                    (f"UPDATE {table} SET {column} = ? WHERE rowid % 3 = 1", [any_value(chance)]),
                    (
                        f"UPDATE rows SET {chance.choice(columns['rows'])} = ? WHERE row = ?",
                        [any_value(chance), chance.randrange(12)],
                    ),
                    (f"INSERT OR REPLACE INTO {table} VALUES ({marks})", [any_value(chance) for _ in columns[table]]),
                    (f"DELETE FROM {table} WHERE abs(random()) % 2", []),
                    (f"DROP TABLE {table}", []),
                    (f"CREATE {chance.choice(['TABLE', 'VIEW', 'UNIQUE INDEX'])} {definition}", []),
                    (f"ALTER TABLE {table} ADD COLUMN more {chance.choice(['', 'AS (1)', 'DEFAULT 1'])}", []),
                    (f"CREATE TRIGGER t AFTER INSERT ON {table} BEGIN DELETE FROM rows; END", []),
                    (f"PRAGMA user_version = {chance.choice([0, 1, 2, -1])}", []),
                    (f"PRAGMA journal_mode = {chance.choice(['WAL', 'PERSIST', 'TRUNCATE'])}", []),
                    ("PRAGMA writable_schema = ON", []),
                    (f"UPDATE sqlite_master SET {schema_column} = ?", [any_value(chance)]),
                    ("UPDATE sqlite_master SET rootpage = ? WHERE name = ?", [chance.randrange(-1, 12), table]),
                    ("UPDATE sqlite_master SET sql = ? WHERE name = ?", [f"CREATE TABLE {definition}", table]),
                    ("VACUUM", []),
                ]
            )
            with suppress(sqlite3.Error, OverflowError):
                index.execute(statement, values)


def plant(folder: Path, chance: random.Random) -> None:
    """Put something else in the place of one of the cache's files."""
    shard = next((folder / "shards").iterdir()).name
    path = folder / chance.choice([*NAMES, f"shards/{shard}"])
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    how = chance.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(chance.choice([folder.parent / "precious", "/dev/zero", "/etc/passwd", folder.parent / "new"]))
    elif how == 3:
        path.symlink_to(chance.choice([INDEX_NAME, ".", "nothing", path.name]))
    elif how == 4:
        magic = bytes.fromhex("d9d505f920a163d7")
        parts = [
            magic,
            chance.randbytes(20),
            chance.randbytes(700),
            os.fsencode(folder.parent / "precious"),
            bytes(512),
        ]
        path.write_bytes(b"".join(chance.choices(parts, k=chance.randrange(5))))
    else:
        with open(path, "wb") as file:
            file.truncate(chance.choice([0, 1, 2**31, 2**40]))


def use_cache(folder: Path) -> None:
    with Cache(folder) as cache:
        len(cache)
        cache.seen_photos(["images/a.jpg", "images/x.jpg"])
        cache.drop_damaged(KEYS, "text", (2, 3))
        cache.note_photos({"images/a.jpg": ("0" * 64, 1, 2)})
        present = [key for key in KEYS if key not in cache.missing(KEYS)]
        if present:
            rows = cache.read(present)
            assert rows.shape == (len(present), 2, 3)
        cache.append("text", KEYS, TEXT)
        assert cache.read(KEYS).shape == (12, 2, 3)
        cache.kind_of(KEYS[0]) in KINDS  # noqa: B015


def damage_index(work: Path, chance: random.Random) -> None:
    path = work / "cache" / INDEX_NAME
    how = chance.randrange(10)
    if how < 5:
        path.write_bytes(flipped(path.read_bytes(), chance))
    elif how < 9:
        change_values(path, chance)
        if chance.random() < 0.2:
            path.write_bytes(flipped(path.read_bytes(), chance))
    else:
        plant(work / "cache", chance)
    use_cache(work / "cache")


def damage_shard(work: Path, chance: random.Random) -> None:
    (path,) = (work / "cache" / "shards").iterdir()
    if chance.random() < 0.8:
        path.write_bytes(flipped(path.read_bytes(), chance)[: chance.choice([None, None, 0, 1, 70])])
        with Cache(work / "cache") as cache:
            bad = {error.key for error in cache.drop_damaged(KEYS, "text", (2, 3))}
            for i, key in enumerate(KEYS):
                assert key in bad or np.array_equal(cache.read([key])[0], TEXT[i]), key
            cache.append("text", KEYS, TEXT)
            # cut while it is open
            os.truncate(path, chance.randrange(path.stat().st_size + 1))
            for key in KEYS:
                with suppress(UserError):
                    cache.read([key])
    else:
        plant(work / "cache", chance)
    use_cache(work / "cache")


def any_json(chance: random.Random, depth: int = 0) -> object:
    how = chance.randrange(9 if depth < 3 else 7)
    if how < 4:
        return chance.choice(
            [None, True, 0, 1, -1, 64, 96, 10**6, 10**18, 10**30, 0.5, 1e308, float("inf"), float("nan"), -(10**400)]
        )
    if how < 7:
        texts = ["", ".", "..", "images", "../x", "/etc/passwd", "images/\0", "\ud83d", "\x1b[2J", "a/" * 3000 + "b"]
        return chance.choice([*texts, "images/0.png", "f" * 64, "0" * 64, "x" * chance.choice([10, 300, 100_000])])
    if how == 7:
        return [any_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {str(any_json(chance, 9))[:50]: any_json(chance, depth + 1) for _ in range(chance.randrange(4))}


def damage_manifest(work: Path, chance: random.Random) -> None:
    path = work / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")
    if chance.random() < 0.7:
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(lines) - 1)
            row = json.loads((work.parent / "manifest.jsonl").read_bytes().split(b"\n")[place])
            for name in chance.sample([*row, "more"], chance.randrange(1, 3)):
                row[name] = any_json(chance)
                if chance.random() < 0.1:
                    del row[name]
            lines[place] = json.dumps(row).encode()
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(flipped(path.read_bytes(), chance))
    photos = read_manifest(work)
    for photo in photos:
        assert (work / photo.file).resolve().is_relative_to(work.resolve())
    train, held_out = split_validation(photos, 0.3, 1)
    settings = {"variants": 2, "crop_jitter": 0.2, "flip_p": 0.5, "seed": 7, "dtype": "float16"}
    fingerprints = {"vae_fingerprint": "v", "text_fingerprint": "t"}
    assert len(plan_samples(place_photos([*train, *held_out], make_buckets(64, 8)), **settings, **fingerprints)) == len(
        photos
    )
    for photo in photos:
        with suppress(UserError):
            decode_photo(work, photo)


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    "index": damage_index,
    "shard": damage_shard,
    "manifest": damage_manifest,
}


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def main(target: str, folder: Path, first: int, num: int) -> None:
    """The folder holds `good`, the undamaged input, and files that must not change."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    before, ends = state_of(folder), Counter()
    for seed in range(first, first + num):
        print(target, seed, file=sys.stderr, flush=True)
        shutil.copytree(folder / "good", folder / "work")
        signal.alarm(MAX_SECONDS)
        try:
            TARGETS[target](folder / "work", random.Random(f"{target} {seed}"))
            ends["well"] += 1
        except UserError as error:
            ends[type(error).__name__] += 1
        signal.alarm(0)
        assert state_of(folder) == before
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["good", "work"]
        shutil.rmtree(folder / "work")
    print(json.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
