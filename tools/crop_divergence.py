"""Measure what the crop divergence says of photographs that are changed on purpose, and of unchanged ones.

    python -m tools.crop_divergence PHOTOS DETECTOR FEATURES [--same-boxes] [--append FILE]

PHOTOS: a folder of .jpg files. DETECTOR: as for `safelight caption --tags-from-detector`. FEATURES: what describes the
crops, an .onnx file or a CLIP or DINOv2 of transformers.

Again and again the photographs are split at random into two halves, and the second half is changed: contrast and
colour are strengthened, or it is blurred. The change comes first, so that it also changes what the detector finds. For
each change the mean and the standard deviation over the splits are printed; unchanged halves have z near 0.

--same-boxes instead looks for things in the unchanged photographs alone, so that nothing gets lost by a change. It
also prints what other definitions say: all kinds taken as one, of which a photograph gives one crop, and
KL(changed || unchanged).
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from safelight.bench.core.results import append, make_record
from safelight.trainer.evaluation.crops import MIN_CONFIDENCE, find_crops
from safelight.trainer.evaluation.pictures import Picture
from safelight.trainer.features.cache import FeatureCache
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.metrics.crop_divergence import (
    Crops,
    common_classes,
    compare,
    largest_of_each,
    merge_rare,
    project,
)
from safelight.trainer.tagging.taggers import open_detector

# photographs are shrunk to what a model of Stable Diffusion 1.5 draws
LONGEST_SIDE_PX = 512
NUM_SPLITS, NUM_PERMUTATIONS = 40, 200
CPU = torch.device("cpu")


def strengthened(factor: float, image: Image.Image) -> Image.Image:
    return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(factor)).enhance(factor)


def blurred(radius: float, image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    **{f"contrast and colour x {factor}": partial(strengthened, factor) for factor in (1.25, 1.5, 2, 3)},
    **{f"blur, radius {radius}": partial(blurred, radius) for radius in (1, 2)},
}


@dataclass(frozen=True)
class Definition:
    """kinds: whether each is compared by itself. is_reversed: KL(changed || unchanged) instead of the other way."""

    kinds: Literal["each", "as one"] = "each"
    is_reversed: bool = False


DEFINITIONS = (Definition(), Definition("as one"), Definition("as one", is_reversed=True))


def pictures_of(paths: Sequence[Path], change: str, same_boxes: bool) -> list[Picture]:
    """Return photographs with a change. same_boxes: their boxes are kept for all changes alike."""

    def load(path: Path) -> Image.Image:
        with Image.open(path) as image:
            shrunk = image.convert("RGB")
        shrunk.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX), Image.Resampling.LANCZOS)
        return CHANGES[change](shrunk)

    def digest(path: Path) -> str:
        return hashlib.sha256(path.name.encode() if same_boxes else f"{change} {path.name}".encode()).hexdigest()

    return [Picture(digest(path), path.name, partial(load, path)) for path in paths]


def as_one_kind(crops: Crops) -> Crops:
    """Return the largest crop of each photograph."""
    rows = largest_of_each(["thing"] * len(crops.names), crops.groups, crops.sizes)
    kept = crops.take(rows)
    return Crops(kept.features, ["thing"] * len(rows), kept.groups, kept.sizes)


def figures_of(unchanged: Crops, changed: Crops, groups: Sequence[str], definition: Definition) -> dict:
    """Return the mean and standard deviation of the pooled divergence over splits of the photographs into halves."""
    if definition.kinds == "as one":
        unchanged, changed = as_one_kind(unchanged), as_one_kind(changed)
    rng = np.random.Generator(np.random.Philox(key=1))
    rows = []
    for _ in range(NUM_SPLITS):
        first_half = set(rng.permutation(groups)[: len(groups) // 2].tolist())
        first = unchanged.take([row for row, group in enumerate(unchanged.groups) if group in first_half])
        second = changed.take([row for row, group in enumerate(changed.groups) if group not in first_half])
        sets = project(merge_rare([second, first] if definition.is_reversed else [first, second]))
        pooled, classes = compare(*sets, common_classes(sets), NUM_PERMUTATIONS)
        if pooled is None:
            raise SystemExit("too few things were found in these photographs")
        kl, mmd = pooled.kl, pooled.mmd
        is_found = kl.p <= 0.05
        rows.append((pooled.num_first, pooled.num_second, len(classes), kl.value, kl.z, is_found, mmd.value, mmd.z))
    columns = np.array(rows, dtype=np.float64)
    names = ("crops_first", "crops_second", "classes", "kl", "z", "share_p_below_005", "mmd", "mmd_z")
    means = dict(zip(names, columns.mean(axis=0).round(4).tolist(), strict=True))
    deviations = dict(zip(names, columns.std(axis=0).round(4).tolist(), strict=True))
    return {**means, **{f"{name}_sd": deviations[name] for name in ("kl", "z", "mmd", "mmd_z")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("detector")
    parser.add_argument("features")
    parser.add_argument("--same-boxes", action="store_true", help="look for things in unchanged photographs alone")
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    options = parser.parse_args()
    paths = sorted(options.photos.glob("*.jpg"))
    extractor, groups = open_extractor(options.features, CPU), [path.name for path in paths]
    unchanged = None
    with tempfile.TemporaryDirectory() as folder, open_detector(options.detector) as source:
        for place, change in enumerate(CHANGES):
            features = FeatureCache(Path(folder) / str(place), extractor)
            pictures = pictures_of(paths, change, options.same_boxes)
            crops = find_crops(pictures, source, features, CPU, Path(folder))
            unchanged = unchanged or crops
            for definition in DEFINITIONS if options.same_boxes else DEFINITIONS[:1]:
                figures = {"crops": len(crops.names), **figures_of(unchanged, crops, groups, definition)}
                print(change, definition, figures, flush=True)
                config = {
                    "change": change,
                    "boxes": "of unchanged photographs" if options.same_boxes else "of changed photographs",
                    "kinds": definition.kinds,
                    "divergence": f"KL({'changed, unchanged' if definition.is_reversed else 'unchanged, changed'})",
                    "detector": Path(options.detector).name,
                    "features": Path(options.features).name,
                    "photographs": len(paths),
                    "longest_side_px": LONGEST_SIDE_PX,
                    "min_confidence": MIN_CONFIDENCE,
                    "splits": NUM_SPLITS,
                    "permutations": NUM_PERMUTATIONS,
                }
                if options.append:
                    append(options.append, make_record("crop_divergence", config, figures, CPU))


if __name__ == "__main__":
    main()
