"""The learning rate of every step. Free of torch: the report draws it as well."""

from __future__ import annotations

import math


def learning_rate(schedule: str, peak: float, step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of a stage of num_steps.

    Warm-up rises linearly and reaches the peak at step warmup_steps; then constant, or linear or cosine towards zero
    at num_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"schedule {schedule!r} is unknown; use constant, linear or cosine")
