"""The axes of a grid: which settings can change along one, and how their values are written. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safelight.errors import UserError
from safelight.text import storable
from safelight.trainer.inference.axis_values import MAX_VALUES, numbers, split
from safelight.trainer.registry.samplers import SAMPLERS, SPACINGS, sampler_named

Value = str | int | float | bool


@dataclass(frozen=True)
class Kind:
    """A setting that can be an axis. example: of its values, as on the command line. read: returns them.

    meaning: what is to be said of it besides, in the help.
    """

    example: str
    read: Callable[[str], Sequence[Value]]
    meaning: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis: the name of a setting and its values; none for prompts that are given otherwise."""

    name: str
    values: tuple[Value, ...]


def _texts(text: str) -> list[str]:
    return [storable(part) for part in split(text)]


def _words(text: str) -> list[str]:
    return [part.lower() for part in _texts(text)]


def _samplers(text: str) -> list[str]:
    """Return the names of samplers, also of those that other programs call otherwise."""
    return [sampler_named(word) for word in _words(text)]


def _replacements(text: str) -> list[str]:
    words = _texts(text)
    if len(words) < 2 or not words[0]:
        raise UserError("give the text to replace, then what replaces it, as in replace=red,blue,green")
    return words


def _switches(text: str) -> list[bool]:
    values = {"on": True, "off": False}
    if unknown := [word for word in _words(text) if word not in values]:
        raise UserError(f"{unknown[0]!r} is not on or off; give ema=on,off")
    return [values[word] for word in _words(text)]


KINDS = {
    "checkpoint": Kind("base,best,last", _words, "also all, steps, epochs: 27, 30+4"),
    "cfg": Kind("3,5,7.5", lambda text: numbers(text, whole=False)),
    "steps": Kind("10-40 (+10)", lambda text: numbers(text, whole=True)),
    "sampler": Kind(",".join(SAMPLERS), _samplers),
    "spacing": Kind(",".join(SPACINGS), _words, "of the steps' timesteps"),
    "seed": Kind("1-4", lambda text: numbers(text, whole=True)),
    "prompt": Kind('"a barn, snow",a hen', _texts, "without values: those of --prompt"),
    "negative-prompt": Kind('"",blurry', _texts),
    "replace": Kind("red,blue,green", _replacements, "the first, in the prompt, by each"),
    "clip-skip": Kind("0-2", lambda text: numbers(text, whole=True), "A1111 counts one more"),
    "ema": Kind("on,off", _switches, "of runs with train.ema_decay"),
    "embedding": Kind("none,look", _texts, "in the prompt, of --embedding"),
    "negative-embedding": Kind("none,bad-hands", _texts, "in the negative prompt"),
    "lora-scale": Kind("0-1 (+0.25)", lambda text: numbers(text, whole=False), "of runs that train a LoRA"),
}
# as A1111 calls them, and shorter
_OTHER_NAMES = {
    "checkpoint-name": "checkpoint",
    "checkpoints": "checkpoint",
    "cfg-scale": "cfg",
    "negative": "negative-prompt",
    "prompts": "prompt",
    "prompt-s/r": "replace",
    "lora": "lora-scale",
}


def parse_axis(option: str, text: str) -> Axis:
    """Return the axis that a text such as cfg=3,5,7.5 describes. option: its name in messages.

    `prompt` alone has no values: those of --prompt are meant. Equal values are one. Raises UserError, with the fix.
    """
    written, equals, values = text.partition("=")
    name = "-".join(written.lower().replace("_", " ").replace("-", " ").split())
    name = _OTHER_NAMES.get(name, name)
    if name not in KINDS:
        near = difflib.get_close_matches(name, [*KINDS, *_OTHER_NAMES], n=1)
        hint = f"did you mean {_OTHER_NAMES.get(near[0], near[0])}? " if near else ""
        raise UserError(f"{option} {written!r} is not an axis; {hint}axes are {', '.join(KINDS)}")
    if not equals and name == "prompt":
        return Axis(name, ())
    if not equals:
        raise UserError(f"{option} {written} has no values; give for example {option} '{name}={KINDS[name].example}'")
    try:
        found = KINDS[name].read(values)
    except UserError as error:
        raise UserError(f"{option} {written}: {error}") from None
    if len(found) > MAX_VALUES:
        raise UserError(f"{option} {written} has {len(found)} values, more than {MAX_VALUES}; give fewer")
    return Axis(name, tuple(dict.fromkeys(found)))


def parse_axes(texts: dict[str, str | None]) -> dict[str, Axis]:
    """Return the axis of each option (x, y, z) that is given.

    Raises UserError if one is not valid, if a setting is on two axes, or if y or z is given without what comes before.
    """
    given = {option: parse_axis(f"--{option}", text) for option, text in texts.items() if text is not None}
    lacking = [option for option in texts if option not in given]
    if lacking and any(option > lacking[0] for option in given):
        later = next(option for option in given if option > lacking[0])
        raise UserError(f"--{later} without --{lacking[0]}; call the first axis --x, the second --y, the third --z")
    names = [axis.name for axis in given.values()]
    # texts may be replaced on two axes: red by other colours on one, a barn by other things on the other
    if twice := [name for name in names if names.count(name) > 1 and name != "replace"]:
        raise UserError(f"{twice[0]} is on two axes; put another setting on one, or all values on the other")
    return given


def describe_axes() -> list[tuple[str, str]]:
    """Return (example, what is to be said of it) of every axis, for the help."""
    return [(f"{name}={kind.example}", kind.meaning) for name, kind in KINDS.items()]
