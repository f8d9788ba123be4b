"""Stages that patience ends or that begin from the best checkpoint: exact through kills and stops, and recorded."""

import copy
import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from safelight.trainer import train
from safelight.trainer.between_steps import evaluate
from safelight.trainer.between_steps.stage_end import possibly
from safelight.trainer.checkpoint.files import Position, folder_of, list_checkpoints, read_position
from safelight.trainer.config.timeline import StageSteps, Timeline
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.which_checkpoint import pick_step
from safelight.trainer.loading.restore import with_stage_best
from safelight.trainer.metrics.over_fitting import Curve, doubt, over_fitting
from safelight.trainer.report.build import build_report
from safelight.trainer.report.course import ending, learning_rates, stage_starts
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.step.validate import Validation
from safelight.trainer.tiny.demo import draw_photos, photo_name, scene_of
from safelight.trainer.tiny.scenes import caption
from tests.called import call
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs, metrics
from tests.trainer.report.charts import drawn_charts


def settings_of(folder: Path, dataset: Path, **more) -> dict:
    """A first stage that ends after 4 epochs, as no gain is large enough, and a second one from its best checkpoint."""
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {"path": str(dataset), "resolution": 64, "variants": 2, "caption_dropout": 0.2},
        "train": {"batch_size": 8, **more.pop("train", {})},
        "optimizer": {"lr": 1e-3, **more.pop("optimizer", {})},
        "stage": more.pop("stage", None)
        or [
            {"epochs": 9, "schedule": "cosine", "validate": {"patience": 3, "min_gain": 100}},
            {"epochs": 2, "lr": 2e-5, "batch_size": 6, "start_from": "best", "loss": {"offset_noise": 0.1}},
        ],
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 6, "cfg": 1.0},
        "validate": {"timesteps": 2, "max_images": 4},
        "save": {"every_steps": 2, "every_epochs": 0, "keep": 1},
        "log": {"every_steps": 3, "tensorboard": False},
        **more,
    }


def events(folder: Path, name: str) -> list[dict]:
    return [row for row in metrics(folder) if row.get("event") == name]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_killed_at_the_border_of_stages_and_resumed_equals_uninterrupted(run, tiny_dataset, tmp_path, optimizer):
    alone, folder = tmp_path / "alone", tmp_path / "killed"
    more = {"optimizer": {"name": optimizer}, "train": {"ema_decay": 0.9}}
    assert run(settings_of(alone, tiny_dataset, **copy.deepcopy(more))) == 0
    (ended,) = events(alone, "stage ended early")
    assert (ended["stage"], ended["epoch"]) == (0, 4.0)
    border = ended["step"]
    (began,) = events(alone, "stage begins from the best")
    assert began["step"] == border + 1
    rng = random.Random(f"stages of {optimizer}")
    # in the first stage, on either side of the border, within the first step of the second, and further on
    kills = [("step", rng.randint(3, 6)), ("step", border), ("step", 1), ("half a line", 2), ("before rename", 1)]
    num_killed = 0
    for point, count in kills:
        settings = settings_of(folder, tiny_dataset, **copy.deepcopy(more))
        code = run(settings, resume=bool(list_checkpoints(folder)), point=point, count=count)
        assert code in (0, -signal.SIGKILL)
        num_killed += code != 0
    if code != 0:
        assert run(settings_of(folder, tiny_dataset, **copy.deepcopy(more)), resume=True) == 0
    assert num_killed >= 3
    assert_equal_runs(alone, folder)


@pytest.mark.parametrize("ends", ["stage", pytest.param("run", marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_run_stopped_at_any_moment_decides_as_if_never_stopped(run, tiny_dataset, tmp_path, ends):
    """A run that patience ends logs the steps after its last line, too: 4 epochs, a line every 5 steps."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    more = {"log": {"every_steps": 5, "tensorboard": False}}
    if ends == "run":
        more["stage"] = [{"epochs": 9, "validate": {"patience": 3, "min_gain": 100, "patience_ends": "run"}}]
    assert run(settings_of(alone, tiny_dataset, **copy.deepcopy(more))) == 0
    config = parse_config(settings_of(stopped, tiny_dataset, **copy.deepcopy(more)), "test")
    rng, result = random.Random("stops of stages"), None
    while result is None or result.interrupted:
        stops = iter([False] * rng.randint(1, 40))
        result = train.train(config, resume=True, stop_requested=lambda stops=stops: next(stops, True))
    assert metrics(alone) == metrics(stopped)
    last = [folder_of(folder, result.position.step) for folder in (alone, stopped)]
    assert last[0].joinpath("state.json").read_bytes() == last[1].joinpath("state.json").read_bytes()
    lines = [row for row in metrics(alone) if row["kind"] == "train"]
    assert lines[-1]["step"] == result.position.step
    assert lines[-1]["epoch"] == result.position.epoch
    if ends == "run":
        assert lines[-1]["step"] % 5


@pytest.mark.long
def test_a_stop_while_the_last_loss_is_measured_ends_the_run_as_if_never_stopped(tiny_dataset, tmp_path, monkeypatch):
    """Its checkpoint holds steps without a line; the resume finds that patience ends the run, and finishes it."""
    stage = {"epochs": 9, "validate": {"patience": 3, "min_gain": 100, "patience_ends": "run"}}
    more = {"stage": [stage], "log": {"every_steps": 5, "tensorboard": False}}
    alone = trained(settings_of(tmp_path / "alone", tiny_dataset, **copy.deepcopy(more)))
    end = list_checkpoints(alone)[-1]
    stopped, original = (
        parse_config(settings_of(tmp_path / "stopped", tiny_dataset, **more), "test"),
        evaluate._validate,
    )

    stops = []

    def stop(job, position):
        if position.step == end:
            stops.append(True)
            raise evaluate.Stopped
        return original(job, position)

    monkeypatch.setattr(evaluate, "_validate", stop)
    assert train.train(stopped, stop_requested=lambda: bool(stops)).interrupted
    monkeypatch.undo()
    result = train.train(stopped, resume=True)
    assert (result.interrupted, result.position.step) == (False, end)
    rows = [[r for r in metrics(f) if r.get("event") != "resumed"] for f in (alone, tmp_path / "stopped")]
    assert rows[0] == rows[1]
    assert read_position(alone, end) == read_position(tmp_path / "stopped", end)
    pictures = [sorted(p.name for p in f.glob("samples/**/*.png")) for f in (alone, tmp_path / "stopped")]
    assert pictures[0] == pictures[1] != []
    # what it goes on with does not log these steps again
    longer = {**more, "stage": [stage, {"epochs": 1}]}
    for folder in (alone, tmp_path / "stopped"):
        train.train(parse_config(settings_of(folder, tiny_dataset, **copy.deepcopy(longer)), "test"), resume=True)
    rows = [[r for r in metrics(f) if r["kind"] == "train"] for f in (alone, tmp_path / "stopped")]
    assert rows[0] == rows[1]


def trained(settings: dict, **more) -> Path:
    """Train a run and return its folder."""
    config = parse_config({**settings, **more}, "test")
    train.train(config)
    return Path(config.run.dir)


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    place = folder_of(folder, step)
    return {**load_file(place / "unet/diffusion_pytorch_model.safetensors"), **load_file(place / "state.safetensors")}


def scripted(monkeypatch, held_out: list[float], subset: list[float]) -> None:
    """Let validations give these losses one after another, so that a test knows what is to be decided."""
    left, original = [iter(held_out), iter(subset)], evaluate.validate

    def validate(unet, rows, *args, **options):
        if options["num_bands"] == 1:
            return original(unet, rows, *args, **options)
        values = left[0]
        left.reverse()
        loss = next(values)
        return Validation(loss, (loss,) * options["num_bands"], len(rows.samples))

    monkeypatch.setattr(evaluate, "validate", validate)


FALLS_THEN_RISES = [1.0, 0.9, 0.8, 0.7, 0.72, 0.76, 0.8, 0.84, 0.88, 0.92, 0.96]
FALLS = [1.0, 0.9, 0.8, 0.7, 0.65, 0.62, 0.6, 0.58, 0.56, 0.54, 0.52]


def test_a_stage_begins_with_all_of_the_best_checkpoint(tiny_dataset, tmp_path, monkeypatch):
    """Equal to a run whose first stage ended there: weights, moments and averages, in the same second stage."""
    scripted(monkeypatch, [1.0, 0.9, 0.8, 0.85, 0.9, 0.9, 0.9], FALLS)
    stages = [{"epochs": 4}, {"epochs": 1, "start_from": "best"}]
    saves = {"save": {"every_epochs": 1, "every_steps": 0, "keep": 9}, "train": {"ema_decay": 0.9, "max_steps": 0}}
    folder = trained(settings_of(tmp_path / "best", tiny_dataset, stage=stages, **copy.deepcopy(saves)))
    steps = list_checkpoints(folder)
    per_epoch = steps[0]
    (row,) = events(folder, "stage begins from the best")
    assert row["detail"].startswith(f"stage 2 begins from the checkpoint of step {2 * per_epoch}, the best of stage 1")
    assert read_position(folder, steps[-1]).began_from == 2 * per_epoch
    kept, last = state_of(folder, 2 * per_epoch), state_of(folder, 4 * per_epoch)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    # the same weights and moments, moved to the border by hand: the epoch's draws are keyed by its number
    other = tmp_path / "moved"
    scripted(monkeypatch, [1.0, 0.9, 0.8, 0.85, 0.9, 0.9, 0.9], FALLS)
    stages[1]["start_from"] = "last"
    trained(settings_of(other, tiny_dataset, stage=stages, **copy.deepcopy(saves)))
    plain = state_of(other, steps[-1])
    ours = state_of(folder, steps[-1])
    assert any(not torch.equal(plain[name], ours[name]) for name in ours)
    change = sum((ours[name].double() - kept[name].double()).square().sum() for name in kept if "conv_in" in name)
    far = sum((ours[name].double() - last[name].double()).square().sum() for name in kept if "conv_in" in name)
    assert change < far


def test_over_fitting_is_said_once_with_its_epoch_and_the_best_is_kept(tiny_dataset, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, FALLS_THEN_RISES, FALLS)
    stages = [{"epochs": 10}]
    folder = trained(settings_of(tmp_path / "run", tiny_dataset, stage=stages, save={"every_epochs": 1, "keep": 1}))
    (row,) = events(folder, "over-fitting")
    assert "held-out loss has risen by" in row["detail"]
    assert "since epoch 3, while that on training photographs has not" in row["detail"]
    assert "the gap between them has opened since then, from " in row["detail"]
    steps = list_checkpoints(folder)
    position = read_position(folder, steps[-1])
    assert position.best_step in steps
    assert f"the best checkpoint, of step {position.best_step}, is kept" in row["detail"]
    assert position.ended == ()
    page = build_report(folder).read_text()
    loss = page.partition('id="loss"')[2].partition("</section>")[0]
    assert f"Step {row['step']:,}: the run over-fits: held-out loss has risen by" in loss.replace("\xa0", " ")
    assert "the gap between them has opened since" in page
    curves = drawn_charts(page)[0]
    assert curves["marks"] == [[row["epoch"], "over-fitting noticed"]]


def test_what_patience_ends_without_a_warning_may_over_fit_and_how_sure_that_is_is_said():
    rng, epochs = np.random.default_rng(4), np.arange(24, dtype=np.float64)
    rising = 1 - 0.05 * np.minimum(epochs, 4) + 0.004 * np.maximum(0, epochs - 4)
    values = np.stack([rising, 1 - 0.02 * epochs])[..., None] * (1 + 0.05 * rng.standard_normal((2, 24, 2)))
    curve = Curve(epochs, *values)
    assert over_fitting(curve) is None
    sure = int(100 * (1 - doubt(curve)))
    assert 80 <= sure < 99
    assert f"it may over-fit ({sure} % sure, too little for a warning: " in possibly(curve)
    assert f"in at most {100 - sure} of 100 runs" in possibly(curve)
    assert possibly(Curve(epochs, values[1], values[1])) == "", "it falls"
    clear = Curve(epochs, np.repeat(rising[:, None], 2, axis=1), values[1])
    assert over_fitting(clear) is not None
    assert possibly(clear) == "", "it has been said"


@pytest.mark.parametrize("ends", ["stage", "run"])
def test_patience_ends_the_stage_or_the_run(tiny_dataset, tmp_path, monkeypatch, ends):
    scripted(monkeypatch, FALLS_THEN_RISES, FALLS)
    stages = [{"epochs": 10, "schedule": "linear", "validate": {"patience": 3, "patience_ends": ends}}, {"epochs": 2}]
    folder = trained(settings_of(tmp_path / "run", tiny_dataset, stage=stages))
    (row,) = events(folder, "stage ended early")
    num_epochs = int(row["epoch"])
    assert 6 <= num_epochs <= 8
    since = int(row["detail"].split("last became better at epoch ")[1].split(",")[0])
    waited = f"and has not in {num_epochs - since} validations ({num_epochs - since} epochs) since; it has risen by "
    assert waited in row["detail"]
    assert "and that on training photographs has fallen by " in row["detail"]
    position = read_position(folder, list_checkpoints(folder)[-1])
    assert position.ended == (((0, num_epochs),) if ends == "stage" else ((0, num_epochs), (1, 0)))
    assert position.epoch == num_epochs + (2 if ends == "stage" else 0)
    # the report knows the lengths, and each step's rate: the schedule spans the planned stage
    read = read_run_folder(folder)
    assert ending(read).kind == "finished"
    assert [stage for _, stage in stage_starts(read)] == ([1] if ends == "stage" else [])
    epochs, rates = learning_rates(read)
    assert epochs[-1] == position.epoch
    logged = read.metrics.train
    assert rates[np.isclose(epochs, logged["epoch"][-1])] == pytest.approx(logged["lr"][-1:])
    assert 0.2 < rates[epochs <= num_epochs][-1] / 1e-3 < 0.5
    if ends == "stage":
        assert pick_step(folder, f"{num_epochs}+2") == position.step
    # finished: it is left as it is, and says how to train on
    result = train.train(parse_config(settings_of(folder, tiny_dataset, stage=stages), "test"), resume=True)
    assert result.was_finished


@pytest.mark.long
def test_a_run_that_patience_ended_goes_on_with_another_stage_as_it_says(tiny_dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, FALLS_THEN_RISES, FALLS)
    stages = [{"epochs": 10, "validate": {"patience": 3, "patience_ends": "run"}}, {"epochs": 2}]
    folder = trained(settings_of(tmp_path / "run", tiny_dataset, stage=stages))
    before = list_checkpoints(folder)[-1]
    said = call("train", folder, "--resume").line("is finished, at step")
    words = said.split("for example: safelight ")[1].split()
    monkeypatch.undo()
    assert call(*words).status == 0
    assert list_checkpoints(folder)[-1] > before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": [{"epochs": 1, "start_from": "best"}]}, "stage.0.start_from 'best' has no stage before it"),
        (
            {"stage": [{"epochs": 1, "validate": {"every_epochs": 0}}, {"epochs": 1, "start_from": "best"}]},
            "stage.1.start_from 'best' needs validation in the stage before it",
        ),
        (
            {"stage": [{"epochs": 1}, {"epochs": 1, "start_from": "best"}], "data": {"validation_fraction": 0}},
            "start_from 'best' needs held-out photographs",
        ),
        (
            {"validate": {"patience": 3, "every_epochs": 5}},
            "validate.patience 3 is shorter than validate.every_epochs 5",
        ),
        ({"validate": {"patience": 3, "every_epochs": 0}}, "validate.patience 3 needs held-out loss"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        parse_config(changes, "here")


def test_a_best_checkpoint_that_is_gone_is_said_with_the_way_on(tiny_dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, [1.0, 0.8, 0.9], FALLS)
    stages = [{"epochs": 2}, {"epochs": 1, "start_from": "best"}]
    settings = settings_of(tmp_path / "run", tiny_dataset, stage=stages, save={"every_epochs": 1, "keep": 1})
    stopped = iter([False] * 10_000)
    config = parse_config(settings, "test")

    def at_the_border(job, position):
        raise RuntimeError

    monkeypatch.setattr(train, "begin_from_best", at_the_border)
    with pytest.raises(RuntimeError):
        train.train(config, stop_requested=lambda: next(stopped))
    monkeypatch.undo()
    folder = Path(config.run.dir)
    best, border = list_checkpoints(folder)
    assert read_position(folder, border).stage_best_step == best, "it is kept beside the newest one"
    folder_of(folder, best).rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"which is gone; put it back, or resume with --stage\.1\.start-from last"):
        train.train(config, resume=True)


def test_the_best_of_a_stage_is_found_when_a_resume_asks_for_it(tmp_path):
    stages = [{"epochs": 2}, {"epochs": 2}, {"epochs": 1, "start_from": "best"}]
    config = parse_config({"stage": stages}, "here")
    timeline = Timeline(tuple(config.stages()), (StageSteps(2, (3,)), StageSteps(2, (3,)), StageSteps(1, (3,))), 0)
    run = SimpleNamespace(run_dir=tmp_path, user_config=config)

    def recorded(losses):
        rows = [{"kind": "validation", "split": "held_out", "step": s, "loss": x} for s, x in losses.items()]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")

    def kept(step):
        folder_of(tmp_path, step).mkdir(parents=True)
        (folder_of(tmp_path, step) / "state.json").touch()

    border, within = Position(step=12, epoch=4, stage=1), Position(step=9, epoch=3, stage=1)
    with pytest.raises(UserError, match=r"which was never validated; resume with --stage\.2\.start-from last"):
        with_stage_best(run, timeline, border)
    assert with_stage_best(run, timeline, within) == within
    # neither those of other stages nor those after the checkpoint count
    recorded({6: 0.1, 9: 0.4, 12: 0.5, 15: 0.2})
    for position in (within, border):
        with pytest.raises(
            UserError, match=r"step-00000009, which was not kept; resume with --stage\.2\.start-from last"
        ):
            with_stage_best(run, timeline, position)
    kept(9)
    for position in (within, border):
        found = with_stage_best(run, timeline, position)
        assert (found.stage_best_step, found.stage_best_loss) == (9, 0.4)
    # what the position holds is as good; it is missed where it is needed at once
    known = replace(border, stage_best_step=10, stage_best_loss=0.4)
    with pytest.raises(UserError, match="step-00000010, which is gone; put it back"):
        with_stage_best(run, timeline, known)
    kept(10)
    assert with_stage_best(run, timeline, known) == known
    # the first stage is followed by one that goes on
    assert with_stage_best(run, timeline, Position(step=6, epoch=2, stage=0)).stage_best_step == -1


@pytest.mark.long
def test_a_finished_run_gets_a_stage_from_its_best_checkpoint(tiny_dataset, tmp_path, monkeypatch):
    """The best of its last stage is kept although nothing begins from it yet, and another one is the run's best."""
    scripted(monkeypatch, [1.0, 0.5, 0.8, 0.9, 0.9, 0.9], FALLS)
    stages = [{"epochs": 1}, {"epochs": 3}]
    settings = settings_of(tmp_path / "run", tiny_dataset, stage=stages, save={"every_epochs": 1, "keep": 1})
    folder = trained(copy.deepcopy(settings))
    per_epoch = list_checkpoints(folder)[0]
    assert list_checkpoints(folder) == [per_epoch, 2 * per_epoch, 4 * per_epoch]
    settings["stage"] = [*stages, {"epochs": 1, "start_from": "best"}]
    config = parse_config(settings, "test")
    # what a run of an earlier version has: it is gone
    aside = tmp_path / "aside"
    folder_of(folder, 2 * per_epoch).rename(aside)
    with pytest.raises(
        UserError, match=r"its checkpoints that there are: step \d+\): safelight train .* --resume"
    ) as said:
        train.train(config, resume=True)
    command = str(said.value).split("safelight train ")[1]
    assert command.endswith("--resume --stage.2.epochs 1 --stage.2.start-from last")
    shutil.copytree(folder, tmp_path / "other")
    aside.rename(folder_of(folder, 2 * per_epoch))
    train.train(config, resume=True)
    (row,) = events(folder, "stage begins from the best")
    assert row["detail"].startswith(f"stage 3 begins from the checkpoint of step {2 * per_epoch}, the best of stage 2")
    words = command.replace(str(folder), str(tmp_path / "other")).split()
    monkeypatch.undo()
    assert call("train", *words, "--run.dir", tmp_path / "other").status == 0
    assert list_checkpoints(tmp_path / "other")[-1] == 5 * per_epoch


@pytest.mark.slow
def test_a_run_on_few_photographs_at_a_high_rate_is_caught_and_its_best_checkpoint_kept(tiny_dataset, tmp_path):
    """What the second stage of the project's first run did: 4 photographs, learnt by heart by the trained tiny base.

    Validations of weights that have taken two steps an epoch scatter by a twentieth, and half of that carries over.
    """
    settings = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3, "device": "cpu"},
        "model": {"base": "tiny"},
        "data": {"path": str(tiny_dataset), "resolution": 64, "validation_fraction": 0.83, "upscale": "always"},
        "train": {"batch_size": 4, "epochs": 120},
        "optimizer": {"name": "adamw", "lr": 3e-4},
        "validate": {"every_epochs": 2, "max_images": 16, "patience": 72, "patience_ends": "run"},
        "sample": {"every_epochs": 0},
        "save": {"every_epochs": 0, "keep": 1},
        "log": {"tensorboard": False},
    }
    folder = trained(settings)
    held_out = {
        r["epoch"]: r["loss"] for r in metrics(folder) if r["kind"] == "validation" and r["split"] == "held_out"
    }
    (found,), (ended,) = events(folder, "over-fitting"), events(folder, "stage ended early")
    lowest = min(held_out, key=held_out.get)
    said = float(found["detail"].split("since epoch ")[1].split(" ")[0].rstrip(","))
    assert abs(said - lowest) <= 8
    assert found["epoch"] <= lowest + 66
    assert held_out[max(held_out)] > 1.1 * held_out[lowest]
    assert lowest + 60 <= ended["epoch"] < 120
    assert "last became better at epoch " in ended["detail"]
    position = read_position(folder, list_checkpoints(folder)[-1])
    assert position.best_step in list_checkpoints(folder)
    assert "the run over-fits: held-out loss has risen by" in build_report(folder).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_healthy_run_is_not_said_to_over_fit(tmp_path, seed):
    """As in the demo, with half of its photographs: both losses fall, then stay level."""
    draw_photos(tmp_path / "photos", 100)
    for number in range(100):
        written = tmp_path / "photos" / photo_name(number)
        written.with_suffix(".txt").write_text(caption(scene_of(number), 7, number))
    ingest([tmp_path / "photos"], tmp_path / "dataset")
    settings = {
        "run": {"dir": str(tmp_path / "run"), "seed": seed, "device": "cpu"},
        "model": {"base": "tiny"},
        "data": {"path": str(tmp_path / "dataset"), "resolution": 64, "validation_fraction": 0.2},
        "train": {"batch_size": 8, "epochs": 14},
        "optimizer": {"lr": 1e-4},
        "validate": {"every_epochs": 1, "max_images": 16},
        "sample": {"every_epochs": 0},
        "save": {"every_epochs": 0, "keep": 1},
        "log": {"tensorboard": False},
    }
    folder = trained(settings)
    assert events(folder, "over-fitting") == []
    held_out = [r["loss"] for r in metrics(folder) if r["kind"] == "validation" and r["split"] == "held_out"]
    assert len(held_out) == 15
    assert held_out[-1] < held_out[0]
