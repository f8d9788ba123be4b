"""AdamW8bit's state in checkpoints: exact in every memory order; converted between memory modes, or refused."""

import pytest
import torch

from safelight.errors import UserError
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.adamw8bit_state import load_state, load_value, state_of
from safelight.kernels.optim.blockwise_4bit import dequantize_4bit
from safelight.kernels.optim.blockwise_8bit import in_memory_order

MODES = ["fp32", "exact", "near", "rounded"]


def make(
    memory: str, dtype=torch.bfloat16, channels_last: bool = False, seed: int = 1, moments: str = "8bit"
) -> AdamW8bit:
    generator = torch.Generator().manual_seed(seed)
    values = [0.03 * torch.randn(shape, generator=generator) for shape in ((60,), (32, 16, 3, 3))]
    if channels_last:
        values[1] = values[1].to(memory_format=torch.channels_last)
    optimizer = AdamW8bit([v.to(dtype) for v in values], memory=memory, seed=9, moments=moments)
    for index, value in enumerate(values):
        optimizer.assign(index, value)
    return optimizer


def steps(optimizer: AdamW8bit, first: int, num: int) -> None:
    for step in range(first, first + num):
        generator = torch.Generator().manual_seed(100 + step)
        optimizer.step(
            [torch.randn(p.shape, generator=generator).to(p.dtype) for p in optimizer.parameters], 1e-4, 0.01
        )


def transfer(source: AdamW8bit, target: AdamW8bit) -> AdamW8bit:
    for index, p in enumerate(source.parameters):
        state = {name: x.contiguous() for name, x in state_of(source, index).items()}
        load_value(target, index, p.contiguous(), state)
        load_state(target, index, state)
    return target


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("moments", ["8bit", "4bit"])
@pytest.mark.parametrize("memory", MODES)
def test_resuming_from_a_state_equals_not_stopping(memory, moments, channels_last):
    straight = make(memory, channels_last=channels_last, moments=moments)
    steps(straight, 0, 6)
    stopped = make(memory, channels_last=channels_last, moments=moments)
    steps(stopped, 0, 3)
    resumed = transfer(stopped, make(memory, channels_last=channels_last, seed=2, moments=moments))
    steps(resumed, 3, 3)
    for index in range(2):
        for name, x in state_of(straight, index).items():
            assert x.is_contiguous()
            assert torch.equal(x, state_of(resumed, index)[name]), name
        assert torch.equal(straight.value(index), resumed.value(index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("other", MODES)
def test_another_mode_loads_the_value_exactly_or_refuses(memory, other, dtype):
    source, target = make(memory, dtype), make(other, dtype, seed=2)
    steps(source, 0, 2)
    exact = MODES.index(other) <= MODES.index(memory) or (
        dtype == torch.bfloat16 and {memory, other} == {"fp32", "exact"}
    )
    if not exact:
        with pytest.raises(
            ValueError, match=f"optimizer.memory {memory}, which {other} cannot hold without loss; use {memory}"
        ):
            transfer(source, target)
        return
    transfer(source, target)
    for index in range(2):
        value = source.value(index)
        assert torch.equal(target.value(index), value)
        # a value halfway between two fp16 weights may be rounded to either
        errors = [(optimizer.parameters[index].float() - value).abs() for optimizer in (source, target)]
        assert torch.equal(*errors)


def test_states_of_another_memory_order_are_requantized():
    source = make("exact", channels_last=True)
    steps(source, 0, 2)
    target = transfer(source, make("exact"))
    assert torch.equal(target.value(1), source.value(1).contiguous())
    there, here = state_of(source, 1), state_of(target, 1)
    assert "strides" in there
    assert "strides" not in here
    assert not torch.equal(there["absmax1"], here["absmax1"])
    back = transfer(target, make("exact", channels_last=True))
    # values are on the grid already and block maxima are unchanged, so converting back loses little
    assert (state_of(back, 1)["state1"].int() - there["state1"].int()).abs().max() <= 12


@pytest.mark.parametrize(("moments", "other"), [("8bit", "4bit"), ("4bit", "8bit")])
def test_moments_of_the_other_kind_are_refused_and_change_nothing(moments, other):
    source, target = make("exact", moments=moments), make("exact", moments=other)
    steps(source, 0, 1), steps(target, 1, 2)
    before = state_of(target, 1)
    with pytest.raises(UserError, match=f"use optimizer.moments {moments}"):
        load_state(target, 1, state_of(source, 1))
    assert all(torch.equal(x, before[name]) for name, x in state_of(target, 1).items())


def test_4_bit_states_of_another_memory_order_are_requantized():
    source = make("exact", channels_last=True, moments="4bit")
    steps(source, 0, 3)
    target = transfer(source, make("exact", moments="4bit"))
    moments = []
    for optimizer in (source, target):
        parts = optimizer.moments[1].parts()
        values = dequantize_4bit(in_memory_order(parts["packed"]), parts["absmax1"], parts["absmax2"].square())
        moments.append([])
        for flat in values:
            whole = torch.empty_like(optimizer.parameters[1], dtype=torch.float32)
            in_memory_order(whole).copy_(flat)
            moments[-1].append(whole.contiguous())
    # half of the widest gap: between -0.2125 and -0.4375 for m, and 1/16 for the root of v, each of the block's largest
    for before, after, gap in zip(*moments, (0.225, 1 / 16), strict=True):
        is_root = gap == 1 / 16
        before, after = (x.sqrt() if is_root else x for x in (before, after))
        assert (before - after).abs().max() <= 1.001 * gap / 2 * before.abs().max()
        assert before.abs().max() > 0


def test_states_of_another_shape_or_dtype_are_refused_and_change_nothing():
    optimizer = make("exact")
    steps(optimizer, 0, 1)
    state = state_of(optimizer, 1)
    before = {name: x.clone() for name, x in state_of(optimizer, 1).items()}
    for bad, message in (
        ({"state2": state["state2"][:5]}, r"state2 is \(5, 16, 3, 3\) torch.uint8, its weight \(32, 16, 3, 3\)"),
        ({"state1": state["state1"].float()}, "state1 is .* torch.float32"),
        ({"absmax2": state["absmax2"][:-1]}, r"absmax2 has shape \(17,\); this weight has \(18,\) blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_state(optimizer, 1, {**state, **bad})
        assert all(torch.equal(x, before[name]) for name, x in state_of(optimizer, 1).items())
    with pytest.raises(ValueError, match=r"the remainder has shape \(5, 16, 3, 3\), its weight"):
        load_value(optimizer, 1, optimizer.parameters[1], {"remainder": state["remainder"][:5]})


@pytest.mark.parametrize("memory", MODES)
def test_a_step_does_not_synchronize_with_the_device(memory):
    """Reading a number from a meta tensor would raise."""
    from safelight.kernels.triton.jit import record_launches

    parameters = [
        torch.empty(64, 64, device="meta", dtype=torch.bfloat16),
        torch.empty(9, device="meta", dtype=torch.bfloat16),
    ]
    optimizer = AdamW8bit(parameters, memory=memory, seed=3)
    scalar = torch.empty((), device="meta")
    with record_launches() as launches:
        optimizer.step([torch.empty_like(p) for p in parameters], scalar, scalar, scalar, scalar)
        optimizer.begin(1e-6)
        optimizer.update([torch.empty_like(parameters[1])], found_inf=torch.empty(1, device="meta"), members=[1])
        optimizer.end()
    # one launch for 8-bit and one for fp32 moments, whatever the number of tensors
    assert [launch.kernel.__name__ for launch in launches] == [
        "_adamw8bit_kernel",
        "_adamw32bit_kernel",
        "_adamw32bit_kernel",
    ]


def test_updating_tensors_separately_equals_updating_them_together():
    together, separate = make("near"), make("near")
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(p.shape, generator=generator).bfloat16() for p in together.parameters]
    together.step(grads, 1e-4, 0.01, 0.5)
    separate.begin(1e-4, 0.01)
    for index in (1, 0):
        separate.update([grads[index]], 0.5, members=[index])
    separate.end()
    for index in range(2):
        for name, x in state_of(together, index).items():
            assert torch.equal(x, state_of(separate, index)[name])
