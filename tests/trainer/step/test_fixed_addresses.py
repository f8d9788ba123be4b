"""A step that can be captured as a graph: everything stays where it is, no number is baked in, a rehearsal changes nothing."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.kernels.optim import adamw8bit
from safelight.kernels.optim import launch_tables as programs
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.triton.jit import record_launches, references_on_meta
from safelight.trainer.config.toml import Optimizer
from safelight.trainer.optim.optimizer import LossScale, UNetOptimizer

WAYS = [("exact", False), ("exact", True), ("paged", False), ("paged", True)]


class Net(torch.nn.Module):
    """Parts of several sizes, some of whose tensors have 8-bit moments."""

    def __init__(self, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(64, 80, device=device)
        self.second = torch.nn.Linear(80, 96, device=device)
        self.third = torch.nn.Linear(96, 64, device=device)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def make(memory, fused, dtype=torch.float16, device="cpu", **options):
    net = Net(device)
    return net, UNetOptimizer(net, Optimizer(memory=memory, fused_backward=fused, **options), dtype, 3)


def step(net, optimizer, number, hyper=(1e-3, 0.01, 0.5), bad=False):
    device, dtype = next(net.parameters()).device, next(net.parameters()).dtype
    x = torch.empty(4, 64, device=device, dtype=dtype)
    if device.type == "cpu":
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(number)).to(dtype)
    optimizer.arm(*hyper)
    # fp16's first scales overflow: that is a step that is not taken
    ((net(x) * (float("inf") if bad else 1.0)).square().mean() * optimizer.loss_scale.scale).backward()
    return optimizer.step(*hyper)


def tensors_of(net, optimizer):
    """Return every tensor that lives from step to step."""
    inner, method, scale = optimizer.inner, optimizer.method, optimizer.loss_scale
    found = [*net.parameters(), *inner.remainders, inner.skips, inner.step_counts, inner._corrections, inner._hyper]
    found += [x for m in inner.moments for x in vars(m).values()]
    found += [scale.scale, scale.num_good, method.last_norm, method.num_skipped, method._limit, method._norms]
    found += inner._address_tables + [w._address_table for _, each in inner._work_tables.items() for _, w in each]
    found += [*inner.pages.ring, inner.pages.host] if inner.pages else []
    return [x for x in found if x is not None]


def everything(net, optimizer):
    return {**net.state_dict(), **{key: x.clone() for key, x in optimizer.state_tensors().items()}}


@pytest.mark.parametrize(("memory", "fused"), WAYS)
def test_what_a_step_reads_or_changes_stays_where_it_is(memory, fused, monkeypatch):
    """With the tables of addresses too, which only kernels make: they are stood in for by nothing."""
    monkeypatch.setattr(adamw8bit, "runs_kernel", lambda x: True)
    for name in ("_adamw8bit_kernel", "_adamw32bit_kernel"):
        monkeypatch.setattr(adamw8bit, name, Nothing())
    net, optimizer = make(memory, fused)
    addresses = []
    for number in range(3):
        step(net, optimizer, number, bad=number == 1)
        addresses.append([x.data_ptr() for x in tensors_of(net, optimizer)])
    assert len(addresses[0]) > 30
    assert addresses[0] == addresses[1] == addresses[2]


class Nothing:
    """A kernel that is not run."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


class Operators(TorchDispatchMode):
    """Notes every operator with its arguments that are no tensors, and those that read the host."""

    def __init__(self):
        super().__init__()
        self.seen, self.of_the_host = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rest = [x for x in tree_leaves((args, kwargs or {})) if not isinstance(x, torch.Tensor)]
        self.seen.append((str(func), rest))
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs or {}))):
            self.of_the_host.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipping", ["lagged", "per-tensor"])
@pytest.mark.parametrize(("memory", "fused"), WAYS)
def test_no_number_of_a_step_is_baked_in(memory, fused, clipping):
    if not fused:
        clipping = "global"
    net, optimizer = make(memory, fused, device="meta", clipping=clipping)
    steps = []
    with references_on_meta(False):
        for number in range(3):
            # with clipping and without: what is asked of the device is the same
            optimizer.set_hyper(1e-3 / (number + 1), 0.01 * number, 0.5 * (number % 2))
            with record_launches() as launches, Operators() as operators:
                step(net, optimizer, number, ())
            told = [
                (
                    launch.kernel.__name__,
                    launch.grid,
                    [x for x in launch.arguments.values() if not torch.is_tensor(x)],
                    launch.options,
                )
                for launch in launches
            ]
            steps.append((operators.seen, told))
    assert steps[1] == steps[2]
    assert len(steps[1][0]) > 40
    assert len(steps[1][1]) >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("memory", "fused"), WAYS)
def test_a_rehearsal_changes_nothing(memory, fused, dtype):
    ends = []
    for rehearsed in (False, True):
        net, optimizer = make(memory, fused, dtype)
        for number in range(5):
            if rehearsed and number in (0, 3):
                before = everything(net, optimizer)
                for bad in (False, True):
                    with optimizer.rehearsal():
                        _, taken = step(net, optimizer, 50 + number, bad=bad)
                    assert not taken
                after = everything(net, optimizer)
                assert before.keys() == after.keys()
                assert all(torch.equal(before[key], after[key]) for key in before)
                assert all(p.grad is None for p in net.parameters())
            _, taken = step(net, optimizer, number, bad=number == 2)
        assert taken
        ends.append(everything(net, optimizer))
    assert all(torch.equal(x, ends[1][key]) for key, x in ends[0].items())


@pytest.mark.parametrize("name", ["adamw", "bnb_adamw8bit"])
def test_a_rehearsal_of_a_librarys_optimizer_changes_nothing(name):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    net, optimizer = make("auto", False, name=name)
    optimizer.loss_scale.scale.fill_(1024.0)
    for number in range(2):
        before = everything(net, optimizer)
        with optimizer.rehearsal():
            assert not step(net, optimizer, number)[1]
        after = everything(net, optimizer)
        assert all(torch.equal(x, after[key]) for key, x in before.items())
        assert step(net, optimizer, number)[1]


def test_a_broken_rehearsal_leaves_nothing_either():
    net, optimizer = make("paged", True)
    before = everything(net, optimizer)

    def breaks():
        with optimizer.rehearsal():
            optimizer.arm(1e-3, 0.0, 0.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert not optimizer.inner.is_rehearsing
    other, expected = make("paged", True)
    for x, y in ((net, optimizer), (other, expected)):
        step(x, y, 0)
    assert before.keys() == everything(net, optimizer).keys()
    found = everything(net, optimizer)
    assert all(torch.equal(x, found[key]) for key, x in everything(other, expected).items())


def test_every_captured_graph_has_a_table_of_its_own(monkeypatch):
    """A capture is stood in for: its launches are kept, and what their tables hold is looked at when a replay would be."""
    capturing, launched = [], []
    monkeypatch.setattr(programs, "_is_capturing", lambda device: bool(capturing))
    monkeypatch.setattr(adamw8bit, "runs_kernel", lambda x: True)

    class Kept(Nothing):
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(arguments[1])

    for name in ("_adamw8bit_kernel", "_adamw32bit_kernel"):
        monkeypatch.setattr(adamw8bit, name, Kept())
    weights = [torch.zeros(64, 64), torch.zeros(8)]
    optimizer = AdamW8bit(weights)

    def taken():
        gradients = [torch.ones_like(w) for w in weights]
        optimizer.step(gradients, 1e-3)
        return gradients

    eager = taken()
    made, graphs = torch.tensor, []
    for _ in range(2):
        launched.clear()
        capturing.append(True)
        with monkeypatch.context() as during:
            # nothing of the host's becomes a tensor of the device
            during.setattr(torch, "tensor", lambda *a, **k: pytest.fail("a copy from the host in a capture"))
            gradients = taken()
        capturing.clear()
        assert not any(table.any() for table in launched)
        optimizer.finish_capture()
        graphs.append((gradients, list(launched)))
    assert torch.tensor is made
    launched.clear()
    again = taken()
    graphs.append((again, list(launched)))
    tables = [table for _, found in graphs for table in found]
    assert len({table.data_ptr() for table in tables}) == 6
    for gradients, (coded, plain) in graphs:
        assert coded.tolist() == [gradients[0].data_ptr(), 0]
        assert plain.tolist() == [0, gradients[1].data_ptr()]
    # a second capture that is begun before the first is finished would share its table
    capturing.append(True)
    taken()
    with pytest.raises(AssertionError, match="finish_capture was not called"):
        taken()
    optimizer.release_captures()
    assert not any(w._captured for each in optimizer._work_tables.values() for _, w in each)
    assert eager is not again


def test_the_loss_scale_is_what_it_was_computed_anew():
    """As by the formula, with new tensors: halved, held up and down, doubled."""
    scale = LossScale(torch.device("cpu"), True)
    expected, good = 2.0**16, 0
    places = scale.scale.data_ptr(), scale.num_good.data_ptr()
    for number in range(2200):
        finite = number % 1070 != 5
        good = good + 1 if finite else 0
        expected *= (2 if good >= 1000 else 1) if finite else 0.5
        good = 0 if good >= 1000 else good
        scale.update(torch.tensor(finite))
        assert (float(scale.scale), int(scale.num_good)) == (expected, good)
    assert expected != 2.0**16
    assert places == (scale.scale.data_ptr(), scale.num_good.data_ptr())
    other = copy.deepcopy(scale)
    for _ in range(60):
        other.update(torch.tensor(False))
    assert float(other.scale) == 2.0**-14
