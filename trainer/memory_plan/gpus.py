"""What a plan takes of cards: memory, bandwidth, matrix rate, and constants for what a trace does not see.

Nothing here was measured by this project. usable_gib: the total that torch names in its out-of-memory messages under Linux,
from public issue threads (a desktop's own use comes off it); bandwidth_gb_s: the maker's data sheet, GB/s of 10^9;
tflops: 16-bit matrix products accumulated in fp32, of the data sheet without sparsity unless said otherwise; pcie_gb_s: of
the card's own link one way, 8, 16 or 32 GT/s a lane coded 128 in 130 (PCI-SIG, generations 3, 4 and 5), 16 lanes but where
said: a slower slot has less.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from safelight.errors import UserError
from safelight.units import GIB, MIB

# what the CUDA context and the loaded kernels take beside torch's allocator; 0.5 GiB is what the goals suppose [not measured]
CONTEXT_BYTES = GIB // 2
# what cuBLAS and cublasLt take of torch's allocator for each handle and stream that multiplies on it, and keep: 4096 KiB x 2 +
# 16 KiB x 8, 32 MiB on Hopper; CUBLAS_WORKSPACE_CONFIG=:4096:8, which run.deterministic sets; cublasLt's 1024 KiB
# (parseChosenWorkspaceSize and parseCUDABlasLtWorkspaceSize of ATen/cuda/CublasHandlePool.cpp, torch 2.11)
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER, CUBLAS_BYTES_DETERMINISTIC, CUBLASLT_BYTES = 8_519_680, 32 * MIB, 32 * MIB, MIB
# a handle each: the thread that goes forward, and autograd's for the device, which goes backward and makes activations again
NUM_CUBLAS_HANDLES = 2
# scratch that cuDNN's convolutions ask for, a guess at the largest of SD's layers [not measured]
CUDNN_BYTES = 64 * MIB
# what a CUDA graph takes for each launch, beside torch's allocator: about 10 KB a kernel node, NVIDIA/cccl pull request 3768
GRAPH_BYTES_A_LAUNCH = 10 << 10
# of what a step allocates and frees: what the allocator reserves beyond it, a guess [not measured]
FRAGMENTATION = 0.05
# share of a card's matrix rate that convolutions and products of SD's shapes reach; what the goals suppose [not measured]
MATRIX_EFFICIENCY = 0.6
# host time of a launched operator of an eager step: 50 to 80 ms for 2,750 to 4,760 launches, as the goals suppose [not measured]
SECONDS_A_LAUNCH = 17e-6
# device time from one kernel to the next, an estimate: at most what 80 kernels of almost no work take in a CUDA graph, 70 us in
# CUDA.jl's documentation of graphs, card not named [not measured]
SECONDS_A_KERNEL = 1e-6
# share of the link's rate that large copies from pinned memory reach [not measured]
PCIE_EFFICIENCY = 0.8
# share of a step's time that its backward pass takes: two thirds of the matrix work [counted, not timed]
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Card:
    """A card. has_bf16: bf16 arithmetic, cc >= 8.0; the rates are None where they are not known; is_here: in this machine."""

    name: str
    usable_gib: float
    bandwidth_gb_s: float | None = None
    tflops: float | None = None
    has_bf16: bool = True
    is_hopper: bool = False
    pcie_gb_s: float | None = None
    is_here: bool = False

    def cublas_bytes(self, *, is_deterministic: bool) -> int:
        """Return the bytes of products' workspace for one thread on one stream."""
        if is_deterministic:
            return CUBLAS_BYTES_DETERMINISTIC + CUBLASLT_BYTES
        return (CUBLAS_BYTES_HOPPER if self.is_hopper else CUBLAS_BYTES) + CUBLASLT_BYTES

    def workspace(self, *, is_deterministic: bool) -> int:
        """Return the bytes that libraries take of torch's allocator for steps on one stream."""
        return NUM_CUBLAS_HANDLES * self.cublas_bytes(is_deterministic=is_deterministic) + CUDNN_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """What model.precision = auto trains in."""
        return torch.bfloat16 if self.has_bf16 else torch.float16

    def seconds(
        self,
        flops: int,
        bytes_moved: int,
        launches: int,
        offloaded: int = 0,
        paged: int = 0,
        is_fused: bool = False,
        is_replayed: bool = False,
    ) -> float | None:
        """Return an estimate of a step's time: matrix work, memory traffic and the way from kernel to kernel, one after another.

        is_replayed: as a CUDA graph; if not, the host's launches are what counts where they take longer.

        offloaded: bytes that go to the host and come back by one stream, beside all else. paged: bytes of optimizer state
        that stream in and out, both ways at once: beside the backward pass where the step is taken in it, after it if not.
        """
        if self.tflops is None or self.bandwidth_gb_s is None or (self.pcie_gb_s is None and offloaded + paged):
            return None
        device = flops / (self.tflops * 1e12 * MATRIX_EFFICIENCY) + bytes_moved / (self.bandwidth_gb_s * 1e9)
        device += launches * SECONDS_A_KERNEL
        step = device if is_replayed else max(device, launches * SECONDS_A_LAUNCH)
        if not offloaded + paged:
            return step
        link = self.pcie_gb_s * 1e9 * PCIE_EFFICIENCY
        before = step * (1 - BACKWARD_SHARE) if is_fused else step
        return max(step, 2 * offloaded / link, before + paged / link)


_GEN3, _GEN4, _GEN5 = (16 * rate * 128 / 130 / 8 for rate in (8, 16, 32))
CARDS = {
    card.name: card
    for card in (
        # 65 TFLOP/s on paper; 24 is what its 70 W sustain
        Card("t4", 14.56, 320, 24, has_bf16=False, pcie_gb_s=_GEN3),
        # consumer cards accumulate in fp32 at half their fp16 rate; 25.6 and 165 are the figures the goals suppose
        Card("rtx3060", 11.75, 360, 25.6, pcie_gb_s=_GEN4),
        Card("rtx3090", 23.69, 936, 71, pcie_gb_s=_GEN4),
        # eight lanes
        Card("rtx4060", 7.63, 272, 30.2, pcie_gb_s=_GEN4 / 2),
        Card("rtx4090", 23.64, 1008, 165, pcie_gb_s=_GEN4),
        Card("l4", 22.03, 300, 121, pcie_gb_s=_GEN4),
        Card("a100", 39.39, 1555, 312, pcie_gb_s=_GEN4),
        Card("a100-80gb", 79.25, 2039, 312, pcie_gb_s=_GEN4),
        Card("h100", 79.1, 3350, 989, is_hopper=True, pcie_gb_s=_GEN5),
        # 790 measured of 989 on paper, by the study of this project's goals
        Card("h200", 139.8, 4800, 790, is_hopper=True, pcie_gb_s=_GEN5),
    )
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gib|gb|g)", re.IGNORECASE)


def find_card(name: str) -> Card:
    """Return a card by its name, or one of `8GiB` whose rates are not known. Raises UserError, naming the nearest."""
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
    told = f"did you mean {by_plain[near[0]].name}?" if near else f"known: {', '.join(CARDS)}."
    raise UserError(f"--gpu {name!r} is no card of the table; {told} Or give its memory: 8GiB")


def this_card(device: torch.device) -> Card:
    """Return the card that is here: the memory that nobody else uses, and the rates of the table's card of that name, if any."""
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    # asking has made the CUDA context, which is a plan's own
    usable = min(total, free + CONTEXT_BYTES)
    try:
        known = find_card(re.sub(r"(?i)\b(pcie|sxm\d?|hbm\d?e?|laptop gpu|\d+gb)\b|-", " ", found.name))
    except ValueError:
        known = Card(found.name, 0.0)
    has_bf16, is_hopper = (found.major, found.minor) >= (8, 0), found.major == 9
    return Card(
        found.name, usable / GIB, known.bandwidth_gb_s, known.tflops, has_bf16, is_hopper, known.pcie_gb_s, True
    )
