"""A short run of the commands themselves, from drawn photographs to a checkpoint: part of `safelight bench all`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from safelight.trainer.tiny.scenes import caption, draw, random_scene

SEED = 7


@dataclass(frozen=True)
class ShortRun:
    """preset: of `safelight init`; base: as model.base; side_px: of the photographs, which are trained at that size."""

    preset: str
    base: str
    side_px: int
    photos: int
    steps: int
    batch_size: int
    checkpointing: str = "none"
    validates: bool = False

    def settings(self) -> list[str]:
        return [
            *("--model.base", self.base),
            *("--data.resolution", str(self.side_px)),
            *("--data.variants", "1"),
            *("--train.max-steps", str(self.steps)),
            *("--train.batch-size", str(self.batch_size)),
            *("--train.checkpointing", self.checkpointing),
            # a last step is logged whatever its number
            *("--validate.every-epochs", "5" if self.validates else "0"),
            *"--sample.every-epochs 0 --log.tensorboard False".split(),
        ]


def call(command: list[str], timeout_s: float, log: Path) -> tuple[int, str, float]:
    """Run a command in a process group of its own; return (exit status, its last line, seconds). 124: out of time."""
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            # also where this process is told to stop: it is in a group of its own, which no Ctrl-C reaches
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return status, lines[-1][:200] if lines else "", time.monotonic() - began


def train(run: ShortRun, folder: Path, device: str, end: float) -> dict:
    """Run init, prepare and train in `folder` and return their seconds and what the run's last line says.

    end: time.monotonic() by which it must be over. Raises RuntimeError, with a command's last words, if one fails.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(run.photos):
        scene = random_scene(SEED, number)
        scale = run.side_px / min(scene.width, scene.height)
        draw(scene, scale).save(photos / f"{number:03d}.png")
        (photos / f"{number:03d}.txt").write_text(caption(scene, SEED, number))
    config, dataset = str(folder / "run.toml"), str(folder / "dataset")
    places = ["--data.path", dataset, "--run.dir", str(folder / "run"), "--run.device", device]
    seconds_of = {}
    for words in (
        ["init", run.preset, "-o", config, "--force"],
        ["prepare", str(photos), "-o", dataset],
        ["train", config, *places, *run.settings()],
    ):
        log = folder / f"{words[0]}.log"
        status, tail, seconds = call([sys.executable, "-m", "safelight", *words], end - time.monotonic(), log)
        seconds_of[f"{words[0]}_s"] = round(seconds, 1)
        if status != 0:
            raise RuntimeError(f"safelight {words[0]} ended with {status}: {tail}")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    return {
        **seconds_of,
        "steps": last["step"],
        "images_per_s": last["images_per_s"],
        "loss": last["loss"],
        "peak_gib": last["memory_gib"],
    }
