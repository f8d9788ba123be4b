"""Checkpoints written by a thread hold the state at the call and are complete or absent; failures are reported."""

from __future__ import annotations

import copy
import errno
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safelight.errors import UserError
from safelight.trainer import train as training
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint import saver as saving
from safelight.trainer.checkpoint.files import Position, check_files, folder_of, list_checkpoints, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.checkpoint.saver import Saver
from safelight.trainer.checkpoint.snapshot import SNAPSHOT_SLAB_BYTES, Snapshot, SnapshotBuffers
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.optim.optimizer import make_optimizer
from tests.trainer.checkpoints import state_tensors, writes

IDENTITY = Identity({"run.seed": 1}, [{"epochs": 2}], "rows")
CPU = torch.device("cpu")


@pytest.fixture
def unet(small_unet):
    return copy.deepcopy(small_unet).to(memory_format=torch.channels_last)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path, said) -> Saver:
    return Saver(tmp_path, IDENTITY, 9, lambda: None, said.append, CPU)


@pytest.fixture
def held(monkeypatch):
    """An event that every write waits for."""
    may_write = threading.Event()

    def save(*args, original=save_checkpoint):
        assert may_write.wait(30)
        return original(*args)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    yield may_write
    may_write.set()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# the snapshot


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_files_are_those_that_the_unet_writes_itself(tmp_path, unet, saver, is_kept, dtype):
    """Byte for byte, also channels-last weights and states; a second save reuses the memory."""
    optimizer = make_optimizer(unet, Optimizer(), dtype)
    optimizer.set_hyper(1e-2, 0.01, 1.0)
    if is_kept:
        saver.reserve(FullFineTune(unet), optimizer.live_state())
    for step in (1, 2):
        for p in unet.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        saver.save(FullFineTune(unet), optimizer.live_state(), Position(step=step))
        saver.wait()
        assert (saver.saved_step, saver._buffers.num_bytes) == (step, SNAPSHOT_SLAB_BYTES if is_kept else 0)
        save_checkpoint(tmp_path / "itself", writes(unet), state_tensors(optimizer), Position(step=step), IDENTITY)
        assert files_of(folder_of(tmp_path, step)) == files_of(folder_of(tmp_path / "itself", step))


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path, unet, saver, held):
    before = copy.deepcopy(unet)
    state = {"a": torch.arange(4.0), "b": torch.ones((), dtype=torch.int64)}
    saver.save(FullFineTune(unet), state, Position(step=1))
    with torch.no_grad():
        for x in [*unet.parameters(), *state.values()]:
            x.mul_(-3)
    assert list_checkpoints(tmp_path) == []
    held.set()
    saver.wait()
    expected = {"a": torch.arange(4.0), "b": torch.ones((), dtype=torch.int64)}
    save_checkpoint(tmp_path / "expected", writes(before), expected, Position(step=1), IDENTITY)
    assert files_of(folder_of(tmp_path, 1)) == files_of(folder_of(tmp_path / "expected", 1))


def test_buffers_do_not_overlap(monkeypatch):
    monkeypatch.setattr("safelight.trainer.checkpoint.snapshot.SNAPSHOT_SLAB_BYTES", 2**12)
    rng, buffers = random.Random(3), SnapshotBuffers(is_pinned=False)
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)

    def some() -> list[torch.Tensor]:
        tensors = []
        for _ in range(40):
            shape = [rng.randint(1, 6) for _ in range(rng.choice([0, 1, 4, 4]))]
            x = torch.randint(0, 99, shape).to(rng.choice(dtypes))
            tensors.append(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
        return [*tensors, torch.randint(0, 99, (3 * 2**12,), dtype=torch.uint8), torch.zeros(0), torch.arange(9)[::2]]

    for _ in range(3):
        tensors = {str(number): x for number, x in enumerate(some())}
        snapshot = Snapshot(tensors, buffers)
        addresses = [x.data_ptr() for x in snapshot.tensors.values() if x.numel()]
        # slabs begin at multiples of 64 on a CPU
        assert all(address % 64 == 0 for address in addresses)
        for name, x in snapshot.wait_for_copies().items():
            assert x.is_contiguous()
            assert x.dtype == tensors[name].dtype
            assert torch.equal(x, tensors[name])


def test_memory_that_is_scarce_is_not_kept_and_reported(unet, saver, said, monkeypatch):
    monkeypatch.setattr(saving, "available_bytes", lambda: 2**31)
    saver.reserve(FullFineTune(unet), {"a": torch.zeros(4)})
    assert said == [
        "a checkpoint's copy in host memory takes 0.0 GiB, available: 2.0 GiB; its memory is freed after each save, so "
        "saves interrupt training for longer"
    ]
    saver.save(FullFineTune(unet), {}, Position(step=1))
    saver.wait()
    assert saver._buffers.num_bytes == 0


def test_memory_that_cannot_be_pinned_is_reported_and_done_without(unet, saver, said, monkeypatch, tmp_path):
    def refuse(self, tensors):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(SnapshotBuffers, "reserve", refuse)
    saver.reserve(FullFineTune(unet), {})
    saver.save(FullFineTune(unet), {}, Position(step=1))
    saver.wait()
    assert len(said) == 1
    assert said[0].endswith("so saves interrupt training for longer (CUDA error: out of memory)")
    check_files(folder_of(tmp_path, 1))


def test_a_gpus_copies_are_asked_for_in_pinned_memory_and_waited_for_by_the_thread_alone(unet, saver, monkeypatch):
    calls = []

    class Room:
        def copy_(self, x, non_blocking: bool) -> Room:
            calls.append(("copied", non_blocking))
            return self

        def is_contiguous(self) -> bool:
            return True

    on_gpu = SimpleNamespace(device=torch.device("cuda"), detach=lambda: None)
    event = SimpleNamespace(synchronize=lambda: calls.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    snapshot = Snapshot({"a": on_gpu}, SimpleNamespace(begin=lambda: None, like=lambda x: Room()))
    assert calls == [("copied", True)], "the loop waited"
    snapshot.wait_for_copies()
    assert calls[1:] == ["waited"]
    memory = SimpleNamespace(reserve=lambda tensors: calls.append("reserved"))
    monkeypatch.setattr(saving, "SnapshotBuffers", lambda is_pinned: calls.append(("pinned", is_pinned)) or memory)
    saver.device = torch.device("cuda")
    saver.reserve(FullFineTune(unet), {})
    saver.wait()
    assert calls[2:] == [("pinned", True), "reserved"]


def test_reserved_memory_has_been_written_to(monkeypatch):
    """The first write to a page costs more than its copy."""
    touched = []
    monkeypatch.setattr(SnapshotBuffers, "like", lambda self, x: SimpleNamespace(zero_=lambda: touched.append(x)))
    SnapshotBuffers(is_pinned=False).reserve(["weights", "moments"])
    assert touched == ["weights", "moments"]


# one at a time, and in order


def test_the_next_save_waits_for_the_one_before(tmp_path, unet, saver, held, said, monkeypatch):
    monkeypatch.setattr(saving, "PATIENCE_S", 0.05)
    saver.save(FullFineTune(unet), {"a": torch.zeros(1)}, Position(step=1))
    assert (saver.requested_step, saver.saved_step) == (1, -1)
    threading.Timer(0.3, held.set).start()
    saver.save(FullFineTune(unet), {"a": torch.ones(1)}, Position(step=2))
    assert said == ["waiting for the checkpoint of step 1"]
    assert saver.saved_step == 1
    saver.wait()
    assert list_checkpoints(tmp_path) == [1, 2]


def test_metrics_are_on_disk_before_the_checkpoint_and_pruning_comes_last(tmp_path, unet, monkeypatch):
    events = []
    for name in ("save_checkpoint", "prune"):
        original = getattr(saving, name)
        monkeypatch.setattr(saving, name, lambda *a, name=name, original=original: (events.append(name), original(*a)))
    saver = Saver(tmp_path, IDENTITY, 1, lambda: events.append("metrics"), print, CPU)
    for step in (1, 2, 3):
        saver.save(FullFineTune(unet), {}, Position(step=step, best_step=1))
    saver.wait()
    assert events == ["metrics", "save_checkpoint", "prune"] * 3
    assert list_checkpoints(tmp_path) == [1, 3]


def test_a_checkpoint_is_pruned_by_what_save_keep_was_when_it_was_requested(tmp_path, unet, saver, held):
    """The next stage, whose save.keep is another one, may begin before the last one's checkpoint is written."""
    for step in (1, 2):
        save_checkpoint(tmp_path, writes(unet), {}, Position(step=step), IDENTITY)
    saver.save(FullFineTune(unet), {}, Position(step=3))
    saver.keep = 1
    held.set()
    saver.wait()
    assert list_checkpoints(tmp_path) == [1, 2, 3]
    saver.save(FullFineTune(unet), {}, Position(step=4))
    saver.wait()
    assert list_checkpoints(tmp_path) == [4]


# failures


def fail(*args):
    raise OSError(errno.ENOSPC, "No space left on device", "state.safetensors")


def test_a_failure_is_raised_at_the_next_check_and_once(unet, saver, monkeypatch):
    monkeypatch.setattr(saving, "save_checkpoint", fail)
    saver.save(FullFineTune(unet), {}, Position(step=1))
    saving.wait([saver._in_flight])
    with pytest.raises(OSError, match="No space left"):
        saver.check()
    saver.check(), saver.wait()
    assert saver.saved_step == -1


@pytest.mark.parametrize("how", ["save", "wait", "leave"])
def test_a_failure_is_never_lost(unet, saver, monkeypatch, how):
    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with pytest.raises(OSError, match="No space left"), saver:  # noqa: PT012
        saver.save(FullFineTune(unet), {}, Position(step=1))
        if how == "save":
            saver.save(FullFineTune(unet), {}, Position(step=2))
        elif how == "wait":
            saver.wait()


def test_a_failure_beside_another_one_is_reported(unet, saver, monkeypatch, said):
    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with pytest.raises(ValueError, match="the loop's own"), saver:  # noqa: PT012
        saver.save(FullFineTune(unet), {}, Position(step=1))
        raise ValueError("the loop's own")
    assert len(said) == 1
    assert said[0].startswith("the checkpoint of step 1 could not be saved: ")


def test_a_failure_of_the_loop_waits_for_the_save(tmp_path, unet, saver, held):
    threading.Timer(0.2, held.set).start()
    with pytest.raises(ValueError, match="the loop's own"), saver:  # noqa: PT012
        saver.save(FullFineTune(unet), {}, Position(step=1))
        raise ValueError("the loop's own")
    assert list_checkpoints(tmp_path) == [1]


def test_left_at_once_what_is_in_flight_ends_with_its_file_and_does_not_count(tmp_path, unet, saver, monkeypatch):
    """After a second Ctrl-C the thread has ended before the folder's lock is released, and leaves no files."""
    reached, go_on = threading.Event(), threading.Event()

    def slow(trained, folder, tensors, original=FullFineTune.write):
        reached.set()
        assert go_on.wait(30)
        original(trained, folder, tensors)

    monkeypatch.setattr(FullFineTune, "write", slow)
    with pytest.raises(KeyboardInterrupt), saver:  # noqa: PT012
        saver.save(FullFineTune(unet), {}, Position(step=1))
        assert reached.wait(30)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt
    assert list((tmp_path / "checkpoints").iterdir()) == []
    for thread in threading.enumerate():
        if thread.name == "save-checkpoint":
            thread.join(5)
            assert not thread.is_alive()


# in a run


def test_steps_go_on_while_a_checkpoint_is_written_and_the_end_waits(make_config, tmp_path, held, monkeypatch):
    config = make_config(
        train={"batch_size": 2, "max_steps": 4},
        save={"every_steps": 2, "every_epochs": 0},
        sample={"every_epochs": 0},
        validate={"every_epochs": 0},
    )
    seen = []

    def step(*args, original=training.train_step, **options):
        seen.append(list_checkpoints(tmp_path / "run"))
        if len(seen) == 4:
            held.set()
        return original(*args, **options)

    monkeypatch.setattr(training, "train_step", step)
    training.train(config)
    # the third and fourth steps began before the checkpoint of the second was complete
    assert seen == [[], [], [], []]
    assert list_checkpoints(tmp_path / "run") == [2, 4]
    assert [check_files(folder_of(tmp_path / "run", step))["position"]["step"] for step in (2, 4)] == [2, 4]


def test_a_write_that_fails_ends_the_run_at_its_next_step(make_config, tmp_path, monkeypatch):
    """Not at the next save, which may be hours away."""
    config = make_config(
        train={"batch_size": 2, "max_steps": 4},
        save={"every_steps": 2, "every_epochs": 0},
        sample={"every_epochs": 0},
        validate={"every_epochs": 0},
    )
    seen = []

    def refuse(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def step(*args, original=training.train_step, **options):
        for thread in threading.enumerate():
            if thread.name == "save-checkpoint":
                thread.join()
        seen.append(len(seen) + 1)
        return original(*args, **options)

    monkeypatch.setattr(saving, "save_checkpoint", refuse)
    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(UserError, match=r"No space left.*go on from step 0 with: "):
        training.train(config)
    assert seen == [1, 2, 3]


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(run, tiny_dataset, tmp_path):
    """Kill -9 shortly after the unfinished folder of a step appears; the end always equals an undisturbed run's."""

    def settings(name: str) -> dict:
        return {
            "run": {"dir": str(tmp_path / name), "seed": 9, "device": "cpu"},
            "model": {"precision": "bf16"},
            "data": {"path": str(tiny_dataset), "resolution": 64},
            "train": {"batch_size": 2, "max_steps": 40},
            "stage": [{"epochs": 9}],
            "sample": {"every_epochs": 0},
            "validate": {"timesteps": 2},
            "save": {"every_steps": 2, "every_epochs": 0, "keep": 50},
            "log": {"every_steps": 3, "tensorboard": False},
        }

    assert run(settings("alone")) == 0
    rng, folder, num_killed = random.Random("while it is written"), tmp_path / "killed" / "checkpoints", 0
    for step in range(2, 40, 2):
        once = folder / f".{folder_of(tmp_path, step).name}.partial"
        code = run(
            settings("killed"),
            resume=bool(list_checkpoints(folder.parent)),
            once=str(once),
            kill_after_s=rng.uniform(0, 0.1),
        )
        assert code in (0, -signal.SIGKILL)
        num_killed += code != 0
    assert num_killed >= 15
    assert run(settings("killed"), resume=True) == 0
    alone = tmp_path / "alone"
    assert list_checkpoints(alone) == list_checkpoints(folder.parent) == list(range(2, 41, 2))
    for step in list_checkpoints(alone):
        assert files_of(folder_of(alone, step)) == files_of(folder_of(folder.parent, step))
    assert not list(folder.glob(".*"))
