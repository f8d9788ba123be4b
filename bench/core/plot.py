"""`safelight bench plot`: draw result lines as pictures.

throughput, memory and scaling show timed steps; ablation shows counted ones; rounding shows the error of 16-bit
weights; roofline shows a step's time by operator class against the device's ceilings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from safelight.bench.core.results import labels, newest
from safelight.errors import UserError

# inches; enlarged for many bars
WIDTH, HEIGHT = 7.5, 4.0
MAX_SIDE = 200
CARDS_GIB = (4, 6, 8, 12, 16, 24)
COLOURS = {
    "safelight": "#c2410c",
    "safelight-unpatched": "#fdba74",
    "safelight-fused": "#9a3412",
    "safelight-graphs": "#f59e0b",
    "safelight-fused-graphs": "#78350f",
    "safelight-cudnn-benchmark": "#fb923c",
    "safelight-lora": "#be185d",
    "safelight-lora-nf4": "#f9a8d4",
    "diffusers": "#334155",
    "diffusers-compiled": "#64748b",
    "diffusers-16bit": "#94a3b8",
    "everydream": "#a3e635",
    "kohya": "#0891b2",
    "kohya-fused": "#67e8f9",
    "mlperf": "#7c3aed",
}
STEPS = ("step", "quick")
# (precision, layout, patched) of each bar of the ablation; each changes one thing from the previous bar
ABLATION = (
    (("autocast-bf16", "nchw", False), "fp32 weights\n+ autocast"),
    (("bf16", "nchw", False), "16-bit weights,\nno autocast"),
    (("bf16", "channels_last", False), "channels-last"),
    (("bf16", "channels_last", True), "our kernels"),
)


# config keys that have an axis or colour of their own, or do not affect the step
_NOT_SETTINGS = ("recipe", "batch_size", "repeats", "device")

Settings = tuple[tuple[str, str], ...]


def _settings(record: dict) -> Settings:
    """Return the settings a line was measured with, without recipe and batch size."""
    config = {name: str(value) for name, value in record["config"].items() if name not in _NOT_SETTINGS}
    return (*sorted(config.items()), ("device", record["machine"]["device"]))


def _labels(lines: list[dict]) -> dict[Settings, str]:
    """Return a label for each combination of settings in the lines: the values in which it differs from the others."""
    combinations = list(dict.fromkeys(map(_settings, lines)))
    return dict(zip(combinations, labels(list(map(dict, combinations))), strict=True))


def _timed(records: list[dict]) -> list[dict]:
    """Return the newest timed step of each recipe, batch size and settings, whichever command measured it."""
    lines = {
        (r["config"]["batch_size"], list(COLOURS).index(r["config"]["recipe"]), _settings(r)): r
        for r in sorted(newest(records).values(), key=lambda r: r.get("date", ""))
        if r["bench"] in STEPS and "images_per_s" in r["figures"] and r["config"]["recipe"] in COLOURS
    }
    return [lines[key] for key in sorted(lines)]


def _place(records: list[dict]) -> str:
    """Return the models and devices that the lines were measured with, for a title."""
    devices = {r["machine"]["device"] for r in records}
    bases = {
        f"{r['config']['base']}, {r['config']['latent_size']}x{r['config']['latent_size']} latents" for r in records
    }
    return f"{'; '.join(sorted(bases))} on {', '.join(sorted(devices))}"


def throughput(axes: Axes, records: list[dict]) -> bool:
    """Draw images/s (p50, whiskers p20 to p80) by batch size and recipe; return whether there was anything to draw."""
    lines = _timed(records)
    labels = _labels(lines)
    ticks: dict[tuple, list[dict]] = {}
    for line in lines:
        ticks.setdefault((line["config"]["batch_size"], _settings(line)), []).append(line)
    width = 0.8 / max(map(len, ticks.values()), default=1)
    for tick, bars in enumerate(ticks.values()):
        for index, line in enumerate(bars):
            low, middle, high = line["figures"]["images_per_s"]
            x = tick + (index - (len(bars) - 1) / 2) * width
            axes.bar(x, middle, width * 0.92, color=COLOURS[line["config"]["recipe"]])
            axes.errorbar(x, middle, [[middle - low], [high - middle]], color="black", capsize=3, linewidth=1)
            axes.annotate(f"{middle:.3g}", (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    tick_labels = [f"batch {size}\n{labels[settings]}".strip().replace(", ", "\n") for size, settings in ticks]
    axes.set_xticks(range(len(ticks)), tick_labels)
    # wide enough for the number above each bar and the label below each tick
    axes.figure.set_figwidth(max(WIDTH, 0.9 * len(ticks), 0.4 * len(ticks) * max(map(len, ticks.values()), default=1)))
    axes.set_xlim(-0.6, max(len(ticks), 1) - 0.4)
    axes.set_ylabel("images/s (p50, whiskers p20 to p80)")
    _legend(axes, [name for name in COLOURS if any(r["config"]["recipe"] == name for r in lines)])
    axes.set_title(f"Training step: {_place(lines)}" if lines else "", fontsize=10)
    return bool(lines)


def _legend(axes: Axes, recipes: list[str]) -> None:
    axes.legend(handles=[Patch(color=COLOURS[name], label=name) for name in recipes], frameon=False, fontsize=9)


def memory(axes: Axes, records: list[dict]) -> bool:
    """Draw the peak GPU memory of each variant with the sizes of common cards; return whether there was any."""
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
    labels = _labels(lines)
    names = [(r["config"]["recipe"], f"batch {r['config']['batch_size']}", labels[_settings(r)]) for r in lines]
    axes.set_yticks(range(len(lines)), [", ".join(filter(None, name)) for name in names])
    axes.set_xlabel("peak reserved memory, GiB (without the CUDA context)")
    axes.set_title(f"Memory of a training step: {_place(lines)}" if lines else "", fontsize=10, pad=16)
    return bool(lines)


def ablation(axes: Axes, records: list[dict]) -> bool:
    """Draw how much each change reduces the memory-bound bytes of a counted step; return whether there were two."""
    lines = {
        (r["config"]["precision"], r["config"]["layout"], r["config"].get("patched", False)): r
        for r in newest(records).values()
        if r["bench"] == "count"
        and r["config"]["base"] == "random:sd15"
        and r["config"]["checkpointing"] == "none"
        and r["config"]["batch_size"] == 1
    }
    bars = [(lines[key], label) for key, label in ABLATION if key in lines]
    before = None
    for x, (line, _) in enumerate(bars):
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
    axes.set_xticks(range(len(bars)), [label for _, label in bars])
    axes.set_ylabel("memory-bound GB moved (counted)")
    axes.set_title("Forward and backward pass of SD1.5, batch 1, 64x64 latents", fontsize=10)
    return len(bars) > 1


def scaling(axes: Axes, records: list[dict]) -> bool:
    """Draw images/s over batch size, one line per recipe; return whether any recipe has two sizes."""
    lines, drawn = _timed(records), False
    labels = _labels(lines)
    styles = dict(zip(labels, ("-", "--", ":", "-."), strict=False))
    for recipe, colour in COLOURS.items():
        for settings, label in labels.items():
            points = [
                (r["config"]["batch_size"], *r["figures"]["images_per_s"])
                for r in lines
                if r["config"]["recipe"] == recipe and _settings(r) == settings
            ]
            if len(points) < 2:
                continue
            sizes, low, middle, high = zip(*points, strict=True)
            name = ", ".join(filter(None, (recipe, label)))
            axes.plot(sizes, middle, "o", linestyle=styles.get(settings, "-"), color=colour, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15)
            drawn = True
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images/s (p50, band p20 to p80)")
    if drawn:
        axes.legend(frameon=False, fontsize=9)
        axes.set_title(f"Throughput by batch size: {_place(lines)}", fontsize=10)
    return drawn


ROOFLINE = {"limit": "#c2410c", "measured": "#cbd5e1", "outside operators": "#fdba74"}
# memory mode, or plain bf16 without masters
ROUNDING = {"plain bf16": "#64748b", "rounded": "#fdba74", "near": "#fb923c", "exact": "#c2410c"}


def rounding(axes: Axes, records: list[dict]) -> bool:
    """Draw the weight error of each memory mode relative to fp32 training; return whether there was any."""
    lines = [r for r in newest(records).values() if r["bench"] == "rounding"]
    for x, line in enumerate(lines):
        for number, (mode, colour) in enumerate(ROUNDING.items()):
            figures = line["figures"][mode]
            error, bar_x = figures["noise_to_displacement"], x + 0.2 * (number - 1.5)
            axes.bar(bar_x, error, 0.18, color=colour, label=mode if x == 0 else None)
            label = f"{error:.2g}\n({100 * figures['changed_values']:.3g} %)"
            axes.annotate(label, (bar_x, error), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    labels = [f"{r['config']['weights']}, {r['config']['num_steps']} steps, lr {r['config']['lr']:g}" for r in lines]
    axes.set_xticks(range(len(lines)), labels)
    axes.set_ylabel("error relative to the distance trained")
    axes.margins(y=0.15)
    axes.set_title(
        "Error of bf16 weights against fp32 training (in brackets: share of values changed per step)", fontsize=10
    )
    if lines:
        axes.legend(frameon=False, fontsize=9)
    return bool(lines)


def roofline(axes: Axes, records: list[dict]) -> bool:
    """Draw the measured and the roofline's ms of a step by operator class; return whether there was a step.

    Takes the newest measured step, or else the newest counted one.
    """
    lines = [r for r in newest(records).values() if r["bench"] == "roofline"]
    if not lines:
        return False
    line = next((r for r in reversed(lines) if "step_ms" in r["figures"]), lines[-1])
    config, figures, is_measured = line["config"], line["figures"], "step_ms" in line["figures"]
    for y, row in enumerate(reversed(figures["classes"].values())):
        limit_ms = row.get("least_ms", 0.0)
        ms = row["ms"] if is_measured else limit_ms
        share = row.get("share_of_limit")
        label = f"{ms:.3g} ms" + ("" if share is None or not is_measured else f", {100 * share:.0f} %")
        axes.barh(y, ms, color=ROOFLINE["measured" if "least_ms" in row else "outside operators"])
        # a class can be faster than its roofline, which assumes no cache; the bar ends at the measured time
        axes.barh(y, min(limit_ms, ms), color=ROOFLINE["limit"])
        axes.annotate(label, (ms, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(figures["classes"])), [*reversed(figures["classes"])])
    axes.margins(x=0.18)
    workload = f"{config['base']}, batch {config['batch_size']}, {config['precision']}"
    if is_measured:
        use = 100 * figures["model_flop_use"]["share_of_limit"]
        axes.set_title(f"{workload} on {line['machine']['device']}: model FLOP utilization {use:.0f} %", fontsize=10)
        axes.set_xlabel("ms per step under the profiler (%: roofline time / measured time)")
        handles = [
            Patch(color=ROOFLINE["limit"], label="roofline time at this device's ceilings"),
            Patch(color=ROOFLINE["measured"], label="measured time"),
        ]
        if any("least_ms" not in row for row in figures["classes"].values()):
            handles.append(Patch(color=ROOFLINE["outside operators"], label="outside operators"))
        axes.legend(handles=handles, frameon=False, fontsize=9, loc="best")
    else:
        axes.set_title(f"{workload}: {figures['least_ms']:.3g} ms per step at the roofline (not measured)", fontsize=10)
        axes.set_xlabel(f"ms per step at the ceilings from {config.get('ceilings', 'this machine')}")
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
    """Write every picture that the lines have figures for; return (files, names of the skipped pictures)."""
    files, skipped = [], []
    # a $ in a name is no formula
    with rc_context({"text.parse_math": False}):
        for name, draw in PICTURES.items():
            figure = Figure(figsize=(WIDTH, HEIGHT), dpi=130, layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            if not draw(axes, records):
                skipped.append(name)
                continue
            if max(figure.get_size_inches()) > MAX_SIDE:
                raise UserError(f"{name}: too many results for one picture; give fewer files, or files of fewer lines")
            out.mkdir(parents=True, exist_ok=True)
            files.append(out / f"{name}.png")
            figure.savefig(files[-1])
    return files, skipped
