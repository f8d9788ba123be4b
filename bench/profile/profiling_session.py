"""Profile a few real training steps with torch's profiler, then trace one more step for bytes, FLOPs and saved tensors.

`safelight profile` runs the config's own training loop, loader and log in a temporary folder, without validation,
samples and checkpoints. The traced step is not timed, because tracing every operator slows it down.
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
from safelight.text import counted
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.static_bytes import planned_timeline
from safelight.trainer.models.device import pick_device
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.profiler_ranges import listen_to_ranges
from safelight.trainer.train import train
from safelight.untrusted import check_links

STEP = "step"
NUM_WARMUPS = 4
TRACE_NAME, SNAPSHOT_NAME = "trace.json.gz", "memory.pickle"


@dataclass
class SavedTimeline:
    """Bytes that autograd saves for backward during one step, each storage counted once.

    points: (seconds since the step began, bytes alive). by_block: bytes by the UNet block that saved them.
    """

    points: list[tuple[float, int]] = field(default_factory=list)
    by_block: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class ProfileSession:
    """What was recorded of a training loop.

    chosen: indices of the profiled steps that are analysed, those whose latents have `shape`. events: torch's profiler
    events. kernels: the GPU's kernels. live: by device type, (seconds since profiling began, bytes allocated since
    then). costs, saved: of the traced step. files: written by the profiler. shape: of the latents of one micro-batch.
    unprofiled_ms: the fastest step of that shape before the profiler started.
    """

    device: torch.device
    chosen: list[int]
    events: list
    kernels: list[KernelRun]
    live: dict[str, list[tuple[float, int]]]
    costs: Costs
    saved: SavedTimeline
    files: list[Path]
    shape: tuple[int, ...]
    accumulate: int
    unprofiled_ms: float


class StopProfiling(Exception):
    """Raised from the training loop to end it after the last step, without saving a checkpoint."""


class _SavedTensor:
    """Wrapper that autograd holds in place of a saved tensor, so that its release is seen."""

    def __init__(self, tensor: Tensor, owner: SavedTensorTracker):
        self.tensor, self.owner = tensor, owner
        owner.change(tensor, +1)

    def __del__(self):
        self.owner.change(self.tensor, -1)


class SavedTensorTracker(saved_tensors_hooks):
    """Saved-tensor hooks that record when bytes are saved and released.

    phases: names that are open now. own: storages to ignore, those of the parameters.
    """

    def __init__(self, phases: list[str], own: set[int]):
        self.phases, self.own, self.saved = phases, own, SavedTimeline()
        self.began, self.alive, self.uses = time.perf_counter(), 0, defaultdict(int)
        super().__init__(lambda x: _SavedTensor(x, self), lambda kept: kept.tensor)

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
        if is_first and "backward" not in self.phases:
            block = next((name for name in reversed(self.phases) if "." in name), "the rest")
            self.saved.by_block[block] += storage.nbytes()


class _PhaseRecorder:
    """Opens a profiler range for every phase of a step and every UNet block, and knows which are open (`entered`)."""

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
        """Open a profiler range around each UNet block; with checkpointing, blocks open again inside backward."""
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
    """Return the name of each UNet module that gets a range: the parts of its blocks, and the layers around them."""
    names = {}
    for name, child in unet.named_children():
        if name in ("down_blocks", "up_blocks"):
            blocks = [(f"{name}.{index}", block) for index, block in enumerate(child)]
        elif name == "mid_block":
            blocks = [(name, child)]
        else:
            names[child] = f"unet.{name}"
            continue
        for path, block in blocks:
            for part_name, parts in block.named_children():
                if isinstance(parts, nn.ModuleList):
                    names |= {part: f"{path}.{part_name}.{index}" for index, part in enumerate(parts)}
    return names


def settings_for(config: Config, run_dir: Path) -> Config:
    """Return a copy of a run's config without validation, samples, checkpoints, TensorBoard and step limit."""
    config = config.model_copy(deep=True)
    config.run.dir = str(run_dir)
    config.validate_.every_epochs = config.sample.every_epochs = 0
    config.save.every_epochs = config.save.every_steps = config.train.max_steps = 0
    config.log.tensorboard = False
    # in a replayed CUDA graph neither phases nor operators are visible
    config.train.cuda_graphs = "off"
    return config


class _StepProfiler:
    """Moves a training loop through three stages: warm-up, profiling, tracing. The loop calls `after_step`.

    Batches have different shapes. The largest one of the warm-up steps is profiled, until `num_steps` steps of that
    shape have been seen; then one more of them is traced.
    """

    def __init__(self, num_steps: int, device: torch.device, out: Path):
        self.num_steps, self.device, self.out = num_steps, device, out
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profiler = profile(activities=activities, profile_memory=True, acc_events=True)
        self.phases, self.shape = _PhaseRecorder(), None
        # (shape, milliseconds) of each warm-up step
        self.warmups: list[tuple[tuple, float]] = []
        self.shapes: list[tuple] = []
        self.unprofiled_ms = 0.0
        self.costs: OperatorCosts | None = None
        self.saved: SavedTensorTracker | None = None
        self._open = contextlib.ExitStack()
        self._done, self._began, self._stage = 0, time.perf_counter(), "warm-up"

    def after_step(self) -> bool:
        """Advance after a step; calls without a new step do nothing. Returns False, or raises StopProfiling at the end.

        It is passed to `train` as stop_requested, so False means to continue.
        """
        if self.phases.num_steps == self._done:
            return False
        self._done = self.phases.num_steps
        shape = self.phases.shape
        self._open.close()
        if self._stage == "warm-up":
            self._end_warmup_step(shape)
        elif self._stage == "profiling":
            self.shapes.append(shape)
            if self.shapes.count(self.shape) == self.num_steps:
                self._stop_profiler()
        elif shape == self.shape:
            raise StopProfiling
        if self._stage == "profiling":
            self._open.enter_context(record_function(STEP))
        elif self._stage == "tracing":
            self.costs = self._open.enter_context(OperatorCosts(self.phases.entered, self.device.type))
            self.saved = SavedTensorTracker(self.phases.entered, self.phases.parameters)
            self._open.enter_context(self.saved)
        return False

    def _end_warmup_step(self, shape: tuple) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.warmups.append((shape, 1e3 * (now - self._began)))
        self._began = now
        if len(self.warmups) == NUM_WARMUPS:
            # the first step creates optimizer states and compiles kernels
            _, *timed = self.warmups
            self.shape = max((shape for shape, _ in timed), key=math.prod)
            self.unprofiled_ms = min(ms for shape, ms in timed if shape == self.shape)
            if self.device.type == "cuda":
                # Python frames only: unwinding C++ stacks at every allocation would slow the profiled steps
                torch.cuda.memory._record_memory_history(stacks="python")
            self.profiler.start()
            self._stage = "profiling"

    def _stop_profiler(self) -> None:
        self._synchronize()
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.out / SNAPSHOT_NAME))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler.stop()
        self._stage = "tracing"

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Stop whatever is still being recorded."""
        self._open.close()
        if self._stage == "profiling":
            self.profiler.stop()


def profile_loop(
    loop: Callable[[Callable[[], bool]], None], num_steps: int, device: torch.device, out: Path, accumulate: int = 1
) -> ProfileSession:
    """Profile a training loop and return the session. Writes the trace, and on a GPU a memory snapshot, into `out`.

    loop: must call its argument after every step, which raises StopProfiling to end the loop. Raises UserError if the
    loop ends before enough steps were taken.
    """
    if num_steps < 1:
        raise UserError(f"--steps {num_steps} is below 1; use 5")
    # keep the profiler's library from printing when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    out.mkdir(parents=True, exist_ok=True)
    # torch writes through them
    check_links(out)
    step_profiler = _StepProfiler(num_steps, device, out)
    phases = step_profiler.phases
    with listen_to_ranges(phases), phases.blocks():
        try:
            loop(step_profiler.after_step)
        except StopProfiling:
            pass
        else:
            taken, wanted = counted(phases.num_steps, "step"), counted(num_steps, "step")
            raise UserError(
                f"the run ends after {taken}, before {wanted} with full batches {'was' if num_steps == 1 else 'were'} "
                "profiled; lower --steps, or train for more epochs"
            )
        finally:
            step_profiler.close()
    profiler = step_profiler.profiler
    profiler.export_chrome_trace(str(out / TRACE_NAME))
    files = [out / name for name in (TRACE_NAME, SNAPSHOT_NAME) if (out / name).is_file()]
    chosen = [number for number, shape in enumerate(step_profiler.shapes) if shape == step_profiler.shape]
    results = profiler.profiler.kineto_results
    return ProfileSession(
        device,
        chosen,
        list(profiler.events()),
        kernel_runs(results.events(), results.trace_start_ns()),
        _live_bytes(profiler),
        dict(step_profiler.costs.costs),
        step_profiler.saved.saved,
        files,
        step_profiler.shape,
        accumulate,
        step_profiler.unprofiled_ms,
    )


def run_session(config: Config, num_steps: int, out: Path, terminal: Terminal | None = None) -> ProfileSession:
    """Profile steps of a training run. Raises UserError if the run has too few steps, and as `train` does."""
    device = pick_device(config.run.device)
    with tempfile.TemporaryDirectory(prefix="safelight-profile-") as folder:
        settings = settings_for(config, Path(folder) / "run")
        # before anything is encoded or trained; the loop needs a few steps more, to warm up
        timeline = planned_timeline(settings)
        if timeline is not None and num_steps > timeline.num_steps:
            raise UserError(
                f"--steps {num_steps}: the run has only {counted(timeline.num_steps, 'step')}; lower --steps, or "
                "train for more epochs"
            )
        return profile_loop(
            lambda after_step: train(settings, terminal=terminal, stop_requested=after_step),
            num_steps,
            device,
            out,
            config.train.accumulate,
        )


def _live_bytes(profiler: profile) -> dict[str, list[tuple[float, int]]]:
    """Return each allocator's (seconds, bytes) by device type; read from the raw trace, as events() is incomplete."""
    results = profiler.profiler.kineto_results
    began, live = results.trace_start_ns(), {}
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        points = live.setdefault(str(event.device_type()).rpartition(".")[2].lower(), [(0.0, 0)])
        points.append(((event.start_ns() - began) / 1e9, points[-1][1] + event.nbytes()))
    return live
