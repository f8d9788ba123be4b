"""The distribution that training draws its timesteps from, as a table that kernels/ops/noising.py looks draws up in.

A distribution is given on x from 0 to 1, which is stretched over the run's range of timesteps: [min_timestep,
max_timestep), counted from 0, the least noise. A draw is one random word of the sample's key and its place in the
table, so it needs no logarithm or exponential on the device, and every device gives the same timestep.

To add a distribution: a row in trainer/registry/losses.py, and its cumulative distribution function here.
Letters: T timesteps.
Source: logit-normal: Esser et al. 2024, arXiv:2403.03206, section 3.1, where time runs as here, towards noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.trainer.config.schema import Loss


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _logit_normal(x: float, loss: Loss) -> float:
    if not 0 < x < 1:
        return float(x >= 1)
    return _normal_cdf((math.log(x / (1 - x)) - loss.timestep_location) / loss.timestep_scale)


# name in loss.timesteps -> the probability of at most x
CUMULATIVE: dict[str, Callable[[float, Loss], float]] = {"uniform": lambda x, loss: x, "logit_normal": _logit_normal}


def timestep_range(loss: Loss, num_timesteps: int) -> tuple[int, int]:
    """Return the first timestep that is trained, and the one after the last.

    Raises UserError if the model does not have them.
    """
    end = loss.max_timestep or num_timesteps
    if end > num_timesteps:
        raise UserError(
            f"loss.max_timestep {loss.max_timestep} is more than the {num_timesteps} timesteps of the base; set it to "
            f"{num_timesteps} or less, or to 0 for all"
        )
    if loss.min_timestep >= end:
        raise UserError(
            f"loss.min_timestep {loss.min_timestep} leaves none of the timesteps 0 to {end - 1}; set it below {end}"
        )
    return loss.min_timestep, end


def timestep_cdf(loss: Loss, num_timesteps: int) -> Tensor | None:
    """Return the probability of each timestep and those before it in units of 2^-32, (T,) int64.

    None for a uniform draw from all of them, which needs no table. Raises UserError as `timestep_range`.
    """
    start, end = timestep_range(loss, num_timesteps)
    if loss.timesteps == "uniform" and (start, end) == (0, num_timesteps):
        return None
    cumulative, size = CUMULATIVE[loss.timesteps], end - start
    inside = [cumulative((i + 1) / size, loss) for i in range(size - 1)]
    fractions = np.array([*[0.0] * start, *inside, *[1.0] * (num_timesteps - end + 1)])
    return torch.from_numpy(np.rint(fractions * 2.0**32).astype(np.int64))
