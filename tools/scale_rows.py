"""Measure how a dataset's start and a step grow with its rows, to ten million of them.

    python -m tools.scale_rows [--objects 10000 100000] [--columns 1000000] [--index 1000000] [--before CHECKOUT]

Rows are generated, no photographs. Three parts, each in a process of its own, whose largest resident size is reported:
objects: manifest, placements, samples, the identity of the rows and an epoch's plan, as a run makes them at its start;
columns: an epoch's plan alone, of arrays without the objects, which do not fit memory at ten million;
index: an index of so many rows, its size, and what opening it and finding a batch cost.
`--before` measures the objects in another checkout beside this one. Prints one result line a part and number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from safelight.units import MIB

SEED, BATCH_SIZE, NUM_BATCHES = 1, 4, 200
ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((1024, 1024), (1152, 896), (896, 1152), (1344, 768), (768, 1344), (1216, 832), (832, 1216))


def resident_mib() -> float:
    """Return this process's resident size now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def peak_mib() -> float:
    """Return this process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


class Timed:
    """Collects the CPU seconds and the resident MiB that named calls add. A busy machine does not change the first."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[[], object]) -> object:
        began, before = time.process_time(), resident_mib()
        result = function()
        self.figures[f"{name}_cpu_s"] = round(time.process_time() - began, 4)
        self.figures[f"{name}_mib"] = round(resident_mib() - before, 1)
        return result


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def measure_objects(num: int) -> dict[str, float]:
    """Return what the start of a run costs with `num` photographs."""
    from safelight.data.buckets import make_buckets
    from safelight.data.epochs import Span, count_batches, plan_epoch
    from safelight.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
    from safelight.data.photo import Photo
    from safelight.data.placement import place_photos
    from safelight.data.samples import plan_samples
    from safelight.trainer.checkpoint.identity import identify
    from safelight.trainer.config.schema import Config

    timed = Timed()
    with tempfile.TemporaryDirectory() as folder:
        names = (
            Photo(f"images/{n}.jpg", digest(n), *SHAPES[n % len(SHAPES)], (f"a photograph, {n}",), f"{n}.jpg", "made")
            for n in range(num)
        )
        write_manifest(Path(folder), list(names))
        timed.figures["manifest_mib"] = round((Path(folder) / MANIFEST_NAME).stat().st_size / MIB, 2)
        photos = timed("read_manifest", lambda: read_manifest(Path(folder)))
    placed = timed("place", lambda: place_photos(photos, make_buckets(1024, 64)))
    keys = {"vae_fingerprint": "v", "text_fingerprint": "t", "dtype": "float16"}
    samples = timed("samples", lambda: plan_samples(placed, variants=1, crop_jitter=0.0, flip_p=0.0, seed=SEED, **keys))
    config = Config()
    timed("identity", lambda: identify(config, "bf16", samples))
    timed("count_carried", lambda: count_batches(samples, [Span(100, BATCH_SIZE)], seed=SEED, carries=True))
    options = {"seed": SEED, "epoch": 1, "batch_size": BATCH_SIZE, "caption_dropout": 0.04}
    timed("plan", lambda: plan_epoch(samples, **options))
    return {**timed.figures, "peak_mib": round(peak_mib(), 1)}


def measure_columns(num: int) -> dict[str, float]:
    """Return what planning epochs costs with `num` samples, given as columns, and a step's share of the plan."""
    from safelight.data.buckets import Bucket
    from safelight.data.epochs import Group, SampleColumns, plan_epoch

    timed, random = Timed(), np.random.default_rng(SEED)
    groups = tuple(sorted(Group(Bucket(*shape), "") for shape in SHAPES))
    which = random.integers(0, len(groups), num).astype(np.int32)
    ones = np.ones(num, np.int32)
    columns = SampleColumns(
        # distinct, as those of photographs are but for one in 10^3 at this number
        ids=random.permutation(num).astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**56),
        buckets=which,
        groups=which,
        repeats=np.ones(num),
        num_variants=ones,
        num_captions=ones,
        caption_dropout=np.full(num, np.nan),
        all_groups=groups,
    )
    before = resident_mib()
    options = {"seed": SEED, "epoch": 1, "batch_size": BATCH_SIZE, "caption_dropout": 0.04}
    plan = timed("plan", lambda: plan_epoch(columns, **options))
    began = time.process_time()
    steps = [plan[start : start + 2] for start in range(0, 2 * NUM_BATCHES, 2)]
    step_us = (time.process_time() - began) / len(steps) * 1e6
    return {**timed.figures, "plan_peak_mib": round(peak_mib() - before, 1), "step_cpu_us": round(step_us, 2)}


def measure_index(num: int) -> dict[str, float]:
    """Return the size of an index of `num` rows, and what opening it and finding a batch cost."""
    from safelight.data.index import INDEX_NAME, MAX_SHARD_BYTES, Index

    timed, shape = Timed(), (8, 64, 64)
    per_shard = MAX_SHARD_BYTES // (2 * int(np.prod(shape)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = Index(folder)
        # in memory while it is made, and without a journal: how it is written does not change what is written
        for pragma in ("cache_size = -3000000", "journal_mode = OFF", "synchronous = OFF"):
            index._connection.execute(f"PRAGMA {pragma}")
        for start in range(0, num, per_shard):
            with index.transaction():
                shard = index.open_shard("posterior", shape, "float16")
                keys = [digest(n) for n in range(start, min(start + per_shard, num))]
                index.add_rows(shard, keys, range(len(keys)))
        index.close()
        timed.figures["index_mib"] = round((folder / INDEX_NAME).stat().st_size / MIB, 2)
        began = time.perf_counter()
        index = timed("open", lambda: Index(folder))
        timed.figures["open_s"] = round(time.perf_counter() - began, 4)
        drawn = np.random.default_rng(SEED).integers(0, num, (NUM_BATCHES, BATCH_SIZE)).tolist()
        batches = [[digest(n) for n in batch] for batch in drawn]
        began, began_cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            assert len(index.find(batch)) == len(set(batch))
        timed.figures["find_cpu_us_per_row"] = round(
            (time.process_time() - began_cpu) / NUM_BATCHES / BATCH_SIZE * 1e6, 2
        )
        timed.figures["find_us_per_row"] = round((time.perf_counter() - began) / NUM_BATCHES / BATCH_SIZE * 1e6, 2)
        index.close()
    return timed.figures


PARTS = {"objects": measure_objects, "columns": measure_columns, "index": measure_index}


def in_process(part: str, num: int, checkout: Path) -> dict[str, float]:
    """Return a part's figures, measured in a process of its own with a checkout's code."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", part, str(num)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in PARTS:
        parser.add_argument(f"--{part}", type=int, nargs="*", default=[])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        part, num = arguments.measure
        print(json.dumps(PARTS[part](int(num))))
        return
    import torch

    from safelight.bench.core.results import make_record

    for part in PARTS:
        for num in getattr(arguments, part):
            checkouts = {"": ROOT} | ({"before": arguments.before} if arguments.before and part == "objects" else {})
            for code, checkout in checkouts.items():
                figures = in_process(part, num, checkout)
                config = {"part": part, "rows": num, "batch_size": BATCH_SIZE, **({"code": code} if code else {})}
                print(json.dumps(make_record("scale rows", config, figures, torch.device("cpu"))), flush=True)


if __name__ == "__main__":
    main()
