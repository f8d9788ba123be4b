"""Results: append-only JSON lines. A line holds what was measured, on what, with which code, and the figures.

{"bench": "step", "config": {...}, "figures": {...}, "machine": {...}, "git_commit": "...", "git_dirty": false, ...}
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import torch

import safelight
from safelight.errors import UserError
from safelight.trainer.run_log.environment import describe

ROOT = Path(safelight.__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COUNTS = RESULTS / "counts.jsonl"
_CLOCKS = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "driver_version": "driver",
}


def clocks(device: torch.device) -> dict[str, str]:
    """Return a GPU's clocks, power limit, temperature and driver as nvidia-smi tells them; empty without it."""
    if device.type != "cuda":
        return {}
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS.values(), (part.strip() for part in told.strip().split(",")), strict=False))


def _is_dirty() -> bool | None:
    """Return whether tracked files differ from the commit; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def _load() -> float | None:
    """Return how many processes wanted a core in the last minute; above the cores, timings are of a shared machine."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def make_record(bench: str, config: dict, figures: dict, device: torch.device, note: str = "") -> dict:
    """Return a result line. config: what the figures depend on; figures: plain values, units in their names."""
    told = describe(device)
    # the command names places of one machine; config says what matters of it
    told.pop("command"), told.pop("platform")
    commit, started = told.pop("git_commit"), told.pop("started")
    record = {
        "bench": bench,
        "config": config,
        "figures": figures,
        "machine": {**told, **clocks(device), "load_average": _load()},
        "git_commit": commit,
        "git_dirty": _is_dirty(),
        "date": started,
    }
    return {**record, "note": note} if note else record


def append(path: Path, record: dict) -> None:
    """Add a line to a results file, on disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """Return the lines of a results file. Raises UserError for one that is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .jsonl of results")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {number} is no JSON; delete the line") from None
    return lines


def key_of(record: dict) -> tuple[str, str]:
    """Return what two lines must share to be compared: the benchmark and its config."""
    return record["bench"], json.dumps(record["config"], sort_keys=True)


def newest(records: list[dict]) -> dict[tuple[str, str], dict]:
    """Return the last line of each benchmark and config."""
    return {key_of(record): record for record in records if "config" in record}


def flat(figures: dict, prefix: str = "", place: int = 1) -> dict[str, float]:
    """Return the numbers among nested figures by dotted name; of (p20, p50, p80) the one at a place."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.", place)
        elif isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value):
            found[f"{prefix}{name}"] = value[place]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


def find(spec: str) -> list[dict]:
    """Return the lines of a file, or those of a commit's prefix among bench/results. Raises UserError for neither."""
    if Path(spec).is_file():
        return read(Path(spec))
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in read(path)]
    found = [line for line in lines if len(spec) >= 7 and line.get("git_commit", "").startswith(spec)]
    if not found:
        raise UserError(f"{spec!r} is neither a results file nor a commit (7 digits or more) in bench/results")
    return found


def compare(a: list[dict], b: list[dict]) -> list[tuple[str, str, str, float, float]]:
    """Return (benchmark, config, figure, value in a, value in b) of everything that both measured; newest lines."""
    ours, theirs = newest(a), newest(b)
    return [
        (bench, config, name, value, flat(theirs[bench, config]["figures"])[name])
        for (bench, config), record in ours.items()
        if (bench, config) in theirs
        for name, value in flat(record["figures"]).items()
        if name in flat(theirs[bench, config]["figures"])
    ]


def slower(a: list[dict], b: list[dict], share: float) -> list[str]:
    """Return a line for each time of b that is above a's, and each rate below it, by more than a share; newest lines.

    Judged by the faster end, a time's p20 and a rate's p80: other work on a machine only ever adds time.
    """
    found, ours, theirs = [], newest(a), newest(b)
    for bench, config, name, *_ in compare(a, b):
        is_rate = name.endswith("_per_s")
        place = 2 if is_rate else 0
        before, after = (flat(lines[bench, config]["figures"], place=place)[name] for lines in (ours, theirs))
        if not (is_rate or name.endswith(("_ms", "_s"))) or before <= 0 or after <= 0:
            continue
        longer = (before / after if is_rate else after / before) - 1
        if longer > share:
            found.append(f"slower by {100 * longer:.1f} %: {bench} {name} {before:g} -> {after:g}, {config}")
    return found
