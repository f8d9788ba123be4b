"""The true SD1.5 UNet through the real commands on a CPU: `python -m tools.full_size --dir DIR`.

859,520,964 random parameters in bf16 with an fp32 master, 256 px: prepare, cache, two steps, save, resume for a third,
export. Needs about 20 GB of memory and disk, and minutes. Appends one JSON line a command, with its seconds and peak
resident memory as the system counted them, to DIR/full_size.jsonl.
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
SCALE = 5  # 320 px on the shorter side, to be cropped to 256
SETTINGS = (
    "--model.base random:sd15 --model.precision bf16 --data.resolution 256 --data.variants 1 --train.batch-size 1 "
    "--train.checkpointing full --validate.every-epochs 0 --sample.every-epochs 0 --log.every-steps 1"
).split()


def draw_photos(folder: Path) -> None:
    """Draw captioned photographs."""
    folder.mkdir(parents=True)
    for number in range(NUM_PHOTOS):
        scene = random_scene(SEED, number)
        draw(scene, SCALE).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption(scene, SEED, number))


def call(*words: object) -> dict:
    """Run a command of safelight and return what it cost. Raises SystemExit with its message if it fails."""
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
    parser.add_argument("--dir", type=Path, required=True, help="folder to work in; must not exist")
    folder: Path = parser.parse_args().dir
    if folder.exists():
        sys.exit(f"{folder} exists already; name another")
    draw_photos(folder / "photos")
    log = (folder / "full_size.jsonl").open("a")
    # the log names no place of this machine: the commands run inside the folder
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
