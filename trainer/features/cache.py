"""Features that were computed before, so that a second evaluation computes none again: RUN/evaluation/features/.

A file per extractor, NAME-WIDTH.bin: rows of a key (32 bytes), the features (fp32, little-endian) and a checksum (8
bytes). Rows are appended in small groups, each of which survives a power cut. A row that is cut off, damaged or not
finite is as if it were not there, and is computed again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.distributed.together import together
from safelight.trainer.distributed.world import World
from safelight.trainer.features.extractor import Extractor, TextExtractor
from safelight.untrusted import UnsafeFile, open_to_write, path_in, read_bytes

FOLDER = os.path.join("evaluation", "features")
# 100,000 pictures of 2,048 numbers have 0.8 GB
MAX_BYTES = 2**31
KEY_BYTES, SUM_BYTES = 32, 8
NUM_BEFORE_WRITING = 16
_DELETE_IT = "delete it: the features that it kept are computed again"


class FeatureCache:
    """The features that an extractor made for a run. Raises UserError if the file is no regular one, or too large."""

    def __init__(self, run: Path, extractor: Extractor):
        self._extractor = extractor
        name = hashlib.sha256(extractor.fingerprint.encode()).hexdigest()[:32]
        name = os.path.join(FOLDER, f"{name}-{extractor.width}.bin")
        try:
            self.path = path_in(run, name)
        except UnsafeFile as error:
            raise UserError(f"{error}; {_DELETE_IT}") from None
        self._row_bytes = KEY_BYTES + 4 * extractor.width + SUM_BYTES
        self._rows: dict[bytes, np.ndarray] = {}
        # where the next row is written: over one that was cut off
        self._end = self._read() if os.path.lexists(self.path) else 0

    def features(
        self, keys: Sequence[str], load: Callable[[int], Image.Image], advance: Callable[[int], None] = lambda num: None
    ) -> np.ndarray:
        """Return the features of pictures, (N, width), fp32; those that are not known are computed and kept.

        keys: what stands for each picture's content, such as the SHA-256 of its file. load: returns picture i, if it is
        needed. advance: is told how many more pictures are done. Raises UserError if the disk refuses a row.
        """
        return self._all([f"picture {key}" for key in keys], lambda i: self._extractor.features([load(i)])[0], advance)

    def share(
        self,
        world: World,
        keys: Sequence[str],
        load: Callable[[int], Image.Image],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compute what is not known of pictures in all processes, and keep it in the main one, a few at a time.

        keys, load: as for `features`, the same in all. progress: called with (done, total) of all processes.
        """
        digests = [_digest(f"picture {key}") for key in keys]
        first = dict(zip(reversed(digests), reversed(range(len(digests))), strict=True))
        missing = world.from_main(sorted(place for digest, place in first.items() if digest not in self._rows))
        size = NUM_BEFORE_WRITING * world.size
        for start in range(0, len(missing), size):
            own = world.share(missing[start : start + size])
            with together(world) as others:
                rows = np.empty((len(own), self._extractor.width), dtype=np.float32)
                for number, place in enumerate(own):
                    rows[number] = self._extractor.features([load(place)])[0]
                    progress(start + others.whole(number + 1), len(missing))
            found = world.merged([part.numpy() for part in world.gather_rows(torch.from_numpy(rows))])
            with together(world):
                if world.is_main:
                    places = missing[start : start + size]
                    self._append({digests[place]: row for place, row in zip(places, found, strict=True)})

    def text_features(self, extractor: TextExtractor, texts: Sequence[str]) -> np.ndarray:
        """Return the features of texts, as `features` does."""
        return self._all([f"text {text}" for text in texts], lambda i: extractor.text_features([texts[i]])[0])

    def _all(
        self,
        names: Sequence[str],
        compute: Callable[[int], np.ndarray],
        advance: Callable[[int], None] = lambda num: None,
    ) -> np.ndarray:
        keys = [_digest(name) for name in names]
        missing = [place for place, key in enumerate(keys) if key not in self._rows]
        advance(len(keys) - len(missing))
        for start in range(0, len(missing), NUM_BEFORE_WRITING):
            places = missing[start : start + NUM_BEFORE_WRITING]
            self._append({keys[place]: compute(place) for place in places})
            advance(len(places))
        rows = np.empty((len(keys), self._extractor.width), dtype=np.float32)
        for row, key in zip(rows, keys, strict=True):
            row[:] = self._rows[key]
        return rows

    def _read(self) -> int:
        """Read all whole rows; return where they end."""
        try:
            content = read_bytes(self.path, MAX_BYTES)
        except UnsafeFile as error:
            raise UserError(f"{error}; {_DELETE_IT}") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}; {_DELETE_IT}") from None
        num_rows = len(content) // self._row_bytes
        for start in range(0, num_rows * self._row_bytes, self._row_bytes):
            row = content[start : start + self._row_bytes]
            values = np.frombuffer(row[KEY_BYTES:-SUM_BYTES], dtype="<f4")
            if row[-SUM_BYTES:] == _checksum(row[:-SUM_BYTES]) and np.isfinite(values).all():
                self._rows[row[:KEY_BYTES]] = values
        return num_rows * self._row_bytes

    def _append(self, found: dict[bytes, np.ndarray]) -> None:
        rows = [key + values.astype("<f4").tobytes() for key, values in found.items()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open_to_write(self.path) as file:
                file.seek(self._end)
                file.write(b"".join(row + _checksum(row) for row in rows))
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
                self._end = file.tell()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; make room, and run this again") from None
        self._rows |= found


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", errors="backslashreplace")).digest()


def _checksum(row: bytes) -> bytes:
    return hashlib.blake2b(row, digest_size=SUM_BYTES).digest()
