"""Training only some layers: the others keep their bits and cost nothing, and each has its own learning rate."""

import copy

import pytest
import torch

from safelight.kernels.triton.jit import record_launches, references_on_meta
from safelight.kernels.unet import patch
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import Position, load_checkpoint, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity, identify
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.allocation_trace import MASTER, WEIGHTS
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.memory_plan.static_bytes import static_bytes
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.ema import WeightAverages
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.registry.optimizers import OPTIMIZERS
from tests.trainer.checkpoints import state_tensors, writes

CPU = torch.device("cpu")
# in the middle of packed q, k, v; a whole part; a rate of its own
LAYERS = ["*.attn1.to_k.weight", "cross_attention=0.5", "up_blocks.0=2", "norms=0"]
MODES = ["exact", "near", "rounded", "fp32", "paged"]
LR, DECAY, CLIP = 1e-3, 0.1, 0.5


def make(unet, layers=LAYERS, dtype=torch.float32, patched=False, **optimizer):
    unet = copy.deepcopy(unet)
    if patched:
        patch.apply(unet)
    trained = FullFineTune(unet, layers)
    trained.mark()
    config = Optimizer(lr=LR, **optimizer)
    made = make_optimizer(unet, config, dtype, 3, lr_factors=trained.lr_factors)
    if patched:
        patch.repack(unet)
    return unet, trained, made


def predict(unet, number):
    generator = torch.Generator().manual_seed(number)
    dtype = unet.conv_in.weight.dtype
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 5, 16, generator=generator).to(dtype)
    return unet(sample, torch.tensor([100, 700]), text).sample


def step(unet, optimizer, number, micro_steps=1, clip=CLIP):
    optimizer.set_hyper(LR / (number + 1), DECAY, clip)
    for micro in range(micro_steps):
        is_last = micro == micro_steps - 1
        if is_last:
            optimizer.prepare_backward()
        with optimizer.buffers.micro_step(micro == 0, is_last):
            predict(unet, 10 * number + micro).float().square().mean().backward()
    return optimizer.step()[0]


def assert_only_trained_changed(unet, before, names):
    after = unet.state_dict()
    assert [name for name in after if name not in names and not torch.equal(after[name], before[name])] == []
    assert [name for name in names if torch.equal(after[name], before[name])] == []


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    "name",
    # one that estimates its rate takes no factors
    [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices and not spec.estimates_rate],
)
def test_only_matching_tensors_change_and_have_state(small_unet, name, patched):
    unet, trained, optimizer = make(small_unet, name=name, patched=patched)
    before = copy.deepcopy(unet.state_dict())
    step(unet, optimizer, 0, micro_steps=2)
    # RAdam does not move in its first steps
    for number in range(1, 6):
        step(unet, optimizer, number)
    assert_only_trained_changed(unet, before, trained.lr_factors)
    assert all(p.grad is None for p in unet.parameters())
    of_all = ("loss_scale/", "numbers/")
    names = {key.split("/", 1)[1] for key in optimizer.live_state() if not key.startswith(of_all)}
    assert names == set(trained.lr_factors) == set(optimizer.buffers.tensors)
    average = WeightAverages(optimizer, 0.9)
    assert average.averages.keys() == trained.lr_factors.keys()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("memory", [*MODES, "streamed"])
def test_every_memory_mode_trains_only_matching_tensors(small_unet, memory, fused, patched):
    if memory == "streamed" and not fused:
        pytest.skip("streamed needs fused_backward")
    # rates at which a 16-bit weight changes
    unet, trained, optimizer = make(
        small_unet, dtype=torch.bfloat16, memory=memory, fused_backward=fused, patched=patched
    )
    optimizer.live_state()
    before = copy.deepcopy(unet.state_dict())
    frozen = {name: x for name, x in small_unet.state_dict().items() if name not in trained.lr_factors}
    assert all(torch.equal(before[name], x.bfloat16()) for name, x in frozen.items())
    values = {name: optimizer.value(name).clone() for name in optimizer.parameters}
    for number in range(2):
        step(unet, optimizer, number)
    # waits for streamed and paged state
    state = optimizer.live_state()
    after = unet.state_dict()
    assert [n for n in after if n not in trained.lr_factors and not torch.equal(after[n], before[n])] == []
    assert [n for n in values if torch.equal(optimizer.value(n), values[n])] == []
    assert not any(key.split("/", 1)[1] in after.keys() - trained.lr_factors.keys() for key in state)


@pytest.mark.parametrize("fused", [False, True])
def test_a_patched_unet_with_a_part_of_packed_weights_trained_has_the_gradients_of_an_unpatched_one(small_unet, fused):
    found = []
    for patched in (False, True):
        unet, trained, optimizer = make(small_unet, patched=patched, fused_backward=fused)
        norm = step(unet, optimizer, 0)
        found.append((norm, {name: optimizer.value(name).clone() for name in trained.lr_factors}))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4)
    moved = [
        name
        for name, x in found[0][1].items()
        if not torch.allclose(x, found[1][1][name], rtol=0, atol=2.5 * LR * optimizer.lr_factors[name])
    ]
    assert moved == []
    frozen = {n: p for n, p in small_unet.named_parameters() if n not in trained.lr_factors}
    assert all(torch.equal(dict(unet.named_parameters())[n], p) for n, p in frozen.items())


def groups_of(unet, factors):
    parameters = dict(unet.named_parameters())
    return [{"params": [parameters[name]], "lr": LR * factor} for name, factor in factors.items()]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "bnb_adamw8bit", "bnb_lion8bit", "adamw8bit"])
def test_equal_to_the_library_with_a_parameter_group_for_each_rate(small_unet, name):
    """Ours equals torch's AdamW in its first step, before any moment is 8-bit."""
    import bitsandbytes as bnb

    unet, trained, optimizer = make(small_unet, name=name)
    other = copy.deepcopy(small_unet)
    FullFineTune(other, LAYERS).mark()
    groups = groups_of(other, trained.lr_factors)
    spec = {
        "adamw": lambda: torch.optim.AdamW(groups, weight_decay=DECAY, fused=True),
        "adamw8bit": lambda: torch.optim.AdamW(groups, weight_decay=DECAY),
        "adafactor": lambda: torch.optim.Adafactor(groups, weight_decay=DECAY),
        "bnb_adamw8bit": lambda: bnb.optim.AdamW8bit(groups, weight_decay=DECAY),
        "bnb_lion8bit": lambda: bnb.optim.Lion8bit(groups, betas=(0.9, 0.999), weight_decay=DECAY),
    }[name]
    library = spec()
    for number in range(1 if name == "adamw8bit" else 3):
        for group, factor in zip(library.param_groups, trained.lr_factors.values(), strict=True):
            group["lr"] = LR / (number + 1) * factor
        predict(other, 10 * number).float().square().mean().backward()
        library.step()
        library.zero_grad()
        step(unet, optimizer, number, clip=0.0)
    ours, theirs = dict(unet.named_parameters()), dict(other.named_parameters())
    for parameter, factor in trained.lr_factors.items():
        if name != "adamw8bit":
            assert torch.equal(ours[parameter], theirs[parameter]), parameter
        else:
            assert torch.allclose(ours[parameter], theirs[parameter], rtol=1e-5, atol=1e-3 * LR * factor), parameter


def test_factors_scale_the_first_step_of_the_kernel(small_unet):
    """The first AdamW step without decay moves every weight by lr times its factor, where its gradient is not tiny."""
    unet, trained, optimizer = make(small_unet)
    before = copy.deepcopy(unet.state_dict())
    optimizer.set_hyper(LR, 0.0, 0.0)
    for p in optimizer.parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, factor in trained.lr_factors.items():
        moved = before[name] - unet.state_dict()[name]
        assert torch.allclose(moved, torch.full_like(moved, LR * factor), rtol=1e-3), name


def test_each_rate_has_launches_of_its_own_and_none_without_factors(small_unet):
    """On meta tensors: a launch of 8-bit moments and one of fp32 moments, which small weights have, for each rate."""
    for layers, num in (([], 2), (["all"], 2), (["resnets", "up_blocks=0.5"], 4), (["resnets", "attention=0.5"], 3)):
        unet = copy.deepcopy(small_unet).to("meta")
        trained = FullFineTune(unet, layers)
        trained.mark()
        optimizer = make_optimizer(unet, Optimizer(), lr_factors=trained.lr_factors)
        with references_on_meta(False), record_launches() as launches:
            for p in optimizer.parameters.values():
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert sum("adamw" in launch.kernel.__name__ for launch in launches) == num, layers


@pytest.mark.parametrize("memory", MODES)
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path, small_unet, memory):
    unet, _, optimizer = make(small_unet, dtype=torch.bfloat16, memory=memory)
    for number in range(2):
        step(unet, optimizer, number)
    save_checkpoint(tmp_path, writes(unet), state_tensors(optimizer), Position(step=3), Identity({}, [], ""))
    other, _, resumed = make(small_unet, dtype=torch.bfloat16, memory=memory)
    resumed.load_state_tensors(load_checkpoint(tmp_path, 3, FullFineTune(other, LAYERS))[0])
    for number in range(2, 4):
        step(unet, optimizer, number)
        step(other, resumed, number)
    ours, theirs = state_tensors(optimizer), state_tensors(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in unet.state_dict().items())
    # a run that trains other layers cannot continue it
    _, _, elsewhere = make(small_unet, ["resnets"], torch.bfloat16, memory=memory)
    with pytest.raises(ValueError, match="which this UNet does not train"):
        elsewhere.load_state_tensors(load_checkpoint(tmp_path, 3, FullFineTune(other, LAYERS))[0])


@pytest.mark.parametrize("memory", ["auto", "fp32", "near", "rounded"])
def test_planned_bytes_are_the_real_bytes(memory, tmp_path):
    settings = {
        "model": {"precision": "bf16"},
        "optimizer": {"memory": memory},
        "train": {"layers": LAYERS, "ema_decay": 0.9},
    }
    config = parse_config(settings, "here")
    planned = static_bytes(config, CPU)
    unet = load_unet(resolve_base("tiny"), 0)
    trained = FullFineTune.of(unet, config)
    trained.mark()
    optimizer = make_optimizer(unet, config.optimizer, torch.bfloat16, lr_factors=trained.lr_factors)
    num = sum(p.numel() for p in unet.parameters() if p.requires_grad)

    def size(tensors):
        return sum(x.numel() * x.element_size() for x in tensors)

    assert planned.num_trained == num < planned.num_parameters == sum(p.numel() for p in unet.parameters())
    assert planned.weights == size(unet.parameters())
    assert planned.gradients == 2 * num
    assert planned.master == size(optimizer.master_tensors())
    states = [optimizer.parameter_state(name) for name in optimizer.parameters]
    kept = ("step", "strides", "master", "remainder")
    assert planned.moments == size(x for state in states for part, x in state.items() if part not in kept)
    averages = WeightAverages(optimizer, 0.9)
    assert planned.average == size(averages.averages.values())
    state = {**state_tensors(optimizer), **averages.live_state()}
    folder = save_checkpoint(tmp_path, writes(unet), state, Position(step=1), identify(config, "bf16"))
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0 < on_disk - planned.checkpoint < 300_000


@pytest.mark.parametrize("fused", [False, True])
def test_a_traced_run_holds_what_the_static_plan_says(fused):
    settings = {"train": {"layers": ["up_blocks.*"], "kernels": "on"}, "optimizer": {"fused_backward": fused}}
    config = parse_config({"model": {"precision": "bf16"}, **settings}, "here")
    base = resolve_base("tiny")
    run = MetaRun(config, base, CPU, torch.bfloat16)
    run.step(2, 8, 8)
    planned = static_bytes(config, CPU, torch.bfloat16)
    assert run.live.live[WEIGHTS] == planned.weights
    assert run.live.live[MASTER] == planned.master
    everything = static_bytes(parse_config({"model": {"precision": "bf16"}}, "here"), CPU, torch.bfloat16)
    assert planned.weights == everything.weights
    assert planned.master < everything.master
