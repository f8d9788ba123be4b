"""What several runs measured by the same metric and the same features, side by side with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.text import counted
from safelight.trainer.report.bars import Axis, interval_bar, show_number
from safelight.trainer.report.evaluation import Estimate, Evaluation, Metric
from safelight.trainer.report.markup import Markup, nothing_yet, shorten, table, tag
from safelight.trainer.report.measures import BETTER, FEW_PICTURES, difference_of, estimate_of
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder

NOT_YET = "Metrics with intervals are compared here once two of the runs have been measured:"


def measures_section(runs: Sequence[RunFolder], labels: Sequence[str]) -> Markup:
    """Return the metrics that two or more runs share: of each, base and the checkpoint that is put forward."""
    heading = tag("h2", "Measured")
    measured = [(run, label) for run, label in zip(runs, labels, strict=True) if run.evaluation]
    groups: dict[tuple[str, str], list[tuple[RunFolder, str, Metric]]] = {}
    for run, label in measured:
        for metric in run.evaluation.metrics:
            groups.setdefault((metric.id, metric.features), []).append((run, label, metric))
    shared = [group for group in groups.values() if len(group) > 1]
    if not shared:
        return tag("section", heading, nothing_yet(NOT_YET, "evaluate"), id="measures")
    alone = [f"{_named(group[0][2])} ({group[0][1]})" for group in groups.values() if len(group) == 1]
    return tag(
        "section",
        heading,
        _conditions(measured),
        [_metric(group) for group in shared],
        tag("p", f"Measured of one run only: {'; '.join(alone)}.", class_="note") if alone else None,
        id="measures",
    )


def _named(metric: Metric) -> str:
    by = f" by {shorten(metric.features, 80)}" if metric.features else ""
    return f"{shorten(metric.title, 80)}{by}"


def _conditions(measured: Sequence[tuple[RunFolder, str]]) -> Markup:
    """Return how the pictures were drawn, as a table where that differs between the runs."""
    columns = [_condition(run.evaluation) for run, _ in measured]
    intervals = "Intervals are bootstrap intervals at 95 %."
    differs = [name for name in columns[0] if len({column[name] for column in columns}) > 1]
    if not differs:
        same = ", ".join(f"{name} {value}" for name, value in columns[0].items())
        return tag("p", f"Measured alike in all runs: {same}. {intervals}", class_="note")
    rows = [[name, *(column[name] for column in columns)] for name in differs]
    text = (
        "These runs were not measured alike, so a difference between them may come from how they were measured. "
        f"{intervals}"
    )
    return tag(
        "div", tag("p", text), table(["", *(label for _, label in measured)], rows, class_="beside"), class_="alert"
    )


def _condition(evaluation: Evaluation) -> dict[str, str]:
    return {
        "prompts": f"{evaluation.num_prompts:,}",
        "photographs": f"{evaluation.num_real:,}",
        "size": f"{evaluation.width} × {evaluation.height} px",
        "steps": f"{evaluation.num_steps}",
        "cfg": f"{evaluation.cfg:g}",
        "sampler": shorten(evaluation.sampler, 40),
    }


def _metric(group: Sequence[tuple[RunFolder, str, Metric]]) -> Markup:
    metric = group[0][2]
    values: list[tuple[str, str, Estimate, Metric, bool]] = []
    for run, label, own in group:
        model = put_forward(run, [value.model for value in own.values if value.model.startswith("step-")])
        for wanted in (BASE, model):
            value = estimate_of(own, wanted) if wanted else None
            if value:
                values.append((label, name_of(run, wanted), value, own, wanted != BASE))
    axis = Axis.over(number for _, _, value, _, _ in values for number in (value.low, value.value, value.high))
    rows = [
        [
            tag("span", label, dir="auto"),
            tag("span", name, class_="put-forward" if is_trained else None),
            tag("strong", show_number(value.value)),
            interval_bar(axis, value.value, value.low, value.high, "accent" if is_trained else "muted"),
            f"{show_number(value.low)} to {show_number(value.high)}",
            _minus_base(own, value.model) if is_trained else "",
        ]
        for label, name, value, own, is_trained in values
    ]
    head = ["", "model", "value", "", "95 % interval", "minus its base, by prompt"]
    if not any(own.differences for _, _, own in group):
        head, rows = head[:-1], [row[:-1] for row in rows]
    trained = [(label, value) for label, _, value, _, is_trained in values if is_trained]
    about = " · ".join(
        filter(None, [BETTER.get(metric.better, ""), metric.features and f"by {shorten(metric.features, 120)}"])
    )
    return tag(
        "div",
        tag("h3", shorten(metric.title, 120)),
        tag("p", about, class_="note") if about else None,
        tag("p", shorten(metric.meaning, 600)),
        tag("p", _sentence(metric, trained)) if len(trained) > 1 and metric.better else None,
        tag("p", shorten(metric.warning, 600), class_="note warning") if metric.warning else None,
        table(head, rows, class_="figures measured"),
        class_="shared",
    )


def _minus_base(metric: Metric, model: str) -> str:
    difference = difference_of(metric, model)
    if difference is None:
        return ""
    interval = f"{show_number(difference.low, True)} to {show_number(difference.high, True)}"
    return f"{show_number(difference.value, True)} ({interval})"


def _sentence(metric: Metric, trained: Sequence[tuple[str, Estimate]]) -> str:
    """Return which run's checkpoint is best, and whether its interval says that of it."""
    sign = 1 if metric.better == "lower" else -1
    ordered = sorted(trained, key=lambda one: sign * one[1].value)
    (label, best), others = ordered[0], ordered[1:]
    near = [other for other, value in others if value.low <= best.high and best.low <= value.high]
    if len(near) == len(others):
        text = f"No run is clearly better: {label} has the best value, but its interval overlaps with all others'."
        text = text.replace("all others'", f"{near[0]}'s") if len(others) == 1 else text
    elif near:
        text = f"{label} has the best value; its interval overlaps with {_listed(near)}'s, and with no other."
    else:
        text = f"{label} is best: its interval lies apart from {'all others' if len(others) > 1 else others[0][0]}."
    fewest = min(value.num for _, value in trained)
    return (
        f"{text} From only {counted(fewest, 'picture')} a model, so read it with care."
        if fewest < FEW_PICTURES
        else text
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
