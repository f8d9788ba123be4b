"""AdamW over the UNet: fp32 weights, or 16-bit weights with an fp32 master and, for fp16, a dynamic loss scale.

The moments are bitsandbytes' 8-bit blocks or torch's fp32. A step with a non-finite gradient changes no weight and no
moment; with fp16 it halves the loss scale. State is kept under the UNet's own parameter names, contiguous.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor, nn

from safelight.trainer.config import Optimizer as OptimizerConfig

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 1000
MIN_SCALE, MAX_SCALE = 2.0**-14, 2.0**24


def learning_rate(schedule: str, peak: float, step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of a stage of num_steps.

    Warm-up rises linearly and reaches the peak at step warmup_steps; then constant, or linear or cosine towards zero
    at num_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"schedule {schedule!r} is unknown; use constant, linear or cosine")


class LossScale:
    """fp16's dynamic loss scale, on the device: halved by a non-finite step, doubled after 1,000 finite ones."""

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(INITIAL_SCALE if enabled else 1.0, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        if not self.enabled:
            return
        self.num_good = torch.where(finite, self.num_good + 1, 0)
        grow = self.num_good >= GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(MIN_SCALE, MAX_SCALE)
        self.num_good = torch.where(grow, 0, self.num_good)


def check_optimizer(name: str) -> None:
    """Raise ValueError if an optimizer is unknown or its library is not there."""
    if name not in ("adamw", "adamw8bit"):
        raise ValueError(f"optimizer.name {name!r} is unknown; use adamw8bit or adamw")
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer.name adamw8bit needs bitsandbytes, which is not installed; use adamw")


class UNetOptimizer:
    """AdamW over a module's trainable parameters, which it brings to a dtype.

    dtype: of the weights to train with; the module's own if None. Give an fp32 module and a 16-bit dtype, and the
    master keeps what the weights lose. master: name -> fp32 parameter; the module's own where it stays fp32.
    Raises ValueError for an unknown optimizer.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, dtype: torch.dtype | None = None):
        check_optimizer(config.name)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        dtype = dtype or next(iter(self.parameters.values())).dtype
        self.has_master = dtype != torch.float32
        self.master = dict(self.parameters)
        if self.has_master:
            # an fp32 weight's own storage becomes its master's: nothing is rounded first, nothing is held twice
            self.master = {name: nn.Parameter(p.detach().float().contiguous()) for name, p in self.parameters.items()}
            module.to(dtype)
        first = next(iter(self.parameters.values()))
        self.loss_scale = LossScale(first.device, first.dtype == torch.float16)
        self.name = config.name
        options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        if config.name == "adamw":
            self.inner = torch.optim.AdamW(self.master.values(), **options)
        else:
            from bitsandbytes.optim import AdamW8bit

            self.inner = AdamW8bit(self.master.values(), **options)

    def _take_gradients(self) -> list[Tensor]:
        """Move gradients to the master, unscaled, as fp32; a parameter the loss did not reach gets zeros."""
        for name, p in self.parameters.items():
            master = self.master[name]
            if p.grad is None:
                master.grad = torch.zeros_like(master)
            elif self.has_master:
                master.grad = p.grad.float().contiguous()
                p.grad = None
        gradients = [master.grad for master in self.master.values()]
        if self.loss_scale.enabled:
            torch._foreach_div_(gradients, self.loss_scale.scale)
        return gradients

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, max_grad_norm: float) -> tuple[Tensor, bool]:
        """Take one step and free the gradients. Return (global norm before clipping, was it taken).

        max_grad_norm 0: no clipping. Not taken where the norm is not finite.
        """
        gradients = self._take_gradients()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        finite = torch.isfinite(norm)
        self.loss_scale.update(finite)
        # TODO: drop this one host sync a step once a kernel of ours takes found-inf as a tensor
        taken = bool(finite)
        if taken:
            if max_grad_norm > 0:
                torch._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            for group in self.inner.param_groups:
                group["lr"], group["weight_decay"] = lr, weight_decay
            self.inner.step()
            if self.has_master:
                torch._foreach_copy_(list(self.parameters.values()), list(self.master.values()))
        for master in self.master.values():
            master.grad = None
        return norm, taken

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs beside the weights, contiguous, on the CPU: `part/parameter name`."""
        state: dict[str, Tensor] = {
            "loss_scale/scale": self.loss_scale.scale,
            "loss_scale/num_good": self.loss_scale.num_good,
        }
        for name, master in self.master.items():
            if self.has_master:
                state[f"master/{name}"] = master.detach()
            for part, value in self.inner.state.get(master, {}).items():
                # bitsandbytes' code books are constants of the library
                if part.startswith("qmap"):
                    continue
                state[f"{part}/{name}"] = value if torch.is_tensor(value) else torch.tensor(value)
        # a copy even on the CPU: what is returned must not change under a step that follows
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Take what state_tensors gave. Raises ValueError where a parameter's state is missing or of another shape."""
        device = self.loss_scale.scale.device
        self.loss_scale.scale = state["loss_scale/scale"].to(device)
        self.loss_scale.num_good = state["loss_scale/num_good"].to(device)
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self.master}
        for key, value in state.items():
            part, name = key.split("/", 1)
            if part == "loss_scale":
                continue
            if name not in by_name:
                raise ValueError(f"the checkpoint's optimizer state names {name}, which this UNet does not train")
            by_name[name][part] = value
        if self.name == "adamw8bit" and "dynamic" not in self.inner.name2qmap:
            self.inner.fill_qmap()
        for name, parts in by_name.items():
            master = self.master[name]
            if self.has_master:
                if "master" not in parts or parts["master"].shape != master.shape:
                    raise ValueError(f"the checkpoint has no fp32 master of {name}: it was saved at another precision")
                master.copy_(parts.pop("master"))
                self.parameters[name].copy_(master)
            if parts:
                self._load_moments(name, master, parts)

    def _load_moments(self, name: str, master: nn.Parameter, parts: dict[str, Tensor]) -> None:
        wanted = {"adamw": "exp_avg", "adamw8bit": "state1"}[self.name]
        if wanted not in parts:
            raise ValueError(f"the checkpoint's moments of {name} are not of optimizer {self.name}")
        if parts[wanted].shape != master.shape:
            raise ValueError(
                f"the checkpoint's moments of {name} have shape {tuple(parts[wanted].shape)}, not {tuple(master.shape)}"
            )
        state = {}
        for part, value in parts.items():
            if part == "step":
                # torch keeps a CPU tensor, bitsandbytes an int
                state[part] = value.clone() if self.name == "adamw" else int(value)
            else:
                state[part] = value.to(master.device).clone()
        if self.name == "adamw8bit" and state["state1"].dtype == torch.uint8:
            state["qmap1"] = self.inner.name2qmap["dynamic"].to(master.device)
            state["qmap2"] = self.inner.name2qmap["udynamic"].to(master.device)
        self.inner.state[master] = state
