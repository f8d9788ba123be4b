"""Every setting that a [[stage]] may override has an effect there: a run resumed at a border differs by it.

One run trains the first stage. For each setting it is copied and resumed into a second stage that overrides it, beside
one that does not. A setting without a case here fails.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.schema import FLAT_TABLES, NESTED_TABLES
from safelight.trainer.config.stage_settings import overridable
from safelight.trainer.config.toml import parse_config
from safelight.trainer.train import train
from tests.small_base import small_base

# setting -> its value in the second stage, and other values that both have there
WEIGHTS: dict[str, tuple[object, dict]] = {
    "train.batch_size": (3, {}),
    "train.accumulate": (2, {}),
    "train.max_grad_norm": (1e-3, {}),
    "optimizer.lr": (1e-4, {}),
    "optimizer.weight_decay": (0.9, {}),
    "optimizer.schedule": ("linear", {}),
    "optimizer.warmup_steps": (2, {}),
    "data.caption_dropout": (1.0, {}),
    "loss.kind": ("huber", {"loss": {"huber_delta": 0.05}}),
    "loss.huber_delta": (0.05, {"loss": {"kind": "huber"}}),
    "loss.weighting": ("debiased", {}),
    "loss.min_snr_gamma": (5.0, {}),
    "loss.p2_gamma": (2.0, {"loss": {"weighting": "p2"}}),
    "loss.offset_noise": (0.5, {}),
    "loss.pyramid_noise": (0.5, {}),
    "loss.pyramid_octaves": (2, {"loss": {"pyramid_noise": 0.5}}),
    "loss.input_perturbation": (0.5, {}),
    "loss.huber_schedule": ("snr", {"loss": {"kind": "huber", "huber_delta": 0.05}}),
    "loss.timesteps": ("logit_normal", {}),
    "loss.timestep_location": (2.0, {"loss": {"timesteps": "logit_normal"}}),
    "loss.timestep_scale": (0.2, {"loss": {"timesteps": "logit_normal"}}),
    "loss.min_timestep": (900, {}),
    "loss.max_timestep": (100, {}),
    "optimizer.lr_end": (0.9, {"schedule": "linear"}),
    "optimizer.lr_power": (5.0, {"schedule": "polynomial"}),
    "optimizer.lr_start": (0.9, {"schedule": "one_cycle"}),
    "optimizer.lr_rise": (0.9, {"schedule": "one_cycle"}),
    # three steps hold no more than three cosines
    "optimizer.lr_cycles": (1, {"schedule": "cosine_restarts"}),
    "optimizer.lr_cycle_decay": (0.1, {"schedule": "cosine_restarts"}),
}
# setting -> its value, others, and what a run's folder shows of it
FOLDER: dict[str, tuple[object, dict]] = {
    "validate.every_epochs": (2, {}),
    "validate.patience": (1, {"validate": {"min_gain": 100.0}}),
    "validate.min_gain": (100.0, {"validate": {"patience": 2}}),
    "validate.patience_ends": ("run", {"validate": {"patience": 1, "min_gain": 100.0}}),
    "sample.every_epochs": (1, {}),
    "sample.sampler": ("ddim", {"sample": {"every_epochs": 1}}),
    "sample.steps": (3, {"sample": {"every_epochs": 1}}),
    # an epoch with the best loss so far is saved whatever these say
    "save.every_epochs": (1, {"validate": {"every_epochs": 9}}),
    "save.every_steps": (1, {"validate": {"every_epochs": 9}}),
    "save.keep": (1, {"validate": {"every_epochs": 9}, "save": {"every_epochs": 1}}),
}


def nested(name: str, value: object) -> dict:
    table, _, setting = name.partition(".")
    return {setting: value} if table in FLAT_TABLES else {table: {setting: value}}


def merged(one: dict, other: dict) -> dict:
    result = copy.deepcopy(one)
    for name, value in other.items():
        result[name] = {**result.get(name, {}), **value} if isinstance(value, dict) else value
    return result


def settings_of(folder: Path, dataset: Path, *stages: dict) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {
            "path": str(dataset),
            "resolution": 64,
            "max_aspect": 1.0,
            "upscale": "always",
            "caption_dropout": 0.0,
        },
        "train": {"batch_size": 8},
        "optimizer": {"lr": 1e-3, "name": "adamw"},
        "stage": [{"epochs": 1}, *stages],
        "sample": {"every_epochs": 0, "steps": 2, "num_prompts": 1, "cfg": 1.0},
        "validate": {"timesteps": 2, "max_images": 2, "batch_size": 2},
        "save": {"every_epochs": 9, "keep": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }


@pytest.fixture(scope="module")
def first_stage(tiny_dataset, tmp_path_factory) -> Path:
    """The folder of a run whose first stage is trained."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    train(parse_config(settings_of(folder, tiny_dataset), "test"))
    return folder


def resumed(first_stage: Path, dataset: Path, folder: Path, *stages: dict) -> dict:
    """Return what a copy of the run is after its further stages: weights, checkpoints, events, pictures."""
    shutil.copytree(first_stage, folder)
    train(parse_config(settings_of(folder, dataset, *stages), "test"), resume=True)
    steps = list_checkpoints(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(folder_of(folder, steps[-1]) / "unet/diffusion_pytorch_model.safetensors"),
        "steps": steps,
        "lines": [(r["kind"], r["step"], r.get("event")) for r in rows if r.get("event") not in ("settings changed",)],
        "pictures": {path.name: path.read_bytes() for path in sorted(folder.glob("samples/step-*/*.png"))},
    }


def test_every_setting_that_a_stage_may_override_has_a_case():
    names = {f"{t}.{n}" for t, section in {**FLAT_TABLES, **NESTED_TABLES}.items() for n in overridable(section)}
    assert names - WEIGHTS.keys() - FOLDER.keys() == set()
    assert (WEIGHTS.keys() | FOLDER.keys()) - names == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_stages_value_changes_its_weights(name, first_stage, tiny_dataset, tmp_path):
    value, both = WEIGHTS[name]
    plain = merged({"epochs": 1}, both)
    results = [
        resumed(first_stage, tiny_dataset, tmp_path / str(i), stage)
        for i, stage in enumerate((plain, merged(plain, nested(name, value))))
    ]
    one, other = (result["weights"] for result in results)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDER)
def test_a_stages_value_changes_what_the_run_leaves(name, first_stage, tiny_dataset, tmp_path):
    value, both = FOLDER[name]
    plain = merged({"epochs": 5 if "validate" in name else 3}, both)
    # the stage after it has other values again
    results = [
        resumed(first_stage, tiny_dataset, tmp_path / str(i), stage, {"epochs": 1})
        for i, stage in enumerate((plain, merged(plain, nested(name, value))))
    ]
    one, other = ({k: v for k, v in result.items() if k != "weights"} for result in results)
    assert one != other
