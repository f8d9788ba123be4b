"""The report's sections with charts: loss, loss by timestep, learning rate, speed and memory."""

import itertools
import math

import numpy as np

from safelight.text import counted
from safelight.trainer.report.chart import MAX_POINTS, RAMP, Curve, chart, figure_grid, is_wide, table_of, thinned
from safelight.trainer.report.course import known_epochs, learning_rates, run_verdict, stage_starts
from safelight.trainer.report.facts import (
    best_validation,
    evenly_chosen,
    format_epoch,
    format_percent,
    is_one_picture,
    smooth,
    steps_averaged,
)
from safelight.trainer.report.markup import Markup, details, empty_state, join, kept_together, shorten, table, tag
from safelight.trainer.report.run_reader import (
    MAX_STAGES,
    Metrics,
    RunFolder,
    Validation,
    averages_note,
    number,
)
from safelight.trainer.report.run_reader import table_of as settings_of

MAX_SMOOTHED_POINTS = 1500
# the most curves of a chart by timestep: of more bands, neighbours are averaged
MAX_BAND_CURVES = 8
# events that say why the curves turn, shown above them: the newest ones
TURNS = (
    "over-fitting",
    "stage ended early",
    "stage begins from the best",
    "settings changed",
    "learning rate changed",
)
MAX_TURNS = 12
# events that are marked in the charts, and the words at the mark: what happened there to the run from outside, or was
# noticed in it. Beginnings of stages are drawn anyway.
MARKED = {
    "settings changed": "settings changed",
    "learning rate changed": "learning rate changed",
    "over-fitting": "over-fitting noticed",
}
NO_STEP = "No training step has been logged so far."


def loss_section(run: RunFolder) -> Markup:
    """Return the loss chart, the verdict on overfitting, and all validations as a table."""
    metrics = run.metrics
    heading = tag("h2", "Loss")
    held_out, subset = metrics.validation["held_out"], metrics.validation["train_subset"]
    if not len(metrics.train["loss"]) and len(held_out) < 2:
        known = f" The base model's held-out loss is {held_out[0].loss:.4f}." if _is_base(held_out) else ""
        return tag("section", heading, empty_state(NO_STEP + known), id="loss")
    best = best_validation(held_out)
    label = "Training and validation loss over the epochs"
    if best:
        label += f"; held-out loss is lowest at epoch {format_epoch(best.epoch)} ({best.loss:.4f})"
    training = smoothed(metrics, "loss", "training", "muted")
    validations = [_validation_curve(held_out, "held-out photographs", "accent", "dots")]
    validations += [_validation_curve(subset, "some training photographs", "amber", "dashed")]
    shown = [curve for curve in validations if len(curve.x)]
    fitted = [value for curve in [*shown, *training[:1]] for value in curve.y]
    drawn = chart(
        "Training and validation",
        [*shown, *training],
        join(_validation_table(held_out, subset), table_of(training, title="training loss") if training else None),
        detail="mean squared error",
        label=label,
        note=_loss_note(run) + _averaged(run),
        stages=_stages(run),
        marks=_marks(metrics),
        ring=best and (best.epoch, best.loss, _best_name(best)),
        steps=_steps(metrics),
        is_log=is_wide(fitted),
    )
    verdict = run_verdict(run)
    text = tag("p", kept_together(verdict.text), class_="alert" if verdict.is_warning else None)
    return tag("section", heading, text, _turns(metrics), drawn, id="loss")


def _turns(metrics: Metrics) -> Markup | None:
    """Return what the run itself noticed, decided or was told that bends the curves, None if there is nothing."""
    rows = [
        tag("li", kept_together(f"Step {number(event.get('step')):,.0f}: {shorten(str(event.get('detail')), 400)}."))
        for event in metrics.events
        if event.get("event") in TURNS and math.isfinite(number(event.get("step")))
    ]
    return tag("ul", rows[-MAX_TURNS:]) if rows else None


def timestep_section(run: RunFolder) -> Markup:
    """Return the charts of held-out loss by timestep band: where in the noise schedule the model improved."""
    heading = tag("h2", "Loss by timestep")
    held_out = run.metrics.validation["held_out"]
    num_bands = max((len(point.loss_by_timestep) for point in held_out), default=0)
    points = [point for point in held_out if num_bands > 1 and len(point.loss_by_timestep) == num_bands]
    if len(points) < 2:
        text = "This chart needs at least two validations with several timestep bands (see validate.every_epochs)."
        return tag("section", heading, empty_state(text), id="timesteps")
    first, last, best = points[0], points[-1], best_validation(points)
    worse = [] if is_one_picture(points) else [_worse(first, point) for point in dict.fromkeys((best, last))]
    note = (
        f"The noise schedule is divided into {num_bands} equal bands. At 0 % the image is almost clean and the model "
        "learns fine detail; at 100 % it is almost pure noise and the model learns composition." + _averaged(run)
    )
    return tag(
        "section",
        heading,
        tag("p", " ".join(filter(None, worse))) if any(worse) else None,
        figure_grid(_by_band(first, best, last), None if is_one_picture(points) else _change_by_band(run, points)),
        tag("p", note, class_="note"),
        id="timesteps",
    )


def schedule_section(run: RunFolder) -> Markup:
    """Return the charts of learning rate, gradient norm, throughput and memory."""
    metrics, stages, note = run.metrics, _stages(run), None
    steps = _steps(metrics)
    charts = []
    exact = learning_rates(run)
    if curves := _learning_rate(metrics, exact):
        if exact is None:
            text = (
                "The learning rate is drawn from the logged steps alone, because the settings in config.toml do not "
                "give that of every step, or do not agree with the log."
            )
            note = tag("p", text, class_="note")
        is_factor = bool(np.isfinite(metrics.train["effective_lr"]).any())
        title = "factor on the learning rate" if is_factor else "learning rate"
        charts.append((title, "optimizer.lr and its schedule" if is_factor else "", curves, "", False))
    if curves := _estimated_rate(metrics):
        charts.append(
            ("learning rate", "as the optimizer estimates it, times the factor", curves, "", is_wide(curves[0].y))
        )
    for column, title, detail, color, unit in (
        ("grad_norm", "gradient norm", "before clipping", "muted", ""),
        ("images_per_s", "throughput", "images/s", "amber", "images/s"),
    ):
        if curves := smoothed(metrics, column, "", color):
            charts.append((title, detail, curves, unit, False))
    if curves := smoothed(metrics, "memory_gib", "", "amber")[1:]:
        charts.append(("peak memory", "GiB, while training", [_as_line(curves[0])], "GiB", False))
    drawn = [
        chart(
            title.capitalize(),
            curves,
            table_of(curves, title=title),
            detail=detail,
            label=f"{title} over the epochs",
            unit=unit,
            stages=stages,
            marks=_marks(metrics),
            steps=steps,
            from_zero=not is_log,
            is_log=is_log,
            is_small=True,
        )
        for title, detail, curves, unit, is_log in charts
    ]
    body = figure_grid(*drawn) if drawn else empty_state(NO_STEP)
    return tag("section", tag("h2", "Learning rate, speed and memory"), body, note, id="schedule")


def band_names(num_bands: int) -> list[str]:
    """Return the range of each of num_bands equal parts of the noise schedule in per cent; 0 is the least noise."""
    edges = [round(100 * i / num_bands) for i in range(num_bands + 1)]
    return [f"{low}–{high}" for low, high in itertools.pairwise(edges)]


def smoothed(metrics: Metrics, column: str, name: str, color: str, half_width: int | None = None) -> list[Curve]:
    """Return a column of the training log as a raw curve and a smoothed one, [] if it has no value.

    Smoothed as `smooth` does with half_width, by default over about a twentieth of the run, every line by the steps
    that it averages.
    """
    epoch, values = metrics.train["epoch"], metrics.train[column]
    placed = np.isfinite(epoch)
    epoch, values, weights = epoch[placed], values[placed], steps_averaged(metrics)[placed]
    if not np.isfinite(values).any():
        return []
    half_width = half_width or max(1, len(values) // 80)
    some = evenly_chosen(len(values), MAX_SMOOTHED_POINTS)
    # the same gaps as the logged values have
    means = np.where(np.isfinite(values[some]), smooth(values, half_width, weights, some), np.nan)
    before = f"{name}, " if name else ""
    raw = thinned(values)
    return [
        Curve(f"{before}smoothed over {4 * half_width + 1:,} values", epoch[some], means, color),
        Curve(f"{before}as logged", epoch[raw], values[raw], "faint", "raw"),
    ]


def _as_line(curve: Curve) -> Curve:
    return Curve("as logged", curve.x, curve.y, "amber")


def _validation_curve(points: list[Validation], name: str, color: str, look: str) -> Curve:
    num = f" ({points[-1].num_images:,})" if points and points[-1].num_images else ""
    return Curve(name + num, [point.epoch for point in points], [point.loss for point in points], color, look)


def _stages(run: RunFolder) -> list[tuple[float, str]]:
    starts = stage_starts(run)
    return [(0.0, "stage 1"), *((epoch, f"stage {stage + 1}") for epoch, stage in starts)] if starts else []


def _marks(metrics: Metrics) -> list[tuple[float, str]]:
    """Return (epoch, words) of the newest events that are marked in the charts, in the order of their epochs."""
    known, marks = known_epochs(metrics), {}
    for event in metrics.events:
        step = number(event.get("step"))
        if event.get("event") in MARKED and 0 <= step <= metrics.last_step:
            words = marks.setdefault(float(np.interp(step, *known)), {})
            words[MARKED[event["event"]]] = None
    return [(epoch, ", ".join(words)) for epoch, words in sorted(marks.items())[-MAX_TURNS:]]


def _steps(metrics: Metrics) -> list[tuple[float, int]]:
    """Return the known pairs of epoch and step."""
    return [(epoch, int(step)) for step, epoch in zip(*known_epochs(metrics), strict=True)]


def _is_base(held_out: list[Validation]) -> bool:
    return bool(held_out) and held_out[0].step == 0


def _best_name(best: Validation) -> str:
    return f"best: epoch {format_epoch(best.epoch)}" if best.step else "best: step 0"


def _learning_rate(metrics: Metrics, exact: tuple[np.ndarray, np.ndarray] | None) -> list[Curve]:
    """Return the learning rate of every step, or, where the settings do not give it, the logged ones by stage."""
    train = metrics.train
    known = np.isfinite(train["lr"]) & np.isfinite(train["epoch"])
    if not known.any():
        return []
    if exact is not None:
        # a step's learning rate applies from the end of the step before, so the curve starts at epoch 0
        epochs, rates = np.concatenate([[0.0], exact[0]]), np.concatenate([exact[1][:1], exact[1]])
        return [Curve("of every step", epochs, rates, "accent", "steps")]
    epoch, rates, stage = (train[column][known] for column in ("epoch", "lr", "stage"))
    edges = np.flatnonzero(np.diff(stage) != 0) + 1
    if 0 < len(edges) <= MAX_STAGES:
        # no line across the boundary of two stages, where the rate jumps
        epoch = np.insert(epoch, edges, (epoch[edges - 1] + epoch[edges]) / 2)
        rates = np.insert(rates, edges, np.nan)
    return [Curve("as logged", epoch, rates, "accent")]


def _estimated_rate(metrics: Metrics) -> list[Curve]:
    """Return the learning rate that an optimizer has found itself, [] for other optimizers."""
    epoch, rates = metrics.train["epoch"], metrics.train["effective_lr"]
    known = np.isfinite(epoch) & np.isfinite(rates)
    return [Curve("as logged", epoch[known], rates[known], "accent")] if known.any() else []


def _by_band(first: Validation, best: Validation, last: Validation) -> Markup:
    """Return the chart and the table of loss by band at the first, best and last validation."""
    bands = band_names(len(first.loss_by_timestep))
    shown = [(first, f"step {first.step:,}", "muted")]
    if best.step != first.step:
        shown.append((best, f"best, epoch {format_epoch(best.epoch)}", "accent"))
    if last.step not in (best.step, first.step):
        shown.append((last, f"last, epoch {format_epoch(last.epoch)}", "amber"))
    curves = [Curve(name, range(len(bands)), point.loss_by_timestep, color, "dots") for point, name, color in shown]
    rows = [
        [f"{band} %", *(f"{point.loss_by_timestep[i]:.5f}" for point, _, _ in shown)] for i, band in enumerate(bands)
    ]
    numbers = table(["band", *(name for _, name, _ in shown)], rows, class_="figures")
    return chart(
        "Held-out loss",
        curves,
        details("Table of these values", numbers),
        detail="mean squared error",
        label=f"Held-out loss in {len(bands)} timestep bands",
        x_name="timestep, % of the noise schedule",
        ticks=bands,
        from_zero=True,
        is_log=is_wide([value for curve in curves for value in curve.y]),
        is_small=True,
    )


def _change_by_band(run: RunFolder, points: list[Validation]) -> Markup | None:
    """Return the chart of each band's change since the first validation, in per cent over the epochs."""
    first, losses = points[0], np.array([point.loss_by_timestep for point in points])
    if not (losses[0] > 0).all():
        return None
    edges = sorted({round(i) for i in np.linspace(0, losses.shape[1], min(MAX_BAND_CURVES, losses.shape[1]) + 1)})
    colors = [RAMP[i] for i in evenly_chosen(len(RAMP), len(edges) - 1)]
    curves = []
    for (low, high), color in zip(itertools.pairwise(edges), colors, strict=True):
        mean = losses[:, low:high].mean(axis=1)
        ends = [round(100 * edge / losses.shape[1]) for edge in (low, high)]
        name = f"{ends[0]}–{ends[1]} %"
        with np.errstate(over="ignore"):
            change = 100 * (mean / mean[0] - 1)
        curves.append(Curve(name, [point.epoch for point in points], change, color, "dots"))
    return chart(
        f"Change since step {first.step:,}",
        curves,
        table_of(curves, is_change=True, title="the change by timestep band"),
        detail="%, by timestep band",
        label=f"Change of held-out loss since step {first.step} by timestep band",
        unit="%",
        stages=_stages(run),
        marks=_marks(run.metrics),
        steps=_steps(run.metrics),
        is_small=True,
    )


def _averaged(run: RunFolder) -> str:
    return averages_note(run, "After step 0, validation measures") if any(run.metrics.validation.values()) else ""


def _worse(first: Validation, point: Validation) -> str:
    """Return a sentence naming the bands in which a validation is worse than the first one, "" if there are none."""
    bands = zip(band_names(len(first.loss_by_timestep)), first.loss_by_timestep, point.loss_by_timestep, strict=True)
    rises = [f"{name} % ({format_percent(100 * (now / then - 1))})" for name, then, now in bands if now > then > 0]
    where = f"At epoch {format_epoch(point.epoch)}, loss is higher than at step {first.step:,}"
    return f"{where} in {counted(len(rises), 'timestep band')}: {', '.join(rises)}." if rises else ""


def validates(run: RunFolder) -> bool:
    """Return whether the settings ask for validation, True if they do not tell."""
    asked = (
        settings_of(run.config, "validate").get("every_epochs"),
        settings_of(run.config, "data").get("validation_fraction"),
    )
    return all(number(value) != 0 for value in asked)


def _loss_note(run: RunFolder) -> str:
    metrics, notes = run.metrics, []
    loss = metrics.train["loss"]
    if metrics.validation["held_out"]:
        notes.append("The model was never trained on the held-out photographs.")
    if all(metrics.validation.values()):
        notes.append("Both validation curves use fixed noise and timesteps, so they can be compared with each other.")
    elif any(metrics.validation.values()):
        notes.append("Validation uses fixed noise and timesteps.")
    elif validates(run):
        notes.append("No validation has been logged, so this chart shows training loss only.")
    else:
        notes.append("No validation was configured, so this chart shows training loss only.")
    if any(metrics.validation.values()) and len(loss):
        notes.append("Training draws new ones at every step, so its loss cannot be compared with validation loss.")
    if num_bad := int(np.sum(~np.isfinite(loss))):
        are = "is" if num_bad == 1 else "are"
        notes.append(f"{counted(num_bad, 'logged step')} had no finite loss and {are} left out.")
    if num_bad := len(metrics.not_finite):
        are = "is" if num_bad == 1 else "are"
        notes.append(f"{counted(num_bad, 'held-out validation')} had no finite loss and {are} left out.")
    if len(loss):
        every = float(np.median(steps_averaged(metrics)))
        mean = f"Each logged value is the mean of {every:g} steps. " if every > 1 else ""
        notes.append(f"{mean}Logged values scatter widely; some may lie outside the chart.")
    if len(loss) > MAX_POINTS:
        notes.append(
            f"Of the {len(loss):,} logged values the chart holds the lowest and the highest of each of "
            f"{MAX_POINTS // 2:,} equal parts."
        )
    return " ".join(notes)


def _validation_table(held_out: list[Validation], subset: list[Validation]) -> Markup | None:
    if not held_out:
        return None
    by_step = {point.step: point for point in subset}
    best = best_validation(held_out)
    rows = []
    for point in held_out:
        trained = by_step.get(point.step)
        rows.append(
            [
                format_epoch(point.epoch) + (" · best" if point is best else ""),
                f"{point.step:,}",
                f"{point.loss:.5f}",
                f"{trained.loss:.5f}" if trained else "–",
                f"{point.loss - trained.loss:+.5f}".replace("-", "−") if trained else "–",
            ]
        )
    return details(
        f"Table of all {len(rows)} validations" if len(rows) > 1 else "The validation in numbers",
        table(["epoch", "step", "held-out loss", "loss on training photographs", "gap"], rows, class_="figures"),
    )
