"""What an evaluation says beyond "better than the base": how near to photographs, and where measures disagree.

A base with random weights draws noise, which anything is better than: there, only the photographs are a measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safelight.trainer.report.evaluation import Difference, Estimate, Evaluation, Metric
from safelight.trainer.report.figures import form_of_estimates
from safelight.trainer.report.markup import shorten
from safelight.trainer.report.models import name_of
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, table_of

# of the metrics whose value for photographs is the best there is: beyond it, a higher one is no better
BEST_AT_PHOTOGRAPHS = ("density",)
# of those of which neither a higher nor a lower value than the photographs' is better
ALIKE_AT_PHOTOGRAPHS = ("diversity",)
BETTER = {"lower": "lower is better", "higher": "higher is better"}
AS_PHOTOGRAPHS = "best is about as high as the photographs' own"

Judgement = Literal["better", "worse", "different", "unclear"]
OTHERWISE: dict[Judgement, str] = {
    "better": "is better than the base's beyond chance",
    "worse": "is worse than the base's beyond chance",
    "different": "differs from the base's beyond chance",
    "unclear": "shows no clear difference from the base",
}


@dataclass(frozen=True)
class Lead:
    """Another checkpoint's better value of a metric. is_clear: the two intervals lie apart."""

    metric: Metric
    own: Estimate
    other: Estimate
    is_clear: bool


def is_from_scratch(run: RunFolder) -> bool:
    """Return whether the run began with random weights, so that its base is untrained."""
    return bool(run.model.get("from_scratch"))


def reads_no_prompt(run: RunFolder) -> bool:
    """Return whether the run's text encoder kept random weights too, as far as its folder tells."""
    is_trained = table_of(run.config, "text_encoder").get("train") is True
    return "untrained (random weights)" in str(run.model.get("text_encoder") or "") and not is_trained


def which_is_better(metric: Metric) -> str:
    """Return which way a metric is better, in words; "" if neither."""
    if metric.real and metric.id.startswith(BEST_AT_PHOTOGRAPHS + ALIKE_AT_PHOTOGRAPHS):
        return AS_PHOTOGRAPHS
    return BETTER.get(metric.better, "")


def counted_as(metric: Metric, estimate: Estimate) -> Estimate:
    """Return an estimate as it is judged: where more than the photographs' own is no better, at most that."""
    if not (metric.real and metric.id.startswith(BEST_AT_PHOTOGRAPHS)):
        return estimate
    most = metric.real.value
    return estimate.model_copy(update={key: min(most, getattr(estimate, key)) for key in ("value", "low", "high")})


def repeated_metrics(metrics: Sequence[Metric]) -> list[Metric]:
    """Return the metrics that an earlier one shows already, by other features."""
    first = {metric.title: metric for metric in reversed(metrics)}
    return [metric for metric in metrics if first[metric.title] is not metric]


def judge(metric: Metric, model: str) -> Judgement:
    """Return whether a model is better than the base beyond chance.

    By the differences per prompt if there are any, else only if the two intervals do not overlap.
    """
    difference, own, base = difference_of(metric, model), estimate_of(metric, model), estimate_of(metric, BASE)
    if difference:
        low, high = difference.low, difference.high
    elif own and base:
        own, base = counted_as(metric, own), counted_as(metric, base)
        low, high = own.low - base.high, own.high - base.low
    else:
        return "unclear"
    if low <= 0 <= high:
        return "unclear"
    if not metric.better:
        return "different"
    return "better" if (high < 0) == (metric.better == "lower") else "worse"


def difference_of(metric: Metric, model: str) -> Difference | None:
    return next((value for value in metric.differences if value.model == model), None)


def short_title(metric: Metric) -> str:
    return shorten(metric.title, 60).removesuffix(" × 1000")


def nearness(evaluation: Evaluation, model: str) -> str:
    """Return how far a model's pictures are from photographs by the first KID, in a sentence; "" if not measured.

    Far: its interval lies above that of one half of the photographs against the other half.
    """
    metric = next((one for one in evaluation.metrics if one.id.startswith("kid_") and one.real), None)
    own = metric and estimate_of(metric, model)
    if not own:
        return ""
    figures = f"{metric.title} is {_with_interval(metric, own)}, against {_with_interval(metric, metric.real)}"
    figures += " between two halves of the photographs."
    if _is_far(metric, own):
        return f"Its pictures are still far from photographs: {figures}"
    return f"By KID its pictures are not clearly farther from photographs than photographs from each other: {figures}"


def _is_far(metric: Metric, own: Estimate) -> bool:
    return metric.real is not None and own.low > metric.real.high


def by_other_features(evaluation: Evaluation, model: str) -> str:
    """Return what a metric by further features says otherwise than by the first, in a sentence; "" if nothing.

    Said otherwise: whether the model is better than the base, and for KID whether it is far from photographs.
    """
    first = {metric.title: metric for metric in reversed(evaluation.metrics)}
    found: dict[str, list[str]] = {}
    for metric in repeated_metrics(evaluation.metrics):
        leading, own = first[metric.title], estimate_of(metric, model)
        of_leading = estimate_of(leading, model)
        if not own or not of_leading:
            continue
        said, title = found.setdefault(shorten(metric.features, 60), []), short_title(metric)
        verdict = judge(metric, model)
        if verdict != judge(leading, model):
            base, form = estimate_of(metric, BASE), form_of_estimates(metric.values)
            figures = f", {form.show(own.value)} against {form.show(base.value)}" if base else ""
            said.append(f"{title} {OTHERWISE[verdict]}{figures}")
        if metric.id.startswith("kid_") and _is_far(metric, own) != _is_far(leading, of_leading):
            far = "far from" if _is_far(metric, own) else "not clearly apart from"
            said.append(f"{title} is {far} that of photographs")
    parts = [f"by {features}, {' and '.join(said)}" for features, said in found.items() if said]
    return f"Other features disagree: {'; '.join(parts)}." if parts else ""


def leads(evaluation: Evaluation, model: str) -> list[Lead]:
    """Return the metrics by which another checkpoint is better than this one, clearly or within noise."""
    found = []
    for metric in evaluation.metrics:
        own = estimate_of(metric, model)
        if not own or not metric.better:
            continue
        sign = 1 if metric.better == "lower" else -1
        others = [one for one in metric.values if one.model not in (BASE, model)]
        judged = counted_as(metric, own)
        best = min(others, key=lambda one: sign * counted_as(metric, one).value, default=None)
        if best is None or not sign * counted_as(metric, best).value < sign * judged.value:
            continue
        least = counted_as(metric, best)
        is_clear = least.high < judged.low if sign > 0 else least.low > judged.high
        found.append(Lead(metric, own, best, is_clear))
    return found


def disagreement(run: RunFolder, evaluation: Evaluation, model: str) -> str:
    """Return by which metrics another checkpoint is better, with figures where that is clear; "" if by none."""
    found = leads(evaluation, model)
    clear = [
        f"by {named(one.metric, evaluation.metrics)} {name_of(run, one.other.model)} is better, "
        f"{_with_interval(one.metric, one.other)} against {_with_interval(one.metric, one.own)}"
        for one in found
        if one.is_clear
    ]
    near = [
        f"{name_of(run, one.other.model)} in {named(one.metric, evaluation.metrics)}"
        for one in found
        if not one.is_clear
    ]
    said = f"Not all measures agree: {'; '.join(clear)}." if clear else ""
    if near:
        said += f"{' ' if said else ''}Ahead, but within noise: {', '.join(near)}."
    return said


def disagreeing(run: RunFolder, evaluation: Evaluation, model: str) -> str:
    """Return the same in short, for the top of the page: only what is clear."""
    by_model: dict[str, list[str]] = {}
    for one in leads(evaluation, model):
        if one.is_clear:
            by_model.setdefault(one.other.model, []).append(named(one.metric, evaluation.metrics))
    parts = [f"{name_of(run, other)} is better by {', '.join(metrics)}" for other, metrics in by_model.items()]
    return f"Not all measures agree: {'; '.join(parts)}." if parts else ""


def estimate_of(metric: Metric, model: str) -> Estimate | None:
    return next((value for value in metric.values if value.model == model), None)


def named(metric: Metric, metrics: Sequence[Metric]) -> str:
    """Return a metric's short title, with its features where another of the metrics has the same."""
    titles = [one.title for one in metrics]
    by = f" ({shorten(metric.features, 60)})" if titles.count(metric.title) > 1 and metric.features else ""
    return f"{short_title(metric)}{by}"


def _with_interval(metric: Metric, estimate: Estimate) -> str:
    """Return an estimate with its interval, written as all of its metric are."""
    form = form_of_estimates([*metric.values, *([metric.real] if metric.real else [])])
    return f"{form.show(estimate.value)} ({form.show(estimate.low)} to {form.show(estimate.high)})"
