"""The metrics of an evaluation: in words, with their intervals, and how each model differs from the base."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.text import counted
from safelight.trainer.report.bars import Axis, interval_bar
from safelight.trainer.report.evaluation import Difference, Estimate, Evaluation, Metric
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.figures import Form, form_of_estimates, show_p
from safelight.trainer.report.markup import Markup, details, join, nothing_yet, shorten, table, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder
from safelight.trainer.report.scores import scores_table
from safelight.trainer.report.theme import Part, asset
from safelight.trainer.report.verdicts import (
    ALIKE_AT_PHOTOGRAPHS,
    by_other_features,
    counted_as,
    difference_of,
    estimate_of,
    is_from_scratch,
    judge,
    named,
    nearness,
    repeated_metrics,
    short_title,
    which_is_better,
)

PART = Part(asset("measures.css"))
TITLE = "Is it better than its base?"
MAX_MODELS_SHOWN = 12
# below this an interval is wide and its coverage doubtful
FEW_PICTURES = 50
NOT_YET = "Metrics with intervals, burnt colours, copied photographs, and how far things are from real ones:"

UNTRAINED_BASE = (
    "The base has random weights and draws noise, so nearly anything is better than it. The rows that count here are "
    "those of the real photographs."
)


def measures_section(run: RunFolder) -> Markup:
    """Return what was measured of base, checkpoints and photographs."""
    heading, scores = tag("h2", TITLE), scores_table(run.scores)
    evaluation = run.evaluation
    if evaluation is None or not evaluation.metrics:
        left_out = _not_computed(evaluation) if evaluation else None
        return tag("section", heading, scores, left_out or nothing_yet(NOT_YET, "evaluate"), id="measures")
    model = put_forward(run, [one.id for one in evaluation.models])
    repeated = repeated_metrics(evaluation.metrics)
    return tag(
        "section",
        heading,
        tag("p", _summary(run, evaluation, model), class_="lead") if model else None,
        tag("p", UNTRAINED_BASE) if model and is_from_scratch(run) else None,
        tag("p", told) if model and (told := nearness(evaluation, model)) else None,
        tag("p", told) if model and (told := by_other_features(evaluation, model)) else None,
        tag("p", _how_measured(evaluation), _leading(evaluation, repeated), class_="note"),
        [_metric(run, metric, model) for metric in evaluation.metrics if metric not in repeated],
        details(_repeats(repeated), *[_metric(run, metric, model) for metric in repeated]) if repeated else None,
        scores,
        _not_computed(evaluation),
        id="measures",
    )


def _leading(evaluation: Evaluation, repeated: Sequence[Metric]) -> str:
    """Return which features the open figures are by, and why these; "" if there are no others."""
    first = next((metric.features for metric in evaluation.metrics if metric.features), "")
    if not repeated or not first:
        return ""
    return f" Where several features give a figure, {shorten(first, 60)} leads: it was named first for the evaluation."


def _repeats(metrics: Sequence[Metric]) -> str:
    features = dict.fromkeys(shorten(metric.features, 60) for metric in metrics if metric.features)
    return f"The same by {', '.join(features)}" if features else "Further figures"


def _summary(run: RunFolder, evaluation: Evaluation, model: str) -> str:
    """Return which metrics the model is better in, which worse, and which are undecided."""
    titles: dict[str, list[str]] = {}
    repeated = repeated_metrics(evaluation.metrics)
    for metric in evaluation.metrics:
        if metric not in repeated and (estimate_of(metric, model) or difference_of(metric, model)):
            titles.setdefault(judge(metric, model), []).append(shorten(metric.title, 80))
    name, base = name_of(run, model), "the untrained base" if is_from_scratch(run) else "the base"
    words = (
        ("better", f"{name} is better than {base} in {{}}"),
        ("worse", f"{name} is worse in {{}}" if "better" in titles else f"{name} is worse than {base} in {{}}"),
        ("different", "it differs in {}"),
        ("unclear", "no clear difference in {}"),
    )
    parts = [text.format(", ".join(titles[kind])) for kind, text in words if kind in titles]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def headline(run: RunFolder) -> str:
    """Return the checkpoint that the evaluation suggests and how it compares with the base, in one or two sentences.

    "" if nothing was evaluated.
    """
    evaluation = run.evaluation
    trained = [one.id for one in evaluation.models if one.id != BASE] if evaluation else []
    model = put_forward(run, trained)
    if model is None:
        return ""
    suggestion, name = evaluation.suggestion, name_of(run, model)
    if suggestion and suggestion.model == model:
        said = (
            f"Of the evaluated checkpoints {name} is suggested"
            if len(trained) > 1
            else f"Only {name} was evaluated, so no other checkpoint was compared with it"
        )
    elif suggestion and len(trained) > 1:
        return "No evaluated checkpoint is better than the base beyond chance."
    elif suggestion:
        return f"Only {name} was evaluated, and it is not better than the base beyond chance."
    else:
        said = f"Evaluated was {name}"
    by = next((metric for metric in evaluation.metrics if estimate_of(metric, model) and metric.better), None)
    if by is None:
        return f"{said}."
    title, base = short_title(by), "the untrained base" if is_from_scratch(run) else "the base"
    how = {
        "better": f"it is better than {base}, beyond chance",
        "worse": f"it is worse than {base}, beyond chance",
        "unclear": f"there is no clear difference from {base}",
    }
    if title == "KID":
        how["better"] = f"it is nearer to the photographs than {base}, beyond chance"
        how["worse"] = f"it is farther from the photographs than {base}, beyond chance"
    return f"{said}; by {named(by, evaluation.metrics)} {how[judge(by, model)]}."


def _how_measured(evaluation: Evaluation) -> str:
    steps = "1 step" if evaluation.num_steps == 1 else f"{evaluation.num_steps} steps"
    return (
        f"Measured on {counted(evaluation.num_prompts, 'prompt')} a model, against "
        f"{counted(evaluation.num_real, 'real photograph')}; pictures of {evaluation.width} × {evaluation.height} px, "
        f"cfg {evaluation.cfg:g}, {steps} of {shorten(evaluation.sampler, 40)}. Intervals are bootstrap intervals at "
        "95 %: another set of as many pictures would most likely give a value inside."
    )


def _metric(run: RunFolder, metric: Metric, model: str | None) -> Markup:
    values = _chosen_values(metric, model)
    level = metric.real.value if metric.real else None
    shown = [*values, *([metric.real] if metric.real else [])]
    axis = Axis.over(number for value in shown for number in (value.low, value.value, value.high))
    form, form_of_differences = form_of_estimates(shown), form_of_estimates(metric.differences)
    rows = []
    for value in shown:
        is_real = value is metric.real
        color = "accent" if value.model == model else "amber" if is_real else "muted"
        name = "real photographs" if is_real else name_of(run, value.model) if _is_id(value.model) else value.model
        rows.append(
            [
                tag("span", shorten(name, 60), class_="put-forward" if value.model == model else None),
                tag("strong", form.show(value.value)),
                interval_bar(axis, value.value, value.low, value.high, color, level),
                tag("span", f"{form.show(value.low)} to {form.show(value.high)}"),
                "" if is_real else _difference(difference_of(metric, value.model), form_of_differences),
            ]
        )
    by_prompt = any(_num_prompts(difference) for difference in metric.differences)
    head = ["", "value", "", "95 % interval", f"minus the base{', by prompt' if by_prompt else ''}"]
    if not metric.differences:
        head, rows = head[:-1], [row[:-1] for row in rows]
    better = which_is_better(metric)
    by = f"by {shorten(metric.features, 120)}" if metric.features else ""
    about = " · ".join(filter(None, [better, by, _counts(metric)]))
    more = len(metric.values) - len(values)
    return tag(
        "div",
        tag(
            "div",
            tag("h3", shorten(metric.title, 120)),
            tag("p", about, class_="note") if about else None,
            tag("p", shorten(metric.meaning, 600)),
            tag("p", _sentence(run, metric, model, form)) if model else None,
            tag("p", shorten(metric.warning, 600), class_="note warning") if metric.warning else None,
        ),
        table(head, rows, f"{shorten(metric.title, 120)} {by}".rstrip(), class_="figures measured"),
        tag("p", f"{counted(more, 'more checkpoint')} in evaluation.json.", class_="note") if more > 0 else None,
        class_="measure",
    )


def _counts(metric: Metric) -> str:
    """Return over how many pictures the values were taken."""
    nums = sorted({value.num for value in metric.values if value.model != "real"})
    if not nums:
        return ""
    each = f"{nums[0]:,} to {nums[-1]:,} pictures" if len(nums) > 1 else counted(nums[0], "picture")
    return f"{each} a model"


def _chosen_values(metric: Metric, model: str | None) -> list[Estimate]:
    values = [value for value in metric.values if value.model != "real"]
    places = set(evenly_chosen(len(values), MAX_MODELS_SHOWN))
    places |= {place for place, value in enumerate(values) if value.model in (BASE, model)}
    return [values[place] for place in sorted(places)]


def _is_id(model: str) -> bool:
    return model == BASE or model.startswith("step-")


def _difference(difference: Difference | None, form: Form) -> Markup | str:
    if difference is None:
        return ""
    interval = f"{form.show(difference.low, True)} to {form.show(difference.high, True)}"
    return tag("span", tag("strong", form.show(difference.value, True)), " ", tag("span", f"({interval})"))


def _sentence(run: RunFolder, metric: Metric, model: str, form: Form) -> str:
    """Return what the metric says of the model, in words. form: of its values."""
    own, base, difference = estimate_of(metric, model), estimate_of(metric, BASE), difference_of(metric, model)
    name = name_of(run, model)
    verdict = {
        "better": "better than the base, beyond chance",
        "worse": "worse than the base, beyond chance",
        "different": "different from the base, beyond chance",
        "unclear": "no clear difference from the base",
    }[judge(metric, model)]
    if difference and not (num := _num_prompts(difference)):
        text = (
            f"{name[0].upper()}{name[1:]} is {verdict} (p {show_p(difference.p)}, by exchanging the pictures of both "
            "models prompt by prompt)."
        ).replace("is no clear difference from", "shows no clear difference from")
    elif difference:
        ties = f", equal for {difference.ties}" if difference.ties else ""
        text = (
            f"Prompt by prompt, {name} is {verdict} (p {show_p(difference.p)}): better for {difference.wins} of "
            f"{counted(num, 'prompt')}{ties}, worse for {difference.losses}."
        ).replace("is no clear difference from", "shows no clear difference from")
    elif own and base:
        overlap = "overlap" if judge(metric, model) == "unclear" else "do not overlap"
        text = (
            f"{name[0].upper()}{name[1:]} has {form.show(own.value)}, the base {form.show(base.value)}; their "
            f"intervals {overlap}: {verdict}."
        )
    else:
        return ""
    text += _beside_photographs(metric, own, form)
    fewest = min(value.num for value in (own, base) if value) if own or base else 0
    # a warning says so already
    if 0 < fewest < FEW_PICTURES and not metric.warning:
        text += f" From only {counted(fewest, 'picture')}, so read it with care."
    return text


def _beside_photographs(metric: Metric, own: Estimate | None, form: Form) -> str:
    """Return how a value compares with that of photographs among themselves, in words after another sentence."""
    real = metric.real
    if not own or not real:
        return ""
    if metric.id.startswith(ALIKE_AT_PHOTOGRAPHS):
        return _beside_best(own, real, form)
    if not metric.better:
        return ""
    judged = counted_as(metric, own)
    if judged.value != own.value:
        return f" That is no less than the photographs' own {form.show(real.value)}: higher would be no better."
    is_worse = judged.low > real.high if metric.better == "lower" else judged.high < real.low
    how = "clearly better than this" if is_worse else "not clearly apart from this"
    return f" Real photographs, at {form.show(real.value)}, are {how}."


def _beside_best(own: Estimate, real: Estimate, form: Form) -> str:
    """Return on which side of the photographs' own value, the best there is, a value lies."""
    at = form.show(real.value)
    if own.high < real.low:
        return f" That is clearly below the photographs' own {at}: pictures are too much alike."
    if own.low > real.high:
        return f" That is clearly above the photographs' own {at}: pictures differ more than photographs do, no gain."
    return f" That is not clearly apart from the photographs' own {at}, the best there is."


def _num_prompts(difference: Difference) -> int:
    """Return the prompts that were judged one by one, 0 for a metric of whole sets."""
    return difference.wins + difference.ties + difference.losses


def _not_computed(evaluation: Evaluation) -> Markup | None:
    if not evaluation.not_computed:
        return None
    lines = [tag("li", shorten(line, 400)) for line in evaluation.not_computed]
    return join(tag("h3", "Not measured"), tag("ul", lines, class_="note"))
