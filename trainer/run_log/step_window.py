"""The steps since the last log line: on the device until they are read, all at once.

A step writes one row of a table whose address does not change: what it wrote is there whether a kernel or a replayed
graph made it. Reading is one copy, and the only wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.trainer.step.step import StepResult

# rows on the device; who adds more steps than that without reading has them read in between
NUM_ROWS = 50
PREFIX = "log/"
GRAD_NORM, TAKEN, LOSSES = 0, 1, 2


class StepLog:
    """Losses, gradient norm and taken-ness of the unlogged steps.

    num_samples: the most that a step meets. state: what `state` returned for a checkpoint, whose steps come first.
    """

    def __init__(self, num_samples: int, device: torch.device, state: dict[str, Tensor] | None = None):
        self._rows = torch.zeros(NUM_ROWS, LOSSES + num_samples, device=device)
        # samples of each row that was not read yet
        self._sizes: list[int] = []
        self._read: list[StepResult] = [] if state is None else _unpack(state)

    def __len__(self) -> int:
        return len(self._read) + len(self._sizes)

    @torch.no_grad()
    def add(self, result: StepResult) -> None:
        """Add a step. Nothing waits for the device, but where the table is full."""
        if len(self._sizes) == NUM_ROWS:
            self.read()
        row = self._rows[len(self._sizes)]
        row[GRAD_NORM], row[TAKEN] = result.grad_norm, result.taken
        row[LOSSES : LOSSES + len(result.losses)] = result.losses
        self._sizes.append(len(result.losses))

    def read(self) -> list[StepResult]:
        """Return the unlogged steps, on the CPU, `taken` a bool."""
        if self._sizes:
            rows = self._rows[: len(self._sizes)].cpu().clone()
            self._read += [
                StepResult(row[LOSSES : LOSSES + size], row[GRAD_NORM], bool(row[TAKEN]))
                for row, size in zip(rows, self._sizes, strict=True)
            ]
            self._sizes.clear()
        return self._read

    def clear(self) -> None:
        """Begin anew after a line."""
        self._sizes.clear()
        self._read = []

    def means(self) -> tuple[float | None, float | None]:
        """Return the mean loss over samples and the mean gradient norm over steps, of those taken; None where none was."""
        taken = [step for step in self.read() if step.taken]
        if not taken:
            return None, None
        losses = torch.cat([step.losses for step in taken])
        norms = torch.stack([step.grad_norm for step in taken])
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
            f"{PREFIX}taken": torch.tensor([step.taken for step in steps]),
        }


def take_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the unlogged steps out of a checkpoint's state."""
    return {name: state.pop(name) for name in list(state) if name.startswith(PREFIX)}


def _unpack(state: dict[str, Tensor]) -> list[StepResult]:
    if not state:
        return []
    losses = state[f"{PREFIX}losses"].split(state[f"{PREFIX}sizes"].tolist())
    taken = state[f"{PREFIX}taken"].tolist()
    return [StepResult(*row) for row in zip(losses, state[f"{PREFIX}grad_norms"], taken, strict=True)]
