"""What `safelight prepare` prints: readable in a narrow and a wide terminal with no, one and many findings."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from safelight.data.photo import Photo
from safelight.data.prepare.collection import IngestSummary
from safelight.data.sources.caption import Rejection
from safelight.output.dataset_table import LEFT_OUT, MAX_LISTED, print_dataset
from safelight.trainer.run_log.terminal import Terminal

NOTE_KINDS = ("link", "file", "removed", "changed", "near-copies", "caption")


def summary(num: int) -> IngestSummary:
    photos = [
        Photo(f"images/{n}.png", f"{n:064x}", 40, 30, ("a dog",), f"photos/{n}.png", "sidecar .txt") for n in range(3)
    ]
    result = IngestSummary(photos, num_of_source={"/a/photos": 2, "/b/photos": 1})
    for number in range(num):
        for kind in LEFT_OUT:
            result.rejected.append(Rejection(f"photos/{kind} {number}.jpg", f"a reason {'with words ' * 9}", kind))
        for kind in NOTE_KINDS:
            result.note(kind, f"photos/{number}.png: {'some words ' * (3 if number else 3000)}")
    result.near_copies = [photos] if num else []
    return result


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("num", [0, 1, 300])
def test_findings_fit_the_terminal(capsys, monkeypatch, columns, num):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *fallback: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal = Terminal()
    terminal.is_live = True
    print_dataset(summary(num), Path("datasets/mine"), terminal)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    # the next command is to be copied in one piece
    assert all(len(line) < columns for line in (*lines, *out.splitlines()[:-1])), max(lines, key=len)
    heads = [line for line in lines if not line.startswith("  ")]
    shown = min(num, MAX_LISTED)
    assert sum(line.startswith("left out ") for line in heads) == shown * len(LEFT_OUT)
    assert sum(line.startswith("note: ") for line in heads) == shown * len(NOTE_KINDS)
    more = [line for line in heads if line.startswith("and ")]
    assert len(heads) == shown * (len(LEFT_OUT) + len(NOTE_KINDS)) + len(more)
    if num == 300:
        assert more[0] == "and 295 more files; all are listed in datasets/mine/rejected.jsonl"
        assert more[2] == "and 295 more other files; all are listed in datasets/mine/rejected.jsonl"
        assert more[-1] == "and 295 more like it; all are in datasets/mine/prepare_notes.txt"
        assert len(lines) <= 60 * (2 if columns > 100 else 3)
    else:
        assert more == []
    assert out.startswith("3 photographs in datasets/mine (")
    assert "sources: 2 from /a/photos, 1 from /b/photos" in out
    assert ("near-copies: 3 photographs show 1 picture; " in out) == bool(num)


def test_elsewhere_each_finding_is_one_whole_line(capsys):
    terminal = Terminal()
    terminal.is_live = False
    print_dataset(summary(1), Path("datasets/mine"), terminal)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(LEFT_OUT) + len(NOTE_KINDS)
    assert max(map(len, lines)) > 30_000


def test_rows_that_are_only_counted_and_countless_kinds_of_captions(capsys):
    result = summary(0)
    result.rejected = [Rejection(f"t:{n}", "bad", "row") for n in range(9)] + [Rejection("t", "more", "row", 1_999_991)]
    result.photos = [replace(result.photos[0], caption_source=f"t: {'x' * 1000}{n}") for n in range(50)]
    print_dataset(result, Path("datasets/mine"), Terminal())
    out, err = capsys.readouterr()
    assert "and 1,999,995 more caption rows; the first 10 are listed in" in err
    assert ", 2,000,000 caption rows)" in out
    line = next(line for line in out.splitlines() if line.startswith("captions: "))
    assert line.endswith(", the rest from 30 other kinds")
    assert len(line) < 7000
