"""What both implementations of UNetOptimizer share: the loss scale, dry runs, and the state in a checkpoint."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.optim.gradient_buffers import GradientBuffers
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
    LossScale."""

    loss_scale: LossScale
    pages: Pages | None = None
    stream: StreamedWeights | None = None

    def __init__(
        self,
        module: nn.Module,
        spec: OptimizerSpec,
        config: OptimizerConfig,
        dtype: torch.dtype,
        memory: str,
        device: torch.device,
        lr_factors: Mapping[str, float],
    ):
        self.module, self.spec, self.memory = module, spec, memory
        self.is_fused, self.clipping = config.is_fused, config.clipping_mode()
        self.has_master = dtype != torch.float32 and memory == "fp32"
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # by name, in the parameters' order
        self.lr_factors = {name: lr_factors.get(name, 1.0) for name in self.parameters}
        self.buffers = GradientBuffers(self.parameters, device)
        self.is_dry_run = False

    def __str__(self) -> str:
        keeps = self.has_master or self.memory != "fp32"
        return (
            f"optimizer {self.spec.name}"
            + (f", {MEMORY_MODES[self.memory].description}" if keeps else "")
            + (f", stepped inside backward, clipping {self.clipping}" if self.is_fused else "")
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
        self.is_dry_run = is_dry_run

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

    @abc.abstractmethod
    def parameter_state(self, name: str) -> dict[str, Tensor]: ...

    @abc.abstractmethod
    def _load_parameter_state(self, name: str, parts: dict[str, Tensor]) -> None: ...

    def live_state(self) -> dict[str, Tensor]:
        state = {"loss_scale/scale": self.loss_scale.scale, "loss_scale/num_good": self.loss_scale.num_good}
        if self.is_fused:
            state |= {f"clipping/{name}": value for name, value in self._clipping_state().items()}
        state |= {f"numbers/{name}": _as_tensor(value) for name, value in self._numbers().items()}
        for name in self.parameters:
            state |= {f"{part}/{name}": value.detach() for part, value in self.parameter_state(name).items()}
        return state

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
        for name, parts in by_name.items():
            self._load_parameter_state(name, parts)


def _as_tensor(number: float | int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)


def _copy_number(key: str, value: Tensor | None, target: Tensor) -> None:
    """Copy one number of a checkpoint's state. Raises UserError if it is missing or something else."""
    if value is None or value.shape != target.shape or value.dtype != target.dtype:
        form = "missing" if value is None else f"{tuple(value.shape)} {value.dtype}"
        raise UserError(f"the checkpoint's {key} is {form}, not {tuple(target.shape)} {target.dtype}")
    target.copy_(value)
