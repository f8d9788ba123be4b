"""Several processes fill one cache; loading, encoding and writing overlap, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from safelight.data import filling
from safelight.data.cache import Cache, fill_latents
from safelight.data.claims import CLAIMS_NAME, Claims
from safelight.data.filling import fill, loads_nothing
from safelight.errors import UserError
from tests.data.damaged_rows import damaged_rows
from tests.data.rows import all_keys, contents

ROW = np.ones((1, 4))


@pytest.fixture
def share(noise_dataset, tmp_path):
    """A function that starts processes which fill tmp_path/shared once they have all been told to."""
    children = []

    def start(num: int) -> list[subprocess.Popen]:
        script = Path(__file__).with_name("fakes.py")
        command = [sys.executable, str(script), str(noise_dataset), str(tmp_path / "shared"), "share", "0"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children.extend(subprocess.Popen(command, **pipes) for _ in range(num))
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        return children

    yield start
    for child in children:
        child.kill()
        child.communicate()


def encoded_by(child: subprocess.Popen) -> tuple[int, int]:
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    *progress, last = out.splitlines()
    assert progress[-1].split()[0] == progress[-1].split()[1], "everything is done when a process ends"
    return tuple(map(int, last.split()[1:]))


@pytest.mark.slow
def test_three_processes_encode_every_row_once(share, filled, tmp_path):
    reference, samples = filled
    keys = all_keys(samples)
    num_latents = len({key for sample in samples for key in sample.latent_keys})
    latents, texts = zip(*map(encoded_by, share(3)), strict=True)
    assert sum(latents) == num_latents
    assert sum(texts) == len(keys) - num_latents
    assert sorted(latents)[1] > 0, "one process did everything"
    with Cache(tmp_path / "shared") as cache:
        assert len(cache) == len(keys)
        assert contents(cache, keys) == contents(reference, keys)
        assert damaged_rows(cache) == []


@pytest.mark.long
def test_the_work_of_a_killed_process_is_done_by_another(share, filled, tmp_path):
    reference, samples = filled
    keys = all_keys(samples)
    first, *others = share(2)
    while first.stdout.readline().split()[1] != "60":
        # until it encodes latents
        pass
    first.kill()
    first.wait()
    latents = [encoded_by(child)[0] for child in others]
    assert 0 < sum(latents) <= 60
    with Cache(tmp_path / "shared") as cache:
        assert len(cache) == len(keys)
        assert contents(cache, keys) == contents(reference, keys)
        assert damaged_rows(cache) == []


def test_a_process_that_hangs_with_its_claim_is_not_waited_for(tmp_path, monkeypatch):
    """As one whose machine is gone, where the file system keeps its lock."""
    monkeypatch.setattr("safelight.data.claims.STALLED_S", 0.1)
    monkeypatch.setattr("safelight.data.claims.POLL_S", 0.05)
    holder = (
        "import sys\nfrom pathlib import Path\nfrom safelight.data.claims import Claims\n"
        "with Claims(Path(sys.argv[1])) as claims:\n print(claims.take('key'), flush=True)\n input()"
    )
    with Cache(tmp_path) as cache:
        child = subprocess.Popen(
            [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout.readline() == b"True\n"
        with Claims(tmp_path) as claims:
            assert not claims.take("key")
            assert claims.take("another")
        assert fill(cache, "text", [{"key": 1}], 4, loads_nothing, lambda _, jobs: ROW) == 1
        child.kill()
        child.communicate()
        with Claims(tmp_path) as claims:
            assert claims.take("key")


def test_without_locks_the_work_is_done_all_the_same(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with Cache(tmp_path) as cache:
        assert fill(cache, "text", [{"key": 1}], 4, loads_nothing, lambda _, jobs: ROW) == 1


def test_a_cache_that_cannot_be_written_says_so_only_if_rows_are_missing(tmp_path, monkeypatch):
    with Cache(tmp_path) as cache:
        cache.append("text", ["key"], ROW)

        def refuse(*args, **options):
            raise OSError(30, "Read-only file system", str(tmp_path / CLAIMS_NAME))

        monkeypatch.setattr("safelight.data.claims.open_to_write", refuse)
        assert fill(cache, "text", [{"key": 1}], 4, loads_nothing, lambda _, jobs: ROW) == 0
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); make it writable, or copy"):
            fill(cache, "text", [{"other": 1}], 4, loads_nothing, lambda _, jobs: ROW)


def test_a_claims_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "precious").write_text("precious")
    with Cache(tmp_path / "cache") as cache:
        (tmp_path / "cache" / CLAIMS_NAME).symlink_to("../precious")
        with pytest.raises(UserError, match=r"\.claims is a link, which is not followed here; delete it"):
            fill(cache, "text", [{"key": 1}], 4, loads_nothing, lambda _, jobs: ROW)


def test_loading_and_writing_overlap_with_encoding(tmp_path, monkeypatch):
    """The second batch is encoded only after the third was loaded and while the first is being written."""
    monkeypatch.setattr(filling, "num_threads", lambda: 1)
    events = {name: threading.Event() for name in ("third loaded", "first writing", "second encoded")}
    append = Cache.append

    def slow_append(cache, kind, keys, rows):
        if keys == ["0"]:
            events["first writing"].set()
            assert events["second encoded"].wait(10)
        return append(cache, kind, keys, rows)

    def load(executor, stop, jobs):
        def read():
            if jobs == [2]:
                events["third loaded"].set()
            return jobs

        return executor.submit(read).result

    def encode(loaded, jobs):
        assert loaded == jobs
        if jobs == [1]:
            assert events["third loaded"].wait(10)
            assert events["first writing"].wait(10)
            events["second encoded"].set()
        return ROW * jobs[0]

    monkeypatch.setattr(Cache, "append", slow_append)
    with Cache(tmp_path) as cache:
        assert fill(cache, "text", [{str(n): n for n in range(5)}], 1, load, encode) == 5
        assert cache.read([str(n) for n in range(5)])[:, 0].tolist() == list(range(5))


def test_what_is_in_flight_does_not_grow_with_the_work(tmp_path, monkeypatch):
    """Neither batches that are loaded ahead of a slow encoder, nor rows before a slow disk."""
    monkeypatch.setattr(filling, "num_threads", lambda: 4)
    num_loaded = num_encoded = num_written = 0
    most = {"loaded": 0, "encoded": 0}

    def load(executor, stop, jobs):
        nonlocal num_loaded
        num_loaded += len(jobs)
        most["loaded"] = max(most["loaded"], num_loaded - num_encoded)
        return lambda: None

    def encode(_, jobs):
        nonlocal num_encoded
        num_encoded += len(jobs)
        most["encoded"] = max(most["encoded"], num_encoded - num_written)
        return np.repeat(ROW, len(jobs), axis=0)

    def append(cache, kind, keys, rows):
        nonlocal num_written
        time.sleep(0.002)
        num_written += len(keys)
        return len(keys)

    monkeypatch.setattr(Cache, "append", append)
    with Cache(tmp_path) as cache:
        fill(cache, "text", [{str(n): n for n in range(400)}], 2, load, encode)
    assert num_written == 400
    # batches of two: two and one for every two threads ahead, and the one that is encoded
    assert most["loaded"] <= 2 * (2 + 2 + 1)
    # two that wait, one that is written, one that waits to be put there
    assert most["encoded"] <= 2 * (2 + 2)


@pytest.mark.parametrize("where", ["load", "encode", "append"])
def test_an_error_of_any_stage_ends_the_filling_and_keeps_what_is_written(tmp_path, monkeypatch, where):
    append = Cache.append

    def fail(stage: str, jobs: list) -> None:
        if stage == where and jobs == [7]:
            raise UserError(f"failed to {stage}")

    def load(executor, stop, jobs):
        return executor.submit(fail, "load", jobs).result

    def encode(_, jobs):
        fail("encode", jobs)
        return ROW

    def failing_append(cache, kind, keys, rows):
        fail("append", [int(key) for key in keys])
        return append(cache, kind, keys, rows)

    monkeypatch.setattr(Cache, "append", failing_append)
    with Cache(tmp_path) as cache:
        with pytest.raises(UserError, match=f"failed to {where}"):
            fill(cache, "text", [{str(n): n for n in range(20)}], 1, load, encode)
        keys = [str(n) for n in range(7)]
        assert cache.missing(keys) == []
        assert len(cache) == 7
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("load-rows", "write-rows"))]


def test_the_same_batches_are_encoded_whoever_encodes_them(tmp_path, noise_dataset, fakes):
    """A batch's rows may depend on each other by the last bit, so a part is cut the same in every process."""
    vae = fakes.FakeVae()
    samples = fakes.plan(noise_dataset, vae, fakes.FakeTextEncoder())
    batches = []
    encode = vae.encode
    vae.encode = lambda pixels: batches.append(pixels.numpy().tobytes()) or encode(pixels)
    with Cache(tmp_path / "one") as cache:
        fill_latents(cache, noise_dataset, samples, vae, 3)
    whole, batches = set(batches), []
    with Cache(tmp_path / "two") as cache:
        # the rows of a part that another process has written
        first = next(iter(sorted({s.bucket for s in samples})))
        keys = list(dict.fromkeys(key for s in samples if s.bucket == first for key in s.latent_keys))
        with Cache(tmp_path / "one") as one:
            cache.append("posterior", keys, one.read(keys))
        fill_latents(cache, noise_dataset, samples, vae, 3)
    assert set(batches) < whole
