"""`safelight bench plot`: pictures of result lines: throughput bars, memory against cards, the ablation, scaling lines,
what rounding costs, a step against its roofline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from safelight.bench.core.results import newest

# inches; a picture of many bars is larger
WIDTH, HEIGHT = 7.5, 4.0
CARDS_GIB = (4, 6, 8, 12, 16, 24)
COLOURS = {
    "safelight": "#c2410c",
    "safelight-unpatched": "#fdba74",
    "safelight-fused": "#9a3412",
    "safelight-graphs": "#f59e0b",
    "safelight-fused-graphs": "#78350f",
    "safelight-cudnn-benchmark": "#fb923c",
    "diffusers": "#334155",
    "diffusers-compiled": "#64748b",
    "diffusers-16bit": "#94a3b8",
    "everydream": "#a3e635",
    "kohya": "#0891b2",
    "kohya-fused": "#67e8f9",
    "mlperf": "#7c3aed",
}
STEPS = ("step", "quick")
# the ablation's order: each adds one thing to the one before
ABLATION = (
    (("autocast-bf16", "nchw", False), "fp32 weights\n+ autocast"),
    (("bf16", "nchw", False), "16-bit weights,\nno autocast"),
    (("bf16", "channels_last", False), "channels-last"),
    (("bf16", "channels_last", True), "our kernels"),
)


# of a config, what is told apart by bars and ticks, or tells nothing of the step
_TOLD_OTHERWISE = ("recipe", "batch_size", "repeats", "device")


def _condition(record: dict) -> tuple[tuple[str, str], ...]:
    """Return with what a line was measured, its recipe and batch size left out."""
    config = {name: str(value) for name, value in record["config"].items() if name not in _TOLD_OTHERWISE}
    return (*sorted(config.items()), ("device", record["machine"]["device"]))


def _conditions(lines: list[dict]) -> dict[tuple, str]:
    """Return the conditions of lines, each with the words that tell it from the others: none if it is the only one."""
    found = dict.fromkeys(map(_condition, lines))
    return {
        condition: ", ".join(
            value if value not in ("True", "False") else name if value == "True" else f"no {name}"
            for name, value in condition
            if len({dict(other).get(name) for other in found}) > 1
        )
        for condition in found
    }


def _timed(records: list[dict]) -> list[dict]:
    """Return the lines of timed steps: of one recipe, batch size and condition the newest, whichever command measured it."""
    lines = {
        (r["config"]["batch_size"], list(COLOURS).index(r["config"]["recipe"]), _condition(r)): r
        for r in sorted(newest(records).values(), key=lambda r: r.get("date", ""))
        if r["bench"] in STEPS and "images_per_s" in r["figures"]
    }
    return [lines[key] for key in sorted(lines)]


def _place(records: list[dict]) -> str:
    """Return on what and with what the lines were measured."""
    devices = {r["machine"]["device"] for r in records}
    bases = {
        f"{r['config']['base']}, {r['config']['latent_size']}x{r['config']['latent_size']} latents" for r in records
    }
    return f"{'; '.join(sorted(bases))} on {', '.join(sorted(devices))}"


def throughput(axes: Axes, records: list[dict]) -> bool:
    """Draw images/s (p50, whiskers p20 to p80) by batch size and recipe; return whether there was anything."""
    lines = _timed(records)
    conditions = _conditions(lines)
    ticks: dict[tuple, list[dict]] = {}
    for line in lines:
        ticks.setdefault((line["config"]["batch_size"], _condition(line)), []).append(line)
    width = 0.8 / max(map(len, ticks.values()), default=1)
    for tick, members in enumerate(ticks.values()):
        for place, line in enumerate(members):
            low, middle, high = line["figures"]["images_per_s"]
            x = tick + (place - (len(members) - 1) / 2) * width
            axes.bar(x, middle, width * 0.92, color=COLOURS[line["config"]["recipe"]])
            axes.errorbar(x, middle, [[middle - low], [high - middle]], color="black", capsize=3, linewidth=1)
            axes.annotate(f"{middle:.3g}", (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    words = {condition: told.replace(", ", "\n") for condition, told in conditions.items()}
    axes.set_xticks(range(len(ticks)), [f"batch {size}\n{words[condition]}".strip() for size, condition in ticks])
    # a bar's width holds its number, a tick's its words
    axes.figure.set_figwidth(max(WIDTH, 0.9 * len(ticks), 0.4 * len(ticks) * max(map(len, ticks.values()), default=1)))
    axes.set_xlim(-0.6, max(len(ticks), 1) - 0.4)
    axes.set_ylabel("images/s (p50, whiskers p20 to p80)")
    _legend(axes, [name for name in COLOURS if any(r["config"]["recipe"] == name for r in lines)])
    axes.set_title(f"Training step: {_place(lines)}" if lines else "", fontsize=10)
    return bool(lines)


def _legend(axes: Axes, recipes: list[str]) -> None:
    axes.legend(handles=[Patch(color=COLOURS[name], label=name) for name in recipes], frameon=False, fontsize=9)


def memory(axes: Axes, records: list[dict]) -> bool:
    """Draw the GPU peak of each variant against the sizes of cards; return whether there was anything."""
    lines = [r for r in _timed(records) if r["figures"].get("peak_gib") is not None]
    for y, line in enumerate(lines):
        peak, recipe = line["figures"]["peak_gib"], line["config"]["recipe"]
        axes.barh(y, peak, color=COLOURS[recipe])
        axes.annotate(f"{peak:.1f}", (peak, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    highest = max((line["figures"]["peak_gib"] for line in lines), default=0)
    for card in (c for c in CARDS_GIB if c <= 1.5 * highest + 4):
        axes.axvline(card, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(f"{card} GiB", (card, len(lines) - 0.4), ha="center", fontsize=8, color="#555555")
    axes.figure.set_figheight(max(HEIGHT, 1.4 + 0.22 * len(lines)))
    conditions = _conditions(lines)
    labels = [(r["config"]["recipe"], f"batch {r['config']['batch_size']}", conditions[_condition(r)]) for r in lines]
    axes.set_yticks(range(len(lines)), [", ".join(filter(None, label)) for label in labels])
    axes.set_xlabel("peak reserved, GiB (the CUDA context comes on top)")
    axes.set_title(f"Memory: {_place(lines)}" if lines else "", fontsize=10, pad=16)
    return bool(lines)


def ablation(axes: Axes, records: list[dict]) -> bool:
    """Draw what each change takes off the memory-bound bytes of a counted step; return whether there were two."""
    lines = {
        (r["config"]["precision"], r["config"]["layout"], r["config"].get("patched", False)): r
        for r in newest(records).values()
        if r["bench"] == "count"
        and r["config"]["base"] == "random:sd15"
        and r["config"]["checkpointing"] == "none"
        and r["config"]["batch_size"] == 1
    }
    found = [(lines[key], label) for key, label in ABLATION if key in lines]
    before = None
    for x, (line, _) in enumerate(found):
        value, launches = line["figures"]["memory_bound_gb"], line["figures"]["launches"]
        axes.bar(x, value, 0.6, color="#334155")
        axes.annotate(
            f"{value:.1f} GB\n{launches:,} launches",
            (x, value / 2),
            ha="center",
            va="center",
            fontsize=9,
            color="white",
        )
        if before is not None:
            axes.bar(x, before - value, 0.6, bottom=value, color="#bbf7d0")
            axes.annotate(f"-{before - value:.1f} GB", (x, (before + value) / 2), ha="center", va="center", fontsize=9)
            axes.plot([x - 0.7, x + 0.3], [before, before], color="#777777", linewidth=1, linestyle=":")
        before = value
    axes.set_xticks(range(len(found)), [label for _, label in found])
    axes.set_ylabel("memory-bound GB a step, counted")
    axes.set_title("SD1.5, batch 1, 64x64 latents: loss and gradients", fontsize=10)
    return len(found) > 1


def scaling(axes: Axes, records: list[dict]) -> bool:
    """Draw images/s over batch size, a line a recipe; return whether any has two sizes."""
    lines, drawn = _timed(records), False
    conditions = _conditions(lines)
    styles = dict(zip(conditions, ("-", "--", ":", "-."), strict=False))
    for recipe, colour in COLOURS.items():
        for condition, words in conditions.items():
            points = [
                (r["config"]["batch_size"], *r["figures"]["images_per_s"])
                for r in lines
                if r["config"]["recipe"] == recipe and _condition(r) == condition
            ]
            if len(points) < 2:
                continue
            sizes, low, middle, high = zip(*points, strict=True)
            label = ", ".join(filter(None, (recipe, words)))
            axes.plot(sizes, middle, "o", linestyle=styles.get(condition, "-"), color=colour, label=label)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15)
            drawn = True
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images/s (p50, band p20 to p80)")
    if drawn:
        axes.legend(frameon=False, fontsize=9)
        axes.set_title(f"Scaling: {_place(lines)}", fontsize=10)
    return drawn


ROOFLINE = {"the least": "#c2410c", "measured": "#cbd5e1", "no operator's": "#fdba74"}
ROUNDING = {"plain bf16": "#64748b", "rounded": "#fdba74", "near": "#fb923c", "exact": "#c2410c"}


def rounding(axes: Axes, records: list[dict]) -> bool:
    """Draw how far each memory mode ends from the fp32 masters, against their way; return whether there was anything."""
    lines = [r for r in newest(records).values() if r["bench"] == "rounding"]
    for x, line in enumerate(lines):
        for number, (mode, colour) in enumerate(ROUNDING.items()):
            found = line["figures"][mode]
            noise, place = found["noise_to_displacement"], x + 0.2 * (number - 1.5)
            axes.bar(place, noise, 0.18, color=colour, label=mode if x == 0 else None)
            label = f"{noise:.2g}\n({100 * found['changed_values']:.3g} %)"
            axes.annotate(label, (place, noise), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    labels = [f"{r['config']['weights']}, {r['config']['num_steps']} steps, lr {r['config']['lr']:g}" for r in lines]
    axes.set_xticks(range(len(lines)), labels)
    axes.set_ylabel("distance to the fp32 masters\nover the way they went")
    axes.margins(y=0.15)
    axes.set_title(
        "bf16 weights: how far from fp32 masters they end (and the share of values that a step changes)", fontsize=10
    )
    if lines:
        axes.legend(frameon=False, fontsize=9)
    return bool(lines)


def roofline(axes: Axes, records: list[dict]) -> bool:
    """Draw the newest measured step, or else the newest counted one: ms by class, and in each the least that the ceilings allow.

    Returns whether there was one.
    """
    lines = [r for r in newest(records).values() if r["bench"] == "roofline"]
    if not lines:
        return False
    line = next((r for r in reversed(lines) if "step_ms" in r["figures"]), lines[-1])
    config, figures, is_measured = line["config"], line["figures"], "step_ms" in line["figures"]
    for y, row in enumerate(reversed(figures["classes"].values())):
        least = row.get("least_ms", 0.0)
        ms = row["ms"] if is_measured else least
        share = row.get("share_of_limit")
        label = f"{ms:.3g} ms" + ("" if share is None or not is_measured else f", {100 * share:.0f} %")
        axes.barh(y, ms, color=ROOFLINE["measured" if "least_ms" in row else "no operator's"])
        # where the roofline, from a machine's measured ceilings, is above the time, the bar is the time's
        axes.barh(y, min(least, ms), color=ROOFLINE["the least"])
        axes.annotate(label, (ms, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(figures["classes"])), [*reversed(figures["classes"])])
    axes.margins(x=0.18)
    place = f"{config['base']}, batch {config['batch_size']}, {config['precision']}"
    if is_measured:
        use = 100 * figures["model_flop_use"]["share_of_limit"]
        axes.set_title(f"{place} on {line['machine']['device']}: model-FLOP use {use:.0f} %", fontsize=10)
        axes.set_xlabel("ms of a step under the profiler; %: of its roofline")
        handles = [
            Patch(color=ROOFLINE["the least"], label="the least, at this device's ceilings"),
            Patch(color=ROOFLINE["measured"], label="measured"),
        ]
        if any("least_ms" not in row for row in figures["classes"].values()):
            handles.append(Patch(color=ROOFLINE["no operator's"], label="between operators"))
        axes.legend(handles=handles, frameon=False, fontsize=9, loc="best")
    else:
        axes.set_title(f"{place}: {figures['least_ms']:.3g} ms at the least; counted, not measured", fontsize=10)
        axes.set_xlabel(f"ms of a step at the least, by {config['ceilings']}")
    return True


PICTURES: dict[str, Callable[[Axes, list[dict]], bool]] = {
    "throughput": throughput,
    "memory": memory,
    "ablation": ablation,
    "scaling": scaling,
    "rounding": rounding,
    "roofline": roofline,
}


def plot(records: list[dict], out: Path) -> tuple[list[Path], list[str]]:
    """Write the pictures that the lines have figures for; return (files, names of those without)."""
    out.mkdir(parents=True, exist_ok=True)
    files, without = [], []
    for name, draw in PICTURES.items():
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=130, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        if draw(axes, records):
            files.append(out / f"{name}.png")
            figure.savefig(files[-1])
        else:
            without.append(name)
    return files, without
