"""AdamW8bit against bitsandbytes' CPU implementation, against fp64, and kernel against reference."""

import functools

import pytest
import torch

from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.adamw8bit_state import load_state, state_of
from safelight.kernels.optim.blockwise_8bit import dequantize, dynamic_map, in_memory_order
from tests.kernels.ptx_emulator import emulate

bitsandbytes = pytest.importorskip("bitsandbytes")

LR, DECAY = 1e-3, 0.1
# one program and several with fp32 moments; exactly 4,096 elements; a last block of one element; a convolution weight
SHAPES = [(7,), (1030,), (64, 64), (4097,), (32, 16, 3, 3)]


def tensors(device, seed, scale=1.0, channels_last=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
    if channels_last:
        drawn[-1] = drawn[-1].to(memory_format=torch.channels_last)
    return [x.to(device) for x in drawn]


def gradients(device, step):
    """Gradients whose elements' magnitudes span six decades, as real ones do."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (x * 10 ** (6 * torch.rand(x.shape, generator=generator) - 6).to(device)) for x in tensors(device, 50 + step)
    ]


def bitsandbytes_adamw(weights):
    """Return (Parameters, bitsandbytes' optimizer over them)."""
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    return parameters, bitsandbytes.optim.AdamW8bit(parameters, lr=LR, weight_decay=DECAY)


def values(state, number):
    """Return a state's moments as fp32 values, flat, whether stored as codes or not."""
    codes = state[f"state{number}"].reshape(-1)
    if codes.dtype != torch.uint8:
        return codes
    return dequantize(codes, state[f"absmax{number}"], number == 1)


def test_weights_follow_bitsandbytes_from_one_state_to_the_next(device):
    """Load bitsandbytes' state before every step; after the step the weights agree to within float error."""
    weights = tensors(device, 0)
    optimizer = AdamW8bit(weights)
    parameters, other = bitsandbytes_adamw(tensors("cpu", 0))
    for step in range(3):
        for index, p in enumerate(parameters):
            weights[index].copy_(p.detach())
            if step:
                load_state(optimizer, index, other.state[p])
                for name, value in state_of(optimizer, index).items():
                    assert torch.equal(value.cpu(), torch.as_tensor(other.state[p][name])), name
        grads = gradients("cpu", step)
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        other.step()
        optimizer.step([g.to(device) for g in grads], LR, DECAY)
        for index, p in enumerate(parameters):
            # a step moves a weight by up to lr = 1e-3
            torch.testing.assert_close(weights[index].cpu(), p.detach(), rtol=3e-7, atol=2e-8)
            ours, state = state_of(optimizer, index), other.state[p]
            assert ours["step"] == state["step"] == step + 1
            for number in (1, 2):
                if f"absmax{number}" in ours:
                    torch.testing.assert_close(
                        ours[f"absmax{number}"].cpu(), state[f"absmax{number}"], rtol=1e-6, atol=0
                    )
                # bitsandbytes' CPU look-up table gives a few values a neighbour of the nearest code
                mine, yours = (
                    values({k: v if k == "step" else v.cpu() for k, v in ours.items()}, number),
                    values(state, number),
                )
                assert (mine - yours).abs().max() <= 0.015 * yours.abs().max()


MODES = [
    (torch.float32, "fp32"),
    *((dtype, memory) for dtype in (torch.bfloat16, torch.float16) for memory in ("fp32", "exact", "near", "rounded")),
]


def ends_of_three_steps(optimizer_of, device, dtype):
    """Return the states and values after three steps, with one tensor skipped in the second.

    The tensors: one element; several chunks of fp32 moments; several programs of 8-bit moments, whose last block has
    one element; whole blocks that do not fill the last program.
    """

    def chosen(x):
        return [x[0][:1], x[1], x[3], x[4]]

    grads, skip = chosen(gradients("cpu", 7)), torch.tensor([0, 1, 0, 0])
    optimizer = optimizer_of([w.to(dtype) for w in chosen(tensors(device, 2))])
    for step in range(3):
        g = [(1 if step else 3) * x.to(device, dtype) for x in grads]
        optimizer.step(g, LR, DECAY, 0.5, skip.to(device) if step == 1 else None)
    states = [state_of(optimizer, i) | {"value": optimizer.value(i)} for i in range(4)]
    assert [int(state["step"]) for state in states] == [3, 2, 3, 3]
    return [{name: x.cpu() for name, x in state.items()} for state in states]


def assert_equal_bits(ends, expected):
    for ours, theirs in zip(ends, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            # compare bits, since -0 == 0
            a, b = (y.view(torch.int32) if y.dtype == torch.float32 else y for y in (x, theirs[name]))
            assert torch.equal(a, b), name


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
@pytest.mark.parametrize(("dtype", "memory"), MODES)
def test_the_kernel_equals_the_reference_bit_for_bit(device, monkeypatch, dtype, memory, moments):
    ends = []
    for is_kernel in (True, False):
        monkeypatch.setattr("safelight.kernels.optim.adamw8bit.runs_kernel", lambda x, yes=is_kernel: yes)
        # the reference's bits are those of the CPU
        where = device if is_kernel else torch.device("cpu")
        made = functools.partial(AdamW8bit, memory=memory, seed=(5 << 32) + 77, moments=moments)
        ends.append(ends_of_three_steps(made, where, dtype))
    assert_equal_bits(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["8bit", "4bit"])
@pytest.mark.parametrize("target", [75, 86, 90])
@pytest.mark.parametrize(("dtype", "memory"), MODES)
def test_the_compiled_kernel_equals_the_reference_bit_for_bit(monkeypatch, dtype, memory, target, moments):
    """In an emulator, which runs the PTX that a GPU of that compute capability would get."""
    if dtype == torch.bfloat16 and target == 75:
        pytest.skip("sm_75 has no bf16 instructions")
    ends = []
    for is_kernel in (True, False):
        monkeypatch.setattr("safelight.kernels.optim.adamw8bit.runs_kernel", lambda x, yes=is_kernel: yes)
        with monkeypatch.context() as patch:
            patch.setattr(
                "safelight.kernels.triton.jit.Kernel._launch",
                lambda kernel, grid, *arguments, **options: emulate(kernel, grid, target, *arguments, **options),
            )
            made = functools.partial(AdamW8bit, memory=memory, seed=(5 << 32) + 77, moments=moments)
            ends.append(ends_of_three_steps(made, "cpu", dtype))
    assert_equal_bits(*ends)


def test_float32_moments_follow_fp64(device):
    """Twenty steps of a small tensor against the formula in fp64; weight decay must not be rounded away at lr 1e-6."""
    weight = torch.ones(100, device=device)
    optimizer = AdamW8bit([weight])
    w, m, v = torch.ones(100, dtype=torch.float64), 0.0, 0.0
    for step in range(1, 21):
        g = torch.randn(100, generator=torch.Generator().manual_seed(step), dtype=torch.float64).float()
        optimizer.step([g.to(device)], 1e-6, 0.01)
        g = g.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 1e-6 * (m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + 0.01 * w)
    # twenty roundings of a number near 1
    torch.testing.assert_close(weight.cpu().double(), w, rtol=0, atol=20 * 6e-8)
    torch.testing.assert_close(optimizer.moments[0].state1.cpu().double(), m, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.moments[0].state2.cpu().double(), v, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_a_step_with_found_inf_changes_nothing(device, first):
    weights = tensors(device, 3)
    optimizer = AdamW8bit(weights)
    if not first:
        optimizer.step(gradients(device, 1), LR, DECAY)
    before = [w.clone() for w in weights], [m.state1.clone() for m in optimizer.moments], optimizer.step_counts.tolist()
    bad = gradients(device, 2)
    bad[0][0], bad[-1][0, 0, 0, 0] = float("nan"), float("inf")
    optimizer.step(bad, LR, DECAY, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
    assert all(torch.equal(m.state1, b) for m, b in zip(optimizer.moments, before[1], strict=True))
    assert optimizer.step_counts.tolist() == before[2]
    optimizer.step(gradients(device, 3), LR, DECAY, found_inf=torch.zeros((), device=device))
    assert optimizer.step_counts.tolist() == [n + 1 for n in before[2]]
    assert all(torch.isfinite(w).all() for w in weights)


def test_gradient_scale_multiplies_the_gradients(device):
    one, two = tensors(device, 4), tensors(device, 4)
    grads = gradients(device, 5)
    AdamW8bit(one).step([g * 8 for g in grads], LR, DECAY, gradient_scale=torch.tensor(0.125, device=device))
    AdamW8bit(two).step(grads, torch.tensor(LR, device=device), torch.tensor(DECAY, device=device))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("num_elements", [4096 + 3, 4096 + 2048 - 1])
def test_memory_beyond_a_tensor_is_neither_used_nor_written(device, num_elements):
    """The last block is not full: its absmax must follow its own elements only."""
    memory = torch.full((num_elements + 300,), 3.0, device=device)
    weight = memory[:num_elements].zero_()
    optimizer = AdamW8bit([weight])
    g = torch.ones(num_elements, device=device)
    optimizer.step([g], LR)
    optimizer.step([-8 * g], LR)
    optimizer.step([8 * g], LR)
    # 0.9 (0.9 * 0.1 - 0.1 * 8) + 0.1 * 8 = 0.161; quantizing -0.71 between the steps costs up to 0.7 %
    absmax = optimizer.moments[0].absmax1
    assert 0.155 < float(absmax[0]) < 0.167
    assert (absmax == absmax[0]).all()
    assert (memory[num_elements:] == 3.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_may_be_16_bit_and_in_another_memory_order(device, dtype):
    one, two = tensors(device, 6, channels_last=True), tensors(device, 6, channels_last=True)
    grads = [g.to(dtype) for g in gradients(device, 6)]
    assert grads[-1].stride() != one[-1].stride()
    kept = [g.clone() for g in grads]
    AdamW8bit(one).step(grads, LR, DECAY)
    AdamW8bit(two).step([g.float() for g in grads], LR, DECAY)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_cudnns_gradient_of_a_1x1_kernel_is_not_copied(monkeypatch):
    """Its strides differ only in dimensions of size 1, so its memory order is the weight's."""
    weight, other = torch.zeros(96, 64, 1, 1), torch.zeros(96, 64, 1, 1)
    gradient = torch.randn(96, 64, 1, 1)
    as_cudnn = torch.empty_strided(weight.shape, (64, 1, 64, 64)).copy_(gradient)
    seen = []
    update = AdamW8bit._update_in_pytorch
    monkeypatch.setattr(
        AdamW8bit, "_update_in_pytorch", lambda self, i, g, *slot: (seen.append(g), update(self, i, g, *slot))
    )
    AdamW8bit([weight]).step([as_cudnn], LR)
    AdamW8bit([other]).step([gradient], LR)
    assert seen[0] is as_cudnn
    assert torch.equal(weight, other)
    assert weight.abs().max() > 0


def test_blocks_follow_memory_order(device):
    """A channels-last weight's codes and absmaxes equal those of its elements flattened in memory order."""
    weights = tensors(device, 7, channels_last=True)
    g = gradients(device, 8)
    optimizer, flat_weights = AdamW8bit(weights), [in_memory_order(w).clone() for w in weights]
    flat = AdamW8bit(flat_weights)
    optimizer.step(g, LR, DECAY)
    flat.step([in_memory_order(torch.empty_like(w).copy_(x)) for w, x in zip(weights, g, strict=True)], LR, DECAY)
    for m, n, w, f in zip(optimizer.moments, flat.moments, weights, flat_weights, strict=True):
        assert torch.equal(in_memory_order(m.state1), n.state1)
        assert torch.equal(in_memory_order(m.state2), n.state2)
        assert torch.equal(in_memory_order(w), f)


@pytest.mark.parametrize("number", [1, 2])
def test_channels_last_states_are_requantized_within_half_a_gap(number):
    """Into contiguous weights and back into channels-last ones: values are off by at most half the map's widest gap."""
    weights = tensors("cpu", 9, channels_last=True)
    optimizer = AdamW8bit(weights)
    for step in range(3):
        optimizer.step(gradients("cpu", step), LR, DECAY)
    p, m, code_map = weights[-1], optimizer.moments[-1], dynamic_map(number == 1)
    exact = torch.empty_like(p)
    codes, scales = getattr(m, f"state{number}"), getattr(m, f"absmax{number}")
    in_memory_order(exact).copy_(dequantize(in_memory_order(codes), scales, number == 1))
    gap = float((code_map[1:] - code_map[:-1]).max()) / 2
    contiguous = AdamW8bit([w.contiguous() for w in weights])
    load_state(contiguous, len(weights) - 1, state_of(optimizer, len(weights) - 1))
    state = state_of(contiguous, len(weights) - 1)
    assert state["state1"].is_contiguous()
    scale = state[f"absmax{number}"].repeat_interleave(256)[: p.numel()]
    out = values(state, number)
    assert ((out - exact.contiguous().view(-1)).abs() <= 1.0001 * gap * scale).all()
    other = AdamW8bit(tensors("cpu", 9, channels_last=True))
    load_state(other, len(weights) - 1, state)
    target = other.moments[-1]
    back = dequantize(
        in_memory_order(getattr(target, f"state{number}")), getattr(target, f"absmax{number}"), number == 1
    )
    scale = getattr(target, f"absmax{number}").repeat_interleave(256)[: p.numel()]
    expected = in_memory_order(torch.empty_like(p).copy_(out.view(p.shape)))
    assert ((back - expected).abs() <= 1.0001 * gap * scale).all()
    assert int(other.step_counts[-1]) == 3


def test_two_runs_are_equal_bit_for_bit(device):
    def run():
        weights = tensors(device, 10)[1:3]
        optimizer = AdamW8bit(weights)
        for step in range(2):
            optimizer.step(gradients(device, step)[1:3], LR, DECAY)
        return weights + [m.state1 for m in optimizer.moments] + [m.state2 for m in optimizer.moments]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_bad_arguments_are_refused():
    for bad in ([torch.ones(4).double()], [torch.ones(8)[::2]], [torch.ones(4), torch.ones(4).half()]):
        with pytest.raises(ValueError, match="dense float32, bfloat16 or float16 weights of one dtype"):
            AdamW8bit(bad)
    with pytest.raises(ValueError, match=r"'exact' does not fit torch\.float32 weights; use fp32"):
        AdamW8bit([torch.ones(4)], memory="exact")
    with pytest.raises(
        ValueError, match=r"'paged' does not fit torch\.float16 weights; use fp32, exact, near or rounded"
    ):
        AdamW8bit([torch.ones(4).half()], memory="paged")
    optimizer = AdamW8bit([torch.ones(4)])
    with pytest.raises(ValueError, match="2 gradients for 1 weights"):
        optimizer.step([torch.ones(4)] * 2, 1e-3)
    with pytest.raises(ValueError, match="a gradient has shape"):
        optimizer.step([torch.ones(5)], 1e-3)
    with pytest.raises(ValueError, match="its weight"):
        load_state(optimizer, 0, {"step": 1, "state1": torch.ones(5), "state2": torch.ones(5)})
