"""A finished run trains on as its message says; photographs are not blamed for weights that break; small disks."""

import json
import shlex
from collections import namedtuple
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import Position, list_checkpoints
from safelight.trainer.config.timeline import StageSteps, Timeline
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.loading import disk_space
from safelight.trainer.loading.disk_space import check_space, space_note
from safelight.trainer.loading.progress import Progress
from safelight.trainer.run_log.doubts import doubt_about
from safelight.trainer.run_log.unlogged_steps import UnloggedSteps
from safelight.trainer.step.step import StepResult, StepSettings
from safelight.trainer.train import train
from tests.called import call

CPU, NAN = torch.device("cpu"), float("nan")
SHORT = {
    "data": {"max_aspect": 1.0},
    "train": {"batch_size": 100, "epochs": 1},
    "sample": {"every_epochs": 0},
    "validate": {"every_epochs": 0},
    "log": {"tensorboard": False},
    "stage": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_goes_on_as_it_says(schedule, make_config, tmp_path):
    config = make_config(**SHORT, optimizer={"schedule": schedule})
    (tmp_path / "run.toml").write_text(to_toml(config))
    train(config)
    said = call("train", tmp_path / "run.toml", "--resume").line("is finished, at step 1, and is left as it is")
    words = shlex.split(said.split("for example: safelight ")[1])
    assert call(*words).status == 0
    assert list_checkpoints(tmp_path / "run")[-1] == 2


@pytest.mark.parametrize(
    ("settings", "step", "options"),
    [
        ({"train": {"epochs": 3}}, 6, "--train.epochs 6"),
        ({"train": {"epochs": 3, "max_steps": 4}}, 4, "--train.max-steps 6"),
        # a limit that was lowered after the run had passed it
        ({"train": {"epochs": 3, "max_steps": 4}}, 6, "--train.epochs 6 --train.max-steps 0"),
        ({"stage": [{"epochs": 2}, {"epochs": 1}]}, 6, "--stage.1.epochs 2"),
        ({"stage": [{"epochs": 2}, {"epochs": 1, "schedule": "linear"}]}, 6, "--stage.2.epochs 1"),
        (
            {"train": {"epochs": 3}, "optimizer": {"schedule": "cosine"}},
            6,
            "--stage.0.epochs 3 --stage.1.epochs 3",
        ),
    ],
)
def test_options_that_extend_a_run(settings, step, options):
    config = parse_config(settings, "test")
    stages = tuple(config.stages())
    timeline = Timeline(stages, tuple(StageSteps(stage.epochs, (2,)) for stage in stages), config.train.max_steps)
    assert timeline.how_to_extend(step, bool(config.stage)) == options


@pytest.fixture
def steps(make_config):
    """A function that logs a step with these losses, by photograph, and returns what the terminal has said since."""
    said, nothing = [], lambda *args, **kwargs: None
    progress = Progress(
        SimpleNamespace(user_config=make_config(log={"every_steps": 1}), precision="fp32", plan=None, device=CPU),
        SimpleNamespace(num_steps=99, steps_of=lambda epoch: 99),
        SimpleNamespace(write=nothing),
        SimpleNamespace(say=said.append, update=nothing),
        UnloggedSteps(2, CPU, None),
        0,
    )
    numbers = count(1)

    def step(**losses: float) -> list[str]:
        said.clear()
        values, number = torch.tensor(list(losses.values())), next(numbers)
        result = StepResult(values, values.mean(), values.isfinite().all())
        settings = StepSettings(2, 1e-5, 0.0, 1.0)
        optimizer = SimpleNamespace(is_fused=False, effective_lr=None)
        progress.log_step(Position(number), result, settings, optimizer, tuple(losses))
        return list(said)

    return step


def test_a_photograph_is_blamed_only_if_it_fails_again_while_others_are_fine(steps):
    assert steps(a=NAN, b=0.5) == ["step 1: the loss was not finite, so the step was skipped"]
    # no other step was fine since
    assert steps(a=NAN, b=0.5) == []
    assert steps(b=0.5, c=0.5) == []
    (line,) = steps(a=NAN, c=0.5)
    assert line == (
        "step 4: the loss of a was again not finite, while other steps are fine; its picture or its cached rows are "
        "damaged"
    )
    assert steps(a=NAN, c=0.5) == []


def test_weights_that_break_are_not_blamed_on_photographs(steps):
    assert steps(a=0.5, b=0.5) == steps(c=0.5, d=0.5) == []
    for photos in ({"a": NAN, "b": 9.0}, {"c": 9.0, "d": 9.0}, {"a": NAN, "b": 9.0}, {"c": NAN, "d": 9.0}):
        assert not any("damaged" in line for line in steps(**photos))


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_too_small_is_told_before_encoding(make_config, tmp_path, monkeypatch):
    config = make_config(**SHORT, save={"keep": 2})
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(0, 0, 10 * 2**20))
    note = space_note(config, 3 * 2**20)
    assert note.startswith("up to 4 checkpoints of 3.0 MiB ")
    assert note.endswith(f"the disk of {tmp_path}/run has 10.0 MiB free; free some space, or lower save.keep")
    assert space_note(config, 2**20) == ""
    check_space(Path(config.run.dir), 10 * 2**20)
    with pytest.raises(UserError, match=r"a checkpoint takes 11\.0 MiB, but the disk of .* has 10\.0 MiB free"):
        check_space(Path(config.run.dir), 11 * 2**20)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert "checkpoints of" in call("plan", tmp_path / "run.toml").out
    monkeypatch.setattr("safelight.trainer.loading.job.open_dataset", lambda *args: pytest.fail("it encodes"))
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(0, 0, 2**20))
    call("train", tmp_path / "run.toml").assert_refused("train", "a checkpoint takes ")


def test_a_checkpoint_that_the_log_calls_worse_than_the_base_is_doubted(tmp_path):
    def write(*rows: dict) -> None:
        (tmp_path / "metrics.jsonl").write_text("no row\n" + "".join(f"{json.dumps(row)}\n" for row in rows))

    def validation(step: int, loss: float) -> dict:
        return {"kind": "validation", "step": step, "split": "held_out", "loss": loss}

    assert doubt_about(tmp_path, 4) == ""
    write(validation(0, 0.5), validation(4, 0.9), validation(8, 5.0))
    assert doubt_about(tmp_path, 4) == doubt_about(tmp_path, 6) == ""
    assert "step 8 may be worse than the base: its held-out loss 5 is 10 times the base's" in doubt_about(tmp_path, 8)
    assert "at step 8 its held-out loss" in doubt_about(tmp_path, 9)
    write(validation(0, 0.5), validation(4, float("nan")))
    assert "nan times" in doubt_about(tmp_path, 4)
    write({"kind": "event", "step": 7, "event": "diverged", "detail": "x"})
    assert "the run diverged at step 7" in doubt_about(tmp_path, 4)
