"""Measure how the memory of `safelight prepare` grows with the number of photographs.

    python -m tools.prepare_memory [--nums 2000 8000] [--before CHECKOUT]

Prepares folders of as many generated JPEGs of 64 px with captions beside them, each in a process of its own, and
reports its largest resident size. Photographs so small are decoded in no memory to speak of, so what grows is what
`prepare` keeps of each. `--before` measures another checkout beside this one. Prints one result line, as the benchmarks
do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.bench.core.results import make_record
from safelight.data.atomic import remove
from safelight.units import MIB
from tools.prepare_speed import timed

SIDE_PX = 64
CAPTION = "a generated picture of soft waves, number {}"


def write_photos(folder: Path, num: int) -> None:
    """Write pictures with the spectrum of photographs, all different, and their captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(SIDE_PX) * SIDE_PX]))
    for number in range(num):
        waves = np.fft.ifft2(np.fft.fft2(random.standard_normal((3, SIDE_PX, SIDE_PX))) / (frequency + 1) ** 1.2).real
        pixels = np.clip(127 + 50 * waves / waves.std(), 0, 255).astype(np.uint8)
        path = folder / f"{number:06d}.jpg"
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path, quality=90)
        path.with_suffix(".txt").write_text(CAPTION.format(number))


def peak_bytes(photos: Path, dataset: Path, checkout: Path) -> int:
    """Return the largest resident size of preparing a folder into a new dataset."""
    _, _, peak_gib = timed(["-m", "safelight", "prepare", str(photos), "-o", str(dataset)], checkout)
    remove(dataset)
    return round(peak_gib * 2**30)


def measure(nums: list[int], before: Path | None) -> dict[str, float]:
    """Return each number's peak in MiB, and the bytes a photograph between the smallest number and the largest."""
    checkouts = {"": Path(__file__).resolve().parent.parent} | ({"_before": before.resolve()} if before else {})
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for num in nums:
            photos = Path(name) / str(num)
            write_photos(photos, num)
            for suffix, checkout in checkouts.items():
                figures[f"photos_{num}{suffix}_peak_mib"] = peak_bytes(photos, Path(name) / "dataset", checkout) / MIB
    for suffix in checkouts:
        low, high = (figures[f"photos_{num}{suffix}_peak_mib"] * MIB for num in (min(nums), max(nums)))
        figures[f"bytes_per_photo{suffix}"] = round((high - low) / (max(nums) - min(nums)))
    return {name: round(value, 1) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nums", type=int, nargs=2, default=(2000, 8000))
    parser.add_argument("--before", type=Path)
    options = parser.parse_args()
    config = {"part": "memory", "photographs": list(options.nums), "size_px": SIDE_PX, "threads": os.cpu_count()}
    print(json.dumps(make_record("prepare", config, measure(options.nums, options.before), torch.device("cpu"))))


if __name__ == "__main__":
    main()
