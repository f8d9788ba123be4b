"""What a resume may change of a run: at an epoch's end what a stage may override; else the message says what to do."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.errors import UserError
from safelight.trainer.checkpoint.changed_settings import changes_between, flattened, with_changes
from safelight.trainer.checkpoint.files import Position, folder_of, list_checkpoints
from safelight.trainer.checkpoint.identity import identify
from safelight.trainer.config.schema import changed_settings
from safelight.trainer.config.toml import load_config, parse_config, to_toml
from safelight.trainer.loading.notes import notes_of
from safelight.trainer.report.build import build_report
from safelight.trainer.train import train
from tests.called import call
from tests.small_base import small_base
from tests.trainer.equal_runs import metrics
from tests.trainer.report.charts import drawn_charts

EPOCHS = {"train": {"epochs": 6}}
BORDER = Position(step=6, epoch=2, step_in_epoch=0)


def resumed(before: dict, now: dict, position: Position = BORDER, folder: Path = Path("run")):
    checkpoint = identify(parse_config(before, "here"), "fp32")
    return with_changes(parse_config(now, "here"), checkpoint, position, folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"epochs": 6, "batch_size": 8}}, "train.batch_size 8 instead of 4"),
        ({"train": {"epochs": 6, "accumulate": 2}}, "train.accumulate 2 instead of 1"),
        ({"optimizer": {"schedule": "cosine"}}, 'optimizer.schedule "cosine" instead of "constant"'),
        ({"optimizer": {"weight_decay": 0.5, "lr": 1e-5}}, "optimizer.weight_decay 0.5 instead of 0.01"),
        ({"loss": {"offset_noise": 0.1}}, "loss.offset_noise 0.1 instead of 0.0"),
        ({"loss": {"kind": "huber"}}, 'loss.kind "huber" instead of "mse"'),
        ({"data": {"caption_dropout": 0.5}}, "data.caption_dropout 0.5 instead of 0.04"),
    ],
)
def test_at_an_epochs_end_a_stage_is_cut_for_changed_settings(changes, said):
    config, cuts = resumed(EPOCHS, {**EPOCHS, **changes})
    assert cuts[0] == said
    assert cuts[-1] == "stage 1 is cut after 2 epochs; the rest of it, 4 epochs, is stage 2"
    first, second = config.stages()
    assert (first.epochs, second.epochs) == (2, 4)
    before, now = parse_config(EPOCHS, "here"), parse_config({**EPOCHS, **changes}, "here")
    # what was trained stays what it was, and what is to come is as the settings say
    assert changed_settings(before, first.config) == []
    assert changed_settings(now, second.config) == []
    checkpoint = identify(before, "fp32")
    assert identify(config, "fp32").difference(checkpoint, 0, num_epochs=2) is None
    # the settings file holds all of it, and a second resume cuts nothing
    again = parse_config(tomllib.loads(to_toml(config)), "there")
    assert with_changes(again, identify(config, "fp32"), Position(step=9, epoch=3, stage=1), Path("run"))[1] == []


def test_more_processes_than_micro_batches_say_so(monkeypatch):
    """train.accumulate is raised to the number of processes, which the user did not set."""
    position = Position(step=7, epoch=2, step_in_epoch=1)
    both = [{**EPOCHS, "train": {"epochs": 6, "accumulate": number}} for number in (2, 3)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    why = "(train.accumulate is 2 in the checkpoint, but 3 processes need at least 3: use at most 2 processes)"
    with pytest.raises(UserError, match=rf"^train\.accumulate {re.escape(why)} cannot"):
        resumed(*both, position)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^train\.accumulate cannot change in the middle"):
        resumed(*both, position)


def test_stages_behind_keep_their_values_and_those_to_come_get_the_new_ones():
    stages = {"stage": [{"epochs": 2}, {"epochs": 4}, {"epochs": 1, "batch_size": 2}, {"epochs": 1}]}
    position = Position(step=20, epoch=4, stage=1)
    config, _ = resumed(stages, {**stages, "train": {"batch_size": 9}}, position)
    assert [(stage.epochs, stage.batch_size) for stage in config.stages()] == [(2, 4), (2, 4), (2, 9), (1, 2), (1, 9)]
    # at the border of two stages there is nothing to cut
    config, cuts = resumed(stages, {**stages, "train": {"batch_size": 9}}, Position(step=9, epoch=2, stage=0))
    assert [(stage.epochs, stage.batch_size) for stage in config.stages()] == [(2, 4), (4, 9), (1, 2), (1, 9)]
    assert cuts == []


def test_a_run_that_is_over_takes_a_change_only_with_more_epochs():
    over = Position(step=18, epoch=6, step_in_epoch=0)
    checkpoint = identify(parse_config(EPOCHS, "here"), "fp32")
    config, cuts = resumed(EPOCHS, {"train": {"epochs": 6, "batch_size": 9}}, over)
    # nothing is left to train with it, and it is refused
    assert cuts == []
    assert "batch_size is 9, but 4" in identify(config, "fp32").difference(checkpoint, 0, num_epochs=6).text
    config, cuts = resumed(EPOCHS, {"train": {"epochs": 8, "batch_size": 9}}, over)
    assert [(stage.epochs, stage.batch_size) for stage in config.stages()] == [(6, 4), (2, 9)]
    assert cuts[0] == "train.batch_size 9 instead of 4"
    assert identify(config, "fp32").difference(checkpoint, 0, num_epochs=6) is None
    # or with a stage to come
    stages = {"stage": [{"epochs": 6}, {"epochs": 2}], "train": {"batch_size": 9}}
    config, cuts = resumed(EPOCHS, stages, over)
    assert [(stage.epochs, stage.batch_size) for stage in config.stages()] == [(6, 4), (2, 9)]


def test_a_stage_that_ended_early_counts_as_long_as_it_was():
    stages = {"stage": [{"epochs": 9}, {"epochs": 4}]}
    position = Position(step=20, epoch=5, stage=1, ended=((0, 3),))
    config, cuts = resumed(stages, {**stages, "train": {"batch_size": 9}}, position)
    assert [(stage.epochs, stage.batch_size) for stage in config.stages()] == [(9, 4), (2, 4), (2, 9)]
    assert cuts[-1] == "stage 2 is cut after 2 epochs; the rest of it, 2 epochs, is stage 3"


@pytest.mark.parametrize(
    ("before", "position", "message"),
    [
        (
            {"optimizer": {"schedule": "cosine"}},
            BORDER,
            "cannot change within stage 1: its learning rate follows a cosine schedule over all of the stage's steps, "
            "whose number would change; a new run can go on from its weights: safelight export run --checkpoint 6",
        ),
        (
            {"optimizer": {"warmup_steps": 50}},
            BORDER,
            "cannot change before the warm-up of stage 1 has ended, after 50",
        ),
        (
            {},
            Position(step=7, epoch=2, step_in_epoch=1),
            "cannot change in the middle of an epoch, because its batches",
        ),
    ],
)
def test_what_cannot_change_says_why_and_what_can(before, position, message):
    both = [{**EPOCHS, **before, "train": {"epochs": 6, "batch_size": size}} for size in (4, 8)]
    with pytest.raises(UserError) as caught:
        resumed(*both, position)
    assert message in str(caught.value)
    assert "train.batch_size cannot change" in str(caught.value)


TEXT = {"text_encoder": {"train": True, "schedule": "linear", "epochs": 4}}


@pytest.mark.parametrize(
    ("before", "changed", "position", "message"),
    [
        ({"epochs": 6}, {"batch_size": 8}, BORDER, "train.batch_size cannot change while the text encoder is trained"),
        ({"epochs": 6}, {"accumulate": 2}, BORDER, "train.accumulate cannot change while the text encoder is trained"),
        # its training is over
        ({"epochs": 6}, {"batch_size": 8}, Position(step=12, epoch=4), ""),
        # it learns in none of the epochs to come that change
        ({"epochs": 6}, {"epochs": 8}, BORDER, ""),
    ],
)
def test_the_text_encoders_schedule_keeps_its_steps(before, changed, position, message):
    one, other = ({**TEXT, "train": values} for values in (before, {**before, **changed}))
    if not message:
        resumed(one, other, position)
        return
    with pytest.raises(UserError) as caught:
        resumed(one, other, position)
    assert message in str(caught.value)
    assert "safelight export run --checkpoint 6" in str(caught.value)
    # a constant rate has no span
    constant = {"text_encoder": {**TEXT["text_encoder"], "schedule": "constant"}}
    assert resumed({**one, **constant}, {**other, **constant}, position)[1]


def test_stages_to_come_keep_the_text_encoders_steps():
    def stages(*lengths, size=4):
        return {**TEXT, "stage": [{"epochs": lengths[0]}, {"epochs": lengths[1], "batch_size": size}]}

    first = Position(step=3, epoch=1)
    with pytest.raises(UserError, match=r"train.batch_size cannot change while the text encoder is trained"):
        resumed(stages(2, 4), stages(2, 4, size=8), first)
    with pytest.raises(UserError, match=r"train.epochs cannot change while the text encoder is trained"):
        resumed(stages(2, 4, size=2), stages(3, 4, size=2), first)
    # of equal batches, or with a change after its training
    resumed(stages(2, 4), stages(3, 4), first)
    resumed(stages(4, 4), stages(4, 4, size=8), first)
    resumed(stages(2, 4), {**stages(2, 4), "loss": {"offset_noise": 0.1}}, first)


def test_a_run_whose_text_encoder_follows_a_schedule_is_lengthened_without_it():
    text = {"train": True, "schedule": "linear"}
    one, other = ({"train": {"epochs": num}, "text_encoder": text} for num in (6, 8))
    with pytest.raises(UserError, match=r"follows a linear schedule over 6 epochs.*--text-encoder.epochs 6"):
        resumed(one, other)
    other["text_encoder"] = {**text, "epochs": 6}
    config, _ = resumed(one, other)
    assert identify(config, "fp32").difference(identify(parse_config(one, "here"), "fp32"), 0, num_epochs=2) is None


def test_a_new_rate_of_the_run_leaves_that_of_stages_behind():
    stages = {"stage": [{"epochs": 2}, {"epochs": 4, "lr": 3e-6}, {"epochs": 1}], "optimizer": {"lr": 1e-6}}
    position = Position(step=9, epoch=3, stage=1)
    config, cuts = resumed(stages, {**stages, "optimizer": {"lr": 2e-6}}, position)
    assert [stage.lr for stage in config.stages()] == [1e-6, 3e-6, 2e-6]
    assert cuts == []
    before = flattened(parse_config(stages, "here"))
    assert changes_between(before, flattened(config)) == ["optimizer.lr 2e-06 instead of 1e-06"]


def test_a_finished_run_is_lengthened_with_other_values(tmp_path):
    before = {"train": {"epochs": 2}, "optimizer": {"lr": 1e-6}}
    now = {"train": {"epochs": 4, "batch_size": 2}, "optimizer": {"lr": 1e-5}}
    config, _ = resumed(before, now)
    stages = config.stages()
    assert [(stage.epochs, stage.batch_size, stage.lr) for stage in stages] == [(2, 4, 1e-6), (2, 2, 1e-5)]
    assert changes_between(flattened(parse_config(before, "here")), flattened(config)) == [
        "train.batch_size 2 instead of 4",
        "train.epochs 4 instead of 2",
        "optimizer.lr 1e-05 instead of 1e-06",
        "stage.0.epochs 2",
        "stage.1.epochs 2",
    ]
    assert not [note for note in notes_of(config, "cpu") if "no effect" in note]
    # the rest begins without a second warm-up, if there was one
    before["optimizer"]["warmup_steps"] = now["optimizer"]["warmup_steps"] = 3
    (tmp_path / "data.json").write_text(json.dumps({"stages": [{"epochs": 2, "steps_per_epoch": [3]}]}))
    config, _ = resumed(before, now, folder=tmp_path)
    assert [stage.warmup_steps for stage in config.stages()] == [3, 0]


def test_epochs_to_come_may_become_fewer_where_the_rate_is_constant():
    long, short, other = ({"train": {"epochs": num}} for num in (6, 3, 2))
    checkpoint = identify(parse_config(long, "here"), "fp32")
    assert identify(parse_config(short, "here"), "fp32").difference(checkpoint, 0, num_epochs=3) is None
    # three have begun
    assert identify(parse_config(other, "here"), "fp32").difference(checkpoint, 0, num_epochs=3) is not None
    assert identify(parse_config(short, "here"), "fp32").difference(checkpoint, 0) is not None


def test_changes_are_put_in_words():
    one = flattened(parse_config({"stage": [{"epochs": 2}]}, "here"))
    other = flattened(
        parse_config(
            {
                "run": {"dir": "elsewhere", "title": "x"},
                "sample": {"steps": 9},
                "stage": [{"epochs": 3}, {"epochs": 1, "loss": {"kind": "huber"}}],
            },
            "here",
        )
    )
    assert changes_between(one, one) == []
    assert changes_between(one, other) == [
        "stage.0.epochs 3 instead of 2",
        "sample.steps 9 instead of 25",
        "stage.1.epochs 1",
        'stage.1.loss.kind "huber"',
    ]
    # a setting that an older version did not have
    assert changes_between({k: v for k, v in one.items() if k != "save.keep"}, one) == []


def settings_of(folder: Path, dataset: Path, **more) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {"path": str(dataset), "resolution": 64, "max_aspect": 1.0, "upscale": "always"},
        "train": {"batch_size": 8, "epochs": 4, **more.pop("train", {})},
        "optimizer": {"lr": 1e-4, "name": "adamw", **more.pop("optimizer", {})},
        "sample": {"every_epochs": 0},
        "validate": {"timesteps": 2, "max_images": 4},
        "save": {"keep": 9},
        "log": {"every_steps": 1, "tensorboard": False},
        **more,
    }


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    place = folder_of(folder, step)
    return {**load_file(place / "unet/diffusion_pytorch_model.safetensors"), **load_file(place / "state.safetensors")}


@pytest.mark.long
def test_a_batch_size_changed_on_resume_equals_a_run_that_had_it_from_there_on(tiny_dataset, tmp_path):
    """3 steps an epoch, then 6. In mid-epoch it is refused with the command that goes to the epoch's end."""
    alone, folder = tmp_path / "alone", tmp_path / "changed"
    stages = [{"epochs": 2}, {"epochs": 2, "batch_size": 4}]
    train(parse_config(settings_of(alone, tiny_dataset, stage=stages), "test"))
    train(parse_config(settings_of(folder, tiny_dataset, train={"max_steps": 5}), "test"))
    config = folder / "config.toml"
    change = ["--train.batch-size", "4"]
    refused = call("train", config, "--resume", "--train.max-steps", "0", *change)
    refused.assert_refused("train", "train.batch_size cannot change in the middle of an epoch")
    first = refused.err.split("train to the epoch's end first: safelight ")[1].split("; then")[0]
    assert first.endswith("--train.max-steps 6")
    assert call(*shlex.split(first)).status == 0
    done = call("train", config, "--resume", "--train.max-steps", "0", *change)
    assert done.status == 0
    done.line("from here on train.batch_size 4 instead of 8; stage 1 is cut after 2 epochs; ")
    last = list_checkpoints(alone)[-1]
    assert list_checkpoints(folder)[-1] == last == 6 + 2 * 6
    one, other = tensors(alone, last), tensors(folder, last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [
        [(r["step"], r["loss"]) for r in metrics(f) if r["kind"] == "train" and r["step"] > 6] for f in (alone, folder)
    ]
    assert lines[0] == lines[1]
    # recorded where a reader looks
    (event,) = [
        row for row in metrics(folder) if row.get("event") == "settings changed" and "batch_size" in row["detail"]
    ]
    assert event["step"] == 6
    assert "train.batch_size 4 instead of 8" in event["detail"]
    record = json.loads((folder / "environment.json").read_text())
    assert any("train.batch_size 4 instead of 8" in line for line in record["changed_settings"]["6"])
    assert [stage.epochs for stage in load_config(config).stages()] == [2, 2]
    page = build_report(folder).read_text()
    assert "train.batch_size 4 instead of 8" in page
    assert [2.0, "settings changed"] in drawn_charts(page)[0]["marks"]


@pytest.mark.slow
def test_what_cannot_change_goes_on_from_the_weights_by_the_command_that_is_given(tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    settings = settings_of(folder, tiny_dataset, train={"max_steps": 6}, optimizer={"schedule": "cosine"})
    train(parse_config(settings, "test"))
    refused = call("train", folder / "config.toml", "--resume", "--train.max-steps", "9", "--train.batch-size", "4")
    refused.assert_refused("train", "follows a cosine schedule")
    export, again = refused.err.split("from its weights: ")[1].split(", with the change")[0].split(" && ")
    assert call(*shlex.split(export)[1:]).status == 0
    assert call(*shlex.split(again)[1:], "--train.batch-size", "4", "--train.max-steps", "1").status == 0
    # it begins where the first run stood
    losses = [
        next(r["loss"] for r in metrics(f) if r["kind"] == "validation" and r["step"] == s)
        for f, s in ((folder, 6), (tmp_path / "run-2", 0))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
