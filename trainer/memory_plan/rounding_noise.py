"""Expected stochastic-rounding error relative to the weights' displacement, for the memory modes `rounded` and `near`.

A step of AdamW moves a weight by lr s, where s = m / sqrt(v). Model the gradient as a steady part mu plus noise of
unit variance, so that rho = mu / sqrt(1 + mu^2) is the steady share of its magnitude. Then s has mean rho and,
because m averages about ten gradients, variance (1 - rho^2) (1 - beta_1) / (1 + beta_1). Over a run each gradient's
noise contributes once in full, so after steps with learning rates lr_t

    displacement^2 = (rho sum lr_t)^2 + (1 - rho^2) sum lr_t^2

A value on a grid of spacing u that moves by d is rounded to one of its two neighbours, with variance u^2 f (1 - f),
where f is the fractional part of |d| / u: about u |d| for small steps. Roundings are independent, so

    noise^2 = sum_t E[u^2 f_t (1 - f_t)],  d_t = lr_t s

The result is sqrt(noise^2 / displacement^2), both summed over all weights. u is 2^-7 (bf16) or 2^-10 (fp16) times the
weight's power of two; `near` divides that by another 2^8 or 2^7. Weights are assumed normal with variance 1 / fan_in,
those of norms to have variance 1, and mu normal with standard deviation 0.3: about a third of the gradient is steady.
If a run's gradients agree more, its weights move further and the ratio is smaller.

A test compares the formula with tools/rounding.py, which measured 1.70 for `rounded` and 0.075 for `near` on tensors of
SD1.5's shapes after 200 steps at 1e-6 (bench/results/rounding.jsonl).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch

# standard deviation of the gradient's steady part, relative to its noise
STEADY = 0.3
# ratio above which the plan warns: the error is half of the displacement
WARN_ABOVE = 0.5
# a schedule is reduced to at most this many learning rates
NUM_RATES = 24
_BITS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}
_NEAR_BITS = {torch.bfloat16: 8, torch.float16: 7}


@functools.cache
def _normal(num: int) -> np.ndarray:
    """Return the medians of `num` equally likely slices of a standard normal distribution."""
    return np.array([NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)])


def spacing(values: np.ndarray, dtype: torch.dtype, memory: str) -> np.ndarray:
    """Return the spacing of representable values around `values`, for memory mode rounded or near."""
    bits, smallest = _BITS[dtype]
    exponent = np.maximum(np.floor(np.log2(np.abs(values))), smallest)
    return np.exp2(exponent - bits - (_NEAR_BITS[dtype] if memory == "near" else 0))


def _fan_in(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _rate_counts(rates: Sequence[float]) -> list[tuple[float, int]]:
    """Return (learning rate, number of steps) pairs; if there are too many, neighbouring rates are averaged."""
    counted = sorted(Counter(rates).items())
    if len(counted) <= NUM_RATES:
        return counted
    pieces = np.array_split(np.sort(np.array(rates)), NUM_RATES)
    return [(float(piece.mean()), len(piece)) for piece in pieces]


def noise_to_displacement(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, memory: str, rates: Sequence[float], beta1: float = 0.9
) -> float:
    """Return the expected distance of the weights from those of exact arithmetic, relative to their displacement.

    shapes: of the weights; dtype: bf16 or fp16; memory: near or rounded; rates: each step's learning rate.
    """
    steady = STEADY * _normal(9)
    rho = steady / np.sqrt(1 + steady**2)
    deviation = np.sqrt((1 - rho**2) * (1 - beta1) / (1 + beta1))
    # equally likely values of |s|
    steps = np.abs(rho[:, None] + deviation[:, None] * _normal(9)).ravel()
    rate_counts = _rate_counts(rates)
    total, squares = sum(lr * n for lr, n in rate_counts), sum(lr**2 * n for lr, n in rate_counts)
    displacement = float(np.mean(rho**2)) * total**2 + float(np.mean(1 - rho**2)) * squares
    weights = Counter({})
    for shape in shapes:
        weights[_fan_in(shape) if len(shape) > 1 else 1] += math.prod(shape)
    noise = 0.0
    for fan_in, count in weights.items():
        u = spacing(_normal(64) / math.sqrt(fan_in), dtype, memory)[:, None]
        for lr, num in rate_counts:
            fraction = np.mod(lr * steps / u, 1.0)
            noise += count * num * float(np.mean(u**2 * fraction * (1 - fraction)))
    return math.sqrt(noise / (displacement * sum(weights.values())))
