"""`safelight bench gate`: counted figures must not rise. bench/results/counts.jsonl holds what they are.

The newest line of a config is golden. A figure that falls is good news, to be written down with `bench count --append`.
"""

from __future__ import annotations

from pathlib import Path

from safelight.bench.core.results import COUNTS, flat, newest, read
from safelight.bench.measure.count import figures, trace
from safelight.errors import UserError
from safelight.trainer.models.base import resolve_base


def goldens(path: Path = COUNTS, base: str = "") -> list[dict]:
    """Return the newest counted line of each config, of one base if named. Raises UserError if there is none."""
    lines = [line for line in newest(read(path)).values() if line["bench"] == "count"]
    chosen = [line for line in lines if base in ("", line["config"]["base"])]
    if not chosen:
        raise UserError(f"{path} has no counted line of {base or 'any base'}; add one with `bench count --append`")
    return chosen


def differences(golden: dict, found: dict) -> tuple[list[str], list[str]]:
    """Return (what rose, what fell), each a line: figure, golden value, value now. A class that is new has risen from 0."""
    before, now = flat(golden), flat(found)
    rose, fell = [], []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, 0), now.get(name, 0)
        if new != old:
            (rose if new > old else fell).append(f"{name}: {old:,} -> {new:,}")
    return rose, fell


def check(golden: dict) -> tuple[list[str], list[str]]:
    """Trace a golden line's config again and return (what rose, what fell)."""
    config = dict(golden["config"])
    base = resolve_base(config.pop("base"))
    return differences(golden["figures"], figures(trace(base, **config)))
