"""What a whole run does with its checkpoints: a later stage, other photographs, the ones kept, a damaged one."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from safelight.__main__ import main
from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.prepare.ingest import ingest
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints, read_position
from safelight.trainer.config.toml import to_toml
from safelight.trainer.inference.which_checkpoint import pick_step
from safelight.trainer.loading import dataset as datasets
from safelight.trainer.train import train


@pytest.fixture
def quick(small_config):
    """A function that returns the config of a run of one short epoch, with tables changed."""

    def make(**changes):
        values = {
            "train": {"batch_size": 100},
            "optimizer": {"name": "adamw"},
            "sample": {"every_epochs": 0},
            "validate": {"max_images": 2, "timesteps": 1},
            "stage": [{"epochs": 1}],
            "log": {"every_steps": 1},
        }
        for table, change in changes.items():
            values[table] = {**values.get(table, {}), **change} if isinstance(change, dict) else change
        return small_config(**values)

    return make


def test_a_later_stage_may_be_added_and_a_finished_one_not_changed(quick):
    first = train(quick())
    run_dir = first.run_dir
    assert not first.interrupted
    with pytest.raises(ValueError, match=f"already holds a run .at step {first.position.step}.; add --resume, or name"):
        train(quick())
    with pytest.raises(
        ValueError, match=r"belongs to other settings: stage 1's weight_decay is 0\.1, but 0\.01 in the checkpoint"
    ):
        train(quick(optimizer={"weight_decay": 0.1}), resume=True)
    assert list_checkpoints(run_dir) == [first.position.step]
    more = train(quick(stage=[{"epochs": 1}, {"epochs": 1, "lr": 5e-5}]), resume=True)
    assert (more.position.step, more.position.stage) == (2 * first.position.step, 1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates == [1e-4] * first.position.step + [5e-5] * first.position.step


def test_other_photographs_are_refused_before_they_are_encoded(quick, tiny_dataset, tmp_path, monkeypatch):
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    config = quick(data={"path": str(dataset)}, train={"max_steps": 1})
    run_dir = train(config).run_dir
    photos = read_manifest(dataset)
    name = json.loads((run_dir / "split.json").read_text())["train"][0]

    def refused(changes: str) -> None:
        words = "trained on other photographs, captions, crops, masks or photo settings than "
        ending = re.escape(f"dataset has now: {changes}; start a new run with --run.dir")
        with pytest.raises(ValueError, match=f"{words}.*{ending}"):
            train(config, resume=True)

    # which encodes
    monkeypatch.setattr(datasets, "_fill", None)
    write_manifest(dataset, [photo for photo in photos if photo.file != name])
    refused(f"1 removed (first: {name})")
    write_manifest(dataset, [dataclasses.replace(p, captions=("new",)) if p.file == name else p for p in photos])
    refused(f"1 with other captions (first: {name})")
    write_manifest(dataset, photos)
    photo = shutil.copy(tiny_dataset.parent / "photos" / "000.png", tmp_path / "one more.png")
    Image.open(photo).rotate(180).save(photo)
    ingest([photo], dataset)
    refused(f"1 added (first: {read_manifest(dataset)[-1].file})")


def test_a_run_keeps_its_last_checkpoints_and_its_best(quick):
    config = quick(stage=[{"epochs": 3}], train={"batch_size": 8}, save={"every_steps": 1, "keep": 2})
    result = train(config)
    steps, best = list_checkpoints(result.run_dir), result.position.best_step
    last = result.position.step
    # a run that goes on from a kept one may begin a stage from what was the best of the stage then
    best_then = {read_position(result.run_dir, step).stage_best_step for step in (last - 1, last)}
    assert steps == sorted({last - 1, last} | {step for step in (best, *best_then) if step > 0})
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row.get("split") == "held_out"}
    assert best == min(losses, key=losses.get)
    if best > 0:
        assert pick_step(result.run_dir, "best") == best
    assert pick_step(result.run_dir, "last") == last


def test_a_damaged_checkpoint_can_be_deleted_and_the_run_goes_on(quick, tmp_path, capsys):
    config = quick(stage=[{"epochs": 1}], train={"batch_size": 8}, save={"every_steps": 1, "keep": 2})
    last = train(config).position.step
    whole = load_file(folder_of(tmp_path / "run", last) / "unet" / "diffusion_pytorch_model.safetensors")
    path = folder_of(tmp_path / "run", last) / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(config))
    capsys.readouterr()
    assert main(["train", str(toml), "--resume"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"safelight train: checkpoint {path.parent} is damaged: state.safetensors")
    shutil.rmtree(path.parent)
    assert train(config, resume=True).position.step == last
    again = load_file(folder_of(tmp_path / "run", last) / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
