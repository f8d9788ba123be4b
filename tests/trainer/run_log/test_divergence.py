"""A run whose loss is no longer finite ends with one line, keeps its last sound checkpoint, and can go on from it."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from safelight.data.shards import Cache
from safelight.errors import Diverged
from safelight.trainer import train as loop
from safelight.trainer.between_steps import evaluate
from safelight.trainer.checkpoint.files import Position, folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.run_log.divergence import NotFinite, Streak, explain, named
from safelight.trainer.run_log.metrics import Metrics
from safelight.trainer.step.step import StepResult
from safelight.trainer.train import train
from tests.called import call

NAN = float("nan")


def step(*losses: float, is_applied: bool = True) -> StepResult:
    return StepResult(torch.tensor(losses), torch.tensor(1.0), is_applied)


def streak_of(*results: StepResult, photos: tuple[str, ...] = ("a.png", "b.png")) -> Streak:
    streak = Streak()
    for result in results:
        streak = streak.after(result, photos)
    return streak


LOST = step(NAN, NAN, is_applied=False)
OVERFLOW = step(0.5, 0.5, is_applied=False)


@pytest.mark.parametrize(
    ("results", "is_fp16", "what", "last_sound", "photos"),
    [
        ([LOST] * 5, False, "the loss has not been finite since step 8", 6, ()),
        ([LOST] * 5, True, "the loss has not been finite since step 8", 6, ()),
        ([OVERFLOW] * 5, False, "the gradients have not been finite since step 8", 6, ()),
        ([OVERFLOW] * 50, True, "the gradients have not been finite since step -37", -39, ()),
        # the weights work for the other photograph, so they may be saved and gone on from
        ([step(NAN, 0.5, is_applied=False)] * 5, False, "the loss has not been finite since step 8", 12, ("a.png",)),
    ],
)
def test_too_many_lost_steps_end_a_run(results, is_fp16, what, last_sound, photos):
    with pytest.raises(NotFinite) as error:
        streak_of(*results).check(12, is_fp16)
    assert (error.value.what, error.value.last_sound, error.value.photos) == (what, last_sound, photos)


@pytest.mark.parametrize(
    ("results", "is_fp16"),
    [
        # the dynamic loss scale may take 38 steps to find its value
        ([OVERFLOW] * 38, True),
        ([LOST] * 4, False),
        ([LOST] * 4 + [step(0.5, 0.5)] + [LOST] * 4, False),
        ([OVERFLOW] * 4 + [step(0.5, 0.5)] + [OVERFLOW] * 4, False),
    ],
)
def test_a_few_lost_steps_do_not(results, is_fp16):
    streak_of(*results).check(12, is_fp16)


def test_a_photograph_that_was_fine_once_is_not_at_fault():
    streak = streak_of(step(NAN, 0.5, is_applied=False), step(NAN, NAN, is_applied=False))
    assert (streak.bad, streak.good) == ({"a.png"}, {"b.png"})


def test_few_names_are_listed():
    assert named(["a", "b", "c"]) == "a, b, c"
    assert named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


CONFIG = {"optimizer": {"lr": 1e-3}, "stage": [{"epochs": 2}, {"epochs": 1, "lr": 1e-4}]}


def explained(
    tmp_path: Path,
    failure: NotFinite,
    *steps: int,
    precision: str = "fp32",
    stage: int = 0,
    held_out: dict | None = None,
    ruined: tuple[int, ...] = (),
) -> str:
    """Return the explanation for a run in `tmp_path` with checkpoints of these steps."""
    for number in steps:
        folder_of(tmp_path, number).mkdir(parents=True)
        (folder_of(tmp_path, number) / "state.json").touch()
    return explain(failure, tmp_path, parse_config(CONFIG, "test"), precision, stage, held_out or {}, ruined)


def test_the_newest_sound_checkpoint_is_the_one_to_go_on_from(tmp_path):
    """The weights of step 9 failed in step 10, and step 6 was already far above the base."""
    failure = NotFinite(14, "the loss has not been finite since step 10", 8)
    line = explained(tmp_path, failure, 3, 6, 9, held_out={0: 0.5, 3: 0.9, 6: 1.1})
    moves = " && ".join(f"mv {folder_of(tmp_path, s)} {folder_of(tmp_path, s)}.diverged" for s in (6, 9))
    assert line == (
        "step 14: the loss has not been finite since step 10: the learning rate 0.001 is probably too high; go on from "
        f"step 3, the last sound checkpoint, with a smaller rate: {moves} && safelight train {tmp_path}/config.toml "
        "--resume --optimizer.lr 0.0001"
    )


def test_a_checkpoint_that_was_saved_ruined_is_not_one_to_go_on_from(tmp_path):
    """Its loss was finite, but worse than predicting nothing."""
    line = explained(tmp_path, NotFinite(9, "x", 9), 1, 2, 3, ruined=(3,))
    assert f"go on from step 2, the last sound checkpoint, with a smaller rate: mv {folder_of(tmp_path, 3)} " in line


def test_a_stage_with_its_own_rate_gets_its_own_option(tmp_path):
    line = explained(tmp_path, NotFinite(14, "x", 14), 9, stage=1, precision="fp16")
    assert "exceed the range of fp16" in line
    assert line.endswith(f"rate: safelight train {tmp_path}/config.toml --resume --stage.1.lr 1e-05")


def test_without_a_sound_checkpoint_the_run_starts_again(tmp_path):
    line = explained(tmp_path, NotFinite(2, "x", 1))
    assert "; no sound checkpoint was saved; this starts again from step 0 with a smaller rate: safelight train" in line


def test_a_base_that_gives_no_number_is_at_fault_itself(tmp_path):
    assert explained(tmp_path, NotFinite(0, "x", -1)).endswith("the range of fp32; use another model.base")
    assert explained(tmp_path, NotFinite(0, "x", -1), precision="fp16").endswith("--model.precision fp32")


@pytest.fixture
def config(small_config):
    """A function that returns a run of one step per epoch that saves after each, with tables changed."""

    def make(**changes):
        values = {
            # one bucket
            "data": {"max_aspect": 1.0},
            "train": {"batch_size": 100},
            "optimizer": {"name": "adamw"},
            "sample": {"every_epochs": 0},
            "validate": {"every_epochs": 0},
            "stage": [{"epochs": 30}],
            "save": {"keep": 1},
        }
        for table, change in changes.items():
            values[table] = {**values.get(table, {}), **change} if isinstance(change, dict) else change
        return small_config(**values)

    return make


def events(run_dir: Path) -> dict[str, str]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["event"]: row["detail"] for row in rows if row["kind"] == "event"}


def test_a_run_that_diverges_can_go_on_as_it_says(config, tmp_path, monkeypatch):
    """The rate jumps in stage 2. Without validation, the broken weights are found before they would be saved."""
    stages = [{"epochs": 2, "lr": 1e-5}, {"epochs": 28, "lr": 1.0}]
    (tmp_path / "run.toml").write_text(to_toml(config(model={"base": "tiny"}, stage=stages)))
    called = call("train", tmp_path / "run.toml")
    assert called.status == 3
    run_dir = tmp_path / "run"
    # step 3 is the first with the high rate: its weights are ruined, and it does not replace the last sound checkpoint
    assert list_checkpoints(run_dir) == [2, 3]
    line = called.line("safelight train: step ").removeprefix("safelight train: ")
    assert events(run_dir)["diverged"] == line
    assert called.err.endswith(f"{line}\n")
    assert (run_dir / "report.html").is_file()
    # it does what it says, in this process in place of a shell
    *moves, command = (part.split() for part in line.split("rate: ")[1].split(" && "))
    for name, source, target in moves:
        assert name == "mv"
        shutil.move(source, target)
    assert list_checkpoints(run_dir) == [2]
    assert shlex.join(command) == f"safelight train {run_dir}/config.toml --resume --stage.1.lr 0.1"
    again = call(*command[1:-1], "1e-5", "--train.max-steps", 3)
    assert again.status == 0
    rates = [row["lr"] for row in map(json.loads, (run_dir / "metrics.jsonl").open()) if row["kind"] == "train"]
    assert rates == [1e-5]


def test_a_changed_rate_is_said_and_recorded(config, tmp_path, capsys):
    train(config(train={"max_steps": 1}))
    train(config(train={"max_steps": 2}, optimizer={"lr": 1e-5}), resume=True)
    change = "stage 1: peak learning rate 1e-05 instead of 0.0001"
    assert change in capsys.readouterr().err
    assert events(tmp_path / "run")["learning rate changed"] == change


def test_a_changed_rate_of_the_text_encoder_is_said_recorded_and_used(config, tmp_path, capsys):
    train(config(text_encoder={"train": True, "lr": 1e-5}, train={"max_steps": 1}, log={"every_steps": 1}))
    changed = {"text_encoder": {"train": True, "lr": 1e-3}, "train": {"max_steps": 2}, "log": {"every_steps": 1}}
    train(config(**changed), resume=True)
    change = "text encoder: peak learning rate 0.001 instead of 1e-05"
    assert change in capsys.readouterr().err
    assert events(tmp_path / "run")["learning rate changed"] == change
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    assert [row["text_lr"] for row in rows if row["kind"] == "train"] == [1e-5, 1e-3]


def test_weights_that_are_not_finite_are_never_saved(config, tmp_path, monkeypatch):
    """With keep 1, saving them would delete the only sound checkpoint."""
    original = loop.train_step

    def breaking(context, *args, **kwargs):
        result = original(context, *args, **kwargs)
        if kwargs["epoch"] == 1:
            with torch.no_grad():
                context.unet.conv_in.weight[0, 0, 0, 0] = NAN
        return result

    monkeypatch.setattr(loop, "train_step", breaking)
    with pytest.raises(
        Diverged, match=r"^step 2: with the weights after step 2 no loss is finite: .* from step 1, the"
    ):
        train(config())
    assert list_checkpoints(tmp_path / "run") == [1]


@pytest.fixture
def damaged_photo(monkeypatch):
    """A function that makes the cached rows of the photographs whose latent keys it gets read as NaN."""
    read, bad = Cache.read, set()

    def damaged(self, keys):
        rows = read(self, keys)
        for index, key in enumerate(keys):
            if key in bad:
                rows[index] = np.nan
        return rows

    monkeypatch.setattr(Cache, "read", damaged)
    return bad.update


def test_a_photograph_without_a_finite_loss_is_named(config, damaged_photo, tmp_path, monkeypatch):
    """All batches hold it, so nothing is learned; the weights are sound, and so is the checkpoint of before."""
    original = loop.load_job

    def loaded(*args):
        job, position = original(*args)
        loaded.photo = job.dataset.train[3].photo.file
        damaged_photo(job.dataset.train[3].latent_keys)
        return job, position

    monkeypatch.setattr(loop, "load_job", loaded)
    with pytest.raises(Diverged) as error:
        train(config(log={"every_steps": 1}, save={"every_epochs": 2, "keep": 9}))
    assert str(error.value).startswith(
        f"step 5: the loss has not been finite since step 1 for {loaded.photo}, while others are fine"
    )
    assert str(error.value).endswith(
        f"go on from step 4, the last sound checkpoint, with: safelight train {tmp_path}/run/config.toml --resume"
    )
    assert events(tmp_path / "run")["step skipped"] == f"step 5: the loss of {loaded.photo} was not finite"


def test_a_validation_that_is_not_finite_ends_the_run(config, damaged_photo, tmp_path, monkeypatch):
    original = loop.load_job

    def loaded(*args):
        job, position = original(*args)
        loaded.photo = job.dataset.validation[0].photo.file
        damaged_photo(job.dataset.validation[0].latent_keys)
        return job, position

    monkeypatch.setattr(loop, "load_job", loaded)
    with pytest.raises(Diverged) as error:
        train(config(validate={"every_epochs": 1}))
    assert str(error.value).startswith(
        f"step 0: the loss on held-out photographs is not finite for {loaded.photo}, while others are fine"
    )


def test_a_held_out_loss_far_above_the_bases_is_said(tmp_path):
    """At each validation that finds it still rising, also after a resume."""
    said = []

    def validated(metrics: Metrics, step: int, loss: float) -> None:
        progress = SimpleNamespace(metrics=metrics, terminal=SimpleNamespace(say=said.append))
        evaluate._report_rise(SimpleNamespace(progress=progress), Position(step=step), loss)
        metrics.write("validation", step, split="held_out", loss=loss)
        metrics.write("validation", step, split="train_subset", loss=9.0)

    first = Metrics(tmp_path, -1)
    for step, loss in enumerate((0.5, 0.99, 1.1, 1.05)):
        validated(first, step, loss)
    first.close()
    resumed = Metrics(tmp_path, 3)
    validated(resumed, 4, 1.2)
    resumed.close()
    assert [line.split(": the run")[0] for line in said] == [
        "step 2: the held-out loss 1.1000 is 2.2 times the base's 0.5000 and rising",
        "step 4: the held-out loss 1.2000 is 2.4 times the base's 0.5000 and rising",
    ]
    assert events(tmp_path)["held-out loss rose"] == said[-1]
