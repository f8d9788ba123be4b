"""Copies the pictures that the burn check flags into a folder, with their prompts as captions: what a negative word
learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from safelight.data.atomic import atomic_write_bytes, atomic_write_text, check_writable
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.evaluation.burn import SCORES, PictureSet
from safelight.trainer.metrics.burn import BurnScale, fit_scale
from safelight.untrusted import read_bytes

MAX_PICTURE_BYTES = 2**28


def check_folder(folder: Path) -> None:
    """Raise UserError if flagged pictures cannot be written into a folder: it must be new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--flagged {folder} exists and is not an empty folder; name another")
    check_writable(folder, "name another folder with --flagged")


def write_flagged(compared: Path, folder: Path, photographs: np.ndarray, sets: Sequence[PictureSet]) -> str:
    """Copy the pictures above a limit into FOLDER/burnt and FOLDER/smoothed and return a line on them.

    compared: RUN/compare, where the pictures are. photographs: measures of the run's own, (N, 6), as for `judge_burn`.
    Raises ValueError for too few photographs.
    """
    scale: BurnScale = fit_scale(photographs)
    counts: dict[str, int] = {}
    for name in SCORES:
        for pictures in sets:
            for place in np.flatnonzero(scale.is_over(name, pictures.measures)):
                source = compared / pictures.files[place]
                stem = f"{pictures.model}-cfg{pictures.cfg:g}-{Path(pictures.files[place]).stem}".replace("/", "-")
                (folder / name).mkdir(parents=True, exist_ok=True)
                atomic_write_bytes(folder / name / f"{stem}.png", read_bytes(source, MAX_PICTURE_BYTES))
                atomic_write_text(folder / name / f"{stem}.txt", pictures.prompts[place] + "\n")
                counts[name] = counts.get(name, 0) + 1
    if not counts:
        return f"the burn check flags no picture: nothing was written to {folder}"
    listed = " and ".join(f"{counted(num, 'picture')} to {folder / name}" for name, num in counts.items())
    return f"{listed}; make a dataset of them: safelight prepare {folder / next(iter(counts))} -o DATASET"
