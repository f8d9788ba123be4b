"""Asks a run that is going on for pictures: `safelight sample RUN --live`.

A request is a file in RUN/live, written under another name and then renamed. The run looks there between two steps,
draws with the weights in memory, and answers by a file beside it. Whoever can write to the folder can ask, so a request
is checked like any other file of a stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from safelight.data.atomic import atomic_write_text
from safelight.data.lock import is_held
from safelight.errors import UserError
from safelight.text import storable
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import explain
from safelight.trainer.inference.prompt_file import MAX_PROMPT_CHARS
from safelight.untrusted import UnsafeFile, check_kinds, open_regular, parse_json

FOLDER = "live"
_NAME = re.compile(r"request-([0-9a-f]{16})\.json")
# of a request and an answer
MAX_BYTES = 2**18
# pictures of a request: training waits for them
MAX_PICTURES = 64
# entries of the folder that are looked at, and requests that are answered between two steps
MAX_ENTRIES, MAX_REQUESTS = 1000, 8
POLL_S = 0.2
# settings of [sample], and seed of [run], that a request may change
CHANGES = ("steps", "cfg", "seed", "width", "height", "sampler", "spacing", "negative_prompt")


@dataclass(frozen=True)
class LiveRequest:
    """What to draw. prompts: none for those that the run samples. changes: of CHANGES, in place of the run's."""

    id: str
    prompts: tuple[str, ...]
    changes: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveAnswer:
    """files: of the pictures, in RUN/samples/live. step: of the weights that drew them."""

    files: tuple[Path, ...]
    step: int


# the command that asks


def ask(
    run_dir: Path,
    prompts: list[str],
    changes: dict[str, object],
    timeout_s: float,
    say: Callable[[str], None] | None = None,
) -> LiveAnswer:
    """Return what a run has drawn. say: called with a line while it is waited for.

    Raises UserError if no run is going, if it refuses the request or ends before it answers, or after timeout_s.
    """
    _check_going(run_dir)
    folder = run_dir / FOLDER
    check_kinds(run_dir, (FOLDER,), (), "the run", follow_links=False)
    folder.mkdir(exist_ok=True)
    number = secrets.token_hex(8)
    request, answer = folder / f"request-{number}.json", folder / f"answer-{number}.json"
    text = json.dumps({"prompts": list(map(storable, prompts)), "changes": changes}, ensure_ascii=False)
    if len(text.encode()) > MAX_BYTES:
        raise UserError(f"the prompts have more than {MAX_BYTES:,} bytes; give fewer")
    atomic_write_text(request, text)
    if say is not None:
        say("asked the run; it draws between two steps")
    ends = time.monotonic() + timeout_s
    try:
        while True:
            if os.path.lexists(answer):
                return _read_answer(run_dir, answer)
            if is_held(run_dir) is False and not os.path.lexists(answer):
                raise UserError(f"{run_dir} has ended before it drew anything; {_instead(run_dir)}")
            if time.monotonic() >= ends:
                is_taken = not os.path.lexists(request)
                what = (
                    f"is drawing, but has not finished; its pictures will be in {run_dir / 'samples' / 'live'}"
                    if is_taken
                    else "has not looked for requests: it may be loading, encoding, validating or saving"
                )
                raise UserError(f"no answer within {timeout_s:g} s: the run {what}; wait longer with --timeout")
            time.sleep(POLL_S)
    finally:
        for path in (request, answer):
            with contextlib.suppress(OSError):
                path.unlink()


def _check_going(run_dir: Path) -> None:
    if is_held(run_dir) is False:
        raise UserError(f"no training is going on in {run_dir}; {_instead(run_dir)}")


def _instead(run_dir: Path) -> str:
    return "leave out --live to draw with a checkpoint, or start it with `safelight train ... --resume`"


def _read_answer(run_dir: Path, path: Path) -> LiveAnswer:
    try:
        values = _read(path)
        if (error := values.get("error")) is not None:
            raise UserError(f"the run: {str(error)[:2000]}")
        names, step = values["files"], values["step"]
        if type(step) is not int or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UnsafeFile(f"{path} is no answer of a run")
    except (KeyError, OSError) as error:
        raise UnsafeFile(f"{path} is no answer of a run: {error}") from None
    folder = run_dir / "samples" / "live"
    return LiveAnswer(tuple(folder / os.path.basename(name) for name in names), step)


# the run that answers


class LiveInbox:
    """The requests that a run finds in its folder, where it looks at most once every POLL_S seconds."""

    def __init__(self, run_dir: Path):
        self._folder, self._looked = run_dir / FOLDER, 0.0

    def clear(self) -> None:
        """Delete what earlier runs left: nobody waits for it any more."""
        for _, path in self._waiting():
            with contextlib.suppress(OSError):
                path.unlink()

    def take(self) -> list[tuple[str, bytes | UserError]]:
        """Return (id, content) of the requests that wait, oldest first, and delete them.

        A request that cannot be read comes with the error instead.
        """
        if time.monotonic() - self._looked < POLL_S:
            return []
        self._looked = time.monotonic()
        taken: list[tuple[str, bytes | UserError]] = []
        for number, path in self._waiting()[:MAX_REQUESTS]:
            try:
                with open_regular(path, MAX_BYTES, follow_links=False) as file:
                    content: bytes | UserError = file.read()
            except UserError as error:
                content = error
            except OSError:
                # withdrawn meanwhile
                continue
            try:
                path.unlink()
            except OSError:
                # it would be drawn again and again
                continue
            taken.append((number, content))
        return taken

    def answer(self, number: str, values: dict) -> None:
        """Write an answer: {"files": [...], "step": n}, or {"error": text}; nothing if the folder is gone."""
        with contextlib.suppress(OSError):
            atomic_write_text(self._folder / f"answer-{number}.json", json.dumps(values, ensure_ascii=False))

    def _waiting(self) -> list[tuple[str, Path]]:
        found: list[tuple[float, str, Path]] = []
        if self._folder.is_symlink():
            return []
        try:
            with os.scandir(self._folder) as entries:
                for place, entry in enumerate(entries):
                    if place >= MAX_ENTRIES:
                        break
                    if match := _NAME.fullmatch(entry.name):
                        found.append((entry.stat(follow_symlinks=False).st_mtime, match[1], Path(entry.path)))
        except OSError:
            pass
        return [(number, path) for _, number, path in sorted(found)]


def parse_request(number: str, content: bytes) -> LiveRequest:
    """Return a request. Raises UserError if it is not valid; its settings are checked by `changed`."""
    values = parse_json(content, max_values=1000)
    if not isinstance(values, dict) or values.keys() - {"prompts", "changes"}:
        raise UserError("the request has other fields than prompts and changes")
    prompts, changes = values.get("prompts", []), values.get("changes", {})
    is_text = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not is_text or len(prompts) > MAX_PICTURES or any(len(prompt) > MAX_PROMPT_CHARS for prompt in prompts):
        raise UserError(f"the request's prompts are not up to {MAX_PICTURES} texts of {MAX_PROMPT_CHARS:,} characters")
    if not isinstance(changes, dict) or changes.keys() - set(CHANGES):
        raise UserError(f"the request changes other settings than {', '.join(CHANGES)}")
    return LiveRequest(number, tuple(map(storable, prompts)), changes)


def changed(config: Config, changes: dict[str, object]) -> Config:
    """Return a config with a request's settings. Raises UserError for a value that is out of bounds."""
    found = config.model_copy(deep=True)
    for name, value in changes.items():
        try:
            setattr(found.run if name == "seed" else found.sample, name, value)
        except ValidationError as error:
            raise UserError(*explain(error, "the request")) from None
    return found


def _read(path: Path) -> dict:
    with open_regular(path, MAX_BYTES, follow_links=False) as file:
        values = parse_json(file.read())
    if not isinstance(values, dict):
        raise UnsafeFile(f"{path} is no answer of a run")
    return values
