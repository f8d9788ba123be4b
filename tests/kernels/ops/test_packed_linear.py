"""Packed projections against separate ones: results, gradients, memory, matmuls, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.kernels.ops.packed_linear import (
    adjacent_view,
    cat_or_view,
    norm_packed_linear,
    pack,
    packed_linear,
    packed_view,
    unpack,
)


def parameters(*shapes, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(outputs, inputs, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.autograd.grad(
        outputs, inputs, [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    )


def test_packing_keeps_values_and_shares_one_buffer():
    weights = parameters((3, 4), (2, 4), (5, 4))
    before = [w.detach().clone() for w in weights]
    pack(weights)
    assert all(torch.equal(w, b) and w.is_contiguous() for w, b in zip(weights, before, strict=True))
    whole = packed_view(weights)
    assert torch.equal(whole, torch.cat(before))
    assert whole.data_ptr() == weights[0].data_ptr()
    weights[1].data.zero_()
    assert not whole[3:5].any()
    unpack(weights)
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 3
    with pytest.raises(ValueError, match=r"3 packed weights, the first \(3, 4\), no longer share their memory"):
        packed_view(weights)


@pytest.mark.parametrize("rows", [(1,), (2, 7)])
@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("contiguous", [False, True])
def test_packed_linear_is_linear_of_each(rows, rounds, contiguous):
    weights = parameters((3, 4), (2, 4), (5, 4))
    biases = [b for i in range(rounds) for b in parameters((3,), (2,), (5,), seed=i)]
    x = torch.randn(*rows, 4, dtype=torch.float64, requires_grad=True)
    sums = [sum(biases[i::3]) if rounds else None for i in range(3)]
    plain = [F.linear(x, w, b) for w, b in zip(weights, sums, strict=True)]
    expected = gradients(plain, [x, *weights, *biases])
    pack(weights)
    for start in range(0, len(biases), 3):
        pack(biases[start : start + 3])
    outputs = packed_linear(x, weights, biases, contiguous=contiguous)
    for y, truth in zip(outputs, plain, strict=True):
        torch.testing.assert_close(y, truth)
        assert y.is_contiguous() or not contiguous
    for g, truth in zip(gradients(outputs, [x, *weights, *biases]), expected, strict=True):
        torch.testing.assert_close(g, truth)


def test_no_two_gradients_share_memory():
    """Otherwise clipping one in place would change the other."""
    weights, biases = parameters((3, 4), (2, 4)), [*parameters((3,), (2,)), *parameters((3,), (2,), seed=9)]
    pack(weights), pack(biases[:2]), pack(biases[2:])
    x = torch.randn(2, 4, dtype=torch.float64)
    sum(y.sum() for y in packed_linear(x, weights, biases)).backward()
    before = [p.grad.clone() for p in (*weights, *biases)]
    for i, p in enumerate((*weights, *biases)):
        p.grad.fill_(float(i))
    assert [p.grad.unique().tolist() for p in (*weights, *biases)] == [[float(i)] for i in range(6)]
    assert torch.equal(before[2], before[4])


def test_an_input_without_gradient_saves_a_matmul(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    weights = parameters((3, 4), (2, 4))
    pack(weights)
    flops = []
    for needs_grad in (False, True):
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=needs_grad)
        with FlopCounterMode(display=False) as counter:
            gradients(packed_linear(x, weights), [*weights, x] if needs_grad else weights)
        flops.append(counter.get_total_flops())
    assert flops == [2 * 2 * 6 * 4 * 5, 3 * 2 * 6 * 4 * 5]


@pytest.mark.parametrize("used", ["all", "s", "q"])
def test_norm_packed_linear_is_norm_and_linear_of_each(used):
    weights, (norm_weight, norm_bias, input_bias) = parameters((4, 4), (3, 4), (3, 4)), parameters((4,), (4,), (4,))
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, norm_weight, norm_bias, input_bias, *weights]

    def chosen(outputs):
        return {"all": list(outputs), "s": [outputs[0]], "q": [outputs[1]]}[used]

    def grads(outputs):
        picked = chosen(outputs)
        generator = torch.Generator().manual_seed(1)
        ups = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in picked]
        return torch.autograd.grad(picked, inputs, ups, allow_unused=True)

    biased_x = x + input_bias - input_bias.detach()
    h = F.layer_norm(biased_x, (4,), norm_weight, norm_bias, 1e-5)
    plain = (biased_x * 1, *(F.linear(h, w) for w in weights))
    expected = grads(plain)
    pack(weights)
    outputs = norm_packed_linear(x, norm_weight, norm_bias, weights, input_bias=input_bias)
    for y, truth in zip(outputs, plain, strict=True):
        torch.testing.assert_close(y, truth)
    for g, truth in zip(grads(outputs), expected, strict=True):
        assert (g is None or not g.any()) if truth is None else torch.allclose(g, truth, rtol=1e-9)


def test_slices_of_one_tensor_are_concatenated_without_a_copy():
    y = torch.randn(2, 3, 10)
    pieces = y.split([4, 1, 5], -1)
    assert cat_or_view(pieces, -1).data_ptr() == y.data_ptr()
    assert torch.equal(cat_or_view(pieces, -1), y)
    # slices of heads, as attention's gradients are
    heads = y.unflatten(-1, (5, 2)).split([2, 3], 2)
    assert torch.equal(adjacent_view([h.flatten(2) for h in heads], -1), y)
    # wrong order, different tensors, overlapping rows
    overlapping = [y.as_strided((2, 2), (2, 1), offset) for offset in (0, 2)]
    for wrong in ([pieces[1], pieces[0]], [pieces[0], pieces[1].clone()], overlapping):
        assert adjacent_view(wrong, -1) is None
        assert torch.equal(cat_or_view(wrong, -1), torch.cat(wrong, -1))


def test_shapes_that_do_not_fit_are_refused():
    weights = parameters((3, 4), (2, 4))
    pack(weights)
    with pytest.raises(ValueError, match="do not fit x"):
        packed_linear(torch.ones(2, 5, dtype=torch.float64), weights)
    with pytest.raises(ValueError, match="1 biases do not fit 2 weights"):
        packed_linear(torch.ones(2, 4, dtype=torch.float64), weights, parameters((3,)))
    with pytest.raises(ValueError, match="does not fit x"):
        norm_packed_linear(torch.ones(2, 5), torch.ones(5), torch.ones(5), weights)
