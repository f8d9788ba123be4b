"""Read a run folder, tolerating files that are missing, truncated or damaged.

A report is most useful when a run went wrong, so a bad file never raises: `problems` lists what could not be read, and
the report shows it. Only a missing folder is an error.
"""

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from safelight.errors import UserError
from safelight.text import counted

TRAIN_COLUMNS = ("step", "epoch", "stage", "loss", "lr", "grad_norm", "images_per_s", "memory_gib", "time")
SPLITS = ("held_out", "train_subset")


@dataclass(frozen=True)
class Validation:
    """One validation of one split: fixed photographs, fixed noise, fixed timesteps."""

    step: int
    epoch: float
    loss: float
    loss_by_timestep: tuple[float, ...]
    num_images: int


@dataclass(frozen=True)
class Metrics:
    """The contents of metrics.jsonl.

    train: TRAIN_COLUMNS -> (N,) float64, NaN where a line lacks the value. validation: SPLITS -> validations in order
    of steps. times: (unix seconds, event or "") of every line, in the order of the file.
    """

    train: dict[str, np.ndarray]
    validation: dict[str, list[Validation]]
    events: list[dict]
    times: list[tuple[float, str]]
    last_step: int
    last_epoch: float


@dataclass(frozen=True)
class SampleSet:
    """The images of the fixed prompts at one step."""

    folder: Path
    step: int
    epoch: float
    images: list[dict]


@dataclass(frozen=True)
class RunFolder:
    """Everything that the report shows of a run. Files that are missing are empty or None."""

    path: Path
    config: dict
    config_text: str
    environment: dict
    model: dict
    metrics: Metrics
    samples: list[SampleSet]
    data: dict | None
    compare: dict | None
    scores: dict | None
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def base(self) -> str:
        return str(self.model.get("base") or table_of(self.config, "model").get("base") or "unknown base model")


def read_run_folder(run_dir: Path) -> RunFolder:
    """Return the contents of a run folder. Raises UserError if run_dir is not a folder."""
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist; give the folder that `safelight train` wrote")
    problems: list[str] = []
    config, config_text = _read_config(run_dir / "config.toml", problems)
    return RunFolder(
        path=run_dir,
        config=config,
        config_text=config_text,
        environment=_read_object(run_dir / "environment.json", problems) or {},
        model=_read_object(run_dir / "model.json", problems) or {},
        metrics=_read_metrics(run_dir / "metrics.jsonl", problems),
        samples=_read_samples(run_dir / "samples", problems),
        data=_read_object(run_dir / "data.json", problems),
        compare=_read_object(run_dir / "compare" / "index.json", problems),
        scores=_read_object(run_dir / "scores.json", problems),
        problems=problems,
    )


def number(value: object) -> float:
    """Return the value as a float, NaN if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def rows_of(values: dict | None, key: str) -> list[dict]:
    """Return the dicts in the list under a key, [] if there is none. Other items are left out."""
    rows = (values or {}).get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def table_of(values: dict, key: str) -> dict:
    """Return the dict under a key, {} if there is none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def num_held_out(run: RunFolder) -> int:
    """Return how many photographs held-out loss was last measured on, 0 if unknown."""
    points = run.metrics.validation["held_out"]
    known = number((run.data or {}).get("num_validation"))
    return (points[-1].num_images if points else 0) or (0 if math.isnan(known) else int(known))


def averages_note(run: RunFolder, subject: str) -> str:
    """Return a sentence saying that `subject` (with its verb) used averaged weights, "" if the run kept no average."""
    decay = number(table_of(run.config, "train").get("ema_decay"))
    return f" {subject} the moving average of the weights (train.ema_decay {decay:g})." if decay > 0 else ""


def inside(folder: Path, name: object) -> Path | None:
    """Return folder/name if that file exists and is inside the folder, else None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def _read_config(path: Path, problems: list[str]) -> tuple[dict, str]:
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        problems.append("config.toml is missing: the settings of this run are unknown")
        return {}, ""
    except OSError as error:
        problems.append(f"config.toml could not be read: {error.strerror}")
        return {}, ""
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        problems.append(f"config.toml is not valid TOML: {error}")
        return {}, text


def _read_object(path: Path, problems: list[str]) -> dict | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} could not be read: {error}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} could not be read: it does not contain a JSON object")
        return None
    return value


def _read_metrics(path: Path, problems: list[str]) -> Metrics:
    rows = _read_lines(path, problems)
    # a resumed run may repeat steps that were logged before it was killed: the later line for a step counts
    train: dict[int, dict] = {}
    validation: dict[str, dict[int, Validation]] = {split: {} for split in SPLITS}
    events = []
    for row in rows:
        step = number(row.get("step"))
        if row.get("kind") == "event":
            events.append(row)
        elif math.isnan(step):
            continue
        elif row.get("kind") == "train":
            train[int(step)] = row
        elif row.get("kind") == "validation" and row.get("split") in SPLITS:
            bands = row.get("loss_by_timestep")
            validation[row["split"]][int(step)] = Validation(
                step=int(step),
                epoch=number(row.get("epoch")),
                loss=number(row.get("loss")),
                loss_by_timestep=tuple(map(number, bands)) if isinstance(bands, list) else (),
                num_images=int(row["num_images"]) if isinstance(row.get("num_images"), int) else 0,
            )
    steps = sorted(train)
    columns = {
        name: np.array([number(train[step].get(name)) for step in steps], dtype=np.float64) for name in TRAIN_COLUMNS
    }
    ordered = {
        split: [by_step[step] for step in sorted(by_step) if math.isfinite(by_step[step].loss)]
        for split, by_step in validation.items()
    }
    reached = [(step, number(train[step].get("epoch"))) for step in steps[-1:]]
    reached += [(points[-1].step, points[-1].epoch) for points in ordered.values() if points]
    last_step, last_epoch = max(reached, default=(0, 0.0))
    times = [(number(row.get("time")), str(row.get("event") or "")) for row in rows]
    return Metrics(columns, ordered, events, times, last_step, last_epoch)


def _read_lines(path: Path, problems: list[str]) -> list[dict]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"metrics.jsonl could not be read: {error.strerror}")
        return []
    rows, num_bad = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_bad += 1
    if num_bad:
        are = "is" if num_bad == 1 else "are"
        problems.append(
            f"metrics.jsonl: {num_bad} of {counted(len(lines), 'line')} could not be read and {are} left out"
        )
    return rows


def _read_samples(folder: Path, problems: list[str]) -> list[SampleSet]:
    sets = []
    for index_path in sorted(folder.glob("step-*/index.json")):
        index = _read_object(index_path, problems)
        if index is None or math.isnan(number(index.get("step"))):
            continue
        epoch = number(index.get("epoch"))
        sets.append(SampleSet(index_path.parent, int(index["step"]), epoch, rows_of(index, "images")))
    return sorted(sets, key=lambda sample_set: sample_set.step)
