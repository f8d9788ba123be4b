"""`safelight bench optimizer`: time per step, bytes held and bytes moved of every optimizer that a config can name.

The optimizers and memory modes come from the config's schema, so a new one is measured without a change here. The
tensors are every n-th of SD1.5's, ordered by size, so that small and large ones keep their proportion. All variants
are in memory at once and their steps are interleaved. A variant that cannot run has the reason in place of figures.

Bytes held are counted exactly: every tensor an optimizer keeps and the trained weights, without gradients. What the
paged mode keeps in host memory is reported separately as host_bytes_per_parameter. Bytes moved are computed: a step of
ours reads and writes everything it holds and reads the gradient twice, once for the norm (paged also writes what
arrives from the host and reads what leaves). Other optimizers are counted operator by operator, bitsandbytes' kernel
as one that reads and writes its tensors once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from safelight.bench.core.harness import Prepared, interleave_prepared, percentiles
from safelight.bench.core.layers import meta_model
from safelight.bench.core.results import make_record
from safelight.bench.counting.counters import CountedUpdates, Counter
from safelight.bench.recipes.workload import LR, MAX_GRAD_NORM, WEIGHT_DECAY
from safelight.kernels.optim.ema import EMA
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.optim.kernel_adamw import KernelAdamW
from safelight.trainer.optim.library_optimizer import BitsandbytesOptimizer
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS

# use every n-th tensor, so that all variants fit in memory at once
EVERY = {"cuda": 4, "cpu": 64}
STREAMING = {name for name, mode in MEMORY_MODES.items() if mode.streams_weights}
# modules whose objects hold tensors: ours, torch's, and those of the optimizers that we wrap
_WALKED = ("safelight", "torch.nn", *sorted({spec.library.partition(":")[0] for spec in OPTIMIZERS.values()} - {""}))

Configs = dict[str, Optimizer]


def offered(dtype: torch.dtype) -> Configs:
    """Return the config of every optimizer and of each memory mode it supports for weights of a dtype, by name."""
    found = {}
    for name, spec in OPTIMIZERS.items():
        for memory in ("fp32",) if dtype == torch.float32 else spec.memory_modes:
            found[f"{name}, {memory}"] = Optimizer(name=name, memory=memory)
    return found


def part_of_sd15(every: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of every n-th parameter of SD1.5 by name, ordered by size."""
    shapes = {name: tuple(p.shape) for name, p in meta_model("sd15").named_parameters()}
    return dict(sorted(shapes.items(), key=lambda item: torch.Size(item[1]).numel(), reverse=True)[every // 2 :: every])


class Weights(nn.Module):
    """A module with random float32 parameters of given shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.randn(shape, device=device) * 0.02))


def held_bytes(*roots: object) -> int:
    """Return the bytes of every tensor reachable from the objects, each storage once, without what paged and streamed
    keep in host memory."""
    storages: dict[int, torch.UntypedStorage] = {}
    seen: set[int] = set()
    pages: set[int] = set()
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Pages | StreamedWeights):
            pages.add(thing.host.untyped_storage()._cdata)
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage
        elif isinstance(thing, dict):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        elif type(thing).__module__.startswith(_WALKED):
            waiting += vars(thing).values() if hasattr(thing, "__dict__") else ()
    return sum(storage.nbytes() for key, storage in storages.items() if key not in pages)


def moved_bytes(optimizer: UNetOptimizer, module: nn.Module, config: Optimizer, dtype: torch.dtype) -> int:
    """Return the bytes a step reads and writes, by the formula of the kind of optimizer."""
    num = sum(p.numel() for p in module.parameters())
    if isinstance(optimizer, KernelAdamW):
        held = held_bytes(optimizer, module)
        if pages := optimizer.pages:
            # the kernel works on what passes through the ring; it is written there and read from there as often
            held += 2 * pages.host.nbytes - sum(slot.nbytes for slot in pages.ring)
        return 2 * held + 2 * num * dtype.itemsize
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    twin = Weights(shapes, torch.device("meta"))
    counted = make_optimizer(twin, config, dtype)
    counted.set_hyper(LR, WEIGHT_DECAY, MAX_GRAD_NORM)
    if isinstance(counted, BitsandbytesOptimizer):
        counted.on_meta_update = CountedUpdates()
    for _ in range(2):
        # the first step creates the moments
        for p in twin.parameters():
            p.grad = torch.empty_like(p)
        with Counter() as counter:
            counted.step()
    return counter.counts.total("bytes_moved")


def _prepared(optimizer: UNetOptimizer, module: nn.Module) -> Prepared:
    gradients = [torch.randn_like(p) * 1e-3 for p in module.parameters()]

    def set_gradients() -> None:
        for p, g in zip(module.parameters(), gradients, strict=True):
            p.grad = g.clone()

    optimizer.set_hyper(LR, WEIGHT_DECAY, MAX_GRAD_NORM)
    return Prepared(set_gradients, lambda _: optimizer.step())


def _build(config: Optimizer, shapes: dict, dtype: torch.dtype, device: torch.device) -> tuple[UNetOptimizer, Weights]:
    torch.manual_seed(0)
    module = Weights(shapes, device)
    return make_optimizer(module, config, dtype), module


def bench_optimizers(device: torch.device, dtype: torch.dtype, every: int, repeats: int) -> Iterator[dict]:
    """Yield a result line for each optimizer that is offered, and one for the moving average of weights.

    ratio: time of a step relative to the first variant's in the same repeat, median over the repeats.
    """
    # streamed weights are those of a UNet's blocks; without them the mode is paged
    configs = {name: one for name, one in offered(dtype).items() if one.memory not in STREAMING}
    shapes = part_of_sd15(every)
    num = sum(torch.Size(shape).numel() for shape in shapes.values())
    runs: dict[str, Prepared] = {}
    figures_of: dict[str, dict] = {}
    for name, config in configs.items():
        try:
            optimizer, module = _build(config, shapes, dtype, device)
            run = _prepared(optimizer, module)
            run.run(run.prepare())
        except (ValueError, NotImplementedError, RuntimeError) as error:
            # libraries raise any of these if they cannot run here; test_optimizers checks that ours all run
            figures_of[name] = {"cannot": (str(error).strip() or type(error).__name__).splitlines()[0][:160]}
            continue
        runs[name] = run
        figures_of[name] = {
            "held_bytes_per_parameter": round(held_bytes(optimizer, module) / num, 3),
            "moved_bytes_per_parameter": round(moved_bytes(optimizer, module, config, dtype) / num, 3),
        }
        if pages := optimizer.pages:
            figures_of[name]["host_bytes_per_parameter"] = round(pages.host.nbytes / num, 3)
    averages = Weights(shapes, device)
    weights = [p.detach().to(dtype) for p in averages.parameters()]
    ema = EMA([p.detach() for p in averages.parameters()], weights)
    decay = torch.tensor(0.999, device=device)
    runs["ema"] = Prepared(lambda: None, lambda _: ema.update(decay))
    # the average is read and written, the weight is read
    figures_of["ema"] = {"held_bytes_per_parameter": 4.0, "moved_bytes_per_parameter": 8.0 + dtype.itemsize}
    seconds = interleave_prepared(runs, device, repeats)
    first = next(iter(seconds))
    for name, figures in figures_of.items():
        if name in seconds:
            low, middle, high = percentiles(seconds[name])
            ratios = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
            figures |= {
                "step_ms": [round(1e3 * s, 4) for s in (low, middle, high)],
                "ns_per_parameter": round(1e9 * middle / num, 4),
                "ratio": round(percentiles(ratios)[1], 3),
                "gb_per_s": round(figures["moved_bytes_per_parameter"] * num / middle / 1e9, 2),
            }
        config = {
            "optimizer": name,
            "precision": str(dtype).removeprefix("torch."),
            "every": every,
            "tensors": len(shapes),
            "parameters": num,
            "device": device.type,
            "compared_with": first,
        }
        yield make_record("optimizer", config, figures, device)


def rows(records: list[dict]) -> tuple[list[tuple], list[str]]:
    """Return (rows for the terminal, a line of text for each optimizer that cannot run)."""
    measured, failures = [], []
    for record in records:
        name, figures = record["config"]["optimizer"], record["figures"]
        if "cannot" in figures:
            failures.append(f"{name}: {figures['cannot']}")
            continue
        cells = (figures["held_bytes_per_parameter"], figures["moved_bytes_per_parameter"])
        measured.append((name, *(f"{x:.2f}" for x in cells), f"{figures['step_ms'][1]:.2f}", f"{figures['ratio']:.2f}"))
    return measured, failures
