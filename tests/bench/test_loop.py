"""Whole loops by the clock: that every epoch is timed once, with all that belongs to it."""

import json
import time

import pytest
import torch

from safelight.bench import loop
from safelight.bench.loop import bench_loop, config_for
from safelight.bench.suite import OURS
from safelight.bench.workload import Workload

WORK = Workload(batch_size=2, optimizer="adamw", device="cpu")


@pytest.mark.slow
def test_epochs_of_both_hold_their_steps_and_checkpoints(monkeypatch):
    saved = []
    import safelight.trainer.saver as saving

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
    # a checkpoint an epoch of each, in its time
    assert saved == [OURS] * 3 + ["everydream"] * 3
    for record in records:
        found = record["figures"]
        assert 0.3 < found["epoch_s"][0] <= found["epoch_s"][1] <= found["epoch_s"][2]
        assert found["images_per_s"] == pytest.approx(4 / found["epoch_s"][1], rel=0.01)
        # what fills caches and loads models is in the first
        assert found["first_epoch_s"] > 0.3
        assert found["idle_share"] is None
        assert 0 < found["waited_share"] < 0.5
        json.dumps(record)


def test_waits_are_a_share_of_the_later_epochs():
    clock = loop._Clock(torch.device("cpu"), 1, 3)
    for _ in range(3):
        began = time.perf_counter()
        with clock.waiting():
            time.sleep(0.03)
        while time.perf_counter() - began < 0.1:
            time.sleep(0.005)
        clock.epoch_ended()
    assert len(clock.epochs().seconds) == 2
    # the first epoch's wait is in neither
    assert clock.epochs().waited == pytest.approx(clock.waited_s / sum(clock.epochs().seconds))
    assert 0.06 <= clock.waited_s < 0.9 * sum(clock.epochs().seconds)


def test_our_run_is_a_run_of_a_user(tmp_path):
    config = config_for(WORK.resolved(), tmp_path / "d", tmp_path / "run", 3, 64)
    assert (config.save.every_epochs, config.train.epochs, config.log.tensorboard) == (1, 3, True)
    assert config.data.max_aspect == 1.0


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="--epochs 2 leaves nothing"):
        list(bench_loop(WORK, 4, 2))
    with pytest.raises(ValueError, match="--photographs 5 is no multiple of batch size 2"):
        list(bench_loop(WORK, 5, 3))
