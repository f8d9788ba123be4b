"""What each `safelight bench` command does with its measurements: print them, keep them, judge them.

What `safelight bench kernels`, `aot`, `optimizer`, `memory`, `attention` and `roofline` do with their measurements: print, keep.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from safelight.bench.core import arguments
from safelight.bench.core.results import COUNTS, append, make_record
from safelight.bench.core.show import print_json, print_table
from safelight.errors import UserError

CPU = torch.device("cpu")


def keep(path: Path | None, *records: dict) -> None:
    for record in records:
        if path is not None:
            append(path, record)


def step(options: arguments.Step) -> int:
    return _steps(options, options.recipe)


def baseline(options: arguments.Baseline) -> int:
    from safelight.bench.recipes.other_trainers import ALL_RECIPES
    from safelight.bench.recipes.suite import OURS

    if not options.json:
        for name in options.recipe:
            print(f"{name}: {ALL_RECIPES[name].stands_for}")
    return _steps(options, (OURS, *options.recipe))


def _steps(options: arguments.Step, recipes: tuple[str, ...]) -> int:
    from safelight.bench.recipes.suite import measure, variants
    from safelight.bench.recipes.workload import Workload

    if min(options.batch_size) < 1 or options.repeats < 1:
        raise UserError(f"batch sizes {options.batch_size} and repeats {options.repeats} must be 1 or more")
    work = Workload(
        options.base,
        options.latent_size,
        1,
        options.precision,
        options.optimizer,
        options.checkpointing,
        options.device,
    )
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


def count(options: arguments.Count) -> int:
    from safelight.bench.measure import count as counting

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
        "Launches and bytes are a model (bench/core/operators.py), not a profile."
        + ("" if measured else " --profile runs the step beside it.")
    )
    return 0


def gate(options: arguments.Gate) -> int:
    from safelight.bench.measure.gate import check, goldens

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


def compare(options: arguments.Compare) -> int:
    from safelight.bench.core.results import compare as compared
    from safelight.bench.core.results import find, slower

    if not 0 <= options.at_most < 1:
        raise UserError(f"--at-most {options.at_most} is no share; use for example 0.05")
    a, b = find(options.a), find(options.b)
    rows = compared(a, b)
    if not rows:
        raise UserError(f"{options.a} and {options.b} share no benchmark with the same config")
    told = slower(a, b, options.at_most) if options.at_most else []
    if options.json:
        names = ("bench", "config", "figure", "a", "b")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return int(bool(told))
    print_table(
        f"{options.a} against {options.b}",
        ("figure", "A", "B", "B / A"),
        [(f"{bench} {name}", f"{a:,g}", f"{b:,g}", f"{b / a:.3f}" if a else "") for bench, _, name, a, b in rows],
    )
    for line in told:
        print(line)
    return int(bool(told))


def plot(options: arguments.Plot) -> int:
    from safelight.bench.core.plot import plot as draw
    from safelight.bench.core.results import read

    if not options.results:
        raise UserError("no results given; name one or more .jsonl, for example bench/results/counts.jsonl")
    files, without = draw([line for path in options.results for line in read(path)], options.out)
    for file in files:
        print(file)
    if without:
        print(f"no figures for: {', '.join(without)}")
    return 0 if files else 2


def loader(options: arguments.Loader) -> int:
    from safelight.bench.measure.loader import bench_loader

    if min(options.rows, options.batch_size, options.repeats) < 1 or not options.sources:
        raise UserError(
            f"rows {options.rows}, batch size {options.batch_size} and repeats {options.repeats} must be 1 or more, with a source"
        )
    records = bench_loader(
        options.base,
        options.latent_size,
        options.rows,
        options.batch_size,
        options.sources,
        options.repeats,
        options.dir,
    )
    keep(options.append, *records)
    if options.json:
        print_json(records)
        return 0
    rows = [(r["config"]["source"], r["figures"]) for r in records]
    print_table(
        f"{options.rows} rows of {options.base}, batch {options.batch_size}; memcpy {rows[0][1]['memcpy_gb_per_s']:.1f} GB/s",
        ("source", "rows/s", "GB/s", "ms a batch", "CPU ms a batch"),
        [
            (
                name,
                f"{f['rows_per_s']:,.0f}",
                f"{f['gb_per_s']:.2f}",
                f"{f['wall_ms_per_batch']:.2f}",
                f"{f['cpu_ms_per_batch']:.2f}",
            )
            for name, f in rows
        ],
    )
    return 0


def loop(options: arguments.Loop) -> int:
    from safelight.bench.measure.loop import bench_loop
    from safelight.bench.recipes.workload import Workload

    work = Workload(
        options.base,
        options.latent_size,
        options.batch_size,
        options.precision,
        options.optimizer,
        options.checkpointing,
        options.device,
    )
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


def quick(options: arguments.Quick) -> int:
    from safelight.bench.measure.quick import quick as measure_quickly

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
        ("", "batch", "images/s", "GiB", "of the limit"),
        rows,
    )
    print(
        f"The limit, {found['limit_images_per_s']:.1f} images/s, is this machine's matrix products ({found['matmul_tflops']:.2f} TFLOP/s) doing the "
        "step's arithmetic and nothing else."
    )
    return 0


def everything(options: arguments.All) -> int:
    from safelight.bench.all.run_all import run_all
    from safelight.bench.recipes.workload import Workload
    from safelight.trainer.models.device import pick_device

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


def kernels(options: arguments.Kernels) -> int:
    from safelight.bench.measure import kernels as measuring
    from safelight.trainer.models.device import DTYPES, pick_device

    if min(*options.batch_size, options.shapes, options.repeats) < 1 or not options.model:
        raise UserError(
            f"batch sizes {options.batch_size}, shapes {options.shapes}, repeats {options.repeats} must be 1 or more"
        )
    device = pick_device(options.device)
    is_gpu = device.type == "cuda"
    timed = []
    for record in measuring.bench_kernels(
        options.model,
        options.batch_size,
        DTYPES[options.precision],
        device,
        ops=options.ops,
        num_shapes=options.shapes,
        times=options.times == "yes" or (options.times == "auto" and is_gpu),
        repeats=options.repeats,
        with_compile=not options.no_compile,
    ):
        keep(options.append, record)
        if options.json:
            print(json.dumps(record))
            continue
        config = record["config"]
        if config["what"] == "time":
            timed.append(record)
            continue
        print_table(
            f"{config['model']}, one step of batch {config['batch_size']}, {config['precision']}: bytes by kernel",
            ("kernel", "GB moved", "plain PyTorch", "MiB saved", "plain PyTorch"),
            measuring.bytes_rows(record["figures"]),
        )
    if timed:
        print_table(
            f"milliseconds on {timed[0]['machine']['device']}; copies run at {timed[0]['figures']['copy_gb_per_s']:.0f} GB/s",
            ("layer", "pass", "ours", "plain", "compiled", "GB/s", "of a copy"),
            measuring.time_rows(timed),
        )
        for reason in dict.fromkeys(
            f"{key.removesuffix('_cannot')}: {text}"
            for r in timed
            for key, text in r["figures"].items()
            if key.endswith("_cannot")
        ):
            print(reason)
    if not is_gpu and not options.json:
        print(measuring.CPU_NOTE if timed else "no times: a CPU runs no kernel (--times yes runs their references)")
    return 0


def aot(options: arguments.Aot) -> int:
    from safelight.bench.measure import aot_report as compiled

    rows, failed = compiled.whole_table() if options.all else compiled.one_of_each()
    if options.json:
        print_json({"kernels": rows, "failed": failed})
    else:
        targets = sorted({target for row in rows.values() for target in row})
        print_table(
            "worst of each kernel's compilations: registers a thread by card, then of all cards",
            ("kernel", *(f"sm_{target}" for target in targets), "compiled", "spilled B", "shared B", "code KiB"),
            compiled.table(rows, targets),
        )
    for line in failed if not options.json else ():
        print(line)
    return int(bool(failed))


def optimizer(options: arguments.Optimizer) -> int:
    from safelight.bench.measure import optimizers
    from safelight.trainer.models.device import DTYPES, pick_device

    if options.every < 0 or options.repeats < 1:
        raise UserError(f"every {options.every} must be 0 or more and repeats {options.repeats} 1 or more")
    device = pick_device(options.device)
    every = options.every or optimizers.EVERY[device.type]
    records = []
    for record in optimizers.bench_optimizers(device, DTYPES[options.precision], every, options.repeats):
        keep(options.append, record)
        records.append(record)
        if options.json:
            print(json.dumps(record))
    if not options.json:
        config, (measured, cannot) = records[0]["config"], optimizers.rows(records)
        print_table(
            f"{config['tensors']} of SD1.5's tensors, {config['parameters']:,} {options.precision} parameters, on "
            f"{records[0]['machine']['device']}",
            ("optimizer", "held B", "moved B", "ms a step", f"times {config['compared_with']}"),
            measured,
        )
        print("bytes a parameter, gradients not among those held; moved ones are a formula")
        if records[0]["config"]["device"] == "cpu":
            print("a CPU runs the kernels' references: times say nothing of the kernels")
        print("\n".join(("", "cannot run:", *cannot)) if cannot else "", end="\n" if cannot else "")
    return 0


def memory(options: arguments.Memory) -> int:
    from safelight.bench.measure.memory import bench_memory, rows
    from safelight.bench.recipes.workload import Workload
    from safelight.trainer.models.device import pick_device

    if options.batch_size < 1:
        raise UserError(f"batch size {options.batch_size} must be 1 or more")
    is_gpu = pick_device(options.device).type == "cuda"
    base = options.base or ("random:sd15" if is_gpu else "tiny")
    work = Workload(base, options.latent_size, options.batch_size, options.precision, device=options.device)
    records = []
    for record in bench_memory(work, options.optimizer):
        keep(options.append, record)
        records.append(record)
        if options.json:
            print(json.dumps(record), flush=True)
    if not options.json:
        config = records[0]["config"]
        print_table(
            f"one step of {base}, {config['latent_size']}x{config['latent_size']} latents, batch {options.batch_size}, "
            f"{config['precision']}, on {records[0]['machine']['device']}",
            (
                "optimizer",
                "checkpointing",
                *(
                    ("GiB allocated", "reserved", "smallest card")
                    if is_gpu
                    else ("MiB held", "in a step", "at the peak")
                ),
            ),
            rows(records),
        )
    return 0


def attention(options: arguments.Attention) -> int:
    from safelight.bench.measure import attention as measuring
    from safelight.trainer.models.device import pick_device, pick_dtype

    if min(options.batch_size, options.repeats) < 0 or not options.model:
        raise UserError(
            f"batch size {options.batch_size} and repeats {options.repeats} must be 0 or more, of a model or several"
        )
    device = pick_device(options.device)
    is_gpu = device.type == "cuda"
    dtype = pick_dtype(options.precision, device)
    batch, repeats = options.batch_size or (8 if is_gpu else 1), options.repeats or (20 if is_gpu else 3)
    records = []
    for record in measuring.bench_attention(options.model, batch, dtype, device, repeats):
        records.append(record)
        keep(options.append, record)
        if options.json:
            print(json.dumps(record))
    if not options.json:
        print_table(
            f"attention on {records[0]['machine']['device']}, {records[0]['config']['precision']}, batch {batch}; ms; * is chosen",
            ("heads x dim, queries x keys", "backend", "forward", "backward", "ratio", "MiB saved"),
            [row for record in records for row in measuring.rows_of(record)],
        )
        for line in measuring.reasons_of(records):
            print(line)
        if not is_gpu:
            print(measuring.CPU_NOTE)
    return 0


def roofline(options: arguments.Roofline) -> int:
    from safelight.bench.measure import roofline as measuring
    from safelight.bench.recipes.workload import Workload
    from safelight.trainer.memory_plan.gpus import find_card
    from safelight.trainer.models.device import pick_device

    is_gpu = bool(options.gpu) or pick_device(options.device).type == "cuda"
    model = ("sd15" if is_gpu else "tiny") if options.model == "auto" else options.model
    optimizer = ("adamw8bit" if is_gpu else "adamw") if options.optimizer == "auto" else options.optimizer
    work = Workload(
        "tiny" if model == "tiny" else f"random:{model}",
        options.latent_size,
        options.batch_size,
        options.precision,
        optimizer,
        options.checkpointing,
        options.device,
    )
    card = find_card(options.gpu) if options.gpu else None
    record = measuring.roofline(work, options.repeats, options.steps, card)
    keep(options.append, record)
    if options.json:
        print_json(record)
        return 0
    config, found = record["config"], record["figures"]
    side = config["latent_size"]
    print_table(
        f"{model}, one step of batch {config['batch_size']} at {side} x {side} latents, {config['precision']}, {config['optimizer']}, "
        f"checkpointing {config['checkpointing']}",
        *measuring.rows(found),
    )
    where = record["machine"]["device"] if card is None else config["ceilings"]
    print(
        f"Ceilings ({where}): {found['matmul_tflops']:.2f} TFLOP/s of matrix products, {found['copy_gb_per_s']:.0f} GB/s of copies; at "
        f"them the step would take {found['least_ms']:.1f} ms."
    )
    if "step_ms" in found:
        low, middle, high = found["step_ms"]
        print(
            f"The step takes {middle:.1f} ms (p20 {low:.1f}, p80 {high:.1f}), {found['profiled_step_ms']:.1f} under the profiler: "
            f"{found['images_per_s']:.2f} images/s, model-FLOP use {100 * found['model_flop_use']['share_of_limit']:.1f} %."
        )
    elif "why" in found:
        print(f"The step does not fit this GPU: {found['why']}")
    else:
        print("Counted on meta tensors, not measured: the step does not run here.")
    return 0
