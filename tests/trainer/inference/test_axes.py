"""Axes of a grid as a user writes them: how each spelling is read, and the one line about a mistake."""

import pytest

from safelight.errors import UserError
from safelight.trainer.inference.axes import KINDS, Axis, describe_axes, parse_axes, parse_axis
from safelight.trainer.inference.axis_values import MAX_VALUES

READ = {
    "cfg=3,5,7.5,12": ("cfg", (3.0, 5.0, 7.5, 12.0)),
    "CFG Scale= 1-2 (+0.5) , 7": ("cfg", (1.0, 1.5, 2.0, 7.0)),
    "cfg=0.1-0.3(+0.1)": ("cfg", (0.1, 0.2, 0.3)),
    "cfg=1-2 [5]": ("cfg", (1.0, 1.25, 1.5, 1.75, 2.0)),
    "steps=10-40 (+10)": ("steps", (10, 20, 30, 40)),
    # as A1111: evenly spaced, rounded down
    "Steps=1-10 [5]": ("steps", (1, 3, 5, 7, 10)),
    "steps=20-10 (-5),3": ("steps", (20, 15, 10, 3)),
    "steps=3-1": ("steps", (3, 2, 1)),
    "seed=1-4": ("seed", (1, 2, 3, 4)),
    "seed=18446744073709551615": ("seed", (2**64 - 1,)),
    "seed=5,5,6": ("seed", (5, 6)),
    "checkpoint=Base, best,last,30+4,epoch-27": ("checkpoint", ("base", "best", "last", "30+4", "epoch-27")),
    'prompt="a barn, snow",a hen\'s nest': ("prompt", ("a barn, snow", "a hen's nest")),
    'prompt="the ""old"" barn",x=y': ("prompt", ('the "old" barn', "x=y")),
    "prompt": ("prompt", ()),
    "negative_prompt=blurry,": ("negative-prompt", ("blurry", "")),
    "negative=": ("negative-prompt", ("",)),
    "Prompt S/R=red, blue,green": ("replace", ("red", "blue", "green")),
    "Sampler=DPM++ 2M,DDIM": ("sampler", ("dpm++", "ddim")),
    "clip skip=0-2": ("clip-skip", (0, 1, 2)),
    "EMA=on,OFF": ("ema", (True, False)),
    "prompt=\udce9": ("prompt", ("\\udce9",)),
}


@pytest.mark.parametrize("text", READ, ids=ascii)
def test_what_is_read(text):
    assert parse_axis("--x", text) == Axis(*READ[text])


REFUSED = {
    "cgf=3": "'cgf' is not an axis; did you mean cfg? axes are checkpoint, cfg,",
    "hue=3": "'hue' is not an axis; axes are checkpoint, cfg,",
    "": "'' is not an axis",
    "cfg": "cfg has no values; give for example --x 'cfg=3,5,7.5'",
    "cfg=": "cfg: '' is not a number; give for example 3,5,7.5",
    "cfg=3;5": "'3;5' is not a number",
    "cfg=1e3": "'1e3' is not a number",
    "cfg=nan": "'nan' is not a number",
    "steps=1.5": "steps: 1.5 is not a whole number",
    "steps=1-5 (+0)": "1-5 (+0) never reaches 5",
    "steps=1-5 (-2)": "1-5 (-2) never reaches 5",
    "steps=1-500": "1-500 has more than 200 values; give a larger step, as in 1-500 [5]",
    "steps=1-500 [300]": "[300] is not from 1 to 200 values",
    "steps=1-150,151-300": "has more than 200 values",
    "steps=" + "9" * 50: "is not a number",
    "prompt=" + ",".join(map(str, range(MAX_VALUES + 1))): "prompt has 201 values, more than 200",
    'prompt="a': "put a value with commas in double quotes",
    'prompt="a"b': "put a value with commas in double quotes",
    "ema=maybe": "ema: 'maybe' is not on or off",
    "replace=red": "give the text to replace, then what replaces it",
    "replace=,red": "give the text to replace",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_one_line_with_its_fix(text):
    with pytest.raises(UserError) as refused:
        parse_axis("--x", text)
    assert str(refused.value).startswith("--x ")
    assert REFUSED[text] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_axes_follow_each_other_and_differ():
    axes = parse_axes({"x": "cfg=3", "y": "replace=a,b", "z": "replace=c,d"})
    assert list(axes) == ["x", "y", "z"]
    assert list(parse_axes({"x": "cfg=3", "y": None, "z": None})) == ["x"]
    with pytest.raises(UserError, match="--z without --y"):
        parse_axes({"x": "cfg=3", "y": None, "z": "steps=3"})
    with pytest.raises(UserError, match="cfg is on two axes"):
        parse_axes({"x": "cfg=3", "y": "cfg=5", "z": None})


def test_every_example_of_the_help_is_read():
    assert [parse_axis("--x", example).name for example, _ in describe_axes()] == list(KINDS)
