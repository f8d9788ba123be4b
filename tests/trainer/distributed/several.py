"""What the tests of several processes run in each of them: the same steps alone and together, whole runs."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.distributed.sharded import cut
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.trainer.optim.reduction import AllReduce, ReduceToOwners
from safelight.trainer.step.step import StepContext, StepSettings, train_step
from safelight.trainer.step.step_share import StepShare, whole_result
from safelight.trainer.train import train
from tests.trainer.checkpoints import make_unet
from tests.trainer.step.test_step import SCHEDULER, make_batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES = 2  # in a micro-batch


@contextmanager
def world_of_all() -> Iterator[World]:
    """The world of all processes of a job, inside the block."""
    dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        pass


@contextmanager
def adding_in_order() -> Iterator[None]:
    """Add the gradients of all processes one after another, as one process adds those of its micro-batches.

    gloo adds them in another order, which more than two numbers show in their last bits.
    """
    originals = {kind: kind._exchange for kind in (AllReduce, ReduceToOwners)}

    def exchange(self: AllReduce, flat: Tensor, to: int | None) -> _Done:
        parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat)
        flat.copy_(parts[0])
        for part in parts[1:]:
            flat.add_(part)
        return _Done()

    for kind in originals:
        kind._exchange = exchange
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind._exchange = original


@dataclass
class Outcome:
    """What steps have led to. weights: in fp32, as exactly as the optimizer keeps them."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a digest of the weights' bits."""
        return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in self.weights.values())).hexdigest()

    def distance(self, other: Outcome) -> dict[str, float]:
        """Return by how much the two differ: relative for losses and norms, absolute for weights."""
        pairs = {"losses": (self.losses, other.losses), "norms": (self.norms, other.norms)}
        found = {}
        for name, (one, two) in pairs.items():
            a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(two, dtype=torch.float64)
            same = (a == b) | (a.isnan() & b.isnan())
            found[name] = float(torch.where(same, 0.0, (a - b).abs() / b.abs()).max())
        found["weights"] = max(float((self.weights[n] - w).abs().max()) for n, w in other.weights.items())
        return found


def optimizer_in(
    world: World,
    settings: dict,
    precision: str,
    shard: str,
    sum_in_fp32: bool = False,
    trains: Callable[[Tensor], bool] = lambda p: True,
):
    """Return (small UNet, its optimizer) of a process of a run. settings: of [optimizer]. trains: which weights."""
    unet = make_unet()
    for p in unet.parameters():
        p.requires_grad_(trains(p))
    if shard == "full":
        cut(unet, world, torch.device("cpu"), sum_in_fp32)
    sharers = world if shard == "states" else ALONE
    optimizer = make_optimizer(unet, Optimizer(**settings), DTYPES[precision], 3, sharers=sharers)
    optimizer.buffers.dtype = "fp32" if sum_in_fp32 else "auto"
    optimizer.reduce_over(world, torch.float32 if sum_in_fp32 else None)
    return unet, optimizer


def trained_by(
    world: World,
    num_steps: int,
    settings: dict,
    precision: str = "fp32",
    num_micro: int = 2,
    lr: float = 1e-3,
    accumulate_dtype: str = "auto",
    shard: str = "none",
    disturb: Callable[[UNetOptimizer, int], None] | None = None,
    warms_up: bool = False,
    trains: Callable[[Tensor], bool] = lambda p: True,
    max_grad_norm: float = 1.0,
) -> tuple[Outcome, UNetOptimizer]:
    """Return what steps of a small UNet lead to in a world, and the optimizer. settings: of [optimizer].

    num_micro: micro-batches in each step, over all processes. disturb: called before every step with its number.
    warms_up: take a dry step first, which exchanges nothing with other processes and changes nothing. trains: which
    weights. max_grad_norm: 0 for no clipping.
    """
    unet, optimizer = optimizer_in(world, settings, precision, shard, accumulate_dtype == "fp32", trains)
    context = StepContext(unet, optimizer, make_schedule(SCHEDULER), 0.7, Loss())
    outcome = Outcome()
    if warms_up:
        with context.dry_run():
            train_step(context, [make_batch(99, 1)], StepSettings(SAMPLES, lr, 1e-2, 1.0), seed=5, epoch=0)
    for number in range(num_steps):
        step = [_MicroBatch(number * num_micro + micro) for micro in range(num_micro)]
        share = StepShare.of(world, step)
        batches = share.padded(make_batch(micro.number, SAMPLES) for micro in share.micro_batches)
        if disturb is not None:
            disturb(optimizer, number)
        result = train_step(
            context, batches, StepSettings(SAMPLES * num_micro, lr, 1e-2, max_grad_norm), seed=5, epoch=0
        )
        result = whole_result(world, share, result)
        outcome.losses += result.losses.tolist()
        outcome.norms.append(float(result.grad_norm))
        outcome.applied.append(bool(result.is_applied))
        outcome.scales.append(float(optimizer.loss_scale.scale))
    for name, p in optimizer.parameters.items():
        own = optimizer.value(name).detach().float().flatten() if name in optimizer.owned else torch.zeros(0)
        if shard != "none":
            own = torch.cat(world.gather_rows(own))
        outcome.weights[name] = own.view(p.shape)
    return outcome, optimizer


def take_steps(world: World, num_steps: int, settings: dict, *arguments, **more) -> Outcome:
    """Return what steps lead to; arguments as of `trained_by`."""
    return trained_by(world, num_steps, settings, *arguments, **more)[0]


@dataclass(frozen=True)
class _MicroBatch:
    """Stands for a micro-batch of an epoch's plan."""

    number: int
    refs: tuple[int, ...] = (0,) * SAMPLES


def train_run(settings: dict, resume: bool = False, adds_in_order: bool = False) -> int:
    """Train a run in all processes of the job; return the step it reached."""
    with adding_in_order() if adds_in_order else nullcontext():
        return train(parse_config(copy.deepcopy(settings), "test"), resume=resume).position.step
