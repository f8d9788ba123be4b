"""How far stochastic rounding throws the weights about, against the way they go: what `rounded` and `near` cost at a run's rates.

The model. A step of AdamW moves a weight by lr s, where s = m / sqrt(v). Let a gradient be a steady part mu and noise of unit
variance, and rho = mu / sqrt(1 + mu^2) the steady share of its size. Then s has mean rho and, the mean of about ten gradients,
variance (1 - rho^2) (1 - beta_1) / (1 + beta_1); over a run each gradient's noise counts once in full. So after steps of rates lr_t

    way^2   = (rho sum lr_t)^2 + (1 - rho^2) sum lr_t^2

A value that lies on a grid of spacing u and moves by d is rounded to one of its neighbours with variance u^2 f (1 - f), f the
fractional part of |d| / u: about u |d| where the step is small. Rounding's draws are independent, so

    noise^2 = sum_t E[u^2 f_t (1 - f_t)],  d_t = lr_t s

and the ratio is the root of both, summed over all weights. u is 2^-7 (bf16) or 2^-10 (fp16) of a weight's power of two, for
`near` 2^-8 or 2^-7 of that. Weights are taken as normal with variance 1 / fan_in, norms' as 1; mu as normal of deviation 0.3: a
third of the gradient is steady. A run whose gradients agree more goes farther, and has less noise for its way.

Held to tools/rounding.py's tensors of SD1.5's shapes over 200 steps at 1e-6, by a test: there the ratio was 1.70 for `rounded` and
0.075 for `near` (bench/results/rounding.jsonl).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch

# of the gradient's steady part, against its noise
STEADY = 0.3
# beyond it the weights are thrown about half as far as they go
WARN_ABOVE = 0.5
# an lr schedule is taken as so many rates at most
NUM_RATES = 24
_BITS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}
_NEAR_BITS = {torch.bfloat16: 8, torch.float16: 7}


@functools.cache
def _normal(num: int) -> np.ndarray:
    """Return the middles of `num` equal shares of a standard normal."""
    return np.array([NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)])


def spacing(values: np.ndarray, dtype: torch.dtype, memory: str) -> np.ndarray:
    """Return the grid's spacing at values, as rounded or near holds them."""
    bits, smallest = _BITS[dtype]
    exponent = np.maximum(np.floor(np.log2(np.abs(values))), smallest)
    return np.exp2(exponent - bits - (_NEAR_BITS[dtype] if memory == "near" else 0))


def _fan_in(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _shares(rates: Sequence[float]) -> list[tuple[float, int]]:
    """Return (rate, steps) of a schedule; of many rates, means of neighbours."""
    counted = sorted(Counter(rates).items())
    if len(counted) <= NUM_RATES:
        return counted
    pieces = np.array_split(np.sort(np.array(rates)), NUM_RATES)
    return [(float(piece.mean()), len(piece)) for piece in pieces]


def noise_to_displacement(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, memory: str, rates: Sequence[float], beta1: float = 0.9
) -> float:
    """Return the expected distance of the weights from where exact arithmetic had brought them, against the way these went.

    shapes: of the weights; dtype: bf16 or fp16; memory: near or rounded; rates: each step's learning rate.
    """
    steady = STEADY * _normal(9)
    rho = steady / np.sqrt(1 + steady**2)
    deviation = np.sqrt((1 - rho**2) * (1 - beta1) / (1 + beta1))
    # every size of a step, each as likely as the others
    steps = np.abs(rho[:, None] + deviation[:, None] * _normal(9)).ravel()
    shares = _shares(rates)
    total, squares = sum(lr * n for lr, n in shares), sum(lr**2 * n for lr, n in shares)
    way = float(np.mean(rho**2)) * total**2 + float(np.mean(1 - rho**2)) * squares
    weights = Counter({})
    for shape in shapes:
        weights[_fan_in(shape) if len(shape) > 1 else 1] += math.prod(shape)
    noise = 0.0
    for fan_in, count in weights.items():
        u = spacing(_normal(64) / math.sqrt(fan_in), dtype, memory)[:, None]
        for lr, num in shares:
            fraction = np.mod(lr * steps / u, 1.0)
            noise += count * num * float(np.mean(u**2 * fraction * (1 - fraction)))
    return math.sqrt(noise / (way * sum(weights.values())))
