"""`safelight bench` of whole steps and runs: run_NAME(options) measures, prints and returns the exit status.

Each command imports its measurement when it runs.
"""

from __future__ import annotations

from safelight.bench.core import arguments
from safelight.bench.core.arguments import check_positive
from safelight.bench.core.results import append_all
from safelight.errors import UserError
from safelight.output.show import json_text, print_json, print_line, print_table


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

    check_positive(options, "batch_size", "repeats")
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
        append_all(options.append, record)
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
        append_all(options.append, record)
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
        append_all(options.append, record)
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


def run_memory(options: arguments.Memory) -> int:
    from safelight.bench.measure.memory import bench_memory, rows
    from safelight.bench.recipes.workload import Workload
    from safelight.trainer.models.device import pick_device

    check_positive(options, "batch_size")
    is_gpu = pick_device(options.device).type == "cuda"
    base = options.base or ("random:sd15" if is_gpu else "tiny")
    work = Workload(base, options.latent_size, options.batch_size, options.precision, device=options.device)
    records = []
    for record in bench_memory(work, options.optimizer):
        append_all(options.append, record)
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
    append_all(options.append, record)
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


def run_scale(options: arguments.Scale) -> int:
    from safelight.bench.measure.scale import VARIANTS, bench_scale
    from safelight.trainer.models.device import pick_device

    check_positive(options, "batch_size", "repeats", "rounds")
    if not options.processes or min(options.processes) < 1:
        raise UserError("--processes must be numbers of 1 or more, such as 1 2 4")
    if options.bucket_mib < 0:
        raise UserError(f"--bucket-mib {options.bucket_mib:g} is below 0; use 0 or more")
    base = options.base or ("random:sd15" if pick_device(options.device).type == "cuda" else "tiny")
    records = bench_scale(
        base,
        options.latent_size,
        options.batch_size,
        options.processes,
        options.repeats,
        options.rounds,
        options.device,
        options.bucket_mib,
    )
    append_all(options.append, *records)
    if options.json:
        print_json(records)
        return 0
    print_table(
        f"{base}, batch {options.batch_size} a process, on {records[0]['machine']['device']}",
        ("processes", "step", "images/s", "efficiency", "sent MiB", "messages", "gradient MiB", "held MiB"),
        [
            (
                str(record["config"]["processes"]),
                name,
                f"{figures['images_per_s_p20_p50_p80'][1]:.2f}",
                f"{figures['efficiency']:.2f}",
                f"{figures['sent_mib']:.2f}",
                str(figures["calls"]),
                f"{figures['gradient_peak_mib']:.1f}",
                f"{figures['gradient_held_mib']:.1f}",
            )
            for record in records
            for name in VARIANTS
            for figures in [record["figures"][name]]
        ],
    )
    print_line("sent: by each process in a step. gradient: the most of gradients and buckets; held: between steps.")
    if note := records[0].get("note"):
        print_line(f"{note}: efficiency here says nothing about GPUs; bytes and memory hold anywhere.")
    return 0
