"""What a run's log tells about its checkpoints: how the held-out loss went, and whether the run diverged."""

from __future__ import annotations

import os
from pathlib import Path

from safelight.trainer.run_log.metrics import MAX_BYTES, MAX_LINE_VALUES
from safelight.untrusted import parse_json, read_lines

# A held-out loss this many times the base's is reported. Every validation repeats the same noise, so it barely
# fluctuates, and overfitting raises it by tens of percent: twice the squared error is a UNet that is being damaged.
HELD_OUT_FACTOR = 2.0


def is_risen(loss: float, base_loss: float | None) -> bool:
    """Return whether a held-out loss is far above the base's. base_loss: None if the base was not validated."""
    # a loss that is not finite has risen as well
    return base_loss is not None and not loss <= HELD_OUT_FACTOR * base_loss


def read_course(run_dir: Path) -> tuple[dict[int, float], list[int]]:
    """Return (step -> held-out loss, the steps at which the run diverged) of a log. Damaged lines are left out."""
    held_out, diverged = {}, []
    path = run_dir / "metrics.jsonl"
    for line in read_lines(path, MAX_BYTES) if os.path.lexists(path) else []:
        try:
            row = parse_json(line or b"", allow_nan=True, max_values=MAX_LINE_VALUES)
            step = row["step"]
            if type(step) is not int:
                continue
            if row["kind"] == "validation" and row["split"] == "held_out":
                held_out[step] = float(row["loss"])
            elif row["kind"] == "event" and row["event"] == "diverged":
                diverged.append(step)
        except (ValueError, KeyError, TypeError):
            continue
    return held_out, diverged


def doubt_about(run_dir: Path, step: int) -> str:
    """Return why a checkpoint's pictures may be worthless, from the run's log; '' if it does not tell."""
    held_out, diverged = read_course(run_dir)
    doubts = []
    measured = max((other for other in held_out if other <= step), default=0)
    if measured and (base := held_out.get(0)) is not None and is_risen(held_out[measured], base):
        at = "its" if measured == step else f"at step {measured} its"
        doubts.append(
            f"{at} held-out loss {held_out[measured]:.4g} is {held_out[measured] / base:.3g} times the base's"
        )
    if diverged:
        doubts.append(f"the run diverged at step {max(diverged)}")
    if not doubts:
        return ""
    return f"the checkpoint of step {step} may be worse than the base: {', and '.join(doubts)}; look at its pictures"
