"""What a [[stage]] may override, on every way a setting can be given; what it cannot is refused with the reason."""

import tomllib
from typing import get_args

import pytest

from safelight.options.overrides import take_overrides, with_overrides
from safelight.trainer.checkpoint.identity import Identity, identify
from safelight.trainer.config.schema import FLAT_TABLES, NESTED_TABLES, Config, Stage, changed_settings
from safelight.trainer.config.stage_settings import attribute_of, overridable, why_per_run
from safelight.trainer.config.toml import parse_config, to_toml

SECTIONS = {field.alias or name: field.annotation for name, field in Config.model_fields.items() if name != "stage"}
OVERRIDABLE = [
    (table, name)
    for table in (*FLAT_TABLES, *NESTED_TABLES)
    for name in overridable({**FLAT_TABLES, **NESTED_TABLES}[table])
]
PER_RUN = [
    (table, name)
    for table, section in SECTIONS.items()
    for name in section.model_fields
    if (table, name) not in OVERRIDABLE and (table, name) != ("train", "epochs")
]


def in_stage(table: str, values: dict) -> dict:
    return values if table in FLAT_TABLES else {table: values}


def test_a_stage_overrides_what_the_issue_lists():
    names = {f"{table}.{name}" for table, name in OVERRIDABLE}
    flat = {"train.batch_size", "train.accumulate", "train.max_grad_norm"}
    flat |= {f"optimizer.{name}" for name in ("lr", "weight_decay", "schedule", "warmup_steps")}
    nested = {"data.caption_dropout", "loss.kind", "loss.weighting", "loss.offset_noise", "validate.every_epochs"}
    nested |= {"sample.every_epochs", "sample.sampler", "sample.steps", "save.every_epochs", "save.keep"}
    assert flat | nested <= names


@pytest.mark.parametrize(("table", "name"), OVERRIDABLE)
def test_a_value_of_a_stage_replaces_the_runs_in_that_stage_alone(table, name):
    """Given in a file or by an option; written to config.toml and read back; the settings of other stages are kept."""
    value = other_value(table, name)
    config = parse_config({"stage": [{"epochs": 1}, {"epochs": 1, **in_stage(table, {name: value})}]}, "here")
    first, second = config.stages()
    assert changed_settings(config, first.config) == []
    assert changed_settings(config, second.config) == [
        f"{table}.{name} {getattr(section_of(second.config, table), name)}"
    ]
    if table in FLAT_TABLES:
        assert second.flat()[name] == value
    assert parse_config(tomllib.loads(to_toml(config)), "there") == config
    words = [f"--stage.1.{'' if table in FLAT_TABLES else f'{table}.'}{name}".replace("_", "-"), str(value)]
    rest, overrides = take_overrides(words)
    assert rest == []
    plain = parse_config({"stage": [{"epochs": 1}, {"epochs": 1}]}, "here").model_dump(by_alias=True)
    assert parse_config(with_overrides(plain, overrides), "here") == config


def section_of(config: Config, table: str):
    return getattr(config, attribute_of(table))


def other_value(table: str, name: str) -> object:
    """Return a valid value of a setting that is not its default and needs no other setting."""
    section = SECTIONS[table]
    default = section.model_fields[name].default
    choices = [choice for choice in get_args(section.model_fields[name].annotation) if isinstance(choice, str)]
    for value in (*choices, 3, 0.5, 1, not default, "1"):
        try:
            parse_config({"stage": [{"epochs": 1}, {"epochs": 1, **in_stage(table, {name: value})}]}, "here")
        except ValueError:
            continue
        if value != default and section.model_validate({name: value}) != section():
            return value
    raise AssertionError(f"{table}.{name}: no value is known that differs from {default!r}")


@pytest.mark.parametrize(("table", "name"), PER_RUN)
def test_what_a_stage_cannot_override_is_refused_by_name_with_the_reason(table, name):
    values = {"epochs": 1, **in_stage(table, {name: SECTIONS[table].model_fields[name].default})}
    with pytest.raises(ValueError, match=r"^run.toml: stage\.0\.") as caught:
        parse_config({"stage": [values]}, "run.toml")
    assert "cannot differ between stages: " in str(caught.value)
    assert len(why_per_run(SECTIONS[table], name)) > 10
    assert table in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"checkpointing": "full"},
            "stage.0.checkpointing: train.checkpointing cannot differ between stages: the UNet",
        ),
        (
            {"loss": {"prediction": "epsilon"}},
            "stage.0.loss.prediction: loss.prediction cannot differ between stages: a",
        ),
        ({"max_steps": 3}, "train.max_steps cannot differ between stages: it limits the run; set the stage's epochs"),
        ({"model": {"base": "x"}}, "stage.0.model: model cannot differ between stages: a run has one model"),
        (
            {"optimizer": {"lr": 1e-4}},
            "stage.0.optimizer: a stage has the settings of [optimizer] by their own names: lr",
        ),
        (
            {"loss": {"offset_nois": 0.1}},
            "stage.0.loss.offset_nois is not a setting; did you mean stage.0.loss.offset_noi",
        ),
        ({"loss": 0.1}, "stage.0.loss = 0.1: expected a table, [stage.0.loss]"),
        ({"loss": {"offset_noise": 2}}, "stage.0.loss.offset_noise = 2: expected at most 1"),
        ({"loss": {"weighting": "min_snr"}}, "stage.0: loss.weighting 'min_snr' needs a loss.min_snr_gamma above 0"),
    ],
)
def test_a_mistake_in_a_stage_is_named(stage, message):
    with pytest.raises(ValueError, match=r"^run\.toml: ") as caught:
        parse_config({"stage": [{"epochs": 1, **stage}]}, "run.toml")
    assert message in str(caught.value)


def test_no_two_settings_of_a_stage_have_one_name():
    flat = [name for section in FLAT_TABLES.values() for name in overridable(section)]
    assert len({*flat, *NESTED_TABLES}) == len(flat) + len(NESTED_TABLES)
    assert {*flat, *map(attribute_of, NESTED_TABLES)} <= Stage.model_fields.keys()


def difference(checkpoint: list[dict], now: list[dict], stage: int = 1, **more: dict) -> str:
    before = identify(parse_config({"stage": checkpoint, **more}, "here"), "fp32")
    found = identify(parse_config({"stage": now, **more}, "here"), "fp32").difference(before, stage)
    return "" if found is None else found.text


def test_what_a_stage_overrides_belongs_to_the_runs_identity_once_it_has_begun():
    plain, noisy = {"epochs": 1}, {"epochs": 1, "loss": {"offset_noise": 0.1}}
    assert difference([plain, noisy], [plain, noisy]) == ""
    assert difference([plain, plain], [plain, noisy], stage=0) == ""
    assert difference([plain, plain], [plain, noisy]) == "stage 2's loss.offset_noise is 0.1, but 0.0 in the checkpoint"
    assert difference([plain, noisy], [plain, plain]) == "stage 2's loss.offset_noise is 0.0, but 0.1 in the checkpoint"
    dropping = {"epochs": 1, "data": {"caption_dropout": 0.5}}
    text = "stage 2's data.caption_dropout is 0.5, but 0.04 in the checkpoint"
    assert difference([plain, plain], [plain, dropping]) == text
    # how often it is saved, sampled and validated does not decide the weights
    for free in ({"save": {"keep": 5}}, {"sample": {"steps": 3}}, {"validate": {"every_epochs": 3}}):
        assert difference([plain, plain], [plain, {"epochs": 1, **free}]) == ""


def test_a_parameter_that_only_a_stages_loss_uses_is_compared_there():
    def stage(delta: float) -> dict:
        return {"epochs": 1, "loss": {"kind": "huber", "huber_delta": delta}}

    assert difference([stage(0.1)], [stage(0.2)], 0) == "stage 1's loss.huber_delta is 0.2, but 0.1 in the checkpoint"
    # the run's own loss does not use it
    assert difference([{"epochs": 1}], [{"epochs": 1, "loss": {"huber_delta": 0.2}}], 0) == ""


def test_a_checkpoint_older_than_a_setting_of_stages_was_trained_with_its_default():
    """A key that is added to [optimizer] later is missing in the stages of older checkpoints."""
    now = identify(parse_config({"stage": [{"epochs": 1}]}, "here"), "fp32")
    older = [{name: value for name, value in stage.items() if name != "weight_decay"} for stage in now.stages]
    before = Identity(now.settings, older, now.data)
    assert now.difference(before, 0) is None
    other = identify(parse_config({"stage": [{"epochs": 1, "weight_decay": 0.5}]}, "here"), "fp32")
    assert other.difference(before, 0).text == "stage 1's weight_decay is 0.5, but 0.01 in the checkpoint"
