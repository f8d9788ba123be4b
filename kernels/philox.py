"""Philox4x32-10 and the key of every random draw in Safelight.

Every random draw is a pure function of its key, so what happens to a sample does not depend on batch size, order,
number of workers, device, or where a run was stopped and resumed. The key's layout never changes:

    key     k0, k1 = the run's seed, low and high 32 bits
    counter c0     = element block: block b holds elements 4b .. 4b+3
            c1     = sample id, low 32 bits
            c2     = sample id, next 24 bits << 8 | purpose (8 bits)
            c3     = epoch (16 bits) << 16 | occurrence within the epoch (16 bits)

A block's four 32-bit words become four standard normals by two Box-Muller pairs: words (0, 1) give elements (0, 1),
words (2, 3) give elements (2, 3). Logarithm, sine and cosine are polynomials, so everything is built from +, * and a
correctly rounded sqrt, each rounded separately. numpy, torch (CPU and CUDA) and Triton without fused multiply-add
therefore give equal bits, which their library functions do not.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405. The
polynomials are the single-precision minimax sets of Moshier's Cephes library (logf, sinf, cosf).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    # importing torch takes two seconds, and `safelight prepare` draws with numpy only
    import torch
    from torch import Tensor

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
NUM_ROUNDS = 10
MASK_32 = 0xFFFFFFFF
SAMPLE_ID_BITS = 56

LN2 = 0.693147180559945309
# ln(1 + f) = f - f^2/2 + f^3 * P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# on [-pi/4, pi/4], z = x^2: sin x = x + x z S(z);  cos x = 1 - z/2 + z^2 C(z)
SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SQRT_HALF_BITS = 0x3F3504F3  # the bits of fp32 sqrt(1/2)


class Purpose(IntEnum):
    """What a draw is for. A number is never reused or changed: old runs must stay reproducible."""

    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    CAPTION_DROPOUT = 4
    CAPTION_CHOICE = 5
    VARIANT = 6
    EPOCH_ORDER = 7
    CROP = 8
    FLIP = 9
    SPLIT = 10
    VALIDATION_NOISE = 11
    VALIDATION_TIMESTEP = 12
    SAMPLE_NOISE = 13
    OFFSET_NOISE = 14
    INITIAL_WEIGHTS = 15
    SCENE = 16
    BATCH_ORDER = 17
    ROUNDING = 18
    REPEAT = 19
    TAG_ORDER = 20
    TABLE_SAMPLE = 21
    CAPTION_TOKEN = 22
    PREVIEW = 23
    PYRAMID_NOISE = 24
    PYRAMID_SCALE = 25
    INPUT_NOISE = 26
    SAMPLE_STEP_NOISE = 27


class Key(NamedTuple):
    """The key of a draw, without the element block.

    seed: 64 bits; sample_id: 56 bits; epoch, occurrence: 16 bits each. `words` raises ValueError if one does not fit.
    """

    seed: int
    purpose: Purpose
    sample_id: int = 0
    epoch: int = 0
    occurrence: int = 0

    def words(self) -> tuple[int, int, int, int, int]:
        """Return (k0, k1, c1, c2, c3) as unsigned 32-bit integers. Raises ValueError if a part has too many bits."""
        for name, value, bits in (
            ("seed", self.seed, 64),
            ("purpose", self.purpose, 8),
            ("sample id", self.sample_id, SAMPLE_ID_BITS),
            ("epoch", self.epoch, 16),
            ("occurrence", self.occurrence, 16),
        ):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} {value} does not fit in {bits} bits; use 0 to {(1 << bits) - 1}")
        return (
            self.seed & MASK_32,
            self.seed >> 32,
            self.sample_id & MASK_32,
            (self.sample_id >> 32) << 8 | int(self.purpose),
            self.epoch << 16 | self.occurrence,
        )


def philox_numpy(
    counter: tuple[np.ndarray | int, ...], key: tuple[np.ndarray | int, np.ndarray | int]
) -> tuple[np.ndarray, ...]:
    """Return the four uint32 words of Philox4x32-10; words of counter and key broadcast against each other."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, dtype=np.uint64) for k in key)
    mask, shift = np.uint64(MASK_32), np.uint64(32)
    weyl_0, weyl_1 = np.uint64(WEYL_0), np.uint64(WEYL_1)
    for _ in range(NUM_ROUNDS):
        product_0 = c0 * np.uint64(MULTIPLIER_0)
        product_1 = c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> shift) ^ c1 ^ k0,
            product_1 & mask,
            (product_0 >> shift) ^ c3 ^ k1,
            product_0 & mask,
        )
        k0, k1 = (k0 + weyl_0) & mask, (k1 + weyl_1) & mask
    return tuple(np.broadcast_arrays(*(c.astype(np.uint32) for c in (c0, c1, c2, c3))))


def philox_torch(counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10 as int64 tensors in 0 .. 2^32-1.

    counter: four int64 tensors that broadcast with each other and with the key's two words. torch lacks unsigned
    arithmetic, so each 32 x 32 -> 64 bit product is taken in wrapping int64, which has the unsigned product's bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product_0 = c0 * MULTIPLIER_0
        product_1 = c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & MASK_32) ^ c1 ^ k0,
            product_1 & MASK_32,
            ((product_0 >> 32) & MASK_32) ^ c3 ^ k1,
            product_0 & MASK_32,
        )
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3


def words(key: Key, num: int) -> np.ndarray:
    """Return `num` independent random words of a key, (num,) uint32."""
    k0, k1, c1, c2, c3 = key.words()
    blocks = np.arange((num + 3) // 4, dtype=np.uint64)
    return np.stack(philox_numpy((blocks, c1, c2, c3), (k0, k1)), axis=-1).reshape(-1)[:num]


def uniforms(key: Key, num: int = 1) -> np.ndarray:
    """Return uniform numbers in (0, 1), (num,) float64, each from 32 random bits."""
    return (words(key, num).astype(np.float64) + 0.5) / 2.0**32


def integers(key: Key, bound: int, num: int = 1) -> np.ndarray:
    """Return uniform integers in 0 .. bound - 1, (num,) int64; their bias is at most bound / 2^32.

    Raises ValueError unless 1 <= bound <= 2^31.
    """
    if not 1 <= bound <= 1 << 31:
        raise ValueError(f"bound {bound} is outside 1 .. 2^31")
    return ((words(key, num).astype(np.uint64) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def sort_key(key: Key) -> int:
    """Return a random 64-bit integer. Sorting by it shuffles items as a pure function of their keys."""
    high, low = words(key, 2)
    return int(high) << 32 | int(low)


def _horner(coefficients: tuple[float, ...], x, constant):
    """Return the polynomial by Horner's rule, each product and sum rounded to fp32 separately."""
    total = constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + constant(coefficient)
    return total


def _log_uniform(word, xp):
    """Return ln u, u = (word | 1) / 2^32, fp32: u is never zero. xp: _Numpy or _Torch, below."""
    c = xp.constant
    bits = xp.bits(xp.to_float(word | 1))
    # split into 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2)), by integer arithmetic
    offset = bits - SQRT_HALF_BITS
    exponent = xp.to_float((offset >> 23) - 32)
    f = xp.from_bits((offset & 0x007FFFFF) + SQRT_HALF_BITS) - c(1.0)
    f2 = f * f
    return f - c(0.5) * f2 + f2 * f * _horner(LOG_COEFFICIENTS, f, c) + exponent * c(LN2)


def _box_muller(first, second, xp):
    """Return two standard normals from two random words. xp: _Numpy or _Torch, below."""
    c = xp.constant
    # the radius, sqrt(-2 ln u), is at most 6.66
    radius = xp.sqrt(c(-2.0) * _log_uniform(first, xp))
    # angle: two bits choose the quadrant, the other thirty an angle in [-pi/4, pi/4)
    quadrant = second >> 30
    x = xp.to_float((second & 0x3FFFFFFF) - (1 << 29)) * c(np.pi / 2 / 2**30)
    z = x * x
    sin = x + x * z * _horner(SIN_COEFFICIENTS, z, c)
    cos = c(1.0) - c(0.5) * z + z * z * _horner(COS_COEFFICIENTS, z, c)
    swap = (quadrant & 1) == 1
    sin, cos = xp.where(swap, cos, sin), xp.where(swap, -sin, cos)
    negate = (quadrant & 2) == 2
    return radius * xp.where(negate, -cos, cos), radius * xp.where(negate, -sin, sin)


class _Numpy:
    constant = staticmethod(np.float32)
    sqrt = staticmethod(np.sqrt)
    where = staticmethod(np.where)

    @staticmethod
    def to_float(x):
        return x.astype(np.float32)

    @staticmethod
    def bits(x):
        return x.view(np.int32).astype(np.int64)

    @staticmethod
    def from_bits(x):
        return x.astype(np.int32).view(np.float32)


class _Torch:
    # torch rounds a Python float to fp32 before multiplying an fp32 tensor by it, just as np.float32 does
    constant = staticmethod(lambda value: float(np.float32(value)))

    @staticmethod
    def where(condition, x, y):
        return x.where(condition, y)

    @staticmethod
    def sqrt(x):
        import torch

        # torch's vectorized CPU sqrt is off by an ulp for one value in five (2.13, AVX-512); numpy's and CUDA's round
        # correctly
        return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else torch.sqrt(x)

    @staticmethod
    def to_float(x):
        return x.float()

    @staticmethod
    def bits(x):
        import torch

        return x.view(torch.int32).long()

    @staticmethod
    def from_bits(x):
        import torch

        return x.int().view(torch.float32)


def exponentials(words: np.ndarray) -> np.ndarray:
    """Return a standard exponential draw for each random word, float32."""
    return -_log_uniform(words.astype(np.int64), _Numpy)


def normals(key: Key, shape: tuple[int, ...], first_block: int = 0) -> np.ndarray:
    """Return standard normals of one key, float32 of `shape`, in row-major order.

    first_block: the element block of the first one.
    """
    return _normals_numpy([key], shape, first_block)[0]


def _normals_numpy(keys: list[Key], shape: tuple[int, ...], first_block: int) -> np.ndarray:
    num = int(np.prod(shape, dtype=np.int64))
    k0, k1, c1, c2, c3 = np.array([key.words() for key in keys], dtype=np.uint64).T[:, :, None]
    blocks = np.arange(first_block, first_block + (num + 3) // 4, dtype=np.uint64)
    w0, w1, w2, w3 = (w.astype(np.int64) for w in philox_numpy((blocks, c1, c2, c3), (k0, k1)))
    elements = np.stack([*_box_muller(w0, w1, _Numpy), *_box_muller(w2, w3, _Numpy)], axis=-1)
    return elements.reshape(len(keys), -1)[:, :num].reshape(len(keys), *shape)


def _normals_on(device: torch.device, keys: list[Key], shape: tuple[int, ...], first_block: int) -> Tensor:
    """Return the same by torch's operators, of which only the keys are made on the host."""
    import torch

    num = int(np.prod(shape, dtype=np.int64))
    rows = torch.tensor([key.words() for key in keys], dtype=torch.int64).to(device, non_blocking=True)
    k0, k1, c1, c2, c3 = rows[:, :, None].unbind(1)
    blocks = torch.arange(first_block, first_block + (num + 3) // 4, dtype=torch.int64, device=device)
    w0, w1, w2, w3 = philox_torch((blocks[None, :], c1, c2, c3), (k0, k1))
    elements = torch.stack([*_box_muller(w0, w1, _Torch), *_box_muller(w2, w3, _Torch)], dim=-1)
    return elements.reshape(len(keys), -1)[:, :num].reshape(len(keys), *shape)


def normals_torch(
    keys: list[Key], shape: tuple[int, ...], device: torch.device | str = "cpu", first_block: int = 0
) -> Tensor:
    """Return standard normals, (len(keys), *shape) float32 on `device`.

    Row i equals `normals(keys[i], shape, first_block)` bit for bit. Raises ValueError for an empty list.
    """
    if not keys:
        raise ValueError("normals_torch needs at least one key, got none")
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        # numpy takes a quarter to a half of the time that torch's operators need for arrays this small
        return torch.from_numpy(_normals_numpy(keys, shape, first_block))
    return _normals_on(device, keys, shape, first_block)
