"""Norms taken during backward: the bits of those taken after it, and never of more than the cache holds."""

from types import SimpleNamespace

import pytest
import torch

from safelight.trainer.config.schema import Optimizer
from safelight.trainer.distributed.world import World
from safelight.trainer.optim import early_norms, kernel_adamw
from safelight.trainer.optim.early_norms import EarlyNorms, group_bytes
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.optim.reduction import OneProcess
from tests.trainer.checkpoints import state_tensors

# of gradients of 16 bits: the first weight alone is more, the second weight and bias are less
MAX_WAITING = 16_000


class Net(torch.nn.Module):
    """A product that the loss reaches in every second step only, between two others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(64, 160)
        self.sometimes = torch.nn.Linear(160, 160)
        self.last = torch.nn.Linear(160, 40)

    def forward(self, x, reaches: bool):
        x = torch.relu(self.first(x))
        return self.last(self.sometimes(x) if reaches else x)


def train(monkeypatch, max_waiting: int, dtype: torch.dtype, accumulate: int):
    """Return the weights and state after six steps, one of which overflows, the norms, and the sizes of the gradients
    in each call for norms, by step."""
    monkeypatch.setattr(kernel_adamw, "group_bytes", lambda device: max_waiting)
    net, calls = Net(), []
    optimizer = make_optimizer(net, Optimizer(memory="auto", fused_backward=False), dtype, 3)
    real = torch._foreach_norm

    def noted(tensors, *arguments):
        calls[-1].append([x.nbytes for x in tensors])
        return real(tensors, *arguments)

    monkeypatch.setattr(torch, "_foreach_norm", noted)
    found = []
    for number in range(6):
        calls.append([])
        optimizer.set_hyper(1e-3, 0.01, 0.5)
        for micro in range(accumulate):
            is_last = micro == accumulate - 1
            if is_last:
                optimizer.prepare_backward()
            generator = torch.Generator().manual_seed(10 * number + micro)
            x = torch.randn(4, 64, generator=generator).to(dtype)
            with optimizer.buffers.micro_step(micro == 0, is_last):
                loss = net(x, number % 2 == 0 and micro == 0).float().square().mean()
                (loss * (float("inf") if number == 3 else 1.0) * optimizer.loss_scale.scale).backward()
                if is_last:
                    norm, is_applied = optimizer.step()
        found.append((float(norm), bool(is_applied)))
        assert all(p.grad is None for p in net.parameters())
    monkeypatch.setattr(torch, "_foreach_norm", real)
    return {key: x.clone() for key, x in {**net.state_dict(), **state_tensors(optimizer)}.items()}, found, calls


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_training_has_the_bits_of_norms_taken_after_backward(monkeypatch, dtype, accumulate):
    after, norms, at_once = train(monkeypatch, 0, dtype, accumulate)
    early, early_norms_, calls = train(monkeypatch, MAX_WAITING, dtype, accumulate)
    assert str(norms) == str(early_norms_)
    assert after.keys() == early.keys()
    assert all(torch.equal(x, early[key]) for key, x in after.items())
    assert [[len(sizes) for sizes in step] for step in at_once] == [[6]] * 6
    for step in calls:
        assert sum(map(len, step)) == 6
        assert len(step) > 1
        # the last call also has what the loss did not reach
        assert all(sum(sizes) <= MAX_WAITING or len(sizes) == 1 for sizes in step[:-1])


def test_groups_are_taken_before_they_outgrow_the_cache(monkeypatch):
    calls = []
    real = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda x, *a: calls.append([t.numel() for t in x]) or real(x, *a))
    norms = EarlyNorms(4 * 100)
    gradients = {str(n): torch.full((n,), 2.0) for n in (60, 40, 1, 150, 30, 20)}
    for name, gradient in list(gradients.items())[:5]:
        norms.add(name, gradient)
    # the fifth waits
    assert calls == [[60, 40], [1], [150]]
    expected = [gradients[name].norm().item() for name in gradients]
    assert [x.item() for x in norms.norms_of(gradients)] == pytest.approx(expected)
    assert calls[3:] == [[30, 20]]
    assert not norms._norms


def test_small_caches_and_cpus_take_norms_after_backward(monkeypatch):
    gpu = torch.device("cuda", 0)
    for mebibytes, expected in ((4, 0), (31, 0), (32, 16), (50, 25)):
        properties = SimpleNamespace(L2_cache_size=mebibytes * 2**20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert group_bytes(gpu) == expected * 2**20
    assert group_bytes(torch.device("cpu")) == group_bytes(torch.device("meta")) == 0
    assert early_norms.MIN_CACHE_BYTES == 32 * 2**20


def test_sums_over_processes_and_updates_inside_backward_have_norms_of_their_own(monkeypatch):
    monkeypatch.setattr(kernel_adamw, "group_bytes", lambda device: MAX_WAITING)
    fused = make_optimizer(Net(), Optimizer(memory="exact", fused_backward=True), torch.bfloat16, 3)
    assert fused._early is None
    optimizer = make_optimizer(Net(), Optimizer(memory="exact", fused_backward=False), torch.bfloat16, 3)
    assert optimizer._early is not None
    optimizer.reduce_over(World())
    assert optimizer._early is not None
    optimizer.reduce_by(OneProcess())
    assert optimizer._early is None


def test_an_error_in_a_dry_run_leaves_no_gradient(monkeypatch):
    monkeypatch.setattr(kernel_adamw, "group_bytes", lambda device: MAX_WAITING)
    net = Net()
    optimizer = make_optimizer(net, Optimizer(memory="exact", fused_backward=False), torch.bfloat16, 3)
    optimizer.set_hyper(1e-3, 0.01, 0.5)
    x = torch.randn(4, 64).bfloat16()

    def fail():
        optimizer.prepare_backward()
        net(x, True).square().mean().backward()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError), optimizer.dry_run():
        fail()
    assert not optimizer._sums
    before = net.sometimes.weight.detach().clone()
    optimizer.prepare_backward()
    net(x, False).square().mean().backward()
    optimizer.step()
    # decay alone changes what the loss did not reach
    torch.testing.assert_close(net.sometimes.weight.float(), before.float() * (1 - 1e-3 * 0.01), rtol=0, atol=1e-2)
    assert all(p.grad is None for p in net.parameters())
