"""A short training run through the command line, from drawn pictures to a checkpoint; part of `safelight bench all`."""

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
    """Settings of the run.

    preset: argument of `safelight init`. base: as model.base. side_px: side of the pictures and training resolution.
    """

    preset: str
    base: str
    side_px: int
    photos: int
    steps: int
    batch_size: int
    checkpointing: str = "none"
    validates: bool = False

    def settings(self) -> list[str]:
        """Return these settings as options of `safelight train`."""
        return [
            *("--model.base", self.base),
            *("--data.resolution", str(self.side_px)),
            *("--data.variants", "1"),
            *("--train.max-steps", str(self.steps)),
            *("--train.batch-size", str(self.batch_size)),
            *("--train.checkpointing", self.checkpointing),
            *("--validate.every-epochs", "5" if self.validates else "0"),
            *"--sample.every-epochs 0 --log.tensorboard False".split(),
        ]


def call(command: list[str], timeout_s: float, log: Path) -> tuple[int, str, float]:
    """Run a command in its own process group and return (exit status, last line of output, seconds).

    The status is 124 if the command was killed at the timeout. Its output goes to the log file.
    """
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            # also on Ctrl-C, which does not reach another process group
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return status, lines[-1][:200] if lines else "", time.monotonic() - began


def train(run: ShortRun, folder: Path, device: str, end: float) -> dict:
    """Run init, prepare and train in `folder`; return the seconds of each and the figures of the last logged step.

    end: the time.monotonic() by which all must be done. Raises RuntimeError with the last line of a command that fails.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(run.photos):
        scene = random_scene(SEED, number)
        scale = run.side_px / min(scene.width, scene.height)
        draw(scene, scale).save(photos / f"{number:03d}.png")
        (photos / f"{number:03d}.txt").write_text(caption(scene, SEED, number))
    config, dataset = str(folder / "run.toml"), str(folder / "dataset")
    paths = ["--data.path", dataset, "--run.dir", str(folder / "run"), "--run.device", device]
    seconds_of = {}
    for arguments in (
        ["init", run.preset, "-o", config, "--force"],
        ["prepare", str(photos), "-o", dataset],
        ["train", config, *paths, *run.settings()],
    ):
        command = arguments[0]
        status, tail, seconds = call(
            [sys.executable, "-m", "safelight", *arguments], end - time.monotonic(), folder / f"{command}.log"
        )
        seconds_of[f"{command}_s"] = round(seconds, 1)
        if status != 0:
            raise RuntimeError(f"safelight {command} exited with status {status}: {tail}")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    return {
        **seconds_of,
        "steps": last["step"],
        "images_per_s": last["images_per_s"],
        "loss": last["loss"],
        "peak_gib": last["memory_gib"],
    }
