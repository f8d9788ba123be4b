"""The cache's index may come from somebody else: whatever it says, nothing outside the cache is touched, no crash."""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from safelight.data.cache import Cache
from safelight.data.index import INDEX_NAME
from safelight.errors import UserError

TEXT = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
DAMAGED = r"the cache's index .*index\.sqlite is damaged \({}.*\); delete the cache folder$"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A cache of two text rows, beside a file that must not be touched."""
    (tmp_path / "precious").write_text("precious")
    with Cache(tmp_path / "cache") as cache:
        cache.append("text", ["a", "b"], TEXT)
    return tmp_path / "cache"


def change(folder: Path, script: str) -> None:
    with closing(sqlite3.connect(folder / INDEX_NAME, isolation_level=None)) as index:
        index.executescript(script)


def use(folder: Path) -> None:
    """Do everything that is done with a cache."""
    with Cache(folder) as cache:
        cache.seen_photos(["images/a.jpg", "images/x.jpg"])
        cache.drop_damaged(["a", "b"], "text", (1, 2))
        cache.note_photos({"images/x.jpg": ("0", 1, 2)})
        present = [key for key in ("a", "b") if key not in cache.missing(["a", "b"])]
        if present:
            cache.read(present)
        cache.append("text", ["a", "b", "c"], np.ones((3, 1, 2)))
        cache.read(["a", "b", "c"])


def assert_nothing_outside(folder: Path) -> None:
    assert sorted(os.listdir(folder.parent)) == ["cache", "precious"]
    assert (folder.parent / "precious").read_text() == "precious"


WRONG_VALUES = {
    "file outside": (
        "UPDATE shards SET file = '../../precious'",
        r"it names the file '\.\./\.\./precious' in place of",
    ),
    "absolute file": ("UPDATE shards SET file = '/etc/passwd'", "it names the file '/etc/passwd'"),
    "file that is bytes": ("UPDATE shards SET file = x'00ff'", "it names the file b"),
    "number of another shard": (
        "UPDATE shards SET file = 'text-1x2-float16-0001.bin'",
        "in place of text-1x2-float16-0000",
    ),
    "token ids that are floats": ("UPDATE shards SET kind = 'tokens'", r"rows of kind tokens are never float"),
    "kind": ("UPDATE shards SET kind = '..'", r"kind '\.\.' is none of posterior, latent, text"),
    "dtype of pointers": ("UPDATE shards SET dtype = 'object'", "dtype 'object' is none of float16, float32"),
    "dtype that is bytes": ("UPDATE shards SET dtype = x'4f'", "dtype b'O' is none of"),
    "empty shape": ("UPDATE shards SET shape = ''", "'' is not the shape of a row"),
    "negative shape": ("UPDATE shards SET shape = '-1x2'", "'-1x2' is not the shape"),
    "shape of digits of another script": ("UPDATE shards SET shape = '١x٢'", "is not the shape"),
    "shape that is a number": ("UPDATE shards SET shape = x'31'", "b'1' is not the shape"),
    "shape of 10^18": ("UPDATE shards SET shape = '999999999x999999999'", "are larger than a shard"),
    "many dimensions": ("UPDATE shards SET shape = '1x1x1x1x2'", "is not the shape"),
    "negative rows of a shard": ("UPDATE shards SET num_rows = -1", "cannot hold -1 rows"),
    "too many rows of a shard": ("UPDATE shards SET num_rows = 9223372036854775807", "cannot hold 922337203"),
    "rows of a shard that are text": ("UPDATE shards SET num_rows = 'x'", "cannot hold 'x' rows"),
    "fewer rows than there are": (
        "UPDATE shards SET num_rows = 0; DELETE FROM rows WHERE row = 1",
        "UNIQUE constraint",
    ),
    "negative row": ("UPDATE rows SET row = -1 WHERE key = 'a'", "row a is at -1 of shard 1"),
    "huge row": ("UPDATE rows SET row = 9223372036854775807 WHERE key = 'a'", "row a is at 9223372036854775807"),
    "row that is text": ("UPDATE rows SET row = 'x' WHERE key = 'a'", "row a is at 'x'"),
    "row that is a fraction": ("UPDATE rows SET row = 0.5 WHERE key = 'a'", "row a is at 0.5"),
    "negative checksum": ("UPDATE rows SET crc32 = -1 WHERE key = 'a'", "row a is at 0 of shard 1, checksum -1"),
    "checksum that is bytes": ("UPDATE rows SET crc32 = x'00' WHERE key = 'a'", r"checksum b'\\x00'"),
    "shard that does not exist": ("UPDATE rows SET shard = 7 WHERE key = 'a'", "row a is at 0 of shard 7"),
    "shard that is bytes": ("UPDATE rows SET shard = x'07' WHERE key = 'a'", "of shard b"),
    "text that is not UTF-8": ("UPDATE shards SET kind = CAST(x'ff' AS TEXT)", "Could not decode to UTF-8"),
    "a megabyte of text": ("UPDATE shards SET kind = printf('%1000000d', 1)", "string or blob too big"),
}
OTHER_TABLES = {
    "view": "CREATE VIEW sizes AS SELECT 1",
    "trigger": "CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM photos; END",
    "index": "CREATE INDEX i ON rows (crc32)",
    "virtual table": "CREATE VIRTUAL TABLE v USING fts5 (x)",
    "table": "CREATE TABLE more (x)",
    "column": "ALTER TABLE rows ADD COLUMN more",
    "generated column": "ALTER TABLE photos ADD COLUMN more AS (length(file))",
    "view in place of a table": "DROP TABLE photos; CREATE VIEW photos AS SELECT 1 file, 1 sha256, 1 size, 1 mtime_ns",
    "looser column": "DROP TABLE photos; CREATE TABLE photos (file, sha256, size, mtime_ns)",
    "statistics": "ANALYZE",
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_every_wrong_value_is_damage(folder, name):
    statement, reason = WRONG_VALUES[name]
    change(folder, statement)
    with pytest.raises(UserError, match=DAMAGED.format(".*" + reason)):
        use(folder)
    assert_nothing_outside(folder)


@pytest.mark.parametrize("name", OTHER_TABLES)
def test_tables_that_are_not_ours_are_damage(folder, name):
    change(folder, OTHER_TABLES[name])
    with pytest.raises(UserError, match=DAMAGED.format("its tables are not those of a cache")):
        use(folder)


def test_tables_that_an_older_version_lacks_are_made(folder):
    change(folder, "DROP TABLE photos")
    use(folder)
    with Cache(folder) as cache:
        assert cache.seen_photos(["images/x.jpg"]) == {"images/x.jpg": ("0", 1, 2)}


def test_a_page_in_two_places_is_damage(folder):
    """SQLite's own check finds what makes it write where it should not."""
    change(folder, "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 2 WHERE name = 'rows'")
    with pytest.raises(UserError, match=DAMAGED.format("")):
        use(folder)


# an entry of what finds rows by their place, as SQLite stores it: types of (shard 1, row 0 or 1, text of one letter)
PLACE_OF_B = b"\x04\x09\x09\x0fb"
OUT_OF_STEP = {"two rows at one place": b"\x04\x09\x08\x0fb", "place of no row": b"\x04\x09\x09\x0fc"}


def put_out_of_step(folder: Path, name: str) -> None:
    path = folder / INDEX_NAME
    content = path.read_bytes()
    assert content.count(PLACE_OF_B) == 1
    content = content.replace(PLACE_OF_B, OUT_OF_STEP[name])
    # counts the changes, so that who has it open reads it again
    path.write_bytes(content[:24] + struct.pack(">I", 999) + content[28:])


@pytest.mark.parametrize("name", OUT_OF_STEP)
def test_rows_that_disagree_with_their_places_are_damage(folder, name):
    put_out_of_step(folder, name)
    with Cache(folder) as cache, pytest.raises(UserError, match=DAMAGED.format("")):
        list(cache.addresses())


def test_rows_that_come_to_disagree_with_their_places_are_damage(folder):
    with Cache(folder) as cache:
        put_out_of_step(folder, "two rows at one place")
        with pytest.raises(UserError, match=DAMAGED.format("its rows of text-1x2-float16-0000.bin are not in order")):
            [list(cache._index.rows_of(shard)) for shard in cache._index.shards()]


def leave_journal(folder: Path, tail: bytes = b"") -> None:
    """Leave a half-written index with its journal, as a killed process does."""
    path, journal = folder / INDEX_NAME, folder / f"{INDEX_NAME}-journal"
    with closing(sqlite3.connect(path, isolation_level=None)) as index:
        # pages are written before the commit
        index.execute("PRAGMA cache_size = 1")
        index.execute("BEGIN IMMEDIATE")
        index.execute("DELETE FROM rows")
        index.executemany("INSERT INTO photos VALUES (?, '', 1, 1)", [(f"{i:0900d}",) for i in range(99)])
        half, content = path.read_bytes(), journal.read_bytes()
        index.execute("ROLLBACK")
    path.write_bytes(half)
    journal.write_bytes(content + tail)


def test_the_journal_of_a_killed_process_is_rolled_back(folder):
    leave_journal(folder)
    with Cache(folder) as cache:
        assert cache.read(["a", "b"]).tolist() == TEXT.tolist()
        assert cache.seen_photos([f"{0:0900d}"]) == {}


def test_a_planted_journal_deletes_no_file(folder):
    """A journal may name a super-journal, which SQLite deletes after rolling back."""
    name = os.fsencode(folder.parent / "precious")
    length_and_sum = struct.pack(">II", len(name), sum(name))
    tail = struct.pack(">I", 2**30 // 4096 + 1) + name + length_and_sum + bytes.fromhex("d9d505f920a163d7")
    leave_journal(folder, tail)
    with pytest.raises(UserError, match=DAMAGED.format("its journal names another file to delete")):
        use(folder)
    assert_nothing_outside(folder)


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_link_inside(path: Path) -> None:
    path.rename(path.with_name("elsewhere")) if path.exists() else path.with_name("elsewhere").touch()
    path.symlink_to("elsewhere")


def journal_header(num_records: int, num_pages: int, sector: int = 512, page: int = 4096) -> bytes:
    return bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", num_records, 0, num_pages, sector, page)


@pytest.mark.parametrize(
    "header",
    [
        journal_header(0, 0x7FFFFFF0),
        journal_header(0xFFFFFFFF, 0x7FFFFFF0),
        journal_header(0, 1000),
        journal_header(1, 1),
        journal_header(0, 1, page=0),
        journal_header(0, 1, page=4097),
        journal_header(0, 1, page=2**17),
        journal_header(0, 1, sector=16),
        journal_header(0, 1, sector=2**17),
        b"\xd9" + journal_header(0, 1)[1:20],
        b"\xd8" + journal_header(0, 1)[1:],
    ],
    ids=bytes.hex,
)
def test_a_planted_journal_does_not_change_the_size_of_the_index(folder, header):
    """SQLite makes the file as large as the journal's header says that it was."""
    content = (folder / INDEX_NAME).read_bytes()
    (folder / f"{INDEX_NAME}-journal").write_bytes(header.ljust(600, b"\0"))
    with pytest.raises(UserError, match=DAMAGED.format("its journal .*")):
        use(folder)
    assert (folder / INDEX_NAME).read_bytes() == content


@pytest.mark.parametrize("name", [INDEX_NAME, f"{INDEX_NAME}-journal", f"{INDEX_NAME}-wal", f"{INDEX_NAME}-shm"])
@pytest.mark.parametrize("make", [make_pipe, make_link_inside])
def test_files_of_sqlite_that_are_links_or_pipes_are_refused(folder, name, make: Callable[[Path], None]):
    make(folder / name)
    with pytest.raises(UserError, match=DAMAGED.format("")):
        use(folder)


@pytest.mark.parametrize("name", [INDEX_NAME, f"{INDEX_NAME}-journal", "shards", "shards/text-1x2-float16-0000.bin"])
def test_links_that_lead_out_of_the_cache_are_refused(folder, name):
    (folder.parent / "home").mkdir()
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(folder.parent / "home" / "x")
    with pytest.raises(UserError, match=r"is a link to .*home/x, outside"):
        use(folder)
    assert not list((folder.parent / "home").iterdir())


@pytest.mark.parametrize("make", [make_pipe, make_link_inside])
def test_shards_that_are_links_or_pipes_are_neither_read_nor_written(folder, make: Callable[[Path], None]):
    make(folder / "shards" / "text-1x2-float16-0000.bin")
    with Cache(folder) as cache, pytest.raises(UserError, match=r"the cache is damaged: .*; delete the cache folder"):
        cache.read(["a"])
    with Cache(folder) as cache, pytest.raises(UserError, match=r"0000\.bin is"):
        cache.append("text", ["c"], TEXT[:1])


def test_rows_of_another_form_are_damaged(folder):
    """Rows may be sound and still not be what the encoder gives: training on them would end in a traceback."""
    for kind, shape, dtype in (("latent", (1, 2), "float16"), ("text", (2, 2), "float16"), ("text", (1, 2), "float32")):
        with Cache(folder, dtype) as cache:
            bad = cache.drop_damaged(["a"], kind, shape)
            assert [str(error).split("; ")[0] for error in bad] == [
                f"cache row a in shards/text-1x2-float16-0000.bin is not {kind} {'x'.join(map(str, shape))} {dtype}"
            ]
            cache.append("text", ["a"], TEXT[:1].astype(np.float16))
    with Cache(folder, "float16") as cache:
        cache.drop_damaged(["a"], "text", (1, 2))
        cache.append("text", ["a"], TEXT[:1])
        assert cache.drop_damaged(["a", "b"], "text", (1, 2)) == []


def test_a_shard_that_is_cut_while_it_is_read_is_a_damaged_row(folder):
    """Through a memory map it would be SIGBUS, which kills the process without a word."""
    with Cache(folder) as cache:
        assert cache.read(["a", "b"]).tolist() == TEXT.tolist()
        os.truncate(folder / "shards" / "text-1x2-float16-0000.bin", 3)
        for key in ("a", "b"):
            with pytest.raises(UserError, match=r"0000\.bin is past the end of its file; `safelight cache` or"):
                cache.read([key])
        assert len(cache.drop_damaged(["a", "b"], "text", (1, 2))) == 2
        cache.append("text", ["a", "b"], TEXT)
        assert cache.read(["a", "b"]).tolist() == TEXT.tolist()


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("safelight.data.shards.MAX_OPEN_SHARDS", 2)
    with Cache(tmp_path / "cache", "float32") as cache:
        for width in range(1, 8):
            cache.append("text", [str(width)], np.full((1, width), width))
        for width in (*range(1, 8), *range(7, 0, -1)):
            assert cache.read([str(width)]).tolist() == [[width] * width]
            assert len(cache._files) <= 2
        # a row is appended to a shard that is open
        cache.append("text", ["more"], np.full((1, 1), 9.0))
        assert cache.read(["1", "more"]).tolist() == [[1], [9]]
