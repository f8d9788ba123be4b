"""Everything that a captioner ever said of a dataset's photos: DATASET/captions/KEY.jsonl, one file per setting.

A batch is appended when it is done, so that a kill loses at most the batch in flight. Texts are kept as they were
generated, so that another prefix, suffix or replacement needs no model. Photos are named by the hash of their file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

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


class Journal:
    """What was said under one setting. record: weights and generation options, which name the file."""

    def __init__(self, dataset: Path, record: dict):
        self.path = path_in(dataset, os.path.join(FOLDER_NAME, f"{key_of(record)}.jsonl"))
        self._record = record
        self.said: dict[str, Described] = {}
        # a row that a kill cut short has no newline
        self._is_cut = False
        if os.path.lexists(self.path):
            for line in read_lines(self.path, MAX_JOURNAL_BYTES, MAX_ROW_BYTES):
                self._is_cut = line is not None and not line.endswith(b"\n")
                if line is not None and (row := _row(line)) is not None:
                    self.said[row[0]] = row[1]

    def add(self, photos: Iterable[Photo], said: Iterable[Described]) -> None:
        """Append what was said of some photos; it survives a power cut."""
        self.path.parent.mkdir(exist_ok=True)
        is_new = not os.path.lexists(self.path)
        lines = [canonical(self._record)] if is_new else [""] if self._is_cut else []
        for photo, described in zip(photos, said, strict=True):
            self.said[photo.sha256] = described
            lines.append(json.dumps({"sha256": photo.sha256, "text": described.text, "tokens": described.num_tokens}))
        with open_append(self.path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode("utf-8", errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        self._is_cut = False


def _row(line: bytes) -> tuple[str, Described] | None:
    """Return (a photo's hash, what was said of it) of a line; None for the first, or one that is cut or damaged."""
    try:
        row = parse_json(line)
    except UserError:
        return None
    if not isinstance(row, dict):
        return None
    sha256, text, num_tokens = (row.get(name) for name in ("sha256", "text", "tokens"))
    is_count = isinstance(num_tokens, int) and not isinstance(num_tokens, bool) and 0 <= num_tokens < 2**16
    if not isinstance(sha256, str) or not isinstance(text, str) or not is_count or len(text) > MAX_TEXT_CHARACTERS:
        return None
    return sha256, Described(collapse(text), num_tokens)
