"""Which models draw burnt or smoothed-out pictures, from what `trainer/metrics/burn.py` measures.

The photographs should have passed through what the drawn pictures did not escape: the same size, crop and file format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from safelight.text import counted
from safelight.trainer.evaluation.wording import listed, model_name
from safelight.trainer.metrics.burn import MIN_PHOTOGRAPHS, BurnScale, fit_scale
from safelight.trainer.metrics.exceedance import exceedance_p, share_interval, sign_p
from safelight.trainer.metrics.picture_measures import MEASURES, VERSION, measure
from safelight.trainer.report.evaluation import MAX_SHOWN_PICTURES, Burn, BurnScores, ShownPicture

ScoreName = Literal["burnt", "smoothed"]
SCORES: tuple[ScoreName, ...] = ("burnt", "smoothed")
BASE = "base"
NOT_SHOWN = -(2.0**20)
# pictures shown of a set and score
NUM_WORST = 6
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# the probability that any set of pictures is called burnt or smoothed out by chance
CHANCE_OF_A_CLAIM = 0.01
# with fewer pictures only a strong effect shows
NUM_FOR_A_WEAK_EFFECT = 50
WHY = {
    ("burnt", "clipped"): "clipped channels",
    ("burnt", "colour"): "strong colours",
    ("burnt", "contrast"): "hard contrast",
    ("burnt", "halo"): "halos beside edges",
    ("smoothed", "slope"): "weak high frequencies",
    ("smoothed", "detail"): "little fine detail",
    ("smoothed", "halo"): "soft edges",
}


class PictureMeasures:
    """What is measured of a picture as its features, for the same store as those of other extractors.

    The store keeps finite numbers only: a figure that a picture does not show is NOT_SHOWN, and NaN in `measures_of`.
    """

    name = "picture measures"
    fingerprint = f"picture-measures-{VERSION}"
    width = len(MEASURES)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the measures of RGB pictures: (N, 6), fp32."""
        rows = [measure(np.asarray(image.convert("RGB"))) for image in images]
        return np.nan_to_num(np.array(rows, np.float32).reshape(-1, self.width), nan=NOT_SHOWN)


def measures_of(features: np.ndarray) -> np.ndarray:
    """Return the measures of pictures, (N, 6), NaN for what one does not show, from their features."""
    return np.where(features == NOT_SHOWN, np.nan, features)


@dataclass(frozen=True)
class PictureSet:
    """Pictures of a model at a cfg. files: in RUN/compare. measures: (N, 6). All have N items."""

    model: str
    cfg: float
    files: Sequence[str]
    prompts: Sequence[str]
    measures: np.ndarray


def judge_burn(
    photographs: np.ndarray,
    sets: Sequence[PictureSet],
    names: Mapping[str, str] | None = None,
    num_photographs: int | None = None,
) -> Burn:
    """Return how burnt and how smoothed out sets of pictures are.

    photographs: measures of the run's own, (N, 6). names: of the models, for the sentence; by default their steps.
    num_photographs: how many the run has, of which these were taken; by default as many.
    """
    if len(photographs) < MIN_PHOTOGRAPHS:
        return Burn(
            sets=(),
            sentence=f"Whether pictures are burnt or smoothed out cannot be judged: that takes at least "
            f"{MIN_PHOTOGRAPHS} real photographs to compare with, and there are {len(photographs)}.",
        )
    sets = [pictures for pictures in sets if len(pictures.measures)]
    scale = fit_scale(photographs)
    least_p = CHANCE_OF_A_CLAIM / (len(SCORES) * max(1, len(sets)))
    real = _scores("real", 0.0, {name: scale.scores[name] for name in SCORES}, scale, least_p=None)
    bases = {pictures.cfg: pictures for pictures in sets if pictures.model == BASE}
    judged = [
        _scores(p.model, p.cfg, {name: scale.score(name, p.measures) for name in SCORES}, scale, least_p).model_copy(
            update=_against_base(p, bases.get(p.cfg), scale)
        )
        for p in sets
    ]
    return Burn(
        sets=(real, *judged),
        worst_burnt=_worst("burnt", scale, sets),
        worst_smoothed=_worst("smoothed", scale, sets),
        limit_burnt=scale.limits["burnt"].value,
        limit_smoothed=scale.limits["smoothed"].value,
        sentence=_sentence(judged, scale, names or {}, num_photographs or len(photographs))
        if judged
        else "No drawn pictures were there to be judged.",
    )


def _scores(
    model: str, cfg: float, scores: dict[ScoreName, np.ndarray], scale: BurnScale, least_p: float | None
) -> BurnScores:
    values: dict = {}
    for name, of_pictures in scores.items():
        limit = scale.limits[name]
        num_over = int((of_pictures > limit.value).sum())
        share, low, high = share_interval(num_over, len(of_pictures))
        values[name] = tuple(float(value) for value in np.quantile(of_pictures, QUANTILES))
        values[f"share_{name}"] = share
        values[f"{name}_interval"] = (low, high)
        values[f"is_{name}"] = least_p is not None and exceedance_p(num_over, len(of_pictures), limit) < least_p
    return BurnScores(model=model, cfg=cfg, num=len(scores["burnt"]), **values)


def _against_base(own: PictureSet, base: PictureSet | None, scale: BurnScale) -> dict[str, float]:
    """Return the p of each score: that by chance so many more prompts than by the base are above its limit."""
    if base is None or base is own or list(base.prompts) != list(own.prompts):
        return {}
    found = {}
    for name in SCORES:
        more = scale.is_over(name, own.measures).astype(int) - scale.is_over(name, base.measures)
        by_prompt: dict[str, int] = {}
        for prompt, difference in zip(own.prompts, more.tolist(), strict=True):
            by_prompt[prompt] = by_prompt.get(prompt, 0) + difference
        signs = [value > 0 for value in by_prompt.values() if value]
        found[f"{name}_p"] = sign_p(sum(signs), len(signs))
    return found


def _worst(name: ScoreName, scale: BurnScale, sets: Sequence[PictureSet]) -> tuple[ShownPicture, ...]:
    """Return the worst pictures of each set, of all sets by falling score."""
    shown = []
    for pictures in sets:
        scores = scale.score(name, pictures.measures)
        reasons = scale.main_measures(name, pictures.measures)
        shown += [
            ShownPicture(
                file=pictures.files[place],
                model=pictures.model,
                prompt=pictures.prompts[place],
                score=float(scores[place]),
                cfg=pictures.cfg,
                why=WHY.get((name, reasons[place]), ""),
            )
            for place in np.argsort(-scores, kind="stable")[:NUM_WORST]
        ]
    return tuple(sorted(shown, key=lambda picture: -picture.score)[:MAX_SHOWN_PICTURES])


def _sentence(judged: Sequence[BurnScores], scale: BurnScale, names: Mapping[str, str], num_photographs: int) -> str:
    parts = [
        _part("burnt", "burnt", [(_name(s, judged, names), s.share_burnt, s.num, s.is_burnt) for s in judged]),
        _part(
            "smoothed",
            "smoothed out",
            [(_name(s, judged, names), s.share_smoothed, s.num, s.is_smoothed) for s in judged],
        ),
    ]
    parts.append(_fitted(scale, num_photographs))
    fewest = min(scores.num for scores in judged)
    if fewest < NUM_FOR_A_WEAK_EFFECT:
        parts.append(f"A set of {counted(fewest, 'picture')} is small: only a strong effect would show.")
    return " ".join(parts)


def _fitted(scale: BurnScale, num_photographs: int) -> str:
    """Return what the limits were fitted to, and how many of those photographs they flag."""
    num = scale.limits["burnt"].num
    of = f", evenly chosen from {num_photographs:,}" if num < num_photographs else ""
    burnt, smoothed = (int((scale.scores[name] > scale.limits[name].value).sum()) for name in SCORES)
    chance = max(scale.limits[name].chance for name in SCORES)
    return (
        f"The limits are fitted to this run's own photographs: of {num:,}{of}, each scored against the others, "
        f"{burnt:,} are above the limit for burnt and {smoothed:,} above that for smoothed out, so that a further "
        f"photograph is above either with a probability of at most {100 * chance:.2g} %."
    )


def _part(name: str, word: str, sets: Sequence[tuple[str, float, int, bool]]) -> str:
    """sets: (name, share, number of pictures, whether there are more than chance explains)."""
    over = [_count(model, share, num) for model, share, num, is_more in sets if is_more]
    if over:
        within = [model for model, _, _, is_more in sets if not is_more]
        others = f" ({'not' if len(within) == 1 else 'none of'} {listed(within)})" if 0 < len(within) <= 4 else ""
        return f"More pictures look {word} than among the run's own photographs: {listed(over)}{others}."
    model, share, num, _ = max(sets, key=lambda values: values[1])
    if share == 0:
        return f"No picture looks {word}."
    return f"No more pictures look {word} than chance explains: at most {_count(model, share, num)}."


def _count(model: str, share: float, num: int) -> str:
    return f"{round(share * num)} of {num} by {model}"


def _name(scores: BurnScores, judged: Sequence[BurnScores], names: Mapping[str, str]) -> str:
    name = names.get(scores.model) or model_name(scores.model)
    return name if len({other.cfg for other in judged}) == 1 else f"{name} at cfg {scores.cfg:g}"
