"""bias_residual against PyTorch's separate operations: results, gradients, copies, saved tensors."""

import pytest
import torch

from safelight.kernels.ops import bias_residual as module
from safelight.kernels.ops.bias_residual import bias_residual

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 6, 3, 5), (3, 20, 7, 9), (1, 1280, 2, 3), (3, 5, 7), (1, 9, 2560), (4, 77)]


def plain(x, bias, residual=None, *, scale):
    y = x + (bias[:, None, None] if x.dim() == 4 else bias)
    return (y if residual is None else y + residual) * scale


def make(shape, dtype, layout, residual):
    generator = torch.Generator().manual_seed(7)
    inputs = {"x": torch.randn(shape, generator=generator)}
    inputs["bias"] = torch.randn(shape[1] if len(shape) == 4 else shape[-1], generator=generator)
    if residual:
        inputs["residual"] = torch.randn(shape, generator=generator)
    for name in ("x", "residual"):
        if name in inputs and layout == "channels_last" and len(shape) == 4:
            inputs[name] = inputs[name].to(memory_format=torch.channels_last)
        elif name in inputs and layout == "transposed":
            inputs[name] = inputs[name].transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "mixed" and len(shape) == 4:
        # a convolution's channels-last output and an NCHW residual
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    return {name: value.to(dtype) for name, value in inputs.items()}


@pytest.mark.grid(
    shape=SHAPES,
    dtype=DTYPES,
    layout=["plain", "channels_last", "mixed", "transposed"],
    residual=[True, False],
    scale=[1.0, 0.7071],
)
def test_forward_and_backward(check_op, shape, dtype, layout, residual, scale):
    results = check_op(
        lambda **leaves: bias_residual(**leaves, scale=scale),
        lambda **leaves: plain(**leaves, scale=scale),
        make(shape, dtype, layout, residual),
    )
    if layout in ("channels_last", "mixed") and len(shape) == 4:
        assert results["output 0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_the_residual_may_have_its_own_bias(check_op, layout):
    inputs = make((3, 7, 5, 11), torch.bfloat16, layout, True)
    inputs["residual_bias"] = torch.randn(7, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)

    def with_both(x, bias, residual, residual_bias):
        return plain(x, bias, residual + residual_bias[:, None, None], scale=1.0)

    check_op(bias_residual, with_both, inputs)


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_programs_that_take_several_tiles(check_op, monkeypatch, layout):
    """13 x 17 pixels of 128 channels are 14 tiles of 16; two splits per sample take seven each."""
    monkeypatch.setattr(module, "NUM_PROGRAMS", 6)
    inputs = make((3, 128, 13, 17), torch.float32, layout, True)
    check_op(lambda **x: bias_residual(**x, scale=0.5), lambda **x: plain(**x, scale=0.5), inputs)


def test_without_a_scale_the_gradient_is_not_copied(device):
    x, bias, residual = (
        v.to(device).requires_grad_() for v in make((2, 6, 3, 5), torch.float32, "plain", True).values()
    )
    dy = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(8)).to(device)
    dx, dresidual = torch.autograd.grad(bias_residual(x, bias, residual), (x, residual), dy)
    assert dx.data_ptr() == dresidual.data_ptr() == dy.data_ptr()


def test_a_channel_slice_of_a_gradient_is_made_dense(device):
    """As behind a concatenation; the convolution that takes dx would otherwise copy it."""
    x, bias, residual = (
        v.to(device).requires_grad_() for v in make((2, 6, 3, 5), torch.float32, "channels_last", True).values()
    )
    whole = torch.randn(2, 14, 3, 5, generator=torch.Generator().manual_seed(8)).to(device)
    dy = whole.to(memory_format=torch.channels_last)[:, 4:10]
    dx, dbias, dresidual = torch.autograd.grad(bias_residual(x, bias, residual), (x, bias, residual), dy)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dx, dy)
    assert torch.equal(dresidual, dy)
    # also if no gradient of the bias is needed
    only_dx, _ = torch.autograd.grad(bias_residual(x, bias.detach(), residual), (x, residual), dy)
    assert only_dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(only_dx, dy)
    torch.testing.assert_close(dbias, dy.sum((0, 2, 3)))


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 2, 3)])
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck_in_double_precision(shape, residual):
    inputs = {k: v.double().requires_grad_() for k, v in make(shape, torch.float32, "plain", residual).items()}
    names = list(inputs)
    torch.testing.assert_close(bias_residual(**inputs, scale=0.6), plain(**inputs, scale=0.6))
    assert torch.autograd.gradcheck(
        lambda *v: bias_residual(**dict(zip(names, v, strict=True)), scale=0.6), tuple(inputs.values())
    )


def test_nothing_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_residual(**{k: v.requires_grad_() for k, v in make((2, 3, 4), torch.float32, "plain", True).items()})
    assert saved == []


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a bias of \(3,\) does not fit x of \(2, 4\); give it 4"):
        bias_residual(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"the residual is \(4,\)"):
        bias_residual(torch.ones(2, 4), torch.ones(4), torch.ones(4))
