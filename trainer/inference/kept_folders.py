"""Folders whose files belong together, into which no picture and no export is written."""

from __future__ import annotations

import os
from pathlib import Path

from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME
from safelight.errors import UserError

# name, what is beside it, whose it is
_KEPT = (
    ("checkpoints", "config.toml", "run"),
    (IMAGES_FOLDER, MANIFEST_NAME, "dataset"),
    ("cache", MANIFEST_NAME, "dataset"),
)


def check_place(out: Path) -> None:
    """Raise UserError if `out` is in a folder whose files belong together: a run's checkpoints, a dataset's photos."""
    for folder in (place := Path(os.path.realpath(out)), *place.parents):
        for name, marker, owner in _KEPT:
            if folder.name == name and os.path.lexists(folder.parent / marker):
                raise UserError(f"{out} is in {folder}, the {name} of a {owner}; name another place with -o")
