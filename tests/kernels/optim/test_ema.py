"""The moving average of many tensors in one launch or two, against its formula."""

import pytest
import torch

from safelight.kernels.optim.ema import CHUNK, EMA
from safelight.kernels.optim.split_weights import join, split_nearest
from safelight.kernels.triton.jit import record_launches

SHAPES = [(1,), (5, 3), (CHUNK,), (CHUNK + 1,), (3, CHUNK), (16, 8, 3, 3), (0,)]


def tensors(dtype, device, shapes=SHAPES, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.999, 0.5, 0.0])
def test_update_moves_averages_and_leaves_weights(device, dtype, decay):
    weights, averages = tensors(dtype, device), tensors(torch.float32, device, seed=10)
    # channels-last pairs are averaged in their own memory order
    weights[5], averages[5] = (x.to(memory_format=torch.channels_last) for x in (weights[5], averages[5]))
    before, kept = [a.clone() for a in averages], [w.clone() for w in weights]
    ema = EMA(averages, weights)
    ema.update(torch.tensor(decay, device=device))
    for average, old, weight in zip(averages, before, kept, strict=True):
        exact = old.double() + (1 - decay) * (weight.double() - old.double())
        torch.testing.assert_close(average.double(), exact, rtol=3e-7, atol=3e-7)
    assert all(torch.equal(w, k) for w, k in zip(weights, kept, strict=True))
    if decay == 0.5:
        ema.update(torch.tensor(1.0, device=device))
        again = [a.clone() for a in averages]
        ema.update(torch.tensor(1.0, device=device))
        assert all(torch.equal(a, b) for a, b in zip(averages, again, strict=True))


@pytest.mark.parametrize("memory", ["exact", "near"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_with_remainders_are_averaged_as_their_fp32_values(device, dtype, memory):
    values, averages = tensors(torch.float32, device), tensors(torch.float32, device, seed=10)
    values[5], averages[5] = (x.to(memory_format=torch.channels_last) for x in (values[5], averages[5]))
    pairs = [split_nearest(x, dtype, memory) for x in values]
    weights, remainders = (list(x) for x in zip(*pairs, strict=True))
    wholes, before = [join(*pair) for pair in pairs], [a.clone() for a in averages]
    # the remainders matter: without them the test would fail
    assert max((w - h.float()).abs().max() for w, h in zip(wholes, weights, strict=True) if w.numel()) > 1e-4
    EMA(averages, weights, remainders).update(torch.tensor(0.5, device=device))
    for average, old, whole in zip(averages, before, wholes, strict=True):
        exact = old.double() + 0.5 * (whole.double() - old.double())
        torch.testing.assert_close(average.double(), exact, rtol=3e-7, atol=3e-7)


def test_tensors_that_are_not_aligned_have_a_launch_of_their_own():
    def launches(weight, average):
        with record_launches() as recorded:
            EMA([torch.empty(64, device="meta"), average], [torch.empty(64, device="meta"), weight]).update(
                torch.empty((), device="meta")
            )
        return [(launch.grid, launch.arguments["ALIGNED"]) for launch in recorded]

    whole, shifted, short = (torch.empty(n, device="meta") for n in (32, 33, 31))
    assert launches(whole, whole) == [((2,), True)]
    # 4 bytes past a multiple of 16, and a number of elements that is no multiple
    for weight, average in ((shifted[1:], whole), (whole, shifted[1:]), (short, short)):
        assert launches(weight, average) == [((1,), True), ((1,), False)]


def test_a_view_at_an_odd_address_is_averaged(device):
    weight, average = (torch.randn(65, generator=torch.Generator().manual_seed(3)).to(device)[1:] for _ in range(2))
    before = average.mul_(3).clone()
    EMA([average], [weight]).update(torch.tensor(0.5, device=device))
    torch.testing.assert_close(average, 0.5 * (before + weight))


def test_a_remainder_of_another_memory_order_or_dtype_is_refused():
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    for remainder in (torch.ones(4, 3, dtype=torch.int8).t(), torch.ones(3, 4)):
        with pytest.raises(ValueError, match="a remainder must be int16 or int8"):
            EMA([torch.ones(3, 4)], [weight], [remainder])


def test_the_reference_runs_on_the_cpu():
    weights, averages = tensors(torch.float32, "cpu"), tensors(torch.float32, "cpu", seed=10)
    expected = [torch.lerp(a, w, 0.1) for a, w in zip(averages, weights, strict=True)]
    EMA(averages, weights).update(torch.tensor(0.9))
    for a, b in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("average", "weight", "message"),
    [
        (torch.ones(3).half(), torch.ones(3), "must be float32 of its shape"),
        (torch.ones(4), torch.ones(3), "must be float32 of its shape"),
        (torch.ones(3, 4), torch.ones(4, 3).t(), "strides"),
        (torch.ones(8)[::2], torch.ones(8)[::2], "leave gaps"),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), "float32, float16 or bfloat16"),
    ],
)
def test_averages_that_do_not_match_their_weights_are_refused(average, weight, message):
    with pytest.raises(ValueError, match=message):
        EMA([average], [weight])
