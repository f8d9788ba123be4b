"""Activations in host memory: same bits, almost nothing left on the device, copies waited for, memory reused."""

import copy
import gc
import itertools
import weakref
from collections import deque

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.errors import UserError
from safelight.kernels.host_memory import ALIGNMENT, HostSlabs
from safelight.kernels.triton.jit import references_on_meta
from safelight.kernels.unet import activation_offload as offload
from safelight.kernels.unet import patch
from safelight.kernels.unet.activation_offload import SLAB_BYTES, offload_of
from safelight.kernels.unet.checkpointing import apply_checkpointing

CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


class LateCopies:
    """A side stream at its slowest: a copy is done only when it, or a later one, is waited for.

    Until then its destination is NaN. A copy whose memory is freed before it is waited for fails.
    """

    def __init__(self, device):
        self.queue, self.num_asked, self.num_done, self.most_queued = deque(), 0, 0, 0
        made.append(self)

    def copy(self, to, source):
        if to.numel() and to.dtype.is_floating_point:
            to.fill_(float("nan"))
        self.queue.append(
            (weakref.ref(to.untyped_storage()), weakref.ref(source.untyped_storage()), to.shape, to.dtype)
        )
        self.queue[-1] += (to.storage_offset(), source.storage_offset())
        self.num_asked += 1
        self.most_queued = max(self.most_queued, len(self.queue))
        return self.num_asked

    def wait(self, event):
        while self.num_done < event:
            to, source, shape, dtype, to_offset, source_offset = self.queue.popleft()
            assert to() is not None, "memory was freed under a copy into it"
            assert source() is not None, "memory was freed before it was copied"
            views = [
                torch.empty(0, dtype=dtype).set_(storage, start, shape)
                for storage, start in ((to(), to_offset), (source(), source_offset))
            ]
            views[0].copy_(views[1])
            self.num_done += 1


made: list[LateCopies] = []


@pytest.fixture
def late_copies(monkeypatch):
    """Make every copy as late as streams allow."""
    made.clear()
    monkeypatch.setattr(offload, "Copies", LateCopies)
    return made


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """Offload the small tensors of a small UNet too."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)


@pytest.fixture(scope="module")
def unets():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIG).train()

    def make(patched: bool, dtype=torch.float32, device="cpu"):
        found = copy.deepcopy(unet).to(device, dtype)
        if patched:
            patch.apply(found)
        return found

    return make


def inputs(number, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(number)
    shapes = [(2, 4, 16, 8), (2, 7, 24)]
    sample, text = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return sample, torch.tensor([3, 900], device=device), text


def step(unet, number=1):
    """Return (loss, gradients) of one pass; the gradients are taken from the UNet."""
    dtype = next(unet.parameters()).dtype
    loss = unet(*inputs(number, dtype)).sample.float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in unet.named_parameters()}
    unet.zero_grad()
    return loss.detach(), gradients


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert [name for name, g in expected[1].items() if not torch.equal(found[1][name], g)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patched", [False, True])
def test_losses_and_gradients_have_the_same_bits_however_late_copies_are(unets, patched, dtype, late_copies):
    unet = unets(patched, dtype)
    expected = step(unet)
    for mode in ("full", "offload"):
        apply_checkpointing(unet, mode)
        assert_equal(step(unet), expected)
    (copies,) = late_copies
    assert copies.num_asked > 30
    assert copies.most_queued > 1
    # micro-steps one after the other, into memory that was used before
    apply_checkpointing(unet, "none")
    others = [step(unet, n) for n in (2, 3)]
    apply_checkpointing(unet, "offload")
    for n, other in zip((2, 3), others, strict=True):
        assert_equal(step(unet, n), other)


def test_a_copy_that_is_not_waited_for_is_noticed(unets, late_copies, monkeypatch):
    """The fixture finds what it is for: without the wait before a use, gradients are no numbers."""
    unet = unets(True)
    apply_checkpointing(unet, "offload")
    monkeypatch.setattr(offload._HostCopy, "wait_for_copy", lambda self: setattr(self, "event", None))
    _, gradients = step(unet)
    assert any(not torch.isfinite(g).all() for g in gradients.values())


def test_passes_without_a_backward_pass_leave_nothing_in_use(unets, late_copies):
    unet = unets(False)
    expected = step(unet)
    apply_checkpointing(unet, "offload")
    unet(*inputs(2, torch.float32))
    with torch.no_grad():
        unet(*inputs(2, torch.float32))
    broken = unet.mid_block.resnets[0].conv1
    broken.padding = (9, 9)
    with pytest.raises(RuntimeError):
        unet(*inputs(2, torch.float32))
    broken.padding = (1, 1)
    gc.collect()
    assert offload_of(unet)._slabs.num_in_use == 0
    assert_equal(step(unet), expected)
    assert offload_of(unet)._slabs.num_in_use == 0
    # hooks are the pass's own: what is saved outside stays where it is
    x = torch.randn(64, 64, requires_grad=True)
    assert (x * x).grad_fn._saved_self is x


def test_the_copy_of_a_unet_offloads_into_memory_of_its_own(unets):
    unet = unets(False)
    expected = step(unet)
    apply_checkpointing(unet, "offload")
    other = copy.deepcopy(unet)
    assert_equal(step(other), expected)
    assert offload_of(unet).host_bytes == 0
    assert offload_of(other).host_bytes == SLAB_BYTES
    apply_checkpointing(other, "full")
    assert offload_of(other) is None
    assert_equal(step(other), expected)
    assert_equal(step(unet), expected)


def test_backward_twice_over_one_graph(unets, late_copies):
    """torch's checkpointing allows it under retain_graph."""
    unet = unets(False)
    expected = step(unet)
    apply_checkpointing(unet, "offload")
    loss = unet(*inputs(1, torch.float32)).sample.square().mean()
    for is_first in (True, False):
        gradients = torch.autograd.grad(loss, list(unet.parameters()), retain_graph=is_first)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1].values(), strict=True))


def test_dropout_draws_the_same_numbers_again(unets):
    unet = unets(False)
    unet.up_blocks[0].resnets[0].dropout.p = 0.5
    found = []
    for mode in ("none", "offload"):
        apply_checkpointing(unet, mode)
        torch.manual_seed(5)
        found.append(step(unet))
    assert_equal(*found)


class Alive(TorchDispatchMode):
    """The bytes of the storages that operators returned and that are still alive, by storage."""

    def __init__(self, device):
        super().__init__()
        self.device, self.sizes, self.numbers = torch.device(device), {}, itertools.count()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.device == self.device:
                storage = x.untyped_storage()
                if not hasattr(storage, "number"):
                    storage.number = next(self.numbers)
                    self.sizes[storage.number] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.number).atexit = False
        return outputs

    @property
    def total(self):
        return sum(self.sizes.values())


def between_the_passes(unet, mode):
    """Return the bytes alive on the meta device between forward and backward, of what the forward pass made."""
    apply_checkpointing(unet, mode)
    with references_on_meta(), Alive("meta") as alive:
        sample, timesteps, text = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs(1, torch.float32))
        sample, text = sample.new_empty(4, 4, 64, 64), text.new_empty(4, 77, 24)
        loss = unet(sample, timesteps.new_empty(4), text).sample.square().mean()
        found = alive.total
        loss.backward()
    return found


@pytest.mark.parametrize("patched", [False, True])
def test_nearly_nothing_stays_on_the_device(unets, patched):
    unet = unets(patched, device="meta")
    none, full, offloaded = (between_the_passes(unet, mode) for mode in ("none", "full", "offload"))
    assert full < none / 2
    assert offloaded < full / 5
    found = offload_of(unet)
    # what is no longer there went to the host, a storage once
    assert full - offloaded < found.copied_bytes < 1.2 * full
    assert found.copied_bytes <= found.host_bytes <= found.copied_bytes + SLAB_BYTES


def test_host_memory_is_taken_in_the_first_step_alone(unets):
    unet = unets(True)
    apply_checkpointing(unet, "offload")
    step(unet)
    found = offload_of(unet)
    first, allocated = found.copied_bytes, found.host_bytes
    for n in range(3):
        step(unet, n)
        assert found.copied_bytes == first
    assert found.host_bytes == allocated > 0


def test_host_memory_is_reused_once_nothing_is_in_use():
    memory = HostSlabs(4096, is_pinned=False)
    first = [memory.take(n) for n in (1000, 5000, 100)]
    # 5000 bytes get a slab of 8192 of their own; the next piece comes from what is left of the first slab
    assert memory.num_bytes == 4096 + 8192
    assert [len(x) for x in first] == [1000, 5000, 100]
    assert first[2].data_ptr() - first[0].data_ptr() == 2 * ALIGNMENT
    for _ in range(2):
        memory.give_back()
    assert memory.take(1000).data_ptr() > first[2].data_ptr(), "one is still in use"
    for _ in range(2):
        memory.give_back()
    assert [memory.take(n).data_ptr() for n in (1000, 5000, 100)] == [x.data_ptr() for x in first]
    assert memory.num_bytes == 4096 + 8192


def test_a_host_without_memory_is_reported_in_one_line(unets, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    unet = unets(False)
    apply_checkpointing(unet, "offload")
    monkeypatch.setattr(HostSlabs, "take", refuse)
    with pytest.raises(UserError, match="lower the batch size, or use checkpointing full") as error:
        step(unet)
    assert "\n" not in str(error.value)


def test_views_of_one_storage_are_copied_once_and_stay_together():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            y = (x * self.weight).view(64, 64)
            first, second = y.t()[:, :32], y[::2]
            return (first * first.sigmoid()).sum() + (second * second).sum()

    module = Views()
    expected = torch.autograd.grad(module(torch.arange(4096.0) / 4096), module.weight)
    offload.set_offload(module, True)
    loss = module(torch.arange(4096.0) / 4096)
    # x, y and the sigmoid
    assert offload_of(module).copied_bytes == 4 * (4096 + 4096 + 2048)
    assert torch.equal(*torch.autograd.grad(loss, module.weight), *expected)
