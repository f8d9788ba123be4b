"""The diffusion loss against PyTorch's losses and identities of the formulas.

test_noise_schedule.py compares it with diffusers.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops import diffusion_loss as module
from safelight.kernels.ops.diffusion_loss import KINDS, LossOptions, deltas, diffusion_loss, loss_weights
from safelight.trainer.models.noise_schedule import betas, rescale_zero_terminal_snr

ALPHAS = torch.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000), 0)
SHAPES = [(1, 4, 8, 8), (3, 4, 9, 7), (40, 3, 2, 5), (2, 4, 33, 40)]
TYPES = ["epsilon", "v_prediction"]
WEIGHTED = ["min_snr", "debiased", "p2"]


def make(shape, dtype, layout="plain"):
    generator = torch.Generator().manual_seed(13)
    predicted, target = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    predicted = predicted.to(dtype)
    if layout == "channels_last":
        predicted = predicted.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        predicted = torch.cat([predicted, predicted], dim=1)[:, : shape[1]]
    timesteps = torch.randint(0, 1000, (shape[0],), generator=generator)
    timesteps[0] = 999
    return predicted, target, timesteps


def errors_by_torch(predicted, target, kind, delta, fractions):
    """delta: a number. fractions: t / T of each sample, for the blends."""
    squared = F.mse_loss(predicted, target, reduction="none")
    if kind == "mse":
        return squared
    if kind == "pseudo_huber":
        # in float64, where the difference of the roots is harmless
        exact = (predicted - target).double()
        return (2 * delta * ((exact.square() + delta**2).sqrt() - delta)).to(predicted.dtype)
    huber = 2 * F.huber_loss(predicted, target, reduction="none", delta=delta)
    share = {"huber": 0 * fractions, "mse_huber": fractions, "huber_mse": 1 - fractions}[kind]
    return torch.lerp(huber, squared, share.to(predicted)[:, None, None, None])


def plain(predicted, target, weights, options, num_samples, fractions):
    """The loss by PyTorch's own functions, in fp32 at least."""
    compute = torch.promote_types(predicted.dtype, torch.float32)
    predicted, target, weights = predicted.to(compute), target.to(compute), weights.to(compute)
    errors = errors_by_torch(predicted, target, options.kind, options.delta, fractions)
    losses = errors.mean((1, 2, 3))
    return (losses * weights).sum() / num_samples, losses.detach()


@pytest.mark.grid(
    shape=SHAPES,
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    layout=["plain", "channels_last", "sliced"],
    kind=["mse", "huber"],
    weighting=["none", *WEIGHTED],
    prediction=TYPES,
)
def test_forward_and_backward(check_op, device, shape, dtype, layout, kind, weighting, prediction):
    options = LossOptions(kind, 0.7, weighting, 5.0 if weighting == "min_snr" else 1.0, prediction)
    predicted, target, timesteps = make(shape, dtype, layout)
    weights = loss_weights(ALPHAS, timesteps, options)
    arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device), options)
    results = []

    def ours(predicted):
        results.append(diffusion_loss(predicted, *arguments, num_samples=50))
        return results[-1].total

    check_op(
        ours,
        lambda predicted: plain(predicted, arguments[0], weights.to(device), options, 50, timesteps / 1000)[0],
        {"predicted": predicted},
    )
    _, losses = plain(predicted, target, weights, options, 50, timesteps / 1000)
    torch.testing.assert_close(results[0].losses_B.cpu(), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTED)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_kernels_weights_are_the_references(device, weighting, prediction_type):
    """A sample whose every error is 1 has its weight as its loss; 33 samples take two rounds of 32."""
    options = LossOptions(weighting=weighting, gamma=1.5, prediction_type=prediction_type)
    timesteps = torch.arange(0, 990, 30)
    expected = loss_weights(ALPHAS, timesteps, options)

    def total(timesteps):
        ones = torch.ones(len(timesteps), 1, 1, 1, device=device)
        arguments = (0 * ones, timesteps.to(device), ALPHAS.to(device), options)
        return diffusion_loss(ones, *arguments, num_samples=len(timesteps)).total.cpu()

    for i in (0, 5, 16, 32):
        torch.testing.assert_close(total(timesteps[i : i + 1]), expected[i], rtol=2e-5, atol=0)
    torch.testing.assert_close(total(timesteps), expected.mean(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTED)
def test_a_weighting_means_the_same_for_every_prediction_type(weighting):
    """One mistake in z_0, expressed as an epsilon or a v error, has one weighted loss."""
    timesteps = torch.arange(0, 1000, 7)
    a = ALPHAS[timesteps].double()
    # the squared epsilon and v errors of a z_0 error of 1: e = (z_t - sqrt(a) z_0) / sqrt(1 - a), v likewise
    squared = {"epsilon": a / (1 - a), "v_prediction": 1 / (1 - a)}
    losses = {}
    for kind in TYPES:
        options = LossOptions(weighting=weighting, gamma=1.2, prediction_type=kind)
        losses[kind] = loss_weights(ALPHAS, timesteps, options).double() * squared[kind]
    torch.testing.assert_close(losses["v_prediction"], losses["epsilon"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("weighting", ["none", *WEIGHTED])
def test_a_zero_terminal_snr_has_a_finite_weight(device, weighting):
    alphas = rescale_zero_terminal_snr(ALPHAS).to(device)
    predicted = torch.ones(2, 4, 2, 2, device=device, requires_grad=True)
    options = LossOptions(weighting=weighting, prediction_type="v_prediction")
    timesteps = torch.tensor([999, 998], device=device)
    target = torch.zeros(2, 4, 2, 2, device=device)
    result = diffusion_loss(predicted, target, timesteps, alphas, options, num_samples=2)
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(predicted.grad).all()
    expected = loss_weights(alphas.cpu(), timesteps.cpu(), options).mean()
    torch.testing.assert_close(result.total.detach().cpu(), expected, rtol=2e-5, atol=1e-9)


SCHEDULES = {
    "constant": lambda t, a: 0.1,
    "exponential": lambda t, a: math.exp(math.log(0.1) * t / 1000),
    "snr": lambda t, a: 0.9 / (1 + math.sqrt((1 - a) / a)) ** 2 + 0.1,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_scheduled_delta_is_kohyas(check_op, device, kind, schedule):
    """Each sample's loss and gradient are those of its own constant delta."""
    options = LossOptions(kind, 0.1, delta_schedule=schedule)
    predicted, target, timesteps = make((6, 4, 5, 3), torch.float32)
    timesteps[:3] = torch.tensor([999, 0, 500])
    expected = [SCHEDULES[schedule](t, float(ALPHAS[t])) for t in timesteps.tolist()]
    torch.testing.assert_close(deltas(ALPHAS, timesteps, options), torch.tensor(expected), rtol=1e-5, atol=0)
    if schedule != "constant":
        assert expected[1] > 0.9
        assert expected[0] < 0.11
    arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device), options)

    def separately(predicted):
        pairs = zip(predicted.split(1), arguments[0].to(predicted.dtype).split(1), strict=True)
        parts = [
            errors_by_torch(*pair, kind, expected[i], timesteps[i : i + 1] / 1000).mean()
            for i, pair in enumerate(pairs)
        ]
        return sum(parts) / 6

    def ours(predicted):
        return diffusion_loss(predicted, *arguments, num_samples=6).total

    check_op(ours, separately, {"predicted": predicted})


def test_a_scheduled_delta_without_any_signal(device):
    """At a zero terminal SNR, whose sigma is infinite, snr gives huber_delta itself."""
    alphas = rescale_zero_terminal_snr(ALPHAS)
    options = LossOptions("huber", 0.25, delta_schedule="snr", prediction_type="v_prediction")
    assert deltas(alphas, torch.tensor([999]), options).item() == 0.25
    ones = torch.ones(1, 1, 1, 1, device=device)
    loss = diffusion_loss(ones, 0 * ones, torch.tensor([999], device=device), alphas.to(device), options, num_samples=1)
    assert loss.total.item() == 0.25 * 1.75


def test_small_errors_keep_their_digits(device):
    """Pseudo-Huber as a difference of roots would round an error of 1e-5 to nothing in fp32."""
    difference = torch.full((1, 1, 1, 4), 1e-5, device=device)
    arguments = (torch.zeros_like(difference), torch.tensor([5], device=device), ALPHAS.to(device))
    loss = diffusion_loss(difference, *arguments, LossOptions("pseudo_huber", 1.0), num_samples=1).total
    torch.testing.assert_close(loss.cpu(), torch.tensor(1e-10), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_double_precision(kind):
    _, target, timesteps = make((2, 2, 3, 2), torch.float32)
    predicted = make((2, 2, 3, 2), torch.float64)[0].requires_grad_()
    arguments = (target.double(), timesteps, ALPHAS.double(), LossOptions(kind, 0.5, "min_snr"))
    assert torch.autograd.gradcheck(lambda x: diffusion_loss(x, *arguments, num_samples=3).total, (predicted,))


def test_several_parts_and_blocks_are_summed(check_op, device, monkeypatch):
    """1,320 elements in blocks of 64 over three parts: seven blocks each."""
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "MAX_PARTS", 3)
    predicted, target, timesteps = make((2, 4, 33, 10), torch.float32)
    arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device), LossOptions())
    check_op(
        lambda predicted: diffusion_loss(predicted, *arguments, num_samples=2).total,
        lambda predicted: F.mse_loss(predicted, arguments[0].to(predicted.dtype)),
        {"predicted": predicted},
    )


def test_more_elements_in_a_step_than_32_bits_hold(device):
    """The scale of the gradient divides by elements times samples, here 2^37."""
    predicted = torch.ones(1, 1, 1, 1 << 7, device=device, requires_grad=True)
    arguments = (torch.zeros_like(predicted), torch.tensor([5], device=device), ALPHAS.to(device), LossOptions())
    diffusion_loss(predicted, *arguments, num_samples=1 << 30).total.backward()
    assert torch.equal(predicted.grad.cpu(), torch.full((1, 1, 1, 1 << 7), 2.0**-36))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l1"}, "kind 'l1' is unknown; use one of mse, huber, pseudo_huber, mse_huber, huber_mse"),
        ({"delta_schedule": "cosine"}, "delta schedule 'cosine' is unknown; use one of constant, exponential, snr"),
        ({"weighting": "snr"}, "weighting 'snr' is unknown; use one of none, min_snr, debiased, p2"),
        ({"prediction_type": "sample"}, "prediction type 'sample' is unknown"),
        ({"gamma": 0.0}, "must be above 0"),
        ({"delta": 0.0}, "must be above 0"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


def test_shapes_that_do_not_match_are_refused():
    x, t = torch.ones(2, 4, 3, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="must have the same shape"):
        diffusion_loss(x, x[:1], t, ALPHAS, LossOptions(), num_samples=2)


@pytest.mark.grid(
    shape=[(1, 4, 8, 8), (3, 4, 9, 7), (40, 3, 2, 5), (2, 1, 5, 3), (2, 4, 33, 40)],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    layout=["plain", "channels_last", "sliced"],
    kind=["mse", "huber", "mse_huber"],
    with_mask=[True, False],
    with_scales=[True, False],
)
def test_masks_and_scales(check_op, device, shape, dtype, layout, kind, with_mask, with_scales):
    """A mask weighs each pixel before the mean over all elements, a scale each sample after it."""
    options = LossOptions(kind, 0.7, "min_snr")
    predicted, target, timesteps = make(shape, dtype, layout)
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator)
    scales = 3 * torch.rand(shape[0], generator=generator)
    weights = loss_weights(ALPHAS, timesteps, options)
    arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device), options)
    extra = {
        "mask_B1HW": mask.to(device) if with_mask else None,
        "scales_B": scales.to(device) if with_scales else None,
    }
    results = []

    def ours(predicted):
        results.append(diffusion_loss(predicted, *arguments, num_samples=50, **extra))
        return results[-1].total

    def plain_masked(predicted):
        weight = weights.to(device) * scales.to(device) if with_scales else weights.to(device)
        if not with_mask:
            return plain(predicted, arguments[0], weight, options, 50, timesteps / 1000)[0]
        compute = torch.promote_types(predicted.dtype, torch.float32)
        a, b = predicted.to(compute), arguments[0].to(compute)
        errors = errors_by_torch(a, b, kind, 0.7, timesteps / 1000)
        losses = (errors * mask.to(device, compute)).mean((1, 2, 3))
        return (losses * weight.to(compute)).sum() / 50

    check_op(ours, plain_masked, {"predicted": predicted})
    errors = errors_by_torch(predicted.float(), target, kind, 0.7, timesteps / 1000)
    losses = ((errors * mask) if with_mask else errors).mean((1, 2, 3))
    # the losses that are logged are masked, and not scaled
    torch.testing.assert_close(results[0].losses_B.cpu(), losses, rtol=1e-5, atol=1e-6)


def test_a_scale_of_a_power_of_two_scales_the_gradient_exactly(device):
    predicted, target, timesteps = make((3, 4, 9, 7), torch.float32)

    def gradient(scales):
        x = predicted.to(device).clone().requires_grad_()
        arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device), LossOptions())
        scales = None if scales is None else torch.tensor(scales, device=device)
        diffusion_loss(x, *arguments, num_samples=3, scales_B=scales).total.backward()
        return x.grad.cpu()

    plain_gradient, scaled = gradient(None), gradient([4.0, 0.0, 0.5])
    assert torch.equal(scaled, plain_gradient * torch.tensor([4.0, 0.0, 0.5])[:, None, None, None])
    assert torch.equal(gradient([1.0, 1.0, 1.0]), plain_gradient)


def test_nothing_outside_of_a_mask_has_a_gradient_and_a_full_mask_changes_no_bit(device):
    predicted, target, timesteps = make((2, 4, 9, 7), torch.float32, "channels_last")
    mask = torch.zeros(2, 1, 9, 7)
    mask[:, :, 2:5, 3:] = 1

    def run(mask):
        x = predicted.to(device).clone(memory_format=torch.preserve_format).requires_grad_()
        arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device), LossOptions())
        result = diffusion_loss(x, *arguments, num_samples=2, mask_B1HW=None if mask is None else mask.to(device))
        result.total.backward()
        return x.grad.cpu(), result.total.detach().cpu()

    masked, whole, full = run(mask), run(None), run(torch.ones_like(mask))
    assert torch.equal(masked[0], whole[0] * mask)
    assert masked[0].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(full, whole, strict=True))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mask_B1HW": torch.ones(2, 4, 3, 3)}, r"the mask has shape \(2, 4, 3, 3\), expected \(2, 1, 3, 3\)"),
        ({"scales_B": torch.ones(3)}, r"the scales have shape \(3,\), expected \(2,\)"),
    ],
)
def test_masks_and_scales_of_other_shapes_are_refused(extra, message):
    x, t = torch.ones(2, 4, 3, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=message):
        diffusion_loss(x, x, t, ALPHAS, LossOptions(), num_samples=2, **extra)
