"""Patterns of train.layers: what they choose, what decides, and what is refused."""

import pytest

from safelight.errors import UserError
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.registry.layers import ALIASES, lr_factors, parse_pattern
from tests.trainer.checkpoints import make_unet


@pytest.fixture(scope="module")
def names() -> list[str]:
    return [name for name, _ in make_unet().named_parameters()]


def test_without_patterns_everything_is_trained_at_the_full_rate(names):
    assert lr_factors(names, []) == dict.fromkeys(names, 1.0)
    assert lr_factors(names, ["all"]) == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize(
    ("pattern", "is_part"),
    [
        ("attention", lambda name: ".attn1." in name or ".attn2." in name),
        ("self_attention", lambda name: ".attn1." in name),
        ("cross_attention", lambda name: ".attn2." in name),
        ("text_projections", lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name),
        ("feed_forward", lambda name: ".ff.net." in name),
        ("transformers", lambda name: ".attentions." in name),
        ("resnets", lambda name: ".resnets." in name),
        ("norms", lambda name: "norm" in name),
        ("time", lambda name: name.startswith("time_embedding.") or ".time_emb_proj." in name),
        ("up_blocks", lambda name: name.startswith("up_blocks.")),
        ("up_blocks.*", lambda name: name.startswith("up_blocks.")),
        ("up_blocks.1", lambda name: name.startswith("up_blocks.1.")),
        ("*.to_q.weight", lambda name: name.endswith(".to_q.weight")),
        ("conv_in.bias", lambda name: name == "conv_in.bias"),
    ],
)
def test_a_pattern_chooses_its_parameters(names, pattern, is_part):
    expected = [name for name in names if is_part(name)]
    assert 0 < len(expected) < len(names)
    assert list(lr_factors(names, [pattern])) == expected


def test_every_alias_chooses_something(names):
    assert all(lr_factors(names, [alias]) for alias in ALIASES)


def test_the_last_pattern_that_matches_decides(names):
    factors = lr_factors(names, ["attention", "up_blocks=0.5", "norms = 0", "up_blocks.1.attentions.0.norm.bias=3"])
    assert factors["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == 1
    assert factors["up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == 0.5
    assert factors["up_blocks.0.resnets.0.conv1.weight"] == 0.5
    assert "up_blocks.0.resnets.0.norm1.weight" not in factors
    assert factors["up_blocks.1.attentions.0.norm.bias"] == 3
    assert "conv_in.weight" not in factors


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("atention", "the nearest are attention"),
        ("up_block.1", "the nearest are up_blocks.1"),
        ("*.to_qq.weight", "to_q.weight"),
        ("zzzzzzzzzzzzzzz", "use all, attention, "),
    ],
)
def test_a_pattern_without_a_parameter_is_refused_with_the_nearest_names(names, pattern, nearest):
    with pytest.raises(UserError, match="matches no parameter of this UNet; ") as error:
        lr_factors(names, ["all", pattern])
    assert nearest in str(error.value)


def test_patterns_that_leave_nothing_are_refused(names):
    with pytest.raises(UserError, match="leaves nothing to train"):
        lr_factors(names, ["norms=0"])


@pytest.mark.parametrize(
    "entry", ["", "=1", "attention=", "attention=fast", "attention=-1", "attention=nan", "a" * 201]
)
def test_entries_of_another_form_are_refused(entry):
    with pytest.raises(ValueError, match=r"pattern of 1 to 200|factor of the learning rate from 0 to 1000"):
        parse_pattern(entry)
    with pytest.raises(UserError, match=r"train\.layers"):
        parse_config({"train": {"layers": [entry]}}, "here")


def test_the_setting_survives_its_file():
    config = parse_config({"train": {"layers": ["attention", "up_blocks.*=0.5"]}}, "here")
    assert 'layers = ["attention", "up_blocks.*=0.5"]' in to_toml(config)
