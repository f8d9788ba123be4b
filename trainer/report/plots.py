"""Draw the graphs of a run with matplotlib. svg.py turns them into SVG with the page's colours and fonts.

Large graphs are drawn twice, wide for a desktop and narrow for a phone; the page shows the one that fits. Legends are
HTML, so that they wrap. Every axis says what it measures.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from safelight.trainer.report.facts import evenly_chosen, format_epoch, smooth
from safelight.trainer.report.run_reader import MAX_STAGES, Metrics, Validation
from safelight.trainer.report.svg import PALETTE, new_figure

WIDE_PX = (880, 400)
NARROW_PX = (360, 310)
SMALL_PX = (400, 215)
MAX_DRAWN_POINTS = 1500
LOG_FROM_RATIO = 5
ROUND_STEPS = (1, 2, 2.5, 5, 10)
# (epoch, stage) for the start of every stage after the first
StageStarts = Sequence[tuple[float, int]]
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle in its SVG, in px, and the range of its x axis, for the values shown under the pointer."""

    left: float
    right: float
    top: float
    bottom: float
    first_epoch: float
    last_epoch: float


def smoothed_loss(metrics: Metrics) -> tuple[np.ndarray, int]:
    """Return the smoothed training loss and over how many points it is smoothed: about a twentieth of the run."""
    half_width = max(1, len(metrics.train["loss"]) // 80)
    # smoothed twice, which gives near neighbours more weight: a plain mean jumps when an outlier enters or leaves it
    return smooth(smooth(metrics.train["loss"], half_width), half_width), 4 * half_width + 1


def loss_graph(metrics: Metrics, best: Validation | None, starts: StageStarts, narrow: bool) -> tuple[Figure, Frame]:
    """Return the graph of training and validation loss over the epochs, and the frame of its plot."""
    figure = new_figure(*(NARROW_PX if narrow else WIDE_PX))
    axes = figure.add_subplot()
    epoch, raw = metrics.train["epoch"], metrics.train["loss"]
    smoothed, _ = smoothed_loss(metrics)
    held_out, subset = metrics.validation["held_out"], metrics.validation["train_subset"]
    some = evenly_chosen(len(epoch), MAX_DRAWN_POINTS)
    axes.plot(epoch[some], raw[some], color=PALETTE["faint"], linewidth=0.7)
    axes.plot(epoch[some], smoothed[some], color=PALETTE["muted"], linewidth=1.6)
    _plot_validation(axes, subset, PALETTE["amber"], narrow, linestyle=(0, (4, 2)))
    _plot_validation(axes, held_out, PALETTE["accent"], narrow)
    low, high, is_log = _loss_limits(smoothed, raw, [point.loss for point in (*held_out, *subset)])
    if is_log:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.set_ylim(low, high)
    _epoch_axis(axes, metrics, 4 if narrow else 9, with_steps=True)
    _mark_stages(axes, metrics, starts, named=True)
    if best is not None:
        _mark_best(axes, best, metrics.last_epoch)
    _style_axes(axes, "loss (mean squared error, log scale)" if is_log else "loss (mean squared error)")
    # Drawing computes the layout. It must not change afterwards, or the frame would no longer match the curves.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    box, (width, height) = axes.get_position(), figure.get_size_inches() * 72
    first, last = axes.get_xlim()
    frame = Frame(box.x0 * width, box.x1 * width, (1 - box.y1) * height, (1 - box.y0) * height, first, last)
    return figure, frame


def timestep_graph(held_out: Sequence[Validation], best: Validation, narrow: bool) -> Figure:
    """Return the graph of held-out loss by timestep band at the first, best and last validation, and of its change."""
    first, last = held_out[0], held_out[-1]
    size = (NARROW_PX[0], 480) if narrow else (WIDE_PX[0], 300)
    figure = new_figure(*size)
    if narrow:
        # keep the second title clear of the first plot's axis label
        figure.get_layout_engine().set(hspace=0.12)
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    bands = np.arange(len(first.loss_by_timestep))
    shown = [(first, "muted")] + [(best, "accent")] * (best.step != first.step)
    shown += [(last, "amber")] * (last.step not in (best.step, first.step))
    for point, color in shown:
        left.plot(bands, point.loss_by_timestep, color=PALETTE[color], marker="o", markersize=3.5, linewidth=1.6)
    values = np.array([point.loss_by_timestep for point, _ in shown])
    is_log = bool(np.all(values > 0) and values.max() > LOG_FROM_RATIO * values.min())
    if is_log:
        left.set_yscale("log")
        _plain_log_ticks(left)
    else:
        left.set_ylim(bottom=0)
    num_bars = max(1, len(shown) - 1)
    width = 0.7 / num_bars
    for index, (point, color) in enumerate(shown[1:]):
        with np.errstate(divide="ignore", invalid="ignore"):
            change = 100 * (np.array(point.loss_by_timestep) / values[0] - 1)
        offset = (index - (num_bars - 1) / 2) * width
        # grey marks bands that got worse; a bar's position still shows which validation it belongs to
        colors = [PALETTE["muted" if value > 0 else color] for value in change]
        right.bar(bands + offset, change, width=width * 0.92, color=colors, linewidth=0)
    right.axhline(0, color=PALETTE["muted"], linewidth=1)
    right.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−").replace("+0", "0")))
    for axes, title in (
        (left, f"held-out loss (mean squared error{', log scale' if is_log else ''})"),
        (right, "change from step 0 (%)"),
    ):
        axes.set_xticks(bands, band_names(len(bands), short=narrow or len(bands) > 5))
        axes.set_xlim(-0.6, len(bands) - 0.4)
        axes.set_xlabel("timestep band (% of the noise schedule)", color=PALETTE["muted"], fontsize=11)
        _style_axes(axes, title)
    return figure


def band_names(num_bands: int, short: bool = False) -> list[str]:
    """Return the range of each of num_bands equal parts of the noise schedule in per cent; 0 is the least noise.

    short: with more than five bands, return only their upper ends.
    """
    edges = [round(100 * i / num_bands) for i in range(num_bands + 1)]
    if short and num_bands > 5:
        return [str(high) for high in edges[1:]]
    return [f"{low}–{high}" for low, high in itertools.pairwise(edges)]


def small_graph(
    metrics: Metrics, starts: StageStarts, column: str, title: str, color: str, smoothing: int = 0
) -> Figure:
    """Return a graph of one column of the metrics over the epochs."""
    figure = new_figure(*SMALL_PX)
    axes = figure.add_subplot()
    epoch, values = metrics.train["epoch"], metrics.train[column]
    known = np.isfinite(values) & np.isfinite(epoch)
    epoch, values = epoch[known], values[known]
    values, title = _power_into_title(values, title)
    some = evenly_chosen(len(epoch), MAX_DRAWN_POINTS)
    if smoothing:
        axes.plot(epoch[some], values[some], color=PALETTE["faint"], linewidth=0.7)
        values_drawn = smooth(values, smoothing)
        top = float(np.nanquantile(values, 0.995))
        axes.set_ylim(0, 1.15 * max(top, float(np.nanmax(values_drawn))) or 1)
    else:
        values_drawn = values
        axes.set_ylim(0, 1.15 * float(np.max(values)) or 1)
    axes.plot(epoch[some], values_drawn[some], color=PALETTE[color], linewidth=1.6)
    _finish_small(axes, metrics, starts, title)
    return figure


def learning_rate_graph(
    metrics: Metrics, starts: StageStarts, exact: tuple[np.ndarray, np.ndarray] | None, title: str
) -> Figure:
    """Return the graph of the learning rate over the epochs.

    exact: epochs and learning rates from `learning_rates`. If None, the logged values are drawn, a line per stage.
    """
    figure = new_figure(*SMALL_PX)
    axes = figure.add_subplot()
    if exact is None:
        epoch, values, stage = (metrics.train[column] for column in ("epoch", "lr", "stage"))
        known = np.isfinite(values) & np.isfinite(epoch)
        epoch, values, stage = epoch[known], values[known], stage[known]
    else:
        # a step's learning rate applies from the end of the step before, so the curve starts at epoch 0
        epoch, values = np.concatenate([[0.0], exact[0]]), np.concatenate([exact[1][:1], exact[1]])
    values, title = _power_into_title(values, title)
    axes.set_ylim(0, 1.15 * float(np.max(values)) or 1)
    if exact is None:
        edges = np.flatnonzero(np.diff(stage) != 0) + 1
        if len(edges) > MAX_STAGES:
            # no run changes its stage so often
            edges = edges[:0]
        for part in np.split(np.arange(len(epoch)), edges):
            some = part[evenly_chosen(len(part), MAX_DRAWN_POINTS)]
            dot = "o" if len(some) == 1 else None
            axes.plot(epoch[some], values[some], color=PALETTE["accent"], linewidth=1.6, marker=dot, markersize=3)
    else:
        axes.plot(epoch, values, color=PALETTE["accent"], linewidth=1.6, drawstyle="steps-pre")
    _finish_small(axes, metrics, starts, title)
    return figure


def _power_into_title(values: np.ndarray, title: str) -> tuple[np.ndarray, str]:
    """Return (values, title), with a power of ten moved from small values into the title."""
    largest = float(np.max(np.abs(values)))
    if not 1e-30 < largest < 1e-2:
        return values, title
    power = int(np.floor(np.log10(1.01 * largest)))
    return values / 10.0**power, f"{title} (×10{str(power).translate(SUPERSCRIPTS)})"


def _finish_small(axes: Axes, metrics: Metrics, starts: StageStarts, title: str) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS))
    _epoch_axis(axes, metrics, 6, with_steps=False)
    _mark_stages(axes, metrics, starts, named=False)
    _style_axes(axes, title)


def _plot_validation(axes: Axes, points: Sequence[Validation], color: str, narrow: bool, **style: object) -> None:
    axes.plot(
        [point.epoch for point in points],
        [point.loss for point in points],
        color=color,
        linewidth=2,
        marker="o",
        markersize=2.4 if narrow else 3.4,
        markeredgewidth=0,
        **style,
    )


def _loss_limits(smoothed: np.ndarray, raw: np.ndarray, validation: list[float]) -> tuple[float, float, bool]:
    """Return (lower limit, upper limit, whether the axis is logarithmic).

    The limits fit the smoothed and validation curves; raw values vary far more widely and may lie outside.
    """
    curves = np.concatenate([smoothed, np.array(validation, dtype=np.float64)])
    curves = curves[np.isfinite(curves)]
    if not len(curves):
        return 0.0, 1.0, False
    low, high = float(curves.min()), float(curves.max())
    if low > 0 and high > LOG_FROM_RATIO * low:
        # Training from scratch lowers the loss by an order of magnitude: on a linear axis its end would look flat.
        return low * 0.85, high * 1.6, True
    known = raw[np.isfinite(raw)]
    spread = float(np.quantile(known, 0.9) - np.quantile(known, 0.1)) if len(known) else 0.0
    margin = max(0.25 * (high - low), 0.15 * spread, 0.02 * high, 1e-6)
    # more room at the top, for the stage labels
    return max(0.0, low - 0.6 * margin), high + 1.4 * margin, False


def _plain_log_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(FixedLocator([m * 10.0**k for k in range(-6, 4) for m in (1, 2, 5)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_best(axes: Axes, best: Validation, last_epoch: float) -> None:
    axes.plot(
        [best.epoch],
        [best.loss],
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=PALETTE["ink"],
        markeredgewidth=1.6,
        linestyle="none",
        zorder=5,
    )
    share = best.epoch / last_epoch if last_epoch else 0
    align = "left" if share < 0.15 else "right" if share > 0.85 else "center"
    axes.annotate(
        f"best: epoch {format_epoch(best.epoch)}" if best.step else "best: step 0",
        (best.epoch, best.loss),
        xytext=({"left": -6, "right": 6, "center": 0}[align], 11),
        textcoords="offset points",
        ha=align,
        va="bottom",
        fontsize=12,
        fontweight="bold",
        color=PALETTE["ink"],
    )


def _mark_stages(axes: Axes, metrics: Metrics, starts: StageStarts, named: bool) -> None:
    for epoch, _ in starts:
        axes.axvline(epoch, color=PALETTE["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=0.5)
    if not named or not starts:
        return
    edges = [0.0, *(epoch for epoch, _ in starts), metrics.last_epoch]
    names = [1, *(stage + 1 for _, stage in starts)]
    first, last = axes.get_xlim()
    for low, high, name in zip(edges, edges[1:], names, strict=False):
        # a stage too narrow for its label gets none, so that labels never overlap
        if (high - low) / (last - first) > 0.09:
            text = f"stage {name}" if (high - low) / (last - first) > 0.17 else str(name)
            axes.text(
                (low + high) / 2,
                0.975,
                text,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=11,
                color=PALETTE["muted"],
            )


def _epoch_axis(axes: Axes, metrics: Metrics, num_ticks: int, with_steps: bool) -> None:
    last = metrics.last_epoch or 1.0
    axes.set_xlim(-0.015 * last, 1.015 * last)
    ticks = [
        tick for tick in MaxNLocator(num_ticks, steps=ROUND_STEPS).tick_values(0, last) if 0 <= tick <= last * 1.001
    ]
    steps = _steps_at(metrics, ticks) if with_steps else None
    labels = [f"{tick:g}" for tick in ticks]
    if steps is not None:
        labels = [f"{label}\n{step:,.0f}" for label, step in zip(labels, steps, strict=True)]
    axes.set_xticks(ticks, labels)
    name = "epoch (step number below)" if steps is not None else "epoch"
    axes.set_xlabel(name, color=PALETTE["muted"], fontsize=11)


def _steps_at(metrics: Metrics, epochs: list[float]) -> np.ndarray | None:
    known = {(point.epoch, point.step) for points in metrics.validation.values() for point in points}
    known |= set(zip(metrics.train["epoch"].tolist(), metrics.train["step"].tolist(), strict=True))
    pairs = sorted(pair for pair in known | {(0.0, 0)} if np.isfinite(pair[0]))
    return np.interp(epochs, [epoch for epoch, _ in pairs], [step for _, step in pairs]) if len(pairs) > 1 else None


def _style_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=PALETTE["ink"], pad=9)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALETTE["muted"])
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=PALETTE["muted"], pad=5)
