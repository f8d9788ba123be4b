"""What `safelight evaluate` prints: a table of metrics, then a sentence for each further part."""

from __future__ import annotations

from safelight.output.columns import fill
from safelight.output.show import print_table
from safelight.text import counted
from safelight.trainer.report.evaluation import Estimate, Evaluation, Metric
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.report.figures import Form, form_of_estimates

# of models with their intervals, in a terminal's width
MAX_INTERVALS = 3


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures of every metric, with their intervals if few models have them, and what other parts found."""
    names = {
        model.id: "base" if model.step == 0 else f"epoch {format_epoch(model.epoch)}" for model in evaluation.models
    }
    has_intervals = len(names) <= MAX_INTERVALS
    where = "95 % intervals" if has_intervals else "intervals are in the report"
    rows = [_loss_row(evaluation), *(_row(metric, list(names), has_intervals) for metric in evaluation.metrics)]
    print_table(
        f"{counted(evaluation.num_prompts, 'prompt')}, {counted(evaluation.num_real, 'photograph')}; {where}",
        ("", *names.values(), "photographs"),
        [row for row in rows if row],
    )
    several = len(evaluation.crops) > 1
    sentences = [f"{names[crops.model]}: {crops.sentence}" if several else crops.sentence for crops in evaluation.crops]
    sentences += [part.sentence for part in (evaluation.burn, evaluation.memorisation) if part is not None]
    for warning in dict.fromkeys(metric.warning for metric in evaluation.metrics if metric.warning):
        sentences.append(f"note: {warning}")
    sentences += [f"not computed: {line}" for line in evaluation.not_computed]
    if evaluation.suggestion is not None:
        sentences.append(f"{evaluation.suggestion.sentence} Reasons: {'; '.join(evaluation.suggestion.reasons)}.")
    for text in sentences:
        print(fill(text))


def _loss_row(evaluation: Evaluation) -> tuple[str, ...]:
    losses = [model.held_out_loss for model in evaluation.models]
    if all(loss is None for loss in losses):
        return ()
    return ("held-out loss", *("–" if loss is None else f"{loss:.4f}" for loss in losses), "")


def _row(metric: Metric, models: list[str], has_intervals: bool) -> tuple[str, ...]:
    found = {estimate.model: estimate for estimate in metric.values}
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[metric.better]
    title = f"{metric.title}{arrow}" + (f"  ({metric.features})" if metric.features else "")
    shown = [*(found.get(model) for model in models), metric.real]
    form = form_of_estimates([one for one in shown if one])
    return (title, *(_cell(one, form, has_intervals) for one in shown))


def _cell(estimate: Estimate | None, form: Form, has_interval: bool) -> str:
    if estimate is None:
        return "–"
    if not has_interval or estimate.low == estimate.high:
        return form.show(estimate.value)
    return f"{form.show(estimate.value)} [{form.show(estimate.low)}, {form.show(estimate.high)}]"
