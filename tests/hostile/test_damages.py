"""Damage to datasets, caches and runs is reported in one line or repaired, and intact files are left alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from safelight.trainer.config.toml import load_config
from safelight.trainer.models.base import tiny_folder
from safelight.trainer.train import train
from tests.small_base import small_base

TOML = """
[run]
dir = "{place}/run"
seed = 6
device = "cpu"
[model]
base = "{base}"
[data]
path = "{place}/dataset"
resolution = 64
validation_fraction = 0.2
[train]
batch_size = 4
max_steps = 2
[validate]
every_epochs = 0
[sample]
every_epochs = 0
steps = 1
[save]
every_steps = 1
keep = 3
[log]
every_steps = 1
tensorboard = false
"""
NUM_PHOTOS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_dataset) -> Path:
    """A folder with photographs, their dataset, and a finished run of two steps with both checkpoints."""
    from safelight.data.prepare.ingest import ingest

    root = tmp_path_factory.mktemp("made")
    (root / "photos").mkdir()
    for path in sorted((tiny_dataset.parent / "photos").glob("*.png"))[:NUM_PHOTOS]:
        shutil.copy(path, root / "photos")
        shutil.copy(path.with_suffix(".txt"), root / "photos")
    ingest([root / "photos"], root / "dataset")
    (root / "run.toml").write_text(TOML.format(place=root, base=small_base()))
    train(load_config(root / "run.toml"))
    return root


@pytest.fixture
def place(made, tmp_path) -> Path:
    root = shutil.copytree(made, tmp_path / "place")
    for name in ("run.toml", "run/config.toml"):
        text = (root / name).read_text()
        (root / name).write_text(text.replace(str(made), str(root)))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    paths = [Path(at, name) for at, _, files in os.walk(folder) for name in files]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_damage_is_reported_or_repaired_and_intact_files_stay(damage, place, call):
    damage.make(place)
    before = contents(place)
    words = damage.words.format(place=place).split()
    called = call(*words)
    assert "Traceback" not in called.err
    if damage.status == 2:
        called.assert_refused(words[0], damage.says)
    else:
        assert called.status == 0, called.err
        called.line(damage.says)
    damage.check(place)
    after = contents(place)
    # the cache index may change: it notes which photos were checked
    free = (*damage.touches, "dataset/cache/index.sqlite", "dataset/rejected.jsonl")
    assert {
        name for name, content in before.items() if after.get(name) != content and not name.startswith(free)
    } == set()
    # checkpoints are never changed
    for name, content in before.items():
        if name.startswith("run/checkpoints/step-"):
            assert after[name] == content


@pytest.mark.parametrize("what", ["a UNet cut short", "a checkpoint with a flipped bit"])
def test_damaged_weights_are_reported_before_anything_is_encoded(place, tmp_path, what):
    """Otherwise the error might come only after hours of caching."""
    shutil.rmtree(place / "dataset" / "cache")
    config, resume = load_config(place / "run.toml"), False
    if what == "a UNet cut short":
        base = shutil.copytree(tiny_folder(), tmp_path / "base")
        weights = base / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        config.model.base, config.run.dir = str(base), str(tmp_path / "other")
        line = "its weights are damaged or do not fit its config.json"
    else:
        state = place / "run" / "checkpoints" / "step-00000002" / "state.safetensors"
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
        line, resume = r"step-00000002 is damaged: state\.safetensors .*resume from step 1", True
    with pytest.raises(ValueError, match=line):
        train(config, resume=resume)
    assert not (place / "dataset" / "cache").exists()


def test_a_run_whose_dataset_is_missing_says_where_to_name_it(place, call):
    (place / "dataset").rename(place / "elsewhere")
    call("compare", str(place / "run"), "--num", "1").assert_refused(
        "compare", f"set data.path in {place / 'run' / 'config.toml'} to where the dataset is now"
    )
    assert not (place / "run" / "compare" / "index.json").exists()
