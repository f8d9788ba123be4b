"""A copy in host memory of what a checkpoint holds, so that training goes on while it is written.

The loop only asks for the copies: on a GPU they follow the step on its own stream, into pinned memory, and the next step
follows them. Tensors are copied in their memory order; whoever writes them makes them contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# torch's pinned allocator rounds every block up to a power of two: of chunks that are one nothing is wasted
CHUNK_BYTES = 2**28
ALIGNMENT = 64
MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Return the host memory that can be taken without swapping; None where the system does not tell."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def num_bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


class HostMemory:
    """Chunks of host memory for one snapshot at a time. pinned: as a GPU copies to without the host."""

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self._chunks: list[Tensor] = []
        self._chunk = self._offset = 0

    def begin(self) -> None:
        """Begin a snapshot; the one before is overwritten."""
        self._chunk = self._offset = 0

    def like(self, x: Tensor) -> Tensor:
        """Return room for a tensor's copy: its shape and dtype, its memory order where that is dense."""
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        num_bytes = x.numel() * x.element_size()
        while self._chunk < len(self._chunks) and self._offset + num_bytes > len(self._chunks[self._chunk]):
            self._chunk, self._offset = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            size = max(CHUNK_BYTES, 1 << (num_bytes - 1).bit_length())
            self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
        flat = self._chunks[self._chunk][self._offset : self._offset + num_bytes].view(x.dtype)
        self._offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return flat.as_strided(x.shape, strides, flat.storage_offset())

    def reserve(self, tensors: Iterable[Tensor]) -> None:
        """Take the memory of a snapshot of such tensors, all of its pages, so that the first one finds it there."""
        self.begin()
        for x in tensors:
            # a page that was never written to costs more than its copy
            self.like(x).zero_()

    def release(self) -> None:
        """Give all memory back."""
        self._chunks = []
        self.begin()


class Snapshot:
    """Copies of named tensors; until `settle` returns they may be under way."""

    def __init__(self, tensors: Mapping[str, Tensor], memory: HostMemory):
        memory.begin()
        self.tensors = {name: memory.like(x).copy_(x.detach(), non_blocking=True) for name, x in tensors.items()}
        device = next((x.device for x in tensors.values() if x.device.type == "cuda"), None)
        self._copied = None if device is None else torch.cuda.current_stream(device).record_event()

    def settle(self) -> dict[str, Tensor]:
        """Wait for the copies and return them, contiguous. For the thread that writes them."""
        if self._copied is not None:
            self._copied.synchronize()
        for name, x in self.tensors.items():
            if not x.is_contiguous():
                # in its own room: a second copy of one tensor at a time
                ordered = x.contiguous()
                flat = x.as_strided(ordered.shape, ordered.stride(), x.storage_offset())
                self.tensors[name] = flat.copy_(ordered)
        return self.tensors


class SavedUNet:
    """A UNet's config and a snapshot of its weights, which save themselves as the UNet does."""

    def __init__(self, unet: nn.Module, weights: dict[str, Tensor]):
        self._unet, self._weights = unet, weights

    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        """Write config.json and the weights in one file, as diffusers' `save_pretrained` does."""
        assert safe_serialization
        self._unet.save_config(folder)
        save_file(self._weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
