"""Which attention really runs, found by running it.

xformers' memory-efficient attention is taken for a head dim where a forward and a backward pass succeed on this
device and dtype; else PyTorch's scaled_dot_product_attention. The choice is made once, per head dim, and printed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn

NUM_PROBE_TOKENS = 64


@dataclass(frozen=True)
class AttentionChoice:
    """backends: head dim -> xformers | sdpa; reasons: head dim -> why xformers was not taken ('' where it was)."""

    device: str
    dtype: str
    backends: dict[int, str]
    reasons: dict[int, str]

    def __str__(self) -> str:
        parts = []
        for backend in ("xformers", "sdpa"):
            dims = sorted(d for d, b in self.backends.items() if b == backend)
            if dims:
                why = {self.reasons[d] for d in dims} - {""}
                note = f" ({'; '.join(sorted(why))})" if why else ""
                parts.append(f"{backend} for head dim {', '.join(map(str, dims))}{note}")
        return f"attention on {self.device}, {self.dtype}: " + "; ".join(parts)


def _probe_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return '' if xformers attends forward and backward here, else why not."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError) as error:
        return f"xformers cannot be imported: {str(error)[:80]}"
    q, k, v = (
        torch.randn(1, NUM_PROBE_TOKENS, 2, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    try:
        memory_efficient_attention(q, k, v).sum().backward()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # xformers lists the reasons operator by operator; its first line says what was asked
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"xformers: {reason[:80]}"
    if not all(torch.isfinite(x.grad).all() for x in (q, k, v)):
        return "xformers: gradients are not finite"
    return ""


def choose_attention(device: torch.device, dtype: torch.dtype, head_dims: set[int]) -> AttentionChoice:
    """Return the backend of each head dim on a device and dtype, probed forward and backward."""
    if device.type == "cpu":
        reasons = dict.fromkeys(head_dims, "xformers has no CPU operator")
    else:
        reasons = {dim: _probe_xformers(device, dtype, dim) for dim in sorted(head_dims)}
    backends = {dim: "sdpa" if why else "xformers" for dim, why in reasons.items()}
    return AttentionChoice(str(device), str(dtype).removeprefix("torch."), backends, reasons)


def attention_modules(unet: nn.Module) -> list[nn.Module]:
    """Return a diffusers UNet's attention modules, self- and cross-."""
    return [m for m in unet.modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")]


def head_dim_of(attention: nn.Module) -> int:
    """Return a diffusers Attention's head dim."""
    return attention.inner_dim // attention.heads


def apply_attention(unet: nn.Module, choice: AttentionChoice) -> None:
    """Set each attention module's processor to the backend chosen for its head dim."""
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    for module in attention_modules(unet):
        backend = choice.backends[head_dim_of(module)]
        module.set_processor(XFormersAttnProcessor() if backend == "xformers" else AttnProcessor2_0())
