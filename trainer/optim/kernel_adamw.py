"""AdamW with 8-bit or 4-bit moments over the UNet by our kernel: one launch for tensors with such moments, one for
small tensors.

No host-device synchronization: the norm, the clipping factor, the loss scale and whether a step is applied stay on the
device. On GPUs with a large cache the norm is taken during backward (early_norms.py).

Fused, the update is applied inside backward: as soon as a part of the UNet (a ResNet, a transformer block) has all its
gradients, its weights are updated and its gradients freed. The global norm is not known by then: `lagged` clips by the
previous step's norm, `per-tensor` each tensor by its own. A tensor with a non-finite gradient is skipped on its own,
and counted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.moment_blocks import MIN_8BIT_ELEMENTS
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.adamw8bit_state import load_state, load_value, state_of
from safelight.kernels.optim.blockwise_8bit import in_memory_order
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.split_weights import REMAINDERS, split_nearest
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.kernels.unet.weight_streaming import WeightStream, streamed_blocks
from safelight.trainer.config.schema import AVERAGE_OF_PAGED
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.distributed.sharded import is_cut, local
from safelight.trainer.distributed.world import World
from safelight.trainer.optim.base import LossScale, OptimizerBase
from safelight.trainer.optim.early_norms import EarlyNorms, group_bytes
from safelight.trainer.optim.reduction import Reduction
from safelight.trainer.registry.optimizers import MEMORY_MODES, OptimizerSpec

# elements converted to 16 bits at a time, and an upper bound of the device bytes an element takes meanwhile
SPLIT_ELEMENTS = 2**22
SPLIT_BYTES = 32
# of a run's seed, where the number of a process is added
SEED_SHIFT, MAX_SEED = 40, 2**64 - 1


def to_16_bit(
    p: nn.Parameter,
    dtype: torch.dtype,
    memory: str,
    device: torch.device,
    remainder: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor | None:
    """Move a parameter to a device and a 16-bit dtype in its memory order. Return its remainder, None if the mode keeps
    none.

    remainder, weight: where to write them, if these exist already. The fp32 values go through the device in pieces, and
    their old memory is freed.
    """
    source, remainder_dtype = p.detach(), REMAINDERS[memory]
    if weight is None:
        weight = torch.empty_like(source, dtype=dtype, device=device)
    if remainder_dtype is not None and remainder is None:
        remainder = torch.empty_like(source, dtype=remainder_dtype, device=device)
    p.data = weight
    if source.is_meta:
        # nothing to split, and an operator on meta tensors takes the host as long as a large one
        return remainder
    _split_into(source, weight, remainder, memory, device)
    return remainder


def _split_into(
    source: Tensor, weight: Tensor, remainder: Tensor | None, memory: str, device: torch.device | None = None
) -> None:
    """Write the 16-bit pairs of fp32 values into tensors of the same memory order. device: to split on, None: the
    weight's."""
    flat = [None if x is None else in_memory_order(x).split(SPLIT_ELEMENTS) for x in (source, weight, remainder)]
    for index, piece in enumerate(flat[0]):
        high, low = split_nearest(piece.to(device or weight.device).float(), weight.dtype, memory)
        flat[1][index].copy_(high)
        if low is not None:
            flat[2][index].copy_(low)


class KernelAdamW(OptimizerBase):
    """The UNetOptimizer that uses our AdamW kernel.

    kernel: AdamW over the list of parameters; a parameter's index in it keys its stochastic rounding. last_norm: of the
    last step whose norm was finite, 0 before any.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: OptimizerSpec,
        config: OptimizerConfig,
        dtype: torch.dtype,
        memory: str,
        seed: int,
        device: torch.device,
        lr_factors: Mapping[str, float],
        sharers: World,
    ):
        # fp32 pieces of weights that are cut, before the module is converted as a whole
        sources: dict[str, Tensor] = {}
        if any(is_cut(p) for p in module.parameters()):
            if dtype != torch.float32:
                sources = {n: local(p.detach()).to("cpu") for n, p in module.named_parameters() if p.requires_grad}
                module.to(dtype)
        elif dtype == torch.float32:
            module.to(device)
        super().__init__(module, spec, config, dtype, memory, device, lr_factors, sharers)
        parameters = self.parameters
        self._index_of = {name: index for index, name in enumerate(parameters)}
        owned = set(self.owned)
        self._kept_moments = config.moments
        self._owned = tuple(self._index_of[name] for name in self.owned)
        mode = MEMORY_MODES[memory]
        remainders, pages = None, self.make_pages(device) if mode.pages_state else None
        kept = "exact" if mode.pages_state else memory
        stream = self.make_stream(device, dtype) if mode.streams_weights else None
        if sources:
            with torch.no_grad():
                remainders = [
                    self._split_piece(sources.pop(name), weight, kept, pages, i) if name in owned else None
                    for i, (name, weight) in enumerate(self.local.items())
                ]
        elif dtype != torch.float32:
            with torch.no_grad():
                # one by one, so that the fp32 weights and their 16-bit pairs never exist all at once
                remainders = [
                    to_16_bit(
                        p,
                        dtype,
                        kept,
                        device,
                        pages.at_home(i)["remainder"] if pages is not None and i in pages else None,
                        stream.at_home(p) if stream is not None and p in stream else None,
                    )
                    for i, p in enumerate(parameters.values())
                ]
                # of weights that another process steps: only rounded as there
                remainders = [r if name in owned else None for name, r in zip(parameters, remainders, strict=True)]
            if stream is not None:
                stream.take_frozen()
                stream.detach()
            module.to(device, dtype)
            if stream is not None:
                stream.attach()
                WeightStream(module, [block for block, _ in streamed_blocks(module)], stream)
        # pieces of one weight must not be rounded by the same random words
        rank = 0 if self.cut_by is None else dist.get_rank(self.cut_by)
        self.kernel = AdamW8bit(
            list(self.local.values()),
            config.betas,
            config.eps,
            kept,
            (seed + (rank << SEED_SHIFT)) & MAX_SEED,
            remainders=remainders,
            pages=pages,
            stream=stream,
            lr_factors=list(self.lr_factors.values()),
            owned=self._owned,
            whole_sizes=[p.numel() for p in parameters.values()],
            moments=self._kept_moments,
        )
        self.pages, self.stream = pages, stream
        self._block_of: dict[str, int] = {}
        for name, p in parameters.items():
            if stream is not None and p in stream:
                part = self.part_of[name]
                block = self._block_of.setdefault(part, stream.block_of(p))
                assert block == stream.block_of(p), f"{part} has two streamed blocks"
        device = self.kernel.skips.device
        self.last_norm = torch.zeros((), device=device)
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        # the norm to clip to; infinite without clipping
        self._max_norm = torch.full((), float("inf"), device=device)
        self._norms = torch.zeros(len(parameters), device=device)
        # the scale of the loss whose backward pass applies the update; None outside of it
        self._fused_scale: Tensor | None = None
        self.loss_scale = LossScale(device, dtype == torch.float16)
        max_waiting = group_bytes(device)
        is_alone = sharers.size == 1 and self.cut_by is None
        self._early = EarlyNorms(max_waiting) if max_waiting and is_alone and not self.is_fused else None
        if self._early is not None:
            for name, p in parameters.items():
                p.register_post_accumulate_grad_hook(functools.partial(self._on_early_gradient, name))
        # of a step's last micro-step, which completes the gradients
        self._is_last = False

    @property
    def num_skipped_tensors(self) -> Tensor:
        return self._num_skipped

    def _split_piece(
        self, source: Tensor, weight: Tensor, memory: str, pages: Pages | None, index: int
    ) -> Tensor | None:
        """Overwrite the piece of a 16-bit weight by the nearest values to those in fp32; return its remainder."""
        remainder, dtype = None, REMAINDERS[memory]
        if pages is not None and index in pages:
            remainder = pages.at_home(index)["remainder"]
        elif dtype is not None:
            remainder = torch.empty_like(weight, dtype=dtype)
        _split_into(source, weight, remainder, memory)
        return remainder

    def make_pages(self, device: torch.device) -> Pages | None:
        owned = [(self._index_of[name], name) for name in self.owned]
        large = {i: self.local[name] for i, name in owned if self.parameters[name].numel() >= MIN_8BIT_ELEMENTS}
        groups = [[self._index_of[name] for name in names] for names in self.parts.values()]
        groups = [[i for i in group if i in large] for group in groups]
        return Pages(large, groups, device=device, moments=self._kept_moments) if large else None

    def make_stream(self, device: torch.device, dtype: torch.dtype) -> StreamedWeights | None:
        blocks = [weights for _, weights in streamed_blocks(self.module)]
        return StreamedWeights(blocks, dtype, device) if blocks else None

    def value(self, name: str) -> Tensor:
        return self.kernel.value(self._index_of[name])

    def average_sources(self) -> tuple[list[Tensor], list[Tensor] | None]:
        if not MEMORY_MODES[self.memory].allows_average:
            raise UserError(AVERAGE_OF_PAGED)
        if self.memory == "fp32":
            return [self.value(name) for name in self.owned], None
        weights = [self.local[name].detach() for name in self.owned]
        return weights, None if self.memory == "rounded" else [self.kernel.remainders[index] for index in self._owned]

    def master_tensors(self) -> list[Tensor]:
        return [x for x in self.kernel.remainders if x is not None]

    @torch.no_grad()
    def set_hyper(self, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        self.kernel.set_hyper(lr, weight_decay)
        self._max_norm.fill_(max_grad_norm if max_grad_norm > 0 else float("inf"))

    def _set_dry_run(self, is_dry_run: bool) -> None:
        super()._set_dry_run(is_dry_run)
        self.kernel.is_dry_run, self._fused_scale = is_dry_run, None
        if self._early is not None:
            # what an error has left of the step
            self._is_last = False
            self._sums.clear()
            self._early.begin()

    def _clipping_state(self) -> dict[str, Tensor]:
        return {"last_norm": self.last_norm, "num_skipped": self._num_skipped}

    def _clipping_factor(self, norm: Tensor) -> Tensor:
        return ((norm + 1e-6).reciprocal() * self._max_norm).clamp(max=1.0)

    def reduce_by(self, reduction: Reduction) -> None:
        # the norm is that of the sums over all processes
        self._early = None
        super().reduce_by(reduction)

    @torch.no_grad()
    def _on_early_gradient(self, name: str, _: nn.Parameter) -> None:
        if self._early is not None and self._is_last:
            gradient = self.buffers.take(name)
            if gradient is not None:
                self._sums[name] = gradient
                self._early.add(name, gradient)

    @torch.no_grad()
    def prepare_backward(self) -> None:
        super().prepare_backward()
        self._is_last = True
        if self._early is not None:
            self._early.begin()
        if self.is_fused:
            self.kernel.begin()
            # of what another process steps, they are added from there
            self._norms.zero_()
            self._fused_scale = self.loss_scale.scale

    def _on_part(self, part: str, sums: list[Tensor]) -> None:
        if self.is_fused:
            self._update_part(part, sums)
        else:
            super()._on_part(part, sums)

    def _update_part(self, part: str, gradients: list[Tensor]) -> None:
        names, block = self.parts[part], self._block_of.get(part)
        if block is not None:
            self.stream.begin_update(block)
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        clip_by = self.last_norm if self.clipping == "lagged" else norms / self._fused_scale
        factor = 1 / self._fused_scale * self._clipping_factor(clip_by)
        indices = [self._index_of[name] for name in names]
        self.kernel.update(gradients, factor, ~torch.isfinite(norms), indices)
        if block is not None:
            self.stream.put(block)
        self._norms.index_copy_(0, self.kernel.indices_on_device(indices), norms)

    def _finish_fused_step(self) -> tuple[Tensor, Tensor]:
        self._finish_backward()
        scale, self._fused_scale = self._fused_scale, None
        self.kernel.end()
        norms = self._sum_over_sharers(self._norms)
        norm = torch.linalg.vector_norm(norms) / scale
        is_finite = torch.isfinite(norms)
        self.last_norm.copy_(torch.where(torch.isfinite(norm), norm, self.last_norm))
        self._num_skipped.add_((~is_finite).sum())
        self.loss_scale.update(is_finite.all())
        self.publish()
        return norm, self._is_applied(is_finite.any())

    def _is_applied(self, is_finite: Tensor) -> Tensor:
        return torch.zeros_like(is_finite) if self.is_dry_run else is_finite

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        if self._fused_scale is not None:
            return self._finish_fused_step()
        self._finish_backward()
        gradients, scale = self._gradients(), self.loss_scale.scale
        # of the scaled gradients, summed in fp32
        early = EarlyNorms(0) if self._early is None else self._early
        norms = early.norms_of(dict(zip(self.owned, gradients, strict=True)))
        norm = torch.linalg.vector_norm(self._norms_of_all(norms)) / scale
        is_finite = torch.isfinite(norm)
        if gradients:
            self.kernel.begin()
            self.kernel.update(gradients, 1 / scale * self._clipping_factor(norm), ~is_finite, self._owned)
            self.kernel.end()
        self.loss_scale.update(is_finite)
        self.publish()
        return norm, self._is_applied(is_finite)

    def _gradients(self) -> list[Tensor]:
        """Return the gradients of what is stepped here, after backward; zeros for a parameter that the loss did not
        reach."""
        self._is_last = False
        taken = ((self.local[name], self._take(name)) for name in self.owned)
        return [torch.zeros_like(p) if g is None else g for p, g in taken]

    def _take(self, name: str) -> Tensor | None:
        if self._early is not None and name in self._sums:
            return self._sums.pop(name)
        return super()._take(name)

    def finish_capture(self) -> None:
        self.kernel.finish_capture()

    def release_captures(self) -> None:
        self.kernel.release_captures()

    def parameter_state(self, name: str) -> dict[str, Tensor]:
        return state_of(self.kernel, self._index_of[name], live=True)

    def piece_state(self, name: str) -> dict[str, Tensor]:
        if name in self.owned:
            return self.parameter_state(name)
        p, remainder = self.local[name], REMAINDERS[self.kernel.memory]
        is_8bit = self.parameters[name].numel() >= MIN_8BIT_ELEMENTS
        kinds = dict.fromkeys(("state1", "state2"), torch.uint8 if is_8bit else torch.float32)
        if is_8bit:
            kinds |= dict.fromkeys(("absmax1", "absmax2"), torch.float32)
        if p.dtype != torch.float32 and remainder is not None:
            kinds["master" if remainder == torch.float32 else "remainder"] = remainder
        state = {part: p.new_empty(0, dtype=dtype) for part, dtype in kinds.items()}
        return state | {"step": torch.zeros((), dtype=torch.int64)}

    def _load_parameter_state(self, name: str, parts: dict[str, Tensor]) -> None:
        """Load what `parameter_state` returned, or the state of bitsandbytes' AdamW8bit. Raises UserError if it does
        not fit."""
        p, index = self.local[name], self._index_of[name]
        if p.dtype == torch.float32 and ("master" in parts or "remainder" in parts):
            raise UserError(f"the checkpoint's {name} is 16-bit: it was saved at another precision")
        # a master or remainder without moments is accepted: only the weight's value is loaded
        has_moments = "state1" in parts or "packed" in parts
        if not has_moments and ("exp_avg" in parts or parts.keys() & {"master", "remainder"} == set()):
            raise UserError(f"the checkpoint's moments of {name} are not of optimizer {self.spec.name}")
        try:
            load_value(self.kernel, index, p.detach(), parts)
            if has_moments:
                load_state(self.kernel, index, parts)
        except UserError as error:
            raise UserError(f"the checkpoint's optimizer state of {name} does not fit: {error}") from None
