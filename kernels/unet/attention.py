"""Attention of a diffusers UNet by the backend that was chosen for it: which shapes it has, and its processor."""

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
    """Return a diffusers UNet's attention modules, self- and cross-."""
    return [m for m in unet.modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")]


def head_dim_of(attention: nn.Module) -> int:
    """Return a diffusers Attention's head dim."""
    return attention.inner_dim // attention.heads


def attention_cases(unet: nn.Module, latent_hw: tuple[int, int] | None = None) -> set[Case]:
    """Return the shapes of a UNet2DConditionModel's attention with NUM_TEXT_TOKENS tokens of text.

    latent_hw: height and width of the latents; None for the model's own size.
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
        # each downsampling halves, rounding up
        queries = -(-height // 2**level) * -(-width // 2**level)
        keys = NUM_TEXT_TOKENS if module.is_cross_attention else queries
        cases.add(Case(head_dim_of(module), module.heads, queries, keys))
    return cases


class AttendProcessor:
    """diffusers' attention processor that attends by `attend`: no transposed or copied heads, no division by 1."""

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
        """Return the attended hidden states, (B, T, D). Raises ValueError for a mask."""
        if attention_mask is not None:
            raise ValueError(
                "attention with a mask is not supported here; give the UNet none, or diffusers' processors"
            )
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, head_dim_of(attn))
        q = attn.to_q(hidden_states).unflatten(-1, heads)
        k = attn.to_k(seen).unflatten(-1, heads)
        v = attn.to_v(seen).unflatten(-1, heads)
        attended = attn.to_out[0](attend(q, k, v, self.choice).flatten(2))
        attended = attn.to_out[1](attended)
        if attn.residual_connection:
            attended = attended + hidden_states
        return attended if attn.rescale_output_factor == 1 else attended / attn.rescale_output_factor


def _is_plain(attention: nn.Module) -> bool:
    """Return whether a module attends as SD's UNets do: no norm inside, no added projections, three dimensions."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return all(not isinstance(getattr(attention, name, None), nn.Module) for name in extras)


def apply_attention(unet: nn.Module, choice: AttentionChoice) -> list[str]:
    """Let a UNet's attention modules attend by `choice`; return the names of those left as they are, which do more."""
    left = []
    for name, module in unet.named_modules():
        if not (hasattr(module, "set_processor") and hasattr(module, "to_q")):
            continue
        if _is_plain(module):
            module.set_processor(AttendProcessor(choice))
        else:
            left.append(name)
    return left
