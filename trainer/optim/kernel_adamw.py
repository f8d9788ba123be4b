"""Our AdamW with 8-bit moments over the UNet: one launch over all tensors with 8-bit moments, one over the small ones.

Nothing is asked of the device: norm, clipping, loss scale and whether a step is taken are numbers on it.

Fused, the step is taken inside backward: when the last gradient of a part of the UNet (a ResNet, a transformer) is there, its
weights are stepped and its gradients freed. Then no global norm is known in time: `lagged` clips by the step before's,
`per-tensor` each tensor by its own. A tensor whose gradient is not finite is skipped, alone, and counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.adamw8bit import MIN_8BIT_ELEMENTS, AdamW8bit
from safelight.kernels.optim.adamw8bit_state import load_state, load_value, state_of
from safelight.kernels.optim.blockwise_8bit import in_memory_order
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.split_weights import REMAINDERS, split_nearest
from safelight.kernels.unet.patch import shared_projections
from safelight.trainer.config.toml import Optimizer as OptimizerConfig
from safelight.trainer.optim.gradient_buffers import GradientBuffers

# elements that are brought to 16 bits at a time, and bytes of the device an element takes meanwhile, at most (test_fit)
SPLIT_ELEMENTS = 2**22
SPLIT_BYTES = 32


def _to_16_bit(
    p: nn.Parameter, dtype: torch.dtype, memory: str, device: torch.device, beside: Tensor | None = None
) -> Tensor | None:
    """Bring a parameter to a device and a dtype in its memory order; return what stands beside it, in `beside` if given.

    The fp32 values pass the device by pieces, and their old memory is freed.
    """
    source, kept = p.detach(), REMAINDERS[memory]
    weight = torch.empty_like(source, dtype=dtype, device=device)
    if kept is not None and beside is None:
        beside = torch.empty_like(source, dtype=kept, device=device)
    p.data = weight
    if source.is_meta:
        # no values to split, and on meta tensors each operator costs as much as a large one
        return beside
    flat = [None if x is None else in_memory_order(x).split(SPLIT_ELEMENTS) for x in (source, weight, beside)]
    for index, piece in enumerate(flat[0]):
        high, low = split_nearest(piece.to(device).float(), dtype, memory)
        flat[1][index].copy_(high)
        if low is not None:
            flat[2][index].copy_(low)
    return beside


@dataclass
class _Step:
    """A step under way inside backward. waiting: of each part not stepped yet, the parameters without a gradient."""

    scale: Tensor
    waiting: dict[str, set[str]]


def part_of(name: str) -> str:
    """Return the part of a UNet that a parameter is stepped with: `up_blocks.1.attentions.0`, `conv_in`.

    A transformer's first block goes with its norm and projections, each further block (SDXL has ten) by itself:
    `up_blocks.0.attentions.0.transformer_blocks.9`.
    """
    words = name.split(".")
    if "transformer_blocks" in words:
        place = words.index("transformer_blocks") + 1
        if words[place] != "0":
            return ".".join(words[: place + 1])
    if words[0] == "mid_block":
        return ".".join(words[:3])
    return ".".join(words[:4]) if words[0] in ("down_blocks", "up_blocks") else words[0]


class KernelAdamW:
    """Steps a module's parameters by our kernels; a parameter's place among the trained ones keys its stochastic rounding."""

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        config: OptimizerConfig,
        dtype: torch.dtype,
        memory: str,
        seed: int,
        device: torch.device,
    ):
        self.parameters, self.memory, self.buffers = parameters, memory, GradientBuffers(parameters)
        self._places = {name: place for place, name in enumerate(parameters)}
        # or a block's gradients would wait for those of a product that it shares, which come last
        shared = shared_projections(module)
        self._part_of = {name: shared.get(name) or part_of(name) for name in parameters}
        self._parts: dict[str, list[str]] = {}
        for name in parameters:
            self._parts.setdefault(self._part_of[name], []).append(name)
        remainders, pages = None, self.make_pages(device) if memory == "paged" else None
        kept = "exact" if memory == "paged" else memory
        if dtype != torch.float32:
            with torch.no_grad():
                # one after the other: the fp32 weights and their 16-bit pairs never stand side by side
                remainders = [
                    _to_16_bit(
                        p,
                        dtype,
                        kept,
                        device,
                        pages.at_home(i)["remainder"] if pages is not None and i in pages else None,
                    )
                    for i, p in enumerate(parameters.values())
                ]
            module.to(device, dtype)
        self.inner = AdamW8bit(
            list(parameters.values()), config.betas, config.eps, kept, seed, remainders=remainders, pages=pages
        )
        self.clipping = config.clipping_mode()
        device = self.inner.skips.device
        # of the last step whose norm was finite, 0 before any; tensors skipped inside backward since the run began
        self.last_norm = torch.zeros((), device=device)
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        # to clip by: infinite where nothing is clipped
        self._limit = torch.full((), float("inf"), device=device)
        self._norms = torch.zeros(len(parameters), device=device)
        self._under_way: _Step | None = None
        if config.is_fused:
            for name, p in parameters.items():
                p.register_post_accumulate_grad_hook(functools.partial(self._arrived, name))

    def make_pages(self, device: torch.device) -> Pages | None:
        """Return host memory for the state of everything with 8-bit moments, by parts; None where nothing is as large."""
        large = {self._places[name]: p for name, p in self.parameters.items() if p.numel() >= MIN_8BIT_ELEMENTS}
        groups = [[self._places[name] for name in names] for names in self._parts.values()]
        return Pages(large, [[i for i in group if i in large] for group in groups], device=device) if large else None

    @property
    def master(self) -> dict[str, Tensor]:
        """The fp32 weights by name, in memory mode fp32; no others are held whole."""
        if self.memory != "fp32":
            return {}
        return {name: self.value(name) for name in self.parameters}

    def value(self, name: str) -> Tensor:
        return self.inner.value(self._places[name])

    def _take_gradients(self, names: Iterable[str]) -> list[Tensor]:
        """Take the gradients from parameters; one the loss did not reach gets zeros."""
        taken = ((self.parameters[name], self.buffers.take(name)) for name in names)
        return [torch.zeros_like(p) if g is None else g for p, g in taken]

    def set_hyper(self, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        """Write the numbers of the steps to come to the device."""
        self.inner.set_hyper(lr, weight_decay)
        self._limit.fill_(max_grad_norm if max_grad_norm > 0 else float("inf"))

    def rehearse(self, wanted: bool) -> None:
        """Let the steps to come skip every tensor, or no longer."""
        self.inner.is_rehearsing, self._under_way = wanted, None

    def counters(self) -> list[Tensor]:
        """Return what steps change beside the weights and their state."""
        return [self.last_norm, self.num_skipped]

    def _clipping(self, norm: Tensor) -> Tensor:
        """Return what to multiply gradients of a norm by."""
        return ((norm + 1e-6).reciprocal() * self._limit).clamp(max=1.0)

    def arm(self, scale: Tensor) -> None:
        """Let the coming backward pass step what it has gradients of. Fused only; before the last micro-step's backward."""
        self.inner.begin()
        self._under_way = _Step(scale, {part: set(names) for part, names in self._parts.items()})

    @torch.no_grad()
    def _arrived(self, name: str, _: nn.Parameter) -> None:
        step = self._under_way
        # gradients of the micro-steps before the last are only added up
        if step is None:
            return
        part = self._part_of[name]
        step.waiting[part].discard(name)
        if not step.waiting[part]:
            self._step_part(step, part)

    def _step_part(self, step: _Step, part: str) -> None:
        names = self._parts[part]
        del step.waiting[part]
        gradients = self._take_gradients(names)
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        by = self.last_norm if self.clipping == "lagged" else norms / step.scale
        factor = 1 / step.scale * self._clipping(by)
        places = [self._places[name] for name in names]
        self.inner.update(gradients, factor, ~torch.isfinite(norms), places)
        self._norms.index_copy_(0, self.inner.indices_on_device(places), norms)

    def _end_fused(self, loss_scale) -> tuple[Tensor, Tensor]:
        """End a step that backward has taken. Taken is what any tensor took."""
        step, self._under_way = self._under_way, None
        for part in list(step.waiting):
            # parts that the loss did not reach as a whole
            self._step_part(step, part)
        self.inner.end()
        norm = torch.linalg.vector_norm(self._norms) / step.scale
        finite = torch.isfinite(self._norms)
        self.last_norm.copy_(torch.where(torch.isfinite(norm), norm, self.last_norm))
        self.num_skipped.add_((~finite).sum())
        loss_scale.update(finite.all())
        return norm, self._taken(finite.any())

    def _taken(self, finite: Tensor) -> Tensor:
        return torch.zeros_like(finite) if self.inner.is_rehearsing else finite

    def step(self, loss_scale) -> tuple[Tensor, Tensor]:
        """As UNetOptimizer.step, with nothing asked of the device."""
        if self._under_way is not None:
            return self._end_fused(loss_scale)
        gradients = self._take_gradients(self.parameters)
        # of scaled gradients, summed in fp32
        norm = (
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32))) / loss_scale.scale
        )
        finite = torch.isfinite(norm)
        self.inner.begin()
        self.inner.update(gradients, 1 / loss_scale.scale * self._clipping(norm), ~finite)
        self.inner.end()
        loss_scale.update(finite)
        return norm, self._taken(finite)

    def live_state_of(self, name: str) -> dict[str, Tensor]:
        """Return a parameter's step, moments and what completes its weight to fp32, as they are: no copies."""
        return state_of(self.inner, self._places[name], live=True)

    def load(self, name: str, parts: dict[str, Tensor]) -> None:
        """Take what state_of gave, or the state of a run by bitsandbytes' AdamW8bit. Raises UserError where it does not fit."""
        p, place = self.parameters[name], self._places[name]
        if p.dtype == torch.float32 and ("master" in parts or "remainder" in parts):
            raise UserError(f"the checkpoint's {name} is 16-bit: it was saved at another precision")
        if "state1" not in parts and ("exp_avg" in parts or parts.keys() & {"master", "remainder"} == set()):
            raise UserError(f"the checkpoint's moments of {name} are not of optimizer adamw8bit")
        try:
            load_value(self.inner, place, p.detach(), parts)
            if "state1" in parts:
                load_state(self.inner, place, parts)
        except UserError as error:
            raise UserError(f"the checkpoint's optimizer state of {name} does not fit: {error}") from None
