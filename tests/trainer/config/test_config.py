"""Settings: messages for invalid ones, TOML round trips, presets, stages, and overrides on the command line."""

import ast
import inspect
import random
import textwrap
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.__main__ import main
from safelight.errors import UserError
from safelight.options.arguments import Init, Prepare, Report
from safelight.options.overrides import take_overrides, with_overrides
from safelight.options.parsing import parse, parse_with_config, run_folder
from safelight.trainer.config import schema as config_module
from safelight.trainer.config.presets import PRESETS, preset
from safelight.trainer.config.schema import (
    Adapter,
    Config,
    Data,
    Distributed,
    Embedding,
    Log,
    Loss,
    Memory,
    Model,
    Optimizer,
    OwnOfStage,
    Prior,
    Run,
    Sample,
    Save,
    Section,
    Stage,
    TextEncoder,
    Train,
    Validate,
)
from safelight.trainer.config.toml import load_config, parse_config, to_toml
from safelight.trainer.registry import adapters, layers, losses, optimizers, samplers, schedules
from safelight.trainer.registry.losses import HUBER_SCHEDULES, KINDS, TIMESTEPS, WEIGHTINGS
from tests.trainer.damaged_text import replaced_setting

SECTIONS = (
    *(
        Run,
        Model,
        Data,
        Distributed,
        Train,
        Optimizer,
        TextEncoder,
        Adapter,
        Embedding,
        Memory,
        Stage,
        Loss,
        Prior,
        Validate,
        Sample,
        Save,
    ),
    Log,
)


def message_for(values: dict) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the caller checks the whole text
        parse_config(values, "run.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train": {"batch_sze": 2}}, "run.toml: train.batch_sze is not a setting; did you mean train.batch_size?"),
        ({"trian": {"batch_size": 2}}, "run.toml: trian is not a setting; did you mean train?"),
        (
            {"optimizer": {"q": 1}},
            "run.toml: optimizer.q is not a setting; known settings: name, memory, moments, lr, fused_backward, "
            "clipping",
        ),
        (
            {"stage": [{"epochs": 1}, {"epochs": 1, "lrr": 1e-5}]},
            "run.toml: stage.1.lrr is not a setting; did you mean stage.1.lr?",
        ),
        (
            {"validate": {"every_epoch": 1}},
            "run.toml: validate.every_epoch is not a setting; did you mean validate.every_epochs?",
        ),
        (
            {"zzz": 1},
            "run.toml: zzz is not a setting; known settings: run, model, data, train, optimizer, text_encoder, ",
        ),
    ],
)
def test_an_unknown_name_is_shown_with_the_closest_valid_one(values, expected):
    assert message_for(values).startswith(expected)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"train": {"batch_size": 0}}, ("train.batch_size = 0:", "expected 1 or more")),
        ({"train": {"batch_size": "four"}}, ("train.batch_size = 'four':", "expected a whole number")),
        ({"train": {"batch_size": 2.5}}, ("train.batch_size = 2.5:", "expected a whole number")),
        ({"train": {"batch_size": True}}, ("train.batch_size = True:", "expected a number or text, got a boolean")),
        ({"stage": [{"epochs": True}]}, ("stage.0.epochs = True:", "expected a number or text, got a boolean")),
        ({"model": {"precision": "bf17"}}, ("model.precision = 'bf17':", "'bf16'", "'fp32'")),
        ({"data": {"resolution": 8}}, ("data.resolution = 8:", "expected 16 or more")),
        ({"data": {"validation_fraction": 1}}, ("data.validation_fraction = 1", "less than 1")),
        ({"optimizer": {"lr": float("nan")}}, ("optimizer.lr = nan:", "finite")),
        ({"optimizer": {"eps": float("inf")}}, ("optimizer.eps = inf:", "finite")),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ("optimizer.betas.1 = 1.0:", "less than 1")),
        ({"optimizer": {"betas": [0.9]}}, ("optimizer.betas.1 is missing",)),
        ({"run": {"seed": 1 << 64}}, ("run.seed = 18446744073709551616:", "less than 18446744073709551616")),
        ({"stage": [{"lr": 1e-5}]}, ("stage.0.epochs is missing",)),
        ({"stage": {"epochs": 1}}, ("stage = {'epochs': 1}:", "[[stage]]")),
        ({"train": 5}, ("train = 5:", "[train]")),
        ({"sample": {"prompts": "a cat"}}, ("sample.prompts = 'a cat':", "valid list")),
        ({"log": {"tensorboard": "perhaps"}}, ("log.tensorboard = 'perhaps':", "expected true or false")),
        (
            {"loss": {"zero_terminal_snr": True, "prediction": "epsilon"}},
            ("zero_terminal_snr", "'v_prediction'", "not 'epsilon'"),
        ),
        (
            {"text_encoder": {"train": True}, "data": {"prompt_weights": True}},
            ("data.prompt_weights true", "text_encoder.train true", "set one of them to false"),
        ),
        ({"text_encoder": {"lr": 0}}, ("text_encoder.lr = 0:", "expected more than 0")),
        ({"loss": {"kind": "l1"}}, ("loss.kind = 'l1':", "'mse', 'huber'", "or 'huber_mse'")),
        (
            {"loss": {"kind": "huber", "huber_schedule": "snr"}},
            ("loss.huber_schedule 'snr' falls from 1 to loss.huber_delta, which is 1", "set loss.huber_delta below 1"),
        ),
        (
            {"loss": {"min_timestep": 500, "max_timestep": 500}},
            ("loss.min_timestep 500 and loss.max_timestep 500 leave no timestep", "set loss.min_timestep below 500"),
        ),
        ({"loss": {"pyramid_octaves": 1}}, ("loss.pyramid_octaves = 1:", "2 or more")),
        ({"loss": {"huber_delta": 0}}, ("loss.huber_delta = 0:", "expected more than 0")),
        ({"loss": {"weighting": "min_snr"}}, ("loss.weighting 'min_snr'", "loss.min_snr_gamma above 0", "5 is usual")),
        (
            {"loss": {"weighting": "p2", "min_snr_gamma": 5}},
            ("loss.weighting 'p2'", "loss.min_snr_gamma 5.0", "set loss.min_snr_gamma to 0"),
        ),
        (
            {"loss": {"weighting": "none", "min_snr_gamma": 5}},
            ("loss.weighting 'none'", "or loss.weighting to min_snr"),
        ),
    ],
)
def test_an_invalid_value_is_shown_with_its_path_and_limit_on_one_line(values, parts):
    text = message_for(values)
    assert text.startswith("run.toml: ")
    for part in parts:
        assert part in text
    assert "\n" not in text
    assert "pydantic" not in text


def test_every_mistake_is_shown_not_only_the_first():
    lines = message_for({"train": {"batch_size": 0, "accumulat": 2}, "model": {"clip_skip": 12}}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("run.toml: ") for line in lines)


def test_a_thousand_mistakes_and_long_values_give_a_short_message():
    lines = message_for({f"x{number}": 1 for number in range(1000)}).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "run.toml: and 980 more mistakes"
    assert len(message_for({"train": {"batch_size": "9" * 100_000}, "run": {"d" * 100_000: 1}})) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 50_000 + " = 1",
        "[" + "a." * 50_000 + "a]",
        "a = " + "[" * 5_000,
        "[train]\nbatch_size = 0x" + "f" * 9_000,
        "[train]\nbatch_size = 99999999999999999999999",
        "[run]\ndir = 1e999999",
        "a = {" + "b = {" * 3_000,
        "[[stage]]\n" * 200_000,
    ],
)
def test_a_settings_file_of_absurd_keys_numbers_or_nesting_is_refused_at_once(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert time.process_time() - start < 3
    assert len(str(refused.value)) < 5_000


def try_settings(path: Path, num: int, seed: int) -> int:
    """Replace a value of a settings file, or cut it, num times; return how many were refused."""
    text, rng, messages = to_toml(preset("sd15")), random.Random(seed), []
    for _ in range(num):
        path.write_bytes(replaced_setting(text, rng))
        try:
            load_config(path)
        except UserError as error:
            messages.append(str(error))
    assert all(line.isprintable() and len(line) < 1000 for message in messages for line in message.split("\n"))
    return len(messages)


def test_absurd_settings_are_refused_in_short_lines(tmp_path):
    assert try_settings(tmp_path / "run.toml", 100, 1) > 30


@pytest.mark.slow
def test_ten_thousand_absurd_settings(tmp_path):
    assert try_settings(tmp_path / "run.toml", 10_000, 2) > 3_000


def test_settings_cannot_send_escape_sequences_to_the_terminal(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[run]\n"\\u001b]0;x\\u0007" = 1\n[model]\nprecision = "\\u001b[31m"\n')
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert len(str(refused.value).splitlines()) == 2
    assert all(line.isprintable() for line in str(refused.value).splitlines())


def test_a_missing_broken_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml does not exist; write one with `safelight init"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="is not a regular file but a folder"):
        load_config(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[train]\nbatch_size = = 2\n")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML: .*line 2"):
        load_config(broken)
    broken.write_bytes(b"[run]\ndir = '\xff'\n")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML"):
        load_config(broken)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("comments", [False, True])
def test_a_preset_survives_a_toml_round_trip(name, comments, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(preset(name), comments=comments), encoding="utf-8")
    assert load_config(path) == preset(name)


def positive(highest: float, **bounds):
    return st.floats(1e-300, highest, **bounds)


counts = st.integers(0, 10**9)
numbers = st.integers(1, 10**9)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
courses = st.sampled_from(list(schedules.SCHEDULES))
fractions = st.floats(0, 1, exclude_max=True)
nested = {
    name: Stage.model_fields[name].annotation.__args__[0] for name in ("data", "loss", "validate_", "sample", "save")
}
stages = st.builds(
    Stage,
    loss=st.none() | st.builds(nested["loss"], offset_noise=st.none() | fractions, kind=st.none() | st.just("huber")),
    validate=st.none() | st.builds(nested["validate_"], every_epochs=st.none() | counts),
    sample=st.none() | st.builds(nested["sample"], sampler=st.none() | st.just("ddim"), steps=st.none() | st.just(3)),
    save=st.none() | st.builds(nested["save"], keep=st.none() | numbers),
    data=st.none() | st.builds(nested["data"], caption_dropout=st.none() | fractions),
    epochs=numbers,
    lr=st.none() | positive(1),
    schedule=st.none() | courses,
    warmup_steps=st.none() | counts,
    weight_decay=st.none() | fractions,
    max_grad_norm=st.none() | st.floats(0, 1e300),
    batch_size=st.none() | numbers,
    accumulate=st.none() | numbers,
)
path_texts = st.characters(exclude_categories=["Cs", "Cc"])
places = st.text(path_texts, min_size=1, max_size=20)
configs = st.builds(
    Config,
    run=st.builds(Run, dir=places, seed=st.integers(0, 2**64 - 1)),
    model=st.builds(
        Model,
        base=places,
        vae=st.text(path_texts, max_size=20),
        clip_skip=st.integers(0, 11),
        precision=st.sampled_from(["auto", "fp16"]),
    ),
    data=st.builds(
        Data,
        path=places,
        resolution=st.integers(16, 4096),
        max_aspect=st.floats(1, 16),
        validation_fraction=fractions,
        caption_suffix=texts,
    ),
    optimizer=st.builds(Optimizer, lr=positive(1), betas=st.tuples(fractions, fractions), eps=positive(1e300)),
    stage=st.lists(stages, max_size=3),
    loss=st.builds(Loss, min_snr_gamma=st.floats(0, 1e300), zero_terminal_snr=st.booleans()),
    validate_=st.builds(Validate, every_epochs=counts, max_images=numbers),
    sample=st.builds(Sample, prompts=st.lists(texts, max_size=3), negative_prompt=texts, cfg=st.floats(0, 100)),
    log=st.builds(Log, every_steps=numbers, tensorboard=st.booleans()),
)


@settings(deadline=None, max_examples=60)
@given(config=configs, comments=st.booleans())
def test_any_config_survives_a_toml_round_trip(config, comments):
    assert parse_config(tomllib.loads(to_toml(config, comments)), "toml") == config


def test_a_delete_character_in_a_prompt_is_escaped():
    # JSON does not escape DEL, but TOML requires it
    config = parse_config({"sample": {"prompts": ["a\x7fb", 'quote " and \\ and \n \t \0']}}, "here")
    assert parse_config(tomllib.loads(to_toml(config)), "toml") == config


def docstrings_in_source(section: type[Section]) -> dict[str, str]:
    """Return the docstring of each field, parsed from the source, to compare with what pydantic read."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    docstrings = {}
    for field, after in pairwise(body):
        is_constant = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_constant and isinstance(after.value.value, str):
            docstrings[field.target.id] = inspect.cleandoc(after.value.value)
    return docstrings


def test_the_list_of_sections_in_this_file_is_complete():
    own = {value for value in vars(config_module).values() if isinstance(value, type) and issubclass(value, Section)}
    assert own == {*SECTIONS, Config, Section, OwnOfStage}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_documented_and_init_writes_the_documentation(section):
    text = to_toml(parse_config({"stage": [{"epochs": 1}]}, "here"), comments=True)
    documented = docstrings_in_source(OwnOfStage if section is Stage else section)
    for name, field in section.model_fields.items():
        # the registries describe the optimizers, schedules, samplers, adapters and layers
        registries = {(Optimizer, "name"): optimizers, (Adapter, "kind"): adapters, (Train, "layers"): layers}
        registries |= {(section, "schedule"): schedules for section in (Optimizer, TextEncoder)}
        registries[Sample, "sampler"] = samplers
        registry = registries.get((section, name))
        expected = registry.help_text() if registry else documented.get(name)
        if section is Loss and name in ("kind", "huber_schedule", "weighting", "timesteps"):
            expected = losses.help_text(name)
        if section is Stage and name not in OwnOfStage.model_fields:
            # what a stage overrides is documented in full where it is defined: test_stage_settings.py
            continue
        assert expected, f"{section.__name__}.{name} has no docstring"
        assert field.description == expected
        lines = [f"# {line}" for line in expected.splitlines()]
        assert "\n".join(lines) in text
    assert f"# {section.__doc__.splitlines()[0]}" in text


def test_an_unset_value_of_a_stage_is_written_commented_out():
    config = parse_config({"optimizer": {"lr": 3e-4}, "stage": [{"epochs": 2}, {"epochs": 1}]}, "here")
    text = to_toml(config, comments=True)
    assert text.count("# lr = 0.0003\n") == 1
    uncommented = tomllib.loads(text.replace("# lr = 0.0003", "lr = 0.0003"))
    assert uncommented["stage"][0]["lr"] == 3e-4


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {"kind": "mse", "weighting": "none"}),
        ({"min_snr_gamma": 5}, {"kind": "mse", "weighting": "min_snr", "gamma": 5}),
        ({"weighting": "min_snr", "min_snr_gamma": 3}, {"kind": "mse", "weighting": "min_snr", "gamma": 3}),
        (
            {"kind": "huber", "huber_delta": 0.1, "weighting": "p2", "p2_gamma": 0.5},
            {"kind": "huber", "delta": 0.1, "delta_schedule": "constant", "weighting": "p2", "gamma": 0.5},
        ),
        ({"weighting": "debiased", "p2_gamma": 0.5}, {"kind": "mse", "weighting": "debiased"}),
    ],
)
def test_the_kernel_gets_only_the_parameters_of_the_chosen_loss(values, options):
    assert parse_config({"loss": values}, "here").loss.kernel_options() == options


def test_the_config_offers_and_documents_every_loss_and_its_parameter():
    fields = Loss.model_fields
    groups = (("kind", KINDS), ("weighting", WEIGHTINGS), ("timesteps", TIMESTEPS), ("huber_schedule", HUBER_SCHEDULES))
    for name, rows in groups:
        assert set(get_args(fields[name].annotation)) - {"auto"} == set(rows)
        for row in rows.values():
            assert f"{row.name}: " in fields[name].description
            assert set(row.parameters) <= set(fields)


def test_stages_inherit_unset_values_from_train_and_optimizer():
    config = parse_config(
        {
            "train": {"batch_size": 3, "accumulate": 2, "max_grad_norm": 0.5, "epochs": 99},
            "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 7, "lr_end": 0.25, "weight_decay": 0.2},
            "stage": [
                {"epochs": 2},
                {
                    "epochs": 1,
                    "lr": 1e-5,
                    "schedule": "cosine",
                    "warmup_steps": 0,
                    "lr_end": 0.0,
                    "weight_decay": 0.0,
                    "max_grad_norm": 0.0,
                    "batch_size": 5,
                    "accumulate": 1,
                },
            ],
        },
        "here",
    )
    first, second = (stage.flat() for stage in config.stages())
    assert first.pop("start_from") == second.pop("start_from") == "last"
    assert first == {
        "epochs": 2,
        "lr": 1e-3,
        "schedule": "linear",
        "warmup_steps": 7,
        **schedules.DEFAULTS,
        "lr_end": 0.25,
        "weight_decay": 0.2,
        "max_grad_norm": 0.5,
        "batch_size": 3,
        "accumulate": 2,
    }
    # a zero is a value, not unset
    assert second == {
        "epochs": 1,
        "lr": 1e-5,
        "schedule": "cosine",
        "warmup_steps": 0,
        **schedules.DEFAULTS,
        "lr_end": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "batch_size": 5,
        "accumulate": 1,
    }


def test_without_stages_there_is_one_with_train_epochs():
    (stage,) = parse_config({"train": {"epochs": 11}, "optimizer": {"lr": 1e-3}}, "here").stages()
    assert (stage.epochs, stage.lr) == (11, 1e-3)


def test_the_everydream2_preset_has_the_settings_of_the_original_run():
    """The run of 2023: SD1.5 at 512 px, batch 6, gradient checkpointing, 8-bit AdamW, lr 1e-6 constant, conditional
    dropout 0.04, zero-frequency noise 0.01, clip_skip 1, plain MSE, no min-SNR; 30 epochs and then 10; the text
    encoder trained whole and to the end at 5e-7 cosine; 10 % held out
    by seed 555, crop jitter 0.02, "unsplash photography" after every caption.
    """
    config = preset("everydream2")
    assert config.model.base.endswith("stable-diffusion-v1-5")
    assert (config.data.resolution, config.data.crop_jitter, config.data.flip_p) == (512, 0.02, 0)
    assert config.data.caption_dropout == 0.04
    assert config.data.caption_suffix.strip() == "unsplash photography"
    assert (config.data.validation_fraction, config.run.seed) == (0.1, 555)
    assert config.train.checkpointing == "full"
    assert config.optimizer.name == "adamw8bit"
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-8)
    # EveryDream2 uses hidden_states[-clip_skip], so its 1 skips no layer
    assert config.model.clip_skip == 0
    assert (config.loss.offset_noise, config.loss.min_snr_gamma) == (0.01, 0)
    assert config.loss.prediction in ("auto", "epsilon")
    assert not config.loss.zero_terminal_snr
    assert [stage.epochs for stage in config.stages()] == [30, 10]
    text = config.text_encoder
    assert (text.train, text.lr, text.schedule, text.last_layers, text.epochs) == (True, 5e-7, "cosine", 0, 0)
    for stage in config.stages():
        assert (stage.lr, stage.schedule, stage.warmup_steps) == (1e-6, "constant", 0)
        assert (stage.batch_size, stage.accumulate, stage.weight_decay) == (6, 1, 0.01)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="preset 'sd3' is unknown; use tiny, sd15, sd15-lora, sd15-embedding, sd21"):
        preset("sd3")


@pytest.fixture
def run_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(preset("tiny")))
    return str(path)


def test_any_setting_can_be_given_on_the_command_line(run_toml):
    words = (
        "--train.batch-size 5 --train.accumulate=3 --optimizer.betas 0.8 0.95 --validate.every-epochs 2 "
        "--stage.1.lr 1e-5 --stage.2.epochs 7 --log.no-tensorboard --loss.zero-terminal-snr true "
        "--run.seed 18446744073709551615 --model.base 123 --data.cache-dtype float32 --resume "
        "--sample.negative-prompt= --sample.prompts"
    ).split()
    arguments, config = parse_with_config([run_toml, *words, "a cat", "-5", "x = y"], "train", "")
    assert arguments.resume
    assert (config.train.batch_size, config.train.accumulate) == (5, 3)
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.validate_.every_epochs == 2
    assert [stage.epochs for stage in config.stage] == [12, 4, 7]
    assert config.stage[1].lr == 1e-5
    assert (config.log.tensorboard, config.loss.zero_terminal_snr) == (False, True)
    assert config.run.seed == 2**64 - 1
    # text that looks like a number stays text
    assert config.model.base == "123"
    assert config.data.cache_dtype == "float32"
    assert config.sample.negative_prompt == ""
    assert config.sample.prompts == ["a cat", "-5", "x = y"]
    # the rest comes from the file
    assert config.optimizer.lr == preset("tiny").optimizer.lr


@pytest.mark.parametrize(
    "words",
    [
        "{file} --resume --train.batch-size 5",
        "--resume {file} --train.batch-size 5",
        "--train.batch-size 5 --resume {file}",
        "--resume --log.tensorboard {file} --train.batch-size=5",
        "--train.batch-size 5 --sample.prompts x y {file} --resume",
    ],
)
def test_options_come_before_or_after_the_settings_file(run_toml, words):
    arguments, config = parse_with_config(words.format(file=run_toml).split(), "train", "")
    assert (str(arguments.config), arguments.resume, config.train.batch_size) == (run_toml, True, 5)
    assert config.run.dir == preset("tiny").run.dir


def test_a_run_folder_stands_for_its_settings_file(tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "environment.json").write_text("{}")
    (run / "config.toml").write_text('[run]\ndir = "where/it/was"\n[train]\nbatch_size = 5\n')
    for words in (["--resume", str(run)], [str(run), "--resume"], [str(run / "config.toml"), "--resume"]):
        arguments, config = parse_with_config(words, "train", "")
        assert (arguments.resume, config.run.dir, config.train.batch_size) == (True, str(run), 5)
    (tmp_path / "run.toml").write_text(f'[run]\ndir = "{run}"\n')
    # commands for a run take its folder, the settings inside it, or those that it was started with
    for path in (run, run / "config.toml", tmp_path / "run.toml"):
        assert run_folder(parse(Report, [str(path)], "report", "").runs[0]) == run


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\ndir = "~/r"\n[model]\nbase = "~/b"\nvae = "~/v"\ntokenizer = "~/t"\nconfig = "~/c"\n'
        '[data]\npath = "~"\n[sample]\nprompts = ["~/x"]\n'
    )
    _, config = parse_with_config(["--run.dir=~/other", "~/run.toml"], "train", "")
    places = (config.run.dir, config.model.base, config.model.vae, config.model.tokenizer, config.model.config)
    assert places == tuple(f"{tmp_path}/{name}" for name in ("other", "b", "v", "t", "c"))
    assert (config.data.path, config.sample.prompts) == (str(tmp_path), ["~/x"])
    # what is recorded does not depend on who resumes
    assert "~/" not in to_toml(config).replace('"~/x"', "")
    assert parse(Init, ["tiny", "--out=~/new.toml"], "init", "").out == tmp_path / "new.toml"
    assert parse(Prepare, ["~/a", "~/b"], "prepare", "").sources == (tmp_path / "a", tmp_path / "b")
    assert load_config(path).run.dir == f"{tmp_path}/r"


def test_overrides_do_not_modify_the_original_settings():
    before = preset("tiny").model_dump(by_alias=True)
    words = "--train.batch-size 1 --stage.0.epochs 9 --stage.2.epochs 1".split()
    after = with_overrides(before, take_overrides(words)[1])
    assert before == preset("tiny").model_dump(by_alias=True)
    assert (after["train"]["batch_size"], after["stage"][0]["epochs"], len(after["stage"])) == (1, 9, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train.batch-size 0", "train.batch_size = 0: expected 1 or more"),
        ("--train.batch-size -4", "train.batch_size = -4: expected 1 or more"),
        ("--train.batch-size many", "train.batch_size = 'many': expected a whole number"),
        ("--train.batch-sze 4", "train.batch_sze is not a setting; did you mean --train.batch-size?"),
        ("--trian.batch-size=4", "trian is not a setting; did you mean train?"),
        ("--optimizer.betas 0.9", "optimizer.betas.1 is missing"),
        ("--optimizer.betas 0.9 0.99 0.999", "optimizer.betas = [0.9, 0.99, 0.999]: "),
        ("--log.tensorboard perhaps", "log.tensorboard = 'perhaps': expected true or false"),
        ("--train.batch-size", "--train.batch-size needs a value"),
        ("--train.batch-size --resume", "--train.batch-size needs a value"),
        ("--train.batch-size.x 1", "train.batch_size.x is not a setting; batch_size is a value, not a table"),
        ("--stage.lr 1", "stage.lr: a stage is given by its number, for example --stage.0.lr 1e-6; there are 2"),
        ("--stage.3.lr 1e-6", "stage.3.lr: a stage is given by its number"),
        ("--stage.².lr 1e-6", "stage.².lr: a stage is given by its number"),
        (f"--stage.{'1' * 5000}.lr 1e-6", f"stage.{'1' * 5000}.lr: a stage is given by its number"),
        ("--stage.2.lr 1e-6", "stage.2.epochs is missing"),
        ("--loss.zero-terminal-snr --loss.prediction epsilon", "loss.zero_terminal_snr requires loss.prediction"),
    ],
)
def test_an_invalid_setting_on_the_command_line_is_one_line_and_exit_2(run_toml, capsys, words, expected):
    assert main(["train", run_toml, *words.split()]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith(f"safelight train: command line: {expected}")
    assert streams.err.count("\n") == 1
    assert "http" not in streams.err


def test_a_folder_given_is_the_runs_folder_whatever_its_config_names(tmp_path):
    """Somebody else's run folder cannot send what is written to another one."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(f'[run]\ndir = "{victim}"\n')
    assert parse_with_config(["--resume", str(run)], "train", "")[1].run.dir == str(run)
    assert parse_with_config(["--resume", str(run / "config.toml")], "train", "")[1].run.dir == str(victim)
    for name in ("environment.json", "metrics.jsonl"):
        # damaged: a folder in the place of the file
        (run / name).mkdir()
        assert parse_with_config(["--resume", str(run / "config.toml")], "train", "")[1].run.dir == str(run)
        (run / name).rmdir()


@pytest.mark.parametrize(
    "values",
    [{"run": {"dir": "runs/\udcff"}}, {"sample": {"prompts": ["\udcff"]}}, {"data": {"caption_suffix": "\udcff"}}],
)
def test_bytes_that_are_not_utf_8_are_refused(values):
    with pytest.raises(UserError, match="bytes that are not UTF-8, which a settings file cannot hold"):
        parse_config(values, "run.toml")
