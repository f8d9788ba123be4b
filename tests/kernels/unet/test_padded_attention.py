"""Attention with padded heads equals attention without, and keeps nothing of the padding for backward."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from safelight.kernels.unet import attention_backends, padded_attention
from safelight.kernels.unet.attention_backends import Case
from safelight.kernels.unet.attention_probe import make_inputs
from safelight.kernels.unet.padded_attention import padded_name
from tests.kernels.unet.cpu_passes import CPU_PASSES

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda")


@pytest.fixture
def on_a_cpu(monkeypatch):
    for name in padded_attention.PASSES:
        monkeypatch.setitem(padded_attention.PASSES, name, CPU_PASSES)


def both_ways(call, inputs, scale=None):
    q, k, v, grad = inputs
    out = call(q, k, v, scale)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@pytest.mark.parametrize(
    ("head_dim", "name"), [(40, "flash@64"), (80, "cudnn@128"), (160, "flash@192"), (8, "flash@32")]
)
@pytest.mark.parametrize("keys", [24, 77])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_padding_changes_nothing(on_a_cpu, head_dim, name, keys, scale):
    inputs = make_inputs(Case(head_dim, 3, 24, keys), 2, CPU, torch.float64)
    padded = both_ways(attention_backends.call_of(name), inputs, scale)
    plain = both_ways(attention_backends.CALLS["math"], inputs, scale)
    for ours, theirs in zip(padded, plain, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert padded[0].is_contiguous()


def test_the_padding_is_not_kept(on_a_cpu):
    inputs = make_inputs(Case(40, 3, 24, 77), 2, CPU, torch.float32)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attention_backends.call_of("flash@64")(*inputs[:3], None)
    assert [tuple(x.shape) for x in kept] == [
        (2, 24, 3, 40),
        (2, 77, 3, 40),
        (2, 77, 3, 40),
        (2, 24, 3, 40),
        (2, 3, 24),
    ]
    # views of the projections, of which no copy is kept
    assert [x.data_ptr() for x in kept[:3]] == [x.data_ptr() for x in inputs[:3]]


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("flash", {40: "flash@64", 64: None, 80: "flash@96", 160: "flash@192", 256: None, 320: None}),
        ("flash4", {40: "flash4@64", 64: None, 80: "flash4@96", 160: "flash4@256", 192: "flash4@256"}),
        ("cudnn", {40: "cudnn@64", 64: None, 80: "cudnn@128", 160: "cudnn@256"}),
        ("efficient", {40: None}),
        ("cpu-narrow", {8: None}),
    ],
)
def test_heads_are_padded_to_the_next_tile(backend, names):
    assert {head_dim: padded_name(backend, head_dim) for head_dim in names} == names


@pytest.mark.parametrize("name", ["flash@64", "cudnn@64", "flash4@64"])
def test_shapes_of_a_gpus_operators(name):
    """On meta tensors the operators themselves run: what forward hands on is what their backward takes."""
    inputs = make_inputs(Case(40, 8, 256, 77), 2, META, torch.bfloat16)
    if name.startswith("flash4"):
        out = attention_backends.call_of(name)(*inputs[:3], None)
        assert (out.shape, out.is_contiguous()) == (inputs[0].shape, True)
        return
    results = both_ways(attention_backends.call_of(name), inputs)
    assert [x.shape for x in results] == [inputs[0].shape, *(x.shape for x in inputs[:3])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head_dim", [40, 80, 160])
@pytest.mark.parametrize("backend", ["flash", "cudnn", "flash4"])
def test_on_a_gpu_padding_changes_no_more_than_rounding(backend, head_dim):
    from safelight.kernels.unet.attention_probe import probe

    inputs = make_inputs(Case(head_dim, 8, 256, 77), 2, CUDA, torch.bfloat16)
    name = padded_name(backend, head_dim)
    if reason := probe(name, inputs, deterministic=False):
        pytest.skip(reason)
    exact = both_ways(attention_backends.CALLS["math"], [x.detach().double().requires_grad_() for x in inputs])
    for ours, theirs in zip(both_ways(attention_backends.call_of(name), inputs), exact, strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
