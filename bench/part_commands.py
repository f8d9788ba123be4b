"""`safelight bench` of the parts of a step and of its data; see step_commands.py."""

from __future__ import annotations

from safelight.bench.core import arguments
from safelight.bench.core.arguments import check_positive
from safelight.bench.core.results import append_all
from safelight.errors import UserError
from safelight.output.show import json_text, print_json, print_line, print_table


def run_kernels(options: arguments.Kernels) -> int:
    from safelight.bench.measure.kernels import CPU_NOTE, bench_kernels, bytes_rows, failures, time_rows
    from safelight.trainer.models.device import DTYPES, pick_device

    check_positive(options, "batch_size", "shapes", "repeats")
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
        append_all(options.append, record)
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
    from safelight.bench.measure.aot_report import COLUMNS, one_of_each, table_rows, whole_table

    rows, failed = whole_table() if options.all else one_of_each()
    if options.json:
        print_json({"kernels": rows, "failed": failed})
    else:
        targets = sorted({target for row in rows.values() for target in row})
        print_table(
            "the worst of each kernel's compilations: registers per thread by target, the rest over all targets",
            ("kernel", *(f"sm_{target}" for target in targets), "compiled", *COLUMNS),
            table_rows(rows, targets),
        )
        print_line("Instructions are counted in the code, a loop's once, and divided by a thread's share of a tile.")
        for line in failed:
            print_line(line)
    return int(bool(failed))


def run_optimizer(options: arguments.Optimizer) -> int:
    from safelight.bench.measure.optimizers import EVERY, bench_optimizers, rows
    from safelight.trainer.models.device import DTYPES, pick_device

    check_positive(options, "repeats")
    if options.every < 0:
        raise UserError(f"--every {options.every} is below 0; use 0 or more")
    device = pick_device(options.device)
    every = options.every or EVERY[device.type]
    records = []
    for record in bench_optimizers(device, DTYPES[options.precision], every, options.repeats):
        append_all(options.append, record)
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
        append_all(options.append, record)
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


def run_cache(options: arguments.Cache) -> int:
    from safelight.bench.measure.cache_growth import bench_filling, bench_growth

    check_positive(options, "rows", "batch_size", "repeats")
    growth = bench_growth(options.rows, options.batch_size, options.repeats, options.dir)
    filling = []
    if options.photos > 0:
        filling = bench_filling(options.photos, options.batch_size, options.repeats, options.dir)
    append_all(options.append, *growth, *filling)
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

    check_positive(options, "rows", "batch_size", "repeats")
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
    append_all(options.append, *records)
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
