"""The losses and learning rates of several runs over each other, a curve a run that can be switched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safelight.trainer.report.chart import Curve, chart, figure_grid, is_wide, table_of
from safelight.trainer.report.course import learning_rates
from safelight.trainer.report.curves import smoothed
from safelight.trainer.report.facts import is_one_picture
from safelight.trainer.report.markup import Markup, empty_state, tag
from safelight.trainer.report.shown_runs import ShownRun, loss_caveat

# training loss is averaged over this part of the longest run: of every run over as many epochs
SMOOTHED_PART = 1 / 20


def overlaid_section(runs: Sequence[ShownRun]) -> Markup:
    """Return the curves of held-out loss, training loss, change from the base and learning rate."""
    longest = max(one.run.metrics.last_epoch for one in runs)
    window = SMOOTHED_PART * longest
    losses = [curve for one in runs if (curve := _held_out(one))]
    training = [curve for one in runs if (curve := _training(one, window))]
    changes = [curve for one in runs if (curve := _change(one))]
    rates = [curve for one in runs if (curve := _rate(one))]
    drawn = []
    if losses:
        caveat = loss_caveat(runs)
        drawn.append(_drawn("Held-out loss", "mean squared error", losses, note=caveat))
    if training:
        note = "Training draws new noise at every step, and its loss is weighted as the settings say."
        drawn.append(_drawn("Training loss", f"averaged over {window:.3g} epochs", training, note=note))
    small = []
    if changes:
        small.append(_drawn("Change of held-out loss", "% from the base", changes, unit="%", is_small=True))
    if rates:
        small.append(_drawn("Learning rate", "", rates, is_small=True, from_zero=True))
    body = [*drawn, figure_grid(*small) if small else None] if drawn or small else empty_state("No step was logged.")
    return tag("section", tag("h2", "Loss"), body, id="loss")


def _drawn(title: str, detail: str, curves: list[Curve], *, is_small: bool = False, **options) -> Markup:
    return chart(
        title,
        curves,
        table_of(curves, title=title.lower()),
        detail=detail,
        label=f"{title} of each run over the epochs",
        is_small=is_small,
        is_log=not is_small and is_wide([value for curve in curves for value in curve.y]),
        **options,
    )


def _held_out(one: ShownRun) -> Curve | None:
    points = one.run.metrics.validation["held_out"]
    if not points:
        return None
    look = "dashed" if one.is_dashed else "dots"
    return Curve(one.label, [point.epoch for point in points], [point.loss for point in points], one.color, look)


def _change(one: ShownRun) -> Curve | None:
    """Return held-out loss in per cent of the base's, None if that says nothing."""
    points = one.run.metrics.validation["held_out"]
    if len(points) < 2 or points[0].step or not points[0].loss > 0 or is_one_picture(points):
        return None
    relative = [100 * (point.loss / points[0].loss - 1) for point in points]
    return Curve(
        one.label, [point.epoch for point in points], relative, one.color, "dashed" if one.is_dashed else "dots"
    )


def _training(one: ShownRun, window: float) -> Curve | None:
    """Return training loss, averaged over about `window` epochs."""
    metrics = one.run.metrics
    num_an_epoch = len(metrics.train["loss"]) / metrics.last_epoch if metrics.last_epoch > 0 else 0.0
    means = smoothed(metrics, "loss", "", one.color, max(1, round(window * num_an_epoch / 4)))
    if not means:
        return None
    return Curve(one.label, means[0].x, means[0].y, one.color, "dashed" if one.is_dashed else "line")


def _rate(one: ShownRun) -> Curve | None:
    train, exact = one.run.metrics.train, learning_rates(one.run)
    epochs, rates = (train["epoch"], train["lr"]) if exact is None else exact
    known = np.isfinite(epochs) & np.isfinite(rates)
    if not known.any():
        return None
    look = "dashed" if one.is_dashed else "steps" if exact is not None else "line"
    return Curve(one.label, epochs[known].tolist(), rates[known].tolist(), one.color, look)
