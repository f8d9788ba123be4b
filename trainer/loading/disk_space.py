"""Whether a run's checkpoints and its cache fit on their disks, found before anything is encoded."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from safelight.data.manifest import MANIFEST_NAME, read_manifest
from safelight.errors import UserError
from safelight.text import size
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.static_bytes import cache_bytes, most_checkpoints, text_bytes

# what the system answers where there is no room: on the disk, for this user, in one file
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which a file or folder is, or would be made."""
    return shutil.disk_usage(_existing(path)).free


def check_space(run_dir: Path, checkpoint: int) -> None:
    """Raise UserError if not even one checkpoint fits. checkpoint: its bytes."""
    free = free_bytes(run_dir)
    if free < checkpoint:
        raise UserError(
            f"a checkpoint takes {size(checkpoint)}, but the disk of {run_dir} has {size(free)} free; free some space, "
            "or name another --run.dir"
        )


def space_note(config: Config, checkpoint: int) -> str:
    """Return a line if the run's checkpoints and its cache do not fit, else ''. checkpoint: bytes of one."""
    run_dir, dataset = Path(config.run.dir), Path(config.data.path)
    # as many as `static_bytes.summary` counts; those of an earlier start have their place already
    num = max(1, most_checkpoints(config) - len(list_checkpoints(run_dir)))
    parts = {run_dir: (num * checkpoint, f"{num} checkpoints of {size(checkpoint)}")}
    if (dataset / MANIFEST_NAME).is_file():
        cached = sum(path.stat().st_size for path in (dataset / "cache").rglob("*") if path.is_file())
        photos = read_manifest(dataset)
        cache = max(0, cache_bytes(config, len(photos)) + text_bytes(config, photos) - cached)
        parts[dataset] = (cache, f"{size(cache)} of cached latents and captions")
    if len({_existing(place).stat().st_dev for place in parts}) == 1:
        parts = {run_dir: (sum(n for n, _ in parts.values()), " and ".join(text for n, text in parts.values() if n))}
    for place, (needed, text) in parts.items():
        if needed > (free := free_bytes(place)):
            short = f"the disk of {place} has {size(free)} free"
            what_helps = "lower save.keep" if place == run_dir else "lower data.variants"
            return f"up to {text} do not fit: {short}; free some space, or {what_helps}"
    return ""
