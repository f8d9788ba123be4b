"""The report's sections with graphs: loss, loss by timestep, learning rate, speed and memory."""

import json
import math

import numpy as np

from safelight.text import counted
from safelight.trainer.report.course import learning_rates, stage_starts
from safelight.trainer.report.facts import (
    best_validation,
    evenly_chosen,
    format_epoch,
    format_percent,
    over_fitting_verdict,
)
from safelight.trainer.report.markup import Markup, details, empty_state, table, tag
from safelight.trainer.report.plots import (
    Frame,
    band_names,
    learning_rate_graph,
    loss_graph,
    small_graph,
    smoothed_loss,
    timestep_graph,
)
from safelight.trainer.report.run_reader import Metrics, RunFolder, Validation, averages_note
from safelight.trainer.report.svg import to_svg

MAX_READ_OUT_POINTS = 300


def loss_section(run: RunFolder) -> Markup:
    """Return the loss graph, the verdict on overfitting, and all validations as a table."""
    metrics, starts = run.metrics, stage_starts(run)
    heading = tag("h2", "Loss")
    held_out, subset = metrics.validation["held_out"], metrics.validation["train_subset"]
    if not len(metrics.train["loss"]) and len(held_out) < 2:
        known = f" The base model's held-out loss is {held_out[0].loss:.4f}." if held_out else ""
        return tag("section", heading, empty_state(f"No training step has been logged yet.{known}"), id="loss")
    best = best_validation(held_out)
    label = "Training and validation loss over the epochs"
    if best:
        label += f"; held-out loss is lowest at epoch {format_epoch(best.epoch)} ({best.loss:.4f})"
    drawings, frames = [], {}
    for name, narrow in (("wide", False), ("narrow", True)):
        figure, frame = loss_graph(metrics, best, starts, narrow)
        drawings.append(to_svg(figure, f"loss-{name}", label, name))
        frames[name] = frame
    graph = tag(
        "figure",
        _legend(metrics),
        drawings,
        tag("output", "", class_="readout"),
        tag("figcaption", _loss_note(metrics) + _averaged(run)),
        class_="wide",
        data_series=_read_out(metrics, frames),
    )
    verdict = over_fitting_verdict(held_out, subset)
    return tag(
        "section",
        heading,
        tag("p", verdict.text, class_="alert" if verdict.is_warning else None),
        graph,
        _validation_table(held_out, subset),
        id="loss",
    )


def timestep_section(run: RunFolder) -> Markup:
    """Return the graph of held-out loss by timestep band: where in the noise schedule the model improved."""
    heading = tag("h2", "Loss by timestep")
    held_out = run.metrics.validation["held_out"]
    num_bands = max((len(point.loss_by_timestep) for point in held_out), default=0)
    points = [point for point in held_out if num_bands > 1 and len(point.loss_by_timestep) == num_bands]
    if len(points) < 2:
        text = "This graph needs at least two validations with several timestep bands (see validate.every_epochs)."
        return tag("section", heading, empty_state(text), id="timesteps")
    best = best_validation(points)
    label = f"Held-out loss in {num_bands} timestep bands, and its change from step {points[0].step}"
    drawings = [
        to_svg(timestep_graph(points, best, narrow), f"timestep-{name}", label, name)
        for name, narrow in (("wide", False), ("narrow", True))
    ]
    first, last = points[0], points[-1]
    legend = [(("muted", False), f"step {first.step}")]
    if best.step != first.step:
        legend.append((("accent", False), f"best, epoch {format_epoch(best.epoch)}"))
    if last.step not in (best.step, first.step):
        legend.append((("amber", False), f"last, epoch {format_epoch(last.epoch)}"))
    worse = [text for text in (_worse(points[0], point) for point in dict.fromkeys((best, last))) if text]
    note = (
        f"The noise schedule is divided into {num_bands} equal bands. At 0 % the image is almost clean and the model "
        "learns fine detail; at 100 % it is almost pure noise and the model learns composition. "
        + (f"Each tick is the upper end of its band: {', '.join(band_names(num_bands))} %." if num_bands > 5 else "")
    ).rstrip() + _averaged(run)
    return tag(
        "section",
        heading,
        tag("p", " ".join(worse)) if worse else None,
        tag(
            "figure",
            _legend_list(legend, "grey bars: worse than at step 0" if worse else ""),
            drawings,
            tag("figcaption", note),
            class_="wide",
        ),
        id="timesteps",
    )


def schedule_section(run: RunFolder) -> Markup:
    """Return the graphs of learning rate, gradient norm, throughput and memory."""
    metrics, starts, drawn, note = run.metrics, stage_starts(run), [], None
    smoothing = max(1, len(metrics.train["step"]) // 80)
    has_epoch = np.isfinite(metrics.train["epoch"])
    if (has_epoch & np.isfinite(metrics.train["lr"])).any():
        exact = learning_rates(run)
        if exact is None:
            text = (
                "The learning rate is drawn from the logged steps alone, "
                "because the settings in config.toml do not agree with the log."
            )
            note = tag("p", text, class_="note")
        figure = learning_rate_graph(metrics, starts, exact, "learning rate")
        drawn.append(tag("figure", to_svg(figure, "lr", "learning rate over the epochs")))
    for column, title, color, half_width in (
        ("grad_norm", "gradient norm, before clipping", "muted", smoothing),
        ("images_per_s", "throughput (images/s)", "amber", smoothing),
        ("memory_gib", "peak memory (GiB)", "amber", 0),
    ):
        if (has_epoch & np.isfinite(metrics.train[column])).any():
            figure = small_graph(metrics, starts, column, title, color, half_width)
            drawn.append(tag("figure", to_svg(figure, column.replace("_", "-"), f"{title} over the epochs")))
    body = tag("div", drawn, class_="graphs") if drawn else empty_state("No training step has been logged yet.")
    return tag("section", tag("h2", "Learning rate, speed and memory"), body, note, id="schedule")


def _averaged(run: RunFolder) -> str:
    return averages_note(run, "After step 0, validation measures") if any(run.metrics.validation.values()) else ""


def _worse(first: Validation, point: Validation) -> str:
    """Return a sentence naming the bands in which a validation is worse than the first one, "" if there are none."""
    bands = zip(band_names(len(first.loss_by_timestep)), first.loss_by_timestep, point.loss_by_timestep, strict=True)
    rises = [f"{name} % ({format_percent(100 * (now / then - 1))})" for name, then, now in bands if now > then > 0]
    where = f"At epoch {format_epoch(point.epoch)}, loss is higher than at step {first.step:,}"
    return f"{where} in {counted(len(rises), 'timestep band')}: {', '.join(rises)}." if rises else ""


def _legend(metrics: Metrics) -> Markup:
    _, width = smoothed_loss(metrics)
    items = []
    if len(metrics.train["loss"]):
        items += [
            (("faint", False), "training, as logged"),
            (("muted", False), f"training, smoothed over {width} points"),
        ]
    for split, color, dashed, name in (
        ("held_out", "accent", False, "held-out photographs, never trained on"),
        ("train_subset", "amber", True, "fixed subset of the training photographs"),
    ):
        points = metrics.validation[split]
        if points:
            num = f" ({counted(points[-1].num_images, 'image')})" if points[-1].num_images else ""
            items.append(((color, dashed), name + num))
    return _legend_list(items)


def _legend_list(items: list[tuple[tuple[str, bool], str]], bar: str = "") -> Markup:
    """Return a graph's legend: an entry per line, and one for its grey bars if `bar` names them."""
    rows = []
    for (color, dashed), text in items:
        dash = ' stroke-dasharray="6 3"' if dashed else ""
        line = f'<path class="s-{color}" stroke-width="3"{dash} d="M0 5H24"/>'
        rows.append(tag("li", Markup(f'<svg viewBox="0 0 24 10" aria-hidden="true">{line}</svg>'), text))
    if bar:
        block = '<rect class="f-muted" x="7" width="10" height="10"/>'
        rows.append(tag("li", Markup(f'<svg viewBox="0 0 24 10" aria-hidden="true">{block}</svg>'), bar))
    return tag("ul", rows, class_="legend")


def _loss_note(metrics: Metrics) -> str:
    notes = []
    loss = metrics.train["loss"]
    if all(metrics.validation.values()):
        notes.append("Both validation curves use fixed noise and timesteps, so they can be compared with each other.")
    elif any(metrics.validation.values()):
        notes.append("Validation uses fixed noise and timesteps.")
    else:
        notes.append("No validation was configured, so this graph shows training loss only.")
    if any(metrics.validation.values()) and len(loss):
        notes.append("Training draws new ones at every step, so its loss cannot be compared with validation loss.")
    num_bad = int(np.sum(~np.isfinite(loss)))
    if num_bad:
        are = "is" if num_bad == 1 else "are"
        notes.append(f"{counted(num_bad, 'logged step')} had no finite loss and {are} left out.")
    if len(loss):
        notes.append("The loss of single steps varies widely; some values lie outside the graph.")
    return " ".join(notes)


def _read_out(metrics: Metrics, frames: dict[str, Frame]) -> str:
    smoothed, _ = smoothed_loss(metrics)
    train = list(zip(metrics.train["epoch"].tolist(), metrics.train["step"].tolist(), smoothed.tolist(), strict=True))
    series = [("training (smoothed)", [train[i] for i in evenly_chosen(len(train), MAX_READ_OUT_POINTS)])]
    series += [
        (name, [(point.epoch, point.step, point.loss) for point in metrics.validation[split]])
        for split, name in (("held_out", "held out"), ("train_subset", "training photographs"))
    ]
    # JSON has no NaN: with one of them a browser would reject the whole text
    finite = [
        {
            "name": name,
            "points": [
                [round(e, 3), int(s), round(v, 6)] for e, s, v in points if math.isfinite(e) and math.isfinite(v)
            ],
        }
        for name, points in series
    ]
    boxes = {name: {key: round(value, 3) for key, value in vars(frame).items()} for name, frame in frames.items()}
    return json.dumps({"series": finite, "frames": boxes}, separators=(",", ":"))


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
        table(["epoch", "step", "held-out loss", "loss on training photographs", "gap"], rows),
    )
