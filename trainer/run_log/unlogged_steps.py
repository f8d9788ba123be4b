"""The steps since the last log line. Their results stay on the device until all are read at once.

Each step's results are copied into a row of a fixed buffer, because a replayed graph overwrites its own. Reading the
buffer is one copy, and the only synchronization with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.trainer.step.step import StepResult

# rows in the device buffer; adding more steps than that without `read` forces one
NUM_ROWS = 50
PREFIX = "log/"
# columns of the buffer
GRAD_NORM, IS_APPLIED, LOSSES = 0, 1, 2


class UnloggedSteps:
    """Losses, gradient norm and whether it was applied, of each step since the last log line.

    max_samples: the most samples that a step may have. state: a checkpoint's unlogged steps (`state()`), which come
    first.
    """

    def __init__(self, max_samples: int, device: torch.device, state: dict[str, Tensor] | None = None):
        self._rows = torch.zeros(NUM_ROWS, LOSSES + max_samples, device=device)
        # number of samples in each row that was not read yet
        self._sizes: list[int] = []
        self._read: list[StepResult] = [] if state is None else _unpack(state)

    def __len__(self) -> int:
        return len(self._read) + len(self._sizes)

    @torch.no_grad()
    def add(self, result: StepResult) -> None:
        """Add a step. Synchronizes with the device only if the buffer is full."""
        if len(self._sizes) == NUM_ROWS:
            self.read()
        row = self._rows[len(self._sizes)]
        row[GRAD_NORM], row[IS_APPLIED] = result.grad_norm, result.is_applied
        row[LOSSES : LOSSES + len(result.losses)] = result.losses
        self._sizes.append(len(result.losses))

    def read(self) -> list[StepResult]:
        """Return the unlogged steps on the CPU, with `is_applied` a bool."""
        if self._sizes:
            rows = self._rows[: len(self._sizes)].cpu().clone()
            self._read += [
                StepResult(row[LOSSES : LOSSES + size], row[GRAD_NORM], bool(row[IS_APPLIED]))
                for row, size in zip(rows, self._sizes, strict=True)
            ]
            self._sizes.clear()
        return self._read

    def clear(self) -> None:
        """Drop the steps, after their line was written."""
        self._sizes.clear()
        self._read = []

    def means(self) -> tuple[float | None, float | None]:
        """Return the applied steps' mean loss over samples and mean gradient norm; (None, None) if there are none."""
        applied = [step for step in self.read() if step.is_applied]
        if not applied:
            return None, None
        losses = torch.cat([step.losses for step in applied])
        norms = torch.stack([step.grad_norm for step in applied])
        return losses.double().mean().item(), norms.double().mean().item()

    def state(self) -> dict[str, Tensor]:
        """Return the unlogged steps as tensors for a checkpoint, on the CPU; empty if there are none."""
        steps = self.read()
        if not steps:
            return {}
        return {
            f"{PREFIX}losses": torch.cat([step.losses for step in steps]),
            f"{PREFIX}sizes": torch.tensor([len(step.losses) for step in steps]),
            f"{PREFIX}grad_norms": torch.stack([step.grad_norm for step in steps]),
            f"{PREFIX}taken": torch.tensor([step.is_applied for step in steps]),
        }


def take_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the unlogged steps from a checkpoint's state and return them."""
    return {name: state.pop(name) for name in list(state) if name.startswith(PREFIX)}


def _unpack(state: dict[str, Tensor]) -> list[StepResult]:
    if not state:
        return []
    dtypes = {"losses": torch.float32, "sizes": torch.int64, "grad_norms": torch.float32, "taken": torch.bool}
    parts = {name: state.get(f"{PREFIX}{name}") for name in dtypes}
    is_sound = all(part is not None and part.dim() == 1 and part.dtype == dtypes[name] for name, part in parts.items())
    is_sound = is_sound and len({len(parts[name]) for name in ("sizes", "grad_norms", "taken")}) == 1
    if not is_sound or min(sizes := parts["sizes"].tolist(), default=0) < 0 or sum(sizes) != len(parts["losses"]):
        raise UserError("the checkpoint's unlogged steps are malformed; move it away to resume from the one before")
    losses = parts["losses"].split(sizes)
    return [StepResult(*row) for row in zip(losses, parts["grad_norms"], parts["taken"].tolist(), strict=True)]
