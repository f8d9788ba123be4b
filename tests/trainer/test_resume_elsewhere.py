"""Resuming after the base was moved or replaced, or the run's own config.toml was edited: what to do is said."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import load_config, parse_config, to_toml
from safelight.trainer.inference.draw import open_run
from safelight.trainer.models.base import tiny_folder
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.train import train

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory) -> Path:
    """A folder with a base and a run of a single step that was started from it. Read only."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(tiny_folder(), folder / "base")
    settings = {
        "run": {"dir": str(folder / "run")},
        "model": {"base": str(folder / "base")},
        "data": {"path": str(tiny_dataset), "resolution": 64, "max_aspect": 1.0},
        "train": {"batch_size": 100, "epochs": 1},
        "validate": {"every_epochs": 0},
        "sample": {"every_epochs": 0},
        "log": {"tensorboard": False},
    }
    train(parse_config(settings, "trained"))
    return folder


@pytest.fixture
def place(trained, tmp_path) -> Path:
    """A folder with a copy of the run and of its base, which so has moved."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def settings(place) -> Config:
    """The run's, with the base where it is now."""
    config = load_config(place / "run" / "config.toml")
    config.run.dir, config.model.base = str(place / "run"), str(place / "base")
    return config


@pytest.fixture
def replaced(trained):
    """A function that changes a file of the base in its first place; undone afterwards."""
    kept: dict[Path, bytes] = {}

    def replace(name: str, act) -> None:
        path = trained / "base" / name
        kept[path] = path.read_bytes()
        act(path)

    yield replace
    for path, content in kept.items():
        path.write_bytes(content)


def other_weights(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.bias"] += 0.125
    save_file(tensors, path, metadata={"format": "pt"})


def other_prediction(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))


def forget_the_base(run: Path) -> None:
    path = run / "environment.json"
    values = json.loads(path.read_text())
    del values["base"]
    path.write_text(json.dumps(values))


def test_a_base_that_was_moved_is_recognized(settings):
    assert train(settings, resume=True).was_finished


def test_another_model_elsewhere_is_not_the_base(settings, place):
    other_weights(place / "base" / UNET)
    with pytest.raises(
        UserError,
        match=r"model\.base is '.*/base', but '.*' in the checkpoint; what it names now is not the model that the run "
        r"was started with: move that one back to \".*/base\", or set model\.base to where it is, or start a new run",
    ):
        train(settings, resume=True)


def test_of_an_older_run_the_base_cannot_be_recognized(settings, place, trained):
    forget_the_base(place / "run")
    with pytest.raises(UserError, match=r"cannot be told from another model than the run was .* move that one back to"):
        train(settings, resume=True)
    settings.model.base = str(trained / "base")
    assert train(settings, resume=True).was_finished


def test_another_model_in_the_bases_place_is_said(settings, trained, replaced, capsys):
    settings.model.base = str(trained / "base")
    assert train(settings, resume=True).was_finished
    assert "note: the UNet" not in capsys.readouterr().err
    replaced(UNET, other_weights)
    said = []
    terminal = Terminal()
    terminal.say = said.append
    assert train(settings, resume=True, terminal=terminal).was_finished
    assert any(
        "the UNet of model.base" in line and "is not the one that the run was started with" in line for line in said
    )
    (Path(settings.run.dir) / "config.toml").write_text(to_toml(settings))
    assert "pictures of the base are another model's" in open_run(Path(settings.run.dir)).base_doubt


def test_a_base_that_trains_otherwise_is_refused(settings, trained, replaced):
    settings.model.base = str(trained / "base")
    replaced("scheduler/scheduler_config.json", other_prediction)
    with pytest.raises(
        UserError, match='with: prediction_type is "v_prediction", but was "epsilon"; put that one back'
    ):
        train(settings, resume=True)


def test_a_base_without_doubt(settings, place):
    (place / "run" / "config.toml").write_text(to_toml(settings))
    assert open_run(place / "run").base_doubt == ""


@pytest.mark.parametrize(
    ("table", "name", "value", "fix"),
    [
        ("data", "crop_jitter", 0.03, r"set data\.crop_jitter = 0\.02 in .*config\.toml, or start"),
        ("train", "batch_size", 3, r"set train\.batch_size = 100 in .*config\.toml, or start"),
        ("loss", "kind", "huber", r'set loss\.kind = "mse" in .*config\.toml, or start'),
    ],
)
def test_the_runs_own_config_is_not_named_as_the_way_out_if_it_was_edited(settings, place, table, name, value, fix):
    (place / "run" / "config.toml").write_text(to_toml(settings))
    setattr(getattr(settings, table), name, value)
    with pytest.raises(UserError, match=r"; resume with .*config\.toml, or start a new run"):
        train(settings, resume=True)
    (place / "run" / "config.toml").write_text(to_toml(settings))
    with pytest.raises(UserError, match=fix):
        train(settings, resume=True)
