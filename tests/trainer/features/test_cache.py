"""Kept features: nothing is computed twice; kills, damage and links cost only what they hit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.features import cache as cache_module
from safelight.trainer.features.cache import FeatureCache
from safelight.trainer.features.extractor import PictureTextModel

KEYS = [f"{number:064x}" for number in range(40)]


class Counted:
    """Pictures of one grey each, an extractor that returns it, and how often both were asked."""

    def __init__(self, fingerprint: str = "a"):
        self.loaded: list[int] = []
        self.extractor = PictureTextModel(
            "grey",
            fingerprint,
            3,
            lambda image: np.full(3, image.getpixel((0, 0))[0]),
            lambda text: np.full(3, len(text)),
        )

    def load(self, place: int) -> Image.Image:
        self.loaded.append(place)
        return Image.new("RGB", (8, 8), (place, 0, 0))

    def ask(self, run, keys=KEYS) -> np.ndarray:
        self.loaded.clear()
        found = FeatureCache(run, self.extractor).features(keys, self.load)
        assert (found == np.repeat(np.arange(len(keys)), 3).reshape(-1, 3)).all()
        return found


def test_a_second_run_computes_nothing(tmp_path):
    counted = Counted()
    counted.ask(tmp_path)
    assert counted.loaded == list(range(40))
    counted.ask(tmp_path)
    assert counted.loaded == []
    # another extractor has a file of its own
    other = Counted("b")
    other.ask(tmp_path)
    assert len(other.loaded) == 40


def test_texts_are_kept_too_and_are_no_pictures(tmp_path):
    counted = Counted()
    counted.ask(tmp_path, KEYS[:2])
    cache = FeatureCache(tmp_path, counted.extractor)
    assert cache.text_features(counted.extractor, [KEYS[0], "ab"])[:, 0].tolist() == [64, 2]
    nothing = PictureTextModel("grey", "a", 3, lambda image: 1 / 0, lambda text: 1 / 0)
    assert FeatureCache(tmp_path, nothing).text_features(nothing, ["ab"])[0, 0] == 2


def test_progress_is_told(tmp_path):
    counted = Counted()
    counted.ask(tmp_path, KEYS[:10])
    told: list[int] = []
    FeatureCache(tmp_path, counted.extractor).features(KEYS, counted.load, told.append)
    assert told == [10, 16, 14]


def test_a_kill_costs_a_row_at_most(tmp_path):
    """The file is cut anywhere: what is whole is kept, and what follows is written over the rest."""
    counted = Counted()
    counted.ask(tmp_path)
    path = FeatureCache(tmp_path, counted.extractor).path
    whole = path.read_bytes()
    row_bytes = len(whole) // 40
    for end in (0, 1, row_bytes - 1, 5 * row_bytes + 7, len(whole) - 1):
        path.write_bytes(whole[:end])
        counted.ask(tmp_path)
        assert len(counted.loaded) == 40 - end // row_bytes
        assert path.stat().st_size == len(whole)
        counted.ask(tmp_path)
        assert counted.loaded == []


def test_any_changed_byte_costs_its_row(tmp_path):
    counted = Counted()
    counted.ask(tmp_path)
    path = FeatureCache(tmp_path, counted.extractor).path
    whole = path.read_bytes()
    for place in range(3, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        counted.ask(tmp_path)
        assert counted.loaded == [place // (len(whole) // 40)]


def test_rows_that_are_not_finite_are_not_believed(tmp_path):
    """Somebody else may have made the file, checksums and all."""
    counted = Counted()
    counted.ask(tmp_path, KEYS[:1])
    path = FeatureCache(tmp_path, counted.extractor).path
    content = path.read_bytes()[:32] + np.full(3, np.nan, dtype="<f4").tobytes()
    path.write_bytes(content + cache_module._checksum(content))
    counted.ask(tmp_path, KEYS[:1])
    assert counted.loaded == [0]


def test_what_is_no_file_of_ours_is_refused(tmp_path, monkeypatch):
    counted = Counted()
    path = FeatureCache(tmp_path / "run", counted.extractor).path
    path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(b"")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"leads out of this folder.*; delete it: the features that it kept are"):
        counted.ask(tmp_path / "run")
    path.unlink()
    path.symlink_to(path.parent / "dangling")
    with pytest.raises(UserError, match=r"cannot be read.*; delete it: the features"):
        counted.ask(tmp_path / "run")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not a regular file but a folder; delete it: the features"):
        counted.ask(tmp_path / "run")
    path.rmdir()
    monkeypatch.setattr(cache_module, "MAX_BYTES", 10)
    counted.ask(tmp_path / "run")
    with pytest.raises(UserError, match="over the limit of 10; delete it: the features"):
        counted.ask(tmp_path / "run")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; make room") as error:
        Counted().ask(tmp_path)
    assert "\n" not in str(error.value)
