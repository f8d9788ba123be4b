"""What to try next: a table of rules, each of which looks at one thing in the records and gives one piece of advice.

Every rule stands beside its advice on the page, with the figures that it was applied to, so that a reader can disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from safelight.text import counted
from safelight.trainer.report.course import ending, run_verdict
from safelight.trainer.report.evaluation import REAL, BurnScores, is_worse_than_base, num_over
from safelight.trainer.report.facts import best_validation, format_epoch
from safelight.trainer.report.markup import Markup, shorten, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, num_held_out, number, rows_of, table_of
from safelight.trainer.report.theme import Part, asset
from safelight.trainer.report.verdicts import is_from_scratch, judge, reads_no_prompt

PART = Part(asset("advice.css"))
TITLE = "What to try next"
# a fall of held-out loss between the last two validations that is more than noise, as a fraction of the loss
MIN_FALL = 0.002
# a best epoch before this fraction of the run is early
EARLY = 0.5
FEW_PHOTOS = 30
FEW_HELD_OUT = 10
FEW_PROMPTS = 50
HIGH_CROP_LOSS = 0.1
# of the photographs in buckets with fewer photographs than a batch
MANY_SCATTERED = 0.1
# a learning rate below this fraction of the run's highest has come to rest
AT_REST = 0.01


@dataclass(frozen=True)
class Rule:
    """condition: when it applies, as shown. advise: returns the advice with its figures, "" if it does not apply."""

    name: str
    condition: str
    advise: Callable[[RunFolder], str]


def advice_section(run: RunFolder) -> Markup:
    """Return the advice of every rule that applies."""
    given = advice(run)
    heading = tag("h2", TITLE)
    if not given:
        text = (
            f"None of the {len(RULES)} rules of this report applies. Whether the pictures are good, only they can tell."
        )
        return tag("section", heading, tag("p", text, class_="note"), id="next")
    items = [
        tag("li", tag("p", _with_commands(text)), tag("p", f"Rule: {rule.condition}.", class_="note"))
        for rule, text in given
    ]
    return tag("section", heading, tag("ul", items, class_="advice"), id="next")


def _with_commands(text: str) -> list[object]:
    """Return a text whose parts in backticks are code."""
    return [tag("code", part) if place % 2 else part for place, part in enumerate(text.split("`"))]


def advice(run: RunFolder) -> list[tuple[Rule, str]]:
    """Return the rules that apply to a run, each with its advice."""
    return [(rule, text) for rule in RULES if (text := rule.advise(run))]


def _untrained(run: RunFolder) -> str:
    if not is_from_scratch(run):
        return ""
    photos = number((run.data or {}).get("num_train"))
    from_these = f" from {counted(int(photos), 'photograph')}" if photos > 0 else ""
    text = ", and its text encoder knows no language" if reads_no_prompt(run) else ""
    return (
        f"Start from a pretrained base (model.base): this one had random weights{text}, so everything that the model "
        f"can draw had to be learnt{from_these}. No other change helps as much."
    )


def _burnt_as_base(run: RunFolder) -> str:
    return _as_the_base(run, "burnt", _with_lower_cfg(run, "choose another base"))


def _smoothed_as_base(run: RunFolder) -> str:
    return _as_the_base(run, "smoothed", "Draw with more steps, or choose another base")


def _diverged(run: RunFolder) -> str:
    names = [str(event.get("event") or "") for event in run.metrics.events]
    last = {name: place for place, name in enumerate(names)}
    if "diverged" not in last or last.get("resumed", -1) > last["diverged"]:
        return ""
    rates = run.metrics.train["lr"][run.metrics.train["lr"] > 0]
    rate = f", about {0.3 * float(rates.max()):.1g} instead of {float(rates.max()):.1g}" if len(rates) else ""
    return f"Resume from the last sound checkpoint with a lower learning rate (optimizer.lr){rate}."


def _still_falling(run: RunFolder) -> str:
    held_out = run.metrics.validation["held_out"]
    if (
        len(held_out) < 3
        or num_held_out(run) == 1
        or ending(run).kind not in ("finished", "unknown")
        or _is_at_rest(run)
    ):
        return ""
    before, last = held_out[-2], held_out[-1]
    if best_validation(held_out) is not last or not before.loss - last.loss > MIN_FALL * before.loss:
        return ""
    return (
        f"Train longer: from epoch {format_epoch(before.epoch)} to {format_epoch(last.epoch)} held-out loss still fell "
        f"by {100 * (1 - last.loss / before.loss):.1f} %, to {last.loss:.4f}. Raise train.epochs, or add a [[stage]], "
        "and go on with --resume."
    )


def _unfinished(run: RunFolder) -> str:
    end = ending(run)
    if end.kind not in ("stopped", "open") or not run.metrics.last_step or run.is_training:
        return ""
    unless = ", if it is not still going on" if run.is_training is None and end.kind == "open" else ""
    return (
        f"Finish the run{unless}: its log ends at {end.place}, so nothing here tells how it would "
        "have ended. `safelight train RUN --resume` goes on."
    )


def _early_best(run: RunFolder) -> str:
    held_out = run.metrics.validation["held_out"]
    best, kind = best_validation(held_out), _verdict(run)
    if kind not in ("overfitting", "rising") or not best.step or best.epoch > EARLY * held_out[-1].epoch:
        return ""
    return (
        f"Train for fewer epochs, or with a lower learning rate: held-out loss was lowest at epoch "
        f"{format_epoch(best.epoch)} of {format_epoch(held_out[-1].epoch)} and rose from then on."
    )


def _late_best(run: RunFolder) -> str:
    held_out = run.metrics.validation["held_out"]
    best, kind = best_validation(held_out), _verdict(run)
    if kind not in ("overfitting", "rising") or not best.step or best.epoch <= EARLY * held_out[-1].epoch:
        return ""
    return (
        f"Stop near epoch {format_epoch(best.epoch)} next time, or let the learning rate fall to 0 by then "
        "(optimizer.schedule cosine): held-out loss rose after it."
    )


def _never_better(run: RunFolder) -> str:
    if _verdict(run) != "no-gain":
        return ""
    return (
        "Try a third of the learning rate, and look at whether captions and photographs fit together: held-out loss "
        "never fell below that of the model it started from."
    )


def _both_rise(run: RunFolder) -> str:
    if _verdict(run) != "worsening":
        return ""
    return (
        "Lower the learning rate (optimizer.lr): after its best point, loss rose on the photographs that were trained "
        "on as well, which is not overfitting but steps that are too large."
    )


def _burnt(run: RunFolder) -> str:
    return _beyond_the_base(run, "burnt", _with_lower_cfg(run, "compare an earlier checkpoint"))


def _with_lower_cfg(run: RunFolder, other: str) -> str:
    """Return advice on the guidance scale as far as lower ones were measured, beside other advice."""
    burn, model = run.evaluation.burn if run.evaluation else None, _evaluated(run)
    sets = [one for one in burn.sets if one.model == model] if burn and model else []
    own = next((one for one in sets if one.cfg == run.evaluation.cfg), None)
    lower = [one for one in sets if own and one.cfg < own.cfg]
    if not lower:
        return f"Try a lower cfg, whose pictures were not measured here (`--guidance` of evaluate), or {other}"
    best = min(lower, key=lambda one: one.share_burnt)
    found = f"at cfg {best.cfg:g} {num_over(best, 'burnt')} of {best.num} were burnt"
    if is_worse_than_base(own, best, "burnt"):
        return f"Lower cfg ({found}), or {other}"
    return f"{other[0].upper()}{other[1:]} (a lower cfg did not clearly help: {found})"


def _smoothed(run: RunFolder) -> str:
    text = "Look for soft or noisy photographs among the data"
    model = _evaluated(run)
    if model and int(model.removeprefix("step-")) < max(one.step for one in run.evaluation.models):
        text += ", and compare a checkpoint that was trained longer"
    return _beyond_the_base(run, "smoothed", text)


def _evaluated(run: RunFolder) -> str | None:
    return put_forward(run, [one.id for one in run.evaluation.models]) if run.evaluation else None


def _beyond_the_base(run: RunFolder, score: str, advised: str) -> str:
    """Return advice if more pictures of the model are beyond a score's limit than chance and the base explain.

    At the guidance scale of the evaluation: others were drawn to see where pictures burn.
    """
    burn, model = run.evaluation.burn if run.evaluation else None, _evaluated(run)
    if burn is None or model is None:
        return ""
    of = {one.model: one for one in burn.sets if one.model == REAL or one.cfg == run.evaluation.cfg}
    own, base = of.get(model), of.get(BASE)
    if own is None or not getattr(own, f"is_{score}") or (base and not is_worse_than_base(own, base, score)):
        return ""
    return _said_of_faults(run, model, score, advised, of)


def _as_the_base(run: RunFolder, score: str, advised: str) -> str:
    """Return advice if pictures of model and base alike are beyond a score's limit: training did not add to it."""
    burn, model = run.evaluation.burn if run.evaluation else None, _evaluated(run)
    if burn is None or model is None or is_from_scratch(run):
        return ""
    of = {one.model: one for one in burn.sets if one.model == REAL or one.cfg == run.evaluation.cfg}
    own, base = of.get(model), of.get(BASE)
    if not own or not base or not getattr(own, f"is_{score}") or not getattr(base, f"is_{score}"):
        return ""
    if is_worse_than_base(own, base, score):
        return ""
    return f"{_said_of_faults(run, model, score, advised, of)} Training did not add to it."


def _said_of_faults(run: RunFolder, model: str, score: str, advised: str, of: dict[str, BurnScores]) -> str:
    """Return the advice and how many pictures of the model, the base and the photographs are beyond the limit."""
    own = of[model]
    against = [
        f"{num_over(of[other], score)} of {of[other].num} of {name}"
        for other, name in ((BASE, "the base model's"), (REAL, "the real photographs"))
        if other in of
    ]
    what = "burnt" if score == "burnt" else "smoothed out"
    share = f"{num_over(own, score)} of {own.num}"
    usual = f", against {' and '.join(against)}" if against else ""
    return f"{advised}: at cfg {own.cfg:g}, {share} pictures of {name_of(run, model)} are {what}{usual}."


def _memorised(run: RunFolder) -> str:
    found = run.evaluation.memorisation if run.evaluation else None
    model = put_forward(run, found.num_flagged) if found else None
    if not model or model not in found.memorised:
        return ""
    flagged, of_base = counted(found.num_flagged[model], "picture"), found.num_flagged.get(BASE, 0)
    return (
        "Look at the flagged pairs; if they are copies, train for fewer epochs, on more photographs, or with more "
        f"data.caption_dropout: flagged are {flagged} of {name_of(run, model)} and {of_base:,} of the base model."
    )


def _worse_metric(run: RunFolder) -> str:
    evaluation = run.evaluation
    model = put_forward(run, [one.id for one in evaluation.models]) if evaluation else None
    worse = [shorten(m.title, 60) for m in evaluation.metrics if judge(m, model) == "worse"] if model else []
    if not worse:
        return ""
    return (
        f"Compare an earlier checkpoint, or a lower learning rate: {name_of(run, model)} is worse than its base in "
        f"{', '.join(worse)}."
    )


def _few_prompts(run: RunFolder) -> str:
    num = run.evaluation.num_prompts if run.evaluation else FEW_PROMPTS
    if num >= FEW_PROMPTS:
        return ""
    return f"Evaluate more prompts: {counted(num, 'prompt')} leave wide intervals, in which small changes are lost."


def _no_validation(run: RunFolder) -> str:
    if run.metrics.validation["held_out"] or not run.metrics.last_step:
        return ""
    return (
        "Hold photographs out (data.validation_fraction, validate.every_epochs): without held-out loss, overfitting "
        "shows only in the pictures."
    )


def _few_held_out(run: RunFolder) -> str:
    num = num_held_out(run)
    if not run.metrics.validation["held_out"] or not 0 < num < FEW_HELD_OUT:
        return ""
    return (
        f"Hold out more photographs (data.validation_fraction): with {num:,}, the best epoch depends on which ones "
        "they are."
    )


def _few_photos(run: RunFolder) -> str:
    num = number((run.data or {}).get("num_train"))
    if not 0 < num < FEW_PHOTOS:
        return ""
    return f"Add photographs: {counted(int(num), 'training photograph')} can be learnt by heart within few epochs."


def _scattered_buckets(run: RunFolder) -> str:
    batch = number(table_of(run.config, "train").get("batch_size"))
    counts = [number(bucket.get("num_train")) for bucket in rows_of(run.data, "buckets")]
    counts = [count for count in counts if count > 0]
    short = [count for count in counts if count < batch]
    if not short or sum(short) <= MANY_SCATTERED * sum(counts):
        return ""
    return (
        f"Allow fewer image sizes (a lower data.max_aspect), or a smaller batch: {counted(len(short), 'size')} of "
        f"{len(counts)} have fewer photographs than a batch of {batch:.0f}, {100 * sum(short) / sum(counts):.0f} % of "
        "all, so their steps average over less."
    )


def _crop_loss(run: RunFolder) -> str:
    buckets = rows_of(run.data, "buckets")
    rows = [(number(b.get("num_train")), number(b.get("crop_loss")), b) for b in buckets]
    bad = [(num, lost, bucket) for num, lost, bucket in rows if num > 0 and HIGH_CROP_LOSS < lost <= 1]
    if not bad:
        return ""
    photos, most = counted(int(sum(num for num, _, _ in bad)), "photograph"), max(lost for _, lost, _ in bad)
    limit = number(table_of(run.config, "data").get("max_aspect"))
    widest = max(map(_elongation, buckets))
    helps = "A higher data.resolution has image sizes of more shapes, which fit closer."
    # what is cut off photographs in the longest size is the ends that it is too short for
    if any(_elongation(b) == widest and lost < 1 and widest / (1 - lost) > limit for _, lost, b in bad):
        helps = "A higher data.max_aspect adds image sizes for photographs that are longer than the limit."
    return f"Check what the crops cut off {photos}: up to {100 * most:.0f} % of their pixels. {helps}"


def _elongation(bucket: dict) -> float:
    """Return the longer over the shorter side of an image size, 0 if they are not known."""
    width, height = number(bucket.get("width")), number(bucket.get("height"))
    return max(width / height, height / width) if width > 0 and height > 0 else 0.0


def _no_captions(run: RunFolder) -> str:
    photos, captions = (number((run.data or {}).get(key)) for key in ("num_photos", "num_captions"))
    if not captions < photos:
        return ""
    return (
        f"Write captions (`safelight caption DATASET`): at least {counted(int(photos - captions), 'photograph')} have "
        "none, and teach the model nothing about prompts."
    )


def _cut_captions(run: RunFolder) -> str:
    num_cut = number((run.data or {}).get("num_cut_captions"))
    cut_prompts = {row.prompt for row in run.comparison.rows if row.cut_after} if run.comparison else set()
    cut_prompts |= {str(i.get("prompt")) for sample in run.samples for i in sample.images if i.get("cut_after")}
    if num_cut > 0:
        are = "is" if num_cut == 1 else "are"
        found = f"{counted(int(num_cut), 'caption')} {are} cut"
    elif cut_prompts:
        are = "is" if len(cut_prompts) == 1 else "are"
        found = f"{counted(len(cut_prompts), 'prompt')} {are} longer than what was read of them"
    else:
        return ""
    return f"Let the text encoder read more (data.caption_chunks), or shorten the captions: {found}."


def _verdict(run: RunFolder) -> str:
    return run_verdict(run).kind


def _is_at_rest(run: RunFolder) -> bool:
    """Whether the learning rate had fallen to nearly nothing at the end, which flattens any curve."""
    rates = run.metrics.train["lr"]
    rates = rates[rates >= 0]
    return len(rates) > 0 and float(rates[-1]) < AT_REST * float(rates.max())


RULES = (
    Rule("untrained-base", "the base had random weights", _untrained),
    Rule("diverged", "the run diverged and was not resumed", _diverged),
    Rule("unfinished", "the run ended before its last planned epoch", _unfinished),
    Rule(
        "still-falling",
        f"held-out loss was lowest at the last of at least three validations, more than {100 * MIN_FALL:g} % below "
        "the one before, in a run that was not stopped early and whose learning rate had not fallen to 0",
        _still_falling,
    ),
    Rule("early-best", "held-out loss was lowest in the first half of the run and rose since", _early_best),
    Rule("late-best", "held-out loss was lowest in the second half of the run and rose since", _late_best),
    Rule("never-better", "held-out loss was lowest at the start, of at least three validations", _never_better),
    Rule("both-rise", "held-out loss and the loss on training photographs both rose since the best point", _both_rise),
    Rule("burnt", "more of the checkpoint's pictures are burnt than chance and the base explain", _burnt),
    Rule(
        "smoothed",
        "more of the checkpoint's pictures are smoothed out than chance and the base explain",
        _smoothed,
    ),
    Rule(
        "burnt-as-base",
        "more pictures of the checkpoint and of its base are burnt than chance explains, and the checkpoint's are not "
        "more than the base's beyond noise",
        _burnt_as_base,
    ),
    Rule(
        "smoothed-as-base",
        "more pictures of the checkpoint and of its base are smoothed out than chance explains, and the checkpoint's "
        "are not more than the base's beyond noise",
        _smoothed_as_base,
    ),
    Rule(
        "memorised",
        "more of the checkpoint's pictures are flagged as copies than chance and the base explain",
        _memorised,
    ),
    Rule("worse-metric", "a metric is worse than the base's and the interval excludes chance", _worse_metric),
    Rule("few-prompts", f"fewer than {FEW_PROMPTS} prompts were evaluated", _few_prompts),
    Rule("no-validation", "no photograph was held out, or none was validated", _no_validation),
    Rule("few-held-out", f"fewer than {FEW_HELD_OUT} photographs are held out", _few_held_out),
    Rule("few-photos", f"fewer than {FEW_PHOTOS} photographs are trained on", _few_photos),
    Rule(
        "scattered-buckets",
        f"more than {100 * MANY_SCATTERED:g} % of the photographs are in image sizes with less than one batch",
        _scattered_buckets,
    ),
    Rule("crop-loss", f"crops of an image size lose more than {100 * HIGH_CROP_LOSS:g} % of the pixels", _crop_loss),
    Rule("no-captions", "there are fewer captions than photographs", _no_captions),
    Rule("cut-captions", "captions or prompts are longer than what the text encoder reads", _cut_captions),
)
