"""The kernel's optimizer in every memory mode: resumes, conversions between modes, capture as a CUDA graph."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.kernels.optim.split_weights import join
from safelight.kernels.triton.jit import record_launches, references_on_meta
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import Position, load_checkpoint, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.optim.ema import WeightAverages
from safelight.trainer.optim.optimizer import make_optimizer
from tests.trainer.checkpoints import state_tensors, writes

MODES = ["exact", "near", "rounded", "fp32", "paged"]
IDENTITY = Identity({}, [], "")


def make(small_unet, memory="auto", dtype=torch.bfloat16, name="adamw8bit", seed=4):
    unet = copy.deepcopy(small_unet)
    return unet, make_optimizer(unet, Optimizer(name=name, memory=memory, lr=1e-4), dtype, seed)


def steps(unet, optimizer, first, last, bad=-1):
    found = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for p in unet.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if number == bad:
            unet.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        optimizer.set_hyper(1e-4, 0.01, 0.5)
        found.append(optimizer.step())
    return found


def same(a, b):
    return all(torch.equal(a.value(name), b.value(name)) for name in a.parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.long
def test_a_resume_is_bit_for_bit_in_every_mode(tmp_path, small_unet, memory, dtype):
    unet, optimizer = make(small_unet, memory, dtype)
    taken = [bool(t) for _, t in steps(unet, optimizer, 0, 3, bad=1)]
    assert taken == [True, False, True]
    folder = save_checkpoint(tmp_path, writes(unet), state_tensors(optimizer), Position(step=3), IDENTITY)
    weights = {}
    for path in (folder / "unet").glob("*.safetensors"):
        weights |= load_file(path)
    assert {w.dtype for w in weights.values()} == {dtype}
    # what export reads is the fp32 value
    state = load_file(folder / "state.safetensors")
    for name in optimizer.parameters:
        beside = state.get(f"remainder/{name}", state.get(f"master/{name}"))
        assert (beside is None) == (memory == "rounded")
        assert torch.equal(join(weights[name], beside), optimizer.value(name))
    other_unet, resumed = make(small_unet, memory, dtype)
    resumed.load_state_tensors(load_checkpoint(tmp_path, 3, FullFineTune(other_unet))[0])
    first, second = steps(unet, optimizer, 3, 6), steps(other_unet, resumed, 3, 6)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    state, resumed_state = state_tensors(optimizer), state_tensors(resumed)
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(state[key], resumed_state[key]) for key in state)
    assert same(optimizer, resumed)


@pytest.mark.long
def test_bf16_exact_and_fp32_masters_are_one_run(tmp_path, small_unet):
    """Step by step, and from one's checkpoint into the other."""
    (unet, exact), (master_unet, master) = make(small_unet, "exact"), make(small_unet, "fp32")
    steps(unet, exact, 0, 3)
    steps(master_unet, master, 0, 3)
    assert same(exact, master)
    for source_unet, source, memory in ((unet, exact, "fp32"), (master_unet, master, "exact")):
        folder = tmp_path / memory
        save_checkpoint(folder, writes(source_unet), state_tensors(source), Position(step=3), IDENTITY)
        other_unet, other = make(small_unet, memory)
        other.load_state_tensors(load_checkpoint(folder, 3, FullFineTune(other_unet))[0])
        steps(other_unet, other, 3, 5)
        straight_unet, straight = make(small_unet, memory)
        steps(straight_unet, straight, 0, 5)
        assert same(other, straight)


def test_paged_is_exact_step_by_step_and_from_one_checkpoint_into_the_other(tmp_path, small_unet):
    (unet, exact), (paged_unet, paged) = make(small_unet, "exact"), make(small_unet, "paged")
    steps(unet, exact, 0, 3, bad=1)
    steps(paged_unet, paged, 0, 3, bad=1)
    state, paged_state = state_tensors(exact), state_tensors(paged)
    assert state.keys() == paged_state.keys()
    assert all(torch.equal(state[key], paged_state[key]) for key in state)
    # what is left on the device beside the weights: the ring and the small tensors' state
    pages, weights = paged.pages, list(unet.parameters())
    assert len(set(pages.page_of.values())) > 3 * len(pages.ring)
    assert pages.host.numel() > 4 * sum(p.numel() for p in weights if p.numel() >= 4096)
    # a step of paged follows one of exact, and one of exact that: as if it had been one run
    for n, (source_unet, source, memory) in enumerate(((unet, exact, "paged"), (paged_unet, paged, "exact"))):
        folder = tmp_path / memory
        save_checkpoint(folder, writes(source_unet), state_tensors(source), Position(step=3), IDENTITY)
        other_unet, other = make(small_unet, memory)
        other.load_state_tensors(load_checkpoint(folder, 3, FullFineTune(other_unet))[0])
        steps(other_unet, other, 3, 5)
        straight_unet, straight = make(small_unet, ("exact", "paged")[n])
        steps(straight_unet, straight, 0, 5, bad=1)
        found, expected = state_tensors(other), state_tensors(straight)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_moving_average_of_paged_weights_is_refused(small_unet):
    _, optimizer = make(small_unet, "paged")
    message = "train.ema_decay does not work with optimizer.memory paged or streamed: .* in host memory, in part; set"
    with pytest.raises(ValueError, match=message):
        WeightAverages(optimizer, 0.9)
    with pytest.raises(ValueError, match=f"here: {message}"):
        parse_config({"optimizer": {"memory": "paged"}, "train": {"ema_decay": 0.9}}, "here")


def test_a_mode_that_would_lose_precision_is_refused(tmp_path, small_unet):
    unet, exact = make(small_unet, "exact")
    steps(unet, exact, 0, 1)
    state = state_tensors(exact)
    with pytest.raises(
        ValueError, match=r"conv_in.* saved with optimizer.memory exact, which near cannot hold without loss; use exact"
    ):
        make(small_unet, "near")[1].load_state_tensors(dict(state))
    bad = dict(state) | {"state1/conv_in.weight": torch.ones(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"conv_in\.weight does not fit: state1 is \(3,\)"):
        make(small_unet, "exact")[1].load_state_tensors(bad)
    with pytest.raises(ValueError, match=r"conv_in\.weight does not fit: state1 is \(3,\)"):
        make(small_unet, "paged")[1].load_state_tensors(bad | {"state1/conv_in.weight": torch.ones(3)})
    large = next(name for name, p in unet.named_parameters() if p.numel() >= 4096)
    paged = make(small_unet, "paged")[1]
    with pytest.raises(ValueError, match=rf"{large} does not fit: absmax1 has shape \(2,\)"):
        paged.load_state_tensors(dict(state) | {f"absmax1/{large}": torch.ones(2)})
    with pytest.raises(ValueError, match="it was saved at another precision"):
        make(small_unet, "auto", torch.float32)[1].load_state_tensors(dict(state))


def test_a_run_of_bitsandbytes_continues_in_the_kernel(small_unet):
    """Older runs call bitsandbytes' optimizer adamw8bit: their moments, steps and masters load into our kernel."""
    pytest.importorskip("bitsandbytes")
    unet, theirs = make(small_unet, name="bnb_adamw8bit")
    steps(unet, theirs, 0, 2)
    other_unet, ours = make(small_unet, "exact")
    other_unet.load_state_dict(unet.state_dict())
    state = state_tensors(theirs)
    ours.load_state_tensors(dict(state))
    assert same(ours, theirs)
    found = state_tensors(ours)
    for key in state:
        if not key.startswith("master/"):
            assert torch.equal(found[key], state[key]), key


def test_the_moving_average_follows_the_joined_value(small_unet):
    averages = []
    for memory in ("exact", "fp32"):
        unet, optimizer = make(small_unet, memory)
        ema = WeightAverages(optimizer, 0.9)
        for number in range(3):
            steps(unet, optimizer, number, number + 1)
            ema.update(True)
        averages.append(ema.averages)
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_a_step_never_synchronizes():
    """Reading a value of a meta tensor fails."""
    module = torch.nn.Linear(64, 64, device="meta", dtype=torch.float16)
    optimizer = make_optimizer(module, Optimizer())
    for p in module.parameters():
        p.grad = torch.empty_like(p)
    optimizer.set_hyper(1e-6, 0.01, 1.0)
    norm, is_applied = optimizer.step()
    assert norm.device.type == is_applied.device.type == "meta"
    assert all(p.grad is None for p in module.parameters())


CASES = [("exact", False), ("exact", True), ("paged", False), ("paged", True)]


class Net(torch.nn.Module):
    """Parts of several sizes, some of whose tensors have 8-bit moments."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(64, 80, device=device)
        self.second = torch.nn.Linear(80, 96, device=device)
        self.third = torch.nn.Linear(96, 64, device=device)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def make_net(memory: str, fused: bool, dtype=torch.float16, device: str = "cpu", **options):
    net = Net(device)
    return net, make_optimizer(net, Optimizer(memory=memory, fused_backward=fused, **options), dtype, 3)


def train_step(net, optimizer, number: int, overflows: bool = False):
    """Take a step of real gradients. fp16's first scales overflow: those steps are skipped."""
    p = next(net.parameters())
    x = torch.empty(4, 64, device=p.device, dtype=p.dtype)
    if p.device.type == "cpu":
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(number)).to(p.dtype)
    optimizer.prepare_backward()
    loss = (net(x) * (float("inf") if overflows else 1.0)).square().mean()
    (loss * optimizer.loss_scale.scale).backward()
    return optimizer.step()


def everything(net, optimizer) -> dict[str, torch.Tensor]:
    return {key: x.clone() for key, x in {**net.state_dict(), **state_tensors(optimizer)}.items()}


@pytest.mark.parametrize(("memory", "fused"), CASES)
def test_a_step_changes_its_state_in_place(memory, fused):
    """Graphs and the buffers of a snapshot rely on it. That replays are right is
    tests/trainer/step/test_cuda_graphs.py."""
    net, optimizer = make_net(memory, fused, torch.bfloat16)
    optimizer.set_hyper(1e-3, 0.01, 0.5)
    addresses = []
    for number in range(3):
        train_step(net, optimizer, number, overflows=number == 1)
        state = {key: x for key, x in optimizer.live_state().items() if not key.startswith("strides")}
        addresses.append({name: x.data_ptr() for name, x in {**state, **optimizer.parameters}.items()})
    assert addresses[0] == addresses[1] == addresses[2]


class Operators(TorchDispatchMode):
    """Notes every operator with its arguments that are not tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rest = [x for x in tree_leaves((args, kwargs or {})) if not isinstance(x, torch.Tensor)]
        self.seen.append((str(func), rest))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipping", ["global", "lagged", "per-tensor"])
@pytest.mark.parametrize("memory", ["exact", "paged"])
def test_no_hyperparameter_is_an_argument_of_what_a_step_runs(memory, clipping):
    """A captured step would repeat its arguments: learning rate, decay and clipping must be read on the device."""
    net, optimizer = make_net(memory, clipping != "global", device="meta", clipping=clipping)
    steps = []
    with references_on_meta(False):
        for number in range(3):
            optimizer.set_hyper(1e-3 / (number + 1), 0.01 * number, 0.5 * (number % 2))
            with record_launches() as launches, Operators() as operators:
                train_step(net, optimizer, number)
            launched = []
            for launch in launches:
                numbers = [x for x in launch.arguments.values() if not torch.is_tensor(x)]
                launched.append((launch.kernel.__name__, launch.grid, numbers, launch.options))
            steps.append((operators.seen, launched))
    assert steps[1] == steps[2]
    assert len(steps[1][0]) > 40
    assert len(steps[1][1]) >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("memory", "fused"), CASES)
def test_training_is_the_same_with_dry_runs_in_between(memory, fused, dtype):
    ends = []
    for has_dry_runs in (False, True):
        net, optimizer = make_net(memory, fused, dtype)
        optimizer.set_hyper(1e-3, 0.01, 0.5)
        for number in range(5):
            if has_dry_runs and number in (0, 3):
                before = everything(net, optimizer)
                for overflows in (False, True):
                    with optimizer.dry_run():
                        _, is_applied = train_step(net, optimizer, 50 + number, overflows)
                    assert not is_applied
                after = everything(net, optimizer)
                assert before.keys() == after.keys()
                assert all(torch.equal(before[key], after[key]) for key in before)
                assert all(p.grad is None for p in net.parameters())
            _, is_applied = train_step(net, optimizer, number, overflows=number == 2)
        assert is_applied
        ends.append(everything(net, optimizer))
    assert all(torch.equal(x, ends[1][key]) for key, x in ends[0].items())


def test_an_error_in_a_dry_run_leaves_no_trace():
    (net, optimizer), (other_net, other) = make_net("paged", True), make_net("paged", True)
    for each in (optimizer, other):
        each.set_hyper(1e-3, 0.01, 0.5)

    def fail():
        with optimizer.dry_run():
            optimizer.prepare_backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for _ in range(12):
        # the scale falls until a step is applied
        applied = [bool(train_step(n, o, 0)[1]) for n, o in ((net, optimizer), (other_net, other))]
    assert applied == [True, True]
    expected = everything(other_net, other)
    assert all(torch.equal(x, expected[key]) for key, x in everything(net, optimizer).items())
