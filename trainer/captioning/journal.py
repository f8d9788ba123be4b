"""Everything that a model ever said of a dataset's photos: DATASET/captions/KEY.jsonl, one file per setting.

A batch is appended when it is done, so that a kill loses at most the batch in flight. What was said is kept as it was,
so that another prefix, suffix or replacement needs no model. Photos are named by the hash of their file. What taggers
saw stands in DATASET/tags in the same form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from safelight.data.photo import Photo
from safelight.errors import UserError
from safelight.text import collapse
from safelight.trainer.captioning.models import Described
from safelight.trainer.captioning.options import canonical, key_of
from safelight.untrusted import open_append, parse_json, path_in, read_lines

FOLDER_NAME = "captions"
MAX_JOURNAL_BYTES = 2**30
MAX_ROW_BYTES = 2**16
MAX_TEXT_CHARACTERS = 10_000


_T = TypeVar("_T")


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
    """What was said under one setting. record: weights and options, which name the file."""

    def __init__(self, dataset: Path, record: dict, form: Form[_T] = TEXTS):
        self.path = path_in(dataset, os.path.join(form.folder, f"{key_of(record)}.jsonl"))
        self._record, self._form = record, form
        self.said: dict[str, _T] = {}
        # a row that a kill cut short has no newline
        self._is_cut = False
        if os.path.lexists(self.path):
            for line in read_lines(self.path, MAX_JOURNAL_BYTES, MAX_ROW_BYTES):
                self._is_cut = line is not None and not line.endswith(b"\n")
                if line is not None and (row := self._row(line)) is not None:
                    self.said[row[0]] = row[1]

    def add(self, photos: Iterable[Photo], said: Iterable[_T]) -> None:
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

    def _row(self, line: bytes) -> tuple[str, _T] | None:
        """Return (a photo's hash, what was said of it) of a line; None for the first, or one that is cut or damaged."""
        try:
            row = parse_json(line)
        except UserError:
            return None
        if not isinstance(row, dict) or not isinstance(row.get("sha256"), str):
            return None
        said = self._form.of_row(row)
        return None if said is None else (row["sha256"], said)
