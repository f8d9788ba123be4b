"""A run that still trains replaces the checkpoint that a command has chosen: the newest is taken, or it is said."""

import shutil
from pathlib import Path

import pytest

from safelight.__main__ import main
from safelight.errors import UserError
from safelight.trainer.checkpoint.files import CheckpointGone, folder_of, list_checkpoints
from safelight.trainer.inference import draw as draw_module
from safelight.trainer.inference import export as export_module
from safelight.trainer.inference.draw import OpenRun, open_run, sample
from safelight.trainer.inference.export import export
from safelight.trainer.inference.which_checkpoint import MAX_CHOICES, with_chosen
from tests.trainer.inference.exported_runs import STEP, make_run

SAMPLE = {"prompts": ["a red circle"], "steps": 1, "width": 32, "height": 32}
SMALL = {"steps": 1, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def later(tmp_path_factory) -> Path:
    """A run whose checkpoint is a step further. Read only."""
    return make_run(tmp_path_factory.mktemp("later") / "run", step=STEP + 1, best=STEP + 1, sample=SAMPLE)


@pytest.fixture
def run(tiny_run, later, tmp_path) -> Path:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.copy(later / "config.toml", folder)
    return folder


@pytest.fixture
def replace(run, later):
    """A function that does what a run with save.keep 1 does next, once."""

    def act() -> None:
        if STEP in list_checkpoints(run):
            shutil.copytree(folder_of(later, STEP + 1), folder_of(run, STEP + 1))
            shutil.rmtree(folder_of(run, STEP))

    return act


@pytest.fixture
def replaced_while_the_base_is_loaded(replace, monkeypatch):
    """The checkpoint is replaced between its choice and the reading of its weights."""
    load_unet = draw_module.load_unet

    def load(*arguments):
        replace()
        return load_unet(*arguments)

    monkeypatch.setattr(draw_module, "load_unet", load)


def test_samples_are_of_the_newest_checkpoint(run, tmp_path, replaced_while_the_base_is_loaded):
    said = []
    (file,) = sample(open_run(run), ["a red circle"], "last", tmp_path / "out", SMALL, say=said.append)
    assert file.name.startswith(f"step{STEP + 1}-")
    assert any("has replaced the checkpoint meanwhile" in line for line in said)


def test_a_step_that_the_run_has_not_kept_is_said_to_be_replaced(run, tmp_path, replaced_while_the_base_is_loaded):
    with pytest.raises(CheckpointGone, match=r"step-00000007 is gone: a run that still trains has replaced it; run th"):
        sample(open_run(run), ["a red circle"], str(STEP), tmp_path / "out", SMALL)


def test_samples_that_are_drawn_are_kept_although_their_checkpoint_is_gone(run, tmp_path, replace):
    (file,) = sample(
        open_run(run), ["a red circle"], "last", tmp_path / "out", SMALL, progress=lambda done, total: replace()
    )
    assert not folder_of(run, STEP).exists()
    assert file.name.startswith(f"step{STEP}-")
    assert file.is_file()


@pytest.mark.parametrize("checkpoint", ["last", str(STEP)])
def test_an_export_takes_the_newest_or_says_it(run, tmp_path, replace, monkeypatch, checkpoint):
    check_files = export_module.check_files

    def check(*arguments, **options):
        replace()
        return check_files(*arguments, **options)

    monkeypatch.setattr(export_module, "check_files", check)
    out = tmp_path / "out.safetensors"
    if checkpoint == "last":
        assert export(run, out, checkpoint).step == STEP + 1
    else:
        with pytest.raises(CheckpointGone, match="has replaced it"):
            export(run, out, checkpoint)
    assert out.exists() == (checkpoint == "last")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors"] * out.exists() + ["run"]


@pytest.mark.parametrize("command", ["compare", "grid"])
def test_pictures_side_by_side_are_of_the_newest_checkpoint(run, replace, monkeypatch, capsys, command):
    loaded = OpenRun.unet
    steps = []

    def unet(self, step, *rest):
        steps.append(step)
        replace()
        return loaded(self, step, *rest)

    monkeypatch.setattr(OpenRun, "unet", unet)
    axes = ["--x", "cfg=1,2", "--checkpoint", "last"] if command == "grid" else ["--num", "1"]
    assert main([command, str(run), *axes]) == 0
    assert steps[-1] == STEP + 1
    assert "has replaced the checkpoint meanwhile" in capsys.readouterr().err


def test_a_run_that_is_faster_than_its_reader_is_said(tmp_path):
    tried = []

    def make(number):
        tried.append(number)
        raise CheckpointGone("step-1 is gone")

    with pytest.raises(CheckpointGone, match="is gone"):
        with_chosen(lambda: len(tried), make)
    assert tried == list(range(MAX_CHOICES))


def test_other_errors_after_a_replacement_are_raised_as_they_are():
    errors = [CheckpointGone("step-1 is gone"), UserError("no memory")]

    def make(_chosen):
        raise errors.pop(0)

    with pytest.raises(UserError, match="no memory"):
        with_chosen(lambda: 1, make)
