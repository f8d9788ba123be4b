"""Names of other trainers' settings and values get the name that they have here."""

import re

import pytest

from safelight.commands import COMMANDS
from safelight.errors import UserError
from safelight.options.parsing import parse_with_config
from safelight.trainer.config import names_elsewhere
from safelight.trainer.config.names_elsewhere import nearest_value
from safelight.trainer.config.presets import PRESETS
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config


def test_every_name_leads_to_a_setting():
    for name, (table, setting) in names_elsewhere.SETTINGS.items():
        assert setting in Config.model_fields[table].annotation.model_fields, name


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--learning_rate", "1e-5"], "--learning_rate is not an option; here: --optimizer.lr"),
        (["--optimizer.learning-rate", "1e-5"], "optimizer.learning_rate is not a setting; here: --optimizer.lr"),
        (["--network_dim=16"], "here: --adapter.rank"),
        (["--train.noise-offset", "0.1"], "here: --loss.offset-noise"),
        (["--stage.0.learning-rate", "1e-5"], "here: --stage.0.lr"),
        (
            ["--cache_latents"],
            "--cache_latents is not an option; nothing to set: latents and captions are always cached",
        ),
        (["--train.save-state", "true"], "train.save_state is not a setting; nothing to set: every checkpoint can be"),
    ],
)
def test_on_the_command_line(tmp_path, argv, told):
    file = tmp_path / "run.toml"
    file.write_text("[[stage]]\nepochs = 1\n")
    with pytest.raises(UserError) as raised:
        parse_with_config([str(file), *argv], "train", "")
    assert told in str(raised.value)


def test_no_name_has_two_answers():
    """Names that have a counterpart here are not among those that have none, nor among our own."""
    own = {name for field in Config.model_fields.values() for name in getattr(field.annotation, "model_fields", ())}
    of_others = [name for row in names_elsewhere.WITHOUT for name in row.names]
    assert set(of_others) & (own | names_elsewhere.SETTINGS.keys()) == set()
    rows = {(row.trainer, name) for row in names_elsewhere.WITHOUT for name in row.names}
    assert len(rows) == len(of_others)


def test_what_is_advised_instead_exists():
    sections = {field.alias or name: field.annotation for name, field in Config.model_fields.items()}
    for row in names_elsewhere.WITHOUT:
        for table, name in re.findall(r"`(\w+)\.(\w+)(?: [^`]+)?`", row.instead):
            assert name == "json" or name in sections[table].model_fields, row


def test_in_a_file():
    with pytest.raises(UserError, match=r"gradient_accumulation_steps is not a setting; here: train\.accumulate"):
        parse_config({"gradient_accumulation_steps": 4}, "f")
    with pytest.raises(UserError, match=r"stage\.0\.noise_offset is not a setting; here: stage\.0\.loss\.offset_noise"):
        parse_config({"stage": [{"epochs": 1, "noise_offset": 0.1}]}, "f")


@pytest.mark.parametrize(
    ("setting", "value", "near"),
    [
        ("name", "lion", "bnb_lion8bit"),
        ("name", "AdamW8bit", "adamw8bit"),
        ("name", "Prodigy", "prodigy"),
        ("schedule", "cosine_with_restarts", "cosine_restarts"),
    ],
)
def test_the_nearest_value_is_named(setting, value, near):
    with pytest.raises(UserError, match=f"; the nearest is '{near}'"):
        parse_config({"optimizer": {setting: value}}, "f")


def test_a_value_like_none_has_no_nearest():
    assert nearest_value("zzz", ["constant", "linear"]) == ""


def test_the_help_names_every_preset():
    assert COMMANDS["init"].endswith(", ".join(PRESETS))
