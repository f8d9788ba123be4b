"""`safelight bench all`: every benchmark in one call, the most valuable first; safe to interrupt.

Each result is on disk as soon as it is measured. A part that fails leaves a line with the reason and the next part
starts; a part that no longer fits the time limit leaves a line that says so. On a GPU the parts run in a subprocess,
which is replaced after a failure, so that an illegal memory access, a crash or a hang affects only its own part. On a
CPU the same parts run in this process with small sizes, as a rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from safelight.bench.all.parts import PARTS, BenchContext, Part
from safelight.bench.all.subprocess_runner import SubprocessEnded, run_in_subprocess
from safelight.bench.core.results import append
from safelight.bench.recipes.suite import free
from safelight.bench.recipes.workload import Workload
from safelight.errors import UserError
from safelight.trainer.models.device import pick_device

# once the time limit has passed, a running part is ended after this much silence
OVERTIME_S = 60
# why a part gave no result, by whether there is a GPU
NO_RESULT = {False: "it needs a GPU", True: "its time was up before its first result"}


def run_parts(minutes: float, out: Path, work: Workload, only: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield every result line after appending it to OUT/results.jsonl. only: names of parts; all if empty.

    Raises UserError for an unknown part or a time limit that is not positive.
    """
    names = [part.name for part in PARTS]
    if minutes <= 0:
        raise UserError(f"--minutes {minutes:g} must be above 0; use for example 8")
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"there is no part {', '.join(unknown)} of bench all; use {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    chosen = tuple(part for part in PARTS if not only or part.name in only)
    end = time.monotonic() + 60 * minutes
    # on a GPU this process makes no CUDA call: it must survive a CUDA error
    measure_parts = _measure_in_subprocesses if pick_device(work.device).type == "cuda" else _measure_here
    for record in measure_parts(chosen, out.resolve(), work, end):
        append(out / "results.jsonl", record)
        yield record


def _measure_here(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[dict]:
    """Yield the parts' result lines, measured in this process."""
    yield from (record for name, record in part_events(parts, out, work, end) if name and record is not None)


def _measure_in_subprocesses(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[dict]:
    """Yield the parts' result lines, measured in a subprocess; after a failure the remaining parts get a new one."""
    remaining, blank = parts, None
    while remaining:
        current, began = remaining[0], time.monotonic()

        def silence_limit_s() -> float:
            # the closure must see the part that is running now
            return min(current.silence_limit_s, max(0.0, end - time.monotonic()) + OVERTIME_S)  # noqa: B023

        with closing(
            run_in_subprocess(part_events, remaining, out, work, end, silence_limit_s=silence_limit_s)
        ) as events:
            try:
                for name, record in events:
                    if not name:
                        blank = record
                    elif record is None:
                        current, began = next(part for part in remaining if part.name == name), time.monotonic()
                    else:
                        yield record
            except SubprocessEnded as error:
                if blank is None:
                    raise RuntimeError(f"the benchmark process could not start: {error}") from None
                figures = {"failed": True, "seconds": round(time.monotonic() - began, 1)}
                yield {**blank, "bench": current.name, "figures": figures, "note": str(error)}
        remaining = remaining[remaining.index(current) + 1 :]


def part_events(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[tuple[str, dict | None]]:
    """Measure the parts and yield events: ("", a result line without figures) first, which describes the machine;
    then (name, None) as each part starts and (name, result line) for each of its results.

    On a GPU a failing part is the last one, because the state it leaves on the device goes away only with the process.
    """
    context = BenchContext(out, work.resolved(), end)
    yield "", context.make_record("", {}, {})
    for part in parts:
        yield part.name, None
        began = time.monotonic()
        if context.remaining() < (part.min_s if context.is_gpu else 1):
            yield part.name, context.make_record(part.name, {}, {}, "skipped: not enough time left")
            continue
        # a rehearsal is small, and its machine may be busy
        own = replace(context, end=min(end, began + part.max_s)) if context.is_gpu else context
        num_records = 0
        try:
            for record in part.measure(own):
                num_records += 1
                yield part.name, record
        except Exception as error:
            # any failure is recorded, so that the remaining parts still run
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            figures = {"failed": True, "seconds": round(time.monotonic() - began, 1)}
            yield part.name, context.make_record(part.name, {}, figures, message)
            if context.is_gpu:
                return
        else:
            if not num_records:
                yield part.name, context.make_record(part.name, {}, {}, f"skipped: {NO_RESULT[context.is_gpu]}")
        free(context.device)
