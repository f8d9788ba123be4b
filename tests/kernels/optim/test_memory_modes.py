"""What each memory mode loses over many steps: nothing, little, or unbiased noise; and what plain bf16 loses."""

import functools

import pytest
import torch

from safelight.kernels.optim.adamw8bit import AdamW8bit

# bit-for-bit equality is checked over the longer run; noise shows in the shorter one
LONG, NUM_STEPS, LR = 1000, 250, 1e-6
SIZES = (4096, 600)  # one tensor with 8-bit moments, one with fp32 moments


def initial_weights() -> list[torch.Tensor]:
    """Weights of SD1.5's magnitude, representable in bf16, so that the initial rounding costs nothing."""
    generator = torch.Generator().manual_seed(1)
    return [(0.03 * torch.randn(size, generator=generator)).bfloat16().float() for size in SIZES]


@functools.cache
def gradients() -> list[list[torch.Tensor]]:
    """Gradients of every step, bf16 values in fp32: a constant direction of 0.3 plus unit noise."""
    generator = torch.Generator().manual_seed(2)
    means = [torch.randn(size, generator=generator) for size in SIZES]
    return [
        [(0.3 * m + torch.randn(m.shape, generator=generator)).bfloat16().float() for m in means] for _ in range(LONG)
    ]


@functools.cache
def trained(
    dtype: torch.dtype, memory: str, seed: int = 0, num_steps: int = NUM_STEPS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the fp32 values of all weights after the steps, and the moments' tensors."""
    values = initial_weights()
    weights = [v.to(dtype) for v in values]
    optimizer = AdamW8bit(weights, memory="fp32" if memory == "plain" else memory, seed=seed)
    for index, value in enumerate(values):
        optimizer.assign(index, value)
    for step_gradients in gradients()[:num_steps]:
        optimizer.step(step_gradients, LR, 0.01)
        if memory == "plain":
            # an optimizer without a master: after every step the weights are rounded to the nearest bf16
            for p, master in zip(weights, optimizer.remainders, strict=True):
                master.copy_(p)
    moments = [x for m in optimizer.moments for x in (m.state1, m.state2, m.absmax1, m.absmax2) if x is not None]
    return torch.cat([optimizer.value(i).flatten() for i in range(len(weights))]), moments


def noise_to_displacement(dtype: torch.dtype, memory: str, seed: int = 0) -> float:
    """Return a mode's error relative to the distance that the weights moved."""
    exact, initial = trained(dtype, "fp32")[0].double(), torch.cat(initial_weights()).double()
    return float((trained(dtype, memory, seed)[0].double() - exact).norm() / (exact - initial).norm())


def test_the_fp32_master_is_adamw8bit_on_fp32_weights():
    weights = initial_weights()
    optimizer = AdamW8bit(weights)
    for step_gradients in gradients()[:NUM_STEPS]:
        optimizer.step(step_gradients, LR, 0.01)
    assert torch.equal(trained(torch.bfloat16, "fp32")[0], torch.cat(weights))
    assert torch.equal(trained(torch.float16, "fp32")[0], torch.cat(weights))


def test_exact_bf16_equals_the_fp32_master_bit_for_bit():
    (ours, our_moments), (theirs, their_moments) = (
        trained(torch.bfloat16, memory, num_steps=LONG) for memory in ("exact", "fp32")
    )
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(our_moments, their_moments, strict=True))


def test_exact_fp16_equals_the_fp32_master_from_2_to_the_minus_14_on():
    """Bit for bit there; below, each step rounds by at most 2^-40."""
    ours, theirs = trained(torch.float16, "exact")[0], trained(torch.float16, "fp32")[0]
    initial = torch.cat(initial_weights())
    # weights move by at most 1e-3, so these were never below 2^-14
    large = (theirs.abs() >= 2.0**-14) & (initial.abs() > 2.0**-14 + 2e-3)
    assert large.float().mean() > 0.9
    assert torch.equal(ours[large], theirs[large])
    assert (ours - theirs).abs().max() <= NUM_STEPS * 2.0**-40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_loses_at_most_a_tenth_of_the_displacement(dtype, record_property):
    ratio = noise_to_displacement(dtype, "near")
    record_property("noise_to_displacement", ratio)
    assert ratio <= 0.1
    assert ratio > 0, "nothing was rounded"


def test_plain_bf16_loses_most_of_the_displacement():
    """Updates of 1e-6 are rounded away."""
    assert noise_to_displacement(torch.bfloat16, "plain") > 0.5
    moved = trained(torch.bfloat16, "plain")[0] != torch.cat(initial_weights()).bfloat16().float()
    assert moved.float().mean() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_is_noise_without_bias(dtype, record_property):
    """The mean error over weights is within five standard errors of 0, while the error itself is large."""
    ratio = noise_to_displacement(dtype, "rounded")
    record_property("noise_to_displacement", ratio)
    error = (trained(dtype, "rounded")[0] - trained(dtype, "fp32")[0]).double()
    assert abs(float(error.mean())) < 5 * float(error.std()) / len(error) ** 0.5
    assert ratio > 3 * noise_to_displacement(dtype, "near")


@pytest.mark.parametrize("memory", ["near", "rounded"])
def test_the_noise_is_determined_by_the_seed(memory):
    first, again = (trained.__wrapped__(torch.bfloat16, memory, 0, 20)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, trained(torch.bfloat16, memory, 1, 20)[0])


@pytest.mark.parametrize(
    ("dtype", "memory"), [(torch.bfloat16, "fp32"), (torch.bfloat16, "near"), (torch.float16, "exact")]
)
def test_the_16_bit_weight_is_the_rounded_value(dtype, memory):
    """The weight that the forward pass uses is within half an ulp of the fp32 value, but for near's own rounding."""
    values = initial_weights()
    weights = [v.to(dtype) for v in values]
    optimizer = AdamW8bit(weights, memory=memory)
    for index, value in enumerate(values):
        optimizer.assign(index, value)
    for step_gradients in gradients()[:20]:
        optimizer.step(step_gradients, 1e-3, 0.01)
    for index, p in enumerate(weights):
        value = optimizer.value(index)
        assert p.dtype == dtype
        assert torch.equal(p, value.to(dtype)) or dtype == torch.bfloat16
        assert (p.float() - value).abs().max() <= 2.0**-8 * value.abs().max()
        assert ((p.float() - value).abs() <= 2.0**-7 * value.abs() / 2 * 1.001 + 1e-38).all()
