"""Settings that depend on each other: optimizer.fused_backward, name and clipping."""

import pytest

from safelight.options.overrides import take_overrides
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import load_config, parse_config, to_toml
from safelight.trainer.registry.optimizers import OPTIMIZERS


def test_fused_backward_is_true_false_or_auto(tmp_path):
    for text, value in (("true", True), ("false", False), ('"auto"', "auto")):
        path = tmp_path / "run.toml"
        path.write_text(f"[optimizer]\nfused_backward = {text}\n")
        config = load_config(path)
        assert config.optimizer.fused_backward is value or (value == "auto" == config.optimizer.fused_backward)
        assert f"fused_backward = {text}\n" in to_toml(config)
    assert parse_config({}, "here").optimizer.fused_backward == "auto"
    # 1 counts as true, as for other switches
    assert parse_config({"optimizer": {"fused_backward": 1}}, "here").optimizer.fused_backward is True
    for value in ("yes", "true", 2, None):
        with pytest.raises(ValueError, match=r"fused_backward = .*: input should be 'auto', true or false$"):
            parse_config({"optimizer": {"fused_backward": value}}, "here")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["--optimizer.fused-backward", "true"], True),
        (["--optimizer.fused-backward=false"], False),
        (["--optimizer.fused-backward", "auto"], "auto"),
        (["--optimizer.fused-backward"], True),
        (["--optimizer.no-fused-backward"], False),
        (["--optimizer.fused-backward", "often"], "often"),
    ],
)
def test_fused_backward_on_the_command_line(given, value):
    assert take_overrides([*given, "--resume"]) == (["--resume"], [(["optimizer", "fused_backward"], value)])


def test_the_values_of_fused_backward_that_name_and_clipping_allow():
    for options, choices, clipping in (
        ({}, (False, True), "global"),
        ({"fused_backward": True}, (True,), "lagged"),
        ({"fused_backward": False}, (False,), "global"),
        ({"clipping": "global"}, (False,), "global"),
        ({"clipping": "lagged"}, (True,), "lagged"),
        ({"clipping": "per-tensor"}, (True,), "per-tensor"),
        *(({"name": name}, (False,), "global") for name in OPTIMIZERS if name != "adamw8bit"),
    ):
        optimizer = Optimizer(**options)
        assert (optimizer.fused_choices(), optimizer.clipping_mode()) == (choices, clipping)
        assert optimizer.is_fused is choices[0]


@pytest.mark.parametrize("name", ["run.dir", "data.path", "model.base", "model.config", "model.vae", "model.tokenizer"])
def test_a_path_with_a_control_character_is_refused(name):
    r"""In "runs\new", TOML reads a newline."""
    table, setting = name.split(".")
    for character in "\n\t\x00\x7f":
        with pytest.raises(ValueError, match=rf"{name} = .*: it contains a control character; write / or use single"):
            parse_config({table: {setting: f"a{character}b"}}, "here")
    assert parse_config({table: {setting: "a\\new"}}, "here")


@pytest.mark.parametrize(
    ("given", "value"), [(512, 512), ([512], 512), ([768, 512, 512], [512, 768]), ("512", 512), ((96, 64.0), [64, 96])]
)
def test_a_resolution_is_one_or_several(given, value, tmp_path):
    data = parse_config({"data": {"resolution": given}}, "here").data
    assert data.resolution == value
    assert data.resolutions == (tuple(value) if isinstance(value, list) else (value,))
    assert data.max_resolution == max(data.resolutions)
    (tmp_path / "run.toml").write_text(to_toml(parse_config({"data": {"resolution": given}}, "here")))
    assert load_config(tmp_path / "run.toml").data == data


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (8, "expected 16 or more"),
        ([512, 5000], "expected at most 4096"),
        ([], "expected 1 to 6 resolutions"),
        (list(range(64, 64 * 8, 64)), "expected 1 to 6 resolutions"),
        ("big", "expected a whole number, or a list of them"),
        ([512, "big"], "expected a whole number, or a list of them"),
        (512.5, "expected a whole number, or a list of them"),
        (float("nan"), "expected a whole number, or a list of them"),
        ({"side": 512}, "expected a whole number, or a list of them"),
        ([True], "expected a whole number, or a list of them"),
        (True, "expected a number or text, got a boolean"),
    ],
)
def test_a_wrong_resolution_is_refused(given, message):
    with pytest.raises(ValueError, match=rf"^here: data.resolution = .*: {message}$"):
        parse_config({"data": {"resolution": given}}, "here")


@pytest.mark.parametrize(("given", "value"), [(["512"], 512), (["512", "768"], [512, 768]), (["wide"], "wide")])
def test_resolutions_on_the_command_line(given, value):
    argv = ["--data.resolution", *given, "--resume"]
    assert take_overrides(argv) == (["--resume"], [(["data", "resolution"], value)])


def test_4_bit_moments_are_refused_by_name_where_they_are_not_kept():
    with pytest.raises(ValueError, match=r"optimizer.moments 4bit does not go with adamw,"):
        parse_config({"optimizer": {"name": "adamw", "moments": "4bit"}}, "here")
    with pytest.raises(ValueError, match=r"distributed.shard full does not go with optimizer.moments 4bit"):
        parse_config({"optimizer": {"moments": "4bit"}, "distributed": {"shard": "full"}}, "here")
    config = parse_config({"optimizer": {"moments": "4bit"}, "distributed": {"shard": "states"}}, "here")
    assert config.optimizer.moments == "4bit"
