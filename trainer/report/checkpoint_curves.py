"""Every metric over the checkpoints, beside held-out loss."""

from __future__ import annotations

from safelight.trainer.report.chart import Curve, chart, figure_grid, table_of
from safelight.trainer.report.evaluation import Evaluation, Metric
from safelight.trainer.report.markup import Markup, shorten, tag
from safelight.trainer.report.models import epochs_of
from safelight.trainer.report.run_reader import RunFolder
from safelight.trainer.report.verdicts import repeated_metrics, which_is_better

TITLE = "Every checkpoint in figures"
MAX_CHARTS, MIN_POINTS = 12, 3


def checkpoints_section(run: RunFolder) -> Markup | None:
    """Return a chart for held-out loss and for each metric; None if fewer than three models were measured."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    epochs = epochs_of(run)
    repeated = repeated_metrics(evaluation.metrics)
    metrics = [metric for metric in evaluation.metrics if metric not in repeated][:MAX_CHARTS]
    charts = [made for metric in metrics if (made := _chart(metric, epochs))]
    if not charts:
        return None
    if losses := _losses(evaluation):
        charts.insert(0, losses)
    note = "Whiskers are 95 % intervals; the dashed line is what real photographs reach among themselves."
    heading = tag("h2", TITLE)
    return tag("section", heading, tag("p", note, class_="note"), figure_grid(*charts), id="checkpoints")


def _losses(evaluation: Evaluation) -> Markup | None:
    known = sorted((m.epoch, m.held_out_loss) for m in evaluation.models if m.held_out_loss is not None)
    if len(known) < MIN_POINTS:
        return None
    curve = Curve("held-out loss", [epoch for epoch, _ in known], [loss for _, loss in known], "accent", "dots")
    return chart(
        "Held-out loss",
        [curve],
        table_of([curve], title="held-out loss of the checkpoints"),
        detail="lower is better",
        is_small=True,
    )


def _chart(metric: Metric, epochs: dict[str, float]) -> Markup | None:
    known = sorted(
        ((epochs[value.model], value) for value in metric.values if value.model in epochs), key=lambda pair: pair[0]
    )
    if len(known) < MIN_POINTS:
        return None
    x = [epoch for epoch, _ in known]
    values = [value for _, value in known]
    curves = [
        Curve(
            shorten(metric.title, 60),
            x,
            [value.value for value in values],
            "accent",
            "dots",
            low=[value.low for value in values],
            high=[value.high for value in values],
        )
    ]
    if metric.real:
        curves.append(Curve("real photographs", [x[0], x[-1]], [metric.real.value] * 2, "amber", "dashed"))
    title = shorten(metric.title, 60)
    numbers = table_of(curves, title=f"{title} of the checkpoints")
    return chart(title, curves, numbers, detail=which_is_better(metric), is_small=True)
