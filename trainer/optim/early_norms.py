"""Gradient norms taken during backward, while the gradients are still in the GPU's cache.

The norm of all gradients is needed before the first of them is used, so it cannot be a by-product of the update. After
backward it would read them all from memory again, 1.7 GB of a 16-bit SD1.5. Taken for a few tensors at a time as
backward makes them, it reads them from the cache. A tensor's norm does not depend on which others it is taken with.
"""

from __future__ import annotations

import torch
from torch import Tensor

# below this a gradient of a large layer alone fills the cache, and the launches cost more than the reading
MIN_CACHE_BYTES = 32 * 2**20


def group_bytes(device: torch.device) -> int:
    """Return how many bytes of gradients should wait for their norms at most; 0 where it does not pay.

    Half of the cache, because backward writes other tensors meanwhile.
    """
    if device.type != "cuda":
        return 0
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return cache_bytes // 2 if cache_bytes >= MIN_CACHE_BYTES else 0


class EarlyNorms:
    """The norms of a step's gradients by name, each a scalar in fp32. max_waiting: as `group_bytes` returns it."""

    def __init__(self, max_waiting: int):
        self._max_waiting, self._num_waiting = max_waiting, 0
        self._waiting: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Forget the norms of the step before."""
        self._waiting.clear()
        self._norms.clear()
        self._num_waiting = 0

    def add(self, name: str, gradient: Tensor) -> None:
        """Take a gradient that is complete. It must not change before `norms_of` has been called."""
        if self._num_waiting + gradient.nbytes > self._max_waiting:
            self._take()
        self._waiting[name] = gradient
        self._num_waiting += gradient.nbytes

    def norms_of(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Return the norms of gradients in their order, also of those that were not added, and forget all."""
        for name, gradient in gradients.items():
            if name not in self._norms and name not in self._waiting:
                self._waiting[name] = gradient
        self._take()
        norms = [self._norms[name] for name in gradients]
        # a captured graph's norms would keep its memory
        self.begin()
        return norms

    def _take(self) -> None:
        if self._waiting:
            norms = torch._foreach_norm(list(self._waiting.values()), 2, torch.float32)
            self._norms |= zip(self._waiting, norms, strict=True)
        self._waiting.clear()
        self._num_waiting = 0
