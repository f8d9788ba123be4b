"""Results that were computed before: RUN/evaluation/results/KEY.json, named by a hash of everything they depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from safelight.data.atomic import atomic_write_text
from safelight.trainer.inference.pictures import hash_of
from safelight.untrusted import UnsafeFile, path_in, read_bytes

FOLDER = "evaluation/results"
# a crop divergence with 6,000 points of its map has 0.5 MB
MAX_BYTES = 2**24
# part of every key; raise it when a change makes the same pictures give other figures
VERSION = 1

_T = TypeVar("_T", bound=BaseModel)


class Kept:
    """The results of a run's evaluations. num_computed: of those asked for, how many were not known."""

    def __init__(self, run_dir: Path):
        self._run_dir, self.num_computed = run_dir, 0

    def of(self, kind: type[_T], inputs: dict, compute: Callable[[], _T]) -> _T:
        """Return a result, which is computed and kept if it is not known. inputs: what it depends on, as JSON values.

        A result that is damaged is computed again. An exception of `compute` passes through, and keeps nothing.
        """
        key = hash_of({"version": VERSION, "kind": kind.__name__, **inputs})
        path = path_in(self._run_dir, f"{FOLDER}/{key[:32]}.json")
        try:
            return kind.model_validate_json(read_bytes(path, MAX_BYTES))
        except (OSError, UnsafeFile, ValidationError):
            pass
        result = compute()
        self.num_computed += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, result.model_dump_json())
        return result
