"""RUN/find_lr/result.json: the loss after training at rising learning rates, and the rate that follows from it.

`safelight train --find-lr` writes it; plan and report read it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from safelight.trainer.report.comparison import Count, Record

NAME = "find_lr/result.json"
MAX_RATES = 400
# as in run_reader.py
MAX_LOSS = 1e15

Rate = Annotated[float, Field(gt=0, le=1e6)]
# null: not finite
Loss = Annotated[float, Field(ge=0, le=MAX_LOSS)] | None
Losses = Annotated[tuple[Loss, ...], Field(max_length=MAX_RATES)]
# as trainer/metrics/rate_range.py has it
Sureness = Literal["clear", "weak", "guess", "none"]
# how sure a proposed rate is
SURENESS: dict[Sureness, str] = {
    "clear": "clear: the fall is far above the scatter of the curve",
    "weak": "weak: the fall is little above the scatter of the curve, or has no end",
    "guess": "a guess: the curve has no fall",
}


class ProposedRate(Record):
    """rate: None if there is none. low, high: of the rates that are about as good. reason: a sentence's part."""

    rate: Rate | None
    low: Rate | None
    high: Rate | None
    sureness: Sureness
    reason: Annotated[str, Field(max_length=400)]

    @model_validator(mode="after")
    def _all_or_none(self) -> ProposedRate:
        known = [value for value in (self.low, self.rate, self.high) if value is not None]
        if len(known) not in (0, 3) or known != sorted(known) or (self.sureness == "none") != (not known):
            raise ValueError("rate, low and high do not go together")
        return self


class RateTest(Record):
    """A range test and what follows from it.

    rates, losses: of each rate, in ascending order. training: mean training loss at each. first_loss: before the
    first. measured_on: which photographs the losses are of. options: how `safelight train` takes the proposed rate,
    '' if there is none.
    """

    version: Literal[1] = 1
    optimizer: Annotated[str, Field(max_length=40)]
    batch_size: Count
    accumulate: Count
    steps_per_rate: Count
    measured_on: Annotated[str, Field(max_length=200)]
    first_loss: Loss
    rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=MAX_RATES)]
    losses: Losses
    training: Losses
    proposal: ProposedRate
    options: Annotated[str, Field(max_length=200)]

    @model_validator(mode="after")
    def _equally_long(self) -> RateTest:
        if not len(self.rates) == len(self.losses) == len(self.training):
            raise ValueError("rates, losses and training are not equally long")
        if any(a >= b for a, b in pairwise(self.rates)):
            raise ValueError("rates do not ascend")
        return self

    def to_json(self) -> str:
        """Return the content of result.json."""
        return self.model_dump_json(indent=1) + "\n"
