"""How a dataset's tags are ordered; without numpy, since every `--help` imports it through the settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TagSettings:
    """How tags are ordered, unless a photo's own settings say otherwise.

    variants: orders of each photo's tags. keep: how many of the first tags stay in front. limit: the largest number of
    tags in a caption, those in front included; 0 for all. shuffles: whether tags stand in the order in which they were
    drawn; else in the order in which they were written.
    """

    variants: int = 1
    keep: int = 0
    limit: int = 0
    shuffles: bool = True
