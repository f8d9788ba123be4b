"""The step inside backward: the bits of a step after it, gradients freed part by part, overflows that skip one tensor
only."""

import copy
import random

import pytest
import torch

from safelight.kernels.ops.noising import Noised
from safelight.kernels.optim.blockwise_8bit import dequantize, in_memory_order
from safelight.kernels.unet import patch
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.optim.base import part_of
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import accumulate
from tests.trainer.checkpoints import state_tensors

SCHEDULE = make_schedule(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
)


def make(small_unet, fused, dtype=torch.bfloat16, **options):
    unet = copy.deepcopy(small_unet)
    return unet, make_optimizer(unet, Optimizer(fused_backward=fused, **options), dtype, 3)


def step(unet, optimizer, number, max_grad_norm=0.0, micro_steps=1, lr=1e-4):
    """Take a step of real gradients; return (norm, taken)."""
    for micro in range(micro_steps):
        generator = torch.Generator().manual_seed(10 * number + micro)
        sample, target, text = (torch.randn(s, generator=generator) for s in [(2, 4, 8, 8), (2, 4, 8, 8), (2, 6, 16)])
        noised = Noised(sample, target, torch.tensor([100, 700]))
        optimizer.set_hyper(lr, 0.01, max_grad_norm)
        if micro == micro_steps - 1:
            optimizer.prepare_backward()
        accumulate(unet, noised, TextConditioning(text), SCHEDULE, Loss(), 2 * micro_steps, optimizer.loss_scale.scale)
    return optimizer.step()


def state_of(optimizer):
    return {key: x for key, x in state_tensors(optimizer).items() if not key.startswith("clipping/")}


@pytest.mark.parametrize("micro_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("dtype", "memory"),
    [(torch.bfloat16, "exact"), (torch.float16, "rounded"), (torch.float32, "fp32"), (torch.bfloat16, "paged")],
)
def test_fused_equals_unfused_bit_for_bit_where_nothing_clips(small_unet, dtype, memory, micro_steps):
    ends = []
    for fused in (False, True):
        unet, optimizer = make(small_unet, fused, dtype, memory=memory)
        # fp16 finds its scale elsewhere: here none overflows
        optimizer.loss_scale.scale.fill_(1024.0 if dtype == torch.float16 else 1.0)
        norms = [step(unet, optimizer, n, 1e6, micro_steps)[0] for n in range(3)]
        assert all(p.grad is None for p in unet.parameters())
        ends.append((state_of(optimizer), unet.state_dict(), norms))
    (state, weights, norms), (fused_state, fused_weights, fused_norms) = ends
    assert state.keys() == fused_state.keys()
    assert all(torch.equal(state[key], fused_state[key]) for key in state)
    assert all(torch.equal(weights[key], fused_weights[key]) for key in weights)
    torch.testing.assert_close(torch.stack(norms), torch.stack(fused_norms))
    assert not all(torch.equal(p.to(dtype), fused_weights[name]) for name, p in small_unet.named_parameters())


@pytest.mark.parametrize("num_steps", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_fused_paged_equals_exact_bit_for_bit(small_unet, dtype, num_steps):
    """With patched modules, clipping, and a tensor that overflows in every third step."""
    ends = []
    for memory in ("exact", "paged"):
        unet = copy.deepcopy(small_unet)
        patch.apply(unet)
        optimizer = make_optimizer(unet, Optimizer(fused_backward=True, memory=memory), dtype, 3)
        patch.repack(unet)
        # a text projection overflows in every third step
        poison = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        counted = iter(range(10**6))
        poison.register_hook(lambda g, counted=counted: g * (float("inf") if next(counted) % 3 == 1 else 1.0))
        for number in range(num_steps):
            step(unet, optimizer, number, 0.5)
        ends.append((state_tensors(optimizer), unet.state_dict()))
    for one, other in zip(*ends, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert int(ends[1][0]["clipping/num_skipped"]) > 0


def watch_gradients(unet) -> list[set[str]]:
    """Return a list that grows by the parts of the UNet that hold a gradient, whenever one has arrived; shared products
    excepted."""
    shared, alive = patch.shared_projections(unet), []

    def note(_):
        alive.append(
            {part_of(name) for name, p in unet.named_parameters() if p.grad is not None and name not in shared}
        )

    for p in unet.parameters():
        p.register_post_accumulate_grad_hook(note)
    return alive


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_live_no_longer_than_their_part(small_unet, checkpointed):
    unet, optimizer = make(small_unet, True)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    alive = watch_gradients(unet)
    step(unet, optimizer, 0)
    assert len(alive) == len(list(unet.parameters()))
    # the time embedding's gradients come from every ResNet, one after the other
    assert max(len(parts - {"time_embedding"}) for parts in alive) <= 3
    assert all(p.grad is None for p in unet.parameters())


def test_lagged_clipping_takes_the_norm_of_the_step_before(small_unet):
    """With beta1 = 0 the first moment is what Adam saw: all of it first, then clipped by the former norm."""
    unet, optimizer = make(small_unet, True, torch.float32, betas=(0.0, 0.9))
    assert "stepped inside backward, clipping lagged" in str(optimizer)

    def norm_of_moments():
        moments = []
        for name in optimizer.parameters:
            state = optimizer.parameter_state(name)
            flat = in_memory_order(state["state1"])
            moments.append(dequantize(flat, state["absmax1"], True) if "absmax1" in state else flat)
        return float(torch.linalg.vector_norm(torch.cat(moments)))

    first, _ = step(unet, optimizer, 0, 0.01, lr=1e-6)
    assert float(first) > 0.05
    assert norm_of_moments() == pytest.approx(float(first), rel=0.01)
    second, _ = step(unet, optimizer, 1, 0.01, lr=1e-6)
    assert norm_of_moments() == pytest.approx(float(second) * 0.01 / float(first), rel=0.01)
    assert float(state_tensors(optimizer)["clipping/last_norm"]) == float(second)


def test_per_tensor_clipping_bounds_each_tensor(small_unet):
    unet, optimizer = make(small_unet, True, torch.float32, betas=(0.0, 0.9), clipping="per-tensor")
    norm, _ = step(unet, optimizer, 0, 0.01, lr=1e-6)
    assert float(norm) > 0.05
    states = [optimizer.parameter_state(name) for name in optimizer.parameters]
    norms = torch.stack([torch.linalg.vector_norm(x["state1"]) for x in states if "absmax1" not in x])
    assert norms.max() <= 0.01 * 1.001
    assert norms.max() == pytest.approx(0.01, rel=1e-3)


def test_an_overflow_skips_its_tensor_only(small_unet):
    """fp16, infinities and NaN injected into random layers: skips are counted, the scale is halved, everything stays
    finite."""
    unet, optimizer = make(small_unet, True, torch.float16)
    optimizer.loss_scale.scale.fill_(1024.0)
    named = dict(unet.named_parameters())
    chosen = random.Random(1)
    expected, scale = 0, 1024.0
    for number in range(8):
        bad = chosen.sample(sorted(named), chosen.choice([0, 1, 3]))
        poison = float(chosen.choice(["inf", "nan"]))
        hooks = [named[name].register_hook(lambda g, x=poison: g * x) for name in bad]
        before = {name: optimizer.value(name).clone() for name in named}
        steps_before = {name: int(optimizer.parameter_state(name)["step"]) for name in named}
        norm, taken = step(unet, optimizer, number, 1.0)
        for hook in hooks:
            hook.remove()
        assert taken
        assert bool(torch.isfinite(norm)) == (not bad)
        unchanged = {name for name in named if torch.equal(optimizer.value(name), before[name])}
        assert set(bad) <= unchanged
        uncounted = {name for name, n in steps_before.items() if int(optimizer.parameter_state(name)["step"]) == n}
        assert uncounted == set(bad)
        expected += len(bad)
        scale = scale / 2 if bad else scale
        assert float(optimizer.loss_scale.scale) == scale
    assert expected > 3
    assert int(optimizer.num_skipped_tensors) == expected
    for name, x in {**unet.state_dict(), **state_tensors(optimizer)}.items():
        assert not x.is_floating_point() or torch.isfinite(x).all(), name


def test_norm_and_count_are_in_the_checkpoint(small_unet):
    unet, optimizer = make(small_unet, True)
    step(unet, optimizer, 0, 0.01)
    other_unet, other = make(small_unet, True)
    other_unet.load_state_dict(unet.state_dict())
    other.load_state_tensors(state_tensors(optimizer))
    # clipped by the norm before, which only the checkpoint knows
    assert torch.equal(step(unet, optimizer, 1, 0.01)[0], step(other_unet, other, 1, 0.01)[0])
    state, other_state = state_tensors(optimizer), state_tensors(other)
    assert {"clipping/last_norm", "clipping/num_skipped"} <= state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)


def test_a_fused_step_never_synchronizes(monkeypatch):
    module = torch.nn.Linear(64, 64, device="meta", dtype=torch.float16)
    optimizer = make_optimizer(module, Optimizer(fused_backward=True))
    copied, make = [], torch.tensor

    def watched(*args, **kwargs):
        made = make(*args, **kwargs)
        copied.extend([made] if made.is_meta else [])
        return made

    for number in range(2):
        optimizer.set_hyper(1e-6, 0.01, 1.0)
        optimizer.prepare_backward()
        (module(torch.empty(2, 64, device="meta", dtype=torch.float16)).sum() * optimizer.loss_scale.scale).backward()
        assert all(p.grad is None for p in module.parameters())
        norm, taken = optimizer.step()
        assert norm.device.type == taken.device.type == "meta"
        # copying a list of the host to the device synchronizes: only the first step may
        assert not copied or number == 0
        monkeypatch.setattr(torch, "tensor", watched)


def test_on_kernels_blocks_do_not_wait_for_the_products_they_share(small_unet):
    """Time and text projections of all blocks are one product each, which gets its gradients last."""
    ends = []
    for fused in (False, True):
        unet = copy.deepcopy(small_unet)
        patch.apply(unet)
        optimizer = make_optimizer(unet, Optimizer(fused_backward=fused), torch.bfloat16, 3)
        patch.repack(unet)
        shared = patch.shared_projections(unet)
        assert set(shared.values()) == {"time projections", "text projections 0"}
        alive = watch_gradients(unet)
        step(unet, optimizer, 0)
        ends.append(state_of(optimizer))
    assert max(len(parts - {"time_embedding"}) for parts in alive) <= 3
    assert all(torch.equal(x, ends[1][key]) for key, x in ends[0].items())
