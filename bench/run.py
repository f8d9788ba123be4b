"""What each `safelight bench` command does with its measurements: print them, keep them, judge them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from safelight.__main__ import _print_json as print_json
from safelight.__main__ import _print_table as print_table
from safelight.bench import command
from safelight.bench.results import COUNTS, append, make_record

CPU = torch.device("cpu")


def _keep(path: Path | None, *records: dict) -> None:
    for record in records:
        if path is not None:
            append(path, record)


def step(options: command.Step) -> int:
    return _steps(options, options.recipe)


def baseline(options: command.Baseline) -> int:
    from safelight.bench.baselines import RECIPES
    from safelight.bench.suite import OURS

    if not options.json:
        for name in options.recipe:
            print(f"{name}: {RECIPES[name].stands_for}")
    return _steps(options, (OURS, *options.recipe))


def _steps(options: command.Step, recipes: tuple[str, ...]) -> int:
    from safelight.bench.suite import measure, variants
    from safelight.bench.workload import Workload

    if min(options.batch_size) < 1 or options.repeats < 1:
        raise ValueError(f"batch sizes {options.batch_size} and repeats {options.repeats} must be 1 or more")
    work = Workload(
        options.base, options.latent_size, 1, options.precision, options.optimizer, options.checkpointing,
        options.device,
    )  # fmt: skip
    works = variants(recipes, options.batch_size, work)
    for record in measure(works, options.repeats, options.loader, not options.separate):
        _keep(options.append, record)
        print(json.dumps(record) if options.json else step_line(record))
    return 0


def step_line(record: dict) -> str:
    """Return a step's result as a line."""
    config, found = record["config"], record["figures"]
    low, middle, high = found["images_per_s"]
    peak = f", {found['peak_gib']:.2f} GiB" if found["peak_gib"] is not None else ""
    return (
        f"{config['recipe']}, {config['base']}, batch {config['batch_size']}: {middle:.2f} images/s "
        f"(p20 {low:.2f}, p80 {high:.2f}){peak} on {record['machine']['device']}, {config['precision']}"
    )


def count(options: command.Count) -> int:
    from safelight.bench import count as counting

    found, seconds = counting.count(options)
    record = make_record("count", counting.config_of(options), found, CPU)
    _keep(options.append, record)
    measured = counting.profiled(options) if options.profile else None
    if options.json:
        print_json({**record, "seconds": round(seconds, 1)} | ({"profiler": measured} if measured else {}))
        return 0
    columns, rows = counting.table(found, measured)
    print_table(
        f"{options.base}, one step of batch {options.batch_size}, {options.precision}, {options.layout}, traced in {seconds:.0f} s",
        columns,
        rows,
    )
    print(
        f"{found['forward_gflop']:,.0f} GFLOP forward, {found['step_gflop']:,.0f} a step; {found['saved_mib']:,.0f} MiB saved for "
        f"backward; {found['host_syncs']} host syncs"
    )
    print(
        "Launches and bytes are a model (bench/operators.py), not a profile."
        + ("" if measured else " --profile runs the step beside it.")
    )
    return 0


def gate(options: command.Gate) -> int:
    from safelight.bench.gate import check, goldens

    failed = False
    for golden in goldens(options.golden or COUNTS, options.base):
        rose, fell = check(golden)
        name = ", ".join(str(value) for value in golden["config"].values())
        print(f"{'rose' if rose else 'fell' if fell else 'same'}  {name}")
        for line in (*rose, *fell):
            print(f"      {line}")
        failed |= bool(rose)
    if failed:
        print(f"a counted figure rose; if that is meant, say why and append the new count to {COUNTS.name}")
    return int(failed)


def compare(options: command.Compare) -> int:
    from safelight.bench.results import compare as compared
    from safelight.bench.results import find

    rows = compared(find(options.a), find(options.b))
    if not rows:
        raise ValueError(f"{options.a} and {options.b} share no benchmark with the same config")
    if options.json:
        names = ("bench", "config", "figure", "a", "b")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return 0
    print_table(
        f"{options.a} against {options.b}", ("figure", "A", "B", "B / A"),
        [(f"{bench} {name}", f"{a:,g}", f"{b:,g}", f"{b / a:.3f}" if a else "") for bench, _, name, a, b in rows],
    )  # fmt: skip
    return 0
