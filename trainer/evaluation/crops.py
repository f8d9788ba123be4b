"""Crops of the things that a detector finds in the base's, the trained model's and real pictures, compared.

Boxes are kept by the hashes of picture and detector, so that a second call looks at no picture again. How crops are
compared is in trainer/metrics/crop_divergence.py; docs/metrics.md says when not to trust it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.captioning.caption_dataset import HalvedBatches
from safelight.trainer.captioning.journal import Journal
from safelight.trainer.evaluation.pictures import Picture
from safelight.trainer.evaluation.wording import said_p
from safelight.trainer.features.cache import FeatureCache
from safelight.trainer.metrics.crop_divergence import (
    LEAST,
    Beyond,
    Crops,
    Divergence,
    NothingVaries,
    common_classes,
    compare,
    gain,
    largest_of_each,
    merge_rare,
    project,
)
from safelight.trainer.report.evaluation import (
    MAX_CLASSES,
    ClassDivergence,
    CropDivergence,
    CropGain,
    CropPoint,
    SetDivergence,
)
from safelight.trainer.report.figures import Z, form_of_kl
from safelight.trainer.tagging.boxes import Box
from safelight.trainer.tagging.taggers import TaggerSource

# a DETR of transformers; facebook/detr-resnet-50 itself needs timm's layers, which are not used here
DEFAULT_DETECTOR = "PekingU/rtdetr_v2_r18vd"
MIN_CONFIDENCE = 0.3
# what of its surroundings a crop shows, on each side, as a share of the box's longer side
PADDING = 0.1
# width and height of a box as shares of the picture's: what is smaller has no detail to compare
MIN_SHARE = 1 / 16
MAX_MAP_POINTS = 6000
SIGNIFICANT = 0.05
# stands for how a crop is cut, in the keys of its features
_CROP = "crop, version 1"
_BATCH = 16


def find_crops(
    pictures: Sequence[Picture],
    detector: TaggerSource,
    features: FeatureCache,
    device: torch.device,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Crops:
    """Return the features of one set's crops: of each class and group, the largest.

    features: of the extractor that describes crops; those of known crops are not computed again. device: of the
    detector. folder: in which boxes are kept; it is made. progress: called with the pictures that were looked at and
    all that were not known. say: called when the GPU's memory is full. Raises UserError.
    """
    boxes = _find_boxes(pictures, detector, device, folder, progress, say)
    found = [(picture, box) for picture in pictures for box in boxes[picture.sha256] if _is_used(box)]
    names, groups = [box.name for _, box in found], [picture.group for picture, _ in found]
    sizes = [(box.right - box.left) * (box.bottom - box.top) for _, box in found]
    kept = largest_of_each(names, groups, sizes)
    last: list[tuple[Picture, Image.Image]] = []

    def load(place: int) -> Image.Image:
        picture, box = found[kept[place]]
        if not last or last[0][0] is not picture:
            last[:] = [(picture, picture.decode())]
        image = last[0][1]
        return image.crop(crop_area(box, image.size))

    keys = [f"{found[row][0].sha256} {_CROP} {_corners(found[row][1])}" for row in kept]
    return Crops(features.features(keys, load), *([of[row] for row in kept] for of in (names, groups, sizes)))


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.top, box.right, box.bottom


def _is_used(box: Box) -> bool:
    is_large = min(box.right - box.left, box.bottom - box.top) >= MIN_SHARE
    return is_large and box.confidence >= MIN_CONFIDENCE


def crop_area(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of a box's crop in pixels of a picture of some size.

    The box grows by PADDING, and to a square of what surrounds it. Where that is larger than the picture it is cut, and
    where it reaches over an edge it is moved inside.
    """
    corners = np.array([[box.left, box.top], [box.right, box.bottom]]) * size
    side = (corners[1] - corners[0]).max() * (1 + 2 * PADDING)
    extent = np.minimum(np.maximum(np.round(side), 1), size).astype(int)
    start = np.clip(np.round(corners.mean(axis=0) - extent / 2).astype(int), 0, np.array(size) - extent)
    return (*start.tolist(), *(start + extent).tolist())


def _find_boxes(pictures, detector, device, folder, progress, say) -> dict[str, list[Box]]:
    """Return the boxes in each picture, by its hash: from the journal, or found now and added to it."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, detector.record, pictures, detector.form)
    todo = list({picture.sha256: picture for picture in pictures if picture.sha256 not in journal.said}.values())
    if not todo:
        return journal.said
    tagger = detector.build(device)
    halved = HalvedBatches(tagger.device, None, say, "choose a smaller detector, or add --device cpu")
    for start in range(0, len(todo), _BATCH):
        progress(start, len(todo))
        batch = todo[start : start + _BATCH]
        images = [picture.decode() for picture in batch]
        journal.add(batch, halved.run(len(images), lambda part, images=images: tagger.look(images[part])))
    progress(len(todo), len(todo))
    return journal.said


def compare_crops(model: str, real: Crops, base: Crops, trained: Crops, detector: str, features: str) -> CropDivergence:
    """Return how far crops of photographs, of the base and of a trained model lie apart.

    model: the trained model's id. detector, features: what found and what describes the crops, for people.
    Raises UserError if the features of all crops are equal.
    """
    real, base, trained = merge_rare([real, base, trained])
    try:
        real, base, trained = project([real, base, trained])
    except NothingVaries:
        if len(real.names) + len(base.names) + len(trained.names) > 1:
            raise UserError(f"{features} finds no difference between any crops; use another extractor") from None
    sets = {"BM": base, "TM": trained, "OD": real}
    weights = common_classes((real, base, trained))
    divergences = []
    for first, second in (("BM", "TM"), ("OD", "TM"), ("OD", "BM")):
        pooled, classes = compare(sets[first], sets[second], weights)
        divergences.append(
            SetDivergence(
                first=first,
                second=second,
                pooled=_record(pooled) if pooled else None,
                classes=tuple(map(_record, classes[:MAX_CLASSES])),
            )
        )
    change = gain(real, base, trained, weights) if weights else None
    return CropDivergence(
        model=model,
        detector=detector,
        features=features,
        divergences=tuple(divergences),
        gain=CropGain(**asdict(change)) if change else None,
        sentence=sentence(*(each.pooled for each in divergences), change, sets),
        points=_points(sets),
    )


def _record(divergence: Divergence) -> ClassDivergence:
    kl, mmd = divergence.kl, divergence.mmd
    return ClassDivergence(
        name=divergence.name,
        num_first=divergence.num_first,
        num_second=divergence.num_second,
        kl=kl.value,
        z=kl.z,
        p=kl.p,
        mmd=mmd.value,
        mmd_z=mmd.z,
        mmd_p=mmd.p,
        is_grey=divergence.is_grey,
    )


def _points(sets: dict[str, Crops]) -> tuple[CropPoint, ...]:
    """Return the crops on the map; of too many every n-th."""
    every = sum(len(crops.names) for crops in sets.values()) // MAX_MAP_POINTS + 1
    return tuple(
        CropPoint(
            x=round(float(vector[0]), 3), y=round(float(vector[1]), 3) if len(vector) > 1 else 0.0, set=key, name=name
        )
        for key, crops in sets.items()
        for vector, name in list(zip(crops.features, crops.names, strict=True))[::every]
    )


def sentence(
    change: ClassDivergence | None,
    to_trained: ClassDivergence | None,
    to_base: ClassDivergence | None,
    difference: Beyond | None,
    sets: dict[str, Crops],
) -> str:
    """Return the result in words that need no statistics; what is no more than chance is not called a difference.

    change, to_trained, to_base: pooled divergences from base to trained model, and from photographs to each.
    difference: whether the trained model is nearer to photographs. sets: the crops, for their numbers.
    """
    if change is None or to_trained is None or to_base is None or difference is None:
        photographs, base, trained = (counted(len(sets[key].names), "thing") for key in ("OD", "BM", "TM"))
        return (
            f"Too few things were found for a comparison: {photographs} in your photographs, {base} in the base's "
            f"pictures and {trained} in the trained model's; each needs {LEAST} of one kind, or of all rarer kinds."
        )
    # below chance is no divergence
    kl, kl_trained, kl_base = (max(0.0, one.kl) for one in (change, to_trained, to_base))
    form = form_of_kl([kl, kl_trained, kl_base])
    numbers = f"{form.show(kl_trained)} against {form.show(kl_base)}"
    test = f"z {Z.show(difference.z)}, {said_p(difference.p)}"
    if difference.p <= SIGNIFICANT:
        way = "less" if difference.value < 0 else "more"
        text = (
            f"Things in the trained model's pictures differ from those in your photographs {way} than the base's do: "
            f"{numbers} ({test})"
        )
        if way == "more":
            text += "; in this respect training made the pictures worse"
        elif to_trained.p > SIGNIFICANT:
            text += "; what difference is left is no more than chance gives"
    elif min(to_trained.p, to_base.p) > SIGNIFICANT:
        text = (
            "Neither in the trained model's pictures nor in the base's do things differ from those in your photographs "
            f"more than chance gives: {numbers} ({test})"
        )
    else:
        text = (
            "Things in the trained model's pictures are about as far from those in your photographs as the base's: "
            f"{numbers} ({test})"
        )
    if difference.p > SIGNIFICANT:
        if change.p <= SIGNIFICANT:
            text += f"; yet training did change them ({form.show(kl)}, z {Z.show(change.z)}, {said_p(change.p)})"
        else:
            text += "; no change by training is seen"
    if change.is_grey or to_trained.is_grey or to_base.is_grey:
        text += ". That is from few pictures: take it as a hint"
    return text + "."
