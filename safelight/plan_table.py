"""A plan as a table for the terminal: memory modes and checkpointing down, batch sizes across, within 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIB = 2**30


def _key(way: dict) -> tuple:
    return way["memory"], way["checkpointing"]


def _cell(way: dict, is_chosen: bool) -> Text:
    rate = "" if way["images_per_s"] is None else f" {way['images_per_s']:5.3g}"
    text = f"{way['needed'] / GIB:.2f}{rate}"
    if is_chosen:
        return Text(f"> {text}", style="bold green")
    return Text(text) if way["fits"] else Text(f"x {text}", style="dim")


def print_ways(result: dict) -> None:
    """Print the ways to train, GiB and images/s each, the chosen one marked, and what the chosen one is made of."""
    plan, console = result["plan"], Console(highlight=False, emoji=False)
    height, width = plan["latents"]
    budget = plan["budget_bytes"] / GIB
    title = f"{result['base']}, {result['unet_parameters']:,} parameters, {plan['precision']}, {result['optimizer']}"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(f"{plan['card']}: {budget:.2f} GiB; latents up to {height} x {width}", markup=False, soft_wrap=True)
    ways = plan["ways"]
    sizes = sorted({way["batch_size"] for way in ways})
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("memory", "checkpointing"):
        table.add_column(name)
    for size in sizes:
        table.add_column(f"batch {size}", justify="right", no_wrap=True)
    chosen = plan["chosen"]
    place = chosen and (*_key(chosen), chosen["batch_size"])
    for key in dict.fromkeys(map(_key, ways)):
        row = {way["batch_size"]: way for way in ways if _key(way) == key}
        table.add_row(*key, *(_cell(row[size], (*key, size) == place) for size in sizes))
    console.print(table)
    rates = "GiB of the card, and images/s" if plan["rates_known"] else "GiB of the card"
    print(f"{rates}, estimated; x does not fit" + ("; > is taken." if chosen else "."))
    if chosen is None:
        return
    kinds = {kind: size for kind, size in chosen["kinds"].items() if size >= GIB / 200}
    console.print(f"> {chosen['needed'] / GIB:.2f} GiB; at the peak of a step, GiB:", markup=False, soft_wrap=True)
    parts = Table(box=None, pad_edge=False, show_header=False)
    for kind, size in kinds.items():
        parts.add_row(f"  {kind}", f"{size / GIB:.2f}")
    console.print(parts)
    if chosen["others"] > chosen["held"] + chosen["step"]:
        print(f"Drawing samples or validating needs more than a step: {chosen['others'] / GIB:.2f} GiB.")
    if "dataset" in result and chosen["images_per_s"]:
        images = result["dataset"]["images trained"]
        hours = images / chosen["images_per_s"] / 3600
        print(f"{images:,} images take about {hours:.1f} hours of training, samples and validation not counted.")
