"""What both implementations of UNetOptimizer share: the loss scale, dry runs, and the state in a checkpoint."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.kernels.unet.patch import shared_projections
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.distributed.gather import gathered
from safelight.trainer.distributed.sharded import group_of, is_cut, local
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.optim.cut_state import cut_parts, is_aligned, whole_parts
from safelight.trainer.optim.gradient_buffers import GradientBuffers
from safelight.trainer.optim.reduction import AllReduce, OneProcess, ReduceToOwners, Reduction, owners_of, publish
from safelight.trainer.registry.optimizers import MEMORY_MODES, OptimizerSpec

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 1000
MIN_SCALE, MAX_SCALE = 2.0**-14, 2.0**24


class RateOverflow(ArithmeticError):
    """Raised by a step whose optimizer has estimated a learning rate that fp32 cannot hold."""


class LossScale:
    """fp16's dynamic loss scale: halved by a step with a non-finite gradient, doubled after 1,000 steps without one.

    scale, num_good: tensors on the device, changed in place. Disabled, the scale stays 1.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(INITIAL_SCALE if enabled else 1.0, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)
        self.follower_is_finite: Tensor | None = None

    def update(self, is_finite: Tensor) -> None:
        if not self.enabled:
            return
        if self.follower_is_finite is not None:
            is_finite, self.follower_is_finite = is_finite & self.follower_is_finite, None
        self.num_good.add_(1).mul_(is_finite)
        grow = self.num_good >= GROWTH_INTERVAL
        factor = torch.where(is_finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(MIN_SCALE, MAX_SCALE)
        self.num_good.masked_fill_(grow, 0)


class FollowedScale(LossScale):
    """The loss scale of an optimizer whose gradients come from the same backward pass as another's, the leader.

    It is the leader's. An overflow here halves it in the leader's own update, which follows.
    """

    def __init__(self, leader: LossScale):
        self.enabled, self.scale, self.num_good, self._leader = leader.enabled, leader.scale, leader.num_good, leader

    def update(self, is_finite: Tensor) -> None:
        if self.enabled:
            self._leader.follower_is_finite = is_finite


class OptimizerBase(abc.ABC):
    """The shared part of a UNetOptimizer (trainer/optim/optimizer.py). A subclass ends its constructor with a
    LossScale.

    cut_by: the processes among which each parameter is cut (distributed.shard = full), None if they are whole.

    sharers: the processes that share its state, each of which owns some of the parts (distributed.shard = states); one
    process that owns all of them otherwise.
    """

    loss_scale: LossScale
    pages: Pages | None = None
    stream: StreamedWeights | None = None
    # weights whose moments were requantized by loading because they are cut between blocks
    num_requantized = 0

    def __init__(
        self,
        module: nn.Module,
        spec: OptimizerSpec,
        config: OptimizerConfig,
        dtype: torch.dtype,
        memory: str,
        device: torch.device,
        lr_factors: Mapping[str, float],
        sharers: World,
    ):
        self.module, self.spec, self.memory = module, spec, memory
        self.is_fused, self.clipping = config.is_fused, config.clipping_mode()
        self.has_master = dtype != torch.float32 and memory == "fp32"
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # by name, in the parameters' order
        self.lr_factors = {name: lr_factors.get(name, 1.0) for name in self.parameters}
        self.buffers = GradientBuffers(self.parameters, device)
        self.is_dry_run = False
        # a product that blocks share gets its gradients last: a part of its own, so that no block waits for it
        shared = shared_projections(module)
        self.part_of = {name: shared.get(name) or part_of(name) for name in self.parameters}
        self.parts: dict[str, list[str]] = {}
        for name, part in self.part_of.items():
            self.parts.setdefault(part, []).append(name)
        self.sharers = sharers
        sizes = {part: sum(self.parameters[name].nbytes for name in names) for part, names in self.parts.items()}
        self.owner_of = owners_of(sizes, sharers.size)
        # this process's piece of each, the parameter itself if it is not cut
        self.local = {name: local(p.detach()) if is_cut(p) else p for name, p in self.parameters.items()}
        cut = [p for p in self.parameters.values() if is_cut(p)]
        self.cut_by = group_of(cut[0]) if cut else None
        self.owned = [
            name
            for name in self.parameters
            if self.owner_of[self.part_of[name]] == sharers.rank and self.local[name].numel() > 0
        ]
        self.reduction: Reduction = OneProcess()
        # by part, the parameters whose gradient has not arrived in the last micro-step; None outside of it
        self._missing: dict[str, set[str]] | None = None
        # sums over the processes that have arrived before the step that needs them
        self._sums: dict[str, Tensor] = {}
        self._watches = False
        if self.is_fused:
            self._watch_gradients()

    def __str__(self) -> str:
        keeps = self.has_master or self.memory != "fp32"
        shared = f", the state of each part kept by one of {self.sharers.size} processes"
        num = 0 if self.cut_by is None else dist.get_world_size(self.cut_by)
        cut = f", weights and state cut among {num} processes" if num else ""
        return (
            f"optimizer {self.spec.name}"
            + (f", {MEMORY_MODES[self.memory].description}" if keeps else "")
            + (f", stepped inside backward, clipping {self.clipping}" if self.is_fused else "")
            + (shared if self.sharers.size > 1 else cut)
        )

    @contextlib.contextmanager
    def dry_run(self) -> Iterator[None]:
        clipping = self._clipping_state().values()
        counters = [self.loss_scale.scale, self.loss_scale.num_good, *clipping]
        before = [x.clone() for x in counters]
        self._set_dry_run(True)
        try:
            yield
        finally:
            self._set_dry_run(False)
            for x, value in zip(counters, before, strict=True):
                x.copy_(value)

    def _set_dry_run(self, is_dry_run: bool) -> None:
        self.is_dry_run, self._missing = is_dry_run, None

    def _clipping_state(self) -> dict[str, Tensor]:
        """Return what clipping carries from step to step, by the name it has in a checkpoint after `clipping/`."""
        return {}

    @property
    def effective_lr(self) -> float | None:
        """The learning rate that the optimizer has found itself, times the factor lr; None if lr is the rate."""
        return None

    def _numbers(self) -> dict[str, float | int]:
        """Return what is kept for all parameters together, by the name it has in a checkpoint after `numbers/`."""
        return {}

    def _set_numbers(self, numbers: dict[str, float | int]) -> None:  # noqa: B027  most optimizers have none
        """Load what `_numbers` returned."""

    def reduce_over(self, world: World, dtype: torch.dtype | None = None) -> None:
        """Sum each step's gradients over processes from now on, in a dtype, None: their own. Call it before the first
        step."""
        if world.size == 1 or self.cut_by is not None:
            return
        if self.sharers.size > 1:
            self.reduce_by(ReduceToOwners(self.owner_of, world.rank, None, dtype))
        else:
            self.reduce_by(AllReduce(None, dtype, is_immediate=self.stream is not None))

    def reduce_by(self, reduction: Reduction) -> None:
        """Let each step's gradients pass a reduction from now on."""
        self.reduction = reduction
        self._watch_gradients()

    def _watch_gradients(self) -> None:
        """Hand over each part of the module as soon as all its gradients have arrived in a step's last micro-step."""
        if not self._watches:
            self._watches = True
            for name, p in self.parameters.items():
                p.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, name))

    def prepare_backward(self) -> None:
        if self._watches:
            self._missing = {part: set(names) for part, names in self.parts.items()}

    @torch.no_grad()
    def _on_gradient(self, name: str, _: nn.Parameter) -> None:
        # the micro-steps before the last only sum gradients
        if self._missing is None:
            return
        part = self.part_of[name]
        self._missing[part].discard(name)
        if not self._missing[part]:
            self._hand_over(part)

    def _hand_over(self, part: str) -> None:
        del self._missing[part]
        taken = ((self.parameters[name], self.buffers.take(name)) for name in self.parts[part])
        # zeros for a parameter that the loss did not reach
        gradients = [torch.zeros_like(local(p)) if g is None else g for p, g in taken]
        if self.is_dry_run:
            # processes do not warm up the same shapes
            if self.owner_of[part] == self.sharers.rank:
                self._on_part(part, gradients)
            return
        for arrived, sums in self.reduction.push(part, gradients):
            self._on_part(arrived, sums)

    def _finish_backward(self) -> None:
        """Hand over the parts that have a parameter which the loss did not reach, and wait for all sums."""
        for part in list(self._missing or ()):
            self._hand_over(part)
        self._missing = None
        for arrived, sums in self.reduction.drain():
            self._on_part(arrived, sums)

    def _on_part(self, part: str, sums: list[Tensor]) -> None:
        """Take a part's gradients, summed over the processes."""
        self._sums |= zip(self.parts[part], sums, strict=True)

    def _norms_of_all(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the gradient norms of all parameters, in their order. norms: of those that this process owns."""
        if self.sharers.size == 1 and self.cut_by is None:
            return torch.stack(list(norms))
        own, device = dict(zip(self.owned, norms, strict=True)), self.loss_scale.scale.device
        zero = torch.zeros((), device=device)
        return self._sum_over_sharers(torch.stack([own.get(name, zero) for name in self.parameters]))

    def _sum_over_sharers(self, norms: Tensor) -> Tensor:
        """Return the norms of whole parameters, of which each process has the norms of its pieces, or of its own
        parameters and zeros for others."""
        if self.cut_by is not None:
            squares = norms.square()
            if not self.is_dry_run:
                dist.all_reduce(squares, group=self.cut_by)
            return squares.sqrt()
        if self.sharers.size > 1 and not self.is_dry_run:
            # adding zeros changes no bits
            dist.all_reduce(norms)
        return norms

    @torch.no_grad()
    def publish(self) -> None:
        """Give all processes the weights of those that own them. All of them must call it."""
        if self.sharers.size > 1 and not self.is_dry_run:
            owned = [(self.owner_of[self.part_of[name]], p) for name, p in self.parameters.items()]
            publish(owned, self.sharers.rank)

    def _take(self, name: str) -> Tensor | None:
        """Return a parameter's gradient after backward, and free it. None if the loss did not reach it."""
        return self._sums.pop(name) if self._watches else self.buffers.take(name)

    @abc.abstractmethod
    def parameter_state(self, name: str) -> dict[str, Tensor]: ...

    @abc.abstractmethod
    def _load_parameter_state(self, name: str, parts: dict[str, Tensor]) -> None: ...

    def live_state(self) -> dict[str, Tensor]:
        state = {"loss_scale/scale": self.loss_scale.scale, "loss_scale/num_good": self.loss_scale.num_good}
        if self.is_fused:
            state |= {f"clipping/{name}": value for name, value in self._clipping_state().items()}
        state |= {f"numbers/{name}": _as_tensor(value) for name, value in self._numbers().items()}
        for name in self.owned:
            state |= {f"{part}/{name}": value.detach() for part, value in self.parameter_state(name).items()}
        return state

    def whole_state(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """Yield what `live_state` returns, of all processes together; what others have is on the CPU.

        One tensor at a time. All processes must call and exhaust it; only the main one is given what others own.
        """
        if self.cut_by is None:
            yield from gathered(world if self.sharers.size > 1 else ALONE, self.live_state())
            return
        pieces = {f"{part}/{name}" for name in self.owned for part in self.parameter_state(name)}
        yield from ((key, x) for key, x in self.live_state().items() if key not in pieces)
        for name, p in self.parameters.items():
            for part, x in whole_parts(world, p, self.piece_state(name)):
                yield f"{part}/{name}", x

    def piece_state(self, name: str) -> dict[str, Tensor]:
        """Return what is kept of this process's piece of a cut parameter; empty tensors if it has none."""
        raise NotImplementedError(f"{self.spec.name} cannot be cut")

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        try:
            self._load_state(state)
        except UserError as error:
            fix = "resume with the config.toml of the run's folder, or move this checkpoint away to use the one before"
            raise UserError(f"{error}; {fix}") from error

    def _load_state(self, state: dict[str, Tensor]) -> None:
        for name in ("scale", "num_good"):
            _copy_number(f"loss_scale/{name}", state.get(f"loss_scale/{name}"), getattr(self.loss_scale, name))
        clipping = self._clipping_state() if self.is_fused else {}
        numbers = {name: _as_tensor(value) for name, value in self._numbers().items()}
        for name, value in numbers.items():
            _copy_number(f"numbers/{name}", state.get(f"numbers/{name}"), value)
            if not torch.isfinite(value):
                raise UserError(f"the checkpoint's numbers/{name} is {float(value)}")
        self._set_numbers({name: value.item() for name, value in numbers.items()})
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for key, value in state.items():
            part, _, name = key.partition("/")
            if part == "clipping" and name in clipping:
                _copy_number(key, value, clipping[name])
            if part in ("loss_scale", "clipping") or (part == "numbers" and name in numbers):
                continue
            if name not in by_name:
                raise UserError(f"the checkpoint's optimizer state names {key[:80]!r}, which this UNet does not train")
            by_name[name][part] = value
        self.num_requantized = 0
        for name in self.owned:
            parts, p = by_name[name], self.parameters[name]
            if is_cut(p):
                self.num_requantized += "absmax1" in parts and not is_aligned(p)
                parts = cut_parts(p, parts)
            self._load_parameter_state(name, parts)
        # loading may have rounded weights
        self.publish()


def part_of(name: str) -> str:
    """Return the part of a UNet that a parameter is updated with: `up_blocks.1.attentions.0`, `conv_in`.

    Of a text encoder it is a layer.

    A transformer's first block goes with its norm and projections; each further block (SDXL has ten) is a part of its
    own: `up_blocks.0.attentions.0.transformer_blocks.9`.
    """
    words = name.split(".")
    if "layers" in words:
        # of a text encoder
        return ".".join(words[: words.index("layers") + 2])
    if "transformer_blocks" in words:
        place = words.index("transformer_blocks") + 1
        if words[place] != "0":
            return ".".join(words[: place + 1])
    if words[0] == "mid_block":
        return ".".join(words[:3])
    return ".".join(words[:4]) if words[0] in ("down_blocks", "up_blocks") else words[0]


def _as_tensor(number: float | int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)


def _copy_number(key: str, value: Tensor | None, target: Tensor) -> None:
    """Copy one number of a checkpoint's state. Raises UserError if it is missing or something else."""
    if value is None or value.shape != target.shape or value.dtype != target.dtype:
        form = "missing" if value is None else f"{tuple(value.shape)} {value.dtype}"
        raise UserError(f"the checkpoint's {key} is {form}, not {tuple(target.shape)} {target.dtype}")
    target.copy_(value)
