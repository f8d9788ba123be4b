"""Reads and writes checkpoints, `checkpoints/step-00000300/{unet/, state.safetensors, state.json}`, atomically.

A checkpoint is written to a temporary folder beside its final one, synced to disk and renamed. state.json is written
last and holds the SHA-256 of every other file and of itself; a folder without it is incomplete and ignored, as are
names other than `step-` and eight digits. A run folder may come from somebody else: the checksums only tell damage,
so everything in state.json is checked, no path may lead out of the run folder, and sizes are checked before hashing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from safelight.data.atomic import atomic_write_text, naming, remove, sync_folder
from safelight.errors import UserError
from safelight.trainer.adapters.trained import Trained
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.distributed.started import options_to_resume
from safelight.trainer.models.tensor_files import TensorFile, save_file
from safelight.untrusted import UnsafeFile, open_regular, path_in, read_json_object

FORMAT = 1
# a state.json has 3 KB
MAX_RECORD_BYTES = 2**22
# ours have three
MAX_FILES = 100
# of all files: SDXL's UNet in fp32 with its optimizer state and averages has 51 GB
MAX_TOTAL_BYTES = 2**36
# of all files, for each value that is trained: 16-bit weights, fp32 master, two fp32 moments and average take 18
MAX_BYTES_PER_VALUE = 32
# of all files besides: unlogged steps
MAX_BYTES_BESIDES = 2**28
# checkpoints that are hashed to name an intact one in place of a damaged one
MAX_HASHED = 3
# a file without tensors: unet/config.json has 2 KB
MAX_OTHER_BYTES = 2**20
# a step's folder has eight digits
MAX_STEP = 10**8 - 1
# stages that ended early
MAX_ENDED = 1000
# key of state.json's own checksum; the oldest checkpoints have none
SEAL = "record_sha256"
# the exceptions that reading a damaged state.json may raise
UNREADABLE = (ValueError, KeyError, TypeError)
MISFIT = "the checkpoint's position does not fit its run"
_NAME = re.compile(r"step-([0-9]{8})")


class CheckpointGone(UserError):
    """A checkpoint that is no longer there: a run that still trains keeps only the newest ones (save.keep)."""


@contextlib.contextmanager
def noticing_replacement(folder: Path) -> Iterator[None]:
    """Raise CheckpointGone if the block cannot read the checkpoint in `folder` because it was deleted meanwhile."""
    try:
        yield
    except (UserError, OSError):
        # pruning deletes it first
        if (folder / "state.json").is_file():
            raise
        raise CheckpointGone(f"{folder} is gone: a run that still trains has replaced it; run this again") from None


@dataclass(frozen=True)
class Position:
    """How far a run has come. step: optimizer steps taken. step_in_epoch: those taken in the current epoch.

    epoch: 0-based, counted over all stages. best_step, best_loss: the best validation so far, -1 and None before the
    first. unmeasured: the validation and samples due at this step were interrupted; a resumed run starts with them.
    stage_best_step, stage_best_loss: the same of the present stage. began_from: the step whose weights the stage began
    with, -1 if it went on with those of the step before. ended: (stage, epochs) of stages that patience ended before
    their planned epochs, and of those that it kept from beginning, with 0 epochs.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    stage: int = 0
    best_step: int = -1
    best_loss: float | None = None
    unmeasured: bool = False
    stage_best_step: int = -1
    stage_best_loss: float | None = None
    began_from: int = -1
    ended: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_record(cls, values: object) -> Position:
        """Return the position that a state.json holds. Raises ValueError for values out of their type or range."""
        if not isinstance(values, dict) or not values.keys() <= cls.__dataclass_fields__.keys():
            raise ValueError(f"{MISFIT}: it has unknown fields")
        position = cls(**{**values, "ended": _ended(values.get("ended", []))})
        for name in ("step", "epoch", "step_in_epoch", "stage", "best_step", "stage_best_step", "began_from"):
            value, low = getattr(position, name), 0 if name in ("step", "epoch", "step_in_epoch", "stage") else -1
            if type(value) is not int or not low <= value <= MAX_STEP:
                raise ValueError(f"{MISFIT}: {name} is not a whole number in its range")
        for name in ("best_loss", "stage_best_loss"):
            if type(getattr(position, name)) not in (int, float, type(None)):
                raise ValueError(f"{MISFIT}: {name} is not a number")
        if type(position.unmeasured) is not bool:
            raise ValueError(f"{MISFIT}: unmeasured is neither true nor false")
        return position


def _ended(rows: object) -> tuple[tuple[int, int], ...]:
    """Return a record's stages that ended early, in ascending order. Raises ValueError for anything else."""
    is_sound = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 2 and all(type(x) is int and 0 <= x <= MAX_STEP for x in row)
        for row in rows
    )
    if not is_sound or len(rows) > MAX_ENDED or any(one[0] >= other[0] for one, other in pairwise(rows)):
        raise ValueError(f"{MISFIT}: ended is not a list of stages and their epochs")
    return tuple((stage, epochs) for stage, epochs in rows)


def _checkpoints(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints. Raises UserError if it leads out of the run folder."""
    return path_in(run_dir, "checkpoints")


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether or not it exists.

    Raises UserError if it leads out of the run folder.
    """
    return path_in(run_dir, f"checkpoints/step-{step:08d}")


def _step_folders(run_dir: Path) -> dict[int, Path]:
    matches = ((_NAME.fullmatch(path.name), path) for path in _checkpoints(run_dir).glob("step-*"))
    return {int(match[1]): path for match, path in matches if match}


def list_checkpoints(run_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted(step for step, path in _step_folders(run_dir).items() if (path / "state.json").is_file())


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with naming(path), open_regular(path) as file:
        os.fsync(file.fileno())


def _remove_unfinished(run_dir: Path) -> None:
    """Delete checkpoints that a kill or a full disk left half-written or half-deleted."""
    for folder in _checkpoints(run_dir).glob(".step-*.partial"):
        remove(folder)
    for folder in _step_folders(run_dir).values():
        if not (folder / "state.json").is_file():
            remove(folder)


def save_checkpoint(
    run_dir: Path,
    write_trained: Callable[[Path], None],
    state: dict[str, Tensor],
    position: Position,
    identity: Identity,
    between_files: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint and return its folder. Each step may be written only once.

    write_trained: writes the trained tensors' files into the folder, which exists (Trained.write).
    between_files: called between files and before the final rename; an exception it raises aborts the write.
    """
    place = folder_of(run_dir, position.step)
    partial = place.with_name(f".{place.name}.partial")
    # they would take the new checkpoint's disk space or name
    _remove_unfinished(run_dir)
    assert not place.exists(), f"{place} already exists"
    try:
        _write(partial, write_trained, state, position, identity, between_files)
    except Exception:
        # re-raised below; remove the partial folder first, or it keeps a full disk full
        with contextlib.suppress(OSError):
            remove(partial)
        raise
    partial.rename(place)
    for folder in (place.parent, run_dir):
        sync_folder(folder)
    return place


def _write(
    folder: Path,
    write_trained: Callable[[Path], None],
    state: dict[str, Tensor],
    position: Position,
    identity: Identity,
    between_files: Callable[[], None],
) -> None:
    """Write a checkpoint's files and sync them to disk, state.json last."""
    folder.mkdir(parents=True)
    write_trained(folder)
    between_files()
    save_file(state, folder / "state.safetensors")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        between_files()
        _sync_file(path)
        digests[path.relative_to(folder).as_posix()] = _digest(path)
    between_files()
    record = {
        "format": FORMAT,
        "position": asdict(position),
        "identity": asdict(identity),
        "sha256": digests,
    }
    _write_record(folder, record)
    for path in [*sorted({path.parent for path in files} - {folder}), folder]:
        sync_folder(path)


def _write_record(folder: Path, record: dict) -> None:
    atomic_write_text(folder / "state.json", json.dumps({**record, SEAL: _seal(record)}, indent=1))


def rewrite_position(run_dir: Path, position: Position) -> None:
    """Update the position in a checkpoint, after the validation at its step has run."""
    folder = folder_of(run_dir, position.step)
    _write_record(folder, {**_record(folder), "position": asdict(position)})
    sync_folder(folder)


def max_bytes_of(num_values: int) -> int:
    """Return the most bytes that a checkpoint of so many trained values has."""
    return min(MAX_TOTAL_BYTES, num_values * MAX_BYTES_PER_VALUE + MAX_BYTES_BESIDES)


def _damaged(folder: Path, what: str, to_resume: bool = True, max_bytes: int | None = None) -> UserError:
    """Return the error for a damaged checkpoint, with the newest intact one and how to use it.

    to_resume: by resuming from it, which only earlier ones allow; otherwise by naming it, whatever its step.
    max_bytes: as for `check_files`; None: no other checkpoint is hashed. Of those that are not hashed, one whose files
    have the right sizes counts as intact; whoever uses it checks it.
    """
    run_dir = folder.parent.parent
    others = [step for step in list_checkpoints(run_dir) if folder_of(run_dir, step) != folder]
    earlier = [step for step in others if folder_of(run_dir, step) < folder] if to_resume else others
    num_hashed = 0 if max_bytes is None else MAX_HASHED
    candidates = enumerate(reversed(earlier))
    flaws = ((step, _flaw(folder_of(run_dir, step), max_bytes, number < num_hashed)) for number, step in candidates)
    intact = next((step for step, flaw in flaws if not flaw), None)
    damaged = f"checkpoint {folder} is damaged: {what}"
    if intact is not None and not to_resume:
        return UserError(f"{damaged}; use --checkpoint {intact}, the newest intact one")
    aside = [folder_of(run_dir, step) for step in earlier if intact is None or step > intact]
    go_on = (
        "start again from step 0" if intact is None else f"resume from step {intact}, the newest intact one before it"
    )
    command = resume_command(run_dir, [*aside, folder], "damaged")
    return UserError(f"{damaged}; {go_on}: {command}")


def resume_command(run_dir: Path, aside: Sequence[Path], suffix: str, *options: str) -> str:
    """Return the shell command that moves checkpoints aside, to FOLDER.suffix, and resumes from the newest one left.

    They are moved, not deleted: parts of them may still be usable. options: added to `safelight train`, after those
    that start as many processes as there are.
    """
    moves = [f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.{suffix}')}" for path in aside]
    resume = ["safelight train", shlex.quote(str(run_dir / "config.toml")), "--resume", *options_to_resume(), *options]
    return " && ".join([*moves, " ".join(resume)])


def _seal(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _record(folder: Path) -> dict:
    """Return a checkpoint's state.json. Raises one of UNREADABLE if damaged, _OtherFormat if written by another
    version."""
    # best_loss is NaN in checkpoints of a run that had diverged
    record = read_json_object(path_in(folder, "state.json"), MAX_RECORD_BYTES, allow_nan=True)
    if record["format"] != FORMAT:
        raise _OtherFormat(str(record["format"])[:40])
    seal = record.pop(SEAL, None)
    if seal is not None and seal != _seal(record):
        raise UserError("its checksum differs")
    Identity.from_record(record["identity"])
    position = Position.from_record(record["position"])
    if folder_of(folder.parent.parent, position.step).name != folder.name:
        raise UserError(f"it belongs to step {position.step}")
    digests = record["sha256"]
    if not isinstance(digests, dict) or not digests:
        raise UserError("it lists no files")
    if len(digests) > MAX_FILES:
        raise UserError(f"it lists {len(digests):,} files, over the limit of {MAX_FILES:,}")
    for name in digests:
        # each file once, under its own name: hashing one of many GiB takes minutes
        if os.path.normpath(name) != name or path_in(folder, name).is_symlink():
            raise UserError(f"it lists {name[:100]!r}, which is a link or no plain name")
    return record


def _flaw(folder: Path, max_bytes: int | None, with_hashes: bool = True) -> str:
    """Return what is wrong with a checkpoint's files, '' if they are intact. with_hashes: False compares only sizes."""
    try:
        record = _record(folder)
        paths = {name: path_in(folder, name) for name in record["sha256"]}
        # hashing a sparse file of terabytes, which costs its sender nothing, would take hours
        if flaw := _size_flaw(paths, max_bytes):
            return flaw
        for name, digest in record["sha256"].items() if with_hashes else ():
            if _digest(paths[name]) != digest:
                return f"{name} is missing or its checksum differs"
    except _OtherFormat as other:
        return f"it has format {other}"
    except (*UNREADABLE, OSError) as error:
        return f"state.json is not readable ({error})"
    return ""


def _size_flaw(paths: Mapping[str, Path], max_bytes: int | None) -> str:
    """Return which of a checkpoint's files is missing or of another size than it must have, '' if none is."""
    num_bytes = 0
    for name, path in paths.items():
        if not path.is_file():
            return f"{name} is missing or its checksum differs"
        size = path.stat().st_size
        num_bytes += size
        if path.suffix == ".safetensors":
            try:
                TensorFile(path)
            except UnsafeFile as error:
                return f"{name} is not a whole .safetensors file ({error})"
        elif size > MAX_OTHER_BYTES:
            return f"{name} has {size:,} bytes, over the limit of {MAX_OTHER_BYTES:,}"
    max_bytes = MAX_TOTAL_BYTES if max_bytes is None else max_bytes
    if num_bytes > max_bytes:
        return f"its files have {num_bytes:,} bytes, over the limit of {max_bytes:,} for this model"
    return ""


class _OtherFormat(Exception):
    """Raised for a checkpoint of another format; the message is that format."""


def read_record(folder: Path, to_resume: bool = True) -> dict:
    """Return a checkpoint's state.json. Raises UserError if it is damaged or has another format, CheckpointGone.

    to_resume: False for a checkpoint that the user named; the message then names another one.
    """
    with noticing_replacement(folder):
        try:
            return _record(folder)
        except _OtherFormat as other:
            raise UserError(
                f"checkpoint {folder} has format {other}, this version reads {FORMAT}; use the version that wrote it"
            ) from None
        except UNREADABLE as error:
            raise _damaged(folder, f"state.json is not readable ({error})", to_resume) from None


def read_identity(run_dir: Path, step: int) -> tuple[Identity, int]:
    """Return the identity of the run that wrote a checkpoint, and the stage it was in."""
    record = read_record(folder_of(run_dir, step))
    return Identity.from_record(record["identity"]), Position.from_record(record["position"]).stage


def read_position(run_dir: Path, step: int, to_resume: bool = True) -> Position:
    """Return the position of a checkpoint. to_resume, errors: as `read_record`."""
    return Position.from_record(read_record(folder_of(run_dir, step), to_resume)["position"])


def check_files(folder: Path, to_resume: bool = True, max_bytes: int = MAX_TOTAL_BYTES) -> dict:
    """Return a checkpoint's state.json after verifying every checksum. Raises UserError naming a damaged file.

    to_resume: as for `read_record`. max_bytes: of all files (`max_bytes_of`); larger ones are refused before anything
    is hashed.
    """
    with noticing_replacement(folder):
        record = read_record(folder, to_resume)
        flaw = _flaw(folder, max_bytes)
        if flaw:
            raise _damaged(folder, flaw, to_resume, max_bytes)
    return record


def load_checkpoint(run_dir: Path, step: int, trained: Trained) -> tuple[dict[str, Tensor], Position]:
    """Load the trained tensors and return (optimizer state, position) of a checkpoint that passed check_files.

    Raises UserError for weights that do not fit. The state is as it was read: who takes a part of it checks that part.
    """
    folder = folder_of(run_dir, step)
    position = read_position(run_dir, step)
    trained.load(folder)
    path = path_in(folder, "state.safetensors")
    try:
        return TensorFile(path).map(), position
    except (UnsafeFile, OSError) as error:
        raise _damaged(folder, f"state.safetensors is not readable ({error})") from None


def prune(run_dir: Path, keep: int, best_step: int, sound_step: int = -1) -> None:
    """Delete all checkpoints except the last `keep`, the best and the last sound one, and what is left of unfinished
    ones.

    The best one of a kept one's stage is kept, too: the next stage may begin from it (`start_from`).
    """
    steps = list_checkpoints(run_dir)
    starts = set()
    for step in steps[-keep:]:
        with contextlib.suppress(UserError):
            starts.add(read_position(run_dir, step).stage_best_step)
    for step in set(steps[:-keep]) - {best_step, sound_step} - starts:
        folder = folder_of(run_dir, step)
        if folder.is_symlink():
            # to a checkpoint that may be kept
            remove(folder)
            continue
        # first, so that a kill in the middle leaves no folder that looks complete
        (folder / "state.json").unlink()
    _remove_unfinished(run_dir)
