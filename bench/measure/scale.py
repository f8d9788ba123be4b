"""`safelight bench scale`: a step over 1, 2, 4 processes, ours and DistributedDataParallel's on the same UNet.

Each process has a micro-batch of its own, so that the work grows with their number: efficiency is the images/s of all
over as many times those of one. On a CPU the processes share its cores, each with one thread: with more processes than
cores the ratio says little of a cluster. Bytes and memory are counted, not timed, and hold anywhere: what passes
torch's collectives (counting/collectives.py), and the largest sum of gradients and buckets that live at once.
DistributedDataParallel steps torch's AdamW after backward; ours steps in backward, and after it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.bench.core.harness import interleave, percentiles
from safelight.bench.core.results import ROOT, make_record
from safelight.bench.counting.collectives import CountCollectives
from safelight.bench.recipes.workload import (
    LR,
    MAX_GRAD_NORM,
    NUM_ROTATED,
    SEED,
    WEIGHT_DECAY,
    Workload,
    random_batches,
)
from safelight.data.batches import Batch
from safelight.errors import UserError
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.distributed.world import World
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.device import pick_device
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim import reduction
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.units import MIB

VARIANTS = ("ours", "ours_fused", "ddp")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Job:
    """What each process measures. fields as in the arguments of `bench scale`."""

    base: str
    batch_size: int
    latent_size: int
    repeats: int
    device: str
    bucket_mib: float
    num: int = 1


class _Variant(NamedTuple):
    step: Callable[[int], None]
    memory: GradientMemory


class GradientMemory(TorchDispatchMode):
    """Tracks the bytes of gradients and of the buckets that they are exchanged in, now and at most.

    A gradient is what stands in a parameter's `.grad` when it is complete, a bucket what a collective is given. Views
    of one storage are counted once.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.peak = self.now = 0
        self._held: dict[int, int] = {}
        self._handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in parameters]

    def _on_gradient(self, p: nn.Parameter) -> None:
        if p.grad is not None:
            self.hold(p.grad)

    def hold(self, x: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            for x in tree_leaves(args):
                if isinstance(x, Tensor):
                    self.hold(x)
        return result

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _variant(name: str, job: Job, world: World, device: torch.device) -> _Variant:
    """Return one of VARIANTS on a UNet of its own."""
    unet = load_unet(resolve_base(job.base), SEED).to(device)
    # before the optimizer's own hooks, which take the gradients
    memory = GradientMemory(list(unet.parameters()))
    work = Workload(job.base, job.latent_size, job.batch_size, "fp32", device=device.type)
    batches = random_batches(NUM_ROTATED * world.size, work)[world.rank :: world.size]
    made = [_inputs(batch, device) for batch in batches]
    if name == "ddp":
        step = _ddp_step(unet, world, made, job.bucket_mib)
    else:
        step = _our_step(unet, world, made, device, is_fused=name == "ours_fused")
    return _Variant(step, memory)


def _inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, dict]:
    arguments = batch.map(lambda x: x.to(device)).conditioning.unet_arguments(torch.float32)
    return batch.mean_BCHW.to(device), torch.full((len(batch.sample_ids),), 500, device=device), arguments


def _loss(unet: nn.Module, inputs: tuple[Tensor, Tensor, dict]) -> Tensor:
    latents, timesteps, arguments = inputs
    return (unet(latents, timesteps, **arguments).sample - latents).square().mean()


def _our_step(unet: nn.Module, world: World, made: list, device: torch.device, is_fused: bool) -> Callable[[int], None]:
    settings = Optimizer(name="adamw8bit", fused_backward=is_fused)
    optimizer = make_optimizer(unet, settings, torch.float32, SEED, device)
    optimizer.reduce_over(world)

    def step(number: int) -> None:
        optimizer.set_hyper(LR, WEIGHT_DECAY, MAX_GRAD_NORM)
        optimizer.prepare_backward()
        with optimizer.buffers.micro_step(True, True):
            # gradients are summed, so the loss is divided
            (_loss(unet, made[number % len(made)]) / world.size).backward()
        optimizer.step()

    return step


def _ddp_step(unet: nn.Module, world: World, made: list, bucket_mib: float) -> Callable[[int], None]:
    model = unet
    if world.size > 1:
        # None: its default, 25 MiB
        options = {"gradient_as_bucket_view": True, "bucket_cap_mb": bucket_mib or None}
        model = nn.parallel.DistributedDataParallel(unet, **options)
    optimizer = torch.optim.AdamW(unet.parameters(), LR, weight_decay=WEIGHT_DECAY)

    def step(number: int) -> None:
        _loss(model, made[number % len(made)]).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_here(job: Job) -> dict[str, dict]:
    """Return each variant's seconds and counts, measured by this process together with the others of its job."""
    torch.set_num_threads(1)
    if job.bucket_mib:
        reduction.BUCKET_BYTES = round(job.bucket_mib * MIB)
    device = pick_device(job.device)
    world = World(int(os.environ["RANK"]), job.num, int(os.environ["RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
        device = torch.device("cuda", world.local_rank)
    if job.num > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    variants = {name: _variant(name, job, world, device) for name in VARIANTS}
    seconds = interleave({name: variant.step for name, variant in variants.items()}, device, job.repeats)
    found = {}
    for name, variant in variants.items():
        with CountCollectives() as counter, variant.memory:
            variant.step(0)
        variant.memory.close()
        found[name] = {
            "seconds": seconds[name],
            "payload_bytes": sum(counter.payloads().values()),
            "sent_bytes": counter.sent_bytes(job.num),
            "calls": len(counter.calls),
            "gradient_peak_bytes": variant.memory.peak,
            "gradient_held_bytes": variant.memory.now,
        }
    if job.num > 1:
        dist.destroy_process_group()
    return found


def _launch(job: Job) -> dict[str, dict]:
    """Return what the main process of a job found. Raises RuntimeError with the output of one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes, answer = [], Path(folder, "answer.json")
        for rank in range(job.num):
            place = {"RANK": rank, "WORLD_SIZE": job.num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            place |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": path}
            command = [sys.executable, "-m", "safelight.bench.measure.scale", json.dumps(asdict(job)), str(answer)]
            environment = os.environ | {key: str(value) for key, value in place.items()}
            with Path(folder, f"{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if failed := [rank for rank, code in enumerate(codes) if code]:
            output = Path(folder, f"{failed[0]}.log").read_text()[-2000:]
            raise RuntimeError(f"process {failed[0]} of {job.num} failed:\n{output}")
        return json.loads(answer.read_text())


def bench_scale(
    base: str,
    latent_size: int,
    batch_size: int,
    nums: tuple[int, ...],
    repeats: int,
    rounds: int,
    device: str,
    bucket_mib: float = 0.0,
) -> list[dict]:
    """Return a result line for each number of processes.

    rounds: how often all numbers are measured, in turns. bucket_mib: 0 for what training and torch choose.
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        nums = tuple(num for num in nums if num <= torch.cuda.device_count())
    if not nums:
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs; lower --processes")
    side = Workload(base, latent_size, device=chosen.type).resolved().latent_size
    job = Job(base, batch_size, side, repeats, chosen.type, bucket_mib)
    rounds_of: dict[int, list[dict]] = {num: [] for num in nums}
    for _ in range(rounds):
        for num in nums:
            rounds_of[num].append(_launch(replace(job, num=num)))
    records, single = [], {}
    for num, found in rounds_of.items():
        figures = {}
        for name in VARIANTS:
            seconds = [one for measured in found for one in measured[name]["seconds"]]
            rates = sorted(num * batch_size / one for one in percentiles(seconds))
            single.setdefault(name, rates[1] / num)
            counts = found[0][name]
            figures[name] = {
                "images_per_s_p20_p50_p80": [round(rate, 3) for rate in rates],
                "efficiency": round(rates[1] / num / single[name], 3),
                "sent_mib": round(counts["sent_bytes"] / MIB, 3),
                "sent_bytes": counts["sent_bytes"],
                "calls": counts["calls"],
                "gradient_peak_mib": round(counts["gradient_peak_bytes"] / MIB, 2),
                "gradient_held_mib": round(counts["gradient_held_bytes"] / MIB, 2),
            }
        config = {"base": base, "latent_size": side, "batch_size": batch_size, "precision": "fp32", "processes": num}
        config |= {"repeats": repeats, "rounds": rounds, "efficiency_over": nums[0], "device": chosen.type}
        config |= {"bucket_mib": bucket_mib} if bucket_mib else {}
        note = "" if chosen.type == "cuda" else f"processes of one thread share {os.cpu_count()} cores"
        records.append(make_record("scale", config, figures, chosen, note))
    return records


if __name__ == "__main__":
    job, answer = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    found = measure_here(job)
    if os.environ["RANK"] == "0":
        answer.write_text(json.dumps(found))
