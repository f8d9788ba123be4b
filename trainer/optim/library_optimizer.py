"""Optimizers of torch and bitsandbytes over fp32 weights, or over fp32 masters of 16-bit weights.

bitsandbytes' PagedAdamW8bit allocates the moments of tensors of 100,000 elements or more in CUDA's managed memory:
torch sees them as CPU tensors (`get_state_buffer`, `get_paged`), and the driver moves them to where they are used. So
only bitsandbytes can allocate these buffers, a checkpoint's moments are copied into them, and the host can read them
because its step ends by waiting for the device.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.distributed.world import World
from safelight.trainer.optim.base import LossScale, OptimizerBase
from safelight.trainer.registry.optimizers import OptimizerSpec

State = dict[str, "Tensor | int"]
_DTYPE_OF_SIZE = {1: torch.uint8, 4: torch.float32}


class LibraryOptimizer(OptimizerBase):
    """A UNetOptimizer over a torch.optim.Optimizer. master: name -> fp32 parameter, the module's own if it is fp32.

    A subclass allocates a parameter's state, for both the first step and loading. OPTIONS: arguments of the library's
    constructor besides the config's. ARGUMENTS: what it calls those of the config that have another name there.
    NUMBERS: keys of its parameter groups that are state.
    """

    OPTIONS: ClassVar[dict[str, object]] = {}
    ARGUMENTS: ClassVar[dict[str, str]] = {}
    NUMBERS: ClassVar[tuple[str, ...]] = ()

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
        assert memory == "fp32"
        super().__init__(module.to(device), spec, config, dtype, memory, device, lr_factors, sharers)
        if spec.needs_contiguous_weights and not self.has_master:
            # before anything takes a view of their storage, because the library's first step would replace it
            for p in self.parameters.values():
                p.data = p.detach().contiguous()
        self.master = {name: self.parameters[name] for name in self.owned}
        if self.has_master:
            # the storage of an fp32 weight becomes its master's: nothing is rounded first or exists twice
            self.master = {name: nn.Parameter(p.detach().float().contiguous()) for name, p in self.master.items()}
            module.to(dtype)
        path, _, name = spec.library.partition(":")
        names = ("lr", "weight_decay", *spec.settings)
        settings = {self.ARGUMENTS.get(name, name): getattr(config, name) for name in names}
        # the same groups in every process, because some of their numbers are state
        members: dict[float, list[nn.Parameter]] = {factor: [] for factor in self.lr_factors.values()}
        for parameter, master in self.master.items():
            members[self.lr_factors[parameter]].append(master)
        # of each parameter group
        self._factors = list(members)
        groups = [{"params": masters} for masters in members.values()]
        settings |= self.OPTIONS
        self._library = getattr(importlib.import_module(path), name)(groups, **settings)
        self._max_grad_norm = 0.0
        self.loss_scale = LossScale(device, dtype == torch.float16)

    def _make_state(self, name: str, master: nn.Parameter) -> State:
        """Return the library's state of a parameter before its first step."""
        raise NotImplementedError

    def value(self, name: str) -> Tensor:
        return self.master[name].detach()

    def average_sources(self) -> tuple[list[Tensor], None]:
        return [w.detach() for w in self.master.values()], None

    def master_tensors(self) -> list[Tensor]:
        return list(self.master.values())

    def make_pages(self, device: torch.device) -> None:
        return None

    @property
    def num_skipped_tensors(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64)

    def _take_gradients(self, scale: Tensor | None) -> list[Tensor]:
        """Move gradients to the masters, in fp32 and divided by the scale; zeros for a parameter that the loss did not
        reach."""
        for name, master in self.master.items():
            gradient = self._take(name)
            if gradient is None:
                master.grad = torch.zeros_like(master)
            else:
                master.grad = gradient.float().contiguous() if self.has_master else gradient
                assert master.grad.stride() == master.stride()
        gradients = [master.grad for master in self.master.values()]
        if scale is not None and gradients:
            torch._foreach_div_(gradients, scale)
        return gradients

    def set_hyper(self, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        self._max_grad_norm = max_grad_norm
        for factor, group in zip(self._factors, self._library.param_groups, strict=True):
            group["lr"], group["weight_decay"] = lr * factor, weight_decay

    @torch.no_grad()
    def step(self) -> tuple[Tensor, bool]:
        self._finish_backward()
        gradients = self._take_gradients(self.loss_scale.scale if self.loss_scale.enabled else None)
        norm = torch.linalg.vector_norm(self._norms_of_all(torch._foreach_norm(gradients) if gradients else []))
        self.loss_scale.update(torch.isfinite(norm))
        # a host sync: neither library takes "skip this step" as a tensor in all our cases
        length = norm.item()
        is_applied = math.isfinite(length) and not self.is_dry_run
        if is_applied and gradients:
            # a smaller gradient would be multiplied by one
            if 0 < self._max_grad_norm < length + 1e-6:
                torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            for name, master in self.master.items():
                if not self._library.state.get(master):
                    self._library.state[master] = self._make_state(name, master)
            self._update()
            if self.has_master:
                weights = [self.parameters[name] for name in self.master]
                torch._foreach_copy_(weights, list(self.master.values()))
        if is_applied:
            self.publish()
        for master in self.master.values():
            master.grad = None
        return norm, is_applied

    def _update(self) -> None:
        """Update the masters by their gradients."""
        self._library.step()

    def _numbers(self) -> dict[str, float | int]:
        return {key: group[name] for key, group, name in self._places()}

    def _set_numbers(self, numbers: dict[str, float | int]) -> None:
        for key, group, name in self._places():
            group[name] = numbers[key]

    def _places(self) -> list[tuple[str, dict, str]]:
        """Return (name in a checkpoint, parameter group, its key) of each number. Without prefix: the first group's."""
        groups = enumerate(self._library.param_groups)
        return [(f"{n}/{name}" if n else name, group, name) for n, group in groups for name in self.NUMBERS]

    def finish_capture(self) -> None:
        raise NotImplementedError(f"{self.spec.name} cannot be captured as a CUDA graph")

    def release_captures(self) -> None:
        pass

    def parameter_state(self, name: str) -> dict[str, Tensor]:
        master = self.master[name]
        state = {"master": master.detach()} if self.has_master else {}
        for part, value in self._library.state.get(master, {}).items():
            # bitsandbytes' code books are constants of the library
            if not part.startswith("qmap"):
                state[part] = value if torch.is_tensor(value) else torch.tensor(value)
        return state

    def _load_parameter_state(self, name: str, parts: dict[str, Tensor]) -> None:
        """Load what `parameter_state` returned. Raises UserError if it is missing, misshapen or of another
        optimizer."""
        master = self.master[name]
        if self.has_master:
            if "master" not in parts or (parts["master"].shape, parts["master"].dtype) != (master.shape, master.dtype):
                raise UserError(f"the checkpoint has no fp32 master of {name}: it was saved at another precision")
            master.copy_(parts["master"])
            self.parameters[name].copy_(master)
        moments = {part: value for part, value in parts.items() if part != "master"}
        if moments:
            self._load_moments(name, master, moments)

    def _load_moments(self, name: str, master: nn.Parameter, parts: dict[str, Tensor]) -> None:
        """Load moments into fresh state, so that the library's own kind of memory and its memory order are kept."""
        state = self._make_state(name, master)
        own = {part: value for part, value in state.items() if not part.startswith("qmap")}
        for part, value in own.items():
            if part not in parts and not part.startswith("absmax"):
                raise UserError(f"the checkpoint's moments of {name} are not of optimizer {self.spec.name}")
            if part.startswith("absmax") or not torch.is_tensor(value):
                continue
            if parts[part].shape != value.shape:
                shape = tuple(parts[part].shape)
                raise UserError(f"the checkpoint's moments of {name} have shape {shape}, not {tuple(value.shape)}")
        if "strides" in parts:
            raise UserError(
                f"the checkpoint's 8-bit moments of {name} are in blocks of channels-last memory, which "
                f"{self.spec.name} does not support; resume with optimizer.name adamw8bit"
            )
        is_same_kind = own.keys() == parts.keys() and all(
            parts[part].dtype == value.dtype for part, value in own.items() if part != "step"
        )
        if not is_same_kind:
            raise UserError(f"the checkpoint's moments of {name} are not of the kind that {self.spec.name} keeps")
        for part, value in own.items():
            if torch.is_tensor(value):
                value.copy_(parts[part])
            else:
                state[part] = int(parts[part])
        self._library.state[master] = state


class TorchAdamW(LibraryOptimizer):
    """torch.optim.AdamW, fused: one pass over a tensor instead of a dozen.

    Its own `step` sorts the tensors and counts the steps of each again every time, which is half of its time for a
    small model on a CPU. So the kernel is called here as `step` would call it, and tensors that have taken equally many
    steps share their count.
    """

    OPTIONS: ClassVar = {"fused": True}

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._batches: list[_Batch] = []

    def _make_state(self, name: str, master: nn.Parameter) -> State:
        # torch's own first step refuses the fused form for meta tensors
        self._batches = []
        return {
            "step": torch.zeros((), device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }

    def _update(self) -> None:
        self._batches = self._batches or self._batched()
        for group, masters, averages, squares, step in self._batches:
            step += 1
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                masters,
                [master.grad for master in masters],
                averages,
                squares,
                [],
                [step] * len(masters),
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _batched(self) -> list[_Batch]:
        """Return the tensors that one call updates: those of a group that have taken equally many steps."""
        batches: list[_Batch] = []
        for group in self._library.param_groups:
            members: dict[float, list[nn.Parameter]] = {}
            for master in group["params"]:
                step = self._library.state[master]["step"]
                members.setdefault(0 if step.is_meta else float(step), []).append(master)
            for masters in members.values():
                states = [self._library.state[master] for master in masters]
                for state in states:
                    state["step"] = states[0]["step"]
                averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
                batches.append(_Batch(group, masters, averages, squares, states[0]["step"]))
        return batches

    def parameter_state(self, name: str) -> dict[str, Tensor]:
        state = super().parameter_state(name)
        # a file of tensors has no two that share memory
        return state | ({"step": state["step"].clone()} if "step" in state else {})


class _Batch(NamedTuple):
    """Tensors that one call of AdamW's kernel updates, and the steps they have taken. group: of the library."""

    group: dict
    masters: list[nn.Parameter]
    averages: list[Tensor]
    squares: list[Tensor]
    step: Tensor


class TorchAdafactor(LibraryOptimizer):
    """torch.optim.Adafactor. Source: Shazeer and Stern 2018, arXiv:1804.04235."""

    def _make_state(self, name: str, master: nn.Parameter) -> State:
        step = torch.tensor(0.0)
        if master.dim() < 2:
            return {"step": step, "variance": torch.zeros_like(master)}
        *outer, rows, columns = master.shape
        return {
            "step": step,
            "row_var": master.new_zeros((*outer, rows, 1)),
            "col_var": master.new_zeros((*outer, 1, columns)),
        }


class BitsandbytesOptimizer(LibraryOptimizer):
    """An 8-bit optimizer of bitsandbytes. Source: Dettmers et al. 2022, arXiv:2110.02861; Lion: Chen et al. 2023,
    arXiv:2302.06675.

    on_meta_update: called for each tensor, in place of the library's kernel, if the parameters are meta tensors:
    (parameter, gradient, buffers of its moments).
    """

    on_meta_update: Callable[[Tensor, Tensor, list[Tensor]], None] | None = None

    def _make_state(self, name: str, master: nn.Parameter) -> State:
        if master.is_meta:
            # the library's kernels do not run on meta tensors: only the memory that they need is allocated
            buffers = [
                torch.empty(buffer.num_elements, dtype=_DTYPE_OF_SIZE[buffer.itemsize], device=master.device)
                for buffer in self.spec.moments(master.shape)
            ]
            return {"step": 0, **{f"buffer{number}": buffer for number, buffer in enumerate(buffers)}}
        library = self._library
        library.state.pop(master, None)
        index = self._factors.index(self.lr_factors[name])
        group = library.param_groups[index]
        place = next(i for i, p in enumerate(group["params"]) if p is master)
        library.init_state(group, master, index, place)
        return library.state.pop(master)

    def _update(self) -> None:
        if not next(iter(self.master.values())).is_meta:
            self._library.step()
        elif self.on_meta_update is not None:
            for master in self.master.values():
                _, *buffers = self._library.state[master].values()
                self.on_meta_update(master.detach(), master.grad, buffers)
