"""torch's AdamW and bitsandbytes' AdamW8bit over fp32 weights, or over fp32 masters of 16-bit ones.

bitsandbytes' PagedAdamW8bit makes the moments of tensors of 100,000 elements or more in CUDA's managed memory: torch sees
them as CPU tensors (`get_state_buffer`, `get_paged`), the driver moves them to where they are used. So its buffers are its
own to make, a checkpoint's moments are copied into them, and its step, which ends in a wait for the device, is what
makes them readable on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.config.toml import Optimizer as OptimizerConfig
from safelight.trainer.optim.gradient_buffers import GradientBuffers

# optimizer.name -> class of bitsandbytes.optim
BITSANDBYTES = {"bnb_adamw8bit": "AdamW8bit", "bnb_paged_adamw8bit": "PagedAdamW8bit"}
STATES = ("state1", "state2", "absmax1", "absmax2")


class LibraryAdamW:
    """Steps a module's parameters by a library's optimizer. master: name -> fp32 parameter; the module's own if it is fp32."""

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        config: OptimizerConfig,
        dtype: torch.dtype,
        memory: str,
        seed: int,
    ):
        assert memory == "fp32"
        self.parameters, self.buffers = parameters, GradientBuffers(parameters)
        self.has_master = dtype != torch.float32
        self.master = dict(parameters)
        if self.has_master:
            # an fp32 weight's own storage becomes its master's: nothing is rounded first, nothing is held twice
            self.master = {name: nn.Parameter(p.detach().float().contiguous()) for name, p in parameters.items()}
            module.to(dtype)
        elif config.name in BITSANDBYTES:
            # its first step gives weights that are not contiguous new memory: done before anything keeps views of them
            for p in parameters.values():
                p.data = p.detach().contiguous()
        self.name = config.name
        self._max_grad_norm, self._is_rehearsing = 0.0, False
        options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        if config.name == "adamw":
            # one pass over a tensor in place of a dozen
            self.inner = torch.optim.AdamW(self.master.values(), **options, fused=True)
        else:
            import bitsandbytes.optim

            self.inner = getattr(bitsandbytes.optim, BITSANDBYTES[config.name])(self.master.values(), **options)

    def value(self, name: str) -> Tensor:
        return self.master[name].detach()

    def _take_gradients(self, scale: Tensor | None) -> list[Tensor]:
        """Move gradients to the master, unscaled, as fp32; a parameter the loss did not reach gets zeros."""
        for name in self.parameters:
            master, gradient = self.master[name], self.buffers.take(name)
            if gradient is None:
                master.grad = torch.zeros_like(master)
            else:
                master.grad = gradient.float().contiguous() if self.has_master else gradient
                assert master.grad.stride() == master.stride()
        gradients = [master.grad for master in self.master.values()]
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        return gradients

    def set_hyper(self, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        """Take the numbers of the steps to come."""
        self._max_grad_norm = max_grad_norm
        for group in self.inner.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay

    def rehearse(self, wanted: bool) -> None:
        """Let the steps to come change nothing, or no longer."""
        self._is_rehearsing = wanted

    def counters(self) -> list[Tensor]:
        """Return what steps change beside the weights and their state."""
        return []

    def step(self, loss_scale) -> tuple[Tensor, bool]:
        """As UNetOptimizer.step. One host sync: neither library takes found-inf as a tensor for all our cases."""
        gradients = self._take_gradients(loss_scale.scale if loss_scale.enabled else None)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        finite = torch.isfinite(norm)
        loss_scale.update(finite)
        taken = bool(finite) and not self._is_rehearsing
        if taken:
            if self._max_grad_norm > 0:
                torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            self._make_moments()
            self.inner.step()
            if self.has_master:
                torch._foreach_copy_(list(self.parameters.values()), list(self.master.values()))
        for master in self.master.values():
            master.grad = None
        return norm, taken

    def _make_moments(self) -> None:
        """Make torch's state before its first step: it would do so itself, but refuses the fused form on meta tensors."""
        if self.name != "adamw":
            return
        for master in self.master.values():
            if not self.inner.state[master]:
                step = torch.zeros((), device=master.device)
                self.inner.state[master] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }

    def live_state_of(self, name: str) -> dict[str, Tensor]:
        """Return a parameter's master, if it has one, and moments, as they are: no copies."""
        master = self.master[name]
        state = {"master": master.detach()} if self.has_master else {}
        for part, value in self.inner.state.get(master, {}).items():
            # bitsandbytes' code books are constants of the library
            if not part.startswith("qmap"):
                state[part] = value if torch.is_tensor(value) else torch.tensor(value)
        return state

    def load(self, name: str, parts: dict[str, Tensor]) -> None:
        """Take what state_of gave. Raises UserError where it is missing, of another shape or of another optimizer."""
        master = self.master[name]
        if self.has_master:
            if "master" not in parts or parts["master"].shape != master.shape:
                raise UserError(f"the checkpoint has no fp32 master of {name}: it was saved at another precision")
            master.copy_(parts.pop("master"))
            self.parameters[name].copy_(master)
        if parts:
            self._load_moments(name, master, parts)

    def _load_moments(self, name: str, master: nn.Parameter, parts: dict[str, Tensor]) -> None:
        needed = ("exp_avg", "exp_avg_sq", "step") if self.name == "adamw" else ("state1", "step")
        if not all(part in parts for part in needed):
            raise UserError(f"the checkpoint's moments of {name} are not of optimizer {self.name}")
        shape = tuple(parts[needed[0]].shape)
        if shape != tuple(master.shape):
            raise UserError(f"the checkpoint's moments of {name} have shape {shape}, not {tuple(master.shape)}")
        if self.name == "adamw":
            # in the weight's order of memory: the fused form goes through all of them by address
            moments = {part: torch.empty_like(master).copy_(value) for part, value in parts.items() if part != "step"}
            self.inner.state[master] = {"step": parts["step"].to(master.device).clone(), **moments}
            return
        if "strides" in parts:
            raise UserError(
                f"the checkpoint's 8-bit moments of {name} are in blocks of channels-last memory, which {self.name} has not; "
                "resume with optimizer.name adamw8bit"
            )
        self.inner.state.pop(master, None)
        self.inner.init_state(self.inner.param_groups[0], master, 0, list(self.master).index(name))
        state = self.inner.state[master]
        for part in STATES:
            if (part in parts) != (part in state) or (part in parts and parts[part].dtype != state[part].dtype):
                raise UserError(f"the checkpoint's moments of {name} are not of the kind that {self.name} keeps")
            if part in parts:
                state[part].copy_(parts[part])
        state["step"] = int(parts["step"])
