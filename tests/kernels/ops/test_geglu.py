"""GEGLU against the same in plain PyTorch, as diffusers computes it."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops.geglu import geglu, geglu_bwd, geglu_bwd_recompute, geglu_fwd, geglu_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(x):
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)


def make(shape, dtype, layout):
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        x = torch.cat([x, x, x], dim=-1)[..., 3 : 3 + shape[-1]]
    return x.to(dtype)


@pytest.mark.grid(
    dtype=DTYPES,
    shape=[(1, 4, 6), (3, 5, 74), (1, 3, 2 * 1280), (3, 1, 2 * 2560)],
    layout=["plain", "transposed", "sliced"],
)
def test_forward_and_backward(check_op, dtype, shape, layout):
    check_op(geglu, plain, {"x": make(shape, dtype, layout)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_with_the_gradient_gives_the_same_bits(device, dtype):
    x, dy = make((3, 5, 74), dtype, "plain").to(device), make((3, 5, 37), dtype, "plain").to(device)
    dx, y = geglu_bwd(dy, x), geglu_fwd(x)
    dx_again, y_again, total = geglu_bwd_recompute(dy, x)
    assert torch.equal(dx_again, dx)
    assert torch.equal(y_again, y)
    assert total is None
    # y overwrites dy, so nothing is allocated for it
    assert y_again.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 7, 74), (1, 37, 2 * 1280)])
def test_the_sum_of_the_gradient_over_rows(device, dtype, shape):
    """The last shape has two blocks of features, the second not full, and five programs of seven or eight rows."""
    x, dy = make(shape, dtype, "plain").to(device), make((*shape[:2], shape[2] // 2), dtype, "plain").to(device)
    exact = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(exact), exact, dy.double())
    without = geglu_bwd(dy, x)
    dx, _, total = geglu_bwd_recompute(dy, x, with_sum=True)
    assert torch.equal(dx, without)
    assert total.dtype == dtype
    # at most twice the error of summing the gradient as stored
    allowed = 2 * (without.flatten(0, 1).sum(dim=0).double() - truth.sum(dim=(0, 1))).abs().max() + 1e-6
    assert (total.double() - truth.sum(dim=(0, 1))).abs().max() <= allowed


@pytest.mark.parametrize("layout", ["plain", "sliced"])
def test_gradcheck_in_double_precision(layout):
    x = make((2, 3, 20), torch.float64, layout).requires_grad_()
    torch.testing.assert_close(geglu(x), plain(x), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(geglu, (x,))
    assert torch.autograd.gradcheck(geglu_reference, (x,))


def test_only_the_projection_is_saved():
    saved = []
    x = torch.randn(2, 3, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        geglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_large_gates_neither_overflow_nor_vanish(device):
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 60.0, -60.0, 300.0, -300.0]], device=device, requires_grad=True)
    y = geglu(x)
    assert y.tolist() == [[60.0, 0.0, 300.0, 0.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[60.0, 0.0, 300.0, 0.0, 1.0, 0.0, 1.0, 0.0]]


def test_an_empty_input_has_an_empty_output(device):
    x = torch.empty(0, 4, device=device, requires_grad=True)
    geglu(x).sum().backward()
    assert x.grad.shape == (0, 4)


def test_an_odd_last_dimension_is_refused():
    with pytest.raises(ValueError, match="even last dimension, got 5"):
        geglu(torch.ones(2, 5))
