"""What `ingest` keeps of each photograph while it runs: the records of the manifest, no pictures."""

import gc
import tracemalloc

import numpy as np
import pytest

from safelight.data.prepare import ingest as module
from safelight.data.prepare import near_copies
from safelight.data.prepare.near_copies import SIDE, find_near_copies
from tools.prepare_memory import write_photos

# measured: 1,400 of thousands of photographs, and more of few, because dictionaries grow by leaps; 1,100 of them are
# the hashes, names and numbers of a line of the manifest
MAX_BYTES_PER_PHOTO = 2500


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.long
def test_what_is_kept_of_a_photograph_is_its_record(tmp_path, monkeypatch, traced):
    kept, writing, most = [], [], []
    write_manifest = module.write_manifest

    def measured(*args):
        gc.collect()
        before, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        write_manifest(*args)
        kept.append(before), most.append(peak), writing.append(tracemalloc.get_traced_memory()[1] - before)

    monkeypatch.setattr(module, "write_manifest", measured)
    nums = (20, 80, 280)
    for num in nums:
        write_photos(tmp_path / str(num), num)
        tracemalloc.reset_peak()
        module.ingest([tmp_path / str(num)], tmp_path / f"dataset-{num}")
    # the first imported what decoding needs
    assert (kept[2] - kept[1]) / (nums[2] - nums[1]) < MAX_BYTES_PER_PHOTO
    # a line at a time
    assert writing[2] < nums[2] * 500
    # a file is read into as much memory as it needs
    assert max(most) < 64 * 2**20


def test_thumbnails_of_candidates_are_not_held_in_memory(tmp_path, monkeypatch, traced):
    for name, size in (("ROWS", 32), ("COLUMNS", 32), ("PAIRS", 4)):
        monkeypatch.setattr(near_copies, name, size)
    num, picture = 300, np.random.default_rng(0).uniform(0, 255, (SIDE, SIDE, 3)).astype(np.float32)
    loaded = []

    def load(index: int) -> np.ndarray:
        loaded.append(index)
        return picture.copy()

    pairs = find_near_copies(["7f" * near_copies.FINGERPRINT_BYTES] * num, [1.5] * num, [True] * num, load, tmp_path)
    assert len(pairs) == num - 1
    assert sorted(loaded) == list(range(num)), "each is decoded once"
    assert tracemalloc.get_traced_memory()[1] < num * picture.nbytes / 2
    assert list(tmp_path.iterdir()) == []
