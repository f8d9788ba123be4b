"""What `safelight bench kernels`, `aot`, `optimizer`, `memory`, `attention` and `roofline` do with their measurements: print, keep."""

from __future__ import annotations

import json

from safelight.bench import command
from safelight.bench.run import keep
from safelight.bench.show import print_json, print_table


def kernels(options: command.Kernels) -> int:
    from safelight.bench import kernels as measuring
    from safelight.bench.count import DTYPES
    from safelight.trainer.device import pick_device

    if min(*options.batch_size, options.shapes, options.repeats) < 1 or not options.model:
        raise ValueError(f"batch sizes {options.batch_size}, shapes {options.shapes}, repeats {options.repeats} must be 1 or more")  # fmt: skip
    device = pick_device(options.device)
    is_gpu = device.type == "cuda"
    timed = []
    for record in measuring.bench_kernels(
        options.model, options.batch_size, DTYPES[options.precision], device, ops=options.ops, num_shapes=options.shapes,
        times=options.times == "yes" or (options.times == "auto" and is_gpu), repeats=options.repeats,
        with_compile=not options.no_compile,
    ):  # fmt: skip
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
            ("kernel", "GB moved", "plain PyTorch", "MiB saved", "plain PyTorch"), measuring.bytes_rows(record["figures"]),
        )  # fmt: skip
    if timed:
        print_table(
            f"milliseconds on {timed[0]['machine']['device']}; copies run at {timed[0]['figures']['copy_gb_per_s']:.0f} GB/s",
            ("layer", "pass", "ours", "plain", "compiled", "GB/s", "of a copy"), measuring.time_rows(timed),
        )  # fmt: skip
        for reason in dict.fromkeys(
            f"{key.removesuffix('_cannot')}: {text}" for r in timed for key, text in r["figures"].items() if key.endswith("_cannot")
        ):  # fmt: skip
            print(reason)
    if not is_gpu and not options.json:
        print(measuring.CPU_NOTE if timed else "no times: a CPU runs no kernel (--times yes runs their references)")
    return 0


def aot(options: command.Aot) -> int:
    from safelight.bench import compiled

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


def optimizer(options: command.Optimizer) -> int:
    from safelight.bench import optimizers
    from safelight.bench.count import DTYPES
    from safelight.trainer.device import pick_device

    if options.every < 0 or options.repeats < 1:
        raise ValueError(f"every {options.every} must be 0 or more and repeats {options.repeats} 1 or more")
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


def memory(options: command.Memory) -> int:
    from safelight.bench.memory import bench_memory, rows
    from safelight.bench.workload import Workload
    from safelight.trainer.device import pick_device

    if options.batch_size < 1:
        raise ValueError(f"batch size {options.batch_size} must be 1 or more")
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
            ("optimizer", "checkpointing", *(("GiB allocated", "reserved", "smallest card") if is_gpu else ("MiB held", "in a step", "at the peak"))),
            rows(records),
        )  # fmt: skip
    return 0


def attention(options: command.Attention) -> int:
    from safelight.bench import attention as measuring
    from safelight.trainer.device import pick_device, pick_dtype

    if min(options.batch_size, options.repeats) < 0 or not options.model:
        raise ValueError(f"batch size {options.batch_size} and repeats {options.repeats} must be 0 or more, of a model or several")  # fmt: skip
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


def roofline(options: command.Roofline) -> int:
    from safelight.bench import roofline as measuring
    from safelight.bench.workload import Workload
    from safelight.trainer.cards import find_card
    from safelight.trainer.device import pick_device

    is_gpu = bool(options.gpu) or pick_device(options.device).type == "cuda"
    model = ("sd15" if is_gpu else "tiny") if options.model == "auto" else options.model
    optimizer = ("adamw8bit" if is_gpu else "adamw") if options.optimizer == "auto" else options.optimizer
    work = Workload(
        "tiny" if model == "tiny" else f"random:{model}", options.latent_size, options.batch_size, options.precision,
        optimizer, options.checkpointing, options.device,
    )  # fmt: skip
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
        f"checkpointing {config['checkpointing']}", *measuring.rows(found),
    )  # fmt: skip
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
