"""Norm + convolution, norm + projection and feed-forward as single functions, against PyTorch's separate operations."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops.norm_then_matmul import feed_forward, group_norm_linear, norm_linear, norm_silu_conv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Shapes are large enough for the maximum error to be stable; most of it comes from PyTorch's own matmuls.


def plain_conv(x, norm_weight, norm_bias, conv_weight, conv_bias=None, addend_NC=None, *, groups):
    if addend_NC is not None:
        x = x + addend_NC[:, :, None, None]
    h = F.group_norm(x, groups, norm_weight, norm_bias, 1e-5)
    return F.conv2d(F.silu(h), conv_weight, conv_bias, padding=1)


def plain_linear(x, norm_weight, norm_bias, weight, residual=None):
    s = x if residual is None else x + residual
    y = F.linear(F.layer_norm(s, s.shape[-1:], norm_weight, norm_bias, 1e-5), weight)
    return y if residual is None else (s, y)


def plain_feed_forward(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, residual=None):
    s = x if residual is None else x + residual
    h = F.linear(F.layer_norm(s, s.shape[-1:], norm_weight, norm_bias, 1e-5), in_weight, in_bias)
    a, g = h.chunk(2, dim=-1)
    y = F.linear(a * F.gelu(g), out_weight, out_bias)
    return y if residual is None else s + y


def with_input_bias(plain, x, input_bias, **rest):
    """Return plain(x) such that the bias, which x already contains, gets its gradient."""
    return plain(x + input_bias - input_bias.detach(), **rest)


def draw(shapes, dtype, seed=14):
    """Return random tensors by name; matrices and convolution weights are scaled to give outputs near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("weight"):
            x = 1 + 0.3 * x if len(shape) == 1 else x / x[0].numel() ** 0.5
        tensors[name] = x.to(dtype)
    return tensors


def conv_inputs(shape, out_channels, dtype, layout, bias, addend):
    n, c = shape[:2]
    shapes = {"x": shape, "norm_weight": (c,), "norm_bias": (c,), "conv_weight": (out_channels, c, 3, 3)}
    shapes |= {"conv_bias": (out_channels,)} if bias else {}
    shapes |= {"addend_NC": (n, c)} if addend else {}
    inputs = draw(shapes, dtype)
    if layout == "channels_last":
        for name in ("x", "conv_weight"):
            inputs[name] = inputs[name].to(memory_format=torch.channels_last)
    return inputs


@pytest.mark.grid(
    shape=[(1, 14, 11, 7), (3, 64, 4, 3)],
    dtype=DTYPES,
    layout=["nchw", "channels_last"],
    addend=[True, False],
    bias=[True, False],
)
def test_norm_silu_conv(check_op, shape, dtype, layout, addend, bias):
    inputs = conv_inputs(shape, 10, dtype, layout, bias, addend)
    check_op(
        lambda **leaves: norm_silu_conv(**leaves, num_groups=2),
        lambda **leaves: plain_conv(**leaves, groups=2),
        inputs,
    )


def test_norm_silu_conv_at_sd15s_width(check_op):
    inputs = conv_inputs((1, 320, 3, 3), 16, torch.bfloat16, "channels_last", True, True)
    check_op(
        lambda **leaves: norm_silu_conv(**leaves, num_groups=32),
        lambda **leaves: plain_conv(**leaves, groups=32),
        inputs,
    )


@pytest.mark.grid(
    shape=[(1, 56, 13, 9), (3, 64, 4, 3)],
    dtype=DTYPES,
    layout=["nchw", "channels_last"],
    kernel=[True, False],
    bias=[True, False],
)
def test_group_norm_linear(check_op, shape, dtype, layout, kernel, bias):
    shapes = {"x": shape, "norm_weight": shape[1:2], "norm_bias": shape[1:2]}
    shapes |= {"weight": (48, shape[1], *[1] * 2 * kernel)} | ({"bias": (48,)} if bias else {})
    inputs = draw(shapes, dtype)
    if layout == "channels_last":
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)

    def plain(x, norm_weight, norm_bias, weight, bias=None):
        h = F.group_norm(x, 2, norm_weight, norm_bias, 1e-6)
        return F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), weight.flatten(1), bias)

    check_op(lambda **leaves: group_norm_linear(**leaves, num_groups=2, eps=1e-6)[1], plain, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_of_a_skip_connection_and_of_its_bias(check_op, dtype, bias):
    """As in a residual block and at the entry to a transformer: x is returned, and a bias is added to it later."""
    inputs = conv_inputs((2, 64, 4, 3), 10, dtype, "channels_last", False, False)
    inputs |= draw({"skip_bias": (64,)}, dtype, seed=15) if bias else {}

    def plain_skip(x, skip_bias=None, **rest):
        skip = x * 1.0 if skip_bias is None else x + skip_bias[:, None, None] - skip_bias[:, None, None].detach()
        return skip, plain_conv(x, **rest, groups=4)

    check_op(lambda **leaves: norm_silu_conv(**leaves, num_groups=4, return_x=True), plain_skip, inputs)
    names = {"conv_weight": "weight"}
    inputs = {names.get(name, name): x for name, x in inputs.items()}
    inputs["weight"] = inputs["weight"][:, :, 0, 0].contiguous()

    def plain_tokens(x, norm_weight, norm_bias, weight, skip_bias=None):
        skip = x * 1.0 if skip_bias is None else x + skip_bias[:, None, None] - skip_bias[:, None, None].detach()
        h = F.group_norm(x, 4, norm_weight, norm_bias, 1e-5)
        return skip, F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), weight)

    check_op(lambda **leaves: group_norm_linear(**leaves, num_groups=4), plain_tokens, inputs)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("op", ["norm_silu_conv", "group_norm_linear"])
def test_either_output_of_a_skip_connection_may_go_unused(used, op):
    inputs = conv_inputs((2, 4, 3, 3), 3, torch.float64, "nchw", False, False) | {"skip_bias": torch.zeros(4)}
    if op == "group_norm_linear":
        inputs["weight"] = inputs.pop("conv_weight")[:, :, 0, 0].contiguous()
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    inputs = list(leaves.values())

    def plain_outputs(x, norm_weight, norm_bias, skip_bias, **rest):
        skip = x + skip_bias[:, None, None]
        if op == "norm_silu_conv":
            return skip, plain_conv(x, norm_weight, norm_bias, **rest, groups=2)
        h = F.group_norm(x, 2, norm_weight, norm_bias, 1e-5)
        return skip, F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), **rest)

    options = {"return_x": True} if op == "norm_silu_conv" else {}
    ours = {"norm_silu_conv": norm_silu_conv, "group_norm_linear": group_norm_linear}[op]
    ours_grads, expected = (
        torch.autograd.grad(outputs[used].square().sum(), inputs, allow_unused=True)
        for outputs in (ours(**leaves, num_groups=2, **options), plain_outputs(**leaves))
    )
    for a, b in zip(ours_grads, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b)


@pytest.mark.grid(shape=[(1, 3, 5), (3, 7, 77), (1, 5, 320)], dtype=DTYPES, residual=[True, False])
def test_norm_linear(check_op, shape, dtype, residual):
    d = shape[-1]
    shapes = {"x": shape, "norm_weight": (d,), "norm_bias": (d,), "weight": (12, d)}
    shapes |= {"residual": shape} if residual else {}
    check_op(norm_linear, plain_linear, draw(shapes, dtype))


def feed_forward_shapes(shape, residual):
    d = shape[-1]
    shapes = {"x": shape, "norm_weight": (d,), "norm_bias": (d,), "in_weight": (8 * d, d), "in_bias": (8 * d,)}
    return shapes | {"out_weight": (d, 4 * d), "out_bias": (d,)} | ({"residual": shape} if residual else {})


@pytest.mark.grid(shape=[(1, 13, 18), (3, 7, 20)], dtype=DTYPES, residual=[True, False], recompute=[True, False])
def test_feed_forward(check_op, shape, dtype, residual, recompute):
    check_op(
        lambda **leaves: feed_forward(**leaves, recompute=recompute),
        plain_feed_forward,
        draw(feed_forward_shapes(shape, residual), dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("op", ["norm_linear", "feed_forward"])
def test_the_gradient_of_an_input_bias(check_op, dtype, residual, op):
    shape = (3, 7, 20)
    shapes = feed_forward_shapes(shape, residual)
    if op == "norm_linear":
        shapes = {name: shapes[name] for name in shapes if name[:3] not in ("in_", "out")} | {"weight": (12, 20)}
    ours, plain = {"norm_linear": (norm_linear, plain_linear), "feed_forward": (feed_forward, plain_feed_forward)}[op]
    inputs = draw(shapes | {"input_bias": shape[-1:]}, dtype)
    check_op(ours, lambda **leaves: with_input_bias(plain, **leaves), inputs)


def test_the_gradient_of_an_input_bias_if_the_norm_goes_unused():
    leaves = {
        name: x.requires_grad_()
        for name, x in draw(
            {
                "x": (2, 5),
                "norm_weight": (5,),
                "norm_bias": (5,),
                "weight": (3, 5),
                "residual": (2, 5),
                "input_bias": (5,),
            },
            torch.float64,
        ).items()
    }
    s, _ = norm_linear(**leaves)
    (grad,) = torch.autograd.grad(s.square().sum(), leaves["input_bias"])
    torch.testing.assert_close(grad, 2 * s.detach().sum(dim=0))


def saved_bytes(function, inputs):
    """Return the bytes that an op saves besides its parameters."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    parameters = {x.data_ptr() for name, x in leaves.items() if "weight" in name or "bias" in name}
    saved = {}

    def pack(t):
        if t.data_ptr() not in parameters:
            saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(**leaves)
    return sum(saved.values())


def test_norm_silu_conv_saves_its_input_and_statistics():
    inputs = conv_inputs((2, 64, 8, 8), 64, torch.bfloat16, "channels_last", True, True)
    saved = saved_bytes(lambda **x: norm_silu_conv(**x, num_groups=32), inputs)
    # x, the addend, mean and rstd
    assert saved == 2 * 2 * 64 * 64 + 2 * 2 * 64 + 2 * 4 * 2 * 32
    assert saved_bytes(lambda **x: plain_conv(**x, groups=32), inputs) > 2.8 * saved


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_saves_its_input_statistics_and_the_projection_unless_recomputed(recompute):
    rows, d = 32, 64
    inputs = draw(feed_forward_shapes((2, 16, d), False), torch.bfloat16)
    saved = saved_bytes(lambda **x: feed_forward(**x, recompute=recompute), inputs)
    assert saved == 2 * rows * d + 2 * 4 * rows + (0 if recompute else 2 * rows * 8 * d)


@pytest.mark.parametrize("addend", [True, False])
def test_gradcheck_of_norm_silu_conv(addend):
    inputs = conv_inputs((2, 4, 3, 3), 3, torch.float64, "nchw", True, addend)
    names = list(inputs)
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(lambda *v: norm_silu_conv(**dict(zip(names, v, strict=True)), num_groups=2), leaves)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_of_feed_forward(recompute):
    inputs = draw(feed_forward_shapes((1, 2, 3), True), torch.float64)
    names = list(inputs)
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(
        lambda *v: feed_forward(**dict(zip(names, v, strict=True)), recompute=recompute), leaves
    )


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_norm_linear_may_go_unused(used):
    shapes = {"x": (2, 5), "norm_weight": (5,), "norm_bias": (5,), "weight": (3, 5), "residual": (2, 5)}
    leaves = {name: x.requires_grad_() for name, x in draw(shapes, torch.float64).items()}
    inputs = list(leaves.values())
    ours_grads = torch.autograd.grad(norm_linear(**leaves)[used].square().sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(plain_linear(**leaves)[used].square().sum(), inputs, allow_unused=True)
    for a, b in zip(ours_grads, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b)


def test_checkpointing_gives_the_same_gradients(device):
    inputs = conv_inputs((2, 64, 4, 3), 10, torch.float32, "channels_last", True, True)
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    names, values = list(leaves), list(leaves.values())

    def run(*v):
        return norm_silu_conv(**dict(zip(names, v, strict=True)), num_groups=2).square().mean()

    expected = torch.autograd.grad(run(*values), values)
    ours_grads = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, *values, use_reentrant=False), values)
    assert all(torch.equal(a, b) for a, b in zip(ours_grads, expected, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    x, w = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"a projection of \(3, 5\) does not fit"):
        norm_linear(x, w, w, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"a projection of \(3, 5\) does not fit"):
        group_norm_linear(torch.ones(2, 4, 2, 2), w, w, 2, torch.ones(3, 5))
    with pytest.raises(ValueError, match="do not fit around a GEGLU"):
        feed_forward(x, w, w, torch.ones(6, 4), None, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"a convolution weight of \(3, 5, 3, 3\) does not fit"):
        norm_silu_conv(torch.ones(2, 4, 2, 2), w, w, 2, torch.ones(3, 5, 3, 3))
