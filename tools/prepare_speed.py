"""Compare `safelight prepare` with what decoding, shrinking and encoding alone allow on as many threads.

    python -m tools.prepare_speed PHOTOS [--num 367] [--megapixels 6] [--repeats 3]

Photographs of the folder are enlarged to a camera's size first, `--num` of them, so that each is decoded, shrunk and
encoded again. Both ways then run in turn, because a machine's speed changes; their ratios are of medians within one
run. That of processor time holds on a machine that does other things as well. Prints one result line, as the
benchmarks do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from safelight.bench.core.results import make_record
from safelight.data.images import decode_file, encode
from safelight.data.prepare.ingest import ingest

MAX_MEGAPIXELS, QUALITY = 1.5, 95


def enlarge(source: Path, target: Path, megapixels: float) -> None:
    """Write a photograph at a camera's size."""
    with Image.open(source) as image:
        scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = round(image.width * scale), round(image.height * scale)
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, "JPEG", quality=90)


def alone(path: Path) -> int:
    """Decode, shrink and encode one photograph; return its bytes."""
    _, decoded = decode_file(path, MAX_MEGAPIXELS)
    return len(encode(decoded.image, "jpeg", QUALITY)[0])


def measure(photos: Path, num: int, megapixels: float, repeats: int) -> dict:
    """Return seconds of both ways and their ratio."""
    sources = sorted(path for path in photos.iterdir() if path.suffix.lower() == ".jpg")
    seconds: dict[str, list[float]] = {"alone": [], "prepare": []}
    processor_seconds: dict[str, list[float]] = {"alone": [], "prepare": []}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as threads:
        folder = Path(name) / "photos"
        folder.mkdir()
        paths = [folder / f"{number:05d}.jpg" for number in range(num)]

        def enlarge_one(number: int) -> None:
            # of another size each time round, or they would be duplicates
            rounds, place = divmod(number, len(sources))
            enlarge(sources[place], paths[number], megapixels * (1 + rounds / 100))

        list(threads.map(enlarge_one, range(num)))
        for _ in range(repeats):
            for way in seconds:
                began, processor_began = time.perf_counter(), time.process_time()
                if way == "alone":
                    list(threads.map(alone, paths))
                else:
                    assert ingest([folder], Path(name) / "dataset").num_shrunk == num
                    shutil.rmtree(Path(name) / "dataset")
                seconds[way].append(time.perf_counter() - began)
                processor_seconds[way].append(time.process_time() - processor_began)
    wall, processor = (
        {way: 1000 * statistics.median(values) / num for way, values in found.items()}
        for found in (seconds, processor_seconds)
    )
    return {
        "alone_over_prepare": round(wall["alone"] / wall["prepare"], 3),
        "processor_time_alone_over_prepare": round(processor["alone"] / processor["prepare"], 3),
        "ms_per_photo_alone": round(wall["alone"], 2),
        "ms_per_photo_prepare": round(wall["prepare"], 2),
        "processor_ms_per_photo_alone": round(processor["alone"], 2),
        "processor_ms_per_photo_prepare": round(processor["prepare"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--num", type=int, default=367)
    parser.add_argument("--megapixels", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    figures = measure(options.photos, options.num, options.megapixels, options.repeats)
    config = {"photographs": options.num, "megapixels": options.megapixels, "threads": os.cpu_count()}
    print(json.dumps(make_record("prepare", config, figures, torch.device("cpu"))))


if __name__ == "__main__":
    main()
