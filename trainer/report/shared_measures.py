"""What several runs measured by the same metric and the same features, side by side with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.text import counted
from safelight.trainer.report.bars import Axis, interval_bar
from safelight.trainer.report.evaluation import OWN_AUTOENCODER, Estimate, Metric
from safelight.trainer.report.figures import Form, form_of_estimates
from safelight.trainer.report.markup import Markup, nothing_yet, shorten, table, tag
from safelight.trainer.report.measures import FEW_PICTURES
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.records import BASE
from safelight.trainer.report.shown_runs import ShownRun, hold_out_others
from safelight.trainer.report.verdicts import difference_of, estimate_of, repeated_metrics, which_is_better

OTHER_PHOTOGRAPHS, OTHER_DATASET, UNKNOWN_DATASET = "held-out photographs", "other dataset", "unknown dataset"
NONE_SHARED = (
    "These runs were measured, but by no features that they share: each run's own autoencoder is another measure. "
    "Evaluate them with the same features to compare them."
)
NOT_YET = "Metrics with intervals are compared here once two of the runs have been measured:"


def measures_section(runs: Sequence[ShownRun]) -> Markup:
    """Return the metrics that two or more runs share: of each, base and the checkpoint that is put forward."""
    heading = tag("h2", "Measured")
    measured = [one for one in runs if one.run.evaluation]
    groups: dict[tuple[str, ...], list[tuple[ShownRun, Metric]]] = {}
    for one in measured:
        for metric in one.run.evaluation.metrics:
            groups.setdefault((metric.id, *_features(one, metric)), []).append((one, metric))
    shared = [group for group in groups.values() if len(group) > 1]
    if not shared:
        why = tag("p", NONE_SHARED, class_="note") if len(measured) > 1 else nothing_yet(NOT_YET, "evaluate")
        return tag("section", heading, why, [_alone(one) for one in measured], id="measures")
    alone = [f"{_named(group[0][1])} ({group[0][0].label})" for group in groups.values() if len(group) == 1]
    return tag(
        "section",
        heading,
        _conditions(measured),
        [_metric(group, not _differing_conditions([one for one, _ in group])) for group in shared],
        tag("p", f"Measured of one run only: {'; '.join(alone)}.", class_="note") if alone else None,
        id="measures",
    )


def _alone(one: ShownRun) -> Markup:
    """Return what one run measured, of base and checkpoint, by its first features."""
    metrics = one.run.evaluation.metrics
    shown = [metric for metric in metrics if metric not in repeated_metrics(metrics)]
    return tag(
        "div", tag("h3", one.name, " against its own base"), [_metric([(one, metric)], False) for metric in shown]
    )


def _features(one: ShownRun, metric: Metric) -> tuple[str, ...]:
    """Return what tells the features of a metric from those of another run."""
    if metric.features != OWN_AUTOENCODER:
        return (metric.features,)
    # in every run under this name, whichever it is
    return (metric.features, str(one.settings.get("model.vae") or one.run.base))


def _named(metric: Metric) -> str:
    by = f" by {shorten(metric.features, 80)}" if metric.features else ""
    return f"{shorten(metric.title, 80)}{by}"


def _conditions(measured: Sequence[ShownRun]) -> Markup:
    """Return how the pictures were drawn, as a table where that differs between the runs."""
    columns, differs = _columns(measured), _differing_conditions(measured)
    intervals = "Intervals are bootstrap intervals at 95 %."
    if not differs:
        same = ", ".join(f"{name} {value}" for name, value in columns[0].items())
        return tag("p", f"Measured alike in all runs: {same}. {intervals}", class_="note")
    rows = [[name, *(column[name] for column in columns)] for name in differs if name in columns[0]]
    text = (
        "These runs were not measured alike, so what differs between them may come from how they were measured. "
        f"Compare each with its own base. {intervals}"
    )
    said = {
        OTHER_PHOTOGRAPHS: "They hold out different photographs.",
        OTHER_DATASET: "They have different datasets, so they were measured against different photographs.",
        UNKNOWN_DATASET: "Whether they were measured against the same photographs is not known.",
    }
    return tag(
        "div",
        tag("p", text),
        [tag("p", sentence) for what, sentence in said.items() if what in differs],
        table(["", *(one.name for one in measured)], rows, class_="beside") if rows else None,
        class_="alert",
    )


def _differing_conditions(measured: Sequence[ShownRun]) -> list[str]:
    columns = _columns(measured)
    differs = [name for name in columns[0] if len({column[name] for column in columns}) > 1]
    datasets = {one.photographs for one in measured}
    differs += [UNKNOWN_DATASET] if None in datasets else [OTHER_DATASET] if len(datasets) > 1 else []
    return differs + [OTHER_PHOTOGRAPHS] * hold_out_others(measured)


def _columns(measured: Sequence[ShownRun]) -> list[dict[str, str]]:
    """Return how each run's pictures were drawn. The dataset stands in for photographs that are not known by name."""
    columns = []
    for one in measured:
        evaluation, column = one.run.evaluation, {}
        if any(other.held_out is None for other in measured):
            column["dataset"] = shorten((one.run.data or {}).get("dataset") or "unknown", 120)
        columns.append(
            {
                **column,
                "photographs": f"{evaluation.num_real:,}",
                "prompts": f"{evaluation.num_prompts:,}",
                "size": f"{evaluation.width} × {evaluation.height} px",
                "steps": f"{evaluation.num_steps}",
                "cfg": f"{evaluation.cfg:g}",
                "sampler": shorten(evaluation.sampler, 40),
            }
        )
    return columns


def _metric(group: Sequence[tuple[ShownRun, Metric]], are_alike: bool) -> Markup:
    """Return a metric of several runs. are_alike: whether they can be compared with each other."""
    metric = group[0][1]
    values: list[tuple[ShownRun, Estimate, Metric]] = []
    for one, own in group:
        model = put_forward(one.run, [value.model for value in own.values if value.model.startswith("step-")])
        found = (estimate_of(own, wanted) for wanted in (BASE, model) if wanted)
        values += [(one, value, own) for value in found if value]
    axis = Axis.over(number for _, value, _ in values for number in (value.low, value.value, value.high))
    form = form_of_estimates([value for _, value, _ in values])
    form_of_differences = form_of_estimates([each for _, own in group for each in own.differences])
    rows = [
        [
            one.name,
            tag("span", name_of(one.run, value.model), class_="put-forward" if value.model != BASE else None),
            tag("strong", form.show(value.value)),
            interval_bar(axis, value.value, value.low, value.high, one.color if value.model != BASE else "muted"),
            f"{form.show(value.low)} to {form.show(value.high)}",
            _minus_base(own, value.model, form_of_differences),
        ]
        for one, value, own in values
    ]
    head = ["", "model", "value", "", "95 % interval", "minus its base, by prompt"]
    if not any(own.differences for _, own in group):
        head, rows = head[:-1], [row[:-1] for row in rows]
    trained = [(one.label, value) for one, value, _ in values if value.model != BASE]
    about = " · ".join(
        filter(None, [which_is_better(metric), metric.features and f"by {shorten(metric.features, 120)}"])
    )
    return tag(
        "div",
        tag("h3", shorten(metric.title, 120)),
        tag("p", about, class_="note") if about else None,
        tag("p", shorten(metric.meaning, 600)),
        tag("p", _sentence(metric, trained)) if are_alike and len(trained) > 1 and metric.better else None,
        [
            tag("p", shorten(text, 600), class_="note warning")
            for text in dict.fromkeys(own.warning for _, own in group)
            if text
        ],
        table(head, rows, _named(metric), class_="figures measured"),
        class_="shared",
    )


def _minus_base(metric: Metric, model: str, form: Form) -> str:
    difference = difference_of(metric, model)
    if difference is None:
        return ""
    interval = f"{form.show(difference.low, True)} to {form.show(difference.high, True)}"
    return f"{form.show(difference.value, True)} ({interval})"


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
        whose = "all others'" if len(others) > 1 else f"{others[0][0]}'s"
        text = f"By this metric {label} is best: its interval lies apart from {whose}."
    fewest = min(value.num for _, value in trained)
    return (
        f"{text} From only {counted(fewest, 'picture')} a model, so read it with care."
        if fewest < FEW_PICTURES
        else text
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
