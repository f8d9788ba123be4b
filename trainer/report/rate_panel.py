"""The report's section on the learning rate test that `safelight train --find-lr` made of the run."""

from __future__ import annotations

import itertools
import math

from safelight.text import counted
from safelight.trainer.report.chart import Curve, chart, is_wide
from safelight.trainer.report.markup import Markup, details, kept_together, shorten, table, tag
from safelight.trainer.report.rate_test_record import SURENESS, RateTest
from safelight.trainer.report.run_reader import RunFolder, number, rows_of, table_of

# a loss far above the first one says nothing but that training broke, and would flatten the rest of the curve
MAX_SHOWN = 1.25
ADVICE = (
    "A proposal is advice: every rate was tried for a few steps, and a run trains at its rate for much longer. For a "
    "long run, or few photographs, the lower end of the range is the safer one."
)


def rate_section(run: RunFolder) -> Markup | None:
    """Return what the test proposed, beside what the run was trained with, and its curve; None without a test."""
    test = run.rate_test
    if test is None:
        return None
    steps = counted(test.steps_per_rate, "step")
    how = (
        f"Measured on {shorten(test.measured_on, 200)}, after {steps} at each rate with "
        f"{shorten(test.optimizer, 40)} at batch size {_batch(test.batch_size, test.accumulate)}. {ADVICE}"
    )
    return tag(
        "section",
        tag("h2", "Learning rate test"),
        tag("p", kept_together(proposed(test))),
        *(tag("p", kept_together(text)) for text in _beside_the_run(run, test)),
        _chart(test),
        tag("p", how, class_="note"),
        id="rate-test",
    )


def proposed(test: RateTest) -> str:
    """Return in sentences what was proposed, how sure that is, and why."""
    proposal, reason = test.proposal, shorten(test.proposal.reason, 400)
    if proposal.rate is None:
        return f"safelight train --find-lr proposed no rate: {reason}."
    return (
        f"safelight train --find-lr proposed {proposal.rate:.2g} ({SURENESS[proposal.sureness]}): {reason}. Rates from "
        f"{proposal.low:.2g} to {proposal.high:.2g} are about as good."
    )


def _beside_the_run(run: RunFolder, test: RateTest) -> list[str]:
    """Return how the run's own settings compare with the proposal, as far as they are known."""
    said, proposal = [], test.proposal
    rate = _setting(run, "optimizer", "lr")
    if proposal.rate is not None and rate > 0:
        factor = rate / proposal.rate
        how = (
            "which is among them"
            if proposal.low <= rate <= proposal.high
            else f"{max(factor, 1 / factor):.2g} times {'higher' if factor > 1 else 'lower'} than proposed"
        )
        said.append(f"This run trained with optimizer.lr {rate:.2g}, {how}.")
    own = table_of(run.config, "optimizer").get("name")
    sizes = _setting(run, "train", "batch_size"), _setting(run, "train", "accumulate")
    is_other = isinstance(own, str) and own != test.optimizer
    if is_other or (all(map(math.isfinite, sizes)) and sizes != (test.batch_size, test.accumulate)):
        batch = f" at batch size {_batch(*sizes)}" if all(map(math.isfinite, sizes)) else ""
        said.append(
            f"The test is of other settings than the run: it trained with {shorten(own or 'unknown', 40)}{batch}."
        )
    return said


def _setting(run: RunFolder, section: str, name: str) -> float:
    """Return a number that the first stage trained with, NaN if it is unknown."""
    for stage in rows_of(run.config, "stage")[:1]:
        if name in stage:
            return number(stage[name])
    return number(table_of(run.config, section).get(name))


def _batch(size: float, accumulate: float) -> str:
    return f"{size:g}" if accumulate == 1 else f"{size:g} x {accumulate:g}"


def _chart(test: RateTest) -> Markup:
    first, proposal = test.first_loss, test.proposal
    most = MAX_SHOWN * first if first else math.inf
    places = list(range(len(test.rates)))
    measured = [math.nan if loss is None or loss > most else loss for loss in test.losses]
    curves = [Curve("after training at this rate", places, measured, look="dots")]
    if first is not None:
        curves.append(Curve("before the test", places, [first] * len(places), "muted", look="dashed"))
    spans, ring = [], None
    if proposal.rate is not None:
        low, at, high = (_place(test.rates, rate) for rate in (proposal.low, proposal.rate, proposal.high))
        spans = [(low, high, "about as good")]
        ring = (at, _between(measured, at), f"proposed {proposal.rate:.2g}")
    rows = [
        (f"{rate:.2g}", *("not finite" if loss is None else f"{loss:.5g}" for loss in losses))
        for rate, *losses in zip(test.rates, test.losses, test.training, strict=True)
    ]
    head = ("learning rate", "loss after it", "training loss at it")
    return chart(
        "Loss after training at a rising rate",
        curves,
        details("Table of all rates", table(head, rows, "all rates", class_="figures")),
        detail="mean squared error",
        label="Loss after training at rising learning rates",
        note=_cut_note(test, measured),
        x_name="learning rate",
        ticks=[f"{rate:.2g}".replace("e-0", "e-") for rate in test.rates],
        spans=spans,
        ring=ring,
        is_log=is_wide(measured),
    )


def _cut_note(test: RateTest, measured: list[float]) -> str:
    num = sum(not math.isfinite(loss) for loss in measured)
    if not num:
        return ""
    return (
        f"Not drawn: {counted(num, 'rate')} after which the loss is over {MAX_SHOWN:g} times the first, or not finite."
    )


def _place(rates: tuple[float, ...], rate: float) -> float:
    """Return where a rate lies on an axis on which the tried rates are 0, 1, 2, ..., by its logarithm."""
    if rate <= rates[0]:
        return 0.0
    for place, (low, high) in enumerate(itertools.pairwise(rates)):
        if rate <= high:
            return place + math.log(rate / low) / math.log(high / low)
    return float(len(rates) - 1)


def _between(values: list[float], place: float) -> float:
    """Return the value at a place between two, on the line through them."""
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
