"""Prints a memory plan within 80 columns: a row per combination of settings, best first, a column per batch size."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safelight.output.columns import fill
from safelight.text import counted, printable
from safelight.units import GIB

# terminals with this many columns get wider padding
WIDE = 100


def _row_of(way: dict) -> tuple:
    return way["memory"], way["checkpointing"], "yes" if way["fused_backward"] else "no"


def _cell(way: dict, is_chosen: bool) -> Text:
    rate = way["images_per_s"]
    rate = "" if rate is None else f" {rate:4.2f}" if rate < 10 else f" {rate:4.3g}" if rate < 999 else f" {rate:4.0f}"
    text = f"{way['needed'] / GIB:.2f}{rate}"
    if is_chosen:
        return Text(f"> {text}", style="bold green")
    return Text(text) if way["fits"] else Text(f"x {text}", style="dim")


def trained_words(result: dict) -> str:
    """Return how many parameters a plan trains, as part of a title; '' if it is all of them."""
    return f"{result['trained_parameters']:,} of them trained, " if "trained_parameters" in result else ""


def print_ways(result: dict) -> None:
    """Print GiB and images/s of every candidate, mark the chosen one, and break its memory down."""
    plan, console = result["plan"], Console(highlight=False, emoji=False)
    height, width = plan["latents"]
    budget = plan["budget_bytes"] / GIB
    parameters = f"{result['unet_parameters']:,} parameters, {trained_words(result)}"
    title = f"{result['base']}, {parameters}{plan['precision']}, {result['optimizer']}"
    console.print(printable(title), style="bold", markup=False, soft_wrap=True)
    console.print(
        printable(f"{plan['card']}: {budget:.2f} GiB of GPU memory available; latents up to {height} x {width}"),
        markup=False,
        soft_wrap=True,
    )
    ways = plan["ways"]
    sizes = sorted({way["batch_size"] for way in ways})
    table = Table(box=None, pad_edge=False, padding=(0, 1 if console.width < WIDE else 3, 0, 0), header_style="dim")
    for name in ("memory", "checkpointing", "fused"):
        table.add_column(name, no_wrap=True)
    for size in sizes:
        table.add_column(f"batch {size}", justify="right", no_wrap=True)
    chosen = plan["chosen"]
    place = chosen and (*_row_of(chosen), chosen["batch_size"])
    for key in dict.fromkeys(map(_row_of, ways)):
        row = {way["batch_size"]: way for way in ways if _row_of(way) == key}
        table.add_row(*key, *(_cell(row[size], (*key, size) == place) for size in sizes))
    console.print(table)
    figures = "GPU memory in GiB, then images/s" if plan["rates_known"] else "GPU memory in GiB"
    legend = f"Each cell: {figures}, estimated. x: does not fit."
    if chosen:
        legend += f" >: chosen, the first row that fits at batch size {chosen['batch_size']}."
    print(fill(f"{legend} fused: the optimizer steps inside the backward pass."))
    _print_noise(plan, {way["memory"] for way in ways})
    if chosen is None:
        return
    parts, step_peak = dict(chosen["kinds"]), chosen["held"] + chosen["step"]
    is_peak_in_step = chosen["others"] <= step_peak
    if is_peak_in_step:
        parts["CUDA and libraries"] = chosen["needed"] - step_peak
    console.print(f"> {chosen['needed'] / GIB:.2f} GiB. At the peak of a training step, GiB:", markup=False)
    breakdown = Table(box=None, pad_edge=False, show_header=False)
    for part, size in parts.items():
        if size >= GIB / 200:
            breakdown.add_row(f"  {part}", f"{size / GIB:.2f}")
    console.print(breakdown)
    if num := result.get("text_encoder_parameters"):
        kept = sum(size for part, size in result["bytes"].items() if part.startswith("text encoder"))
        print(
            fill(
                f"Of these, {kept / GIB:.2f} GiB are weights, moments and gradients of the text encoder, of which "
                f"{num:,} parameters are trained in fp32."
            )
        )
    if not is_peak_in_step:
        print(fill("Loading, validation or sampling needs more than a step, even with one image at a time."))
    _print_eval_batching(chosen["between"])
    _print_graphs(plan, chosen)
    if chosen["bus_in"]:
        bus_in, bus_out = (f"{chosen[name] / GIB:.2f} GiB" for name in ("bus_in", "bus_out"))
        print(f"A step copies {bus_in} to the GPU and {bus_out} back.")
    _print_host(plan, chosen["host"])
    if chosen["images_per_s"] and "gpus" not in result:
        _print_time(result, chosen["images_per_s"])


def _print_time(result: dict, images_per_s: float, where: str = "") -> None:
    images = result["dataset"]["images trained"] if "dataset" in result else 1000
    time = duration(images / images_per_s)
    print(fill(f"Training on {counted(images, 'image')} takes about {time}{where}, plus validation and sampling."))


def print_ranks(result: dict) -> None:
    """Print what each of several GPUs holds and sends and how fast they are, by distributed.shard, and the time."""
    ranks = result["gpus"]
    console = Console(highlight=False, emoji=False)
    micro = counted(ranks["micro_batches"], "micro-batch")
    print(
        fill(
            f"{ranks['gpus']} GPUs, connected by {ranks['link']}; a step of {counted(ranks['images'], 'image')}, "
            f"{micro} a GPU:"
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("shard", no_wrap=True)
    for name in ("GiB", "sent GiB", "in backward", "images/s", "efficiency"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", no_wrap=True)
    for shard, row in ranks["shards"].items():
        candidate, speed = row["candidate"], row["predicted"]
        share = 100 * row["overlapped_bytes"] / row["sent_bytes"]
        rate = ("", "") if speed is None else (f"{speed['images_per_s']:.3g}", f"{100 * speed['efficiency']:.0f} %")
        mark = ">" if shard == ranks["shard"] else " "
        cells = f"{candidate['needed'] / GIB:.2f}", f"{row['sent_bytes'] / GIB:.2f}", f"{share:.0f} %", *rate
        settings = ", ".join(_row_of(candidate)[:2]) + (", fused" if candidate["fused_backward"] else "")
        style = "" if row["fits"] else "dim"
        table.add_row(f"{mark} {shard}" + ("" if row["fits"] else " x"), *cells, settings, style=style)
    console.print(table)
    print(
        fill(
            "shard: distributed.shard, > this run's, x does not fit. GiB: memory of the GPU that needs most. sent: by "
            "each in a step; in backward: the part that is sent while computing goes on. images/s: of all GPUs; these "
            "and efficiency, over as many single GPUs that take the same step, are predictions. settings: "
            "optimizer.memory and train.checkpointing."
        )
    )
    own = ranks["shards"].get(ranks["shard"])
    if own and own["predicted"]:
        _print_time(result, own["predicted"]["images_per_s"], f" on {ranks['gpus']} GPUs")
    for shard, row in ranks["shards"].items():
        if row["lacking_bytes"]:
            print(fill(f"shard {shard} lacks {row['lacking_bytes'] / GIB:.2f} GiB on each GPU."))


def duration(seconds: float) -> str:
    """Return a time span in the largest suitable unit: 41 s, 12 min, 3.2 hours, 2.4 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{max(seconds, 1) / unit:.{1 if name == 'hours' else 0}f} {name}"
    return f"{seconds / 86400:.1f} days"


def _print_noise(plan: dict, modes: set[str]) -> None:
    """Print the rounding noise of the memory modes shown, for a run of this length."""
    noise = {mode: ratio for mode, ratio in plan["noise"].items() if mode in modes}
    if not noise:
        return
    ratios = ", ".join(f"{mode} {ratio:.2g}" for mode, ratio in noise.items())
    steps = f"{plan['noise_steps']:,}" + (" (assumed)" if plan["noise_steps_assumed"] else "")
    print(fill(f"Rounding error, relative to how far {steps} steps move the weights:"))
    print(f"  {ratios}; exact, paged and streamed have none.")
    if noisy := [mode for mode, ratio in noise.items() if ratio > plan["noise_warns_above"]]:
        limit = f"above {plan['noise_warns_above']:g}"
        print(f"  {' and '.join(noisy)}: {limit}; use another mode, a larger lr or more steps.")


def _print_eval_batching(batching: dict) -> None:
    parts = []
    if batching["validated"]:
        parts.append(f"validates {counted(batching['validated'], 'image')} at a time")
    if batching["prompts"]:
        device = {"gpu": "the GPU", "cpu": "the CPU (slower)"}[batching["decode_on"]]
        parts.append(f"samples {counted(batching['prompts'], 'prompt')} at a time, decoding on {device}")
    if parts:
        peak = f"{batching['most'] / GIB:.2f} GiB"
        print(fill(f"Between training steps, the run {' and '.join(parts)}: at most {peak}."))


def _print_graphs(plan: dict, chosen: dict) -> None:
    if chosen["no_graphs"]:
        print(fill(f"No CUDA graphs: {chosen['no_graphs']}."))
    else:
        assumed = ", which the rates assume wherever graphs fit" if plan["rates_known"] else ""
        print(f"Steps are replayed as CUDA graphs{assumed}.")


def _print_host(plan: dict, host: dict) -> None:
    parts = {
        "weights": host["weights"],
        "optimizer state": host["states"],
        "activations": host["activations"],
        "checkpoint": host["snapshot"],
        "autoencoder": host["autoencoder"],
    }
    training, available = sum(parts.values()), plan["host_available_bytes"]
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    print(f"Host memory (RAM) in addition to Python's own: {training / GIB:.2f} GiB in training")
    print(f"  ({listed}),")
    print(f"  {host['loading'] / GIB:.2f} GiB while loading.")
    if available is None:
        return
    print(f"  {available / GIB:.2f} GiB are available here.")
    if max(host["loading"], training) > available:
        print("  That is too little: the system may swap or kill the run.")
