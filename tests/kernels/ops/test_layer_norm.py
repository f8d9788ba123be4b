"""LayerNorm, with and without the residual add, against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops import layer_norm as module
from safelight.kernels.ops.layer_norm import add_layer_norm, layer_norm, layer_norm_fwd, layer_norm_recompute

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 3, 5), (3, 7, 77), (1, 1, 1), (1, 20, 320), (3, 2, 640), (1, 5, 1280)]


def plain(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def plain_add(x, residual, weight, bias):
    s = x + residual
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, 1e-5)


def make(shape, dtype, layout="plain", residual=False):
    generator = torch.Generator().manual_seed(4)
    x = 2 * torch.randn(shape, generator=generator) + 0.5
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    inputs = {"x": x}
    if residual:
        inputs["residual"] = torch.randn(shape, generator=generator)
    inputs["weight"] = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    inputs["bias"] = 0.3 * torch.randn(shape[-1], generator=generator)
    return {name: value.to(dtype) for name, value in inputs.items()}


@pytest.mark.grid(shape=SHAPES, dtype=DTYPES, layout=["plain", "transposed"], residual=[False, True])
def test_forward_and_backward(check_op, shape, dtype, layout, residual):
    check_op(*((add_layer_norm, plain_add) if residual else (layer_norm, plain)), make(shape, dtype, layout, residual))


def test_programs_that_take_several_tiles(check_op, monkeypatch):
    """77 rows of 320 are 20 tiles of 4 rows; three programs take seven, seven and six of them."""
    monkeypatch.setattr(module, "MIN_BWD_PROGRAMS", 3)
    assert module._num_bwd_programs(77, 4) == 4
    monkeypatch.setattr(module, "MAX_BWD_PROGRAMS", 3)
    check_op(add_layer_norm, plain_add, make((1, 77, 320), torch.float32, residual=True))


@pytest.mark.parametrize(
    ("rows", "block_m", "programs"),
    [
        # SD1.5's outermost level at batch 1, 2, 4 and 16: 16 rows each, then as many as a large GPU holds
        (4096, 4, 256),
        (8192, 4, 512),
        (16384, 4, 512),
        (65536, 4, 512),
        # its inner levels at batch 1: fewer rows each, then one tile each
        (1024, 2, 128),
        (256, 1, 128),
        (64, 1, 64),
    ],
)
def test_the_programs_of_the_backward_pass_depend_on_the_shape(rows, block_m, programs):
    assert module._num_bwd_programs(rows, block_m) == programs


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(device, used):
    inputs = {
        name: value.to(device).requires_grad_()
        for name, value in make((2, 3, 10), torch.float32, residual=True).items()
    }
    leaves = list(inputs.values())
    expected = torch.autograd.grad(plain_add(**inputs)[used].square().sum(), leaves, allow_unused=True)
    ours = torch.autograd.grad(add_layer_norm(**inputs)[used].square().sum(), leaves, allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_both_outputs_may_have_the_same_gradient(device):
    """`(s + y).backward()` passes the same tensor to both."""
    inputs = {name: v.to(device).requires_grad_() for name, v in make((2, 3, 10), torch.float32, residual=True).items()}
    dy = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(6)).to(device)
    ours, expected = (
        torch.autograd.grad(op(**inputs), list(inputs.values()), (dy, dy)) for op in (add_layer_norm, plain_add)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_recomputing_gives_the_same_bits(device):
    x, residual, weight, bias = (v.to(device) for v in make((3, 7, 77), torch.bfloat16, residual=True).values())
    s, y, mean, rstd = layer_norm_fwd(x, weight, bias, residual, 1e-5)
    assert torch.equal(s, x + residual)
    assert torch.equal(layer_norm_recompute(s, weight, bias, mean, rstd, 1e-5), y)


@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck_in_double_precision(residual):
    inputs = {
        name: v.double().requires_grad_() for name, v in make((2, 3, 5), torch.float32, residual=residual).items()
    }
    names, op = list(inputs), add_layer_norm if residual else layer_norm
    torch.testing.assert_close(op(**inputs), (plain_add if residual else plain)(**inputs))
    assert torch.autograd.gradcheck(lambda *v: op(**dict(zip(names, v, strict=True))), tuple(inputs.values()))


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_only_the_sum_the_parameters_and_two_numbers_per_row_are_saved(where):
    inputs = {
        name: v.to(where).requires_grad_() for name, v in make((2, 16, 64), torch.bfloat16, residual=True).items()
    }
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_layer_norm(**inputs)
    assert sum(t.numel() * t.element_size() for t in saved) == 2 * 2 * 16 * 64 + 2 * 2 * 64 + 2 * 4 * 32


def test_shapes_that_do_not_fit_are_refused():
    x, w = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"a weight of \(3,\) does not fit x with 4 features"):
        layer_norm(x, w[:3], w[:3])
    with pytest.raises(ValueError, match="1 to 8192 features"):
        layer_norm(torch.ones(1, 8193), torch.ones(8193), torch.ones(8193))
    with pytest.raises(ValueError, match=r"the residual is \(2, 3\)"):
        add_layer_norm(x, x[:, :3], w, w)
