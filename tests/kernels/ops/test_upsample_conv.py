"""upsample_conv against F.interpolate and F.conv2d: results, gradients, saved tensors."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops.upsample_conv import upsample_conv


def plain(x, weight, bias=None, *, size):
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def draw(dtype, order, bias=True):
    generator = torch.Generator().manual_seed(4)
    inputs = {
        "x": torch.randn(2, 6, 4, 3, generator=generator).to(dtype).to(memory_format=order),
        "weight": (torch.randn(5, 6, 3, 3, generator=generator) / 54**0.5).to(dtype).to(memory_format=order),
    }
    return inputs | ({"bias": torch.randn(5, generator=generator).to(dtype)} if bias else {})


@pytest.mark.grid(
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    order=[torch.contiguous_format, torch.channels_last],
    size=[(8, 6), (7, 5)],
    bias=[True, False],
)
def test_upsample_conv(check_op, dtype, order, size, bias):
    check_op(
        lambda **leaves: upsample_conv(**{"bias": None, **leaves}, size=size),
        lambda **leaves: plain(**leaves, size=size),
        draw(dtype, order, bias),
    )


def test_only_the_small_input_and_the_weight_are_saved():
    inputs = {name: x.requires_grad_() for name, x in draw(torch.float32, torch.channels_last).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        upsample_conv(**inputs, size=(8, 6))
    assert {t.data_ptr() for t in saved} == {inputs["x"].data_ptr(), inputs["weight"].data_ptr()}


def test_gradcheck():
    inputs = [x.double().requires_grad_() for x in draw(torch.float32, torch.contiguous_format).values()]
    assert torch.autograd.gradcheck(lambda *v: upsample_conv(*v, size=(8, 6)), inputs)


def test_a_weight_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a convolution weight of \(3, 5, 3, 3\) does not fit"):
        upsample_conv(torch.ones(2, 4, 2, 2), torch.ones(3, 5, 3, 3), None, (4, 4))
