"""Attention in a diffusers UNet: the shapes to choose backends for, and the processor that runs the chosen ones."""

from __future__ import annotations

import re

from torch import Tensor, nn

from safelight.kernels.unet.attention_backends import AttentionChoice, Case, attend, attention_operators
from safelight.kernels.unet.attention_probe import allowed_backends, choose_attention

__all__ = [
    "AttendProcessor",
    "AttentionChoice",
    "Case",
    "allowed_backends",
    "apply_attention",
    "attend",
    "attention_cases",
    "attention_modules",
    "attention_operators",
    "choose_attention",
    "head_dim_of",
]

NUM_TEXT_TOKENS = 77


def attention_modules(unet: nn.Module) -> list[nn.Module]:
    """Return a diffusers UNet's attention modules, both self- and cross-attention."""
    return [m for m in unet.modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")]


def head_dim_of(attention: nn.Module) -> int:
    """Return the head dim of a diffusers Attention."""
    return attention.inner_dim // attention.heads


def attention_cases(unet: nn.Module, latent_hw: tuple[int, int] | None = None) -> set[Case]:
    """Return the attention shapes of a UNet2DConditionModel with NUM_TEXT_TOKENS tokens of text.

    latent_hw: height and width of the latents; None for the model's native size.
    """
    side = unet.config.sample_size
    height, width = latent_hw or ((side, side) if isinstance(side, int) else side)
    num_levels = len(unet.config.block_out_channels)
    cases = set()
    for name, module in unet.named_modules():
        if not (hasattr(module, "set_processor") and hasattr(module, "to_q")):
            continue
        down, up = re.match(r"down_blocks\.(\d+)\.", name), re.match(r"up_blocks\.(\d+)\.", name)
        level = int(down[1]) if down else num_levels - 1 - (int(up[1]) if up else 0)
        # each level halves height and width, rounding up
        queries = -(-height // 2**level) * -(-width // 2**level)
        keys = NUM_TEXT_TOKENS if module.is_cross_attention else queries
        cases.add(Case(head_dim_of(module), module.heads, queries, keys))
    return cases


class AttendProcessor:
    """An attention processor for diffusers that calls `attend`: no transposed or copied heads, no division by 1."""

    def __init__(self, choice: AttentionChoice):
        self.choice = choice

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the attention's output, (B, T, D). Raises ValueError for a mask."""
        if attention_mask is not None:
            raise ValueError("attention with a mask is not supported here; pass no mask, or use diffusers' processors")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, head_dim_of(attn))
        q = attn.to_q(hidden_states).unflatten(-1, heads)
        k = attn.to_k(context).unflatten(-1, heads)
        v = attn.to_v(context).unflatten(-1, heads)
        out = attn.to_out[0](attend(q, k, v, self.choice).flatten(2))
        out = attn.to_out[1](out)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _is_plain(attention: nn.Module) -> bool:
    """Return whether an attention module is as in SD's UNets: no norms of its own, no added projections."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return all(not isinstance(getattr(attention, name, None), nn.Module) for name in extras)


def apply_attention(unet: nn.Module, choice: AttentionChoice) -> list[str]:
    """Make a UNet's attention modules use `choice`; return the names of those unchanged, which do more than attend."""
    unchanged = []
    for name, module in unet.named_modules():
        if not (hasattr(module, "set_processor") and hasattr(module, "to_q")):
            continue
        if _is_plain(module):
            module.set_processor(AttendProcessor(choice))
        else:
            unchanged.append(name)
    return unchanged
