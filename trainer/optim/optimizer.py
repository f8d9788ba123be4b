"""AdamW over the UNet: fp32 weights, or 16-bit weights with what completes them to fp32, and for fp16 a dynamic loss scale.

`adamw8bit` is our kernel (kernel_adamw.py), `bnb_adamw8bit` and `bnb_paged_adamw8bit` bitsandbytes' and `adamw` torch's
(library_adamw.py). A step with
a non-finite gradient changes no weight and no moment; with fp16 it halves the loss scale. State is kept under the UNet's own
parameter names, contiguous.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.config.toml import AVERAGE_OF_PAGED
from safelight.trainer.config.toml import Optimizer as OptimizerConfig
from safelight.trainer.optim.gradient_buffers import GradientBuffers
from safelight.trainer.optim.kernel_adamw import KernelAdamW
from safelight.trainer.optim.library_adamw import BITSANDBYTES, LibraryAdamW

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 1000
MIN_SCALE, MAX_SCALE = 2.0**-14, 2.0**24


class LossScale:
    """fp16's dynamic loss scale, on the device: halved by a non-finite step, doubled after 1,000 finite ones.

    scale, num_good: changed in place.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(INITIAL_SCALE if enabled else 1.0, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        if not self.enabled:
            return
        self.num_good.add_(1).mul_(finite)
        grow = self.num_good >= GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(MIN_SCALE, MAX_SCALE)
        self.num_good.masked_fill_(grow, 0)


def memory_mode(config: OptimizerConfig, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """Return what `optimizer.memory` comes to for weights of a dtype: fp32, exact, near, rounded or paged.

    Raises UserError for an unknown optimizer, one whose library is not there, and a mode that does not fit; where the
    device is known, for an optimizer that does not run on it.
    """
    name, memory = config.name, config.memory
    if name not in ("adamw8bit", *BITSANDBYTES, "adamw"):
        raise ValueError(f"optimizer.name {name!r} is unknown; use adamw8bit, {', '.join(BITSANDBYTES)} or adamw")
    if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"optimizer.name {name} needs bitsandbytes, which is not installed; use adamw8bit")
    if name == "bnb_paged_adamw8bit" and device is not None and device.type == "cpu":
        raise UserError(
            f"optimizer.name {name} keeps its moments in CUDA's unified memory, and this run is on a CPU; use bnb_adamw8bit"
        )
    if config.is_fused and name != "adamw8bit":
        raise UserError(f"optimizer.fused_backward is adamw8bit's; {name} steps after backward: set it to false")
    config.clipping_mode()
    if dtype == torch.float32 or memory in ("auto", "fp32"):
        if memory not in ("auto", "fp32"):
            raise UserError(
                f"optimizer.memory {memory} is for 16-bit weights, and model.precision is fp32 here; use auto, or model.precision bf16"
            )
        return "exact" if memory == "auto" and dtype != torch.float32 and name == "adamw8bit" else "fp32"
    if name != "adamw8bit":
        raise UserError(f"optimizer.memory {memory} is adamw8bit's; {name} keeps fp32 masters: use auto or fp32")
    return memory


class UNetOptimizer:
    """AdamW over a module's trainable parameters, which it brings to a dtype, and to a device where one is given.

    dtype: of the weights to train with; the module's own if None. Give an fp32 module and a 16-bit dtype, and what the
    weights lose is kept beside them, as `optimizer.memory` says. seed: the run's, for stochastic rounding.
    parameters: name -> parameter. memory: fp32 | exact | near | rounded | paged. has_master: whether it keeps fp32 masters of 16-bit
    weights. Raises UserError for settings that do not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        first = next(iter(self.parameters.values()))
        dtype = dtype or first.dtype
        self.name, self.memory = config.name, memory_mode(config, dtype, first.device)
        self.clipping, self._is_fused = config.clipping_mode(), config.is_fused
        self.has_master = dtype != torch.float32 and self.memory == "fp32"
        device = device or first.device
        if config.name == "adamw8bit":
            if dtype == torch.float32:
                module.to(device)
            self.method = KernelAdamW(module, self.parameters, config, dtype, self.memory, seed, device)
        else:
            self.method = LibraryAdamW(module.to(device), self.parameters, config, dtype, self.memory, seed)
        self.loss_scale = LossScale(first.device, dtype == torch.float16)

    @property
    def buffers(self) -> GradientBuffers:
        """Where the gradients of several micro-steps are added up; without memory until a step has several."""
        return self.method.buffers

    @property
    def inner(self) -> object:
        """The optimizer that steps: a kernel's, bitsandbytes' or torch's."""
        return self.method.inner

    @inner.setter
    def inner(self, optimizer: object) -> None:
        self.method.inner = optimizer

    @property
    def master(self) -> dict[str, Tensor]:
        """The fp32 weights by name, for those optimizers that hold them whole: the masters, or the fp32 parameters."""
        return self.method.master

    def value(self, name: str) -> Tensor:
        """Return a weight in fp32, with all that its memory mode keeps of it; not to be written to."""
        return self.method.value(name)

    def followed(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return what a moving average reads: the fp32 weights where they are held whole, else the 16-bit ones and their remainders.

        Raises UserError where the remainders are not on the device.
        """
        if self.memory == "paged":
            raise UserError(AVERAGE_OF_PAGED)
        if self.master:
            return [w.detach() for w in self.master.values()], None
        weights = [p.detach() for p in self.parameters.values()]
        return weights, None if self.memory == "rounded" else list(self.inner.remainders)

    def __str__(self) -> str:
        beside = {
            "paged": "16-bit remainders and moments in host memory",
            "exact": "16-bit remainders",
            "near": "8-bit remainders",
            "rounded": "stochastic rounding",
        }
        kept = "fp32 master" if self.has_master else beside.get(self.memory, "")
        inside = f", stepped inside backward, clipping {self.clipping}" if self._is_fused else ""
        return f"optimizer {self.name}" + (f", {kept}" if kept else "") + inside

    @property
    def is_fused(self) -> bool:
        """Whether steps are taken inside backward."""
        return self._is_fused

    @property
    def num_skipped_tensors(self) -> Tensor:
        """How often a tensor was skipped inside backward since the run began, on the device."""
        return self.method.num_skipped

    @torch.no_grad()
    def set_hyper(self, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        """Set the numbers of the steps to come; max_grad_norm 0: no clipping. Outside of what is captured as a graph."""
        self.method.set_hyper(lr, weight_decay, max_grad_norm)

    @torch.no_grad()
    def arm(self, *hyper: float) -> None:
        """Call before the backward pass of a step's last micro-step: where the step is fused, that pass takes it.

        hyper: for set_hyper, if it is to be called first; never in what is captured.
        """
        if hyper:
            self.set_hyper(*hyper)
        if self._is_fused:
            self.method.arm(self.loss_scale.scale)

    @torch.no_grad()
    def step(self, *hyper: float) -> tuple[Tensor, Tensor | bool]:
        """Take one step and free the gradients. Return (global norm before clipping, was it taken), on the device where it can.

        Not taken where the norm is not finite; fused, where no tensor's is. A fused step was taken by backward with the
        numbers that stood when it ran, and is ended here. hyper: as of arm.
        """
        if hyper:
            self.set_hyper(*hyper)
        return self.method.step(self.loss_scale)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Let steps within the block go through everything and change nothing: every tensor is skipped, none is taken."""
        kept = [self.loss_scale.scale, self.loss_scale.num_good, *self.method.counters()]
        before = [x.clone() for x in kept]
        self.method.rehearse(True)
        try:
            yield
        finally:
            self.method.rehearse(False)
            for x, value in zip(kept, before, strict=True):
                x.copy_(value)

    def finish_capture(self) -> None:
        """Call after every capture of a step as a CUDA graph, outside of it: what the graph reads of the host is copied now."""
        self.inner.finish_capture()

    def release_captures(self) -> None:
        """Call where the captured graphs are given up: what was kept for them is freed."""
        self.inner.release_captures()

    def live_state(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs beside the weights: `part/parameter name`.

        No copies, but what the next step changes, where it is and in its memory order.
        """
        state: dict[str, Tensor] = {
            "loss_scale/scale": self.loss_scale.scale,
            "loss_scale/num_good": self.loss_scale.num_good,
        }
        if self._is_fused:
            state["clipping/last_norm"], state["clipping/num_skipped"] = self.method.last_norm, self.method.num_skipped
        for name in self.parameters:
            state |= {f"{part}/{name}": value.detach() for part, value in self.method.live_state_of(name).items()}
        return state

    def state_tensors(self) -> dict[str, Tensor]:
        """Return a copy of the live state, contiguous, on the CPU."""
        return {key: value.to("cpu", copy=True).contiguous() for key, value in self.live_state().items()}

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Take what state_tensors gave; the weights must be the checkpoint's already.

        Raises UserError where a parameter's state is missing, of another shape, or of a mode this one cannot take over.
        """
        self.loss_scale.scale.copy_(state["loss_scale/scale"])
        self.loss_scale.num_good.copy_(state["loss_scale/num_good"])
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for key, value in state.items():
            part, name = key.split("/", 1)
            if part == "clipping" and self._is_fused:
                getattr(self.method, name).copy_(value)
            if part in ("loss_scale", "clipping"):
                continue
            if name not in by_name:
                raise UserError(f"the checkpoint's optimizer state names {name}, which this UNet does not train")
            by_name[name][part] = value
        for name, parts in by_name.items():
            self.method.load(name, parts)
