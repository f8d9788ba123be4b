"""The runs of a page that shows several: their short names and colours, and how far their figures can be compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from safelight.trainer.report.chart import DISTINCT
from safelight.trainer.report.markup import Markup, join, shorten, tag
from safelight.trainer.report.run_reader import RunFolder, number
from safelight.trainer.report.settings_table import Settings, differing, settings_of
from safelight.untrusted import UnsafeFile, path_in, read_json_object

MAX_LABEL_CHARACTERS = 48
MAX_SPLIT_BYTES = 2**26
# settings that decide what a held-out loss measures; all of [loss] does too
LOSS_SETTINGS = (
    *("run.seed", "model.vae", "model.clip_skip", "data.resolution", "data.upscale", "data.max_aspect"),
    *("data.caption_suffix", "data.caption_chunks", "validate.timesteps", "validate.max_images"),
)


@dataclass(frozen=True)
class ShownRun:
    """A run of the page. label: what it is called there, unlike all others. index: its place, which has a colour."""

    run: RunFolder
    label: str
    index: int

    @property
    def color(self) -> str:
        return DISTINCT[self.index % len(DISTINCT)]

    @property
    def is_dashed(self) -> bool:
        """Whether its colour is that of another run, so that its curves are dashed."""
        return self.index >= len(DISTINCT)

    @cached_property
    def settings(self) -> Settings:
        return settings_of(self.run)

    @cached_property
    def held_out(self) -> frozenset[str] | None:
        """The names of the photographs held out of training, which contain a hash of each; None if unknown."""
        return self._split.get("validation")

    @cached_property
    def photographs(self) -> object:
        """What tells the run's photographs from another's: their names, else name and size of the dataset; or None."""
        if self._split.keys() >= {"train", "validation"}:
            return self._split["train"] | self._split["validation"]
        data = self.run.data or {}
        name, num = data.get("dataset"), number(data.get("num_photos"))
        return (name, num) if name and num >= 0 else None

    @cached_property
    def _split(self) -> dict[str, frozenset[str]]:
        try:
            split = read_json_object(path_in(self.run.path, "split.json"), MAX_SPLIT_BYTES)
        except (UnsafeFile, OSError):
            return {}
        return {
            key: frozenset(name for name in names if isinstance(name, str))
            for key, names in split.items()
            if isinstance(names, list)
        }

    @property
    def name(self) -> Markup:
        """The label behind a dot of the run's colour."""
        circle = f'<circle class="f-{self.color}" cx="5" cy="5" r="5"/>'
        dot = Markup(f'<svg class="dot" viewBox="0 0 10 10" aria-hidden="true">{circle}</svg>')
        return join(dot, tag("span", self.label, dir="auto"))


def shown_runs(runs: Sequence[RunFolder]) -> list[ShownRun]:
    """Return the runs with their labels: their titles; with their folders where titles are equal."""
    titles = [shorten(" ".join(run.title.split()), MAX_LABEL_CHARACTERS) for run in runs]
    paths = [run.path.resolve() for run in runs]
    shared = os.path.commonpath([path.parent for path in paths])
    folders = [os.path.relpath(path, shared) for path in paths]
    labels = [
        title if titles.count(title) == 1 else folder if title == folder else f"{title} ({folder})"
        for title, folder in zip(titles, folders, strict=True)
    ]
    return [ShownRun(run, label, index) for index, (run, label) in enumerate(zip(runs, labels, strict=True))]


def loss_caveat(runs: Sequence[ShownRun]) -> str:
    """Return whether the held-out losses of these runs measure the same thing, in words."""
    own = [
        name for name in differing([one.settings for one in runs]) if name in LOSS_SETTINGS or name.startswith("loss.")
    ]
    why = [f"these settings decide what it measures and differ: {', '.join(own)}"] if own else []
    if hold_out_others(runs):
        why.append("the runs hold out different photographs")
    if len({one.run.base for one in runs}) > 1:
        why.append("the base models differ, and may predict other things or have other autoencoders")
    if why:
        said = f"Held-out loss cannot be compared between all of these runs: {'; '.join(why)}."
        return f"{said} Compare each run with its own base instead."
    if any(one.held_out is None or not one.settings for one in runs):
        return "Held-out losses can be compared if the runs hold out the same photographs, which is not known here."
    return "Held-out loss is measured alike in all of these runs: same photographs, noise and timesteps."


def hold_out_others(runs: Sequence[ShownRun]) -> bool:
    """Return whether runs are known to hold out different photographs."""
    return len({one.held_out for one in runs if one.held_out is not None}) > 1
