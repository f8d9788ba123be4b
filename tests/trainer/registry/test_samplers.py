"""Names of samplers: our own, and those of other programs, wherever a sampler is named."""

import re

import pytest

from safelight.errors import UserError
from safelight.options.arguments import Grid, Sample
from safelight.options.parsing import parse
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.axes import parse_axis
from safelight.trainer.registry.samplers import SAMPLERS, sampler_named

# as A1111, kohya's sd-scripts and EveryDream2 write them
ELSEWHERE = {
    "DPM++ 2M Karras": "dpm++-karras",
    "DPM++ 2M": "dpm++",
    "dpm++_2m": "dpm++",
    "dpmsolver++": "dpm++",
    "Euler a": "euler-a",
    "euler_a": "euler-a",
    "k_euler_a": "euler-a",
    "k_euler": "euler",
    "DDIM": "ddim",
    "UniPC": "unipc",
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.toml").write_text('[run]\ndir = "r"\n')
    return tmp_path


@pytest.mark.parametrize("word", ELSEWHERE)
def test_a_sampler_may_be_named_as_elsewhere(run, word):
    name = ELSEWHERE[word]
    for shape, more in ((Sample, []), (Grid, ["--x", "cfg=3,5"])):
        assert parse(shape, [str(run), "--sampler", word, *more], shape.__name__.lower(), "").sampler == name
    assert parse_axis("--x", f"sampler={word}").values == (name,)
    assert parse_config({"sample": {"sampler": word}}, "f").sample.sampler == name
    stage = parse_config({"stage": [{"epochs": 1, "sample": {"sampler": word}}]}, "f").stages()[0]
    assert stage.config.sample.sampler == name


def test_an_unknown_sampler_gets_the_nearest(run):
    told = re.escape(f"'DPM++ 2M SDE Karras' is unknown; the nearest is dpm++-karras; use {', '.join(SAMPLERS)}")
    with pytest.raises(UserError, match=told):
        sampler_named("DPM++ 2M SDE Karras")
    with pytest.raises(UserError, match=f"--sampler {told}"):
        parse(Sample, [str(run), "--sampler", "DPM++ 2M SDE Karras"], "sample", "")
    with pytest.raises(UserError, match=f"sample.sampler = .*{told}"):
        parse_config({"sample": {"sampler": "DPM++ 2M SDE Karras"}}, "f")


def test_choices_are_listed_in_one_order(run):
    with pytest.raises(UserError, match=r"Expected one of \('leading', 'linspace', 'trailing'\)"):
        parse(Sample, [str(run), "--spacing", "x"], "sample", "")
