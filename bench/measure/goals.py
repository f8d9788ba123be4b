"""The goals of goals.toml beside what result lines say of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.bench.core.results import newest
from safelight.bench.recipes.suite import VARIANTS
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES
from safelight.units import GIB
from safelight.untrusted import read_toml

FILE = Path(__file__).with_name("goals.toml")
UNITS = {"images_per_s": "images/s", "peak_gib": "GiB", "over_diffusers": "times"}
DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Goal:
    """A row of goals.toml, whose head explains the fields. 0 and '': not given."""

    what: str
    of: str
    base: str
    latent_size: int
    batch_sizes: Sequence[int]
    must: float
    stretch: float
    published: float = 0.0
    card: str = ""
    checkpointing: str = ""
    memory: str = ""

    @property
    def is_speed(self) -> bool:
        """Return whether more is better."""
        return self.of != "peak_gib"

    def verdict(self, measured: float | None) -> str:
        """Return stretch, must, missed, or not measured."""
        if measured is None:
            return "not measured"
        sign = 1 if self.is_speed else -1
        reached = (name for name in ("stretch", "must") if sign * measured >= sign * getattr(self, name))
        return next(reached, "missed")

    def measured(self, steps: Iterable[dict], context_gib: float) -> float | None:
        """Return the best figure of timed steps that measure this goal, None if none does.

        steps: result lines of one GPU. context_gib: memory outside torch's allocator, which the lines leave out.
        """
        lines = [line for line in steps if self._fits(line)]
        if self.of == "peak_gib":
            peaks = [line["figures"].get("peak_gib") for line in lines if self._is_ours(line)]
            return min((peak + context_gib for peak in peaks if peak is not None), default=None)
        ours = max((_images_per_s(line) for line in lines if self._is_ours(line)), default=None)
        if self.of == "images_per_s" or ours is None:
            return ours
        theirs = max((_images_per_s(x) for x in lines if x["config"]["recipe"] == DIFFUSERS), default=None)
        return ours / theirs if theirs else None

    def _fits(self, line: dict) -> bool:
        config = line["config"]
        return (
            self.card in line["machine"]["device"]
            and config["base"] == self.base
            and config["latent_size"] == self.latent_size
            and config["batch_size"] in self.batch_sizes
            and self.checkpointing in ("", config.get("checkpointing"))
            and (not self.memory or config.get("optimizer") == f"adamw8bit, {self.memory}")
        )

    def _is_ours(self, line: dict) -> bool:
        """Return whether a line is of a step of ours that trains the whole UNet."""
        options = VARIANTS.get(line["config"]["recipe"])
        return options is not None and "adapter" not in options


def _images_per_s(line: dict) -> float:
    return line["figures"]["images_per_s"][1]


def read_goals() -> list[Goal]:
    return [Goal(**row) for row in read_toml(FILE)["goal"]]


def timed_steps(records: Iterable[dict]) -> list[dict]:
    """Return the newest line of each step that was timed on a GPU."""
    return [
        record
        for record in newest(list(records)).values()
        if record["bench"] == "step"
        and "images_per_s" in record["figures"]
        and record["config"].get("device") == "cuda"
    ]


def context_gib(records: Iterable[dict]) -> float:
    """Return the GiB of a CUDA context: as `bench memory` measured it, else as plans assume."""
    found = [record.get("figures", {}).get("context_gib") for record in records if record["bench"] == "memory"]
    found = [value for value in found if isinstance(value, float)]
    return found[-1] if found else CONTEXT_BYTES / GIB
