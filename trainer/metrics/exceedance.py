"""Whether more of the judged values are large than chance explains, with no assumption on their distribution.

The limit is one of the reference's own values. If judged and reference values were drawn alike, the judged ones would
lie among the largest of all in every order with equal probability, which gives exact probabilities for any number of
values (Rosenbaum 1954, "Tables for a nonparametric test of location").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, gammaln

from safelight.trainer.metrics.interval import Interval


@dataclass(frozen=True)
class Limit:
    """A value that few of the reference exceed. num: of the reference. num_above: of them, above the limit."""

    value: float
    num: int
    num_above: int

    @property
    def chance(self) -> float:
        """The probability that a further value of the reference's kind lies above the limit."""
        return (self.num_above + 1) / (self.num + 1)


def upper_limit(reference: np.ndarray, chance: float) -> Limit:
    """Return the limit that a further value exceeds with at most this probability, from (N,) values.

    Fewer than 1 / chance - 1 values cannot say where that is. Then the limit is the largest, and `Limit.chance`, which
    is 1 / (N + 1), tells what it is worth. Raises ValueError without values.
    """
    num = len(reference)
    if not num:
        raise ValueError("no values to take a limit from")
    rank = min(num - 1, math.ceil((1 - chance) * (num + 1) - 1e-9) - 1)
    return Limit(float(np.sort(reference)[rank]), num, num - 1 - rank)


def exceedance_p(num_over: int, num: int, limit: Limit) -> float:
    """Return the probability that at least num_over of num values of the reference's kind exceed the limit.

    That is: of the num_over + num_above largest values of both kinds, at least num_over are judged ones, which is
    hypergeometric.
    """
    if num_over == 0:
        return 1.0
    drawn, total = num_over + limit.num_above, limit.num + num
    low, high = max(num_over, drawn - limit.num), min(drawn, num)
    log_all = _log_choose(total, drawn)
    terms = [_log_choose(num, k) + _log_choose(limit.num, drawn - k) - log_all for k in range(low, high + 1)]
    return min(1.0, float(np.exp(terms).sum()))


def sign_p(num_more: int, num: int) -> float:
    """Return the probability that at least num_more of num differences are positive if either sign is as likely."""
    return sum(math.comb(num, k) for k in range(num_more, num + 1)) / 2**num


def share_interval(num_over: int, num: int) -> Interval:
    """Return a share with its 95 % interval (Clopper and Pearson 1934), which covers at least that often."""
    low = betaincinv(num_over, num - num_over + 1, 0.025) if num_over else 0.0
    high = betaincinv(num_over + 1, num - num_over, 0.975) if num_over < num else 1.0
    return Interval(num_over / num, float(low), float(high))


def _log_choose(num: int, chosen: int) -> float:
    return float(gammaln(num + 1) - gammaln(chosen + 1) - gammaln(num - chosen + 1))
