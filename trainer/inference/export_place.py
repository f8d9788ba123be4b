"""Where an export may be written, and how it gets there whole.

A file or folder is written under a temporary name beside its place and then renamed, so that a killed export leaves
what was there before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safelight.data.atomic import remove, sync_folder
from safelight.data.lock import NoLocks, lock_file, unlock_file
from safelight.errors import UserError
from safelight.text import printable, size
from safelight.trainer.config.schema import Config
from safelight.trainer.inference.kept_folders import check_place
from safelight.trainer.inference.modelspec import sign
from safelight.trainer.models.base import PICKLES
from safelight.trainer.models.tensor_files import save_file

# free space to leave: file systems become slow or fail before they are full
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that export writes.

    name: what it is called. mark: a file that every such folder has. names: all that an export writes into one, by
    which it knows a folder that --force may replace.
    """

    name: str
    mark: str
    names: frozenset[str]


def check_output(out: Path, force: bool, folder: FolderKind | None) -> bool:
    """Return whether `out` is to be one file. Raises UserError if it may not be written or replaced.

    folder: the kind of folder that is written otherwise, None if only a file can be written.
    """
    suffix = out.suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{out}: {suffix} files cannot be written; name a .safetensors file, or a folder")
    check_place(out)
    is_file = suffix == ".safetensors"
    if not is_file and folder is None:
        raise UserError(
            "the LoRA of this run is one file: name a .safetensors file with -o, or add --merge for the whole model"
        )
    if os.path.islink(out) and not out.exists():
        raise UserError(f"{out} is a link to {os.path.realpath(out)}, which does not exist; delete it, or name another")
    if out.exists():
        if not force:
            raise UserError(f"{out} already exists; name another with -o, or add --force")
        if is_file != out.is_file():
            raise UserError(f"{out} is a {'file' if out.is_file() else 'folder'}; name another with -o")
        if not is_file and any(out.iterdir()) and not (out / folder.mark).is_file():
            raise UserError(f"{out} is not a {folder.name}, and --force replaces only those; name another with -o")
        if not is_file and (others := sorted({path.name for path in out.iterdir()} - folder.names)):
            raise UserError(
                f"{out} contains {printable(others[0])}, which no export writes, and --force would delete it; move it "
                "away, or name another folder with -o"
            )
    return is_file


def check_not_needed(out: Path, run_dir: Path, config: Config) -> None:
    """Raise UserError if writing `out` would replace the run, its dataset, or a model that the run is made of."""
    model = config.model
    needed = {
        "the run": run_dir,
        "the run's dataset": config.data.path,
        "model.base, which the run compares with": model.base,
        "model.vae": model.vae,
        "model.config": model.config,
        "model.tokenizer": model.tokenizer,
    }
    place = Path(os.path.realpath(out))
    for name, path in needed.items():
        # a hub id or a name such as tiny is no path that exists
        if path and os.path.lexists(path):
            real = Path(os.path.realpath(path))
            # new files may lie in the run's folder, but none of a model's own is replaced
            is_inside = real in place.parents and out.exists() and path not in (run_dir, config.data.path)
            if place == real or place in real.parents or is_inside:
                what = f"is {name}" if place == real else f"is in {name}" if is_inside else f"contains {name}"
                raise UserError(f"{out} {what}, which the export would replace; name another place with -o")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other exports away from a name: their temporary files have the same one. Raises UserError."""
    path = out.with_name(f".{out.name}.lock")
    try:
        file = lock_file(path)
    except NoLocks:
        yield
        return
    if file is None:
        raise UserError(f"another export to {out} is running; wait for it, or name another place with -o")
    try:
        yield
    finally:
        unlock_file(file, path)


def check_free_space(out: Path, num_bytes: int, dtype: torch.dtype) -> None:
    """Raise UserError if the disk of `out` has no room for num_bytes. dtype: of the weights, for the advice."""
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise UserError(
            f"{out} takes {size(num_bytes)}, and {size(SPARE_BYTES)} must stay free, but {out.parent} has {size(free)} "
            f"free; free some space, or name another place with -o"
            f"{', or use --dtype fp16' if dtype.itemsize > 2 else ''}"
        )


def replace_file(out: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a signed .safetensors file, whole or not at all, in the place of an earlier one."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        # what a killed export left, or a link that somebody planted there
        remove(partial)
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        # safetensors creates files that only their owner may read
        partial.chmod(mode)
        sign(partial)
        os.replace(partial, out)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(partial)
        raise
    sync_folder(out.parent)


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, whole or not at all, in the place of an earlier one. write: writes into an empty folder."""
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    # what a killed export left, or a link that somebody planted there
    remove(partial)
    partial.mkdir()
    try:
        write(partial)
        mode = partial.stat().st_mode & 0o666
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_dir():
                sync_folder(path)
            else:
                path.chmod(mode)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(partial)
        if out.exists():
            remove(old)
            out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        with contextlib.suppress(OSError):
            remove(partial)
        raise
    sync_folder(out.parent)
    with contextlib.suppress(OSError):
        remove(old)
