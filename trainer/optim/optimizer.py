"""The interface of every optimizer that trains the UNet, and how one is made from a config.

Weights are fp32, or 16-bit with what completes them to fp32 (optimizer.memory); fp16 adds a dynamic loss scale. A step
with a non-finite gradient changes no weight and no moment, and with fp16 it halves the loss scale. A checkpoint holds
the state under the UNet's own parameter names, contiguous.

trainer/registry/optimizers.py lists the optimizers; trainer/optim/kernel_adamw.py and
trainer/optim/library_optimizer.py implement them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelight.broken_imports import message
from safelight.errors import UserError
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.optim.base import LossScale
from safelight.trainer.optim.gradient_buffers import GradientBuffers
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS, OptimizerSpec, names_with


class UNetOptimizer(Protocol):
    """An optimizer of a module's trainable parameters.

    One optimizer step is: `set_hyper`; the micro-steps' backward passes inside `buffers.micro_step`, with
    `prepare_backward` before the last of them; `step`.

    spec: what it can do. parameters: by name. local: this process's piece of each, which shares its memory, the
    parameter itself unless distributed.shard is full. owned: names of those whose state this process keeps, all of
    them unless distributed.shard is states or full; what is said of state below is said of these. lr_factors: what the
    learning rate of each is multiplied by. memory: the memory mode in use. has_master: whether it keeps fp32 masters of
    16-bit weights. is_fused: whether it steps inside backward. clipping: global, lagged or per-tensor. buffers: where
    gradients of several micro-steps are summed. pages: state in host memory, in memory modes paged and streamed.
    stream: weights in host memory, in memory mode streamed. is_dry_run: inside `dry_run`.
    cut_by: the processes among which the parameters are cut, None if they are whole. num_requantized: weights whose
    moments loading has requantized, because their pieces do not begin with a block.
    """

    spec: OptimizerSpec
    parameters: dict[str, nn.Parameter]
    local: dict[str, Tensor]
    owned: list[str]
    lr_factors: dict[str, float]
    memory: str
    has_master: bool
    is_fused: bool
    clipping: str
    buffers: GradientBuffers
    loss_scale: LossScale
    pages: Pages | None
    stream: StreamedWeights | None
    is_dry_run: bool
    num_requantized: int
    cut_by: dist.ProcessGroup | None

    def set_hyper(self, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        """Set the hyperparameters of the following steps; max_grad_norm 0: no clipping. Never inside a graph capture.

        lr: of parameters whose factor is 1.
        """
        ...

    def reduce_over(self, world: World, dtype: torch.dtype | None = None) -> None:
        """Sum each step's gradients over processes from now on, in a dtype, None: their own. Call it before the first
        step."""
        ...

    def publish(self) -> None:
        """Give all processes the weights of those that own them, if they share the state. All of them must call it."""
        ...

    def prepare_backward(self) -> None:
        """Announce the backward pass of a step's last micro-step, which applies the update if the step is fused."""
        ...

    def step(self) -> tuple[Tensor, Tensor | bool]:
        """Take one step and free the gradients. Return (global gradient norm before clipping, whether it was applied).

        An unfused step is skipped if the global norm is not finite. A fused one has been applied inside backward, where
        single tensors may have been skipped, and is only finalized here; it counts as skipped if every tensor was. Both
        results stay on the device where the implementation needs no synchronization.
        """
        ...

    def dry_run(self) -> contextlib.AbstractContextManager[None]:
        """Let steps inside the block run all their work but change no weight, moment or counter: to warm up."""
        ...

    def finish_capture(self) -> None:
        """Copy what a captured step reads from the host; call after every capture as a CUDA graph, outside of it."""
        ...

    def release_captures(self) -> None:
        """Free what was kept for captured graphs; none of them may be replayed again."""
        ...

    @property
    def effective_lr(self) -> float | None:
        """The learning rate that the optimizer has found itself, times the factor lr; None if lr is the rate."""
        ...

    @property
    def num_skipped_tensors(self) -> Tensor:
        """How many tensors' updates were skipped inside backward since the run began."""
        ...

    def value(self, name: str) -> Tensor:
        """Return a weight in fp32, as exactly as the memory mode keeps it. Read-only.

        Exports use it. Of an optimizer that averages the weights itself it is the average.
        """
        ...

    def average_sources(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return what a moving average reads: fp32 weights and None, or 16-bit weights and their remainders (None: no
        remainders).

        Raises UserError if the remainders are not on the device.
        """
        ...

    def master_tensors(self) -> list[Tensor]:
        """Return the masters or remainders that complete the weights to fp32."""
        ...

    def make_pages(self, device: torch.device) -> Pages | None:
        """Return the host memory that memory modes paged and streamed take for a device; None if nothing is large
        enough or it has no such mode."""
        ...

    def make_stream(self, device: torch.device, dtype: torch.dtype) -> StreamedWeights | None:
        """Return the weights by block, uninitialized, that memory mode streamed takes for a device; None as for
        `make_pages`."""
        ...

    def parameter_state(self, name: str) -> dict[str, Tensor]:
        """Return all that is kept for a parameter, by part, without copies."""
        ...

    def live_state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs besides the weights, as `part/parameter name`.

        No copies: the next step changes these tensors, which have the weights' memory order.
        """
        ...

    def whole_state(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """Yield what `live_state` returns, of all processes together; what others have is on the CPU.

        One tensor at a time. All processes must call and exhaust it; only the main one is given what others own.
        """
        ...

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Load a checkpoint's state. The module must hold the checkpoint's weights already.

        Raises UserError if a parameter's state is missing, has another shape, or comes from an optimizer or memory mode
        that this one cannot continue.
        """
        ...


def check(config: OptimizerConfig, device: torch.device | None = None) -> OptimizerSpec:
    """Return the spec of the config's optimizer. Raises UserError for what it cannot do, here or at all."""
    spec = OPTIMIZERS.get(config.name)
    if spec is None:
        raise UserError(f"optimizer.name {config.name!r} is unknown; use {', '.join(OPTIMIZERS)}")
    if spec.package and importlib.util.find_spec(spec.package) is None:
        raise UserError(
            f"optimizer.name {spec.name} needs {spec.package}, which is not installed; use adamw8bit, or install it: "
            f"pip install {spec.package}"
        )
    if device is not None and device.type in ("cpu", "cuda") and device.type not in spec.devices:
        raise UserError(f"optimizer.name {spec.name} {spec.device_limit}")
    if config.is_fused and not spec.steps_inside_backward:
        can = names_with(lambda spec: spec.steps_inside_backward)
        raise UserError(f"optimizer.fused_backward needs {can}; {spec.name} steps after backward: set it to false")
    for setting in sorted({setting for known in OPTIMIZERS.values() for setting in known.settings}):
        default = OptimizerConfig.model_fields[setting].default
        if setting not in spec.settings and getattr(config, setting) != default:
            raise UserError(f"optimizer.{setting} has no effect on {spec.name}; leave it out")
    config.clipping_mode()
    return spec


def check_package(setting: str, package: str, other: str) -> None:
    """Raise UserError if a package that a setting needs cannot be imported. other: the value to use without it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting} needs {package}, which is not installed; use {other}")
    try:
        importlib.import_module(package)
    # whatever a broken installation raises
    except Exception as error:
        raise UserError(message(package, error)) from error


def check_library(config: OptimizerConfig) -> None:
    """Raise UserError if the package that the config's optimizer comes from cannot be imported."""
    spec = OPTIMIZERS[config.name]
    if not spec.package:
        return
    try:
        importlib.import_module(spec.library.partition(":")[0])
    # whatever a broken installation raises
    except Exception as error:
        raise UserError(message(spec.package, error)) from error


def memory_mode(config: OptimizerConfig, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """Return the memory mode that optimizer.memory resolves to for weights of a dtype: fp32, exact, near, rounded,
    paged or streamed.

    device: where the run trains, if known. Raises UserError for a mode or another setting that the optimizer does not
    support.
    """
    spec, memory = check(config, device), config.memory
    if dtype == torch.float32:
        if memory not in ("auto", "fp32"):
            raise UserError(
                f"optimizer.memory {memory} is for 16-bit weights, and model.precision is fp32 here; use auto, "
                "or model.precision bf16"
            )
        return "fp32"
    if memory == "auto":
        return spec.memory_modes[0]
    if memory not in spec.memory_modes:
        can = names_with(lambda spec: memory in spec.memory_modes)
        kept = " or ".join(f"{MEMORY_MODES[mode].description}s" for mode in spec.memory_modes)
        raise UserError(
            f"optimizer.memory {memory} needs {can}; {spec.name} keeps {kept}: "
            f"use auto or {' or '.join(spec.memory_modes)}"
        )
    if MEMORY_MODES[memory].streams_weights and not config.is_fused:
        raise UserError(
            f"optimizer.memory {memory} updates each block while its weights are on the GPU, inside the backward pass; "
            "set optimizer.fused_backward to true and optimizer.clipping to auto, or use paged"
        )
    return memory


def load_class(path: str) -> type:
    """Return the class at "module:class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def make_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    lr_factors: Mapping[str, float] | None = None,
    sharers: World = ALONE,
) -> UNetOptimizer:
    """Return the config's optimizer of a module, which it moves to a device and converts to a dtype.

    dtype, device: the module's own if None. Give an fp32 module and a 16-bit dtype, and what the weights lose by
    rounding is kept as optimizer.memory says. seed: the run's, for stochastic rounding. lr_factors: by the name of a
    parameter, what its learning rate is multiplied by; 1 for those that it lacks. sharers: the processes that divide
    its state among themselves. Raises UserError for settings that the optimizer does not support.
    """
    first = next(p for p in module.parameters() if p.requires_grad)
    dtype, device = dtype or first.dtype, device or first.device
    memory = memory_mode(config, dtype, device)
    spec = OPTIMIZERS[config.name]
    return load_class(spec.implementation)(module, spec, config, dtype, memory, seed, device, lr_factors or {}, sharers)
