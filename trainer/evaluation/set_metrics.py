"""The metrics of the base, checkpoints and real photographs, as the records that the report shows.

The estimators are in trainer/metrics; here is which of them are computed of what, and what their figures mean in plain
words. Metrics that need more pictures than there are, are named as not computed, with what they lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from safelight.trainer.metrics.clip_score import clip_score
from safelight.trainer.metrics.diversity import diversity, seed_diversity
from safelight.trainer.metrics.frechet import frechet
from safelight.trainer.metrics.frechet import warning as frechet_warning
from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.kid import kid, kid_difference
from safelight.trainer.metrics.mmd import SetDifference, cmmd, cmmd_difference
from safelight.trainer.metrics.neighbours import expected_coverage, neighbours
from safelight.trainer.metrics.paired import paired_difference
from safelight.trainer.metrics.resampling import TooFewPictures, halves, mean_interval
from safelight.trainer.report.evaluation import Difference, Estimate, Metric

BASE, REAL = "base", "real"
# of drawn pictures or photographs; below it every figure of whole sets is mostly noise
FEW = 50


@dataclass(frozen=True)
class Features:
    """The features of all pictures by one extractor. name: the extractor's, for people. id: a short one, for records.

    real: of the photographs, (N, D). drawn: model -> (M, D), row i of all of one prompt and noise. groups: of their
    rows. texts: of the prompts, (M, D), if the extractor reads texts too.
    """

    name: str
    id: str
    real: np.ndarray
    real_groups: Sequence[str]
    drawn: Mapping[str, np.ndarray]
    groups: Sequence[str]
    texts: np.ndarray | None = None

    @property
    def num(self) -> int:
        return len(self.groups)


def metrics_of(features: Features, is_inception: bool = False) -> tuple[list[Metric], list[str]]:
    """Return the metrics by one extractor, and a line for each that there are too few pictures for."""
    found: list[Metric] = []
    lacking: list[str] = []

    def add(title: str, compute: Callable[[], Metric]) -> None:
        try:
            found.append(compute())
        except TooFewPictures as error:
            lacking.append(f"{title}, {features.name}: {error}")

    add("KID", partial(_kid, features))
    if features.texts is not None:
        add("CMMD", partial(_cmmd, features))
        add("CLIPScore", partial(_clip_score, features))
    add("density", partial(_density, features))
    add("coverage", partial(_coverage, features))
    add("FID" if is_inception else "Fréchet distance", partial(_frechet, features, is_inception))
    return found, lacking


def _few(features: Features) -> str:
    num = min(features.num, len(features.real))
    return f"Only {num} pictures on one side: a rough figure." if num < FEW else ""


def _by_model(
    features: Features, measure: Callable[[np.ndarray, np.ndarray, Sequence[str], Sequence[str]], Interval]
) -> tuple[tuple[Estimate, ...], Estimate | None]:
    """Return each model's figure against the photographs, and that of two halves of the photographs."""
    values = tuple(
        _estimate(model, measure(features.real, drawn, features.real_groups, features.groups), features.num)
        for model, drawn in features.drawn.items()
    )
    first, second = halves(len(features.real), features.real_groups)
    groups = np.array(features.real_groups, dtype=object)
    try:
        level = measure(features.real[first], features.real[second], list(groups[first]), list(groups[second]))
    except TooFewPictures:
        return values, None
    return values, _estimate(REAL, level, len(second))


def _estimate(model: str, interval: Interval, num: int) -> Estimate:
    return Estimate(model=model, value=interval.value, low=interval.low, high=interval.high, num=num)


def _set_differences(features: Features, measure: Callable[..., SetDifference]) -> tuple[Difference, ...]:
    """Return each trained model's figure minus the base's. Whole sets have no wins and losses by prompt."""
    differences = []
    for model, drawn in features.drawn.items():
        if model == BASE or BASE not in features.drawn:
            continue
        found = measure(features.real, features.drawn[BASE], drawn, features.real_groups, features.groups)
        value, low, high = found.interval
        differences.append(
            Difference(model=model, value=value, low=low, high=high, p=found.p, wins=0, ties=0, losses=0)
        )
    return tuple(differences)


def _of_sets(
    features: Features, kind: str, values: tuple[Estimate, ...], real: Estimate | None, **texts: object
) -> Metric:
    """Return the record of a metric of whole sets, with a warning if a set is small."""
    return Metric(
        **{"warning": _few(features), **texts},
        id=f"{kind}_{features.id}",
        features=features.name,
        values=values,
        real=real,
    )


def _kid(features: Features) -> Metric:
    return _of_sets(
        features,
        "kid",
        *_by_model(features, kid),
        title="KID × 1000",
        meaning="How far the drawn pictures are from your photographs as a whole; 0: they cannot be told apart.",
        better="lower",
        differences=_set_differences(features, kid_difference),
    )


def _cmmd(features: Features) -> Metric:
    return _of_sets(
        features,
        "cmmd",
        *_by_model(features, cmmd),
        title="CMMD",
        meaning="As KID, by what CLIP sees, which follows content more than texture; 0 means no difference.",
        better="lower",
        differences=_set_differences(features, cmmd_difference),
    )


def _frechet(features: Features, is_inception: bool) -> Metric:
    # halves of the photographs are fewer pictures than a model drew: their distance is more biased, and no level
    values, _ = _by_model(features, frechet)
    return _of_sets(
        features,
        "frechet",
        values,
        None,
        title="FID" if is_inception else "Fréchet distance",
        meaning="The best-known distance between drawn pictures and photographs. It needs thousands of pictures.",
        better="lower",
        warning=frechet_warning(min(features.num, len(features.real))),
    )


def _density(features: Features) -> Metric:
    return _of_sets(
        features,
        "density",
        *_by_model(features, lambda *sets: neighbours(*sets).density),
        title="Density",
        meaning="How typical the drawn pictures are: how often they lie where your photographs crowd.",
        better="higher",
    )


def _coverage(features: Features) -> Metric:
    values, _ = _by_model(features, lambda *sets: neighbours(*sets).coverage)
    perfect = expected_coverage(len(features.real), features.num)
    return _of_sets(
        features,
        "coverage",
        values,
        _estimate(REAL, Interval(perfect, perfect, perfect), features.num),
        title="Coverage",
        meaning="How much of the photographs' variety is drawn: the share of them with a drawn picture near.",
        better="higher",
    )


def _clip_score(features: Features) -> Metric:
    scores = {model: clip_score(drawn, features.texts) for model, drawn in features.drawn.items()}
    metric = _paired(
        scores,
        features.groups,
        "higher",
        id=f"clip_score_{features.id}",
        title="CLIPScore",
        meaning="How well each picture fits its prompt. Compare it with what photographs reach with their captions.",
        features=features.name,
    )
    # photographs whose captions are among the prompts
    row_of = {prompt: row for row, prompt in enumerate(features.groups)}
    places = [place for place, group in enumerate(features.real_groups) if group in row_of]
    texts = features.texts[[row_of[features.real_groups[place]] for place in places]]
    try:
        level = mean_interval(clip_score(features.real[places], texts))
    except TooFewPictures:
        return metric
    return metric.model_copy(update={"real": _estimate(REAL, level, len(places))})


def _paired(
    scores: Mapping[str, np.ndarray], groups: Sequence[str], better: Literal["higher", "lower"], **texts: str
) -> Metric:
    """Return a metric of single pictures: the means of models, and their differences from the base by prompt."""
    values, differences = [], []
    for model, score in scores.items():
        values.append(_estimate(model, mean_interval(score, groups, texts["id"][:16]), len(score)))
        if model != BASE and BASE in scores:
            found = paired_difference(scores[BASE], score, groups, better, texts["id"][:16])
            value, low, high = found.interval
            differences.append(
                Difference(
                    model=model,
                    value=value,
                    low=low,
                    high=high,
                    p=found.p,
                    wins=found.wins,
                    ties=found.ties,
                    losses=found.losses,
                )
            )
    return Metric(better=better, values=tuple(values), differences=tuple(differences), **texts)


def diversity_metric(
    drawn: Mapping[str, np.ndarray], real: np.ndarray | None, groups: Sequence[str], features: str
) -> list[Metric]:
    """Return how different pictures of different prompts are, and pictures of one prompt if it has several seeds.

    drawn: LPIPS distances between a model's pictures, (M, M), in which pictures of one prompt follow each other.
    real: between photographs, (N, N). Raises TooFewPictures.
    """
    prompts = list(dict.fromkeys(groups))
    first = [groups.index(prompt) for prompt in prompts]
    values = tuple(
        _estimate(model, diversity(distances[np.ix_(first, first)]), len(first)) for model, distances in drawn.items()
    )
    metrics = [
        Metric(
            id="diversity",
            title="Diversity (LPIPS)",
            meaning="How different pictures of different prompts look. Far below the photographs' means that the model "
            "draws everything alike; above it is no better, as noise and faults differ from picture to picture too.",
            better="",
            features=features,
            values=values,
            real=None if real is None else _estimate(REAL, diversity(real), len(real)),
        )
    ]
    if len(prompts) < len(groups):
        spread = {model: seed_diversity(distances, groups) for model, distances in drawn.items()}
        metrics.append(
            _paired(
                spread,
                [prompt for prompt in prompts if list(groups).count(prompt) > 1],
                "higher",
                id="seed_diversity",
                title="Diversity of seeds (LPIPS)",
                meaning="How different the pictures of one prompt look. A model that copies draws them alike.",
                features=features,
            )
        )
    return metrics
