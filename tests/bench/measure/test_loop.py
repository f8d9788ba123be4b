"""`bench loop`: every epoch is timed once, with its steps, log and checkpoint; idle time and waits."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from safelight.bench.measure import loop
from safelight.bench.measure.loop import bench_loop, config_for
from safelight.bench.recipes.suite import OURS
from safelight.bench.recipes.workload import Workload

WORK = Workload(batch_size=2, optimizer="adamw", device="cpu")


@pytest.mark.slow
def test_epochs_of_both_loops_include_their_steps_and_checkpoints(monkeypatch):
    saved = []
    import safelight.trainer.checkpoint.saver as saving

    save = saving.save_checkpoint

    def slow_save(*args, **kwargs):
        time.sleep(0.3)
        saved.append(OURS)
        return save(*args, **kwargs)

    monkeypatch.setattr(saving, "save_checkpoint", slow_save)
    write = loop.save_file
    monkeypatch.setattr(loop, "save_file", lambda *args: saved.append("everydream") or time.sleep(0.3) or write(*args))
    records = list(bench_loop(WORK, 4, 3))
    assert [r["config"]["recipe"] for r in records] == [OURS, "everydream"]
    # one checkpoint per epoch in each loop
    assert saved == [OURS] * 3 + ["everydream"] * 3
    for record in records:
        figures = record["figures"]
        # each includes a checkpoint, which takes 0.3 s
        assert 0.3 < figures["epoch_s"][0] <= figures["epoch_s"][1] <= figures["epoch_s"][2]
        assert figures["images_per_s"] == pytest.approx(4 / figures["epoch_s"][1], rel=0.01)
        assert figures["first_epoch_s"] > 0.3
        assert figures["idle_share"] is None
        assert 0 < figures["waited_share"] < 0.5
        json.dumps(record)


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time in seconds that the loop reads from its clock."""
    seconds = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


def test_waits_are_a_share_of_the_epochs_after_the_first(now):
    clock = loop._Clock(torch.device("cpu"), 1, 3)
    for waited, lasts in ((7.0, 50.0), (3.0, 10.0), (1.0, 6.0)):
        with clock.waiting():
            now[0] += waited
        now[0] += lasts - waited
        clock.epoch_ended()
    epochs = clock.epochs()
    assert (epochs.first_s, epochs.seconds, epochs.idle) == (50.0, [10.0, 6.0], None)
    assert epochs.waited == 4.0 / 16.0


def test_idle_time_is_measured_in_the_last_epoch(now, monkeypatch):
    """With a hand-written timeline: two kernels overlap, a third runs later."""
    began, calls = 5_000, []

    def kernel(start_us: int, end_us: int) -> SimpleNamespace:
        values = {
            "name": "gemm",
            "device_type": DeviceType.CUDA,
            "is_user_annotation": False,
            "correlation_id": 1,
            "linked_correlation_id": 0,
            "start_ns": began + 1000 * start_us,
            "end_ns": began + 1000 * end_us,
        }
        return SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})

    class Profiler:
        def __init__(self, activities):
            assert activities == [ProfilerActivity.CUDA]
            events = [kernel(0, 2_000_000), kernel(1_000_000, 4_000_000), kernel(6_000_000, 6_500_000)]
            results = SimpleNamespace(events=lambda: events, trace_start_ns=lambda: began)
            self.profiler = SimpleNamespace(kineto_results=results)

        def start(self) -> None:
            calls.append(("start", now[0]))

        def stop(self) -> None:
            calls.append(("stop", now[0]))

    monkeypatch.setattr(loop, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", now[0])))
    clock = loop._Clock(torch.device("cuda"), 1, 3)
    for lasts in (50.0, 20.0, 10.0):
        now[0] += lasts
        clock.epoch_ended()
    # every epoch ends with a synchronization; only the last one is profiled
    assert calls == [("wait", 50.0), ("wait", 70.0), ("start", 70.0), ("wait", 80.0), ("stop", 80.0)]
    assert clock.epochs().idle == pytest.approx(1 - 4.5 / 10)


def test_our_loop_saves_a_checkpoint_per_epoch_and_logs(tmp_path):
    config = config_for(WORK.resolved(), tmp_path / "d", tmp_path / "run", 3, 64)
    assert (config.save.every_epochs, config.train.epochs, config.log.tensorboard) == (1, 3, True)
    assert config.data.max_aspect == 1.0


def test_too_few_epochs_and_partial_batches_are_refused():
    with pytest.raises(ValueError, match="--epochs 2 is too few"):
        list(bench_loop(WORK, 4, 2))
    with pytest.raises(ValueError, match="--photographs 5 is not a multiple of --batch-size 2"):
        list(bench_loop(WORK, 5, 3))


def test_epochs_of_replayed_steps_are_detected():
    """CUDA graphs warm up all phases but "load" first; then a replayed step has only "load"."""
    clock = loop._Clock(torch.device("cpu"), steps_per_epoch=3, num_epochs=3)
    ends = []
    with clock.listen("forward"), clock.listen("optimizer"):
        pass
    for _ in range(9):
        for _ in range(2):
            with clock.listen("load"):
                ends.append(len(clock.ends))
    clock.epoch_ended()
    assert ends == [0] * 6 + [1] * 6 + [2] * 6
    assert len(clock.epochs().seconds) == 2
