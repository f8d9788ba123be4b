"""All threads together decode within one memory budget, and stop waiting for it when they are told to."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from safelight.data import decode_memory, images
from safelight.data.decode_memory import Cancelled, MemoryBudget, available_bytes
from safelight.data.headers import check
from safelight.data.images import RejectedImage, decode
from safelight.data.prepare.ingest import _in_order
from tests.data.mutated_pictures import originals, saved


def test_a_budget_is_never_overdrawn():
    budget, lock = MemoryBudget(100), threading.Lock()
    held = most = 0

    def work(share: int) -> None:
        nonlocal held, most
        for _ in range(20):
            with budget.reserved(share):
                with lock:
                    held += min(share, 100)
                    most = max(most, held)
                time.sleep(0.0002)
                with lock:
                    held -= min(share, 100)

    threads = [threading.Thread(target=work, args=(share,)) for share in (10, 30, 60, 60, 100, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert held == 0
    assert 0 < most <= 100


def test_threads_that_wait_for_memory_stop_when_told_to():
    budget, stop, outcome = MemoryBudget(100), threading.Event(), []

    def wait() -> None:
        try:
            with budget.reserved(50, stop):
                outcome.append("reserved")
        except Cancelled:
            outcome.append("cancelled")

    with budget.reserved(60):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        assert outcome == []
        stop.set()
        thread.join(5)
    assert outcome == ["cancelled"]
    # what failed or was cancelled holds nothing
    with pytest.raises(ValueError, match="inside"), budget.reserved(100):
        raise ValueError("inside")
    with budget.reserved(100):
        pass


def test_decoding_holds_its_share_of_the_budget(monkeypatch):
    """While one picture is decoded, a second that does not fit beside it waits."""
    content = saved(Image.new("RGB", (300, 200)), "PNG")
    checked = check(content)
    need = images.decode_bytes(images.open_image(content), (300, 200), checked, False)
    budget = MemoryBudget(need + need // 2)
    monkeypatch.setattr(images, "decode_budget", lambda: budget)
    thread = threading.Thread(target=decode, args=(content,))
    with budget.reserved(need):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    stop = threading.Event()
    stop.set()
    with pytest.raises(RejectedImage, match="interrupted"):
        decode(content, stop=stop)


def test_a_picture_that_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(images, "available_bytes", lambda: 2**24)
    with pytest.raises(RejectedImage, match=r"need 0\.0 GiB to decode, but only 0\.0 GiB of memory"):
        decode(saved(Image.new("RGB", (300, 200)), "PNG"))


def test_large_files_are_read_one_at_a_time(tmp_path, monkeypatch):
    path, running, most = tmp_path / "a.png", [], []
    path.write_bytes(saved(Image.new("RGB", (300, 200)), "PNG"))

    def slow_read(path, read=images.read_file):
        running.append(path)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return read(path)

    monkeypatch.setattr(images, "read_file", slow_read)
    for limit, expected in ((0, 1), (2**26, 4)):
        most.clear()
        monkeypatch.setattr(images, "LARGE_FILE_BYTES", limit)
        threads = [threading.Thread(target=images.decode_file, args=(path,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert max(most) <= expected
        assert len(most) == 4


def test_interrupting_prepare_ends_the_work_ahead():
    """The consumer stops after the first result, as for Ctrl-C: what is pending is cancelled, what waits gives up."""
    started = []

    def work(item: int, stop: threading.Event) -> int:
        started.append(item)
        if item:
            stop.wait(30)
        return item

    results = _in_order(work, list(range(1000)))
    start = time.monotonic()
    assert next(results) == 0
    results.close()
    assert time.monotonic() - start < 5
    assert len(started) < 200


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(tmp_path, monkeypatch, version):
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    monkeypatch.setattr(decode_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(decode_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(decode_memory, "OWN_CGROUPS", tmp_path / "cgroup")
    assert available_bytes() == 8_000_000 * 1024
    group = tmp_path / ("memory/a/b" if version == 1 else "a/b")
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu:/x\n4:memory:/a/b\n0::/\n" if version == 1 else "0::/a/b\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for folder, limit, usage in ((group, "max", 500), (group.parent, 3000, 1000)):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(
            "total_inactive_file 30\n" if version == 1 else "anon 9\ninactive_file 30\n"
        )
    assert available_bytes() == 3000 - 1000 + 30
    (tmp_path / "meminfo").unlink()
    (tmp_path / "cgroup").unlink()
    assert available_bytes() is None


def test_every_format_has_an_estimate_above_its_pixels():
    for name, content in originals().items():
        opened = images.open_image(content)
        estimate = images.decode_bytes(opened, opened.size, check(content), False)
        assert estimate > opened.width * opened.height * 4, name


PEAKS = {
    "16-bit PNG": ("I;16", "PNG", {"compress_level": 1}),
    "RGBA PNG": ("RGBA", "PNG", {"compress_level": 1}),
    "palette PNG": ("P", "PNG", {"transparency": bytes(range(256)), "compress_level": 1}),
    "JPEG": ("RGB", "JPEG", {}),
    "progressive CMYK JPEG": ("CMYK", "JPEG", {"progressive": True}),
    "WebP": ("RGBA", "WEBP", {"method": 0}),
    "AVIF": ("RGB", "AVIF", {"speed": 10}),
    "JPEG 2000": ("RGB", "JPEG2000", {}),
    "TIFF of floats": ("F", "TIFF", {}),
    "LZW TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "GIF": ("P", "GIF", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PEAKS)
def test_decoding_takes_no_more_memory_than_estimated(kind):
    """The resident memory of this process grows by less than the estimate, for 12 megapixels."""
    mode, image_format, options = PEAKS[kind]
    values = (np.arange(12_000_000, dtype=np.uint32) >> 5).reshape(3000, 4000)
    if mode in ("I;16", "F"):
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(values.astype(np.uint8)).convert(mode)
    content = saved(image, image_format, **options)
    del values, image
    for max_megapixels in (None, 1.0):
        is_shrunk = max_megapixels is not None
        decode(content, max_megapixels)
        opened = images.open_image(content)
        estimate = images.decode_bytes(opened, opened.size, check(content), is_shrunk)
        del opened
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = resident_bytes("VmRSS")
        decode(content, max_megapixels)
        assert resident_bytes("VmHWM") - before < estimate


def resident_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
