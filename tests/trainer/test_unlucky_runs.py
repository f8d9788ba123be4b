"""What is learnt outlives a failure between steps, and a run is refused where its files would mix with others."""

import os
import sqlite3
import subprocess
import sys

import pytest

from safelight.data.index import Index
from safelight.errors import UserError
from safelight.trainer.adapters.full import open_tensors
from safelight.trainer.between_steps import samples
from safelight.trainer.checkpoint.files import CheckpointGone, list_checkpoints, noticing_replacement, read_position
from safelight.trainer.loading.run_start import check_place
from safelight.trainer.memory_plan.static_bytes import summary
from safelight.trainer.train import train

SHORT = {
    "data": {"max_aspect": 1.0},
    "train": {"batch_size": 100, "epochs": 1},
    "validate": {"every_epochs": 0},
    "log": {"tensorboard": False},
    "stage": [],
}


def test_weights_are_saved_if_samples_fail(small_config, tmp_path, monkeypatch):
    draw = samples.draw

    def fails_after_training(*arguments, **options):
        if list((tmp_path / "run" / "samples").glob("step-*")):
            raise ZeroDivisionError("a sampler fails")
        return draw(*arguments, **options)

    config = small_config(**SHORT, sample={"every_epochs": 1, "steps": 1, "num_prompts": 1})
    monkeypatch.setattr(samples, "draw", fails_after_training)
    with pytest.raises(ZeroDivisionError):
        train(config)
    (step,) = list_checkpoints(tmp_path / "run")
    assert read_position(tmp_path / "run", step).unmeasured
    monkeypatch.undo()
    assert not train(config, resume=True).position.unmeasured
    assert len(list((tmp_path / "run" / "samples").glob("step-*"))) == 2


def test_a_sample_size_that_cannot_be_drawn_is_refused_at_the_start(small_config, tmp_path):
    config = small_config(**SHORT, sample={"width": 65})
    for command in (train, summary):
        with pytest.raises(UserError, match="width 65 is not a multiple of 4; use 64 or 68"):
            command(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_plan_names_a_dataset_that_is_a_file(small_config, tmp_path):
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(UserError, match=r"run\.toml is a file; give a folder"):
        summary(small_config(data={"path": str(tmp_path / "run.toml")}))


def test_a_run_is_not_mixed_with_a_dataset_or_photographs(tmp_path, tiny_dataset):
    photos = tmp_path / "photos"
    (photos / "2024").mkdir(parents=True)
    (photos / "2024" / "IMG_1.JPG").write_bytes(b"")
    for folder, reason in ((tiny_dataset, "lies in"), (tiny_dataset / "cache", "lies in"), (photos, "holds photo")):
        with pytest.raises(UserError, match=f"{reason}.*--run.dir"):
            check_place(folder, tiny_dataset)
    check_place(tmp_path / "run", tiny_dataset)
    # a run's own folder has pictures
    (photos / "config.toml").write_text("")
    check_place(photos, tiny_dataset)


def test_a_checkpoint_that_was_replaced_is_told_from_a_damaged_one(tmp_path):
    folder = tmp_path / "step-1"
    gone = "step-1 is gone: a run that still trains has replaced it"
    with pytest.raises(CheckpointGone, match=gone), noticing_replacement(folder):
        open_tensors(folder, "state.safetensors")
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.safetensors is missing; use another"), noticing_replacement(folder):
        open_tensors(folder, "state.safetensors")


def test_a_full_disk_of_the_cache_is_named(tmp_path):
    index = Index(tmp_path)
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    with pytest.raises(UserError, match="is full; free some space"), index._naming_damage(is_opening=True):
        raise full
    index.close()


def test_a_command_whose_output_is_closed_succeeds(tmp_path):
    command = [sys.executable, "-m", "safelight", "init", "tiny", "-o", str(tmp_path / "x.toml")]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.toml"]
