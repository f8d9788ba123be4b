"""Host memory that a GPU copies to and from: slabs that grow to the largest use, and single blocks of an exact size.

torch's pinned allocator rounds every block up to a power of two, which can double the memory (`PowerOf2Ceil` in
aten/src/ATen/core/CachingHostAllocator.h). Slabs are powers of two, so rounding wastes nothing; a block of an exact
size is registered with CUDA directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 512


class HostSlabs:
    """Host memory that is handed out in pieces, reused once all pieces are free, and never returned before `release`.

    slab_bytes: size of a slab, a power of two; a larger piece gets a slab of its own. is_pinned: whether to pin it.
    is_real: False only counts, for meta tensors. num_bytes: of all slabs; num_in_use: pieces that are not free.
    """

    def __init__(self, slab_bytes: int, is_pinned: bool, is_real: bool = True):
        self.slab_bytes, self.is_pinned, self.is_real = slab_bytes, is_pinned, is_real
        self.release()

    def take(self, num_bytes: int) -> Tensor | None:
        """Return a free piece, (num_bytes,) uint8, or None if memory is only counted.

        Raises RuntimeError, from torch or CUDA, if the host has no more memory.
        """
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        index = next((i for i, total in enumerate(self._sizes) if self._filled[i] + size <= total), len(self._sizes))
        if index == len(self._sizes):
            self._add(max(self.slab_bytes, 1 << (size - 1).bit_length()))
        start = self._filled[index]
        self._filled[index] += size
        self.num_in_use += 1
        return self._slabs[index][start : start + num_bytes] if self.is_real else None

    def give_back(self) -> None:
        """Free one piece. Memory is handed out again once no piece is in use."""
        self.num_in_use -= 1
        if self.num_in_use == 0:
            self.give_back_all()

    def give_back_all(self) -> None:
        """Free every piece; the next ones overwrite them."""
        self.num_in_use, self._filled = 0, [0] * len(self._sizes)

    def release(self) -> None:
        """Return all memory to the system."""
        self.num_bytes, self.num_in_use = 0, 0
        self._slabs: list[Tensor] = []
        self._sizes: list[int] = []
        self._filled: list[int] = []

    def _add(self, size: int) -> None:
        if self.is_real:
            self._slabs.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.is_pinned))
        self._sizes.append(size)
        self._filled.append(0)
        self.num_bytes += size


def pinned_block(num_bytes: int) -> Tensor:
    """Return zeroed pinned memory of exactly num_bytes, (num_bytes,) uint8; call `unpin` before it is freed.

    Raises RuntimeError if the host lacks the memory or CUDA cannot pin it.
    """
    block = torch.zeros(num_bytes, dtype=torch.uint8)
    code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), num_bytes, 0))
    if code != 0:
        raise RuntimeError(f"CUDA cannot pin it: error {code}")
    return block


def unpin(block: Tensor) -> None:
    """Unregister a `pinned_block` with CUDA."""
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
