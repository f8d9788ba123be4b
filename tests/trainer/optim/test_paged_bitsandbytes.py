"""bitsandbytes' PagedAdamW8bit: refused without a GPU, its buffers its own; in unified memory on a GPU alone."""

import copy

import pytest
import torch

from safelight.trainer.config.toml import Optimizer
from safelight.trainer.optim.library_adamw import LibraryAdamW
from safelight.trainer.optim.optimizer import LossScale, UNetOptimizer, memory_mode

pytest.importorskip("bitsandbytes")
CONFIG = Optimizer(name="bnb_paged_adamw8bit", lr=1e-3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # more than the 100,000 elements from which on bitsandbytes pages, 8-bit moments that it does not page, and fp32 ones
        self.first = torch.nn.Linear(400, 300)
        self.second = torch.nn.Linear(300, 20)


@torch.no_grad()
def steps(net, method, first, last):
    scale = LossScale(next(net.parameters()).device, False)
    method.set_hyper(1e-3, 0.01, 0.5)
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        method.step(scale)


def state_of(net, method):
    return {
        f"{part}/{name}": x.clone()
        for name, _ in net.named_parameters()
        for part, x in method.live_state_of(name).items()
    }


def test_a_cpu_is_refused_in_one_line():
    message = (
        "bnb_paged_adamw8bit keeps its moments in CUDA's unified memory, and this run is on a CPU; use bnb_adamw8bit"
    )
    with pytest.raises(ValueError, match=message):
        UNetOptimizer(Net(), CONFIG, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        memory_mode(CONFIG, torch.bfloat16, torch.device("cpu"))
    assert memory_mode(CONFIG, torch.bfloat16, torch.device("cuda")) == "fp32"
    with pytest.raises(
        ValueError, match=r"optimizer\.memory paged is adamw8bit's; bnb_paged_adamw8bit keeps fp32 masters"
    ):
        memory_mode(CONFIG.model_copy(update={"memory": "paged"}), torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_fills_the_buffers_that_bitsandbytes_makes(monkeypatch, dtype):
    """Managed memory is stood in for by ordinary memory with the mark that bitsandbytes gives it."""
    import bitsandbytes.optim

    def buffer(self, p, dtype=torch.float32):
        made = torch.zeros_like(p, dtype=dtype)
        made.is_paged = p.numel() >= 100_000
        return made

    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "get_state_buffer", buffer)
    monkeypatch.setattr("bitsandbytes.functional.prefetch_tensor", lambda *a, **k: None)
    net = Net()
    method = LibraryAdamW(net, dict(net.named_parameters()), CONFIG, dtype, "fp32", 0)
    assert type(method.inner) is bitsandbytes.optim.PagedAdamW8bit
    steps(net, method, 0, 3)
    other = copy.deepcopy(net)
    resumed = LibraryAdamW(other, dict(other.named_parameters()), CONFIG, dtype, "fp32", 1)
    for name, p in net.named_parameters():
        parts = {part: x.clone() for part, x in method.live_state_of(name).items()}
        assert ("master" in parts) == (dtype != torch.float32)
        with torch.no_grad():
            resumed.load(name, parts)
        assert {
            x.is_paged for part, x in resumed.inner.state[resumed.master[name]].items() if part.startswith("state")
        } == {p.numel() >= 100_000}
    for one, x in ((net, method), (other, resumed)):
        steps(one, x, 3, 6)
    found, expected = state_of(other, resumed), state_of(net, method)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {x.dtype for key, x in found.items() if key.startswith("state1/")} == {torch.uint8, torch.float32}
    parts = {part: x.clone() for part, x in method.live_state_of("first.weight").items()}
    for bad, message in (
        (
            {"state1": torch.zeros(300, 400)},
            "moments of first.weight are not of the kind that bnb_paged_adamw8bit keeps",
        ),
        ({"strides": torch.tensor([1, 300])}, "in blocks of channels-last memory, which bnb_paged_adamw8bit has not"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            resumed.load("first.weight", {**parts, **bad})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_moments_are_paged_before_and_after_a_resume(dtype):
    ends = []
    for last in (6, 3):
        net = Net().cuda()
        optimizer = UNetOptimizer(net, CONFIG, dtype)
        steps(net, optimizer.method, 0, last)
        ends.append((net, optimizer))
    other = copy.deepcopy(ends[1][0])
    resumed = UNetOptimizer(other, CONFIG, dtype)
    resumed.load_state_tensors(ends[1][1].state_tensors())
    assert resumed.inner.state[resumed.master["first.weight"]]["state1"].is_paged
    steps(other, resumed.method, 3, 6)
    found, expected = resumed.state_tensors(), ends[0][1].state_tensors()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
