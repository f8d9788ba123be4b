"""Benchmark results as append-only JSON lines: config, figures, machine and commit. For example:

{"bench": "step", "config": {...}, "figures": {...}, "machine": {...}, "git_commit": "...", "git_dirty": false, ...}
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import safelight
from safelight.errors import UserError
from safelight.text import printable
from safelight.trainer.run_log.environment import describe
from safelight.untrusted import MAX_JSON_BYTES, UnsafeFile, parse_json, read_lines

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

# the longest line of ours, of `bench plan`, has 14 KB
MAX_LINE_BYTES = 2**20
MAX_LINE_VALUES = 2**16


def _is_number(value: object) -> bool:
    # what is measured is far smaller, and pictures cannot be laid out beyond
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _is_spread(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)) and sorted(value) == value


NUMBER = ("number", _is_number)
TEXT = (
    "text of at most 200 printable characters",
    lambda value: isinstance(value, str) and len(value) <= 200 and printable(value) == value,
)
COUNT = ("whole number", lambda value: type(value) is int and 0 <= value < 2**32)
TIMED_STEP = {
    **{f"config/{name}": TEXT for name in ("recipe", "base")},
    **{f"config/{name}": COUNT for name in ("batch_size", "latent_size")},
    "machine/device": TEXT,
    "figures/images_per_s": ("list of three numbers, ascending", _is_spread),
}
# benchmark -> what `compare`, `gate` and the plots read in each of its lines -> what it is, and whether a value is it
NEEDED: dict[str, dict[str, tuple[str, Callable[[object], bool]]]] = {
    "count": {
        **{f"config/{name}": TEXT for name in ("base", "precision", "layout", "checkpointing")},
        "config/batch_size": COUNT,
        "figures/memory_bound_gb": NUMBER,
        "figures/launches": NUMBER,
    },
    "rounding": {
        "config/weights": TEXT,
        "config/num_steps": COUNT,
        "config/lr": NUMBER,
        **{
            f"figures/{mode}/{name}": NUMBER
            for mode in ("plain bf16", "rounded", "near", "exact")
            for name in ("noise_to_displacement", "changed_values")
        },
    },
    "roofline": {
        **{f"config/{name}": TEXT for name in ("base", "precision")},
        "config/batch_size": COUNT,
        "figures/least_ms": NUMBER,
        "figures/classes": ("object", lambda value: isinstance(value, dict)),
        "machine/device": TEXT,
    },
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


def append_all(path: Path | None, *records: dict) -> None:
    """Append result lines to the file that --append names, if it was given."""
    if path is not None:
        for record in records:
            append(path, record)


def read(path: Path) -> list[dict]:
    """Return the lines of a results file. Raises UserError naming the line that is not JSON or lacks what is shown."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .jsonl file of results")
    records = []
    for number, line in enumerate(read_lines(path, MAX_JSON_BYTES, MAX_LINE_BYTES), start=1):
        try:
            record = parse_json(line or b"", max_values=MAX_LINE_VALUES)
        except UnsafeFile as error:
            reason = "it is too long" if line is None else error
            raise UserError(f"{path} line {number} is not JSON: {reason}; delete that line") from None
        if wrong := _wrong_field(record):
            raise UserError(f"{path} line {number} is no result: {wrong}; delete that line")
        records.append(record)
    return records


def _wrong_field(record: object) -> str | None:
    """Return what `compare` and the plots could not use in a line; None if nothing. Lines without config are notes."""
    if not isinstance(record, dict):
        return "it is no JSON object"
    for name in ("bench", "git_commit", "date", "note"):
        if not isinstance(record.get(name, ""), str):
            return f"{name} is no text"
    if "config" not in record:
        return None
    for name in ("bench", "config", "figures"):
        if name not in record:
            return f"{name} is missing"
    for name in ("config", "figures", "machine"):
        if not isinstance(record.get(name, {}), dict):
            return f"{name} is no object"
    needed = {**NEEDED.get(record["bench"], {}), **_needed_if_present(record)}
    for name, (kind, is_valid) in needed.items():
        value: object = record
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if not is_valid(value):
            return f"{name.replace('/', '.')} is no {kind}"
    return None


def _needed_if_present(record: dict) -> dict[str, tuple[str, Callable[[object], bool]]]:
    """Return what a plot needs of a line because of what else is in it."""
    figures, needed = record["figures"], {}
    if record["bench"] in ("step", "quick"):
        if "images_per_s" in figures:
            needed |= TIMED_STEP
        if figures.get("peak_gib") is not None:
            needed["figures/peak_gib"] = NUMBER
    if record["bench"] == "roofline":
        is_measured = "step_ms" in figures
        if is_measured:
            needed["figures/model_flop_use/share_of_limit"] = NUMBER
        classes = figures.get("classes")
        for name, row in classes.items() if isinstance(classes, dict) else ():
            is_valid = TEXT[1](name) and isinstance(row, dict)
            # a class of which no operator ran has no share
            is_valid = is_valid and all(
                _is_number(value) or (figure == "share_of_limit" and value is None) for figure, value in row.items()
            )
            is_valid = is_valid and ("ms" in row or not is_measured)
            if not is_valid:
                needed[f"figures/classes/{name}"] = ("class of operators", lambda value: False)
    return needed


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
            return printable(name if str(value) == "True" else f"no {name}")[:200]
        # a word is clear without the name of its setting, a number is not
        return printable(str(value) if str(value)[:1].isalpha() else f"{name} {value}")[:200]

    return [
        ", ".join(printable(text(key, config[key])[:200]) for key in varying if key in config) for config in configs
    ]


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
