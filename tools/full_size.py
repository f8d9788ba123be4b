"""Run the real commands on a full-size SD1.5 UNet with random weights, on a CPU.

    python -m tools.full_size --dir DIR

859,520,964 parameters in bf16 with an fp32 master, at 256 px: prepare, cache, train two steps, save, resume for a
third, export. Takes minutes and about 20 GB each of memory and disk. Writes one JSON line per command to
DIR/full_size.jsonl, with its duration and the peak resident memory that the system reports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safelight.trainer.run_log.environment import describe
from safelight.trainer.tiny.scenes import caption, draw, random_scene

SEED = 3
NUM_PHOTOS = 6
# 320 px on the shorter side, cropped to 256
SCALE = 5
SETTINGS = (
    "--model.base random:sd15 --model.precision bf16 --data.resolution 256 --data.variants 1 --train.batch-size 1 "
    "--train.checkpointing full --validate.every-epochs 0 --sample.every-epochs 0 --log.every-steps 1"
).split()


def draw_photos(folder: Path) -> None:
    """Write captioned pictures into a new folder."""
    folder.mkdir(parents=True)
    for number in range(NUM_PHOTOS):
        scene = random_scene(SEED, number)
        draw(scene, SCALE).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption(scene, SEED, number))


def call(*words: object) -> dict:
    """Run a safelight command and return its duration and peak memory. Exits with a message if the command fails."""
    argv = [sys.executable, "-m", "safelight", *map(str, words)]
    began = time.monotonic()
    process = subprocess.Popen(argv)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"failed: {' '.join(argv)}")
    return {
        "command": " ".join(("safelight", *map(str, words))),
        "seconds": round(time.monotonic() - began, 1),
        # ru_maxrss is in KiB on Linux
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder to work in; must not exist yet")
    folder: Path = parser.parse_args().dir
    if folder.exists():
        sys.exit(f"{folder} already exists; choose another folder")
    draw_photos(folder / "photos")
    log = (folder / "full_size.jsonl").open("a")
    # commands run inside the folder, so that the log contains no path of this machine
    command = "python -m tools.full_size --dir DIR"
    log.write(json.dumps({"bench": "full_size", **describe(torch.device("cpu")), "command": command}) + "\n")
    os.chdir(folder)
    settings = [*SETTINGS, "--data.path", "dataset", "--run.dir", "run"]
    for words in (
        ("init", "sd15", "-o", "run.toml"),
        ("prepare", "photos", "-o", "dataset"),
        ("cache", "run.toml", *settings),
        ("train", "run.toml", *settings, "--train.max-steps", 2),
        ("train", "run.toml", *settings, "--train.max-steps", 3, "--resume"),
        ("export", "run", "-o", "full.safetensors"),
    ):
        log.write(json.dumps(call(*words)) + "\n")
        log.flush()
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in steps if row["kind"] == "train"]
    size = Path("full.safetensors").stat().st_size
    log.write(json.dumps({"losses": losses, "exported_bytes": size, "disk_free_gib": _free_gib()}) + "\n")


def _free_gib() -> float:
    return round(shutil.disk_usage(".").free / 2**30, 1)


if __name__ == "__main__":
    main()
