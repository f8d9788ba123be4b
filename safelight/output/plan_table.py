"""Prints a memory plan within 80 columns: a row for each way to train, best first, and a column for each batch size."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safelight.data.text import counted
from safelight.output.columns import fill
from safelight.units import GIB

# terminals with this many columns get wider padding
WIDE = 100


def _key(way: dict) -> tuple:
    return way["memory"], way["checkpointing"], "yes" if way["fused_backward"] else "no"


def _cell(way: dict, is_chosen: bool) -> Text:
    rate = way["images_per_s"]
    rate = "" if rate is None else f" {rate:4.2f}" if rate < 10 else f" {rate:4.3g}" if rate < 999 else f" {rate:4.0f}"
    text = f"{way['needed'] / GIB:.2f}{rate}"
    if is_chosen:
        return Text(f"> {text}", style="bold green")
    return Text(text) if way["fits"] else Text(f"x {text}", style="dim")


def print_ways(result: dict) -> None:
    """Print GiB and images/s of each way to train, mark the chosen one, and break its memory down."""
    plan, console = result["plan"], Console(highlight=False, emoji=False)
    height, width = plan["latents"]
    budget = plan["budget_bytes"] / GIB
    title = f"{result['base']}, {result['unet_parameters']:,} parameters, {plan['precision']}, {result['optimizer']}"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(
        f"{plan['card']}: {budget:.2f} GiB available; latents up to {height} x {width}", markup=False, soft_wrap=True
    )
    ways = plan["ways"]
    sizes = sorted({way["batch_size"] for way in ways})
    table = Table(box=None, pad_edge=False, padding=(0, 1 if console.width < WIDE else 3, 0, 0), header_style="dim")
    for name in ("memory", "checkpoints", "fused"):
        table.add_column(name, no_wrap=True)
    for size in sizes:
        table.add_column(f"batch {size}", justify="right", no_wrap=True)
    chosen = plan["chosen"]
    place = chosen and (*_key(chosen), chosen["batch_size"])
    for key in dict.fromkeys(map(_key, ways)):
        row = {way["batch_size"]: way for way in ways if _key(way) == key}
        table.add_row(*key, *(_cell(row[size], (*key, size) == place) for size in sizes))
    console.print(table)
    figures = "GPU memory in GiB and images/s" if plan["rates_known"] else "GPU memory in GiB"
    choice = "; > is chosen: the first row that fits" if chosen else ""
    print(fill(f"{figures}, estimated; fused: optimizer step inside backward; x does not fit{choice}."))
    _print_noise(plan, {way["memory"] for way in ways})
    if chosen is None:
        return
    kinds = {kind: size for kind, size in chosen["kinds"].items() if size >= GIB / 200}
    console.print(f"> {chosen['needed'] / GIB:.2f} GiB; at the peak of a step, GiB:", markup=False, soft_wrap=True)
    parts = Table(box=None, pad_edge=False, show_header=False)
    for kind, size in kinds.items():
        parts.add_row(f"  {kind}", f"{size / GIB:.2f}")
    console.print(parts)
    if chosen["others"] > chosen["held"] + chosen["step"]:
        print("Loading, validation or sampling needs more than a step, even one image at a time.")
    _print_between(chosen["between"])
    _print_graphs(plan, chosen)
    _print_host(plan, chosen["host"])
    if chosen["images_per_s"]:
        images = result["dataset"]["images trained"] if "dataset" in result else 1000
        took = duration(images / chosen["images_per_s"])
        print(f"{counted(images, 'image')}: about {took} of training, plus samples and validation.")


def duration(seconds: float) -> str:
    """Return a time span in its largest unit: 41 s, 12 min, 3.2 hours, 2.4 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{max(seconds, 1) / unit:.{1 if name == 'hours' else 0}f} {name}"
    return f"{seconds / 86400:.1f} days"


def _print_noise(plan: dict, modes: set[str]) -> None:
    """Print the rounding noise of the memory modes in the table, for a run of this length."""
    noise = {mode: ratio for mode, ratio in plan["noise"].items() if mode in modes}
    if not noise:
        return
    ratios = ", ".join(f"{mode} {ratio:.2g}" for mode, ratio in noise.items())
    steps = f"{plan['noise_steps']:,}" + (" (assumed)" if plan["noise_steps_assumed"] else "")
    print(f"Rounding noise relative to the weights' change in {steps} steps:")
    print(f"  {ratios}; exact and paged have none.")
    if loud := [mode for mode, ratio in noise.items() if ratio > plan["noise_warns_above"]]:
        print(
            f"  {' and '.join(loud)}: above {plan['noise_warns_above']:g}; use a finer mode, a larger lr or more steps."
        )


def _print_between(between: dict) -> None:
    batches = []
    if between["validated"]:
        batches.append(f"{counted(between['validated'], 'image')} validated")
    if between["prompts"]:
        where = {"gpu": "the GPU", "cpu": "the CPU (slower, same values)"}[between["decode_on"]]
        batches.append(f"{counted(between['prompts'], 'prompt')} sampled at a time")
        print(f"Samples are decoded on {where}.")
    if batches:
        print(fill(f"Between steps: {', '.join(batches)}: {between['most'] / GIB:.2f} GiB at most."))


def _print_graphs(plan: dict, chosen: dict) -> None:
    if chosen["no_graphs"]:
        print(f"No CUDA graphs: {chosen['no_graphs']}.")
    else:
        print(
            "Steps are replayed as CUDA graphs"
            + (", which the rates assume wherever graphs fit." if plan["rates_known"] else ".")
        )


def _print_host(plan: dict, host: dict) -> None:
    training = {
        "optimizer state": host["states"],
        "activations": host["activations"],
        "a checkpoint's snapshot": host["snapshot"],
        "autoencoder": host["autoencoder"],
    }
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in training.items() if size)
    print(f"Host memory in addition to Python's own: {sum(training.values()) / GIB:.2f} GiB:")
    print(f"  {parts};")
    line = f"  while loading {host['loading'] / GIB:.2f} GiB."
    if plan["host_available_bytes"] is not None:
        line += f" {plan['host_available_bytes'] / GIB:.2f} GiB are available here."
    print(line)
    if (
        plan["host_available_bytes"] is not None
        and max(host["loading"], sum(training.values())) > plan["host_available_bytes"]
    ):
        print("  That is more than is available: the run may be killed, or swap.")
