"""Which checkpoint to use, by rules that are stated with the result.

1. Checkpoints that draw more burnt, smoothed-out or copied pictures than the base beyond noise are set aside, if
   another is left. A difference within noise, or a fault that the base has alike, decides nothing and is said.
2. Of the others, the one with the lowest held-out loss; of several within TIE of it, the one with the lowest KID.
3. Unless another's KID is lower beyond chance: then that one.
4. If that one's held-out loss is not below the base's and its KID is not lower beyond chance, there is none to suggest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from safelight.trainer.evaluation.wording import names_of, said_p
from safelight.trainer.report.evaluation import EvaluatedModel, Metric, Suggestion
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.report.figures import Form, form_of_estimates

BASE = "base"
# of the lowest held-out loss: validation on other photographs would change it by more
TIE = 0.001
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class KidChange:
    """KID of one checkpoint minus another's. p: two-sided."""

    value: float
    p: float


def suggest(
    models: Sequence[EvaluatedModel],
    kid: Metric | None,
    kid_changes: Mapping[tuple[str, str], KidChange],
    blemishes: Mapping[str, Mapping[str, str]],
    undecided: Mapping[str, Sequence[str]] = MappingProxyType({}),
    elsewhere: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Suggestion | None:
    """Return the checkpoint to use with its reasons, None if there is nothing to choose by.

    Every reason names the checkpoint that it is about.

    kid: the headline metric. kid_changes: (model, other) -> KID of model minus KID of other, for the base and all
    checkpoints. blemishes: model -> what is wrong with its pictures, such as "burnt" -> how many, "" if not known.
    undecided: model -> what is wrong with its pictures, but decides nothing, as clauses that begin with "pictures".
    elsewhere: the same of pictures at other guidance scales, said of the checkpoint that is chosen.
    """
    trained = [model for model in models if model.id != BASE]
    base = next((model for model in models if model.id == BASE), None)
    if not trained or (kid is None and all(model.held_out_loss is None for model in trained)):
        return None
    reasons: list[str] = []
    names = names_of(models)
    sound = [model for model in trained if not blemishes.get(model.id)]
    candidates = sound or trained
    if sound:
        set_aside = [
            f"{names[model.id]} is set aside: its pictures are {_blemished(blemishes[model.id])}"
            for model in trained
            if model not in sound
        ]
    else:
        listed = "; ".join(f"{names[model.id]}: {_blemished(blemishes[model.id])}" for model in trained)
        set_aside = [f"all checkpoints draw pictures with more faults than the base's: {listed}"]
    kid_of = {} if kid is None else {estimate.model: estimate.value for estimate in kid.values}
    form = form_of_estimates(() if kid is None else kid.values)
    chosen = _by_loss(candidates, names, kid_of, reasons, len(trained))
    # of many comparisons one is beyond chance by chance
    limit = SIGNIFICANT / max(1, len(candidates) - 1)
    better = [
        other
        for other in candidates
        if (change := kid_changes.get((other.id, chosen.id))) and change.value < 0 and change.p < limit
    ]
    if better:
        closest = min(better, key=lambda model: kid_of[model.id])
        reasons.append(
            f"{names[closest.id]}'s {kid.title} is {form.show(kid_of[closest.id])}, lower than {names[chosen.id]}'s "
            f"{form.show(kid_of[chosen.id])} beyond chance ({said_p(kid_changes[closest.id, chosen.id].p)})"
        )
        chosen = closest
    elif kid is not None and len(candidates) > 1:
        reasons.append(f"no other checkpoint's {kid.title} is lower beyond chance")
    noted = [f"{names[chosen.id]}'s {clause}" for clause in undecided.get(chosen.id, ())]
    noted += [f"{names[chosen.id]}'s {clause}" for clause in elsewhere.get(chosen.id, ())]
    noted += [
        f"{names[model.id]} is not set aside: its {clause}"
        for model in trained
        if model is not chosen
        for clause in undecided.get(model.id, ())
    ]
    said = [*noted, *set_aside]
    return _against_base(chosen, base, names, kid, form, kid_changes, reasons, said, is_alone=len(trained) == 1)


def _by_loss(
    candidates: Sequence[EvaluatedModel],
    names: Mapping[str, str],
    kid_of: Mapping[str, float],
    reasons: list[str],
    num_trained: int,
) -> EvaluatedModel:
    measured = [model for model in candidates if model.held_out_loss is not None]
    if not measured:
        chosen = min(candidates, key=lambda model: kid_of.get(model.id, float("inf")))
        reasons.append(
            f"held-out loss was not measured at these checkpoints: {names[chosen.id]} is the one with the lowest KID"
        )
        return chosen
    lowest = min(model.held_out_loss for model in measured)
    near = [model for model in measured if model.held_out_loss <= lowest * (1 + TIE)]
    chosen = min(near, key=lambda model: (kid_of.get(model.id, 0.0), model.held_out_loss))
    if len(candidates) == 1:
        only = "the only one that is not set aside" if num_trained > 1 else "the only checkpoint that was evaluated"
        reasons.append(f"{names[chosen.id]} is {only}; its held-out loss is {chosen.held_out_loss:.4f}")
    elif chosen.held_out_loss == lowest:
        left = "that were evaluated" if len(candidates) == num_trained else "that are not set aside"
        reasons.append(f"{names[chosen.id]}'s held-out loss, {lowest:.4f}, is the lowest of the checkpoints {left}")
    else:
        reasons.append(
            f"{names[chosen.id]}'s held-out loss, {chosen.held_out_loss:.4f}, is within {100 * TIE:g} % of the lowest, "
            f"{lowest:.4f}, and its KID is lower"
        )
    return chosen


def _against_base(
    chosen: EvaluatedModel,
    base: EvaluatedModel | None,
    names: Mapping[str, str],
    kid: Metric | None,
    form: Form,
    kid_changes: Mapping[tuple[str, str], KidChange],
    reasons: list[str],
    said: list[str],
    is_alone: bool,
) -> Suggestion:
    """Return the suggestion. said: further reasons. is_alone: no other checkpoint was evaluated."""
    change = kid_changes.get((chosen.id, BASE))
    has_lower_kid = change is not None and change.value < 0 and change.p < SIGNIFICANT
    has_higher_kid = change is not None and change.value > 0 and change.p < SIGNIFICANT
    losses = (None, None) if base is None else (chosen.held_out_loss, base.held_out_loss)
    has_lower_loss = None not in losses and losses[0] < losses[1]
    moved = f"({kid.title} {form.show(change.value, signed=True)}, {said_p(change.p)})" if change else ""
    if has_lower_kid:
        reasons.append(f"{names[chosen.id]}'s pictures are closer to your photographs than the base's {moved}")
    elif has_higher_kid:
        reasons.append(f"{names[chosen.id]}'s pictures are farther from your photographs than the base's {moved}")
    if has_lower_loss:
        reasons.append(f"the base's held-out loss is {losses[1]:.4f}")
    if has_higher_kid or not (has_lower_kid or has_lower_loss):
        sentence = (
            f"The only checkpoint that was evaluated, {_name(chosen)}, is not better than the base beyond chance."
            if is_alone
            else "No checkpoint is better than the base beyond chance. Of those that were evaluated, "
            f"{_name(chosen)} comes first."
        )
        return Suggestion(model=BASE, sentence=sentence, reasons=(*reasons, *said))
    alone = ": no other was evaluated" if is_alone else ""
    return Suggestion(
        model=chosen.id, sentence=f"Use the checkpoint of {_name(chosen)}{alone}.", reasons=(*reasons, *said)
    )


def _blemished(found: Mapping[str, str]) -> str:
    return " and ".join(f"{word} ({count})" if count else word for word, count in found.items())


def _name(model: EvaluatedModel) -> str:
    return f"epoch {format_epoch(model.epoch)} (step {model.step:,})"
