"""Streamed weights: where they lie, the order in which blocks come in, and no byte touched by two streams at once."""

import random

import pytest
import torch
from torch import nn

from safelight.kernels.optim import streamed_weights
from safelight.kernels.optim.streamed_weights import INWARD, NUM_SLOTS, OUTWARD, StreamedWeights
from safelight.kernels.streams import COMPUTE
from tests.kernels.optim.test_paged_state import Clocks

NUM_BLOCKS = 5


def blocks() -> list[list[nn.Parameter]]:
    """Five blocks of two weights each, one of them channels-last."""
    generator = torch.Generator().manual_seed(0)
    shapes = [((64, 65), (8, 8, 3, 3 + n)) for n in range(NUM_BLOCKS)]
    weights = [[torch.randn(shape, generator=generator) for shape in pair] for pair in shapes]
    return [[nn.Parameter(a), nn.Parameter(b.to(memory_format=torch.channels_last))] for a, b in weights]


def make() -> tuple[StreamedWeights, list[list[torch.Tensor]]]:
    """Return streamed weights and their values."""
    parameters = blocks()
    stream = StreamedWeights(parameters, torch.bfloat16, torch.device("cpu"))
    values = [[p.detach().bfloat16() for p in pair] for pair in parameters]
    for pair, expected in zip(parameters, values, strict=True):
        for p, value in zip(pair, expected, strict=True):
            stream.at_home(p).copy_(value)
    stream.attach()
    return stream, values


def test_a_taken_block_is_in_a_slot_and_all_others_in_host_memory():
    stream, values = make()
    for block in (0, 1, 4, 2, 2, 0):
        stream.take(block)
        for other, (pair, expected) in enumerate(zip(stream.parameters, values, strict=True)):
            for p, value in zip(pair, expected, strict=True):
                assert torch.equal(p, value)
                assert p.stride() == value.stride()
                assert (stream.block_in(p) == block) == (other == block)
    # what is not put back is not kept; what is, is
    for is_put in (False, True):
        stream.begin_update(3)
        stream.parameters[3][0].data.fill_(7)
        if is_put:
            stream.put(3)
        stream.take(1), stream.take(0), stream.take(2)
        assert bool((stream.parameters[3][0] == 7).all()) == is_put
    # written from outside, it is read anew
    stream.synchronize()
    stream.parameters[2][0].data.fill_(5)
    stream.take(2)
    assert bool((stream.parameters[2][0] == 5).all())


def a_pass(stream: StreamedWeights, order: list[int]) -> None:
    stream.begin_pass()
    for block in order:
        stream.take(block)


def test_each_next_block_comes_in_while_the_one_before_is_computed_with(monkeypatch):
    stream, _ = make()
    inward, original = [], stream._copy

    def note_copy(block, slot, is_inward):
        inward.extend([block] if is_inward else [])
        original(block, slot, is_inward)

    monkeypatch.setattr(stream, "_copy", note_copy)
    a_pass(stream, [0, 1, 2, 3, 4])
    # on demand
    assert inward == [0, 1, 2, 3, 4]
    for is_read_anew in (False, True):
        inward.clear()
        if is_read_anew:
            stream.synchronize()
        stream.begin_pass()
        stream.take(0)
        for block in (1, 2, 3, 4):
            assert stream.block_in(stream.ring[stream._slots.index(block)]) == block, "it was not copied ahead"
            stream.take(block)
        assert inward[:2] == [0, 1]
        assert len(inward) == NUM_BLOCKS
    assert stream.bytes_inward == 3 * 2 * sum(p.numel() for pair in stream.parameters for p in pair)


def watched(monkeypatch, seed: int) -> Clocks:
    """Return the streams after passes and updates in changing orders."""
    clocks, drawn = Clocks(), random.Random(seed)
    monkeypatch.setattr(streamed_weights, "streams_for", lambda device, *names: clocks)
    stream, _ = make()

    def copy(block, slot, is_inward):
        places = ("block", block), ("slot", slot)
        clocks.access(*(places if is_inward else reversed(places)))

    monkeypatch.setattr(stream, "_copy", copy)
    for step in range(12):
        order = list(range(NUM_BLOCKS))
        if step % 3 == 2:
            drawn.shuffle(order)
        stream.begin_pass()
        for block in order:
            stream.take(block)
            assert stream._slots[stream.slot] == block
            clocks.access(("slot", stream.slot), None)
        # every third pass is a validation
        for block in reversed(order) if step % 3 else ():
            stream.take(block)
            clocks.access(("slot", stream.slot), None)
            stream.begin_update(block)
            clocks.access(None, ("slot", stream.slot))
            stream.put(block)
    return clocks


@pytest.mark.parametrize("seed", range(3))
def test_no_two_streams_touch_the_same_bytes_at_once(monkeypatch, seed):
    clocks = watched(monkeypatch, seed)
    assert len(clocks.accesses) > 200
    assert clocks.races() == []


@pytest.mark.parametrize("stream", [COMPUTE, INWARD, OUTWARD])
def test_a_wait_that_is_left_out_shows_as_a_race(monkeypatch, stream):
    wait = Clocks.wait
    monkeypatch.setattr(Clocks, "wait", lambda self, name, event: None if name == stream else wait(self, name, event))
    assert watched(monkeypatch, 0).races()


def test_on_meta_tensors_the_ring_alone_is_held():
    meta = torch.device("meta")
    parameters = [[nn.Parameter(p.detach().to(meta)) for p in pair] for pair in blocks()]
    stream = StreamedWeights(parameters, torch.bfloat16, meta)
    assert stream.host is None
    assert len(stream.ring) == NUM_SLOTS
    assert len(stream.ring[0]) == max(sum(p.numel() for p in pair) for pair in stream.parameters)
    stream.take(2), stream.put(2)
    assert stream.block_in(parameters[2][0]) == 2
