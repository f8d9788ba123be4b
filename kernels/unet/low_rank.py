"""Low-rank adapters on a UNet's frozen layers: y = layer(x) + scale * B(A(dropout(x))), as peft computes them.

An adapter is a submodule of its layer, `layer.adapter`, so the layer keeps its class, its name and its weight, whatever
that weight is held in. A forward hook adds the adapter's part wherever the layer is called as a module. Patched modules
read their layers' weights without calling them; they call `adapted` instead, which projects an input that several
layers share by all their A at once: these are packed as the layers' own weights are (kernels/unet/patch.py).

    LoRA    y + s B(A x)                                        Hu et al. 2021, arXiv:2106.09685
    rsLoRA  the same with s = alpha / sqrt(rank)                Kalajdzievski 2023, arXiv:2312.03732
    DoRA    g (y + s B(A x)), g = magnitude / |W + s B A|,      Liu et al. 2024, arXiv:2402.09353, 4.3
            by output row, with the norm taken as a constant

Dropout draws each layer's mask from a key that is set before every micro-step and the adapter's own number, so that a
resumed run and a recomputed block draw the same one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.kernels.ops.packed_linear import packed_linear


@dataclass
class DropoutKey:
    """What all adapters of a UNet draw their masks by. value: set before each micro-step."""

    value: bytes = b""


class LowRank(nn.Module):
    """The adapter of one linear or convolution layer; see the module's docstring for the formulas.

    lora_A: (rank, in) or (rank, in, h, w); lora_B: (out, rank) or (out, rank, 1, 1); lora_magnitude_vector: (out,) or
    (1, out, 1, 1), None without DoRA; names and shapes are peft's. scaling: s. factor: multiplies s, for pictures with
    less or more of the adapter. number: the adapter's, for its dropout masks.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        rank: int,
        scaling: float,
        *,
        dtype: torch.dtype,
        dropout: float = 0.0,
        dora: bool = False,
        number: int = 0,
        key: DropoutKey | None = None,
    ):
        super().__init__()
        self.scaling, self.factor, self.dropout = scaling, 1.0, dropout
        self._number, self._key = number, key or DropoutKey()
        options = {"dtype": dtype, "device": layer.weight.device}
        if is_convolution(layer):
            shapes = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
            magnitude_shape = (1, layer.out_channels, 1, 1)
        else:
            shapes = (rank, layer.in_features), (layer.out_features, rank)
            magnitude_shape = (layer.out_features,)
        self.lora_A, self.lora_B = (nn.Parameter(torch.empty(shape, **options)) for shape in shapes)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.lora_magnitude_vector = None
        if dora:
            # no buffer: those are cast with the weights
            self._base_norm = row_norms(dense_weight(layer))
            self.lora_magnitude_vector = nn.Parameter(self._base_norm.to(dtype).reshape(magnitude_shape).clone())

    @property
    def scale(self) -> float:
        return self.scaling * self.factor

    @property
    def is_dropping(self) -> bool:
        """Whether an input's elements are dropped now: in training only."""
        return self.training and self.dropout > 0

    def delta(self, weight: Tensor) -> Tensor:
        """Return s B A in the shape of the layer's weight."""
        return self.scale * (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).view(weight.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight that the adapted layer has as a whole. weight: the layer's, fp32."""
        total = weight + self.delta(weight)
        if self.lora_magnitude_vector is None:
            return total
        gain = self.lora_magnitude_vector.flatten() / row_norms(total)
        return gain.view(-1, *[1] * (weight.dim() - 1)) * total

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.is_dropping:
            return x
        # in the order of channels-last images, whatever x's is, so that patched and original UNets draw the same
        rows = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        keep = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        if x.is_meta:
            keep.bernoulli_(1 - self.dropout)
        else:
            seed = hashlib.sha256(self._key.value + self._number.to_bytes(8, "little")).digest()[:8]
            generator = torch.Generator(x.device).manual_seed(int.from_bytes(seed, "little") >> 1)
            keep.bernoulli_(1 - self.dropout, generator=generator)
        keep.mul_(1 / (1 - self.dropout))
        return x * (keep.permute(0, 3, 1, 2) if x.dim() == 4 else keep)

    def forward(
        self, layer: nn.Module, x: Tensor, y: Tensor, bias: Tensor | None = None, projected: Tensor | None = None
    ) -> Tensor:
        """Return the adapted layer's output.

        x, y: the layer's input and output: images (N, C, H, W) of a convolution, else rows (..., features), which a 1x1
        convolution may have as well. bias: what y contains besides the product with the layer's weight. projected:
        A x, if that is known already.
        """
        dropped = self._dropped(x) if projected is None else x
        total = self._add_low_rank(layer, dropped, y, projected)
        if self.lora_magnitude_vector is None:
            return total
        # g z = z + (g - 1) z: in 16 bits g itself would be rounded to steps of half a percent
        more = self._channels(self._gain_less_1(layer).to(y.dtype), y)
        if self.is_dropping:
            # as peft: the layer's own product is of the dropped input, too, in this part
            return total + more * (total - y + _product(layer, dropped))
        return total + more * (total if bias is None else total - self._channels(bias, y))

    def _gain_less_1(self, layer: nn.Module) -> Tensor:
        """Return magnitude / norm - 1 of each output, (out,), fp32 or wider."""
        weight = dense_weight(layer)
        with torch.no_grad():
            norm = row_norms(weight + self.delta(weight).to(weight.dtype))
        magnitude = self.lora_magnitude_vector.flatten()
        if magnitude.dtype.itemsize < 4:
            # it began as the base's norm, rounded: without what was rounded off, the base itself would be another one
            base = self._base_norm = self._base_norm.to(norm.device)
            magnitude = magnitude.float() - base.to(magnitude.dtype).float() + base
        return (magnitude - norm) / norm

    def _channels(self, values: Tensor, y: Tensor) -> Tensor:
        """Return a value for each output feature, in a shape that broadcasts with y."""
        return values.view(-1, 1, 1) if _is_images(self, y) else values

    def _add_low_rank(self, layer: nn.Module, x: Tensor, y: Tensor, projected: Tensor | None) -> Tensor:
        """Return y + s B(A x)."""
        if _is_images(self, x):
            hidden = F.conv2d(x, self.lora_A, None, layer.stride, layer.padding, layer.dilation)
            return torch.add(y, F.conv2d(hidden, self.lora_B), alpha=self.scale)
        hidden = F.linear(x, self.lora_A.flatten(1)) if projected is None else projected
        rows = torch.addmm(
            y.reshape(-1, y.shape[-1]),
            hidden.reshape(-1, hidden.shape[-1]),
            self.lora_B.flatten(1).t(),
            alpha=self.scale,
        )
        return rows.view(*y.shape)


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _is_images(adapter: LowRank, x: Tensor) -> bool:
    return adapter.lora_A.dim() == 4 and x.dim() == 4


def dense_weight(layer: nn.Module) -> Tensor:
    """Return a frozen layer's weight, detached."""
    return layer.weight.detach()


def _product(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's product with x, without its bias."""
    weight = dense_weight(layer)
    if x.dim() == 4 and is_convolution(layer):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight.flatten(1))


def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of each output's weights, (out,), fp32 or wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=dtype)


def adapter_of(layer: nn.Module) -> LowRank | None:
    """Return a layer's adapter, None if it has none."""
    return layer._modules.get("adapter")


def has_adapter(*layers: nn.Module) -> bool:
    """Return whether one of the layers has an adapter."""
    return any("adapter" in layer._modules for layer in layers)


def attach(layer: nn.Module, adapter: LowRank) -> None:
    """Add an adapter to a layer."""
    layer.adapter = adapter
    layer.register_forward_hook(_add_to_output)


def _add_to_output(layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
    # a patched layer whose input is not its own applies its adapter itself
    return y if getattr(layer, "applies_adapter", False) else layer.adapter(layer, args[0], y, layer.bias)


def packed_adapters(layers: Sequence[nn.Module]) -> list[LowRank]:
    """Return the adapters of linear layers with a common input whose A are to be packed: one product projects by all.

    Empty if there are fewer than two, or if each drops elements of the input of its own.
    """
    found = [adapter for layer in layers if (adapter := adapter_of(layer)) is not None]
    return found if len(found) > 1 and all(adapter.dropout == 0 for adapter in found) else []


def adapted(
    layers: Sequence[nn.Module], x: Tensor, ys: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Return what layers with a common input x return with their adapters, given what they return without, ys.

    biases: as `bias` of LowRank.forward, for each layer; None: none.
    """
    if not has_adapter(*layers):
        return list(ys)
    packed = packed_adapters(layers)
    projected = (
        dict(zip(packed, packed_linear(x, [adapter.lora_A for adapter in packed]), strict=True)) if packed else {}
    )
    return [
        y if (adapter := adapter_of(layer)) is None else adapter(layer, x, y, bias, projected.get(adapter))
        for layer, y, bias in zip(layers, ys, biases or [None] * len(ys), strict=True)
    ]
