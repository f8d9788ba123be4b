"""Two scores of a picture, "burnt" and "smoothed out", against real photographs.

Each measure of picture_measures.py becomes z: how many spreads of the photographs it lies beyond their median, towards
harm. A score is sqrt(sum of max(z, 0)^2) over its measures. For normal measures with that spread this is the
likelihood-ratio statistic of "like the photographs" against "moved in at least one harmful way, by any amount in each"
(Kudo 1963, "A multivariate analogue of the one-sided test", with an identity covariance). So no weight is chosen and
no damaged picture is needed to fit it, which is why it does not know the damages that it is validated on. One measure
far out is enough, and one that errs on the harmless side cannot hide another, as it does in a sum.

The photographs are the run's own, at the size of the pictures that are judged. Median and spread (1.4826 times the
median absolute deviation) are theirs, so a model that learnt faded prints, grey or hard pictures is measured against
such pictures. Both are robust: a few odd photographs do not move them.

The limit of a score needs no distribution: it is one of the photographs' own scores, each computed without that
photograph (`upper_limit`). A further photograph exceeds each of the two limits with a probability of at most 2.5 %, so
that it is called burnt or smoothed out with at most 5 %. That takes 39 photographs; with fewer the limit is the largest
score, which a further photograph exceeds with probability 1 / (n + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safelight.trainer.metrics.exceedance import Limit, upper_limit
from safelight.trainer.metrics.picture_measures import MEASURES

# which measures harm when they rise, and which when they fall
SIGNS = {
    "burnt": {"clipped": 1, "colour": 1, "contrast": 1, "halo": 1},
    "smoothed": {"slope": -1, "detail": -1, "halo": -1},
}
# spreads of photographs that are all alike are taken as this: what is less cannot be seen
_MIN_SPREAD = {"clipped": 0.7, "colour": 0.2, "contrast": 0.2, "halo": 0.1, "detail": 0.2, "slope": 0.2}
# in spreads; more says nothing more, and keeps damaged figures from overflowing
_MAX_HARM = 1e6
# the probability that a photograph exceeds the limit of a score
CHANCE = 0.025
# with fewer, it would be more than 5 %
MIN_PHOTOGRAPHS = 19


@dataclass(frozen=True)
class BurnScale:
    """What photographs look like. medians, spreads: (6,), of MEASURES. limits: of each score, for `is_over`.

    scores: the photographs' own, each measured against the others: name -> (N,).
    """

    medians: np.ndarray
    spreads: np.ndarray
    limits: dict[str, Limit]
    scores: dict[str, np.ndarray]

    def score(self, name: str, measures: np.ndarray) -> np.ndarray:
        """Return a score of pictures, (N,) float64; 0: no measure lies beyond the photographs' median.

        name: "burnt" or "smoothed". measures: (N, 6), rows of `measure`.
        """
        return _score(SIGNS[name], measures, self.medians, self.spreads)

    def is_over(self, name: str, measures: np.ndarray) -> np.ndarray:
        """Return whether each picture's score is above the limit: (N,) bool."""
        return self.score(name, measures) > self.limits[name].value

    def main_measures(self, name: str, measures: np.ndarray) -> list[str]:
        """Return the measure of each picture that counts most in its score, "" where none does."""
        harms = _harms(SIGNS[name], measures, self.medians, self.spreads)
        names = list(SIGNS[name])
        return [names[i] if row[i] > 0 else "" for row, i in zip(harms, harms.argmax(1), strict=True)]


def fit_scale(measures: np.ndarray) -> BurnScale:
    """Return the scale of photographs. measures: (N, 6), rows of `measure`.

    Raises ValueError for fewer than MIN_PHOTOGRAPHS: their limit would be exceeded too often.
    """
    num = len(measures)
    if num < MIN_PHOTOGRAPHS:
        raise ValueError(f"{num} photographs are too few for a limit; at least {MIN_PHOTOGRAPHS} are needed")
    medians, spreads = _centre(measures)
    scores = {name: np.empty(num) for name in SIGNS}
    for i in range(num):
        others = _centre(np.delete(measures, i, axis=0))
        for name, signs in SIGNS.items():
            scores[name][i] = _score(signs, measures[i : i + 1], *others)[0]
    return BurnScale(medians, spreads, {name: upper_limit(s, CHANCE) for name, s in scores.items()}, scores)


def _centre(measures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (medians, spreads) of the columns; a column without numbers has the median NaN and never counts."""
    medians, spreads = np.full(len(MEASURES), np.nan), np.array([_MIN_SPREAD[name] for name in MEASURES])
    for i, column in enumerate(measures.T):
        numbers = column[np.isfinite(column)]
        if len(numbers):
            medians[i] = np.median(numbers)
            spreads[i] = max(spreads[i], 1.4826 * np.median(np.abs(numbers - medians[i])))
    return medians, spreads


def _harms(signs: dict[str, int], measures: np.ndarray, medians: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    columns = [MEASURES.index(name) for name in signs]
    z = (measures[:, columns] - medians[columns]) / spreads[columns] * np.array(list(signs.values()))
    return np.clip(np.nan_to_num(z, nan=0.0), 0, _MAX_HARM)


def _score(signs: dict[str, int], measures: np.ndarray, medians: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    return np.sqrt((_harms(signs, measures, medians, spreads) ** 2).sum(1))
