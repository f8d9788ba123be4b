"""metrics.jsonl when a run is resumed: damaged lines are dropped, links and pipes are not opened, times never jump."""

import json
import math
import os
import random
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from safelight.errors import UserError
from safelight.trainer.run_log.doubts import read_course
from safelight.trainer.run_log.metrics import Metrics, peak_memory_gib
from tests.trainer.damaged_text import replaced

LINES = [
    {"kind": "validation", "step": 0, "epoch": 0.0, "split": "held_out", "loss": 0.3, "loss_by_timestep": [0.1, 0.5]},
    {"kind": "event", "step": 0, "event": "best so far", "detail": "held-out loss 0.3", "time": 1.0},
    {"kind": "train", "step": 1, "epoch": 0.5, "stage": 0, "loss": float("nan"), "lr": 1e-6, "time": 2.0},
    {"kind": "train", "step": 2, "epoch": 1.0, "stage": 0, "loss": 0.5, "lr": 1e-6, "time": 3.0},
]


def try_lines(folder: Path, num: int, seed: int) -> None:
    """Replace a value of some lines, num lines in all, and open the log as a resumed run does."""
    rng, num_tried = random.Random(seed), 0
    while num_tried < num:
        damaged = [replaced(json.dumps(rng.choice(LINES)), rng) for _ in range(25)]
        num_tried += len(damaged)
        (folder / "metrics.jsonl").write_bytes(b"\n".join(damaged))
        metrics = Metrics(folder, 2)
        metrics.write("train", 3, loss=0.5)
        metrics.close()
        *_, last = (folder / "metrics.jsonl").read_bytes().splitlines()
        assert json.loads(last)["step"] == 3


def test_absurd_lines_are_dropped_or_kept(tmp_path):
    try_lines(tmp_path, 500, 1)


@pytest.mark.slow
def test_ten_thousand_absurd_lines(tmp_path):
    try_lines(tmp_path, 10_000, 2)


def test_a_line_of_many_values_or_bytes_is_dropped_without_being_parsed(tmp_path):
    sound = [json.dumps(line).encode() for line in LINES]
    bands = b'{"kind":"train","step":1,"loss_by_timestep":[' + b"[]," * 10**7 + b"0]}"
    many = b'{"kind":"train","step":1,"loss_by_timestep":[' + b"[]," * 10**4 + b"0]}"
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([sound[0], bands, sound[1], many, *sound[2:], b'{"kind": "tr']))
    tracemalloc.start()
    metrics = Metrics(tmp_path, 2)
    metrics.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    assert metrics.num_unreadable == 2
    assert metrics.held_out == {0: 0.3}
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(sound) + b"\n"


def test_the_lines_of_a_long_log_are_not_held_in_memory(tmp_path):
    content = b'{"kind":"x","step":0}\n' * 20_000
    (tmp_path / "metrics.jsonl").write_bytes(content)
    tracemalloc.start()
    Metrics(tmp_path, 2).close()
    read_course(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_log_over_its_limit_is_refused_and_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    os.truncate(path, 2**28 + 1)
    with pytest.raises(UserError, match="over the limit of 268,435,456"):
        Metrics(tmp_path, 2)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert path.stat().st_size == 2**28 + 1


def test_a_log_that_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "precious").write_text("")
    for make in (
        lambda path: path.symlink_to(tmp_path / "new"),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/dev/zero"),
    ):
        folder = tmp_path / "run"
        folder.mkdir()
        make(folder / "metrics.jsonl")
        with pytest.raises(UserError):
            Metrics(folder, 0)
        folder.rename(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
    assert not (tmp_path / "new").exists()


def test_times_do_not_jump_with_the_wall_clock(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 0)
    metrics.write("train", 1, loss=0.5)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3000 * 86_400)
    metrics.write("train", 2, loss=0.5)
    metrics.close()
    first, second = (json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 <= second - first < 60
    assert abs(first - real()) < 60


def test_a_system_that_does_not_tell_the_peak_gives_nan(monkeypatch):
    assert 0 < peak_memory_gib(torch.device("cpu")) < 1000
    # as on Windows
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(peak_memory_gib(torch.device("cpu")))
