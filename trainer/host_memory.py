"""What a run on a GPU takes of the machine's own memory, beside Python and its libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.kernels.offload import SLAB_BYTES
from safelight.trainer.plan import BESIDE_BYTES, moment_bytes
from safelight.trainer.snapshot import CHUNK_BYTES


@dataclass(frozen=True)
class HostBytes:
    """states: optimizer state that streams past the GPU; activations: offloaded; snapshot: of a checkpoint that is written; all
    three pinned. autoencoder: waits to decode. loading: at the peak of loading, the fp32 UNet and what it becomes here."""

    states: int
    activations: int
    snapshot: int
    autoencoder: int
    loading: int

    @property
    def training(self) -> int:
        return self.states + self.activations + self.snapshot + self.autoencoder

    @property
    def most(self) -> int:
        return max(self.training, self.loading)


def _chunks(num_bytes: int, chunk: int) -> int:
    return -(-num_bytes // chunk) * chunk


def host_bytes(
    sizes: Sequence[int], itemsize: int, optimizer: str, memory: str, has_average: bool, paged: int, offloaded: int,
    autoencoder: int,
) -> HostBytes:  # fmt: skip
    """Return the host memory of a run. sizes: elements of each parameter; itemsize: of a weight; paged, offloaded: bytes there."""
    num = sum(sizes)
    beside = BESIDE_BYTES[memory] if itemsize < 4 else 0
    saved = (itemsize + beside + 4 * has_average) * num + sum(moment_bytes(n, optimizer) for n in sizes)
    return HostBytes(paged, _chunks(offloaded, SLAB_BYTES), _chunks(saved, CHUNK_BYTES), autoencoder, 4 * num + paged)
