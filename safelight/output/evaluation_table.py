"""What `safelight evaluate` prints: a table of metrics, then a sentence for each further part."""

from __future__ import annotations

from safelight.output.columns import fill
from safelight.output.show import print_table
from safelight.trainer.report.evaluation import Estimate, Evaluation, Metric
from safelight.trainer.report.facts import format_epoch


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures of every metric with their intervals, and what the other parts found."""
    names = {
        model.id: "base" if model.step == 0 else f"epoch {format_epoch(model.epoch)}" for model in evaluation.models
    }
    num = f"{evaluation.num_prompts} prompts, {evaluation.num_real} photographs, 95 % intervals"
    rows = [_loss_row(evaluation), *(_row(metric, list(names)) for metric in evaluation.metrics)]
    print_table(num, ("", *names.values(), "photographs"), [row for row in rows if row])
    sentences = [crops.sentence for crops in evaluation.crops]
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


def _row(metric: Metric, models: list[str]) -> tuple[str, ...]:
    found = {estimate.model: estimate for estimate in metric.values}
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[metric.better]
    title = f"{metric.title}{arrow}" + (f"  ({metric.features})" if metric.features else "")
    return (title, *(_cell(found.get(model)) for model in models), _cell(metric.real))


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.low == estimate.high:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]".replace("-", "−")
