"""`optimizer.memory` in a run: what a checkpoint keeps, what another mode takes over, what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from safelight.kernels.optim.split_weights import join
from safelight.trainer.checkpoint.files import Position, load_checkpoint, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.config.toml import Optimizer, parse_config
from safelight.trainer.optim.ema import WeightAverages
from safelight.trainer.optim.optimizer import UNetOptimizer, memory_mode

MODES = ["exact", "near", "rounded", "fp32", "paged"]
IDENTITY = Identity({}, [], "")


def make(small_unet, memory="auto", dtype=torch.bfloat16, name="adamw8bit", seed=4):
    unet = copy.deepcopy(small_unet)
    return unet, UNetOptimizer(unet, Optimizer(name=name, memory=memory, lr=1e-4), dtype, seed)


def steps(unet, optimizer, first, last, bad=-1):
    found = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for p in unet.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if number == bad:
            unet.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        found.append(optimizer.step(1e-4, 0.01, 0.5))
    return found


def same(a, b):
    return all(torch.equal(a.value(name), b.value(name)) for name in a.parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MODES)
def test_a_resume_is_bit_for_bit_in_every_mode(tmp_path, small_unet, memory, dtype):
    unet, optimizer = make(small_unet, memory, dtype)
    taken = [bool(t) for _, t in steps(unet, optimizer, 0, 3, bad=1)]
    assert taken == [True, False, True]
    folder = save_checkpoint(tmp_path, unet, optimizer.state_tensors(), Position(step=3), IDENTITY)
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
    resumed.load_state_tensors(load_checkpoint(tmp_path, 3, other_unet)[0])
    first, second = steps(unet, optimizer, 3, 6), steps(other_unet, resumed, 3, 6)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    state, resumed_state = optimizer.state_tensors(), resumed.state_tensors()
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(state[key], resumed_state[key]) for key in state)
    assert same(optimizer, resumed)


def test_bf16_exact_and_fp32_masters_are_one_run(tmp_path, small_unet):
    """Step by step, and from one's checkpoint into the other."""
    (unet, exact), (master_unet, master) = make(small_unet, "exact"), make(small_unet, "fp32")
    steps(unet, exact, 0, 3)
    steps(master_unet, master, 0, 3)
    assert same(exact, master)
    for source_unet, source, memory in ((unet, exact, "fp32"), (master_unet, master, "exact")):
        folder = tmp_path / memory
        save_checkpoint(folder, source_unet, source.state_tensors(), Position(step=3), IDENTITY)
        other_unet, other = make(small_unet, memory)
        other.load_state_tensors(load_checkpoint(folder, 3, other_unet)[0])
        steps(other_unet, other, 3, 5)
        straight_unet, straight = make(small_unet, memory)
        steps(straight_unet, straight, 0, 5)
        assert same(other, straight)


def test_paged_is_exact_step_by_step_and_from_one_checkpoint_into_the_other(tmp_path, small_unet):
    (unet, exact), (paged_unet, paged) = make(small_unet, "exact"), make(small_unet, "paged")
    steps(unet, exact, 0, 3, bad=1)
    steps(paged_unet, paged, 0, 3, bad=1)
    state, paged_state = exact.state_tensors(), paged.state_tensors()
    assert state.keys() == paged_state.keys()
    assert all(torch.equal(state[key], paged_state[key]) for key in state)
    # what is left on the device beside the weights: the ring and the small tensors' state
    pages, weights = paged.inner.pages, list(unet.parameters())
    assert len(pages._sizes) > 3 * len(pages.ring)
    assert pages.host.numel() > 4 * sum(p.numel() for p in weights if p.numel() >= 4096)
    # a step of paged follows one of exact, and one of exact that: as if it had been one run
    for n, (source_unet, source, memory) in enumerate(((unet, exact, "paged"), (paged_unet, paged, "exact"))):
        folder = tmp_path / memory
        save_checkpoint(folder, source_unet, source.state_tensors(), Position(step=3), IDENTITY)
        other_unet, other = make(small_unet, memory)
        other.load_state_tensors(load_checkpoint(folder, 3, other_unet)[0])
        steps(other_unet, other, 3, 5)
        straight_unet, straight = make(small_unet, ("exact", "paged")[n])
        steps(straight_unet, straight, 0, 5, bad=1)
        found, expected = other.state_tensors(), straight.state_tensors()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_moving_average_of_paged_weights_is_refused(small_unet):
    _, optimizer = make(small_unet, "paged")
    message = "train.ema_decay reads .* optimizer.memory paged keeps them in host memory; set train.ema_decay to 0, or"
    with pytest.raises(ValueError, match=message):
        WeightAverages(optimizer, 0.9)
    with pytest.raises(ValueError, match=f"here: {message}"):
        parse_config({"optimizer": {"memory": "paged"}, "train": {"ema_decay": 0.9}}, "here")


def test_a_mode_that_would_lose_a_part_is_refused(tmp_path, small_unet):
    unet, exact = make(small_unet, "exact")
    steps(unet, exact, 0, 1)
    state = exact.state_tensors()
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


def test_a_run_of_bitsandbytes_is_taken_over(small_unet):
    """adamw8bit named bitsandbytes' optimizer once: moments, steps and masters of such a run go on in our kernel."""
    pytest.importorskip("bitsandbytes")
    unet, theirs = make(small_unet, name="bnb_adamw8bit")
    steps(unet, theirs, 0, 2)
    other_unet, ours = make(small_unet, "exact")
    other_unet.load_state_dict(unet.state_dict())
    state = theirs.state_tensors()
    ours.load_state_tensors(dict(state))
    assert same(ours, theirs)
    found = ours.state_tensors()
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


@pytest.mark.parametrize(
    ("name", "memory", "dtype", "expected"),
    [
        ("adamw8bit", "auto", torch.float32, "fp32"),
        ("adamw8bit", "auto", torch.bfloat16, "exact"),
        ("adamw8bit", "near", torch.float16, "near"),
        ("adamw", "auto", torch.bfloat16, "fp32"),
        (
            "adamw8bit",
            "exact",
            torch.float32,
            "optimizer.memory exact is for 16-bit weights, and model.precision is fp32",
        ),
        ("adamw8bit", "paged", torch.float16, "paged"),
        (
            "adamw8bit",
            "paged",
            torch.float32,
            "optimizer.memory paged is for 16-bit weights, and model.precision is fp32",
        ),
        ("adamw", "paged", torch.bfloat16, "optimizer.memory paged is adamw8bit's; adamw keeps fp32 masters"),
        ("adamw", "near", torch.bfloat16, "optimizer.memory near is adamw8bit's; adamw keeps fp32 masters"),
    ],
)
def test_what_a_mode_comes_to(name, memory, dtype, expected):
    config = Optimizer(name=name, memory=memory)
    if len(expected) < 10:
        assert memory_mode(config, dtype) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            memory_mode(config, dtype)


def test_what_is_not_there_is_not_offered():
    with pytest.raises(
        ValueError,
        match=r"optimizer.memory = 'host': input should be 'auto', 'exact', 'near', 'rounded', 'paged' or 'fp32'",
    ):
        parse_config({"optimizer": {"memory": "host"}}, "here")


def test_a_step_asks_nothing_of_the_device():
    """On meta tensors reading a number fails."""
    module = torch.nn.Linear(64, 64, device="meta", dtype=torch.float16)
    optimizer = UNetOptimizer(module, Optimizer())
    for p in module.parameters():
        p.grad = torch.empty_like(p)
    norm, taken = optimizer.step(1e-6, 0.01, 1.0)
    assert norm.device.type == taken.device.type == "meta"
    assert all(p.grad is None for p in module.parameters())
