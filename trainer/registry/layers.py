"""The names that train.layers knows, and which parameters its patterns choose. Does not import torch.

A pattern is an alias below, a module of the UNet or a glob over diffusers' parameter names, and may end in `=FACTOR`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from safelight.errors import UserError

MAX_PATTERNS = 64
MAX_PATTERN_CHARS = 200
MAX_FACTOR = 1000.0
NUM_SUGGESTIONS = 3

# alias -> (globs over the parameters' names, what it is)
ALIASES: dict[str, tuple[tuple[str, ...], str]] = {
    "all": (("*",), "everything"),
    "attention": (("*.attn1.*", "*.attn2.*"), "self- and cross-attention"),
    "self_attention": (("*.attn1.*",), "attention among pixels"),
    "cross_attention": (("*.attn2.*",), "attention to the text"),
    "text_projections": (("*.attn2.to_k.*", "*.attn2.to_v.*"), "the keys and values of the text"),
    "feed_forward": (("*.ff.*",), "the transformers' feed-forward layers"),
    "transformers": (("*.attentions.*",), "whole transformers"),
    "resnets": (("*.resnets.*",), "residual blocks"),
    "norms": (("*norm*",), "all norms"),
    "time": (
        ("time_embedding.*", "add_embedding.*", "*.time_emb_proj.*"),
        "embeddings of the timestep, and SDXL's of the size",
    ),
}


class Pattern(NamedTuple):
    """One entry of train.layers. factor: what the learning rate is multiplied by; 0: not trained."""

    text: str
    factor: float

    def globs(self) -> tuple[str, ...]:
        if self.text in ALIASES:
            return ALIASES[self.text][0]
        # a module stands for all that is in it
        return self.text, f"{self.text}.*"

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.globs())


def parse_pattern(entry: str) -> Pattern:
    """Return an entry of train.layers in parts.

    Raises ValueError for an empty or a long one, or a factor out of range.
    """
    text, separator, number = (part.strip() for part in entry.partition("="))
    if not text or len(entry) > MAX_PATTERN_CHARS:
        raise ValueError(f"{entry[:40]!r} is no pattern of 1 to {MAX_PATTERN_CHARS} characters")
    if not separator:
        return Pattern(text, 1.0)
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 0 <= factor <= MAX_FACTOR:
        raise ValueError(
            f"{entry!r} needs a factor of the learning rate from 0 to {MAX_FACTOR:g} after =, such as {text}=0.5"
        )
    return Pattern(text, factor)


def lr_factors(names: Collection[str], patterns: Sequence[str]) -> dict[str, float]:
    """Return the factor of the learning rate for each parameter that train.layers chooses, in the order of `names`.

    The last pattern that matches a parameter decides. Without patterns everything is trained, with factor 1.
    Raises UserError for a pattern that matches nothing, and if nothing is left to train.
    """
    if not patterns:
        return dict.fromkeys(names, 1.0)
    parsed = [parse_pattern(entry) for entry in patterns]
    for pattern in parsed:
        if not any(map(pattern.matches, names)):
            raise UserError(
                f"train.layers: {pattern.text!r} matches no parameter of this UNet; {_advice(pattern, names)}"
            )
    chosen: dict[str, float] = {}
    for name in names:
        factor = next((pattern.factor for pattern in reversed(parsed) if pattern.matches(name)), 0.0)
        if factor > 0:
            chosen[name] = factor
    if not chosen:
        raise UserError(
            f"train.layers {list(patterns)} leaves nothing to train; "
            'put what is trained first, such as ["all", "time=0"]'
        )
    return chosen


def _modules_of(name: str) -> Iterator[str]:
    words = name.split(".")
    return (".".join(words[:number]) for number in range(1, len(words) + 1))


def _advice(pattern: Pattern, names: Collection[str]) -> str:
    known = [*ALIASES, *dict.fromkeys(module for name in names for module in _modules_of(name))]
    if pattern.text.startswith("*"):
        known = list(dict.fromkeys(f"*.{'.'.join(name.split('.')[-2:])}" for name in names))
    nearest = difflib.get_close_matches(pattern.text, known, n=NUM_SUGGESTIONS, cutoff=0.5)
    if nearest:
        return f"the nearest are {', '.join(nearest)}"
    return f"use {', '.join(ALIASES)}, a module such as up_blocks.1, or a glob over diffusers' names"


def help_text() -> str:
    """Return the help of train.layers."""
    aliases = ";\n".join(f"{name}: {what}" for name, (_, what) in ALIASES.items())
    return (
        "Which layers of the UNet are trained; empty: all. The others keep the base's weights, and cost no gradients,\n"
        "optimizer state or average. Each entry is a module (up_blocks.1), a glob over diffusers' parameter names\n"
        "(*.to_q.weight), or a name from below, and may end in =FACTOR: its learning rate is optimizer.lr times that,\n"
        '0 leaves it out. The last entry that fits a parameter decides: ["attention", "up_blocks=0.5", "norms=0"].\n'
        f"{aliases}."
    )
