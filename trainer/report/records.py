"""Read the records that other commands left in a run folder: compare/index.json, evaluation.json,
grids/*/index.json, find_lr/result.json,
samples/live/images.json.

A record is untrusted: one that is too large, damaged or of another version is None, with one line in `problems`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from safelight.trainer.report.comparison import ComparedModel, ComparedRow, Comparison, Record
from safelight.trainer.report.evaluation import Evaluation
from safelight.trainer.report.grid_record import Grid
from safelight.trainer.report.rate_test_record import NAME as RATE_TEST
from safelight.trainer.report.rate_test_record import RateTest
from safelight.trainer.report.requested_record import NAME as REQUESTED
from safelight.trainer.report.requested_record import Requested, RequestedPicture
from safelight.untrusted import UnsafeFile, count_values, parse_json, path_in, read_bytes

MAX_BYTES = 2**24
MAX_VALUES = 2**20
MAX_GRIDS = 200
# of all grids
MAX_GRIDS_BYTES = 2**24
BASE = "base"

RecordType = TypeVar("RecordType", bound=Record)


@dataclass(frozen=True)
class SavedGrid:
    """A grid and its folder, from the run folder."""

    folder: str
    grid: Grid

    @property
    def name(self) -> str:
        return self.folder.rpartition("/")[2]


def read_comparison(run_dir: Path, problems: list[str]) -> Comparison | None:
    """Return what `safelight compare` drew, None if there is none."""
    name = "compare/index.json"
    content = _content(run_dir, name, MAX_BYTES, problems)
    if content is None:
        return None
    if b'"pairs"' in content and b'"rows"' not in content:
        try:
            return _of_pairs(parse_json(content, max_values=MAX_VALUES))
        except (UnsafeFile, ValidationError, TypeError, KeyError, AttributeError):
            problems.append(f"{name} could not be read: not pairs as an earlier version wrote them")
            return None
    return _parsed(Comparison, name, content, problems)


def read_evaluation(run_dir: Path, problems: list[str]) -> Evaluation | None:
    """Return what `safelight evaluate` measured, None if there is nothing."""
    content = _content(run_dir, "evaluation.json", MAX_BYTES, problems)
    return None if content is None else _parsed(Evaluation, "evaluation.json", content, problems)


def read_rate_test(run_dir: Path, problems: list[str]) -> RateTest | None:
    """Return what `safelight train --find-lr` found, None if there is nothing."""
    content = _content(run_dir, RATE_TEST, MAX_BYTES, problems)
    return None if content is None else _parsed(RateTest, RATE_TEST, content, problems)


def read_requested(run_dir: Path, problems: list[str]) -> tuple[RequestedPicture, ...]:
    """Return what `safelight sample --live` had the run draw, in the order in which it was drawn."""
    content = _content(run_dir, REQUESTED, MAX_BYTES, problems)
    found = None if content is None else _parsed(Requested, REQUESTED, content, problems)
    return found.images if found else ()


def read_grids(run_dir: Path, problems: list[str]) -> list[SavedGrid]:
    """Return what `safelight grid` drew, by name."""
    grids, num_bytes = [], 0
    folders = sorted(path.parent.name for path in (run_dir / "grids").glob("*/index.json"))
    if len(folders) > MAX_GRIDS:
        problems.append(f"grids: only {MAX_GRIDS:,} of {len(folders):,} are read")
    for folder in folders[:MAX_GRIDS]:
        name = f"grids/{folder}/index.json"
        content = _content(run_dir, name, MAX_BYTES, problems)
        num_bytes += len(content or b"")
        if num_bytes > MAX_GRIDS_BYTES:
            problems.append("grids: not all are read: too many bytes")
            break
        grid = None if content is None else _parsed(Grid, name, content, problems)
        if grid is not None:
            grids.append(SavedGrid(f"grids/{folder}", grid))
    return grids


def _content(run_dir: Path, name: str, max_bytes: int, problems: list[str]) -> bytes | None:
    try:
        content = read_bytes(path_in(run_dir, name), max_bytes)
    except FileNotFoundError:
        return None
    except (UnsafeFile, OSError) as error:
        reason = str(error) if isinstance(error, UnsafeFile) else error.strerror or str(error)
        problems.append(f"{name} could not be read: {reason}")
        return None
    if count_values(content) > MAX_VALUES:
        problems.append(f"{name} could not be read: it has more than {MAX_VALUES:,} values")
        return None
    return content


def _parsed(kind: type[RecordType], name: str, content: bytes, problems: list[str]) -> RecordType | None:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        problems.append(f"{name} could not be read: {f'{place}: ' if place else ''}{first['msg']}")
        return None


def _of_pairs(index: dict) -> Comparison:
    """Return the pairs of a base and one checkpoint, as versions before 0.2 wrote them. Their size is unknown."""
    pairs, step = index["pairs"], index.get("step") or 0
    trained = f"step-{step}"
    rows = tuple(
        ComparedRow(
            prompt=pair.get("prompt") or "",
            place=place,
            seed=pair.get("seed") or 0,
            cut_after=pair.get("cut_after") or "",
            images={model: pair[key] for model, key in ((BASE, "base"), (trained, "trained")) if pair.get(key)},
        )
        for place, pair in enumerate(pairs)
    )
    first = pairs[0] if pairs else {}
    return Comparison(
        models=(ComparedModel(id=BASE, step=0, epoch=0.0), ComparedModel(id=trained, step=step, epoch=0.0)),
        rows=rows,
        width=8,
        height=8,
        num_steps=first.get("num_steps") or 1,
        cfg=float(first.get("cfg") or 0),
        sampler="",
    )
