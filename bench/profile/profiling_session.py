"""A profiling session: a few real steps under torch's profiler, and one more to be counted.

Of `safelight train` the run is the config's own, in a folder that is thrown away: its loader, its loop, its log. Validation,
samples and checkpoints are off. After the profiled steps one step is followed operator by operator, for bytes and FLOPs,
and its saved tensors from birth to death; it is not timed, for following takes time.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from safelight.bench.core.device_timeline import KernelRun, kernel_runs
from safelight.bench.counting.costs import Costs, OperatorCosts
from safelight.errors import UserError
from safelight.trainer.config.toml import Config
from safelight.trainer.models.device import pick_device
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.profiler_ranges import told_to
from safelight.trainer.train import train

STEP = "step"
NUM_WARMUPS = 4
TRACE_NAME, SNAPSHOT_NAME = "trace.json.gz", "memory.pickle"


@dataclass
class Saved:
    """Tensors that autograd keeps. points: (seconds since the step began, bytes alive); peak_by_block: bytes by the block
    that saved them, each storage once."""

    points: list[tuple[float, int]] = field(default_factory=list)
    by_block: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class Session:
    """events: the profiler's; kernels: what a GPU ran; live: (seconds since profiling began, bytes allocated since then) by
    device type; chosen: which of the profiled steps are of `shape`, that of the latents of a micro-step, and are spoken
    of; plain_ms: of the fastest such step before the profiler began."""

    device: torch.device
    chosen: list[int]
    events: list
    kernels: list[KernelRun]
    live: dict[str, list[tuple[float, int]]]
    costs: Costs
    saved: Saved
    files: list[Path]
    shape: tuple[int, ...]
    accumulate: int
    plain_ms: float


class Enough(Exception):
    """All steps are taken; nothing shall be saved."""


class _Kept:
    """A saved tensor; its storage counts from its first saving to its last release."""

    def __init__(self, tensor: Tensor, owner: SavedTensors):
        self.tensor, self.owner = tensor, owner
        owner.change(tensor, +1)

    def __del__(self):
        self.owner.change(self.tensor, -1)


class SavedTensors(saved_tensors_hooks):
    """Follows saved tensors. own: storages that are no activations, the parameters'."""

    def __init__(self, stretches: list[str], own: set[int]):
        self.stretches, self.own, self.saved = stretches, own, Saved()
        self.began, self.alive, self.uses = time.perf_counter(), 0, defaultdict(int)
        super().__init__(lambda x: _Kept(x, self), lambda kept: kept.tensor)

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.own:
            return
        self.uses[key] += by
        is_first, is_last = by > 0 and self.uses[key] == 1, self.uses[key] == 0
        if is_first or is_last:
            self.alive += storage.nbytes() if is_first else -storage.nbytes()
            self.saved.points.append((time.perf_counter() - self.began, self.alive))
        if is_first and "backward" not in self.stretches:
            block = next((name for name in reversed(self.stretches) if "." in name), "the rest")
            self.saved.by_block[block] += storage.nbytes()


class _Stretches:
    """Names the stretches and the UNet's blocks to the profiler, and knows which are entered."""

    def __init__(self):
        self.entered: list[str] = []
        self.num_steps = 0
        self.shape: tuple[int, ...] = ()
        self.parameters: set[int] = set()
        self._unet: nn.Module | None = None
        self._blocks: dict[nn.Module, str] = {}
        self._open: list[contextlib.AbstractContextManager] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.entered.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self.entered.pop()
            self.num_steps += name == "optimizer"

    @contextlib.contextmanager
    def blocks(self) -> Iterator[None]:
        """Name what the UNet's blocks do within this block of code. Recomputing, a block is entered inside backward."""
        before = nn.modules.module.register_module_forward_pre_hook(self._begin)
        after = nn.modules.module.register_module_forward_hook(self._end)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _begin(self, module: nn.Module, args) -> None:
        if type(module).__name__.endswith("UNet2DConditionModel") and not self._blocks:
            self._blocks = _blocks_of(module)
            self.parameters = {p.untyped_storage()._cdata for p in module.parameters()}
            self._unet = module
        if module is self._unet and args:
            self.shape = tuple(args[0].shape)
        if module in self._blocks:
            entered = self(self._blocks[module])
            entered.__enter__()
            self._open.append(entered)

    def _end(self, module: nn.Module, args, output) -> None:
        if module in self._blocks:
            self._open.pop().__exit__(None, None, None)


def _blocks_of(unet: nn.Module) -> dict[nn.Module, str]:
    """Return the UNet's parts to be named: each block's ResNets, transformers and samplers, and what stands alone."""
    found = {}
    for name, child in unet.named_children():
        if name in ("down_blocks", "up_blocks"):
            blocks = [(f"{name}.{index}", block) for index, block in enumerate(child)]
        elif name == "mid_block":
            blocks = [(name, child)]
        else:
            found[child] = f"unet.{name}"
            continue
        for path, block in blocks:
            for part_name, parts in block.named_children():
                if isinstance(parts, nn.ModuleList):
                    found |= {part: f"{path}.{part_name}.{index}" for index, part in enumerate(parts)}
    return found


def settings_for(config: Config, run_dir: Path) -> Config:
    """Return a run's config with nothing but steps in it."""
    config = config.model_copy(deep=True)
    config.run.dir = str(run_dir)
    config.validate_.every_epochs = config.sample.every_epochs = 0
    config.save.every_epochs = config.save.every_steps = config.train.max_steps = 0
    config.log.tensorboard = False
    # a replayed step has no stretches: neither are its parts seen nor is it counted
    config.train.cuda_graphs = "off"
    return config


class _Conductor:
    """Begins and ends what is recorded, between the steps of a loop that calls `after_step` after each.

    Steps are of many shapes: what is said is said of the largest batch among the first steps, and recording goes on until
    enough of that shape were seen.
    """

    def __init__(self, num_steps: int, device: torch.device, out: Path):
        self.num_steps, self.device, self.out = num_steps, device, out
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profiler = profile(activities=activities, profile_memory=True, acc_events=True)
        self.stretches, self.shape = _Stretches(), None
        self.warm: list[tuple[tuple, float]] = []
        self.shapes: list[tuple] = []
        self.plain_ms = 0.0
        self.costs: OperatorCosts | None = None
        self.saved: SavedTensors | None = None
        self._open = contextlib.ExitStack()
        self._done, self._began, self._phase = 0, time.perf_counter(), "warming"

    def after_step(self) -> bool:
        """Called by the loop after each step, and again between epochs. Raises Enough after the last; else returns False."""
        if self.stretches.num_steps == self._done:
            return False
        self._done = self.stretches.num_steps
        shape = self.stretches.shape
        self._open.close()
        if self._phase == "warming":
            self._warmed(shape)
        elif self._phase == "profiling":
            self.shapes.append(shape)
            if self.shapes.count(self.shape) == self.num_steps:
                self._stop_profiler()
        elif shape == self.shape:
            raise Enough
        if self._phase == "profiling":
            self._open.enter_context(record_function(STEP))
        elif self._phase == "following":
            self.costs = self._open.enter_context(OperatorCosts(self.stretches.entered, self.device.type))
            self.saved = SavedTensors(self.stretches.entered, self.stretches.parameters)
            self._open.enter_context(self.saved)
        return False

    def _warmed(self, shape: tuple) -> None:
        self._wait()
        now = time.perf_counter()
        self.warm.append((shape, 1e3 * (now - self._began)))
        self._began = now
        if len(self.warm) == NUM_WARMUPS:
            # the first step makes states and compiles
            _, *settled = self.warm
            self.shape = max((shape for shape, _ in settled), key=math.prod)
            self.plain_ms = min(ms for shape, ms in settled if shape == self.shape)
            if self.device.type == "cuda":
                # the C++ frames too would be a longer walk of the stack at every allocation of the steps that are timed
                torch.cuda.memory._record_memory_history(stacks="python")
            self.profiler.start()
            self._phase = "profiling"

    def _stop_profiler(self) -> None:
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.out / SNAPSHOT_NAME))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler.stop()
        self._phase = "following"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """End whatever is recorded still."""
        self._open.close()
        if self._phase == "profiling":
            self.profiler.stop()


def record(
    loop: Callable[[Callable[[], bool]], None], num_steps: int, device: torch.device, out: Path, accumulate: int = 1
) -> Session:
    """Profile a loop that calls what it is given after every step, write the trace (and a GPU's memory snapshot) into
    `out`, and return what was found. What it calls raises Enough after the last step.

    Raises UserError for a loop that takes too few steps.
    """
    if num_steps < 1:
        raise UserError(f"--steps {num_steps} is below 1; use 5")
    # the profiler's library tells of its own start and stop otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    out.mkdir(parents=True, exist_ok=True)
    conductor = _Conductor(num_steps, device, out)
    stretches = conductor.stretches
    with told_to(stretches), stretches.blocks():
        try:
            loop(conductor.after_step)
        except Enough:
            pass
        else:
            raise UserError(
                f"the run ends after {stretches.num_steps} steps, before {num_steps} of its full batches were profiled; "
                "lower --steps or raise the epochs"
            )
        finally:
            conductor.close()
    profiler = conductor.profiler
    profiler.export_chrome_trace(str(out / TRACE_NAME))
    files = [out / name for name in (TRACE_NAME, SNAPSHOT_NAME) if (out / name).is_file()]
    chosen = [number for number, shape in enumerate(conductor.shapes) if shape == conductor.shape]
    results = profiler.profiler.kineto_results
    return Session(
        device,
        chosen,
        list(profiler.events()),
        kernel_runs(results.events(), results.trace_start_ns()),
        _live_bytes(profiler),
        dict(conductor.costs.costs),
        conductor.saved.saved,
        files,
        conductor.shape,
        accumulate,
        conductor.plain_ms,
    )


def run_session(config: Config, num_steps: int, out: Path, terminal: Terminal | None = None) -> Session:
    """Profile steps of a run as `record` does. Raises UserError for a run that has too few steps, and as train does."""
    device = pick_device(config.run.device)
    with tempfile.TemporaryDirectory(prefix="safelight-profile-") as folder:
        settings = settings_for(config, Path(folder) / "run")
        return record(
            lambda after_step: train(settings, terminal=terminal, stop_requested=after_step),
            num_steps,
            device,
            out,
            config.train.accumulate,
        )


def _live_bytes(profiler: profile) -> dict[str, list[tuple[float, int]]]:
    """Return the allocators' own record, by device type. events() drops what happened inside operators."""
    results = profiler.profiler.kineto_results
    began, live = results.trace_start_ns(), {}
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        points = live.setdefault(str(event.device_type()).rpartition(".")[2].lower(), [(0.0, 0)])
        points.append(((event.start_ns() - began) / 1e9, points[-1][1] + event.nbytes()))
    return live
