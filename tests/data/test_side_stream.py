"""Batches are copied to the GPU ahead of time by the loader's thread, and the host never waits for a copy."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from safelight.data.batches import Batch, iterate, load_batch
from safelight.data.buckets import Bucket
from safelight.data.cache import Cache
from safelight.data.epochs import plan_epoch
from safelight.data.side_stream import SideStream
from tests.data.rows import Text, source


@pytest.fixture
def filled(tmp_path, noise_dataset, fakes):
    vae, text = fakes.FakeVae(), fakes.FakeTextEncoder()
    with Cache(tmp_path / "cache") as cache:
        fakes.fill(cache, noise_dataset, vae, text)
        samples = fakes.plan(noise_dataset, vae, text)
        yield cache, samples, plan_epoch(samples, seed=3, epoch=0, batch_size=2, caption_dropout=0.1)


class LateCopies:
    """A device whose copies arrive when they are waited for, and not a moment before: until then there is NaN."""

    def __init__(self):
        self.sent, self.received = [], []

    def send(self, batch: Batch):
        self.sent.append(threading.current_thread().name)
        there = batch.map(lambda x: torch.full_like(x, float("nan")))
        return there, batch

    def receive(self, there: Batch, batch: Batch) -> Batch:
        self.received.append(threading.current_thread().name)
        for target, loaded in zip(there.tensors(), batch.tensors(), strict=True):
            target.copy_(loaded)
        return there


def test_each_batch_is_sent_by_the_thread_and_received_once_before_it_is_met(filled):
    cache, samples, plan = filled
    late = LateCopies()
    batches = iterate(source(cache, samples), plan, transport=late)
    for met, (micro_batch, batch) in enumerate(zip(plan, batches, strict=True), start=1):
        assert len(late.received) == met
        expected = load_batch(source(cache, samples), micro_batch)
        assert all(map(torch.equal, batch.tensors(), expected.tensors()))
        assert (batch.sample_ids, batch.bucket) == (expected.sample_ids, expected.bucket)
    assert len(late.sent) == len(late.received) == len(plan)
    assert {name.rsplit("_", 1)[0] for name in late.sent} == {"load-batch"}
    assert set(late.received) == {threading.current_thread().name}


def test_the_next_one_is_sent_while_one_is_worked_on(filled):
    cache, samples, plan = filled
    second = threading.Event()

    class Watched(LateCopies):
        def send(self, batch):
            if len(self.sent) == 1:
                second.set()
            return super().send(batch)

    batches = iterate(source(cache, samples), plan, prefetch=1, transport=Watched())
    next(batches)
    assert second.wait(10), "sent though nobody asked for it yet"
    batches.close()


def test_an_error_of_sending_is_raised_at_its_batch(filled):
    cache, samples, plan = filled

    class Broken(LateCopies):
        def send(self, batch):
            if len(self.sent) == 2:
                raise RuntimeError("CUDA error")
            return super().send(batch)

    batches = iterate(source(cache, samples), plan, transport=Broken())
    assert len([batch for _, batch in zip(range(2), batches, strict=False)]) == 2
    with pytest.raises(RuntimeError, match="CUDA error"):
        next(batches)


class Cuda:
    """Stands for torch.cuda: a log of what each stream is asked, and which one is current."""

    def __init__(self):
        self.log, self.current = [], "steps"

    def Stream(self, device):
        return Stream(self, "side")

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def current_stream(self, device):
        return Stream(self, self.current)


class Stream:
    def __init__(self, cuda: Cuda, name: str):
        self.cuda, self.name = cuda, name

    def record_event(self):
        # what was asked of this stream up to now
        return {entry for entry in self.cuda.log if entry[0] == self.name}

    def wait_event(self, event):
        self.cuda.log += [(self.name, "sees", what) for _, _, what in sorted(event)]


class Rows(torch.Tensor):
    """A tensor that logs where it is copied."""

    def __new__(cls, *_):
        return torch.Tensor._make_subclass(cls, torch.empty(0))

    def __init__(self, cuda: Cuda, name: str, where: str = "host"):
        self.cuda, self.label, self.where = cuda, name, where

    def pin_memory(self):
        return Rows(self.cuda, self.label, "pinned")

    def to(self, device, non_blocking):
        assert (self.where, non_blocking) == ("pinned", True), "the host would wait"
        self.cuda.log.append((self.cuda.current, "copies", self.label))
        return Rows(self.cuda, self.label, "device")

    def record_stream(self, stream):
        assert self.where == "device"
        self.cuda.log.append((stream.name, "keeps", self.label))


@pytest.mark.parametrize("names", [("mean", "logvar", "text"), ("mean", None, "text")])
def test_the_steps_stream_sees_every_copy_and_keeps_every_tensor(monkeypatch, names):
    cuda = Cuda()
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    mean, logvar, text = (None if name is None else Rows(cuda, name) for name in names)
    side = SideStream(torch.device("cuda"))
    sent, arrived = side.send(Batch(mean, logvar, Text(text), (1,), (0,), Bucket(64, 64)))
    there = [name for name in names if name]
    assert sorted(cuda.log) == sorted(("side", "copies", name) for name in there)
    assert cuda.current == "steps"
    received = side.receive(sent, arrived)
    assert sorted(cuda.log[len(there) :]) == sorted(
        ("steps", what, name) for what in ("sees", "keeps") for name in there
    )
    assert {x.where for x in received.tensors()} == {"device"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_batches_come_as_they_were_read(filled):
    cache, samples, plan = filled
    device = torch.device("cuda")
    batches = iterate(source(cache, samples), plan * 20, transport=SideStream(device))
    for micro_batch, batch in zip(plan * 20, batches, strict=True):
        expected = load_batch(source(cache, samples), micro_batch)
        # work that is still going on when the next one is taken
        torch.cuda._sleep(1_000_000)
        doubled = [2 * x for x in batch.tensors()]
        del batch
        assert all(torch.equal(a.cpu(), 2 * b) for a, b in zip(doubled, expected.tensors(), strict=True))
