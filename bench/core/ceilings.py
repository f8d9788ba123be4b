"""The ceilings of a roofline, measured on this device: matrix multiplication rate and copy bandwidth."""

from __future__ import annotations

import torch

from safelight.bench.core.harness import interleave

NUM_ROTATED = 3
# for a CPU: side of the matrices, bytes copied, repeats
SMALL = (1024, 2**27, 5)


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """Return the rate of square matrix multiplication in TFLOP/s, from the fastest repeat."""
    pairs = [tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2)) for _ in range(NUM_ROTATED)]
    seconds = interleave({"": lambda n: torch.mm(*pairs[n % NUM_ROTATED])}, device, repeats)[""]
    return 2 * size**3 / min(seconds) / 1e12


def copy_gb_per_s(device: torch.device, num_bytes: int = 2**30, repeats: int = 10) -> float:
    """Return the bandwidth of copies within the device's memory in GB/s, read plus written, from the fastest repeat."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = interleave({"": lambda n: target.copy_(source)}, device, repeats)[""]
    return 2 * num_bytes / min(seconds) / 1e9


def ceilings(device: torch.device, dtype: torch.dtype, small: bool = False) -> dict:
    """Return both ceilings as figures. small: use the sizes for a CPU."""
    size, num_bytes, repeats = SMALL if small else (8192, 2**30, 20)
    return {
        "matmul_tflops": round(matmul_tflops(device, dtype, size, repeats), 4),
        "copy_gb_per_s": round(copy_gb_per_s(device, num_bytes, repeats), 3),
    }
