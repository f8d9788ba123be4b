"""Bytes and FLOPs of each operator and kernel in a step: every input and output counted once.

A step is traced operator by operator, on its device or on meta tensors (trainer/memory_plan/meta_run.py). Our own
kernels are not operators; on meta tensors their launches are recorded instead.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from safelight.bench.core.operators import class_of, class_of_kernel, does_work
from safelight.kernels.triton.jit import Launch, LaunchMode
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.optim.kernel_adamw import KernelAdamW
from safelight.trainer.step.profiler_ranges import listen_to_ranges

# names in result lines of classes that operators.py names differently
_KINDS = {"matmul": "linear", "copy/cast": "copies"}


def _cpu_attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(gradient, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# attention on a CPU, which torch's flop_registry lacks
_FORMULAS: dict[object, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


@dataclass
class Cost:
    """Bytes and FLOPs of all calls of one operator. kind: its class; sizes: number of calls by (bytes, FLOPs)."""

    kind: str = ""
    is_kernel: bool = False
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        return self.sizes.total()

    @property
    def num_bytes(self) -> int:
        return sum(n * num_bytes for (num_bytes, _), n in self.sizes.items())

    @property
    def flops(self) -> int:
        return sum(n * flops for (_, flops), n in self.sizes.items())

    def roofline_ms(self, ceilings: dict) -> float:
        """Return the time of all calls at the ceilings: for each call the larger of its bytes' and its FLOPs' time."""
        rate, bandwidth = ceilings["matmul_tflops"] * 1e9, ceilings["copy_gb_per_s"] * 1e6
        return sum(n * max(num_bytes / bandwidth, flops / rate) for (num_bytes, flops), n in self.sizes.items())


# by (called by the optimizer, name)
Costs = dict[tuple[bool, str], Cost]


def kind_of(name: str, in_optimizer: bool = False) -> str:
    """Return the class of an operator: conv, linear, attention, norm, elementwise, optimizer or copies."""
    return "optimizer" if in_optimizer else _KINDS.get(class_of(name), class_of(name))


def num_bytes(x: Tensor) -> int:
    """Return the bytes in memory behind a tensor; an expanded tensor counts once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class OperatorCosts(LaunchMode):
    """Dispatch mode that adds up costs by operator.

    phases: the phases of the step that are open now, kept up to date by the caller. device: other devices are ignored.
    """

    def __init__(self, phases: list[str], device: str = "cpu"):
        super().__init__()
        self.phases, self.device, self.costs = phases, device, defaultdict(Cost)

    def _launched(self, launch: Launch) -> None:
        in_optimizer = "optimizer" in self.phases
        cost = self.costs[in_optimizer, launch.kernel.__name__]
        module = launch.kernel.function.__module__.rpartition(".")[2]
        cost.kind, cost.is_kernel = "optimizer" if in_optimizer else class_of_kernel(module), True
        cost.sizes[sum(num_bytes(x) for x in launch.tensors()), 0] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        # an in-place operator has its first tensor among inputs and outputs: it reads and writes it
        tensors = [x for x in tree_leaves((args, kwargs, outputs)) if isinstance(x, Tensor)]
        if does_work(name, is_view) and any(x.device.type == self.device for x in tensors):
            in_optimizer = "optimizer" in self.phases
            cost = self.costs[in_optimizer, name]
            cost.kind = kind_of(name, in_optimizer)
            formula = _FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
            # torch's formulas require out_val, ours ignore it
            flops = formula(*args, **kwargs, out_val=outputs) if formula is not None else 0
            cost.sizes[sum(num_bytes(x) for x in tensors), flops] += 1
        return outputs


@contextlib.contextmanager
def _open_phase(phases: list[str], name: str) -> Iterator[None]:
    phases.append(name)
    try:
        yield
    finally:
        phases.pop()


def step_costs(run: MetaRun, batch_size: int, height: int, width: int, num_micro: int = 1) -> Costs:
    """Return the costs of a step of `num_micro` micro-batches, traced on meta tensors; height, width of the latents."""
    # the first step creates the optimizer's states
    run.step(batch_size, height, width, num_micro)
    phases: list[str] = []
    with OperatorCosts(phases, "meta") as costs, listen_to_ranges(lambda name: _open_phase(phases, name)):
        run.step(batch_size, height, width, num_micro)
    return _with_addressed_bytes(dict(costs.costs), run)


def _with_addressed_bytes(costs: Costs, run: MetaRun) -> Costs:
    """Fill in the bytes of kernels that take tables of addresses, whose tensors a launch does not show."""
    found: dict[str, int] = defaultdict(int)
    if isinstance(run.optimizer, KernelAdamW):
        for name, p in run.optimizer.parameters.items():
            state = run.optimizer.parameter_state(name)
            kernel = "_adamw8bit_kernel" if "absmax1" in state else "_adamw32bit_kernel"
            held = [p, *(x for part, x in state.items() if part not in ("step", "strides"))]
            # all is read and written, the gradient read
            found[kernel] += 2 * sum(map(num_bytes, held)) + num_bytes(p)
    if run.ema is not None and run.ema.averages:
        # the average is read and written, the fp32 weight is read
        found["_ema_kernel"] = sum(3 * num_bytes(x) for x in run.ema.averages.values())
    for (_, name), cost in costs.items():
        if name in found and cost.is_kernel:
            cost.sizes = Counter({(found[name] // cost.calls, 0): cost.calls})
    return costs
