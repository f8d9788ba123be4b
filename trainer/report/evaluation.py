"""RUN/evaluation.json: what `safelight evaluate` measured. Evaluation writes it, the report shows it.

"Models" are the base and checkpoints, by the ids of comparison.py. Intervals are bootstrap intervals at 95 %.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from safelight.trainer.report.comparison import MAX_MODELS, Count, FileName, ModelId, Record, Text

Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(max_length=200)]
# the name of these features in every run, whichever autoencoder it has
OWN_AUTOENCODER = "the run's autoencoder"
# what stands for photographs where a model is named
REAL = "real"
# what the burn check looks for, as people call it
Fault = Literal["burnt", "smoothed"]
FAULTS: dict[Fault, str] = {"burnt": "burnt", "smoothed": "smoothed out"}
# one-sided: a difference that is as likely as this by chance decides nothing
NOISE, NOISE_Z = 0.025, 1.96
MAX_METRICS = 100
MAX_CLASSES = 400
MAX_POINTS = 20_000
MAX_SHOWN_PICTURES = 200
MAX_SETS = 1000


class EvaluatedModel(Record):
    """A model that was measured. held_out_loss: None if the run did not validate at that step."""

    id: ModelId
    step: Count
    epoch: Annotated[float, Field(ge=0, le=1e9)]
    held_out_loss: Number | None = None


class Estimate(Record):
    """A model's value of a metric with its interval, over `num` pictures. model: an id; "real" for photographs."""

    model: Name
    value: Number
    low: Number
    high: Number
    num: Count


class Difference(Record):
    """A model minus the base, per prompt, averaged. p: of a sign-flip permutation test, two-sided.

    wins, ties, losses: prompts for which the model is better, equal and worse.
    """

    model: ModelId
    value: Number
    low: Number
    high: Number
    p: Share
    wins: Count
    ties: Count
    losses: Count


class Metric(Record):
    """A metric over all models. meaning: one plain sentence. features: what the pictures were compared by.

    better: which way is better, '' if neither. warning: why the figure is to be read with care. real: of real
    photographs among themselves, the level that a perfect model reaches.
    """

    id: Annotated[str, Field(max_length=60, pattern=r"^[a-z0-9_]+$")]
    title: Name
    meaning: Text
    better: Literal["lower", "higher", ""]
    features: Name = ""
    warning: Text = ""
    values: Annotated[tuple[Estimate, ...], Field(max_length=MAX_MODELS)]
    real: Estimate | None = None
    differences: Annotated[tuple[Difference, ...], Field(max_length=MAX_MODELS)] = ()


class ClassDivergence(Record):
    """The divergence of one class of crops between two sets, after subtracting the permutations' mean.

    name: of the class, "all" for the pooled headline. num_first, num_second: crops. kl: in nats. z, p: of the
    permutations. mmd, mmd_z, mmd_p: the same for the squared maximum mean discrepancy. is_grey: 20 to 49 crops in a
    set, too few for a figure to be trusted.
    """

    name: Name
    num_first: Count
    num_second: Count
    kl: Number
    z: Number
    p: Share
    mmd: Number
    mmd_z: Number
    mmd_p: Share | None = None
    is_grey: bool = False


class SetDivergence(Record):
    """KL(first, second). The sets are BM (base's images), TM (trained model's) and OD (original data)."""

    first: Literal["BM", "TM", "OD"]
    second: Literal["BM", "TM", "OD"]
    pooled: ClassDivergence | None
    classes: Annotated[tuple[ClassDivergence, ...], Field(max_length=MAX_CLASSES)] = ()


class CropGain(Record):
    """How much further from photographs the trained model's crops lie than the base's: below 0, they are nearer.

    value: KL(OD, TM) - KL(OD, BM), pooled. z, p: of permutations that exchange base and trained model; p two-sided.
    """

    value: Number
    z: Number
    p: Share


class CropPoint(Record):
    """A crop on the map: the first two principal components of its features."""

    x: Number
    y: Number
    set: Literal["BM", "TM", "OD"]
    name: Name


class CropDivergence(Record):
    """Crops of things that a detector found, compared. model: of TM. sentence: the result for a layman.

    gain: whether TM is nearer to OD than BM is; None if there are too few crops.
    """

    model: ModelId
    detector: Name
    features: Name
    divergences: Annotated[tuple[SetDivergence, ...], Field(max_length=6)]
    gain: CropGain | None = None
    sentence: Text
    points: Annotated[tuple[CropPoint, ...], Field(max_length=MAX_POINTS)] = ()


class BurnScores(Record):
    """Burn scores of one set of pictures: quantiles 5, 25, 50, 75 and 95 % of each score.

    model: an id, "real" for photographs. share_*: of the pictures above a score's limit, which a real photograph
    exceeds with a probability of at most 2.5 % (with fewer than 39 photographs: 1 / (n + 1)). *_interval: of the share,
    low and high. is_*: more pictures are above the limit than chance explains. *_p: the probability of at least as many
    more prompts above the limit than by the base at the same cfg if training changed nothing; None if not compared.
    """

    model: Name
    cfg: Number
    num: Count
    burnt: Annotated[tuple[Number, ...], Field(min_length=5, max_length=5)]
    smoothed: Annotated[tuple[Number, ...], Field(min_length=5, max_length=5)]
    share_burnt: Share
    share_smoothed: Share
    burnt_interval: tuple[Share, Share] | None = None
    smoothed_interval: tuple[Share, Share] | None = None
    is_burnt: bool = False
    is_smoothed: bool = False
    burnt_p: Share | None = None
    smoothed_p: Share | None = None


def is_worse_than_base(own: BurnScores, base: BurnScores, score: Fault) -> bool:
    """Return whether a model has a larger share of burnt or smoothed-out pictures than the base at the same cfg.

    Beyond noise: by the test prompt by prompt if there was one, else by both counts, as far as they are known.
    """
    if getattr(own, f"share_{score}") <= getattr(base, f"share_{score}"):
        return False
    p = getattr(own, f"{score}_p")
    if p is None:
        return _z(own, base, score) > NOISE_Z
    return p < NOISE


def _z(own: BurnScores, base: BurnScores, score: Fault) -> float:
    """Return by how many standard errors two shares differ."""
    num = own.num + base.num
    both = (num_over(own, score) + num_over(base, score)) / num if num else 0.0
    if not 0 < both < 1 or not own.num or not base.num:
        return 0.0
    error = math.sqrt(both * (1 - both) * (1 / own.num + 1 / base.num))
    return (getattr(own, f"share_{score}") - getattr(base, f"share_{score}")) / error


def num_over(scores: BurnScores, score: Fault) -> int:
    """Return how many pictures of a set are above a score's limit."""
    return round(getattr(scores, f"share_{score}") * scores.num)


class ShownPicture(Record):
    """A picture to show. file: in RUN/compare. score: why it is shown. why: what makes its score, in words."""

    file: FileName
    model: Name
    prompt: Text
    score: Number
    cfg: Number | None = None
    why: Name = ""


class Burn(Record):
    """How burnt and how smoothed out pictures are, against real photographs.

    sets: empty if it cannot be judged, which the sentence explains. limit_*: scores above which a picture counts.
    """

    sets: Annotated[tuple[BurnScores, ...], Field(max_length=MAX_SETS)]
    worst_burnt: Annotated[tuple[ShownPicture, ...], Field(max_length=MAX_SHOWN_PICTURES)] = ()
    worst_smoothed: Annotated[tuple[ShownPicture, ...], Field(max_length=MAX_SHOWN_PICTURES)] = ()
    limit_burnt: Number | None = None
    limit_smoothed: Number | None = None
    sentence: Text


class NearestPhoto(Record):
    """A drawn picture beside the training photograph most like it. photo: a small copy in RUN/evaluation.

    similarity: cosine of their features. base_similarity: of what the base drew for the same prompt and that
    photograph. is_flagged: above the limit. is_mirrored: it resembles the photograph's mirror image.
    """

    file: FileName
    model: ModelId
    prompt: Text
    photo: FileName
    similarity: Number
    base_similarity: Number | None = None
    is_flagged: bool
    is_mirrored: bool = False


class Memorisation(Record):
    """Drawn pictures that resemble a training photograph more than held-out photographs do.

    limit: the similarity above which a picture is flagged; 1, which nothing exceeds, if it cannot be judged. chance:
    the probability that a picture which copies nothing is flagged. num_flagged: per model. num: pictures of a model.
    memorised: models whose flagged pictures neither chance nor the base explains.
    """

    features: Name
    limit: Number
    num_flagged: dict[ModelId, Count]
    num: Count
    chance: Share | None = None
    memorised: Annotated[tuple[ModelId, ...], Field(max_length=MAX_MODELS)] = ()
    pairs: Annotated[tuple[NearestPhoto, ...], Field(max_length=MAX_SHOWN_PICTURES)] = ()
    sentence: Text


class Suggestion(Record):
    """The checkpoint to use. reasons: one plain clause each."""

    model: ModelId
    sentence: Text
    reasons: Annotated[tuple[Text, ...], Field(max_length=20)] = ()


class Evaluation(Record):
    """Everything that was measured. not_computed: one line for each thing that could not be, and what it lacks.

    num_real: photographs that the pictures were compared with. steps ... sampler: how the pictures were drawn.
    """

    models: Annotated[tuple[EvaluatedModel, ...], Field(max_length=MAX_MODELS)]
    num_prompts: Count
    num_real: Count
    width: Count
    height: Count
    num_steps: Count
    cfg: Number
    sampler: Name
    metrics: Annotated[tuple[Metric, ...], Field(max_length=MAX_METRICS)] = ()
    crops: Annotated[tuple[CropDivergence, ...], Field(max_length=MAX_MODELS)] = ()
    burn: Burn | None = None
    memorisation: Memorisation | None = None
    suggestion: Suggestion | None = None
    not_computed: Annotated[tuple[Text, ...], Field(max_length=MAX_METRICS)] = ()
