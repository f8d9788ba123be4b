"""The per-program work table of a multi-tensor launch, and the address table of the gradients it reads.

Gradients get new addresses from one step to the next, so their address table is copied to the device whenever one
moved. A captured CUDA graph keeps its own gradients, and so needs an address table of its own. That table cannot be
filled during the capture, which allows no copy from the host, nor can it be memory of the graph's pool, which the graph
itself overwrites before it reads it. So a spare table is allocated beforehand, handed to the captured launch, and
filled after the capture.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class WorkTable:
    """Divides tensors among programs of at most `elements` elements each.

    sizes: tensor index -> number of elements. num_tensors: length of the address tables, in which tensors outside of
    sizes have address 0. unit: the positions in a tensor are counted in units of this many elements.

    rows: (programs, 2) int32 on the device: tensor index, first unit. indices: of the tensors.
    """

    def __init__(self, sizes: dict[int, int], num_tensors: int, elements: int, unit: int, device: torch.device):
        rows = []
        for index, size in sizes.items():
            firsts = torch.arange(0, size, elements) // unit
            rows.append(torch.stack([torch.full_like(firsts, index), firsts], dim=1))
        self.indices = tuple(sizes)
        self.rows = torch.cat(rows).to(torch.int32).to(device)
        self._addresses = [0] * num_tensors
        self._address_table = torch.zeros(num_tensors, dtype=torch.int64, device=device)
        self._spare = torch.zeros_like(self._address_table)
        # the captured graphs' tables; addresses that wait for the end of a capture to be copied into one
        self._captured: list[Tensor] = []
        self._pending: list[list[int]] = []

    def gradient_addresses(self, gradients: dict[int, Tensor]) -> Tensor:
        """Return the address table of the gradients, (num_tensors,) int64 on the device.

        gradients: by tensor index. During a capture the table is filled only by `finish_capture`.
        """
        addresses = [0] * len(self._addresses)
        for index in self.indices:
            addresses[index] = gradients[index].data_ptr()
        if _is_capturing(self.rows.device):
            assert not self._pending, "finish_capture was not called after the previous capture"
            self._pending.append(addresses)
            return self._spare
        if addresses != self._addresses:
            self._addresses = addresses
            self._address_table.copy_(torch.tensor(addresses), non_blocking=True)
        return self._address_table

    def finish_capture(self) -> None:
        """Fill the address table of the capture that has just ended."""
        for addresses in self._pending:
            self._captured.append(self._spare.copy_(torch.tensor(addresses)))
            self._spare = torch.zeros_like(self._spare)
        self._pending.clear()

    def release_captures(self) -> None:
        """Free the captured graphs' address tables; none of the graphs may be replayed afterwards."""
        self._captured.clear()
