"""The long kill tests: kill -9 at random moments, 20 of caching, 50 of training, 6 of a grid; nothing is lost.

The moments are random times rather than chosen points, so they also hit loading.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.data.shards import Cache
from safelight.trainer.checkpoint.files import check_files, folder_of, list_checkpoints
from safelight.trainer.report.grid_record import Grid
from tests.data.damaged_rows import damaged_rows
from tests.trainer.equal_runs import assert_equal_runs
from tests.trainer.inference.exported_runs import make_run

pytestmark = pytest.mark.slow

NUM_CACHE_KILLS, NUM_TRAINING_KILLS, NUM_GRID_KILLS = 20, 50, 6


def toml(folder: Path, dataset: Path) -> Path:
    path = folder.with_suffix(".toml")
    path.write_text(
        f'[run]\ndir = "{folder}"\nseed = 9\ndevice = "cpu"\n[data]\npath = "{dataset}"\nresolution = 64\n'
        "variants = 24\ncrop_jitter = 0.3\nflip_p = 0.5\n[train]\nbatch_size = 2\nmax_steps = 40\n"
        "[[stage]]\nepochs = 2\n[[stage]]\nepochs = 2\nlr = 2e-5\n"
        "[sample]\nsteps = 2\nnum_prompts = 2\nevery_epochs = 1\n[validate]\ntimesteps = 2\n"
        "[save]\nevery_steps = 3\n[log]\nevery_steps = 2\ntensorboard = false\n"
    )
    return path


def rows_of(dataset: Path) -> dict[str, bytes]:
    """Return every row of a dataset's cache by its key."""
    with Cache(dataset / "cache") as cache:
        assert damaged_rows(cache) == []
        keys = [address.key for address in cache.addresses()]
        return {key: cache.read([key])[0].tobytes() for key in keys}


def test_twenty_moments_of_caching(run, tiny_dataset, tmp_path):
    datasets = [shutil.copytree(tiny_dataset, tmp_path / name, ignore=shutil.ignore_patterns("cache")) for name in "ab"]
    alone, killed = (["cache", str(toml(tmp_path / f"run-{path.name}", path))] for path in datasets)
    log = str(tmp_path / "log")
    began = time.monotonic()
    assert run(words=alone, log=log) == 0
    lasts_s = time.monotonic() - began
    expected = rows_of(datasets[0])
    rng = random.Random("moments of caching")
    num_killed, num_before, num_ends = 0, 0, 0
    while num_killed < NUM_CACHE_KILLS:
        code = run(words=killed, log=log, kill_after_s=rng.uniform(0, 0.8 * lasts_s))
        assert code in (0, -signal.SIGKILL)
        num_killed += code != 0
        rows = rows_of(datasets[1])
        # what is there is right, and never less than before
        assert len(rows) >= num_before
        assert {key: expected[key] for key in rows} == rows
        num_before = len(rows)
        if code == 0 or rows.keys() == expected.keys():
            assert rows == expected
            num_ends += 1
            shutil.rmtree(datasets[1] / "cache")
            num_before = 0
    assert run(words=killed, log=log) == 0
    assert rows_of(datasets[1]) == expected
    print(f"\n{num_killed} kills of caching, {num_ends} complete caches between them, {len(expected)} rows each")


def test_fifty_moments_of_training(run, tiny_dataset, tmp_path):
    log = str(tmp_path / "log")
    folder = tmp_path / "killed"
    alone, killed = (["train", str(toml(path, tiny_dataset)), "--resume"] for path in (tmp_path / "alone", folder))
    # the cache first: moments of that are the other test's
    assert run(words=["cache", alone[1]], log=log) == 0
    began = time.monotonic()
    assert run(words=alone, log=log) == 0
    lasts_s = time.monotonic() - began
    rng = random.Random("moments of training")
    num_killed = num_ends = 0
    steps_reached = []
    while num_killed < NUM_TRAINING_KILLS:
        before = list_checkpoints(folder)
        # a fifth of the whole on average: several kills a run, and mostly a checkpoint more than the last time
        code = run(words=killed, log=log, kill_after_s=rng.uniform(0, 0.4 * lasts_s))
        assert code in (0, -signal.SIGKILL), Path(log).read_text()
        num_killed += code != 0
        steps = list_checkpoints(folder)
        assert max(steps, default=0) >= max(before, default=0)
        steps_reached.append(max(steps, default=0))
        if steps:
            check_files(folder_of(folder, steps[-1]))
        if code == 0:
            assert_equal_runs(tmp_path / "alone", folder)
            num_ends += 1
            shutil.rmtree(folder)
    assert run(words=killed, log=log) == 0
    assert_equal_runs(tmp_path / "alone", folder)
    print(f"\n{num_killed} kills of training, {num_ends + 1} runs completed and equal; steps reached {steps_reached}")


def test_six_moments_of_a_grid(run, tmp_path):
    log = str(tmp_path / "log")
    # of one name, which is in the pictures
    alone, killed = (tmp_path / name / "run" for name in ("alone", "killed"))
    for folder in (alone, killed):
        folder.parent.mkdir()
        make_run(folder)
    words = ["--x", "cfg=1,3,5,7", "--y", "steps=2,3", "--z", "checkpoint=base,last", "--prompt", "x", "--name", "grid"]
    began = time.monotonic()
    assert run(words=["grid", str(alone), *words], log=log) == 0
    lasts_s = time.monotonic() - began
    folder, rng = killed / "grids" / "grid", random.Random("moments of a grid")
    num_killed = num_ends = 0
    while num_killed < NUM_GRID_KILLS:
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*cfg*.png")}
        code = run(words=["grid", str(killed), *words], log=log, kill_after_s=rng.uniform(0.1, 0.6) * lasts_s)
        assert code in (0, -signal.SIGKILL), Path(log).read_text()
        num_killed += code != 0
        # no picture is drawn twice, and all that are there are whole
        assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*cfg*.png")}.items()
        assert_equal_grids(alone / "grids" / "grid", folder, is_whole=code == 0)
        if code == 0:
            num_ends += 1
            shutil.rmtree(folder)
    assert run(words=["grid", str(killed), *words], log=log) == 0
    assert_equal_grids(alone / "grids" / "grid", folder, is_whole=True)
    print(f"\n{num_killed} kills of a grid, {num_ends + 1} grids completed and equal")


def assert_equal_grids(expected: Path, found: Path, is_whole: bool) -> None:
    """Check that the pictures of a grid are those expected, all of them if it is whole."""
    pictures = {path.name for path in found.glob("*cfg*.png")}
    assert pictures <= {path.name for path in expected.glob("*cfg*.png")}
    for name in pictures:
        with Image.open(expected / name) as first, Image.open(found / name) as second:
            assert first.text == second.text
            # batches differ, and so does rounding
            assert np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max() <= 1
    if is_whole or (found / "index.json").exists():
        record = Grid.model_validate_json((found / "index.json").read_bytes())
        assert record == Grid.model_validate_json((expected / "index.json").read_bytes())
        assert {cell.file for cell in record.cells} == pictures
        assert (found / "sheet.png").is_file()
