"""Who does what in one launch over many tensors: (tensor, first unit) a program, and the addresses of their gradients.

A captured CUDA graph has gradients of its own and so needs a table of their addresses of its own. Nothing is copied from the
host while it is captured; and its table is no memory of the capture's, which the graph itself would write to before it
reads it: a spare one is taken, and filled when the capture has ended.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Programs:
    """Programs over tensors of these sizes (index -> elements), `elements` each, counted in units.

    table: (programs, 2) int32, on the device. indices: of the tensors.
    """

    def __init__(self, sizes: dict[int, int], num_tensors: int, elements: int, unit: int, device: torch.device):
        rows = []
        for index, size in sizes.items():
            firsts = torch.arange(0, size, elements) // unit
            rows.append(torch.stack([torch.full_like(firsts, index), firsts], dim=1))
        self.indices = tuple(sizes)
        self.table = torch.cat(rows).to(torch.int32).to(device)
        self._addresses = [0] * num_tensors
        self._gradients, self._spare = (torch.zeros(num_tensors, dtype=torch.int64, device=device) for _ in range(2))
        # tables of captured graphs, with what they wait to be filled with
        self._captured: list[Tensor] = []
        self._unfilled: list[list[int]] = []

    def gradients(self, gradients: dict[int, Tensor]) -> Tensor:
        """Return the addresses by tensor, copied to the device when one moved; in a capture the table they will stand in."""
        addresses = [0] * len(self._addresses)
        for index in self.indices:
            addresses[index] = gradients[index].data_ptr()
        if _is_capturing(self.table.device):
            assert not self._unfilled, "finish_capture was not called after the capture before"
            self._unfilled.append(addresses)
            return self._spare
        if addresses != self._addresses:
            self._addresses = addresses
            self._gradients.copy_(torch.tensor(addresses), non_blocking=True)
        return self._gradients

    def finish_capture(self) -> None:
        """Fill the table of the capture that has ended."""
        for addresses in self._unfilled:
            self._captured.append(self._spare.copy_(torch.tensor(addresses)))
            self._spare = torch.zeros_like(self._spare)
        self._unfilled.clear()

    def release_captures(self) -> None:
        """Free the tables of captured graphs."""
        self._captured.clear()
