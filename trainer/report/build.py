"""Write report.html: one self-contained file that shows what a run did.

The most interesting parts come first: headline figures, base and trained images side by side, samples over the epochs,
loss curves, then data, settings, machine and events.
"""

from dataclasses import dataclass
from pathlib import Path

import safelight
from safelight.data.atomic import atomic_write_text
from safelight.text import counted
from safelight.trainer.config.toml import require_run
from safelight.trainer.report import (
    advice,
    burn_panel,
    chart,
    crop_map,
    data_panel,
    grids,
    learned,
    measures,
    memorisation_panel,
    provenance,
    samples,
)
from safelight.trainer.report.advice import advice_section
from safelight.trainer.report.best_epoch import best_section
from safelight.trainer.report.burn_panel import burn_section
from safelight.trainer.report.checkpoint_curves import checkpoints_section
from safelight.trainer.report.course import ending, lost_losses, planned_end, run_verdict
from safelight.trainer.report.crop_map import crop_section
from safelight.trainer.report.curves import NO_STEP, loss_section, schedule_section, timestep_section, validates
from safelight.trainer.report.data_panel import data_section
from safelight.trainer.report.facts import (
    Ending,
    Facts,
    Verdict,
    format_duration,
    format_epoch,
    format_percent,
    headline_facts,
    is_one_picture,
)
from safelight.trainer.report.grids import grids_section
from safelight.trainer.report.learned import learned_section
from safelight.trainer.report.markup import Markup, heading_of, kept_together, shorten, tag
from safelight.trainer.report.measures import measures_section
from safelight.trainer.report.memorisation_panel import memorisation_section
from safelight.trainer.report.models import put_forward
from safelight.trainer.report.provenance import environment_section, events_section, parameters_section
from safelight.trainer.report.rate_panel import rate_section
from safelight.trainer.report.requested_panel import requested_section
from safelight.trainer.report.run_reader import RunFolder, num_held_out, number, read_run_folder, table_of
from safelight.trainer.report.samples import samples_section
from safelight.trainer.report.scores import scores_sentence
from safelight.trainer.report.theme import THEME, page
from safelight.trainer.report.trained import trained_words
from safelight.trainer.report.verdicts import by_other_features, disagreeing, is_from_scratch, nearness, reads_no_prompt

# identifier, and what returns the section: None if it has nothing to show
SECTIONS = (
    ("learned", learned_section),
    ("best", best_section),
    ("measures", measures_section),
    ("loss", loss_section),
    ("timesteps", timestep_section),
    ("checkpoints", checkpoints_section),
    ("samples", samples_section),
    ("requested", requested_section),
    ("grids", grids_section),
    ("burn", burn_section),
    ("memorisation", memorisation_section),
    ("crops", crop_section),
    ("next", advice_section),
    ("data", data_section),
    ("parameters", parameters_section),
    ("schedule", schedule_section),
    ("rate-test", rate_section),
    ("environment", environment_section),
    ("events", events_section),
)
AFTER_THE_BEST = {
    "level": "It has hardly changed since.",
    "rising": "It has risen since.",
    "overfitting": "The model has been overfitting since.",
    "worsening": "It has risen since, and so has the loss on the training photographs.",
}
# with fewer held-out photographs than this, percentages get a caveat
FEW_HELD_OUT = 10
MAX_PROBLEMS = 20
# events that the page shows at its very top -> what they mean; a run that was resumed has left its divergence behind
GRAVE_EVENTS = {
    "diverged": "This run diverged: its loss or its weights are no longer finite numbers.",
    "held-out loss rose": "Held-out loss rose far above that of the base model.",
}
# a held-out loss this many times the base's, or more, has risen far above it
FAR_ABOVE = 2.0
NO_PROMPT = (
    "The text encoder is untrained, too (random weights): it understands no prompt, so do not expect pictures to "
    "follow theirs."
)
# what the page's style sheet and script are made of
PARTS = (
    THEME,
    chart.PART,
    learned.PART,
    measures.PART,
    samples.PART,
    grids.PART,
    burn_panel.PART,
    memorisation_panel.PART,
    crop_map.PART,
    data_panel.PART,
    advice.PART,
    provenance.PART,
)
MARK = '<svg viewBox="0 0 14 14" aria-hidden="true"><circle class="f-accent" cx="7" cy="7" r="6"/></svg>'


def build_report(run_dir: Path) -> Path:
    """Write report.html into the run folder and return its path.

    The page says so where the run lacks something. Raises UserError if run_dir is not a run folder.
    """
    run_dir = Path(run_dir)
    run = read_run_folder(run_dir)
    require_run(run_dir)
    path = run_dir / "report.html"
    atomic_write_text(path, render(run))
    return path


@dataclass(frozen=True)
class Content:
    """What a page shows. sections: identifier -> section, in their order."""

    title: str
    header: Markup
    sections: dict[str, Markup]
    footer: Markup


def render(run: RunFolder) -> str:
    """Return the report as HTML."""
    content = content_of(run)
    return page(
        content.title, content.header, tag("main", list(content.sections.values())), content.footer, parts=PARTS
    )


def content_of(run: RunFolder) -> Content:
    """Return the report's title, header, sections and footer."""
    facts = headline_facts(run.metrics)
    sections = {key: section for key, make in SECTIONS if (section := make(run)) is not None}
    verdict, end = run_verdict(run), ending(run)
    header = tag(
        "header",
        tag("div", Markup(MARK), "Safelight · training report", class_="mark"),
        tag("h1", run.title, dir="auto"),
        tag("p", _subtitle(run), class_="sub"),
        tag("div", run.notes, class_="author", dir="auto") if run.notes else None,
        _grave_events(run),
        _from_scratch(run),
        tag(
            "p",
            kept_together(" ".join(filter(None, [_lead(run, facts, verdict, end), *_evaluated(run)]))),
            class_="lead",
        ),
        _few_held_out(run),
        _problems(run.problems),
        tiles(run, facts),
        tag(
            "nav",
            [tag("a", heading_of(section), href=f"#{key}") for key, section in sections.items()],
            aria_label="Sections of this report",
        ),
    )
    footer = tag(
        "footer",
        f"Written by Safelight {safelight.__version__}. "
        "This file is self-contained: it loads nothing from the internet. Charts: uPlot by Leon Sorokin (MIT).",
    )
    return Content(run.title, header, sections, footer)


def tiles(run: RunFolder, facts: Facts) -> Markup:
    """Return the tiles with the headline figures. A figure that the run did not measure has no tile."""
    shown = []
    photos = number((run.data or {}).get("num_photos"))
    if photos == photos:
        shown.append(_tile("photograph" if photos == 1 else "photographs", f"{photos:,.0f}", note=_held_out_note(run)))
    num_steps, planned = planned_end(run)
    of = f" of {format_epoch(planned)}" if planned else ""
    name = "epoch done" if (planned or facts.last_epoch) == 1 else "epochs done"
    limit = number(table_of(run.config, "train").get("max_steps"))
    ended = ", as many as train.max_steps allows" if facts.last_step == limit == num_steps else ""
    shown.append(_tile(name, format_epoch(facts.last_epoch), of, counted(facts.last_step, "step") + ended))
    if facts.best and facts.best.step == 0:
        shown.append(_tile("held-out loss", f"{facts.best.loss:.4f}", note="of the base model"))
    elif facts.best:
        where = f"at epoch {format_epoch(facts.best.epoch)}"
        shown.append(_tile("best held-out loss", f"{facts.best.loss:.4f}", note=where))
        if facts.change_percent is not None:
            change = format_percent(facts.change_percent)
            shown.append(_tile("change from step 0", change, note="best held-out loss"))
    if facts.run_time_s is not None and facts.last_step:
        duration = format_duration(facts.run_time_s)
        shown.append(_tile("run time", duration, note="including validation and samples"))
    if facts.images_per_s is not None:
        shown.append(_tile("mean speed", f"{facts.images_per_s:.3g}", " images/s"))
    if facts.peak_memory_gib is not None:
        shown.append(_tile("peak memory", f"{facts.peak_memory_gib:.2f}", " GiB", "while training"))
    return tag("dl", shown, class_=f"tiles of-{len(shown)}")


def _tile(name: str, value: str, unit: str = "", note: str = "") -> Markup:
    return tag(
        "div",
        tag("dt", name),
        tag("dd", value, tag("small", unit) if unit else None, class_="value"),
        tag("dd", note, class_="meta") if note else None,
    )


def _held_out_note(run: RunFolder) -> str:
    validation = number(run.data.get("num_validation"))
    return f"{validation:,.0f} held out" if validation > 0 else "none held out"


def _subtitle(run: RunFolder) -> list:
    stamp = str(run.environment.get("started") or "")
    started = stamp[:16].replace("T", " ") + (" UTC" if stamp.endswith(("+00:00", "Z")) else "")
    device = shorten(run.environment.get("device_name") or run.environment.get("device") or "", 120)
    if device and (num := run.environment.get("processes")):
        device = f"{shorten(num, 8)} processes {'on the CPU' if device == 'CPU' else f'on one {device} each'}"
    trained = trained_words(run)
    parts = filter(None, [started, f"trained {trained}" if trained else "", f"from {run.base_title}", device])
    # one <bdi> each, so that right-to-left text does not reorder its neighbours
    return [[" · " if index else None, tag("bdi", part)] for index, part in enumerate(parts)]


def _lead(run: RunFolder, facts: Facts, verdict: Verdict, end: Ending) -> str:
    """Return what the run has learned, and how far it came if that is not to its planned end."""
    told = _learned(run, facts, verdict, end)
    if not run.metrics.last_step:
        return told
    going_on = {
        True: f"Training goes on: it has come to {end.place}.",
        False: f"The run was ended before its time, at {end.place}.",
        None: f"The log ends at {end.place}: the run is still going on, or was ended before its time.",
    }[run.is_training]
    unfinished = {"stopped": f"The run was stopped at {end.place}.", "open": going_on}.get(end.kind, "")
    return f"{told} {unfinished}".rstrip() if end.place not in told else told


def _learned(run: RunFolder, facts: Facts, verdict: Verdict, end: Ending) -> str:
    held_out = run.metrics.validation["held_out"]
    if facts.last_step == 0:
        known = f" The base model's held-out loss is {facts.best.loss:.4f}." if facts.best else ""
        return NO_STEP + known
    if facts.best is None and validates(run):
        return "No validation has been logged, so only the pictures can show whether the model learned."
    if facts.best is None:
        return "No validation was configured, so only the pictures can show whether the model learned."
    best = f"epoch {format_epoch(facts.best.epoch)}"
    if len(held_out) == 1 and facts.best.step == 0:
        return f"The base model's held-out loss is {facts.best.loss:.4f}; it has not been measured since."
    if len(held_out) == 1:
        return f"Held-out loss was measured once, at {best}: {facts.best.loss:.4f}. The base model was not validated."
    if verdict.kind == "no-rate":
        return verdict.text
    if held_out[0].step > 0:
        return f"Held-out loss was lowest at {best}; the base model was not validated."
    if facts.best.step == 0:
        return "Loss on held-out photographs never fell below that of the base model."
    start = "the untrained model" if run.model.get("from_scratch") else "the base model"
    if is_one_picture(held_out):
        return (
            f"Loss on the one held-out photograph was lowest at {best}: {facts.best.loss:.4f}, after "
            f"{held_out[0].loss:.4f} for {start}. One photograph does not show what the model learned."
        )
    if facts.change_percent is None:
        return f"Held-out loss was lowest at {best}."
    amount = f"{abs(facts.change_percent):.1f} %"
    after = AFTER_THE_BEST.get(verdict.kind, "")
    is_at_the_end = facts.best.step == held_out[-1].step == facts.last_step
    if verdict.kind == "level" and facts.best.step == held_out[-1].step:
        after = "It had become level by then."
    elif verdict.kind == "improving" and is_at_the_end and not verdict.low_rate:
        after = {
            "finished": "It was still falling when training ended.",
            "stopped": f"It was still falling when the run was stopped, at {end.place}.",
        }.get(end.kind, "")
    if verdict.low_rate:
        after += f" The learning rate had come down {verdict.low_rate} by the end."
    return (
        f"Loss on held-out photographs, which the model was not trained on, was lowest at {best}: {amount} below that "
        f"of {start}. {after.strip()}"
    ).rstrip()


def _few_held_out(run: RunFolder) -> Markup | None:
    """Return a caveat about the percentages if only a few photographs are held out."""
    num = num_held_out(run)
    if len(run.metrics.validation["held_out"]) < 2 or not 1 < num < FEW_HELD_OUT:
        return None
    text = f"Percentages are based on only {counted(num, 'held-out image')}: another split may give another result."
    return tag("p", text, class_="note")


def _from_scratch(run: RunFolder) -> Markup | None:
    if not is_from_scratch(run):
        return None
    return tag(
        "div",
        tag("strong", "Trained from scratch."),
        tag(
            "p",
            "The UNet started with random weights, so “base” below is an untrained model that draws only noise. That a "
            "checkpoint is better than it says little: compare with the real photographs.",
        ),
        tag("p", NO_PROMPT) if reads_no_prompt(run) else None,
        class_="alert",
    )


def _evaluated(run: RunFolder) -> list[str]:
    """Return what was found: by rules, against the base, against photographs, and whether all measures agree."""
    evaluation, scored, said = run.evaluation, scores_sentence(run.scores), measures.headline(run)
    model = put_forward(run, [one.id for one in evaluation.models]) if evaluation else None
    if model is None:
        return [scored, said]
    otherwise = by_other_features(evaluation, model)
    return [scored, said, nearness(evaluation, model), otherwise, disagreeing(run, evaluation, model)]


def _grave_events(run: RunFolder) -> list[Markup]:
    """Return a banner for each kind of GRAVE_EVENTS that the run logged, with the last such event's details.

    Without any, a loss that is not finite where the log ends has one.
    """
    banners = []
    last = {event.get("event"): place for place, event in enumerate(run.metrics.events)}
    is_resumed = last.get("resumed", -1) > last.get("diverged", -1)
    is_over = {"diverged": is_resumed, "held-out loss rose": _has_recovered(run)}
    for name, title in GRAVE_EVENTS.items():
        if name in last and not is_over[name]:
            event = run.metrics.events[last[name]]
            detail = shorten(event.get("detail") or "no details were logged", 1000)
            detail = detail[0].upper() + detail[1:]
            banners.append(tag("div", tag("strong", title), tag("p", detail), class_="alert grave", role="alert"))
    if not banners and (said := lost_losses(run.metrics)):
        title = "This run has a loss that is not a finite number."
        banners.append(tag("div", tag("strong", title), tag("p", " ".join(said)), class_="alert grave", role="alert"))
    return banners


def _has_recovered(run: RunFolder) -> bool:
    """Return whether held-out loss is no longer far above the base model's at the last validation."""
    held_out = run.metrics.validation["held_out"]
    steps = [number(event.get("step")) for event in run.metrics.events if event.get("event") == "held-out loss rose"]
    is_known = len(held_out) > 1 and held_out[0].step == 0 and held_out[-1].step > max(steps, default=0)
    return is_known and held_out[-1].loss <= FAR_ABOVE * held_out[0].loss


def _problems(problems: list[str]) -> Markup | None:
    if not problems:
        return None
    return tag(
        "div",
        tag("strong", "Parts of this run folder could not be read:"),
        tag("ul", [tag("li", shorten(problem, 400)) for problem in problems[:MAX_PROBLEMS]]),
        tag("p", f"and {len(problems) - MAX_PROBLEMS:,} more.") if len(problems) > MAX_PROBLEMS else None,
        class_="alert",
    )
