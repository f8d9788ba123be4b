"""Norm + convolution, norm + projection and the feed-forward block as one function each, against PyTorch's chains."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops.norm_then_matmul import feed_forward, group_norm_linear, norm_linear, norm_silu_conv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# shapes are large enough that the largest error is no matter of luck: PyTorch's own matrix work makes most of it


def plain_conv(
    x, norm_weight, norm_bias, conv_weight, conv_bias=None, addend_NC=None, *, groups, silu, stride, padding
):
    if addend_NC is not None:
        x = x + addend_NC[:, :, None, None]
    h = F.group_norm(x, groups, norm_weight, norm_bias, 1e-5)
    return F.conv2d(F.silu(h) if silu else h, conv_weight, conv_bias, stride, padding)


def plain_linear(x, norm_weight, norm_bias, weight, bias=None, residual=None):
    s = x if residual is None else x + residual
    y = F.linear(F.layer_norm(s, s.shape[-1:], norm_weight, norm_bias, 1e-5), weight, bias)
    return y if residual is None else (s, y)


def plain_feed_forward(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, residual=None):
    s = x if residual is None else x + residual
    h = F.linear(F.layer_norm(s, s.shape[-1:], norm_weight, norm_bias, 1e-5), in_weight, in_bias)
    a, g = h.chunk(2, dim=-1)
    y = F.linear(a * F.gelu(g), out_weight, out_bias)
    return y if residual is None else s + y


def with_bias_in(plain, x, bias_in_x, **rest):
    """An op of x that has the bias in it: its gradient is that of one added here."""
    return plain(x + bias_in_x - bias_in_x.detach(), **rest)


def draw(shapes, dtype, seed=14):
    """Return named tensors; matrices and convolution weights are scaled so that outputs stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("weight"):
            x = 1 + 0.3 * x if len(shape) == 1 else x / x[0].numel() ** 0.5
        found[name] = x.to(dtype)
    return found


def conv_inputs(shape, out_channels, dtype, layout, bias, addend, size):
    n, c = shape[:2]
    shapes = {"x": shape, "norm_weight": (c,), "norm_bias": (c,), "conv_weight": (out_channels, c, size, size)}
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
    conv=[(3, 1, 1, True, True), (3, 2, 1, True, False), (1, 1, 0, False, True)],
)
def test_norm_silu_conv(check_op, shape, dtype, layout, addend, conv):
    size, stride, padding, silu, bias = conv
    inputs = conv_inputs(shape, 10, dtype, layout, bias, addend, size)
    options = {"silu": silu, "stride": stride, "padding": padding}
    check_op(
        lambda **leaves: norm_silu_conv(**leaves, num_groups=2, **options),
        lambda **leaves: plain_conv(**leaves, groups=2, **options),
        inputs,
    )


def test_norm_silu_conv_at_a_true_width(check_op):
    inputs = conv_inputs((1, 320, 3, 3), 16, torch.bfloat16, "channels_last", True, True, 3)
    options = {"silu": True, "stride": 1, "padding": 1}
    check_op(
        lambda **leaves: norm_silu_conv(**leaves, num_groups=32, **options),
        lambda **leaves: plain_conv(**leaves, groups=32, **options),
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
def test_what_goes_on_beside_the_norm_joins_it_in_the_backward_pass(check_op, dtype, bias):
    """A residual block's and a transformer's fork, with the gradient of a bias that is added to it behind."""
    inputs = conv_inputs((3, 64, 4, 3), 10, dtype, "channels_last", False, False, 3)
    inputs |= draw({"bias_of_x": (64,)}, dtype, seed=15) if bias else {}

    def plain_fork(x, bias_of_x=None, **rest):
        beside = x * 1.0 if bias_of_x is None else x + bias_of_x[:, None, None] - bias_of_x[:, None, None].detach()
        return beside, plain_conv(x, **rest, groups=8, silu=True, stride=1, padding=1)

    check_op(lambda **leaves: norm_silu_conv(**leaves, num_groups=8, forks=True), plain_fork, inputs)
    names = {"conv_weight": "weight"}
    inputs = {names.get(name, name): x for name, x in inputs.items()}
    inputs["weight"] = inputs["weight"][:, :, 0, 0].contiguous()

    def plain_tokens(x, norm_weight, norm_bias, weight, bias_of_x=None):
        beside = x * 1.0 if bias_of_x is None else x + bias_of_x[:, None, None] - bias_of_x[:, None, None].detach()
        h = F.group_norm(x, 8, norm_weight, norm_bias, 1e-5)
        return beside, F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), weight)

    check_op(lambda **leaves: group_norm_linear(**leaves, num_groups=8), plain_tokens, inputs)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("op", ["norm_silu_conv", "group_norm_linear"])
def test_either_way_of_a_fork_may_go_unused(used, op):
    inputs = conv_inputs((2, 4, 3, 3), 3, torch.float64, "nchw", False, False, 3) | {"bias_of_x": torch.zeros(4)}
    if op == "group_norm_linear":
        inputs["weight"] = inputs.pop("conv_weight")[:, :, 0, 0].contiguous()
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    wanted = list(leaves.values())

    def plain_outputs(x, norm_weight, norm_bias, bias_of_x, **rest):
        beside = x + bias_of_x[:, None, None]
        if op == "norm_silu_conv":
            return beside, plain_conv(x, norm_weight, norm_bias, **rest, groups=2, silu=True, stride=1, padding=1)
        h = F.group_norm(x, 2, norm_weight, norm_bias, 1e-5)
        return beside, F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), **rest)

    options = {"forks": True} if op == "norm_silu_conv" else {}
    ours = {"norm_silu_conv": norm_silu_conv, "group_norm_linear": group_norm_linear}[op]
    found, expected = (
        torch.autograd.grad(outputs[used].square().sum(), wanted, allow_unused=True)
        for outputs in (ours(**leaves, num_groups=2, **options), plain_outputs(**leaves))
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b)


@pytest.mark.grid(shape=[(1, 3, 5), (3, 7, 77), (1, 5, 320)], dtype=DTYPES, residual=[True, False], bias=[True, False])
def test_norm_linear(check_op, shape, dtype, residual, bias):
    d = shape[-1]
    shapes = {"x": shape, "norm_weight": (d,), "norm_bias": (d,), "weight": (12, d)}
    shapes |= ({"bias": (12,)} if bias else {}) | ({"residual": shape} if residual else {})
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
def test_a_bias_of_the_projection_before_gets_its_gradient(check_op, dtype, residual, op):
    shape = (3, 7, 20)
    shapes = feed_forward_shapes(shape, residual)
    if op == "norm_linear":
        shapes = {name: shapes[name] for name in shapes if name[:3] not in ("in_", "out")} | {"weight": (12, 20)}
    ours, plain = {"norm_linear": (norm_linear, plain_linear), "feed_forward": (feed_forward, plain_feed_forward)}[op]
    inputs = draw(shapes | {"bias_in_x": shape[-1:]}, dtype)
    check_op(ours, lambda **leaves: with_bias_in(plain, **leaves), inputs)


def test_a_bias_in_x_gets_its_gradient_where_the_norm_goes_unused():
    leaves = {
        name: x.requires_grad_()
        for name, x in draw(
            {
                "x": (2, 5),
                "norm_weight": (5,),
                "norm_bias": (5,),
                "weight": (3, 5),
                "residual": (2, 5),
                "bias_in_x": (5,),
            },
            torch.float64,
        ).items()
    }
    s, _ = norm_linear(**leaves)
    (found,) = torch.autograd.grad(s.square().sum(), leaves["bias_in_x"])
    torch.testing.assert_close(found, 2 * s.detach().sum(dim=0))


def saved_bytes(function, inputs):
    """Return the bytes an op saves beside its parameters."""
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
    inputs = conv_inputs((2, 64, 8, 8), 64, torch.bfloat16, "channels_last", True, True, 3)
    found = saved_bytes(lambda **x: norm_silu_conv(**x, num_groups=32), inputs)
    # x, the addend, mean and rstd
    assert found == 2 * 2 * 64 * 64 + 2 * 2 * 64 + 2 * 4 * 2 * 32
    options = {"groups": 32, "silu": True, "stride": 1, "padding": 1}
    assert saved_bytes(lambda **x: plain_conv(**x, **options), inputs) > 2.8 * found


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_saves_its_input_and_at_most_the_projection(recompute):
    rows, d = 32, 64
    inputs = draw(feed_forward_shapes((2, 16, d), False), torch.bfloat16)
    found = saved_bytes(lambda **x: feed_forward(**x, recompute=recompute), inputs)
    assert found == 2 * rows * d + 2 * 4 * rows + (0 if recompute else 2 * rows * 8 * d)


@pytest.mark.parametrize("addend", [True, False])
def test_gradcheck_of_norm_silu_conv(addend):
    inputs = conv_inputs((2, 4, 3, 3), 3, torch.float64, "nchw", True, addend, 3)
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
    wanted = list(leaves.values())
    found = torch.autograd.grad(norm_linear(**leaves)[used].square().sum(), wanted, allow_unused=True)
    expected = torch.autograd.grad(plain_linear(**leaves)[used].square().sum(), wanted, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b)


def test_it_works_under_checkpointing(device):
    inputs = conv_inputs((2, 64, 4, 3), 10, torch.float32, "channels_last", True, True, 3)
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    names, values = list(leaves), list(leaves.values())

    def run(*v):
        return norm_silu_conv(**dict(zip(names, v, strict=True)), num_groups=8).square().mean()

    expected = torch.autograd.grad(run(*values), values)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, *values, use_reentrant=False), values)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    x, w = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"a projection of \(3, 5\) does not fit"):
        norm_linear(x, w, w, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"a projection of \(3, 5\) does not fit"):
        group_norm_linear(torch.ones(2, 4, 2, 2), w, w, 2, torch.ones(3, 5))
    with pytest.raises(ValueError, match="do not fit a GEGLU between"):
        feed_forward(x, w, w, torch.ones(6, 4), None, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"a kernel of \(3, 5, 3, 3\) does not fit"):
        norm_silu_conv(torch.ones(2, 4, 2, 2), w, w, 2, torch.ones(3, 5, 3, 3))
