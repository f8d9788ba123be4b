"""Read a run folder, tolerating files that are missing, truncated, damaged or made by somebody else.

A report is most useful when a run went wrong, so a bad file never raises: `problems` lists what could not be read, and
the report shows it. Only a missing folder is an error. Links are followed inside the run folder only; values of another
type or out of every range are left out, so that the sections can rely on what they get.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.report.comparison import Comparison
from safelight.trainer.report.evaluation import Evaluation
from safelight.trainer.report.markup import shorten
from safelight.trainer.report.pictures import Work
from safelight.trainer.report.rate_test_record import RateTest
from safelight.trainer.report.records import (
    SavedGrid,
    read_comparison,
    read_evaluation,
    read_grids,
    read_rate_test,
    read_requested,
)
from safelight.trainer.report.requested_record import RequestedPicture
from safelight.untrusted import (
    MAX_LINE_BYTES,
    MAX_TOML_BYTES,
    UnsafeFile,
    count_values,
    parse_json,
    parse_toml,
    path_in,
    read_bytes,
    read_lines,
)

TRAIN_COLUMNS = (
    *("step", "epoch", "stage", "loss", "lr", "effective_lr", "grad_norm", "images_per_s", "memory_gib", "time"),
)
SPLITS = ("held_out", "train_subset")
# no loss, epoch, time or count of a run is larger
MAX_NUMBER = 1e15
MAX_STAGES = 200
# validate.timesteps is at most 64
MAX_BANDS = 64
MAX_METRICS_BYTES = 2**28
MAX_LINES = 1_000_000
# of all lines; a million training lines have ten million
MAX_METRICS_VALUES = 20_000_000
# of a record: environment.json has 5 KB, but data.json lists every rejected file, 100,000 in 16 MiB
MAX_RECORD_BYTES = 2**20
MAX_DATA_BYTES = 2**24
MAX_RECORD_VALUES = 2**20
# of the index.json files of all samples: 5000 of them with five prompts each have 6 MB
MAX_SAMPLES_BYTES = 2**24
MAX_SAMPLE_SETS = 5000
MAX_IMAGES = 1000
MAX_VALIDATIONS = 2000
MAX_EVENT_CHARACTERS = 2000
MAX_NOTES_CHARACTERS = 20_000
# the fields that the report looks into -> their type; `list` means a list of objects
FIELDS = {
    "environment.json": dict.fromkeys(
        ("started", "device", "device_name", "cpu", "command", "git_commit", "processes"), str
    ),
    "model.json": {"base": str, "family": str, "from_scratch": bool},
    "data.json": {
        **dict.fromkeys(("dataset", "length_note"), str),
        **dict.fromkeys(("num_photos", "num_train", "num_validation", "num_captions", "num_tagged", "variants"), int),
        **dict.fromkeys(("num_masks", "num_loss_scales", "num_cut_captions"), int),
        **dict.fromkeys(("num_class_images", "num_drawn_class_images"), int),
        **dict.fromkeys(("buckets", "caption_sources", "credits", "examples", "rejected", "stages"), list),
        "class_examples": list,
    },
    "scores.json": {"interval": str, "num_samples": int, "rows": list, "notes": object},
    "samples": {"step": int, "epoch": float, "images": list},
}
# of an image in the index.json of samples
IMAGE_FIELDS = ("file", "prompt", "seed", "cfg", "num_steps", "cut_after", "negative_prompt", "sampler", "spacing")
# records whose every field is shown; of the others, only FIELDS are kept
SHOWN_WHOLE = ("environment.json", "model.json")
TYPE_NAMES = {str: "text", bool: "true or false", int: "a count", float: "a number", list: "a list of objects"}


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
    of steps. not_finite: the steps at which held-out loss was measured and was no finite number. times: (unix seconds,
    event or "") of every line, in the order of the file. event_lines: the events' places in it.
    """

    train: dict[str, np.ndarray]
    validation: dict[str, list[Validation]]
    events: list[dict]
    times: list[tuple[float, str]]
    event_lines: list[int]
    last_step: int
    last_epoch: float
    not_finite: tuple[int, ...] = ()


@dataclass(frozen=True)
class SampleSet:
    """The images of the fixed prompts at one step. folder: theirs, from the run folder."""

    folder: str
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
    comparison: Comparison | None
    evaluation: Evaluation | None
    grids: list[SavedGrid]
    scores: dict | None
    rate_test: RateTest | None = None
    requested: tuple[RequestedPicture, ...] = ()
    problems: list[str] = field(default_factory=list)
    # what is left of the work that the page's pictures may take
    work: Work = field(default_factory=Work)
    # whether it is training now, None if that is not known
    is_training: bool | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def title(self) -> str:
        """run.title, else the folder's name."""
        return shorten(_text(self.config, "title").strip() or self.name, 200)

    @property
    def notes(self) -> str:
        """The author's note, "" if there is none."""
        return shorten(_text(self.config, "notes").strip(), MAX_NOTES_CHARACTERS)

    @property
    def base(self) -> str:
        return str(self.model.get("base") or table_of(self.config, "model").get("base") or "unknown base model")

    @property
    def base_title(self) -> str:
        """The base, with its family where the run recorded it: `tiny (Stable Diffusion 1.x)`."""
        family = self.model.get("family")
        return f"{shorten(self.base, 120)} ({shorten(family, 60)})" if family else shorten(self.base, 120)


def read_run_folder(run_dir: Path, work: Work | None = None, is_training: bool | None = None) -> RunFolder:
    """Return the contents of a run folder. work, is_training: as RunFolder has them.

    Raises UserError if run_dir is not a folder.
    """
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist; give the folder that `safelight train` wrote")
    problems: list[str] = []
    config, config_text = _read_config(run_dir, problems)
    return RunFolder(
        path=run_dir,
        config=config,
        config_text=config_text,
        environment=_read_object(run_dir, "environment.json", problems) or {},
        model=_read_object(run_dir, "model.json", problems) or {},
        metrics=_read_metrics(run_dir, problems),
        samples=_read_samples(run_dir, problems),
        data=_read_object(run_dir, "data.json", problems, MAX_DATA_BYTES),
        comparison=read_comparison(run_dir, problems),
        evaluation=read_evaluation(run_dir, problems),
        grids=read_grids(run_dir, problems),
        scores=_read_object(run_dir, "scores.json", problems),
        rate_test=read_rate_test(run_dir, problems),
        requested=read_requested(run_dir, problems),
        problems=problems,
        work=work or Work(),
        is_training=is_training,
    )


def _text(config: dict, key: str) -> str:
    value = table_of(config, "run").get(key)
    return value if isinstance(value, str) else ""


def number(value: object) -> float:
    """Return the value as a float, NaN if it is not a number or too large to be one of a run."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
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
    name = table_of(run.config, "optimizer").get("name")
    spec = OPTIMIZERS.get(name) if isinstance(name, str) else None
    if spec is not None and spec.averages_weights:
        return f" {subject} the average of the weights that the optimizer, {spec.name}, keeps."
    decay = number(table_of(run.config, "train").get("ema_decay"))
    return f" {subject} the moving average of the weights (train.ema_decay {decay:g})." if decay > 0 else ""


def inside(run_dir: Path, folder: str, name: object) -> Path | None:
    """Return run_dir/folder/name if it is a file inside the run folder, wherever links lead, else None."""
    if not isinstance(name, str) or not name:
        return None
    try:
        path = path_in(run_dir, f"{folder}/{name}")
        return path if path.is_file() else None
    except (UnsafeFile, OSError):
        return None


def _read(run_dir: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of a record. Raises FileNotFoundError, or UnsafeFile with a reason for `problems`."""
    try:
        return read_bytes(path_in(run_dir, name), max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnsafeFile(error.strerror or str(error)) from None


def _read_config(run_dir: Path, problems: list[str]) -> tuple[dict, str]:
    try:
        text = _read(run_dir, "config.toml", MAX_TOML_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        problems.append("config.toml is missing: the settings of this run are unknown")
        return {}, ""
    except UnsafeFile as error:
        problems.append(f"config.toml could not be read: {error}")
        return {}, ""
    try:
        return parse_toml(text), text
    except UnsafeFile as error:
        problems.append(f"config.toml is not valid TOML: {error}")
        return {}, text


def _read_object(
    run_dir: Path, name: str, problems: list[str], max_bytes: int = MAX_RECORD_BYTES, kind: str = ""
) -> dict | None:
    """Return a record without the fields of another type than FIELDS says, which are named in `problems`.

    kind: its key in FIELDS, '' for its name.
    """
    try:
        content = _read(run_dir, name, max_bytes)
        value = parse_json(content, allow_nan=True, max_values=MAX_RECORD_VALUES)
    except FileNotFoundError:
        return None
    except UnsafeFile as error:
        problems.append(f"{name} could not be read: {error}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{name} could not be read: it does not contain a JSON object")
        return None
    fields = FIELDS[kind or name]
    if name not in SHOWN_WHOLE:
        value = {key: item for key, item in value.items() if key in fields}
    for key, expected in fields.items():
        if value.get(key) is not None and not _is(value[key], expected):
            problems.append(f"{name}: {key} is not {TYPE_NAMES[expected]} and is left out")
            del value[key]
    return value


def _is(value: object, expected: type) -> bool:
    if expected in (int, float):
        found = number(value)
        return not math.isnan(found) and (expected is float or (found >= 0 and found == int(found)))
    if expected is list:
        return isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return isinstance(value, expected)


def _step_of(row: dict) -> int | None:
    """Return a line's step, None if it has none."""
    return int(number(row["step"])) if _is(row.get("step"), int) else None


def _read_metrics(run_dir: Path, problems: list[str]) -> Metrics:
    rows = _read_lines(run_dir, problems)
    # a resumed run may repeat steps that were logged before it was killed: the later line for a step counts
    train: dict[int, dict] = {}
    validation: dict[str, dict[int, Validation]] = {split: {} for split in SPLITS}
    event_lines = []
    for line, row in enumerate(rows):
        step = _step_of(row)
        if row.get("kind") == "event":
            event_lines.append(line)
        elif step is None:
            continue
        elif row.get("kind") == "train":
            train[step] = row
        elif row.get("kind") == "validation" and row.get("split") in SPLITS:
            validation[row["split"]][step] = Validation(
                step=step,
                epoch=number(row.get("epoch")),
                loss=number(row.get("loss")),
                loss_by_timestep=row.get("loss_by_timestep", ()),
                num_images=int(number(row["num_images"])) if _is(row.get("num_images"), int) else 0,
            )
    steps = sorted(train)
    columns = {
        name: np.array([number(train[step].get(name)) for step in steps], dtype=np.float64) for name in TRAIN_COLUMNS
    }
    columns["epoch"][columns["epoch"] < 0] = np.nan
    stages = columns["stage"]
    stages[~((stages >= 0) & (stages < MAX_STAGES) & (stages == np.floor(stages)))] = np.nan
    ordered = {split: _drawable(split, by_step, problems) for split, by_step in validation.items()}
    not_finite = tuple(sorted(s for s, point in validation["held_out"].items() if not math.isfinite(point.loss)))
    reached = [(step, number(train[step].get("epoch"))) for step in steps[-1:]]
    reached += [(points[-1].step, points[-1].epoch) for points in ordered.values() if points]
    last_step = max((step for step, _ in reached), default=0)
    last_epoch = max((epoch for _, epoch in reached if epoch >= 0), default=0.0)
    times = [(number(row.get("time")), str(row.get("event") or "")) for row in rows]
    events = [rows[line] for line in event_lines]
    return Metrics(columns, ordered, events, times, event_lines, last_step, last_epoch, not_finite)


def _drawable(split: str, by_step: dict[int, Validation], problems: list[str]) -> list[Validation]:
    """Return the validations with a loss and an epoch, in order of steps; of very many, every n-th."""
    points = [by_step[step] for step in sorted(by_step)]
    points = [point for point in points if math.isfinite(point.loss) and point.epoch >= 0]
    if len(points) <= MAX_VALIDATIONS:
        return points
    problems.append(f"metrics.jsonl: only some of its {len(points):,} validations ({split}) are shown")
    every = -(-len(points) // MAX_VALIDATIONS)
    return sorted({*points[::every], min(points, key=lambda p: (p.loss, p.step)), points[-1]}, key=lambda p: p.step)


def _read_lines(run_dir: Path, problems: list[str]) -> list[dict]:
    rows: list[dict] = []
    num_lines = num_values = num_bad = num_long = 0
    try:
        for line in read_lines(path_in(run_dir, "metrics.jsonl"), MAX_METRICS_BYTES):
            num_values += count_values(line or b"")
            if num_lines == MAX_LINES or num_values > MAX_METRICS_VALUES:
                problems.append(f"metrics.jsonl: only its first {num_lines:,} lines are read")
                break
            num_lines += 1
            if line is None:
                num_long += 1
            elif line.strip():
                row = _parse_line(line)
                num_bad += row is None
                rows += [row] if row is not None else []
    except FileNotFoundError:
        return []
    except UnsafeFile as error:
        problems.append(f"metrics.jsonl could not be read: {error}")
    except OSError as error:
        problems.append(f"metrics.jsonl could not be read: {error.strerror or error}")
    for num, what in ((num_bad, "could not be read"), (num_long, f"have more than {MAX_LINE_BYTES:,} bytes")):
        if num:
            are = "is" if num == 1 else "are"
            what = what.replace("have", "has") if num == 1 else what
            problems.append(f"metrics.jsonl: {num} of {counted(num_lines, 'line')} {what} and {are} left out")
    return rows


def _parse_line(line: bytes) -> dict | None:
    """Return the fields of a line that the report uses, None if it is damaged."""
    try:
        row = parse_json(line, allow_nan=True)
    except UnsafeFile:
        return None
    return _known(row) if isinstance(row, dict) and (row.get("kind") == "event" or _step_of(row) is not None) else None


def _known(row: dict) -> dict:
    """Return a line's fields that the report uses: numbers as numbers, an event's texts cut to a bearable length."""
    known = {key: row[key] for key in ("kind", "split") if isinstance(row.get(key), str)}
    known |= {key: row[key] for key in ("num_images", *TRAIN_COLUMNS) if not math.isnan(number(row.get(key)))}
    if isinstance(bands := row.get("loss_by_timestep"), list):
        known["loss_by_timestep"] = tuple(map(number, bands[:MAX_BANDS]))
    return known | {key: str(row[key])[:MAX_EVENT_CHARACTERS] for key in ("event", "detail") if row.get(key)}


def _read_samples(run_dir: Path, problems: list[str]) -> list[SampleSet]:
    sets = []
    paths = sorted((run_dir / "samples").glob("step-*/index.json"))
    if len(paths) > MAX_SAMPLE_SETS:
        problems.append(f"samples: only {MAX_SAMPLE_SETS:,} of its {len(paths):,} folders are read")
    num_bytes = 0
    for number_read, path in enumerate(paths[:MAX_SAMPLE_SETS]):
        folder = f"samples/{path.parent.name}"
        size = path.stat().st_size if path.is_file() else 0
        # a larger one is not read
        num_bytes += size if size <= MAX_RECORD_BYTES else 0
        if num_bytes > MAX_SAMPLES_BYTES:
            problems.append(f"samples: only {number_read:,} of its {len(paths):,} folders are read: too many bytes")
            break
        index = _read_object(run_dir, f"{folder}/index.json", problems, kind="samples")
        if index is None or _step_of(index) is None:
            continue
        sets.append(SampleSet(folder, _step_of(index), number(index.get("epoch")), _images(index)))
    return sorted(sets, key=lambda sample_set: sample_set.step)


def _images(index: dict) -> list[dict]:
    rows = rows_of(index, "images")[:MAX_IMAGES]
    return [{key: row[key] for key in IMAGE_FIELDS if isinstance(row.get(key), str | int | float)} for row in rows]
