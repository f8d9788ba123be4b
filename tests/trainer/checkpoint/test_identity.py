"""Which changes of a config make another run of it, and how that is told."""

import json

import pytest

from safelight.trainer.checkpoint.identity import Identity, identify
from safelight.trainer.config.toml import parse_config

RUN = {
    "optimizer": {"lr": 1e-3, "name": "adamw"},
    "train": {"batch_size": 4},
    "stage": [{"epochs": 2}, {"epochs": 1, "lr": 1e-4}],
}


def difference(stage: int, /, **changes: dict | list) -> str:
    """Return what a config with tables changed is told by a checkpoint of RUN that stands in a stage."""
    changed = {**RUN}
    for table, values in changes.items():
        changed[table] = {**RUN.get(table, {}), **values} if isinstance(values, dict) else values
    reached = identify(parse_config(RUN, "here"), "fp32")
    here = identify(parse_config(changed, "here"), "fp32")
    return here.difference(Identity(**json.loads(json.dumps(vars(reached)))), stage)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": {"seed": 5}}, "run.seed is 5 here and 20230801 there"),
        ({"model": {"base": "random:small"}}, "model.base is 'random:small' here and 'tiny' there"),
        ({"optimizer": {"name": "adamw8bit"}}, "optimizer.name is 'adamw8bit' here and 'adamw' there"),
        ({"optimizer": {"betas": [0.8, 0.999]}}, "optimizer.betas is [0.8, 0.999] here and [0.9, 0.999] there"),
        ({"data": {"caption_dropout": 0.5}}, "data.caption_dropout is 0.5 here and 0.04 there"),
        ({"loss": {"min_snr_gamma": 5}}, "loss.min_snr_gamma is 5.0 here and 0.0 there"),
        ({"loss": {"kind": "huber"}}, "loss.kind is 'huber' here and 'mse' there"),
        ({"loss": {"weighting": "debiased"}}, "loss.weighting is 'debiased' here and 'none' there"),
        ({"optimizer": {"lr": 2e-3}}, "stage 1's lr is 0.002 here and 0.001 there"),
        ({"train": {"batch_size": 2}}, "stage 1's batch_size is 2 here and 4 there"),
        (
            {"stage": [{"epochs": 3}]},
            "stage 1's epochs is 3 here and 2 there, and a stage that has begun keeps its length: add a [[stage]] to train longer",
        ),
    ],
)
def test_a_change_of_what_was_trained_is_named(changes, expected):
    assert difference(0, **changes) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run": {"dir": "elsewhere", "device": "cuda"}},
        {"data": {"path": "elsewhere"}},
        {"train": {"max_steps": 9, "checkpointing": "full", "epochs": 7}},
        {"sample": {"prompts": ["a cat"], "steps": 9}},
        {"loss": {"weighting": "none", "huber_delta": 0.5, "p2_gamma": 0.5}},
        {"validate": {"every_epochs": 5}},
        {"save": {"keep": 9}},
        {"log": {"every_steps": 1, "tensorboard": False}},
        {"stage": [{"epochs": 2, "lr": 1e-3}, {"epochs": 9, "lr": 1e-5, "batch_size": 1}]},
        {"stage": [{"epochs": 2}]},
        {"stage": [*RUN["stage"], {"epochs": 9}]},
    ],
)
def test_what_is_still_to_come_and_what_is_only_shown_may_change(changes):
    assert difference(0, **changes) == ""


def test_a_stage_that_was_reached_is_fixed():
    later = {"stage": [{"epochs": 2}, {"epochs": 1, "lr": 1e-5}]}
    assert difference(0, **later) == ""
    assert difference(1, **later) == "stage 2's lr is 1e-05 here and 0.0001 there"
    assert difference(1, stage=[{"epochs": 2}]) == "stage 2, which it has reached, is missing here"


@pytest.mark.parametrize(
    ("old", "same", "other"),
    [
        ({}, {"weighting": "none"}, {"kind": "huber"}),
        ({}, {"huber_delta": 0.1}, {"weighting": "p2"}),
        ({"min_snr_gamma": 5}, {"weighting": "min_snr", "min_snr_gamma": 5}, {"min_snr_gamma": 5, "kind": "huber"}),
        ({"min_snr_gamma": 5}, {"min_snr_gamma": 5}, {"weighting": "p2"}),
    ],
)
def test_a_checkpoint_from_before_there_was_a_choice_of_losses(old, same, other):
    reached = identify(parse_config({**RUN, "loss": old}, "here"), "fp32")
    names = ("loss.prediction", "loss.min_snr_gamma", "loss.offset_noise", "loss.zero_terminal_snr")
    settings = {k: v for k, v in reached.settings.items() if not k.startswith("loss.") or k in names}
    before = Identity(settings, reached.stages, reached.data)
    assert identify(parse_config({**RUN, "loss": same}, "here"), "fp32").difference(before, 0) == ""
    assert identify(parse_config({**RUN, "loss": other}, "here"), "fp32").difference(before, 0) != ""


def test_a_parameter_counts_where_its_loss_is_chosen():
    def of(delta: float) -> Identity:
        loss = {"kind": "huber", "huber_delta": delta}
        return identify(parse_config({**RUN, "loss": loss}, "here"), "fp32")

    assert of(0.1).difference(of(0.2), 0) == "loss.huber_delta is 0.1 here and 0.2 there"


def test_auto_precision_is_compared_by_what_it_came_to():
    auto, explicit = (parse_config({"model": {"precision": name}}, "here") for name in ("auto", "bf16"))
    assert identify(explicit, "bf16").difference(identify(auto, "bf16"), 0) == ""
    assert (
        identify(auto, "fp32").difference(identify(auto, "bf16"), 0)
        == "model.precision is 'fp32' here and 'bf16' there"
    )
