"""Memory and speed of GPUs, and constants for the memory and time that a trace cannot see.

This project measured none of these figures. Their sources:
usable_gib: the total in torch's out-of-memory messages on Linux, from public issue threads. A desktop uses part of it.
bandwidth_gb_s: data sheets, in 10^9 bytes/s.
tflops: dense 16-bit matrix products accumulated in fp32, from data sheets unless a comment says otherwise.
pcie_gb_s: the card's own link, one way: 8, 16 or 32 GT/s per lane with 128b/130b encoding (PCI-SIG, generations 3, 4
and 5), 16 lanes unless a comment says otherwise. A slower slot has less.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from safelight.errors import UserError
from safelight.units import GIB, MIB

# the CUDA context and loaded kernels, outside torch's allocator; 0.5 GiB is an assumption [not measured]
CONTEXT_BYTES = GIB // 2
# workspace that cuBLAS allocates from torch's allocator, and keeps, for each pair of handle and stream:
# 2 x 4096 KiB + 8 x 16 KiB, or 32 MiB on Hopper; with run.deterministic CUBLAS_WORKSPACE_CONFIG=:4096:8. cublasLt adds
# 1024 KiB (parseChosenWorkspaceSize, parseCUDABlasLtWorkspaceSize in ATen/cuda/CublasHandlePool.cpp, torch 2.11)
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER, CUBLAS_BYTES_DETERMINISTIC, CUBLASLT_BYTES = 8_519_680, 32 * MIB, 32 * MIB, MIB
# one handle for the main thread (forward), one for autograd's thread (backward and recomputation)
NUM_CUBLAS_HANDLES = 2
# workspace of cuDNN's convolutions, a guess for the largest layers of Stable Diffusion [not measured]
CUDNN_BYTES = 64 * MIB
# memory of a CUDA graph per launch, outside torch's allocator: about 10 KB a kernel node, NVIDIA/cccl pull request 3768
GRAPH_BYTES_A_LAUNCH = 10 << 10
# memory that the allocator reserves in addition, as a share of what a step allocates and frees; a guess [not measured]
FRAGMENTATION = 0.05
# share of the matrix rate that Stable Diffusion's convolutions and matrix products reach; an assumption [not measured]
MATRIX_EFFICIENCY = 0.6
# host time per operator in an eager step; assumes 50 to 80 ms for 2,750 to 4,760 launches [not measured]
SECONDS_A_LAUNCH = 17e-6
# device time between two kernels. Upper bound: CUDA.jl's documentation reports 70 us for a CUDA graph of 80 kernels
# with almost no work, on an unnamed card [not measured]
SECONDS_A_KERNEL = 1e-6
# share of the PCIe rate that large copies from pinned memory reach [not measured]
PCIE_EFFICIENCY = 0.8
# share of a step's time spent in backward, which does two thirds of the matrix work [counted, not timed]
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Card:
    """A GPU. The rates are None if unknown. has_bf16: compute capability >= 8.0; is_here: it is in this machine."""

    name: str
    usable_gib: float
    bandwidth_gb_s: float | None = None
    tflops: float | None = None
    has_bf16: bool = True
    is_hopper: bool = False
    pcie_gb_s: float | None = None
    is_here: bool = False

    def cublas_bytes(self, *, is_deterministic: bool) -> int:
        """Return the bytes of cuBLAS workspace for one handle and stream."""
        if is_deterministic:
            return CUBLAS_BYTES_DETERMINISTIC + CUBLASLT_BYTES
        return (CUBLAS_BYTES_HOPPER if self.is_hopper else CUBLAS_BYTES) + CUBLASLT_BYTES

    def workspace(self, *, is_deterministic: bool) -> int:
        """Return the bytes that libraries allocate from torch's allocator for steps on one stream."""
        return NUM_CUBLAS_HANDLES * self.cublas_bytes(is_deterministic=is_deterministic) + CUDNN_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of model.precision auto."""
        return torch.bfloat16 if self.has_bf16 else torch.float16

    def seconds(
        self,
        flops: int,
        bytes_moved: int,
        launches: int,
        offloaded: int = 0,
        paged: int = 0,
        streamed: int = 0,
        is_fused: bool = False,
        is_replayed: bool = False,
    ) -> float | None:
        """Return an estimate of a step's time, None if the rates are unknown.

        Device time is the sum of matrix work, memory traffic and gaps between kernels. An eager step takes at least
        as long as the host needs to launch it; a step replayed as a CUDA graph (is_replayed) does not. offloaded:
        bytes copied to the host and back on one stream, in parallel to the rest. paged: bytes of optimizer state that
        stream in and out at the same time: during backward with a fused step (is_fused), after it otherwise. streamed:
        bytes of weights that are copied in during forward, and in and out during backward.
        """
        copied = offloaded + paged + streamed
        if self.tflops is None or self.bandwidth_gb_s is None or (self.pcie_gb_s is None and copied):
            return None
        device = flops / (self.tflops * 1e12 * MATRIX_EFFICIENCY) + bytes_moved / (self.bandwidth_gb_s * 1e9)
        device += launches * SECONDS_A_KERNEL
        step = device if is_replayed else max(device, launches * SECONDS_A_LAUNCH)
        if not copied:
            return step
        link = self.pcie_gb_s * 1e9 * PCIE_EFFICIENCY
        before = step * (1 - BACKWARD_SHARE) if is_fused else step
        before = max(before, streamed / link)
        return max(step, 2 * offloaded / link, before + (paged + streamed) / link)


_GEN3, _GEN4, _GEN5 = (16 * rate * 128 / 130 / 8 for rate in (8, 16, 32))
CARDS = {
    card.name: card
    for card in (
        # the data sheet says 65 TFLOP/s; its 70 W sustain 24
        Card("t4", 14.56, 320, 24, has_bf16=False, pcie_gb_s=_GEN3),
        # consumer cards accumulate in fp32 at half their fp16 rate; 25.6 and 165 are assumptions
        Card("rtx3060", 11.75, 360, 25.6, pcie_gb_s=_GEN4),
        Card("rtx3090", 23.69, 936, 71, pcie_gb_s=_GEN4),
        # eight lanes
        Card("rtx4060", 7.63, 272, 30.2, pcie_gb_s=_GEN4 / 2),
        Card("rtx4090", 23.64, 1008, 165, pcie_gb_s=_GEN4),
        Card("l4", 22.03, 300, 121, pcie_gb_s=_GEN4),
        Card("a100", 39.39, 1555, 312, pcie_gb_s=_GEN4),
        Card("a100-80gb", 79.25, 2039, 312, pcie_gb_s=_GEN4),
        Card("h100", 79.1, 3350, 989, is_hopper=True, pcie_gb_s=_GEN5),
        # a measurement by others; the data sheet says 989
        Card("h200", 139.8, 4800, 790, is_hopper=True, pcie_gb_s=_GEN5),
    )
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gib|gb|g)", re.IGNORECASE)


def find_card(name: str) -> Card:
    """Return a card by name, or one with unknown rates by its memory (`8GiB`). Raises UserError, suggesting a name."""
    if match := _SIZE.fullmatch(name.strip()):
        if float(match[1]) <= 0:
            raise UserError(f"--gpu {name!r} has no memory; use for example 8GiB")
        return Card(f"{match[1]} GiB", float(match[1]))
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", ""))
    by_plain = {re.sub(r"[^a-z0-9]", "", known): card for known, card in CARDS.items()}
    for candidate in (plain, f"rtx{plain}"):
        if candidate in by_plain:
            return by_plain[candidate]
    near = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.5) or difflib.get_close_matches(
        f"rtx{plain}", by_plain, n=1
    )
    suggestion = f"did you mean {by_plain[near[0]].name}?" if near else f"known: {', '.join(CARDS)}."
    raise UserError(f"--gpu {name!r} is not a known GPU; {suggestion} Or give its memory: 8GiB")


def card_called(device_name: str) -> Card | None:
    """Return the card of CARDS that torch calls by a name such as `NVIDIA H100 80GB HBM3`, None if it is none."""
    try:
        return find_card(re.sub(r"(?i)\b(pcie|sxm\d?|hbm\d?e?|laptop gpu|\d+gb)\b|-", " ", device_name))
    except ValueError:
        return None


def this_card(device: torch.device) -> Card:
    """Return the local card: the memory that no other process uses, and the rates of its namesake in CARDS, if any."""
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    # the query itself created a CUDA context, which the plan counts separately
    usable = min(total, free + CONTEXT_BYTES)
    known = card_called(properties.name) or Card(properties.name, 0.0)
    has_bf16, is_hopper = (properties.major, properties.minor) >= (8, 0), properties.major == 9
    return Card(
        properties.name, usable / GIB, known.bandwidth_gb_s, known.tflops, has_bf16, is_hopper, known.pcie_gb_s, True
    )
