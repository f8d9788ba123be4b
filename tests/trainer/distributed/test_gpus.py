"""`--gpus` of commands: the same files as one process makes, and messages that name the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.trainer.config.toml import parse_config, to_toml
from tests.trainer.distributed import launched_runs, spread_work
from tests.trainer.distributed.test_faults import HOST, LOST, SECONDS, assert_ended
from tests.trainer.distributed.test_spread_work import COMMANDS, OTHERWISE, files_of, rows_of, settings_for

ROOT = Path(__file__).resolve().parents[3]
ON_CPU = "run.device is cpu: 2 processes on the CPU, with "


@pytest.fixture
def caching(tiny_dataset, tmp_path):
    """A function that copies the dataset without its cache and returns (its folder, the file of a run with it)."""

    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path / name
        dataset = shutil.copytree(tiny_dataset, folder / "dataset", ignore=shutil.ignore_patterns("cache"))
        (folder / "run.toml").write_text(to_toml(parse_config(settings_for(folder / "run", dataset), "test")))
        return dataset, folder / "run.toml"

    return make


def by_shell(words: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "safelight", *words], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.long
def test_cache_with_gpus_fills_the_cache_of_one_process(processes, caching, tmp_path):
    one, file = caching("one")
    assert processes(spread_work.run_command, num=1, words=["cache", str(file)], out=str(tmp_path / "out")) == [0]
    two, file = caching("two")
    out = tmp_path / "out-of-two"
    words = ["cache", str(file), "--gpus", "2"]
    assert processes(launched_runs.run_with_gpus, num=1, words=words, out=str(out)) == [0]
    assert rows_of(one) == rows_of(two)
    printed = out.read_text().splitlines()
    assert printed[0].startswith(ON_CPU)
    # by the main process alone
    assert len([line for line in printed if line.startswith(f"{two}: {len(rows_of(two))} rows encoded")]) == 1


@pytest.mark.slow
def test_cache_in_a_shell(caching):
    (one, first), (two, second) = caching("one"), caching("two")
    alone, both = by_shell(["cache", str(first)]), by_shell(["cache", str(second), "--gpus", "2"])
    assert (alone.returncode, both.returncode) == (0, 0), both.stderr
    assert rows_of(one) == rows_of(two)
    assert both.stdout == alone.stdout.replace(str(one.parent), str(two.parent))
    assert both.stderr.startswith(ON_CPU)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_drawing_in_a_shell(processes, tiny_dataset, tmp_path, command):
    trained = tmp_path / "trained"
    processes(spread_work.disturbed_run, num=1, settings=settings_for(trained, tiny_dataset))
    before, made = files_of(trained), []
    for num in (1, 2):
        run = shutil.copytree(trained, tmp_path / str(num) / "run")
        words = [*(word.format(run=run) for word in COMMANDS[command]), *(("--gpus", "2") if num == 2 else ())]
        ended = by_shell(words)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.startswith(ON_CPU) == (num == 2)
        found = {name: content for name, content in files_of(run).items() if before.get(name) != content}
        made.append({name: content for name, content in found.items() if not name.endswith((*OTHERWISE, ".bin"))})
    one, two = made
    assert one
    # the only additional file is the log of the second process
    assert {name: content for name, content in two.items() if not name.startswith("logs/")} == one


@pytest.mark.long
def test_what_ends_another_command_names_it_and_the_same_command_does_the_rest(ranks, caching):
    dataset, file = caching("killed")
    kill = {"once": str(dataset / "cache" / "index.sqlite"), "after_s": 0.2, "rank": 1, "signal": "SIGKILL"}
    answer = ranks(["cache", str(file)], encode_s=1.0, disturb=[kill])
    assert_ended(answer, 1, -9)
    assert answer["seconds"] < SECONDS
    said = f"safelight cache: rank 1 on {HOST} {LOST}; what is done is kept, and the same command does the rest"
    assert said in ranks.lines
    assert ranks(["cache", str(file)])["codes"] == {}
    whole, file = caching("whole")
    assert ranks(["cache", str(file)])["codes"] == {}
    assert rows_of(dataset) == rows_of(whole)


@pytest.mark.long
def test_find_lr_in_several_processes_is_refused_once(ranks):
    assert_ended(ranks([*ranks.words(), "--find-lr"]), 2)
    assert ranks.said() == ["safelight train: --find-lr measures in one process: leave out --gpus, or torchrun"]
    assert not ranks.folder.exists()
