"""Replacements for diffusers' transformer modules: same Parameters under the same names, another forward pass.

    tokens = linear(group_norm(x))                  entry
    q, k, v = linear(layer_norm(tokens))            self-attention: one matmul with packed weights
    s = tokens + out(attention(q, k, v))            the residual add is part of the next norm
    q = linear(layer_norm(s))                       cross-attention: k and v come from the shared text projections
    s = s + out(attention(q, k, v))                 likewise
    s = s + linear(geglu(linear(layer_norm(s))))    feed-forward
    y = linear(s) + x                               exit

Tokens are the pixels of channels-last images, so converting between the two is a view. The gradients of several biases
are computed by the norm next to them (kernels/ops/norm_then_matmul.py), which is why they are added detached.
Letters: B batch, T tokens, N text tokens, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.kernels.ops.geglu import geglu
from safelight.kernels.ops.group_norm_silu import group_norm_silu
from safelight.kernels.ops.layer_norm import add_layer_norm, layer_norm
from safelight.kernels.ops.norm_then_matmul import as_images, as_tokens, feed_forward, group_norm_linear, norm_linear
from safelight.kernels.ops.packed_linear import norm_packed_linear, packed_linear
from safelight.kernels.unet.attention import AttendProcessor, AttentionChoice, attend
from safelight.kernels.unet.low_rank import adapted, has_adapter
from safelight.kernels.unet.patched_resnet import PatchedModule, channels_last, detached, is_norm, is_plain_conv

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_2d import Transformer2DModel


def _is_plain_attention(attention: nn.Module) -> bool:
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    # `attend` computes what these do
    processors = (AttendProcessor, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor)
    norms = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k)
    return (
        type(attention) is Attention
        and type(attention.processor) in processors
        and all(x is None for x in norms)
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.added_kv_proj_dim is None
        and all(type(x) is nn.Linear and x.bias is None for x in (attention.to_q, attention.to_k, attention.to_v))
        and type(attention.to_out[0]) is nn.Linear
        and attention.to_out[1].p == 0
    )


def _is_plain_feed_forward(ff: nn.Module) -> bool:
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import FeedForward

    return (
        type(ff) is FeedForward
        and len(ff.net) == 3
        and type(ff.net[0]) is GEGLU
        and type(ff.net[0].proj) is nn.Linear
        and type(ff.net[1]) is nn.Dropout
        and ff.net[1].p == 0
        and type(ff.net[2]) is nn.Linear
    )


def qkv_layers(block: BasicTransformerBlock) -> list[nn.Linear]:
    """Return the layers that project the input of a block's self-attention."""
    return [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]


def text_layers(blocks: Sequence[BasicTransformerBlock]) -> list[nn.Linear]:
    """Return the layers that project the text, in the order of the blocks."""
    return [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]


def qkv_parameters(block: BasicTransformerBlock) -> list[nn.Parameter]:
    """Return the weights of a block's self-attention that must be packed: q, k, v."""
    return [layer.weight for layer in qkv_layers(block)]


def text_parameters(blocks: Sequence[BasicTransformerBlock]) -> list[nn.Parameter]:
    """Return the key and value weights of cross-attentions, which must be packed, in the order of the blocks."""
    return [layer.weight for layer in text_layers(blocks)]


def text_projections(blocks: Sequence[BasicTransformerBlock], text_BND: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (keys, values) of each block's cross-attention, (B, N, H K) each, from one matmul."""
    pieces = adapted(text_layers(blocks), text_BND, packed_linear(text_BND, text_parameters(blocks)))
    return list(zip(pieces[::2], pieces[1::2], strict=True))


class PatchedTransformerBlock(PatchedModule):
    """Self-attention, cross-attention and feed-forward of tokens.

    input_proj: the projection that made the tokens, in a tuple, if it adds its bias detached and this block computes
    that bias's gradient; choice: the attention backends; text_index: the block's index into the shared text
    projections;
    recompute: recompute the feed-forward's first projection in the backward pass instead of saving it.
    """

    input_proj: tuple[nn.Module, ...] = ()
    choice: AttentionChoice
    text_index: int
    recompute: bool

    @staticmethod
    def why_unsupported(block: BasicTransformerBlock) -> str:
        """Return why a block cannot be patched, '' if it can."""
        norms = (block.norm1, block.norm2, block.norm3)
        if block.norm_type != "layer_norm" or not all(is_norm(norm, nn.LayerNorm) for norm in norms):
            return "its norms are not plain LayerNorm"
        if block.attn2 is None or block.only_cross_attention or block.pos_embed is not None or hasattr(block, "fuser"):
            return "it is not one self-attention, one cross-attention and one feed-forward"
        if not (_is_plain_attention(block.attn1) and _is_plain_attention(block.attn2)):
            return "its attention has norms, biases, dropout or a custom processor"
        if block.attn1.is_cross_attention or not block.attn2.is_cross_attention:
            return "it has two self-attentions"
        if not _is_plain_feed_forward(block.ff) or block._chunk_size is not None:
            return "its feed-forward is not plain GEGLU"
        return ""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | Sequence[tuple[Tensor, Tensor]] | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        """Return the tokens, (B, T, D). encoder_hidden_states: the text, or all blocks' keys and values."""
        attn1, attn2, proj, out = self.attn1, self.attn2, self.ff.net[0].proj, self.ff.net[2]
        norm1, norm2, norm3 = self.norm1, self.norm2, self.norm3
        # the projection that made the tokens leaves its bias's gradient to norm1
        input_bias = self.input_proj[0].bias if self.input_proj else None
        # an adapter needs the norm's output, which the fused functions do not keep; beside it all biases are frozen
        if has_adapter(*qkv_layers(self)):
            s = hidden_states.contiguous()
            h = layer_norm(s, norm1.weight, norm1.bias, norm1.eps)
            qkv = adapted(qkv_layers(self), h, packed_linear(h, qkv_parameters(self)))
        else:
            s, *qkv = norm_packed_linear(
                hidden_states, norm1.weight, norm1.bias, qkv_parameters(self), input_bias=input_bias, eps=norm1.eps
            )
        x = self._attend(attn1, *qkv)
        if has_adapter(attn2.to_q):
            s, h = add_layer_norm(x, s, norm2.weight, norm2.bias, norm2.eps)
            (q,) = adapted([attn2.to_q], h, [F.linear(h, attn2.to_q.weight)])
        else:
            s, q = norm_linear(
                x,
                norm2.weight,
                norm2.bias,
                attn2.to_q.weight,
                residual=s,
                input_bias=attn1.to_out[0].bias,
                eps=norm2.eps,
            )
        text = encoder_hidden_states
        k, v = text_projections([self], text)[0] if isinstance(text, Tensor) else text[self.text_index]
        x = self._attend(attn2, q, k, v)
        if has_adapter(proj, out):
            s, h = add_layer_norm(x, s, norm3.weight, norm3.bias, norm3.eps)
            (h,) = adapted([proj], h, [F.linear(h, proj.weight, proj.bias)], [proj.bias])
            h = geglu(h)
            return adapted([out], h, [F.linear(h, out.weight, out.bias)], [out.bias])[0] + s
        return feed_forward(
            x,
            norm3.weight,
            norm3.bias,
            proj.weight,
            proj.bias,
            out.weight,
            out.bias,
            residual=s,
            input_bias=attn2.to_out[0].bias,
            eps=norm3.eps,
            recompute=self.recompute,
        )

    def _attend(self, attention: Attention, *qkv: Tensor) -> Tensor:
        """Return the projected attention of q, k, v, (B, T, H K) each; the next norm computes the bias's gradient."""
        heads = (x.unflatten(-1, (attention.heads, -1)) for x in qkv)
        out = attention.to_out[0]
        x, bias = attend(*heads, self.choice, attention.scale).flatten(2), detached(out.bias)
        return adapted([out], x, [F.linear(x, out.weight, bias)], [bias])[0]


class PatchedTransformer(PatchedModule):
    """An image to tokens, through the blocks, and back to an image."""

    @staticmethod
    def why_unsupported(module: Transformer2DModel) -> str:
        """Return why a module cannot be patched, '' if it can."""
        projections = (module.proj_in, module.proj_out)
        plain = all(type(p) is nn.Linear or is_plain_conv(p, 1) for p in projections)
        if not module.is_input_continuous or not plain or not is_norm(module.norm, nn.GroupNorm):
            return "it is not a GroupNorm, a projection, blocks and a projection"
        return ""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states=None,
        timestep=None,
        added_cond_kwargs=None,
        class_labels=None,
        cross_attention_kwargs=None,
        attention_mask=None,
        encoder_attention_mask=None,
        return_dict: bool = True,
    ):
        """Return the image. Raises ValueError for attention masks and arguments, which are not supported."""
        if attention_mask is not None or encoder_attention_mask is not None or cross_attention_kwargs:
            raise ValueError(
                "a patched UNet takes no attention mask and no cross_attention_kwargs; "
                "call safelight.kernels.unet.patch.remove first"
            )
        x = channels_last(hidden_states)
        norm, into, out = self.norm, self.proj_in, self.proj_out
        first = self.transformer_blocks[0]
        into_bias = detached(into.bias) if getattr(first, "input_proj", ()) else into.bias
        if has_adapter(into):
            h = as_tokens(group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False))
            (tokens,) = adapted([into], h, [F.linear(h, into.weight.flatten(1), into_bias)], [into_bias])
        else:
            x, tokens = group_norm_linear(
                x, norm.weight, norm.bias, norm.num_groups, into.weight, into_bias, eps=norm.eps, skip_bias=out.bias
            )
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, None, encoder_hidden_states)
            else:
                tokens = block(tokens, None, encoder_hidden_states)
        bias = detached(out.bias)
        (exit_tokens,) = adapted([out], tokens, [F.linear(tokens, out.weight.flatten(1), bias)], [bias])
        tokens = exit_tokens + as_tokens(x)
        image = as_images(tokens, *x.shape[2:])
        if not return_dict:
            return (image,)
        from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=image)


class PatchedUNet(PatchedModule):
    """A UNet that projects the text once per step. text_groups: blocks by shared matmul, in the order of text_index."""

    text_groups: tuple[tuple[BasicTransformerBlock, ...], ...]

    def process_encoder_hidden_states(self, *args, **kwargs):
        text_BND = super().process_encoder_hidden_states(*args, **kwargs)
        if not self.text_groups:
            return text_BND
        return [pair for group in self.text_groups for pair in text_projections(group, text_BND)]
