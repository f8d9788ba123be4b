"""`safelight bench gate`: fail if a counted figure rose above its golden value in bench/results/counts.jsonl.

The newest line of each config is golden. When a figure falls, append the new count with `bench count --append`.
"""

from __future__ import annotations

from pathlib import Path

from safelight.bench.core.results import COUNTS, flatten, newest, read
from safelight.bench.measure.count import figures, trace
from safelight.errors import UserError
from safelight.trainer.models.base import resolve_base


def goldens(path: Path = COUNTS, base: str = "") -> list[dict]:
    """Return the newest counted line of each config, or only those of a base. Raises UserError if there is none."""
    lines = [line for line in newest(read(path)).values() if line["bench"] == "count"]
    chosen = [line for line in lines if base in ("", line["config"]["base"])]
    if not chosen:
        raise UserError(f"{path} has no count of {base or 'any base'}; add one with `bench count --append`")
    return chosen


def differences(golden: dict, current: dict) -> tuple[list[str], list[str]]:
    """Return (what rose, what fell), a line of text for each figure. A class that golden lacks has risen from 0."""
    before, now = flatten(golden), flatten(current)
    rose, fell = [], []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, 0), now.get(name, 0)
        if new != old:
            (rose if new > old else fell).append(f"{name}: {old:,} -> {new:,}")
    return rose, fell


def check(golden: dict) -> tuple[list[str], list[str]]:
    """Count the config of a golden line again and return (what rose, what fell)."""
    config = dict(golden["config"])
    base = resolve_base(config.pop("base"))
    return differences(golden["figures"], figures(trace(base, **config)))
