"""The diffusion loss against PyTorch's losses and the formulas' own identities; against diffusers: tests/trainer/models/test_noise_schedule.py."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops import diffusion_loss as module
from safelight.kernels.ops.diffusion_loss import LossOptions, diffusion_loss, loss_weights
from safelight.trainer.models.noise_schedule import betas, rescale_zero_terminal_snr

ALPHAS = torch.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000), 0)
SHAPES = [(1, 4, 8, 8), (3, 4, 9, 7), (40, 3, 2, 5), (2, 4, 33, 40)]
TYPES = ["epsilon", "v_prediction", "sample"]


def make(shape, dtype, layout, masked):
    generator = torch.Generator().manual_seed(13)
    predicted, target = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    predicted = predicted.to(dtype)
    if layout == "channels_last":
        predicted = predicted.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        predicted = torch.cat([predicted, predicted], dim=1)[:, : shape[1]]
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) if masked else None
    timesteps = torch.randint(0, 1000, (shape[0],), generator=generator)
    timesteps[0] = 999
    return predicted, target, timesteps, mask


def plain(predicted, target, mask, weights, options, num_samples):
    """The loss by PyTorch's own functions, in fp32 at least."""
    compute = torch.promote_types(predicted.dtype, torch.float32)
    predicted, target, weights = predicted.to(compute), target.to(compute), weights.to(compute)
    if options.error == "mse":
        errors = F.mse_loss(predicted, target, reduction="none")
    else:
        errors = 2 * F.huber_loss(predicted, target, reduction="none", delta=options.delta)
    mask = torch.ones_like(errors) if mask is None else mask.to(compute).expand_as(errors)
    losses = (errors * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    return (losses * weights).sum() / num_samples, losses.detach()


@pytest.mark.grid(
    shape=SHAPES,
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    layout=["plain", "channels_last", "sliced"],
    error=["mse", "huber"],
    masked=[True, False],
    weighting=["none", "min_snr", "debiased", "p2"],
)
def test_forward_and_backward(check_op, device, shape, dtype, layout, error, masked, weighting):
    options = LossOptions(error, 0.7, weighting, 5.0 if weighting == "min_snr" else 1.0, "v_prediction")
    predicted, target, timesteps, mask = make(shape, dtype, layout, masked)
    weights = loss_weights(ALPHAS, timesteps, options)
    to = {name: x if x is None else x.to(device) for name, x in (("target", target), ("mask", mask))}
    found = []

    def ours(predicted):
        result = diffusion_loss(
            predicted,
            to["target"],
            timesteps.to(device),
            ALPHAS.to(device),
            options,
            mask_B1HW=to["mask"],
            num_samples=50,
        )
        found.append(result)
        return result.total

    check_op(
        ours,
        lambda predicted: plain(predicted, to["target"], to["mask"], weights.to(device), options, 50)[0],
        {"predicted": predicted},
    )
    _, losses = plain(predicted, target, mask, weights, options, 50)
    torch.testing.assert_close(found[0].losses_B.cpu(), losses, rtol=1e-5, atol=1e-6)
    sums, counts = torch.zeros(4), torch.zeros(4)
    for t, loss in zip(timesteps.tolist(), losses, strict=True):
        sums[t // 250] += loss
        counts[t // 250] += 1
    torch.testing.assert_close(found[0].band_sums_K.cpu(), sums, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0].band_counts_K.cpu(), counts)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_kernels_weights_are_the_references(device, weighting, prediction_type):
    """A sample whose every error is 1 has its weight for a loss; 33 samples take two rounds of 32."""
    options = LossOptions(weighting=weighting, gamma=1.5, prediction_type=prediction_type)
    timesteps = torch.arange(0, 990, 30)
    expected = loss_weights(ALPHAS, timesteps, options)
    for i in (0, 5, 16, 32):
        one = torch.ones(1, 1, 1, 1, device=device)
        result = diffusion_loss(one, 0 * one, timesteps[i : i + 1].to(device), ALPHAS.to(device), options)
        torch.testing.assert_close(result.total.cpu(), expected[i], rtol=2e-5, atol=0)
    ones = torch.ones(33, 1, 1, 1, device=device)
    result = diffusion_loss(ones, 0 * ones, timesteps.to(device), ALPHAS.to(device), options)
    torch.testing.assert_close(result.total.cpu(), expected.mean(), rtol=2e-5, atol=0)
    assert result.band_counts_K.tolist() == [9, 8, 8, 8]


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
def test_a_weighting_means_the_same_for_every_prediction_type(weighting):
    """One mistake in z_0, told as an epsilon, v or z_0 error, has one weighted loss."""
    timesteps = torch.arange(0, 1000, 7)
    a = ALPHAS[timesteps].double()
    # the squared epsilon, v and z_0 errors that a z_0 error of 1 brings: e = (z_t - sqrt(a) z_0) / sqrt(1 - a), v likewise
    squared = {"epsilon": a / (1 - a), "v_prediction": 1 / (1 - a), "sample": torch.ones_like(a)}
    losses = {}
    for kind in TYPES:
        options = LossOptions(weighting=weighting, gamma=1.2, prediction_type=kind)
        losses[kind] = loss_weights(ALPHAS, timesteps, options).double() * squared[kind]
    torch.testing.assert_close(losses["v_prediction"], losses["epsilon"], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(losses["sample"], losses["epsilon"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased", "p2"])
@pytest.mark.parametrize("prediction_type", TYPES[1:])
def test_a_zero_terminal_snr_has_a_finite_weight(device, weighting, prediction_type):
    alphas = rescale_zero_terminal_snr(ALPHAS).to(device)
    predicted = torch.ones(2, 4, 2, 2, device=device, requires_grad=True)
    options = LossOptions(weighting=weighting, prediction_type=prediction_type)
    timesteps = torch.tensor([999, 998], device=device)
    result = diffusion_loss(predicted, torch.zeros(2, 4, 2, 2, device=device), timesteps, alphas, options)
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(predicted.grad).all()
    expected = loss_weights(alphas.cpu(), timesteps.cpu(), options).mean()
    torch.testing.assert_close(result.total.detach().cpu(), expected, rtol=2e-5, atol=1e-9)


def test_a_sample_masked_out_has_no_loss_and_no_gradient(device):
    predicted = torch.ones(2, 4, 3, 3, device=device, requires_grad=True)
    mask = torch.zeros(2, 1, 3, 3, device=device)
    mask[1, 0, 1, 2] = 0.5
    timesteps = torch.tensor([10, 20], device=device)
    result = diffusion_loss(predicted, torch.zeros_like(predicted), timesteps, ALPHAS.to(device), mask_B1HW=mask)
    result.total.backward()
    assert result.losses_B.tolist() == [0.0, 1.0]
    assert float(result.total.detach()) == 0.5
    expected = torch.zeros(2, 4, 3, 3)
    # the one pixel's four values share a gradient of 2 over 4 values and 2 samples
    expected[1, :, 1, 2] = 0.25
    assert torch.equal(predicted.grad.cpu(), expected)


@pytest.mark.parametrize("error", ["mse", "huber"])
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck_in_double_precision(error, masked):
    _, target, timesteps, mask = make((2, 2, 3, 2), torch.float32, "plain", masked)
    predicted = make((2, 2, 3, 2), torch.float64, "plain", False)[0].requires_grad_()
    options = LossOptions(error, 0.5, "min_snr")
    assert torch.autograd.gradcheck(
        lambda x: diffusion_loss(x, target.double(), timesteps, ALPHAS.double(), options, mask_B1HW=mask).total,
        (predicted,),
    )


def test_several_parts_and_blocks_are_summed(check_op, device, monkeypatch):
    """1,320 elements in blocks of 64 over three parts: seven blocks each."""
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "MAX_PARTS", 3)
    predicted, target, timesteps, _ = make((2, 4, 33, 10), torch.float32, "plain", False)
    arguments = (target.to(device), timesteps.to(device), ALPHAS.to(device))
    check_op(
        lambda predicted: diffusion_loss(predicted, *arguments).total,
        lambda predicted: F.mse_loss(predicted, arguments[0].to(predicted.dtype)),
        {"predicted": predicted},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": "l1"}, "error 'l1' is unknown; use one of mse, huber"),
        ({"weighting": "snr"}, "weighting 'snr' is unknown"),
        ({"prediction_type": "x0"}, "prediction type 'x0' is unknown"),
        ({"gamma": 0.0}, "must be above 0"),
        ({"num_bands": 65}, "num_bands 65"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


def test_shapes_that_do_not_fit_are_refused():
    x, t = torch.ones(2, 4, 3, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="must be one"):
        diffusion_loss(x, x[:1], t, ALPHAS)
    with pytest.raises(ValueError, match=r"give it \(2, 1, 3, 3\)"):
        diffusion_loss(x, x, t, ALPHAS, mask_B1HW=torch.ones(2, 3, 3))
