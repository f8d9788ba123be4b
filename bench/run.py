"""What each `safelight bench` command does with its measurements: print them, keep them, judge them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from safelight.bench import command
from safelight.bench.results import COUNTS, append, make_record
from safelight.bench.show import print_json, print_table

CPU = torch.device("cpu")


def keep(path: Path | None, *records: dict) -> None:
    for record in records:
        if path is not None:
            append(path, record)


def step(options: command.Step) -> int:
    return _steps(options, options.recipe)


def baseline(options: command.Baseline) -> int:
    from safelight.bench.styles import ALL_RECIPES
    from safelight.bench.suite import OURS

    if not options.json:
        for name in options.recipe:
            print(f"{name}: {ALL_RECIPES[name].stands_for}")
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
        keep(options.append, record)
        print(json.dumps(record) if options.json else step_line(record))
    return 0


def step_line(record: dict) -> str:
    """Return a step's result as a line."""
    config, found = record["config"], record["figures"]
    if "images_per_s" not in found:
        return f"{config['recipe']}, {config['base']}, batch {config['batch_size']}: does not fit"
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
    keep(options.append, record)
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
    from safelight.bench.results import find, slower

    if not 0 <= options.at_most < 1:
        raise ValueError(f"--at-most {options.at_most} is no share; use for example 0.05")
    a, b = find(options.a), find(options.b)
    rows = compared(a, b)
    if not rows:
        raise ValueError(f"{options.a} and {options.b} share no benchmark with the same config")
    told = slower(a, b, options.at_most) if options.at_most else []
    if options.json:
        names = ("bench", "config", "figure", "a", "b")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return int(bool(told))
    print_table(
        f"{options.a} against {options.b}", ("figure", "A", "B", "B / A"),
        [(f"{bench} {name}", f"{a:,g}", f"{b:,g}", f"{b / a:.3f}" if a else "") for bench, _, name, a, b in rows],
    )  # fmt: skip
    for line in told:
        print(line)
    return int(bool(told))


def plot(options: command.Plot) -> int:
    from safelight.bench.plot import plot as draw
    from safelight.bench.results import read

    if not options.results:
        raise ValueError("no results given; name one or more .jsonl, for example bench/results/counts.jsonl")
    files, without = draw([line for path in options.results for line in read(path)], options.out)
    for file in files:
        print(file)
    if without:
        print(f"no figures for: {', '.join(without)}")
    return 0 if files else 2


def loader(options: command.Loader) -> int:
    from safelight.bench.loader import bench_loader

    if min(options.rows, options.batch_size, options.repeats) < 1 or not options.sources:
        raise ValueError(
            f"rows {options.rows}, batch size {options.batch_size} and repeats {options.repeats} must be 1 or more, with a source"
        )
    records = bench_loader(
        options.base, options.latent_size, options.rows, options.batch_size, options.sources, options.repeats,
        options.dir,
    )  # fmt: skip
    keep(options.append, *records)
    if options.json:
        print_json(records)
        return 0
    rows = [(r["config"]["source"], r["figures"]) for r in records]
    print_table(
        f"{options.rows} rows of {options.base}, batch {options.batch_size}; memcpy {rows[0][1]['memcpy_gb_per_s']:.1f} GB/s",
        ("source", "rows/s", "GB/s", "ms a batch", "CPU ms a batch"),
        [
            (name, f"{f['rows_per_s']:,.0f}", f"{f['gb_per_s']:.2f}", f"{f['wall_ms_per_batch']:.2f}", f"{f['cpu_ms_per_batch']:.2f}")
            for name, f in rows
        ],
    )  # fmt: skip
    return 0


def loop(options: command.Loop) -> int:
    from safelight.bench.loop import bench_loop
    from safelight.bench.workload import Workload

    work = Workload(
        options.base, options.latent_size, options.batch_size, options.precision, options.optimizer,
        options.checkpointing, options.device,
    )  # fmt: skip
    for record in bench_loop(work, options.photographs, options.epochs):
        keep(options.append, record)
        config, found = record["config"], record["figures"]
        idle = "" if found["idle_share"] is None else f", the GPU idle {100 * found['idle_share']:.0f} % of it"
        line = (
            f"{config['recipe']}, {config['base']}, batch {config['batch_size']}: {found['epoch_s'][1]:.2f} s an epoch of "
            f"{config['photographs']} photographs, {found['images_per_s']:.2f} images/s{idle}, {100 * found['waited_share']:.1f} % of it waiting for a batch; the first {found['first_epoch_s']:.1f} s"
        )
        print(json.dumps(record) if options.json else line)
    return 0


def quick(options: command.Quick) -> int:
    from safelight.bench.quick import quick as measure_quickly

    records = []
    for record in measure_quickly(options.device):
        keep(options.append, record)
        records.append(record)
    if options.json:
        print_json(records)
        return 0
    ceiling, *steps = records
    config, found = ceiling["config"], ceiling["figures"]
    rows = []
    for record in steps:
        f = record["figures"]
        if "images_per_s" not in f:
            rows.append((record["config"]["recipe"], record["config"]["batch_size"], "does not fit", "", ""))
            continue
        memory = "" if f["peak_gib"] is None else f"{f['peak_gib']:.2f}"
        rows.append(
            (
                record["config"]["recipe"],
                record["config"]["batch_size"],
                f"{f['images_per_s'][1]:.2f}",
                memory,
                f"{100 * f['share_of_limit']:.0f} %",
            )
        )
    print_table(
        f"training step of {config['base']}, {config['latent_size']}x{config['latent_size']} latents, {config['precision']}, on "
        f"{ceiling['machine']['device']}",
        ("", "batch", "images/s", "GiB", "of the limit"), rows,
    )  # fmt: skip
    print(
        f"The limit, {found['limit_images_per_s']:.1f} images/s, is this machine's matrix products ({found['matmul_tflops']:.2f} TFLOP/s) doing the "
        "step's arithmetic and nothing else."
    )
    return 0


def everything(options: command.All) -> int:
    from safelight.bench.everything import run_all
    from safelight.bench.workload import Workload
    from safelight.trainer.device import pick_device

    is_gpu = pick_device(options.device).type == "cuda"
    base = options.base or ("random:sd15" if is_gpu else "tiny")
    work = Workload(base, options.latent_size, device=options.device)
    failed: list[str] = []
    for record in run_all(options.minutes, options.out, work, options.only):
        failed += [record["bench"]] if record["figures"].get("failed") else []
        print(f"{record['bench']} {_about(record)} {record.get('note', '')}".rstrip(), flush=True)
    print(f"results: {options.out / 'results.jsonl'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _about(record: dict) -> str:
    """Return what a line of `all` is of, and its plain figures; of a kernel's passes the p50 and the share of a copy."""
    config, figures = record["config"], record["figures"]
    names = ("recipe", "base", "op", "shape", "optimizer", "checkpointing", "batch_size", "head_dim")
    told = [f"{name} {value}" for name, value in figures.items() if not isinstance(value, dict)]
    for direction in ("forward", "backward"):
        row = figures.get(direction, {})
        told += [f"{direction} {name} {row[name][1]}" for name in ("ours_ms", "plain_ms", "compiled_ms") if name in row]
        told += [f"{100 * row['share_of_limit']:.0f} % of a copy"] if "share_of_limit" in row else []
    return f"{' '.join(str(config[n]) for n in names if n in config)}: {', '.join(told)}"
