"""What plans have computed, kept on disk: the same plan needs no second trace, nor the libraries that a trace imports.

Importing diffusers takes 5 of the 8 seconds of the first plan of a tiny run, tracing SD 1.5 most of the others. A file
holds the results that follow from the same inputs: settings, configs of the base, card, processes, and the code: ours
by its content, all installed packages by their versions. Its name is a hash of the inputs, and it states them: with
others, or if anything in it is not what was written, it is as if it did not exist.

Files are in $SAFELIGHT_PLAN_CACHE, by default $XDG_CACHE_HOME/safelight/plans or ~/.cache/safelight/plans; `off` keeps
nothing. They may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.untrusted import read_bytes, read_json_object

FOLDER, OFF = "SAFELIGHT_PLAN_CACHE", "off"
# a plan of SD 1.5 on all memory modes has 100 KB
MAX_BYTES = 2**22
MAX_FILES = 100
# folders of ours; bench and the commands change no result
SOURCES = ("kernels", "trainer", "data")
# found by name in sys.path, so that a copy of one which pip does not know is seen as another
TRACED = ("torch", "triton", "diffusers", "transformers")

Result = TypeVar("Result")


def cache_folder() -> Path | None:
    """Return the folder of the files, None if nothing is kept."""
    if (named := os.environ.get(FOLDER)) is not None:
        return None if named in ("", OFF) else Path(named)
    with contextlib.suppress(RuntimeError):
        # as the XDG Base Directory Specification has it, a relative path counts as none
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (home if home.is_absolute() else Path.home() / ".cache") / "safelight" / "plans"
    # whoever has no home folder
    return None


def source_folders() -> list[Path]:
    """Return the folders of SOURCES, of a checkout or an installed wheel."""
    specs = (importlib.util.find_spec(f"safelight.{name}") for name in SOURCES)
    return [Path(root) for spec in specs for root in spec.submodule_search_locations]


def hash_of_sources(folders: Iterable[Path]) -> str:
    """Return the SHA-256 of the Python files in folders, of names and contents."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = read_bytes(path)
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def hash_of_packages(places: Iterable[str]) -> str:
    """Return the SHA-256 of the names and versions of all packages, in the order of the folders that have them.

    places: as in sys.path.
    """
    digest = hashlib.sha256()
    for entry in places:
        with contextlib.suppress(OSError):
            # the folder of a package's metadata is called NAME-VERSION.dist-info
            names = sorted(n for n in os.listdir(entry or ".") if n.endswith((".dist-info", ".egg-info")))
            digest.update("\n".join([*names, ""]).encode())
    for name in TRACED:
        spec = importlib.util.find_spec(name)
        digest.update(f"{name} {None if spec is None else spec.origin}\n".encode())
    return digest.hexdigest()


@functools.cache
def code_inputs() -> dict[str, str]:
    """Return what a result depends on besides its settings: our code, the packages and the machine's kind."""
    return {
        "sources": hash_of_sources(source_folders()),
        "packages": hash_of_packages(sys.path),
        "python": sys.version,
        "machine": f"{sys.platform} {platform.machine()}",
        "interpreter of triton": os.environ.get("TRITON_INTERPRET", ""),
    }


class PlanCache:
    """The results that follow from some inputs, by a key.

    inputs: plain values that hold everything that the results depend on, but for `code_inputs`.
    """

    def __init__(self, inputs: dict):
        self._folder, self._has_new = cache_folder(), False
        self._results: dict[str, object] = {}
        if self._folder is None:
            return
        self._inputs = {**inputs, "code": code_inputs()}
        self._text = json.dumps(self._inputs, sort_keys=True)
        name = hashlib.sha256(self._text.encode()).hexdigest()
        self._path = self._folder / f"{name}.json"
        self._results = self._stored()

    def _stored(self) -> dict[str, object]:
        """Return what the file holds, {} if there is none or if it is damaged or of other inputs."""
        try:
            stored = read_json_object(self._path, MAX_BYTES)
        except (OSError, UserError):
            return {}
        results = stored.get("results")
        is_ours = json.dumps(stored.get("inputs"), sort_keys=True) == self._text
        return results if is_ours and isinstance(results, dict) else {}

    def get(self, key: str, read: Callable[[object], Result]) -> Result | None:
        """Return a result, None if it is not known. read: makes it of plain values; ValueError for any others."""
        if key not in self._results:
            return None
        try:
            return read(self._results[key])
        except ValueError:
            return None

    def put(self, key: str, values: object) -> None:
        """Keep a result's plain values, on disk from the next `save` on."""
        self._results[key], self._has_new = values, True

    def remembered(
        self,
        key: str,
        make: Callable[[], Result],
        to_values: Callable[[Result], object],
        read: Callable[[object], Result],
    ) -> Result:
        """Return a result, made if it is not known. to_values: what `put` keeps of it; read: as for `get`."""
        result = self.get(key, read)
        if result is None:
            result = make()
            self.put(key, to_values(result))
        return result

    def save(self) -> None:
        """Write the file if there are new results, and delete the oldest ones beyond MAX_FILES."""
        if self._folder is None or not self._has_new:
            return
        self._has_new = False
        # what another process has found meanwhile is kept
        results = {**self._stored(), **self._results}
        # a home folder that is read-only or full: nothing is lost but time
        with contextlib.suppress(OSError):
            atomic_write_text(self._path, json.dumps({"inputs": self._inputs, "results": results}))
            files = [(path.stat().st_mtime_ns, path) for path in self._folder.glob("*.json")]
            for _, path in sorted(files)[:-MAX_FILES]:
                path.unlink()


# The checks of what a file holds.


def checked_int(value: object) -> int:
    """Return a number of bytes or of things. Raises ValueError for anything else."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a number of things")
    return value


def checked_text(value: object, allowed: tuple[str, ...] | None = None) -> str:
    """Return a line of text, one of `allowed` if given. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        raise ValueError("not a line of text")
    if allowed is not None and value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def checked_table(value: object, keys: set[str]) -> dict:
    """Return an object with exactly these keys. Raises ValueError for anything else."""
    if not isinstance(value, dict) or value.keys() != keys:
        raise ValueError(f"not a table of {', '.join(sorted(keys))}")
    return value
