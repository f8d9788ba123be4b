"""What a card can do at most: the rate of matrix products, the bandwidth of copies, attention by backend and head dim."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from safelight.bench.harness import interleave, percentiles

NUM_ROTATED = 3
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# (heads, tokens, head dim) of SD1.5's self-attention at 64x64 latents, and of SD2.x's and SDXL's first level
ATTENTION_SHAPES = ((8, 4096, 40), (8, 1024, 80), (8, 256, 160), (5, 4096, 64), (10, 4096, 64))


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """Return the rate of square matrix products, TFLOP/s, the p50 of repeats."""
    pairs = [tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2)) for _ in range(NUM_ROTATED)]
    seconds = interleave({"": lambda n: torch.mm(*pairs[n % NUM_ROTATED])}, device, repeats)[""]
    return 2 * size**3 / percentiles(seconds)[1] / 1e12


def copy_gb_per_s(device: torch.device, num_bytes: int = 2**30, repeats: int = 10) -> float:
    """Return the bandwidth of copies in one memory, GB/s read plus written, the p50 of repeats."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = interleave({"": lambda n: target.copy_(source)}, device, repeats)[""]
    return 2 * num_bytes / percentiles(seconds)[1] / 1e9


def ceilings(device: torch.device, dtype: torch.dtype, small: bool = False) -> dict:
    """Return both ceilings. small: sizes for a CPU."""
    size, num_bytes, repeats = (1024, 2**27, 5) if small else (8192, 2**30, 20)
    return {
        "matmul_tflops": round(matmul_tflops(device, dtype, size, repeats), 4),
        "copy_gb_per_s": round(copy_gb_per_s(device, num_bytes, repeats), 3),
    }


def _attend(name: str, q, k, v) -> torch.Tensor:
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    with sdpa_kernel(BACKENDS[name]) if name in BACKENDS else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def _pass(name: str, q, k, v, grad) -> Callable[[int], None]:
    def run(number: int) -> None:
        torch.autograd.grad(_attend(name, q, k, v), (q, k, v), grad)

    return run


def attention_ms(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, tokens: int, head_dim: int, repeats: int = 10
) -> dict[str, float | str]:
    """Return milliseconds of a forward and backward pass by backend, interleaved; why not, for one that cannot."""
    shape = (batch, heads, tokens, head_dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, device=device).to(dtype)
    runs, found = {}, {}
    for name in (*BACKENDS, "xformers"):
        run = _pass(name, q, k, v, grad)
        try:
            run(0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            runs[name] = run
        except (RuntimeError, NotImplementedError, ValueError, ImportError, OSError) as error:
            found[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
    seconds = interleave(runs, device, repeats)
    return {**found, **{name: round(1e3 * percentiles(s)[1], 4) for name, s in seconds.items()}}
