"""The names of what a run measures: one list for metrics.jsonl, TensorBoard and W&B.

metrics.jsonl is the record: a line has a kind, a step and values. On the boards a value's name is `kind/name`, with the
split behind it for validation: `train/loss`, `train/memory_gib`, `validation/loss/held_out`. Units are part of names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from safelight.text import shortened


@dataclass(frozen=True)
class MetricName:
    """A value of a line. kind: of the line. unit: in words, '' for none. meaning: what it is."""

    kind: str
    name: str
    unit: str
    meaning: str


METRICS = (
    MetricName("train", "loss", "", "mean training loss of the steps since the last line, skipped ones left out"),
    MetricName("train", "lr", "", "learning rate of the last step"),
    MetricName("train", "text_lr", "", "the text encoder's learning rate, while it is trained"),
    MetricName("train", "grad_norm", "", "mean norm of the gradients before clipping, skipped steps left out"),
    MetricName("train", "images_per_s", "images/s", "training speed, validation and sampling left out"),
    MetricName("train", "memory_gib", "GiB", "peak memory so far: reserved on the GPU, resident on a CPU"),
    MetricName("train", "epoch", "epochs", "epochs trained so far, with decimals"),
    MetricName("validation", "loss", "", "loss of the held-out or of as many training photographs, with fixed noise"),
    MetricName("validation", "epoch", "epochs", "epochs trained so far, with decimals"),
)
# of validation/loss by ranges of timesteps, of which there are validate.timesteps
BANDS = "loss_by_timestep"
# of settings and pictures on the boards
SETTINGS, SAMPLES = "settings", "samples"
MAX_TAG_CHARS = 80


def scalars_of(row: dict) -> dict[str, float]:
    """Return the board's name -> value of a line of metrics.jsonl: its floats, and the losses by timestep.

    Bands are numbered from the least noise: validation/loss_by_timestep_1_of_4/held_out.
    """
    kind, suffix = row["kind"], f"/{row['split']}" if "split" in row else ""
    named = {f"{kind}/{name}{suffix}": value for name, value in row.items() if isinstance(value, float)}
    named.pop(f"{kind}/time{suffix}", None)
    bands = row.get(BANDS) or []
    for number, loss in enumerate(bands, 1):
        named[f"{kind}/{BANDS}_{number}_of_{len(bands)}{suffix}"] = float(loss)
    return named


def sample_tag(number: int, stem: str, prompt: str) -> str:
    """Return the board's name of a sampled picture: samples/02 a red barn-cfg9. stem: as of SampledPicture."""
    words = " ".join(re.sub(r"[^\w ,.()'-]+", " ", prompt).split())
    return f"{SAMPLES}/{number:02d} {shortened(words, MAX_TAG_CHARS)}{stem}"


def hparams_of(tables: dict) -> dict[str, bool | int | float | str]:
    """Return dotted name -> value of a config's tables, as boards list hyperparameters; lists as text."""
    flat = {name: value for name, value in tables.items() if value and not isinstance(value, dict)}
    for table, values in tables.items():
        if isinstance(values, dict):
            flat |= {f"{table}.{name}": value for name, value in values.items()}
    return {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in flat.items()}
