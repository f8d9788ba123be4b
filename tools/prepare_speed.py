"""Compare `safelight prepare` with what decoding, shrinking and encoding alone allow on as many threads.

    python -m tools.prepare_speed PHOTOS [--num 367] [--megapixels 6] [--repeats 3] [--before CHECKOUT]

Photographs of the folder are enlarged to a camera's size first, `--num` of them, so that each is decoded, shrunk and
encoded again. All ways then run in turn, each in a process of its own, because a machine's speed changes; their ratios
are of medians within one run. That of processor time holds on a machine that does other things as well. `--before` adds
the `prepare` of another checkout. Prints one result line, as the benchmarks do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from safelight.bench.core.results import make_record
from safelight.data.atomic import remove
from safelight.data.images import decode_file, encode

MAX_MEGAPIXELS, QUALITY = 1.5, 95
# a process begins with the peak of the one that starts it, which has torch: this one is small
_LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def enlarge(source: Path, target: Path, megapixels: float) -> None:
    """Write a photograph at a camera's size."""
    with Image.open(source) as image:
        scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = round(image.width * scale), round(image.height * scale)
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, "JPEG", quality=90)


def alone(folder: Path) -> None:
    """Decode, shrink and encode every photograph of a folder, and do nothing with them."""

    def one(path: Path) -> int:
        _, decoded = decode_file(path, MAX_MEGAPIXELS)
        return len(encode(decoded.image, "jpeg", QUALITY)[0])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(one, sorted(folder.iterdir())):
            pass


def timed(command: Sequence[str], checkout: Path) -> tuple[float, float, float]:
    """Run a command with a checkout's code; return elapsed seconds, processor seconds and peak resident GiB."""
    began = time.perf_counter()
    # a checkout below a folder that is not one of its own is not found by its name
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    launcher = [sys.executable, "-c", _LAUNCHER, sys.executable, *command]
    with subprocess.Popen(launcher, cwd=checkout, env=environment, stdout=subprocess.PIPE) as process:
        peak_kib = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command} in {checkout} ended with {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, int(peak_kib) / 2**20


def measure(photos: Path, num: int, megapixels: float, repeats: int, before: Path | None) -> dict:
    """Return each way's milliseconds a photograph and peak memory, and their ratios."""
    sources = sorted(path for path in photos.iterdir() if path.suffix.lower() == ".jpg")
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as name:
        folder, dataset = Path(name) / "photos", Path(name) / "dataset"
        folder.mkdir()

        def enlarge_one(number: int) -> None:
            # of another size each time round, or they would be duplicates
            rounds, place = divmod(number, len(sources))
            enlarge(sources[place], folder / f"{number:05d}.jpg", megapixels * (1 + rounds / 100))

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(enlarge_one, range(num)))
        prepare = ["-m", "safelight", "prepare", str(folder), "-o", str(dataset)]
        ways = {"alone": (["-m", "tools.prepare_speed", str(folder), "--alone"], here), "prepare": (prepare, here)}
        if before is not None:
            ways["before"] = (prepare, before.resolve())
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, (command, checkout) in ways.items():
                found[way].append(timed(command, checkout))
                if dataset.exists():
                    remove(dataset)
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    figures: dict[str, float] = {}
    for way, (elapsed, processor, peak_gib) in medians.items():
        figures[f"ms_per_photo_{way}"] = round(1000 * elapsed / num, 2)
        figures[f"processor_ms_per_photo_{way}"] = round(1000 * processor / num, 2)
        figures[f"peak_gib_{way}"] = round(peak_gib, 3)
    for way in ("alone", "before"):
        if way in medians:
            figures[f"{way}_over_prepare"] = round(medians[way][0] / medians["prepare"][0], 3)
            figures[f"processor_time_{way}_over_prepare"] = round(medians[way][1] / medians["prepare"][1], 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--num", type=int, default=367)
    parser.add_argument("--megapixels", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.photos)
        return
    figures = measure(options.photos, options.num, options.megapixels, options.repeats, options.before)
    config = {"photographs": options.num, "megapixels": options.megapixels, "threads": os.cpu_count()}
    print(json.dumps(make_record("prepare", config, figures, torch.device("cpu"))))


if __name__ == "__main__":
    main()
