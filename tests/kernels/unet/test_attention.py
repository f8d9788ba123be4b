"""`attend` against plain softmax attention, what it copies and saves, and the processor that calls it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from safelight.kernels.unet import narrow_attention
from safelight.kernels.unet.attention import (
    AttendProcessor,
    Case,
    apply_attention,
    attend,
    attention_cases,
    attention_modules,
    attention_operators,
    choose_attention,
    head_dim_of,
)
from safelight.kernels.unet.attention_backends import CUDA_BACKENDS, AttentionChoice, Verdict

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, heads, queries, keys, head dim)
SHAPES = [
    (1, 2, 1, 1, 40),
    (3, 2, 77, 77, 40),
    (1, 1, 64, 77, 64),
    (3, 3, 33, 77, 80),
    (1, 2, 50, 50, 160),
    (3, 1, 5, 1, 64),
]
LONG = (1, 1, 4096, 4096, 40)


def choice_of(backend: str, *head_dims: int) -> AttentionChoice:
    return AttentionChoice("test", "any", {Case(dim): Verdict(backend, {}) for dim in head_dims})


def make_inputs(shape, dtype, layout: str, device=CPU) -> tuple[torch.Tensor, ...]:
    """Return q, k, v leaves: contiguous, or views of one or two packed projections."""
    batch, heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(1)

    def packed(tokens, num):
        whole = torch.randn(batch, tokens, num * heads * dim, generator=generator).to(device, dtype)
        return [x.view(batch, tokens, heads, dim) for x in whole.split(heads * dim, dim=-1)]

    if layout == "contiguous":
        q, k, v = (packed(n, 1)[0] for n in (queries, keys, keys))
    elif queries == keys:
        q, k, v = packed(queries, 3)
    else:
        (q,), (k, v) = packed(queries, 1), packed(keys, 2)
    if layout == "mixed":
        k = k.contiguous()
    return tuple(x.detach().requires_grad_() for x in (q, k, v))


def softmax_attention(q, k, v, scale=None):
    """Return plain attention in the inputs' dtype, step by step."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def results(function, inputs, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(backend, shape, dtype, layout, device=CPU, scale=None):
    inputs = make_inputs(shape, dtype, layout, device)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    choice = choice_of(backend, shape[-1])
    ours = results(lambda *x: attend(*x, choice, scale), inputs, grad)
    again = results(lambda *x: attend(*x, choice, scale), inputs, grad)
    plain = results(lambda *x: softmax_attention(*x, scale), inputs, grad)
    exact = results(lambda *x: softmax_attention(*x, scale), [x.detach().double() for x in inputs], grad.double())
    assert ours[0].is_contiguous()
    # torch's fused CPU kernel computes exp to within 20 ulp of fp32; in the gradients that error is multiplied by sums
    sums = (grad.double().transpose(1, 2) @ inputs[2].detach().double().transpose(1, 2).mT).abs().max()
    floor = 20 * torch.finfo(torch.float32).eps * max(1.0, float(sums))
    for name, a, b, c, truth in zip(("out", "dq", "dk", "dv"), ours, again, plain, exact, strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        if device.type == "cpu":
            assert torch.equal(a, b), f"{name} differs between two runs"
        allowed = 2 * (c.double() - truth).abs().max() + floor
        error = (a.double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.grid(shape=SHAPES, dtype=DTYPES, layout=["contiguous", "packed", "mixed"])
def test_attend_is_softmax_attention(shape, dtype, layout):
    check("cpu-flash", shape, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_has_the_bits_of_scaled_dot_product_attention_on_the_cpu(dtype):
    inputs = make_inputs((2, 3, 33, 77, 40), dtype, "packed")
    grad = torch.randn(2, 33, 3, 40, generator=torch.Generator().manual_seed(2))
    ours = results(lambda *x: attend(*x, choice_of("cpu-flash", 40)), inputs, grad)
    sdpa = results(
        lambda *x: F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x)).transpose(1, 2), inputs, grad
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, sdpa, strict=True))


def test_an_explicit_scale():
    check("cpu-flash", (2, 2, 9, 7, 8), torch.float32, "contiguous", scale=0.7)


NARROW = [(1, 2, 1, 1, 8), (3, 2, 77, 77, 8), (2, 4, 64, 48, 15), (1, 1, 5, 1, 4), (2, 3, 256, 48, 8)]


@pytest.mark.grid(shape=NARROW, dtype=DTYPES, layout=["contiguous", "packed", "mixed"])
@pytest.mark.parametrize("max_scores", [narrow_attention.MAX_SCORES, 77 * 77 * 4])
def test_narrow_heads_are_softmax_attention(shape, dtype, layout, max_scores, monkeypatch):
    """All heads at once, and four or fewer, the last of them alone."""
    monkeypatch.setattr(narrow_attention, "MAX_SCORES", max_scores)
    check("cpu-narrow", shape, dtype, layout)
    check("cpu-narrow", shape, dtype, layout, scale=0.7)


def test_narrow_heads_save_inputs_output_and_a_number_a_row():
    inputs = make_inputs((2, 3, 64, 48, 8), torch.float32, "packed")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attend(*inputs, choice_of("cpu-narrow", 8))
    *whole, log_sums = saved
    assert [x.data_ptr() for x in whole] == [x.data_ptr() for x in (*inputs, out)]
    assert log_sums.shape == (2 * 3, 64, 1)
    assert out.is_contiguous()


def test_narrow_heads_with_scores_too_far_apart_for_powers_of_two():
    # differences of scores of up to 4,000: all but the largest weights underflow to 0, and none overflows
    q, k, v = (x.detach().requires_grad_() for x in make_inputs((1, 2, 64, 48, 8), torch.float32, "packed"))
    scale = 1000.0
    out = attend(q, k, v, choice_of("cpu-narrow", 8), scale=scale)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weights = torch.softmax(torch.einsum("bmhk,bnhk->bhmn", exact[0], exact[1]) * scale, dim=-1)
    expected = torch.einsum("bhmn,bnhk->bmhk", weights, exact[2])
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    gradient = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
        strict=True,
    ):
        assert torch.isfinite(got).all()
        # where one weight is 1, a gradient is the difference of two equal sums of 8 products, times the scale
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=scale * 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_narrow_heads_are_computed_that_way(dtype):
    cases = (Case(8), Case(16))
    on_a_cpu = choose_attention(CPU, dtype, cases).verdicts
    assert [on_a_cpu[case].backend for case in cases] == ["cpu-narrow", "cpu-flash"]
    on_a_gpu = choose_attention(torch.device("meta"), dtype, cases).verdicts
    assert on_a_gpu[cases[0]].backend == on_a_gpu[cases[1]].backend in CUDA_BACKENDS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences(dtype):
    check("cpu-flash", LONG, dtype, "packed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LONG, (2, 5, 4096, 77, 64)])
def test_every_backend_that_passes_its_probe_is_softmax_attention(backend, dtype, shape):
    device = torch.device("cuda")
    case = Case(shape[4], shape[1], shape[2], shape[3])
    from safelight.kernels.unet import attention_probe

    reason = attention_probe.probe(backend, attention_probe.make_inputs(case, shape[0], device, dtype), False)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    for layout in ("contiguous", "packed", "mixed"):
        check(backend, shape, dtype, layout, device)


def test_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in make_inputs((1, 2, 3, 4, 5), torch.float32, "contiguous")]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, choice_of("cpu-flash", 5)), inputs)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "packed", "mixed"])
@pytest.mark.parametrize("tokens", [(9, 9), (9, 7)])
def test_nothing_is_copied(layout, tokens):
    """One operator forward, one backward, otherwise views; autograd saves the inputs themselves."""
    inputs, saved = make_inputs((2, 3, *tokens, 40), torch.bfloat16, layout), []
    with Operators() as seen, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attend(*inputs, choice_of("cpu-flash", 40))
        forward = list(seen.names)
        torch.autograd.grad(out, inputs, torch.ones_like(out.detach()))
    assert [name for name in forward if name != "transpose"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert not {"clone", "copy_", "contiguous", "_to_copy"} & set(seen.names)
    assert seen.names.count("_scaled_dot_product_flash_attention_for_cpu_backward") == 1
    saved_at = {x.data_ptr() for x in saved}
    assert {x.data_ptr() for x in (*inputs, out)} <= saved_at


def saved_bytes(function, inputs) -> int:
    """Return the bytes that autograd saves, each tensor once; of views into packed inputs only their own elements."""
    kept = {}

    def pack(x):
        kept[x.data_ptr() if not x.is_meta else id(x)] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors_save_what_the_cpu_saves(dtype):
    shape = (2, 3, 33, 77, 40)
    inputs = make_inputs(shape, dtype, "contiguous")
    on_meta = [x.detach().to("meta").requires_grad_() for x in inputs]
    choice = choice_of("cpu-flash", 40)
    real, traced = (saved_bytes(lambda *x: attend(*x, choice), x) for x in (inputs, on_meta))
    assert real == traced
    # q, k, v, the output, and the log-sum-exp in fp32
    assert real == 2 * 3 * 40 * (2 * 33 + 2 * 77) * dtype.itemsize + 2 * 3 * 33 * 4


@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn", "xformers-flash", "xformers-cutlass"])
def test_meta_tensors_save_what_a_gpu_would_save(backend):
    """And not the attention matrix, which plain SDPA saves on meta tensors."""
    q, k, v = (torch.empty(2, n, 3, 40, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (96, 77, 77))
    saved = saved_bytes(lambda *x: attend(*x, choice_of(backend, 40)), (q, k, v))
    expected = 2 * 2 * 3 * 40 * (2 * 96 + 2 * 77) + 4 * 2 * 3 * 96
    # plus the state of an unused random generator
    assert expected <= saved <= expected + 32
    plain = saved_bytes(
        lambda q, k, v: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))), (q, k, v)
    )
    assert plain > saved + 2 * 2 * 3 * 96 * 77
    out = attend(q, k, v, choice_of(backend, 40))
    assert out.is_contiguous()
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_flops_are_counted():
    inputs = make_inputs((2, 3, 16, 24, 40), torch.float32, "contiguous")
    with FlopCounterMode(display=False) as counter:
        out = attend(*inputs, choice_of("cpu-flash", 40))
        forward = counter.get_total_flops()
        out.sum().backward()
    matmul = 2 * 2 * 3 * 16 * 24 * 40
    # two matmuls; backward recomputes the scores and needs four more
    assert forward == 2 * matmul
    assert counter.get_total_flops() == 7 * matmul


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointing_gives_the_same_gradients(kind):
    inputs = make_inputs((2, 2, 9, 7, 8), torch.float32, "contiguous")
    choice = choice_of("cpu-flash", 8)

    def policy(context, operator, *args, **kwargs):
        is_kept = operator in attention_operators()
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return (attend(q.exp(), k.exp(), v, choice) * 2).tanh()

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if kind == "selective" else {}
    plain = results(block, inputs, torch.ones(inputs[0].shape))
    with Operators() as seen:
        again = results(
            lambda *x: checkpoint(block, *x, use_reentrant=False, **options), inputs, torch.ones(inputs[0].shape)
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    runs = seen.names.count("_scaled_dot_product_flash_attention_for_cpu")
    assert runs == (1 if kind == "selective" else 2)
    assert seen.names.count("exp") == 4


def test_torch_compile_traces_it_without_graph_breaks():
    inputs = make_inputs((1, 2, 9, 7, 8), torch.float32, "contiguous")
    choice = choice_of("cpu-flash", 8)
    compiled = torch.compile(lambda *x: attend(*x, choice), fullgraph=True, backend="aot_eager")
    a = results(compiled, inputs, torch.ones(inputs[0].shape))
    b = results(lambda *x: attend(*x, choice), inputs, torch.ones(inputs[0].shape))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_case_of_the_same_kind_nearest_in_length_decides():
    cases = {
        Case(64, 5, 4096, 4096): Verdict("flash", {}),
        Case(64, 5, 4096, 77): Verdict("efficient", {}),
        Case(64, 5, 64, 64): Verdict("cudnn", {}),
    }
    choice = AttentionChoice("test", "any", cases)
    assert choice.backend(64, 4032, 4032) == "flash"
    assert choice.backend(64, 100, 100) == "cudnn"
    assert choice.backend(64, 64, 154) == "efficient"
    with pytest.raises(ValueError, match="chosen for head dim 64, not 40"):
        choice.backend(40, 64, 64)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def test_attention_cases_are_the_shapes_that_a_unet_runs(unet):
    seen = set()
    for module in attention_modules(unet):

        def look(module, args, kwargs):
            keys = kwargs.get("encoder_hidden_states")
            keys = args[0] if keys is None else keys
            seen.add(Case(head_dim_of(module), module.heads, args[0].shape[1], keys.shape[1]))

        module.register_forward_pre_hook(look, with_kwargs=True)
    for latents in ((8, 8), (6, 10), (7, 9)):
        seen.clear()
        with torch.no_grad():
            unet(torch.randn(1, 4, *latents), torch.tensor([1]), torch.randn(1, 77, 16))
        assert seen == attention_cases(unet, latents)
    assert attention_cases(unet) == attention_cases(unet, (8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processor_has_diffusers_bits(unet, dtype):
    unet = unet.to(dtype)
    inputs = (torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([3, 700]), torch.randn(2, 77, 16, dtype=dtype))
    results_of = []
    for use_ours in (False, True):
        if use_ours:
            assert apply_attention(unet, choose_attention(CPU, dtype, attention_cases(unet), setting="sdpa")) == []
            assert all(isinstance(m.processor, AttendProcessor) for m in attention_modules(unet))
        unet.zero_grad()
        out = unet(*inputs).sample
        out.float().square().mean().backward()
        results_of.append([out.detach(), *(p.grad.clone() for p in unet.parameters() if p.grad is not None)])
    assert len(results_of[0]) == len(results_of[1]) > 50
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(*results_of))


def test_attention_with_norms_keeps_its_processor_and_masks_are_refused(unet):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = Attention(8, heads=2, dim_head=4, norm_num_groups=2)
            self.rescaled = Attention(8, heads=2, dim_head=4, rescale_output_factor=2.0, residual_connection=True)

    holder = Holder()
    x = torch.randn(1, 3, 8)
    before = holder.rescaled(x)
    assert apply_attention(holder, choice_of("cpu-flash", 4)) == ["normed"]
    assert isinstance(holder.normed.processor, AttnProcessor2_0)
    assert torch.equal(holder.rescaled(x), before)
    with pytest.raises(ValueError, match="with a mask"):
        holder.rescaled(x, attention_mask=torch.zeros(1, 3))
