"""Benchmark results as append-only JSON lines: config, figures, machine and commit. For example:

{"bench": "step", "config": {...}, "figures": {...}, "machine": {...}, "git_commit": "...", "git_dirty": false, ...}
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
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
    """Return a GPU's clocks, power limit, temperature and driver as nvidia-smi prints them; empty if it cannot run."""
    if device.type != "cuda":
        return {}
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS.values(), (part.strip() for part in output.strip().split(",")), strict=False))


def _is_dirty() -> bool | None:
    """Return whether tracked files differ from HEAD; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def _load_average() -> float | None:
    """Return the 1-minute load average; above the number of cores, other processes disturbed the timing."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def make_record(bench: str, config: dict, figures: dict, device: torch.device, note: str = "") -> dict:
    """Return a result line.

    config: all settings that the figures depend on; lines with equal config are comparable. figures: plain values with
    units in their names.
    """
    machine = describe(device)
    # the command line holds paths of one machine; what matters of it is in config
    machine.pop("command"), machine.pop("platform")
    commit, started = machine.pop("git_commit"), machine.pop("started")
    record = {
        "bench": bench,
        "config": config,
        "figures": figures,
        "machine": {**machine, **clocks(device), "load_average": _load_average()},
        "git_commit": commit,
        "git_dirty": _is_dirty(),
        "date": started,
    }
    return {**record, "note": note} if note else record


def append(path: Path, record: dict) -> None:
    """Append a line to a results file and sync it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """Return the lines of a results file. Raises UserError if it is missing or a line is not JSON."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .jsonl file of results")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {number} is not JSON; delete that line") from None
    return lines


def key_of(record: dict) -> tuple[str, str]:
    """Return (benchmark, config as JSON): two lines with the same key can be compared."""
    return record["bench"], json.dumps(record["config"], sort_keys=True)


def newest(records: list[dict]) -> dict[tuple[str, str], dict]:
    """Return the last line of each key_of."""
    return {key_of(record): record for record in records if "config" in record}


def flatten(figures: dict, prefix: str = "", index: int = 1) -> dict[str, float]:
    """Return the numbers in nested figures by dotted name. index: position in each [p20, p50, p80]."""
    numbers: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            numbers |= flatten(value, f"{prefix}{name}.", index)
        elif isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value):
            numbers[f"{prefix}{name}"] = value[index]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{name}"] = value
    return numbers


def labels(configs: Sequence[Mapping[str, object]]) -> list[str]:
    """Return for each config the settings in which it differs from the others, as text: `adamw, batch size 4`."""
    keys = dict.fromkeys(key for config in configs for key in config)
    varying = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]

    def text(key: str, value: object) -> str:
        name = key.replace("_", " ")
        if str(value) in ("True", "False"):
            return name if str(value) == "True" else f"no {name}"
        # a word is clear without the name of its setting, a number is not
        return str(value) if str(value)[:1].isalpha() else f"{name} {value}"

    return [", ".join(text(key, config[key]) for key in varying if key in config) for config in configs]


def find(spec: str) -> list[dict]:
    """Return the lines of a results file, or all lines in bench/results of a commit, given by 7 or more digits.

    Raises UserError if it is neither.
    """
    if Path(spec).is_file():
        return read(Path(spec))
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in read(path)]
    of_commit = [line for line in lines if len(spec) >= 7 and line.get("git_commit", "").startswith(spec)]
    if not of_commit:
        raise UserError(f"{spec!r} is neither a results file nor a commit (7 digits or more) in bench/results")
    return of_commit


def compare(a: list[dict], b: list[dict]) -> list[tuple[str, str, str, float, float]]:
    """Return (benchmark, config, figure, value in a, value in b) for every figure in the newest lines of both."""
    newest_a, newest_b = newest(a), newest(b)
    return [
        (bench, config, name, value, flatten(newest_b[bench, config]["figures"])[name])
        for (bench, config), record in newest_a.items()
        if (bench, config) in newest_b
        for name, value in flatten(record["figures"]).items()
        if name in flatten(newest_b[bench, config]["figures"])
    ]


def slower_figures(a: list[dict], b: list[dict], share: float) -> list[str]:
    """Return a line of text for each time or rate in which b is slower than a by more than `share`; newest lines.

    Compares the p20 of times and the p80 of rates, because other load on the machine can only make a step slower.
    """
    regressions, newest_a, newest_b = [], newest(a), newest(b)
    for bench, config, name, *_ in compare(a, b):
        is_rate = name.endswith("_per_s")
        index = 2 if is_rate else 0
        before, after = (flatten(lines[bench, config]["figures"], index=index)[name] for lines in (newest_a, newest_b))
        if not (is_rate or name.endswith(("_ms", "_s"))) or before <= 0 or after <= 0:
            continue
        slowdown = (before / after if is_rate else after / before) - 1
        if slowdown > share:
            regressions.append(f"slower by {100 * slowdown:.1f} %: {bench} {name} {before:g} -> {after:g}, {config}")
    return regressions
