"""GroupNorm, with and without SiLU and addend, split and whole, against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from safelight.kernels.ops import group_norm_silu as module
from safelight.kernels.ops.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_bwd,
    group_norm_silu_fwd,
    group_norm_silu_recompute,
)
from safelight.kernels.triton.jit import cdiv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# ((N, C, H, W), groups): small odd shapes, and the channel counts of SD's UNets
SMALL = [((1, 6, 3, 5), 3), ((3, 20, 1, 7), 2), ((2, 32, 11, 13), 4)]
WIDE = [((1, 320, 5, 3), 32), ((1, 640, 2, 1), 32), ((1, 1280, 4, 4), 32), ((1, 2560, 2, 2), 32)]
# groups of 30 and 60 channels fill the same blocks of 32 and 64 as groups of 20 and 40
WIDE_SLOW = [((1, 960, 3, 3), 32), ((1, 1920, 2, 3), 32)]
SILU_AND_ADDEND = [(True, True), (True, False), (False, False)]
LAYOUTS = ["nchw", "channels_last", "sliced", "transposed"]


def plain(x, weight, bias, addend_NC=None, *, groups, silu):
    if addend_NC is not None:
        x = x + addend_NC[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, 1e-5)
    return F.silu(x) if silu else x


def make(shape, dtype, layout, addend):
    n, c = shape[:2]
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(shape, generator=generator) + 0.5
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.cat([x, x], dim=1).to(memory_format=torch.channels_last)[:, c // 2 : c // 2 + c]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    inputs = {
        "x": x,
        "weight": 1 + 0.3 * torch.randn(c, generator=generator),
        "bias": 0.3 * torch.randn(c, generator=generator),
    }
    if addend:
        inputs["addend_NC"] = torch.randn(n, c, generator=generator)
    return {name: value.to(dtype) for name, value in inputs.items()}


@pytest.fixture
def split(monkeypatch):
    """A function that forces the split form: no group is handled by one program."""
    return lambda: monkeypatch.setattr(module, "MAX_WHOLE", 0)


def check(check_op, shape, groups, dtype, layout, silu, addend):
    inputs = make(shape, dtype, layout, addend)
    results = check_op(
        lambda **leaves: group_norm_silu(**leaves, num_groups=groups, silu=silu),
        lambda **leaves: plain(**leaves, groups=groups, silu=silu),
        inputs,
    )
    if layout == "channels_last":
        assert results["output 0"].is_contiguous(memory_format=torch.channels_last)
        assert results["gradient of x"].is_contiguous(memory_format=torch.channels_last)
    if layout == "nchw":
        assert results["output 0"].is_contiguous()


@pytest.mark.grid(case=SMALL, dtype=DTYPES, layout=LAYOUTS, silu_and_addend=SILU_AND_ADDEND, whole=[True, False])
def test_forward_and_backward(check_op, device, monkeypatch, split, case, dtype, layout, silu_and_addend, whole):
    if not whole:
        split()
    elif device.type == "cpu":
        # the interpreter sums a tile sequentially where a GPU uses a tree; a smaller tile keeps its error as small
        monkeypatch.setattr(module, "WHOLE_TILE", 256)
    check(check_op, *case, dtype, layout, *silu_and_addend)


@pytest.mark.grid(
    case=WIDE,
    dtype=DTYPES,
    layout=LAYOUTS[:2],
    silu_and_addend=[SILU_AND_ADDEND[0], SILU_AND_ADDEND[2]],
    whole=[True, False],
)
@pytest.mark.long
def test_the_models_channel_counts(check_op, split, case, dtype, layout, silu_and_addend, whole):
    if not whole:
        split()
    check(check_op, *case, dtype, layout, *silu_and_addend)


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE_SLOW)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [True, False])
def test_more_channel_counts(check_op, split, case, layout, dtype, whole):
    if not whole:
        split()
    check(check_op, *case, dtype, layout, True, True)


@pytest.mark.parametrize("num_programs", [1, 6])
def test_tiles_and_splits_are_merged(check_op, monkeypatch, split, num_programs):
    """One split of five tiles per sample, or two splits, of three tiles and of one and a fraction."""
    split()
    monkeypatch.setattr(module, "NUM_PROGRAMS", num_programs)
    shape, groups = (3, 64, 11, 13), 8
    plan = module._plan(3, 64, 143, groups)
    assert not plan.is_whole
    assert (plan.num_splits, plan.chunk // plan.block_s) == {1: (1, 5), 6: (2, 3)}[num_programs]
    check(check_op, shape, groups, torch.float32, "channels_last", True, True)


def test_the_whole_form_takes_several_tiles(check_op, monkeypatch):
    """143 pixels of 8 channels are nine tiles of 16 pixels, the last one not full."""
    monkeypatch.setattr(module, "WHOLE_TILE", 128)
    plan = module._plan(1, 16, 143, 2)
    assert (plan.is_whole, plan.block_s, plan.grid) == (True, 16, (2, 1, 1))
    check(check_op, (1, 16, 11, 13), 2, torch.float32, "channels_last", True, True)


@pytest.mark.grid(dtype=DTYPES, samples=[1, 3], layout=LAYOUTS[:2], whole=[True, False])
def test_a_skip_gradient_is_added_and_summed(device, split, dtype, samples, layout, whole):
    """Both gradients are channel slices, as behind a concatenation; two groups of 10 channels."""
    if not whole:
        split()
    inputs = make((samples, 20, 5, 7), dtype, layout, addend=False)
    x, weight, bias = (value.to(device) for value in inputs.values())
    both = torch.randn(2, samples, 24, 5, 7, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    dy, ds = (g.to(memory_format=order)[:, 3:23] for g in both)
    _, *stats = group_norm_silu_fwd(x, weight, bias, None, 2, 1e-5, True)
    saved = (x, weight, bias, None, *stats, 2, 1e-5, True)
    dx_alone, *parameters, _ = group_norm_silu_bwd(dy, *saved)
    dx, dweight, dbias, daddend, total = group_norm_silu_bwd(dy, *saved, ds=ds, sum_ds=True)
    assert daddend is None
    assert torch.equal(dweight, parameters[0])
    assert torch.equal(dbias, parameters[1])
    # the kernel adds in fp32; dx_alone was rounded before the sum
    torch.testing.assert_close(dx, dx_alone + ds, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    truth, size = (g.double().sum(dim=(0, 2, 3)) for g in (ds, ds.abs()))
    assert total.dtype == dtype
    # summed in fp32 and rounded once
    allowed = torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * truth.abs()
    assert ((total.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("whole", [True, False])
def test_a_large_mean_costs_no_digits(device, split, whole):
    """The mean is 30,000 standard deviations: E[x^2] - E[x]^2 would lose everything."""
    if not whole:
        split()
    x = 3000 + 0.1 * torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(3))
    exact = x.double().view(1, 2, -1)
    ones = torch.ones(8, device=device)
    _, mean, rstd = group_norm_silu_fwd(x.to(device), ones, 0 * ones, None, 2, 1e-5, True)
    # fp32 numbers near 3000 are 2.4e-4 apart
    torch.testing.assert_close(mean.cpu().double(), exact.mean(2), rtol=0, atol=5e-4)
    torch.testing.assert_close(rstd.cpu().double(), (exact.var(2, correction=0) + 1e-5).rsqrt(), rtol=5e-5, atol=0)


def test_a_constant_image_is_normalized_to_the_bias(device):
    x = torch.full((2, 4, 3, 3), 7.0, device=device)
    bias = torch.tensor([0.0, 1.0, -2.0, 3.0], device=device)
    y = group_norm_silu(x, torch.ones(4, device=device), bias, 2, silu=False)
    assert torch.equal(y, bias[None, :, None, None].expand_as(x))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recomputing_gives_the_same_bits(device, split, memory_format, whole):
    if not whole:
        split()
    inputs = make((2, 64, 11, 13), torch.float16, "nchw", True)
    x, weight, bias, addend = (value.to(device) for value in inputs.values())
    x = x.contiguous(memory_format=memory_format)
    y, mean, rstd = group_norm_silu_fwd(x, weight, bias, addend, 8, 1e-5, True)
    assert torch.equal(group_norm_silu_recompute(x, weight, bias, addend, mean, rstd, 8, 1e-5, True), y)


def test_upstream_gradients_may_have_another_memory_order(device):
    inputs = {
        name: value.to(device) for name, value in make((2, 8, 3, 4), torch.float32, "channels_last", True).items()
    }
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = group_norm_silu(**leaves, num_groups=2)
    dy = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(5)).to(device)
    expected = torch.autograd.grad(
        y, list(leaves.values()), dy.to(memory_format=torch.channels_last), retain_graph=True
    )
    for other in (dy, torch.cat([dy, dy], dim=1)[:, :8], dy.transpose(2, 3).contiguous().transpose(2, 3)):
        grads = torch.autograd.grad(y, list(leaves.values()), other, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("addend", [True, False])
def test_gradcheck_in_double_precision(addend):
    inputs = {
        name: value.double().requires_grad_()
        for name, value in make((2, 4, 2, 3), torch.float32, "nchw", addend).items()
    }
    names = list(inputs)

    def run(*values):
        return group_norm_silu(**dict(zip(names, values, strict=True)), num_groups=2)

    torch.testing.assert_close(run(*inputs.values()), plain(**inputs, groups=2, silu=True))
    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_only_the_input_the_parameters_and_two_numbers_per_group_are_saved(where):
    shape, groups = (2, 64, 8, 8), 32
    x = torch.zeros(shape, dtype=torch.bfloat16, device=where, requires_grad=True)
    weight, bias = (torch.ones(64, device=where, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group_norm_silu(x, weight, bias, groups)
    assert sum(t.numel() * t.element_size() for t in saved) == 2 * x.numel() + 2 * 2 * 64 + 2 * 4 * 2 * groups


@pytest.mark.parametrize("shape", [(1, 320, 64, 64), (1, 1920, 32, 32), (1, 2560, 32, 32), (1, 320, 128, 128)])
def test_batch_one_fills_a_gpu(shape):
    """In the split form: at least two programs per SM of a 4090 (128) or H200 (132), or 2,048 elements per program."""
    n, c, h, w = shape
    plan = module._plan(n, c, h * w, 32)
    programs = plan.grid[0] * plan.grid[1] * plan.grid[2]
    assert programs >= 256 or programs >= c * h * w / 2048


def test_groups_that_fit_in_a_cache_take_the_whole_form():
    """The largest such norm of SD1.5 has 2,560 channels at 16 x 16, eight tiles per group; 960 at 32 x 32 are split."""
    plan = module._plan(1, 2560, 256, 32)
    assert (plan.grid, plan.is_whole, cdiv(256, plan.block_s), plan.num_warps) == ((32, 1, 1), True, 8, 16)
    assert module._plan(16, 640, 1024, 32).grid == (32, 1, 16)
    assert not module._plan(1, 960, 1024, 32).is_whole
    # a large batch leaves one split per group, which is still not the whole form
    large = module._plan(64, 2560, 1024, 32)
    assert (large.num_splits, large.is_whole) == (1, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 6, 2, 2), (6,), 4), "6 channels do not fit 4 groups"),
        (((2, 6, 2, 2), (5,), 3), "6 channels do not fit 3 groups and .5,. weights"),
        (((2, 6), (6,), 3), "none of them empty"),
        (((0, 6, 2, 2), (6,), 3), "none of them empty"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    shape, channels, groups = arguments
    with pytest.raises(ValueError, match=message):
        group_norm_silu(torch.ones(shape), torch.ones(channels), torch.ones(channels), groups)


def test_an_addend_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"give it \(N, C\) = \(2, 6\)"):
        group_norm_silu(torch.ones(2, 6, 2, 2), torch.ones(6), torch.ones(6), 3, addend_NC=torch.ones(6))
