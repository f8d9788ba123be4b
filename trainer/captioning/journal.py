"""Everything that a model ever said of a dataset's photos: DATASET/captions/KEY.jsonl, one file per setting.

A batch is appended when it is done, so that a kill loses at most the batch in flight. What was said is kept as it was,
so that another prefix, suffix or replacement needs no model. Photos are named by the hash of their file. What taggers
saw stands in DATASET/tags in the same form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from safelight.errors import UserError
from safelight.text import collapse, counted
from safelight.trainer.captioning.models import Described
from safelight.trainer.captioning.options import canonical, key_of
from safelight.untrusted import open_append, parse_json, path_in, read_lines

FOLDER_NAME = "captions"
# of a whole file, more than there is for small datasets, per photo (what CLIP says has 1 to 3 KB), and of a row
MAX_JOURNAL_BYTES, MIN_JOURNAL_BYTES, BYTES_PER_PHOTO, MAX_ROW_BYTES = 2**30, 2**24, 2**14, 2**16
MAX_TEXT_CHARACTERS = 10_000


_T = TypeVar("_T")


class Hashed(Protocol):
    """What has a hash that names it: a photo, or a picture that was drawn."""

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Form(Generic[_T]):
    """How what was said of a photo stands in a row. to_row: its values. of_row: from them; None if they are damaged.

    folder: of the journals, in the dataset's.
    """

    folder: str
    to_row: Callable[[_T], dict]
    of_row: Callable[[dict], _T | None]


def _described(row: dict) -> Described | None:
    text, num_tokens = row.get("text"), row.get("tokens")
    is_count = isinstance(num_tokens, int) and not isinstance(num_tokens, bool) and 0 <= num_tokens < 2**16
    if not isinstance(text, str) or not is_count or len(text) > MAX_TEXT_CHARACTERS:
        return None
    return Described(collapse(text), num_tokens)


TEXTS = Form(FOLDER_NAME, lambda said: {"text": said.text, "tokens": said.num_tokens}, _described)


class Journal(Generic[_T]):
    """What was said of a dataset's photos under one setting. record: weights and options, which name the file.

    Rows of other photos are passed over. Raises UserError if the file is larger than these photos explain.
    """

    def __init__(self, dataset: Path, record: dict, photos: Sequence[Hashed], form: Form[_T] = TEXTS):
        self.path = path_in(dataset, os.path.join(form.folder, f"{key_of(record)}.jsonl"))
        self._record, self._form = record, form
        # a row that a kill cut short has no newline
        self._is_cut = False
        last = self._last_rows(photos) if os.path.lexists(self.path) else {}
        rows = {sha256: self._said(line) for sha256, line in last.items()}
        self.said: dict[str, _T] = {sha256: said for sha256, said in rows.items() if said is not None}

    def _last_rows(self, photos: Sequence[Hashed]) -> dict[str, bytes]:
        """Return the last row of each photo, which is not read yet: a file may hold millions that nobody needs."""
        max_bytes = min(MAX_JOURNAL_BYTES, max(MIN_JOURNAL_BYTES, BYTES_PER_PHOTO * len(photos)))
        num_bytes = os.lstat(self.path).st_size
        if num_bytes > max_bytes:
            raise UserError(
                f"{self.path} has {num_bytes:,} bytes, more than what was said of {counted(len(photos), 'photograph')} "
                f"(limit {max_bytes:,}); move it away, and what it says is asked again"
            )
        starts = {_start(photo.sha256): photo.sha256 for photo in photos}
        found: dict[str, bytes] = {}
        for line in read_lines(self.path, max_bytes, MAX_ROW_BYTES):
            if line is None:
                continue
            self._is_cut = not line.endswith(b"\n")
            if (sha256 := starts.get(line[:START_BYTES])) is not None:
                found[sha256] = line
        return found

    def add(self, photos: Iterable[Hashed], said: Iterable[_T]) -> None:
        """Append what was said of some photos; it survives a power cut."""
        self.path.parent.mkdir(exist_ok=True)
        is_new = not os.path.lexists(self.path)
        lines = [canonical(self._record)] if is_new else [""] if self._is_cut else []
        for photo, one in zip(photos, said, strict=True):
            self.said[photo.sha256] = one
            lines.append(json.dumps({"sha256": photo.sha256, **self._form.to_row(one)}))
        with open_append(self.path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode("utf-8", errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        self._is_cut = False

    def _said(self, line: bytes) -> _T | None:
        """Return what a row says of its photo, None if it is cut or damaged."""
        try:
            row = parse_json(line)
        except UserError:
            return None
        return self._form.of_row(row) if isinstance(row, dict) else None


def _start(sha256: str) -> bytes:
    """Return how the row of a photo begins."""
    return f'{{"sha256": "{sha256}"'.encode()


START_BYTES = len(_start("0" * 64))
