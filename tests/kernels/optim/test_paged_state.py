"""Optimizer state in host memory: bit for bit as on the device, in any order of pages, without data races."""

import itertools
import random
from contextlib import contextmanager

import pytest
import torch

from safelight.kernels.optim import paged_state
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.adamw8bit_state import load_state, load_value, state_of
from safelight.kernels.optim.paged_state import ALIGNMENT, INWARD, NUM_SLOTS, OUTWARD, Pages
from safelight.kernels.streams import COMPUTE, NoStreams
from safelight.kernels.triton.jit import record_launches

# one of them too small for 8 bits; a convolution's weight; last blocks that are full and short
SHAPES = [(64, 64), (4097,), (7,), (32, 16, 3, 3), (4096,), (4500,)]
GROUPS = [(0, 2), (1,), (3,), (4, 5)]


def weights(device="cpu", dtype=torch.bfloat16, seed=1, channels_last=True):
    generator = torch.Generator().manual_seed(seed)
    found = [(0.03 * torch.randn(shape, generator=generator)).to(device, dtype) for shape in SHAPES]
    if channels_last:
        found[3] = found[3].to(memory_format=torch.channels_last)
    return found


def pages_of(parameters, groups=GROUPS, moments="8bit"):
    large = {i: p for i, p in enumerate(parameters) if p.numel() >= 4096}
    return Pages(large, [[i for i in group if i in large] for group in groups], moments=moments)


def make(paged: bool, moments: str = "8bit", **options) -> AdamW8bit:
    parameters = weights(**options)
    pages = pages_of(parameters, moments=moments) if paged else None
    return AdamW8bit(parameters, memory="exact", pages=pages, moments=moments)


def gradients(step, parameters):
    generator = torch.Generator().manual_seed(100 + step)
    sizes = (10 ** (6 * torch.rand((), generator=generator) - 4) for _ in parameters)
    return [(size * torch.randn(p.shape, generator=generator)).to(p) for p, size in zip(parameters, sizes, strict=True)]


def steps(optimizer, first, last, by_groups=False):
    """Take steps, by groups in an order of each step's own, with skips."""
    for step in range(first, last):
        found = gradients(step, optimizer.parameters)
        skip = torch.zeros(len(found), dtype=torch.int32, device=optimizer.skips.device)
        skip[step % 11 : step % 11 + 2] = 1
        optimizer.begin(1e-3, 0.01)
        groups = [tuple(range(len(found)))]
        if by_groups:
            groups = random.Random(step).sample(GROUPS, len(GROUPS)) if step % 3 else GROUPS
        for group in groups:
            optimizer.update([found[i] for i in group], 0.5, skip[list(group)], group)
        optimizer.end()


def same(a: AdamW8bit, b: AdamW8bit) -> bool:
    for index in range(len(SHAPES)):
        one, other = (state_of(x, index) | {"value": x.value(index)} for x in (a, b))
        assert one.keys() == other.keys()
        if not all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one):
            return False
    return True


@pytest.mark.parametrize("by_groups", [False, True])
@pytest.mark.parametrize(
    ("dtype", "moments"), [(torch.bfloat16, "8bit"), (torch.float16, "8bit"), (torch.bfloat16, "4bit")]
)
def test_two_hundred_steps_are_exacts(dtype, moments, by_groups):
    exact, paged = make(False, moments, dtype=dtype), make(True, moments, dtype=dtype)
    before = paged.value(3).clone()
    assert len(paged.pages._sizes) > NUM_SLOTS
    steps(exact, 0, 200)
    steps(paged, 0, 200, by_groups)
    assert same(exact, paged)
    assert not torch.equal(paged.value(3), before)
    assert 150 < int(paged.step_counts.min()) < 200


@pytest.mark.parametrize("num_steps", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_kernels_steps_are_exacts(device, dtype, num_steps):
    exact, paged = make(False, dtype=dtype, device=device), make(True, dtype=dtype, device=device)
    steps(exact, 0, num_steps)
    steps(paged, 0, num_steps, by_groups=True)
    assert same(exact, paged)
    assert all(buffer.device.type == device.type for buffer in paged.pages.ring)
    assert paged.pages.host.device.type == "cpu"
    assert paged.pages.host.is_pinned() == (device.type == "cuda")


def test_a_page_is_laid_out_by_hand():
    pages = pages_of(weights(), [(0, 1, 3, 4, 5)])

    def bytes_of(numel):
        blocks = -(-numel // 256)
        return sum(-(-x // ALIGNMENT) * ALIGNMENT for x in (2 * numel, numel, numel, 4 * blocks, 4 * blocks))

    sizes = [bytes_of(n) for n in (4096, 4097, 4608, 4096, 4500)]
    # no page is larger than the largest tensor, so none holds two of these
    assert pages._sizes == sizes
    assert pages.host.numel() == sum(sizes)
    assert [buffer.numel() for buffer in pages.ring] == [max(sizes)] * NUM_SLOTS
    spans = []
    for index in pages.page_of:
        for piece in pages.at_home(index).values():
            start = piece.data_ptr() - pages.host.data_ptr()
            assert start % ALIGNMENT == 0
            spans.append((start, start + piece.numel() * piece.element_size()))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans)))
    assert pages.at_home(3)["remainder"].stride() == weights()[3].stride()
    # small tensors beside a large one share its page's room
    small = {i: torch.empty(4096, dtype=torch.bfloat16) for i in range(6)} | {6: torch.empty(4096 * 4)}
    assert pages_of(list(small.values()), [(0, 1, 2, 3, 4, 5), (6,)])._sizes[1] == 2 * bytes_of(4096)


class Clocks(NoStreams):
    """Streams as vector clocks: an access happens before another only where events say so."""

    def __init__(self):
        self.clocks = {stream: dict.fromkeys((COMPUTE, INWARD, OUTWARD), 0) for stream in (COMPUTE, INWARD, OUTWARD)}
        self.current, self.accesses = COMPUTE, []

    def record(self, stream):
        return dict(self.clocks[stream])

    def wait(self, stream, event):
        own = self.clocks[stream]
        own.update({name: max(own[name], time) for name, time in event.items()})

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def access(self, reads, writes):
        clock = self.clocks[self.current]
        clock[self.current] += 1
        for thing, is_write in [(reads, False), (writes, True)]:
            if thing is not None:
                self.accesses.append((self.current, dict(clock), thing, is_write))

    def races(self):
        found = []
        for (a, when, thing, writes), (_, later, other, also) in itertools.combinations(self.accesses, 2):
            if thing == other and (writes or also) and when[a] > later[a]:
                found.append((thing, a))
        return found


def watched(monkeypatch, num_steps, seed):
    """Return the streams after steps that take pages in random order, some of them twice, and steps that break off."""
    clocks, drawn = Clocks(), random.Random(seed)
    groups = [(i,) for i in (0, 1, 3, 4, 5)]
    monkeypatch.setattr(paged_state, "streams_for", lambda device, *names: clocks)
    pages = pages_of(weights(), groups)

    def copy(page, slot, is_inward):
        places = ("page", page), ("slot", slot)
        clocks.access(*(places if is_inward else reversed(places)))

    monkeypatch.setattr(pages, "_copy", copy)
    held = {}
    for step in range(num_steps):
        order = list(range(len(groups)))
        if step % 3 == 2:
            drawn.shuffle(order)
            order.insert(drawn.randrange(len(order)), drawn.choice(order))
        if step % 5 == 4:
            order = order[:2]
        pages.begin()
        for page in order:
            slot = pages.take(page)
            assert pages._slots[slot] == page
            held[page] = held.get(page, 0) + 1
            clocks.access(("slot", slot), ("slot", slot))
            pages.put(page)
        if step % 5 != 4:
            pages.end()
            # as a checkpoint reads it once compute is done
            clocks.access(("page", order[-1]), None)
    assert set(held) == set(range(len(groups)))
    return clocks


@pytest.mark.parametrize("seed", range(3))
def test_no_two_streams_touch_the_same_bytes_at_once(monkeypatch, seed):
    clocks = watched(monkeypatch, 15, seed)
    assert len(clocks.accesses) > 200
    assert clocks.races() == []


@pytest.mark.parametrize("stream", [COMPUTE, INWARD, OUTWARD])
def test_a_wait_that_is_left_out_shows_as_a_race(monkeypatch, stream):
    wait = Clocks.wait
    monkeypatch.setattr(Clocks, "wait", lambda self, name, event: None if name == stream else wait(self, name, event))
    assert watched(monkeypatch, 15, 0).races()


def test_pages_come_in_ahead_in_the_order_of_the_step_before(monkeypatch):
    pages = pages_of(weights(), [(i,) for i in (0, 1, 3, 4, 5)])
    inward, original = [], pages._copy

    def note_copy(page, slot, is_inward):
        inward.extend([page] if is_inward else [])
        original(page, slot, is_inward)

    monkeypatch.setattr(pages, "_copy", note_copy)
    orders = ([3, 1, 0, 4, 2], [3, 1, 0, 4, 2], [1, 3, 0, 2, 4])
    # on demand in the first step; later the first two before any is taken, and each next one as soon as a slot is free
    for order, ahead in zip(orders, ([], [3, 1], [3, 1]), strict=True):
        inward.clear()
        pages.begin()
        assert inward == ahead
        for number, page in enumerate(order):
            pages.take(page)
            assert len(inward) == (min(number + NUM_SLOTS, 5) if ahead else number + 1)
            pages.put(page)
        pages.end()
        assert sorted(inward) == [0, 1, 2, 3, 4]
    # a page that was not prefetched evicts the one that is expected last
    inward.clear()
    pages.begin()
    assert inward == [1, 3]
    pages.take(4)
    assert inward == [1, 3, 4]
    assert 1 in pages._slots
    pages.put(4)
    assert inward == [1, 3, 4, 3]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_state_goes_from_exact_to_paged_and_back(channels_last):
    straight = make(False, channels_last=channels_last)
    steps(straight, 0, 9)
    current = make(False, channels_last=channels_last)
    steps(current, 0, 3)
    for first, paged in ((3, True), (6, False)):
        following = make(paged, seed=first, channels_last=channels_last)
        for index in range(len(SHAPES)):
            state = {name: x.contiguous() for name, x in state_of(current, index).items()}
            load_value(following, index, current.parameters[index].contiguous(), state)
            load_state(following, index, state)
        current = following
        steps(current, first, first + 3, by_groups=paged)
    assert same(straight, current)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    optimizer = make(True)
    steps(optimizer, 0, 2)
    state, before = state_of(optimizer, 3), optimizer.pages.host.clone()
    for bad, message in (
        ({"state2": state["state2"][:5]}, r"state2 is \(5, 16, 3, 3\) torch.uint8, its weight \(32, 16, 3, 3\)"),
        ({"absmax1": state["absmax1"][:-1]}, r"absmax1 has shape \(17,\); this weight has \(18,\) blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_state(optimizer, 3, {**state, **bad})
    with pytest.raises(ValueError, match=r"the remainder has shape \(5, 16, 3, 3\)"):
        load_value(optimizer, 3, optimizer.parameters[3], {"remainder": state["remainder"][:5]})
    assert torch.equal(optimizer.pages.host, before)
    parameters = weights()
    with pytest.raises(ValueError, match="memory 'near' cannot live in pages of host memory; use exact"):
        AdamW8bit(parameters, memory="near", pages=pages_of(parameters))


def test_on_meta_tensors_the_ring_alone_is_held_and_nothing_is_read():
    parameters = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in SHAPES]
    optimizer = AdamW8bit(parameters, memory="exact", pages=pages_of(parameters))
    assert optimizer.pages.host is None
    assert [optimizer.remainders[i] is None for i in range(len(SHAPES))] == [p.numel() >= 4096 for p in parameters]
    for _ in range(2):
        with record_launches() as launches:
            optimizer.step([torch.empty_like(p) for p in parameters], 1e-3)
        names = [launch.kernel.__name__ for launch in launches]
        # one a page; the small one needs none
        assert sorted(names) == ["_adamw32bit_kernel"] + ["_adamw8bit_kernel"] * len(optimizer.pages._sizes)
