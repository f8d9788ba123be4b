"""Philox: published vectors, equal bits in numpy and torch, and the statistics of the draws."""

import functools

import numpy as np
import pytest
import torch
from scipy import stats

from safelight.kernels import philox
from safelight.kernels.philox import (
    Key,
    Purpose,
    integers,
    normals,
    normals_torch,
    philox_numpy,
    philox_torch,
    sort_key,
    uniforms,
    words,
)

# known-answer vectors of Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
NUM = 2_000_000


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    assert tuple(int(w) for w in philox_numpy(counter, key)) == expected
    in_torch = philox_torch(tuple(torch.tensor(c, dtype=torch.int64) for c in counter), key)
    assert tuple(int(w) for w in in_torch) == expected


def test_key_layout_is_the_documented_one():
    """The layout is a contract: old runs must stay reproducible."""
    key = Key(
        seed=0x1122334455667788, purpose=Purpose.NOISE, sample_id=0xAABBCCDDEEFF11, epoch=0x1234, occurrence=0x5678
    )
    assert key.words() == (0x55667788, 0x11223344, 0xDDEEFF11, 0xAABBCC01, 0x12345678)
    expected = philox_numpy((1, 0xDDEEFF11, 0xAABBCC01, 0x12345678), (0x55667788, 0x11223344))
    assert words(key, 8)[4:].tolist() == [int(w) for w in expected]
    assert {p.name: int(p) for p in Purpose} == {
        "NOISE": 1,
        "TIMESTEP": 2,
        "POSTERIOR": 3,
        "CAPTION_DROPOUT": 4,
        "CAPTION_CHOICE": 5,
        "VARIANT": 6,
        "EPOCH_ORDER": 7,
        "CROP": 8,
        "FLIP": 9,
        "SPLIT": 10,
        "VALIDATION_NOISE": 11,
        "VALIDATION_TIMESTEP": 12,
        "SAMPLE_NOISE": 13,
        "OFFSET_NOISE": 14,
        "INITIAL_WEIGHTS": 15,
        "SCENE": 16,
        "BATCH_ORDER": 17,
        "ROUNDING": 18,
        "REPEAT": 19,
        "TAG_ORDER": 20,
        "TABLE_SAMPLE": 21,
        "CAPTION_TOKEN": 22,
        "PREVIEW": 23,
        "PYRAMID_NOISE": 24,
        "PYRAMID_SCALE": 25,
        "INPUT_NOISE": 26,
        "SAMPLE_STEP_NOISE": 27,
    }


@pytest.mark.parametrize(
    "bad", [{"seed": 1 << 64}, {"seed": -1}, {"sample_id": 1 << 56}, {"epoch": 1 << 16}, {"occurrence": 1 << 16}]
)
def test_a_field_that_does_not_fit_is_refused(bad):
    key = Key(**{"seed": 1, "purpose": Purpose.NOISE, **bad})
    with pytest.raises(ValueError, match="does not fit"):
        key.words()


def by_torch(keys, shape):
    """Return `normals_torch` as it is computed on a GPU."""
    return philox._normals_on(torch.device("cpu"), keys, shape, first_block=0)


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 5, 7), (2, 64, 64)])
def test_numpy_and_torch_normals_are_equal_bit_for_bit(shape):
    # each row has its own seed
    keys = [Key(7 + (i << 31), Purpose.NOISE, i * 977, i, 3) for i in range(5)]
    for rows in (normals_torch(keys, shape), by_torch(keys, shape)):
        for key, row in zip(keys, rows, strict=True):
            assert np.array_equal(normals(key, shape).view(np.int32), row.numpy().view(np.int32))


def test_a_million_normals_are_equal_bit_for_bit():
    key = Key(123456789, Purpose.POSTERIOR, 2**56 - 3, 2)
    numbers = normals(key, (1_000_001,))
    assert np.array_equal(numbers, normals_torch([key], (1_000_001,))[0].numpy())
    assert np.array_equal(numbers, by_torch([key], (1_000_001,))[0].numpy())


def test_normals_are_close_to_double_precision_box_muller():
    key = Key(11, Purpose.NOISE, 5)
    w = words(key, 400_000).astype(np.float64)
    # the word is rounded to fp32 first, which is part of the definition
    first, second = (w[0::2].astype(np.int64) | 1).astype(np.float32).astype(np.float64), w[1::2]
    radius = np.sqrt(-2 * np.log(first / 2.0**32))
    # each quarter turn is centred on zero
    quadrant, rest = np.divmod(second, 2.0**30)
    angle = quadrant * np.pi / 2 + (rest - 2.0**29) * (np.pi / 2 / 2**30)
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)
    assert np.abs(normals(key, (400_000,)) - exact).max() < 1e-6


@functools.cache
def two_million_normals() -> np.ndarray:
    return normals(Key(1, Purpose.NOISE, 99), (NUM,)).astype(np.float64)


def test_moments():
    z = two_million_normals()
    # standard errors of the first four moments of N normals: 1, sqrt 2, sqrt 6 (of skewness), sqrt 24 (of kurtosis)
    assert abs(z.mean()) < 4 / NUM**0.5
    assert abs(z.var() - 1) < 4 * (2 / NUM) ** 0.5
    assert abs(stats.skew(z)) < 4 * (6 / NUM) ** 0.5
    assert abs(stats.kurtosis(z)) < 4 * (24 / NUM) ** 0.5
    assert stats.kstest(z[:500_000], "norm").pvalue > 1e-3


def test_tails():
    """Counts beyond +-sigma are Poisson; beyond 5 sigma, 8 million draws have an expected 4.6."""
    num = 8_000_000
    sizes = np.abs(normals(Key(3, Purpose.NOISE, 4), (num,)))
    for sigma in (1, 2, 3, 4, 5):
        low, high = stats.poisson.interval(0.9999, 2 * stats.norm.sf(sigma) * num)
        assert low <= int((sizes > sigma).sum()) <= high, sigma


@pytest.mark.parametrize(
    "other",
    [
        Key(6, Purpose.NOISE, 10, 1, 0),
        Key(5, Purpose.POSTERIOR, 10, 1, 0),
        Key(5, Purpose.NOISE, 11, 1, 0),
        Key(5, Purpose.NOISE, 10 + (1 << 40), 1, 0),
        Key(5, Purpose.NOISE, 10, 2, 0),
        Key(5, Purpose.NOISE, 10, 1, 1),
    ],
)
def test_keys_that_differ_in_one_field_are_independent(other):
    num = 200_000
    a, b = normals(Key(5, Purpose.NOISE, 10, 1, 0), (num,)), normals(other, (num,))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / num**0.5
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 4 / num**0.5
    assert not np.intersect1d(words(Key(5, Purpose.NOISE, 10, 1, 0), 256), words(other, 256)).size


def test_neighbours_within_a_key_are_independent():
    z = two_million_normals()
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(z[:-lag], z[lag:])[0, 1]) < 4 / NUM**0.5
        assert abs(np.corrcoef(z[:-lag] ** 2, z[lag:] ** 2)[0, 1]) < 4 / NUM**0.5


def test_first_draws_over_sample_ids_are_uniform():
    """An epoch's timesteps are first draws of many keys, so they must be uniform across keys, not only within one."""
    draws = np.array([integers(Key(2, Purpose.TIMESTEP, i), 1000)[0] for i in range(20_000)])
    assert draws.min() >= 0
    assert draws.max() <= 999
    assert stats.chisquare(np.bincount(draws // 10, minlength=100)).pvalue > 1e-4


def test_uniforms_fill_the_open_interval():
    u = uniforms(Key(4, Purpose.FLIP), 1_000_000)
    assert 0 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_sort_keys_shuffle_fairly():
    """Over many epochs, each of four items comes first about a quarter of the time."""
    firsts = [min(range(4), key=lambda i: sort_key(Key(9, Purpose.EPOCH_ORDER, i, e))) for e in range(4000)]
    assert stats.chisquare(np.bincount(firsts, minlength=4)).pvalue > 1e-3


@pytest.mark.parametrize("bound", [0, -3, (1 << 31) + 1])
def test_bad_bounds_are_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        integers(Key(1, Purpose.TIMESTEP), bound)


def test_an_empty_list_of_keys_is_refused():
    with pytest.raises(ValueError, match="at least one key"):
        normals_torch([], (4,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_normals_equal_the_cpu_bit_for_bit():
    keys = [Key(7, Purpose.NOISE, i) for i in range(3)]
    assert torch.equal(normals_torch(keys, (4, 64, 64)), normals_torch(keys, (4, 64, 64), "cuda").cpu())
