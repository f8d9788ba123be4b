"""The `safelight bench` commands: run_NAME(options) measures, prints a table or JSON, and returns the exit status.

Each command imports its measurement when it runs, so that `compare` and `plot` do not load diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from safelight.bench.core import arguments
from safelight.bench.core.results import COUNTS, append, make_record
from safelight.errors import UserError
from safelight.output.show import json_text, print_json, print_line, print_table

CPU = torch.device("cpu")


def _append(path: Path | None, *records: dict) -> None:
    """Append result lines to the file that --append names, if it was given."""
    if path is not None:
        for record in records:
            append(path, record)


def _check_positive(options: object, *names: str) -> None:
    """Raise UserError, naming the option, if one of these is below 1 or an empty list."""
    for name in names:
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value == ():
            raise UserError(f"{option} is empty; give one or more values")
        for number in value if isinstance(value, tuple) else (value,):
            if number < 1:
                raise UserError(f"{option} {number} is below 1; use 1 or more")


def run_step(options: arguments.Step) -> int:
    return _run_steps(options, options.recipe)


def run_baseline(options: arguments.Baseline) -> int:
    from safelight.bench.recipes.other_trainers import ALL_RECIPES
    from safelight.bench.recipes.suite import OURS

    if not options.json:
        for name in options.recipe:
            print_line(f"{name}: {ALL_RECIPES[name].description}")
    return _run_steps(options, (OURS, *options.recipe))


def _run_steps(options: arguments.Step, recipes: tuple[str, ...]) -> int:
    from safelight.bench.recipes.suite import measure, variants
    from safelight.bench.recipes.workload import Workload

    _check_positive(options, "batch_size", "repeats")
    work = Workload(
        options.base,
        options.latent_size,
        1,
        options.precision,
        options.optimizer,
        options.checkpointing,
        options.device,
    )
    workloads = variants(recipes, options.batch_size, work)
    for record in measure(workloads, options.repeats, options.loader, not options.separate):
        _append(options.append, record)
        print_line(json_text(record) if options.json else _step_line(record))
    return 0


def _step_line(record: dict) -> str:
    """Return the result of a timed step as one line of text."""
    config, figures = record["config"], record["figures"]
    variant = f"{config['recipe']}, {config['base']}, batch {config['batch_size']}"
    if "images_per_s" not in figures:
        return f"{variant}: out of GPU memory"
    low, middle, high = figures["images_per_s"]
    peak = f", peak {figures['peak_gib']:.2f} GiB" if figures["peak_gib"] is not None else ""
    return (
        f"{variant}: {middle:.2f} images/s (p20 {low:.2f}, p80 {high:.2f}){peak}, "
        f"{config['precision']} on {record['machine']['device']}"
    )


def run_count(options: arguments.Count) -> int:
    from safelight.bench.measure.count import config_of, count, profile_count, table_rows

    figures, seconds = count(options)
    record = make_record("count", config_of(options), figures, CPU)
    _append(options.append, record)
    profiled = profile_count(options) if options.profile else None
    if options.json:
        print_json({**record, "seconds": round(seconds, 1)} | ({"profiler": profiled} if profiled else {}))
        return 0
    columns, rows = table_rows(figures, profiled)
    print_table(
        f"{options.base}, one step of batch {options.batch_size}, {options.precision}, {options.layout}, "
        f"traced in {seconds:.0f} s",
        columns,
        rows,
    )
    print_line(
        f"{figures['forward_gflop']:,.1f} GFLOP forward, {figures['step_gflop']:,.1f} GFLOP in the whole step; "
        f"{figures['saved_mib']:,.1f} MiB saved for backward; "
        f"{figures['host_syncs']} host-device synchronizations"
    )
    print_line(
        "Launches and bytes are estimates from the model in bench/core/operators.py."
        + ("" if profiled else " Use --profile to compare them with a profiled step.")
    )
    return 0


def run_gate(options: arguments.Gate) -> int:
    from safelight.bench.measure.gate import check, goldens

    failed = False
    for golden in goldens(options.golden or COUNTS, options.base):
        rose, fell = check(golden)
        print_line(f"{'rose' if rose else 'fell' if fell else 'same'}  {_config_text(golden['config'])}")
        for line in (*rose, *fell):
            print_line(f"      {line}")
        failed |= bool(rose)
    if failed:
        print_line(
            f"A counted figure rose. If that is intended, append the new count to {COUNTS.name} "
            "(`bench count --append`) and explain it in the commit."
        )
    return int(failed)


def _config_text(config: dict) -> str:
    """Return a counted config as text: `random:sd15, batch 1, bf16, nchw, patched, checkpointing full`."""
    parts = [config["base"], f"batch {config['batch_size']}", config["precision"], config["layout"]]
    if config["latent_size"]:
        parts.insert(1, f"{config['latent_size']}x{config['latent_size']} latents")
    if config.get("patched"):
        parts.append("patched")
    if config["checkpointing"] != "none":
        parts.append(f"{config['checkpointing']} checkpointing")
    parts.append("no optimizer" if config["optimizer"] == "none" else config["optimizer"])
    return ", ".join(parts)


def run_compare(options: arguments.Compare) -> int:
    from safelight.bench.core.results import compare, find, labels, slower_figures

    if not 0 <= options.at_most < 1:
        raise UserError(f"--at-most {options.at_most} is not between 0 and 1; use for example 0.05")
    a, b = find(options.a), find(options.b)
    rows = compare(a, b)
    if not rows:
        raise UserError(f"{options.a} and {options.b} share no benchmark with the same config")
    regressions = slower_figures(a, b, options.at_most) if options.at_most else []
    if options.json:
        names = ("bench", "config", "figure", "a", "b")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return int(bool(regressions))
    for bench in dict.fromkeys(row[0] for row in rows):
        rows_of_bench = [row[1:] for row in rows if row[0] == bench]
        configs = list(dict.fromkeys(config for config, *_ in rows_of_bench))
        label_of = dict(zip(configs, labels(list(map(json.loads, configs))), strict=True))
        print_table(
            f"{bench}: A is {options.a}, B is {options.b}",
            ("figure", "A", "B", "B / A"),
            [
                (": ".join(filter(None, (label_of[config], name))), f"{a:,g}", f"{b:,g}", f"{b / a:.3f}" if a else "")
                for config, name, a, b in rows_of_bench
            ],
        )
    for line in regressions:
        print_line(line)
    return int(bool(regressions))


def run_plot(options: arguments.Plot) -> int:
    from safelight.bench.core.plot import plot
    from safelight.bench.core.results import read

    if not options.results:
        raise UserError("no results given; name one or more .jsonl, for example bench/results/counts.jsonl")
    files, skipped = plot([line for path in options.results for line in read(path)], options.out)
    if not files:
        raise UserError(f"nothing to plot: the files have no results for {', '.join(skipped)}")
    for file in files:
        print_line(file)
    if skipped:
        print_line(f"not plotted, no results for: {', '.join(skipped)}")
    return 0


def run_cache(options: arguments.Cache) -> int:
    from safelight.bench.measure.cache_growth import bench_filling, bench_growth

    _check_positive(options, "rows", "batch_size", "repeats")
    growth = bench_growth(options.rows, options.batch_size, options.repeats, options.dir)
    filling = []
    if options.photos > 0:
        filling = bench_filling(options.photos, options.batch_size, options.repeats, options.dir)
    _append(options.append, *growth, *filling)
    if options.json:
        print_json([*growth, *filling])
        return 0
    print_table(
        f"a cache of small rows, batch {options.batch_size}",
        ("rows", "index MiB", "open ms", "CPU ms", "read ms/batch", "CPU ms/batch", "reads/batch"),
        [
            (
                f"{record['config']['rows']:,}",
                f"{figures['index_mib']:.1f}",
                f"{figures['open_ms']:.1f}",
                f"{figures['open_cpu_ms']:.1f}",
                f"{figures['read_ms_per_batch']:.2f}",
                f"{figures['read_cpu_ms_per_batch']:.2f}",
                f"{figures['read_calls_per_batch']:.1f}" if "read_calls_per_batch" in figures else "",
            )
            for record in growth
            for figures in [record["figures"]]
        ],
    )
    if filling:
        print_table(
            f"filling a cache with {options.photos} photographs, batch {options.batch_size}",
            (
                "encoder",
                "alone s",
                "filling s",
                "idle: before",
                "between",
                "after",
                "CPU s",
                "of the encoder alone",
            ),
            [
                (
                    record["config"]["encoder"],
                    f"{figures['alone_s']:.2f}",
                    f"{figures['fill_s']:.2f}",
                    *(f"{figures[f'{when}_s']:.2f}" for when in ("before", "between", "after")),
                    f"{figures['fill_cpu_s']:.2f}",
                    f"{100 * figures['of_encoder_alone']:.0f} %",
                )
                for record in filling
                for figures in [record["figures"]]
            ],
        )
    return 0


def run_loader(options: arguments.Loader) -> int:
    from safelight.bench.measure.loader import bench_loader

    _check_positive(options, "rows", "batch_size", "repeats")
    if not options.sources:
        raise UserError("--sources is empty; name at least one of cache, cache-ahead, npz, pt, decode")
    records = bench_loader(
        options.base,
        options.latent_size,
        options.rows,
        options.batch_size,
        options.sources,
        options.repeats,
        options.dir,
    )
    _append(options.append, *records)
    if options.json:
        print_json(records)
        return 0
    print_table(
        f"{options.rows} rows of {options.base}, batch {options.batch_size}; "
        f"memcpy runs at {records[0]['figures']['memcpy_gb_per_s']:.1f} GB/s",
        ("source", "rows/s", "GB/s", "ms/batch", "CPU ms/batch"),
        [
            (
                record["config"]["source"],
                f"{record['figures']['rows_per_s']:,.0f}",
                f"{record['figures']['gb_per_s']:.2f}",
                f"{record['figures']['wall_ms_per_batch']:.2f}",
                f"{record['figures']['cpu_ms_per_batch']:.2f}",
            )
            for record in records
        ],
    )
    return 0


def run_loop(options: arguments.Loop) -> int:
    import sys

    from safelight.bench.measure.loop import bench_loop
    from safelight.bench.recipes.other_trainers import why_no_everydream
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
    if why := why_no_everydream(work.resolved().base):
        print(f"only our own loop: {why}", file=sys.stderr)
    for record in bench_loop(work, options.photographs, options.epochs):
        _append(options.append, record)
        print_line(json_text(record) if options.json else _loop_line(record))
    return 0


def _loop_line(record: dict) -> str:
    """Return the result of a timed training loop as one line of text."""
    config, figures = record["config"], record["figures"]
    idle = "" if figures["idle_share"] is None else f", GPU idle {100 * figures['idle_share']:.0f} % of the time"
    return (
        f"{config['recipe']}, {config['base']}, batch {config['batch_size']}: "
        f"{figures['epoch_s'][1]:.2f} s per epoch of {config['photographs']} photographs "
        f"({figures['images_per_s']:.2f} images/s), waiting for data {100 * figures['waited_share']:.1f} % of the time"
        f"{idle}; first epoch {figures['first_epoch_s']:.1f} s"
    )


def run_quick(options: arguments.Quick) -> int:
    from safelight.bench.measure.quick import quick

    records = []
    for record in quick(options.device):
        _append(options.append, record)
        records.append(record)
    if options.json:
        print_json(records)
        return 0
    ceiling, *steps = records
    config, limits = ceiling["config"], ceiling["figures"]
    rows = []
    for record in steps:
        figures, variant = record["figures"], (record["config"]["recipe"], record["config"]["batch_size"])
        if "images_per_s" not in figures:
            rows.append((*variant, "out of memory", "", ""))
            continue
        peak = "" if figures["peak_gib"] is None else f"{figures['peak_gib']:.2f}"
        rows.append((*variant, f"{figures['images_per_s'][1]:.2f}", peak, f"{100 * figures['share_of_limit']:.0f} %"))
    side = config["latent_size"]
    print_table(
        f"training step of {config['base']}, {side}x{side} latents, {config['precision']}, "
        f"on {ceiling['machine']['device']}",
        ("recipe", "batch", "images/s", "peak GiB", "of the limit"),
        rows,
    )
    print_line(
        f"The limit of {limits['limit_images_per_s']:.1f} images/s assumes that the step does nothing but its "
        f"arithmetic, at this machine's matrix-multiply rate of {limits['matmul_tflops']:.2f} TFLOP/s."
    )
    return 0


def run_all(options: arguments.All) -> int:
    from safelight.bench.all.run_all import run_parts
    from safelight.bench.recipes.workload import Workload
    from safelight.trainer.models.device import pick_device

    is_gpu = pick_device(options.device).type == "cuda"
    base = options.base or ("random:sd15" if is_gpu else "tiny")
    work = Workload(base, options.latent_size, device=options.device)
    failed: list[str] = []
    for record in run_parts(options.minutes, options.out, work, options.only):
        failed += [record["bench"]] if record["figures"].get("failed") else []
        print_line(f"{record['bench']} {_summary(record)} {record.get('note', '')}".rstrip())
    print_line(f"results: {options.out / 'results.jsonl'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _summary(record: dict) -> str:
    """Return a result line as text: what was measured and its scalar figures; for a kernel, p50 times and GPU share."""
    config, figures = record["config"], record["figures"]
    names = ("recipe", "base", "op", "shape", "optimizer", "checkpointing", "batch_size", "head_dim")
    parts = [f"{name} {value}" for name, value in figures.items() if not isinstance(value, dict)]
    for direction in ("forward", "backward"):
        row = figures.get(direction, {})
        parts += [
            f"{direction} {name} {row[name][1]}" for name in ("ours_ms", "plain_ms", "compiled_ms") if name in row
        ]
        if "share_of_limit" in row:
            parts.append(f"{100 * row['share_of_limit']:.0f} % of copy bandwidth")
    return f"{' '.join(str(config[n]) for n in names if n in config)}: {', '.join(parts)}"


def run_kernels(options: arguments.Kernels) -> int:
    from safelight.bench.measure.kernels import CPU_NOTE, bench_kernels, bytes_rows, failures, time_rows
    from safelight.trainer.models.device import DTYPES, pick_device

    _check_positive(options, "batch_size", "shapes", "repeats")
    if not options.model:
        raise UserError("--model is empty; give one or more models")
    device = pick_device(options.device)
    is_gpu = device.type == "cuda"
    timed = []
    for record in bench_kernels(
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
        _append(options.append, record)
        if options.json:
            print_line(json_text(record))
            continue
        config = record["config"]
        if config["what"] == "time":
            timed.append(record)
            continue
        print_table(
            f"{config['model']}, one step of batch {config['batch_size']}, {config['precision']}: bytes by kernel",
            ("kernel", "GB moved", "by PyTorch", "MiB saved", "by PyTorch"),
            bytes_rows(record["figures"]),
        )
    if timed:
        print_table(
            f"milliseconds on {timed[0]['machine']['device']}; "
            f"copies run at {timed[0]['figures']['copy_gb_per_s']:.0f} GB/s",
            ("layer", "pass", "ours", "PyTorch", "compiled", "GB/s", "of copy rate"),
            time_rows(timed),
        )
        for line in failures(timed):
            print_line(line)
    if not is_gpu and not options.json:
        print_line(
            CPU_NOTE if timed else "No times: the kernels need a GPU (--times yes times their PyTorch references)."
        )
    return 0


def run_aot(options: arguments.Aot) -> int:
    from safelight.bench.measure.aot_report import one_of_each, table_rows, whole_table

    rows, failed = whole_table() if options.all else one_of_each()
    if options.json:
        print_json({"kernels": rows, "failed": failed})
    else:
        targets = sorted({target for row in rows.values() for target in row})
        print_table(
            "maximum over each kernel's compilations: registers per thread by target, the rest over all targets",
            ("kernel", *(f"sm_{target}" for target in targets), "compiled", "spilled B", "shared B", "code KiB"),
            table_rows(rows, targets),
        )
        for line in failed:
            print_line(line)
    return int(bool(failed))


def run_optimizer(options: arguments.Optimizer) -> int:
    from safelight.bench.measure.optimizers import EVERY, bench_optimizers, rows
    from safelight.trainer.models.device import DTYPES, pick_device

    _check_positive(options, "repeats")
    if options.every < 0:
        raise UserError(f"--every {options.every} is below 0; use 0 or more")
    device = pick_device(options.device)
    every = options.every or EVERY[device.type]
    records = []
    for record in bench_optimizers(device, DTYPES[options.precision], every, options.repeats):
        _append(options.append, record)
        records.append(record)
        if options.json:
            print_line(json_text(record))
    if options.json:
        return 0
    config, (measured, failures) = records[0]["config"], rows(records)
    print_table(
        f"{config['tensors']} of SD1.5's tensors, {config['parameters']:,} {options.precision} parameters, "
        f"on {records[0]['machine']['device']}",
        ("optimizer", "bytes held", "bytes moved", "ms/step", f"times {config['compared_with']}"),
        measured,
    )
    print_line("Bytes are per parameter. Held bytes leave out gradients; moved bytes are computed, not measured.")
    if config["device"] == "cpu":
        print_line("On a CPU our kernels run as PyTorch references: these times say nothing about the kernels.")
    if failures:
        for line in ("", "cannot run here:", *failures):
            print_line(line)
    return 0


def run_memory(options: arguments.Memory) -> int:
    from safelight.bench.measure.memory import bench_memory, rows
    from safelight.bench.recipes.workload import Workload
    from safelight.trainer.models.device import pick_device

    _check_positive(options, "batch_size")
    is_gpu = pick_device(options.device).type == "cuda"
    base = options.base or ("random:sd15" if is_gpu else "tiny")
    work = Workload(base, options.latent_size, options.batch_size, options.precision, device=options.device)
    records = []
    for record in bench_memory(work, options.optimizer):
        _append(options.append, record)
        records.append(record)
        if options.json:
            print_line(json_text(record))
    if options.json:
        return 0
    config = records[0]["config"]
    side = config["latent_size"]
    on_gpu, on_cpu = ("GiB allocated", "GiB reserved", "fits GiB"), ("MiB between steps", "added by a step", "peak")
    print_table(
        f"one step of {base}, {side}x{side} latents, batch {options.batch_size}, {config['precision']}, "
        f"on {records[0]['machine']['device']}",
        ("optimizer", "checkpointing", *(on_gpu if is_gpu else on_cpu)),
        rows(records),
    )
    return 0


def run_attention(options: arguments.Attention) -> int:
    from safelight.bench.measure.attention import CPU_NOTE, bench_attention, reasons_of, rows_of
    from safelight.trainer.models.device import pick_device, pick_dtype

    if min(options.batch_size, options.repeats) < 0:
        raise UserError(f"batch size {options.batch_size} and repeats {options.repeats} must be 0 or more")
    if not options.model:
        raise UserError("--model is empty; name at least one of sd15, sd21, sdxl")
    device = pick_device(options.device)
    is_gpu = device.type == "cuda"
    dtype = pick_dtype(options.precision, device)
    batch, repeats = options.batch_size or (8 if is_gpu else 1), options.repeats or (20 if is_gpu else 3)
    records = []
    for record in bench_attention(options.model, batch, dtype, device, repeats):
        records.append(record)
        _append(options.append, record)
        if options.json:
            print_line(json_text(record))
    if options.json:
        return 0
    print_table(
        f"attention on {records[0]['machine']['device']}, {records[0]['config']['precision']}, batch {batch}: "
        "milliseconds; * marks the backend that training uses",
        ("heads x dim, queries x keys", "backend", "forward", "backward", "ratio", "MiB saved"),
        [row for record in records for row in rows_of(record)],
    )
    for line in reasons_of(records):
        print_line(line)
    if not is_gpu:
        print_line(CPU_NOTE)
    return 0


def run_roofline(options: arguments.Roofline) -> int:
    from safelight.bench.measure.roofline import roofline, table_rows
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
    record = roofline(work, options.repeats, options.steps, card)
    _append(options.append, record)
    if options.json:
        print_json(record)
        return 0
    config, figures = record["config"], record["figures"]
    side = config["latent_size"]
    print_table(
        f"{model}, one step of batch {config['batch_size']}, {side}x{side} latents, {config['precision']}, "
        f"{config['optimizer']}, checkpointing {config['checkpointing']}",
        *table_rows(figures),
    )
    source = f"measured on {record['machine']['device']}" if card is None else config["ceilings"]
    print_line(
        f"Ceilings ({source}): {figures['matmul_tflops']:.2f} TFLOP/s of matrix multiplication, "
        f"{figures['copy_gb_per_s']:.0f} GB/s of copies. At these rates the step would take "
        f"{figures['least_ms']:.1f} ms."
    )
    if "step_ms" in figures:
        low, middle, high = figures["step_ms"]
        print_line(
            f"Measured: {middle:.1f} ms per step (p20 {low:.1f}, p80 {high:.1f}), "
            f"{figures['images_per_s']:.2f} images/s, model FLOP utilization "
            f"{100 * figures['model_flop_use']['share_of_limit']:.1f} %. "
            f"Under the profiler a step takes {figures['profiled_step_ms']:.1f} ms."
        )
    elif "why" in figures:
        print_line(f"Not measured: the step runs out of memory on this GPU ({figures['why']}).")
    else:
        print_line("Nothing was measured: operators were counted on meta tensors.")
    return 0
