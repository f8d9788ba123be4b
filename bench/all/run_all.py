"""`safelight bench all`: every benchmark in one call, the most valuable first; safe to interrupt.

Each result is on disk as soon as it is measured. A part that fails leaves a line with the reason and the next part
starts; a part that no longer fits the time limit leaves a line that says so. On a GPU the parts run in a subprocess,
which is replaced after a failure, so that an illegal memory access, a crash or a hang affects only its own part. On a
CPU the same parts run in this process with small sizes, as a rehearsal.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from safelight.bench.all.short_training_run import ShortRun, call, train
from safelight.bench.all.subprocess_runner import SubprocessEnded, run_in_subprocess
from safelight.bench.core.ceilings import ceilings
from safelight.bench.core.results import ROOT, append, make_record
from safelight.bench.measure.attention import bench_attention
from safelight.bench.measure.kernels import bench_kernels
from safelight.bench.measure.loop import bench_loop
from safelight.bench.measure.memory import bench_memory
from safelight.bench.measure.optimizers import bench_optimizers, offered
from safelight.bench.measure.roofline import roofline
from safelight.bench.recipes.suite import OURS, VARIANTS, build, free, measure, variants
from safelight.bench.recipes.workload import Workload, random_batches
from safelight.errors import UserError
from safelight.trainer.models.device import pick_device
from safelight.units import GIB

# a checkpoint of SD1.5 (weights, master weights and moments) and space to write it
RUN_DISK_GIB = 12
# GPU memory from which SD1.5 trains at batch 32 without checkpointing, and SDXL at batch 8
LARGE_GIB, HUGE_GIB = 30, 70
# compilation (Triton, Inductor, cuDNN) can be silent for minutes; after this long without a result we assume a hang
SILENCE_LIMIT_S, LONG_SILENCE_LIMIT_S = 120, 300
# once the time limit has passed, a running part is ended after this much silence
OVERTIME_S = 60


@dataclass
class BenchContext:
    """What every part is given. end: the time.monotonic() at which the benchmarks should be done."""

    out: Path
    work: Workload
    end: float

    @property
    def device(self) -> torch.device:
        return torch.device(self.work.device)

    @property
    def is_gpu(self) -> bool:
        return self.work.device == "cuda"

    @property
    def gpu_gib(self) -> float:
        """Total memory of the GPU in GiB; 0 on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory / GIB if self.is_gpu else 0

    @property
    def smallest_and_largest_batch(self) -> tuple[int, int]:
        """Batch 1, where the host is the bottleneck, and a batch that fills the GPU."""
        return (1, 32 if self.gpu_gib > LARGE_GIB else 4)

    def remaining(self) -> float:
        return self.end - time.monotonic()

    def make_record(self, bench: str, config: dict, figures: dict, note: str = "") -> dict:
        """Return a result line of this device."""
        return make_record(bench, config, figures, self.device, note)


def _ceilings(context: BenchContext) -> Iterator[dict]:
    config = {"precision": context.work.precision}
    yield context.make_record(
        "ceilings", config, ceilings(context.device, context.work.dtype, small=not context.is_gpu)
    )


def _steps(
    context: BenchContext, recipes: tuple[str, ...], sizes: tuple[int, ...], loader: bool = False
) -> Iterator[dict]:
    """Time the step of each recipe and batch size, one after another, until the time is up."""
    lines = measure(variants(recipes, sizes, context.work), 12 if context.is_gpu else 1, loader, together=False)
    for line in lines:
        yield line
        if context.remaining() < 5:
            lines.close()
            return


def steps(context: BenchContext) -> Iterator[dict]:
    sizes = tuple(sorted({*context.smallest_and_largest_batch, 8})) if context.is_gpu else (1, 2)
    yield from _steps(context, (OURS, "diffusers"), sizes)


def graphs(context: BenchContext) -> Iterator[dict]:
    """Our step replayed as CUDA graphs; nothing on a CPU."""
    if context.is_gpu:
        yield from _steps(
            context, tuple(name for name in VARIANTS if "graphs" in name), context.smallest_and_largest_batch
        )


def ablation(context: BenchContext) -> Iterator[dict]:
    """Our step with each other technique added or removed, at the smallest and largest batch; one of them on a CPU."""
    recipes = tuple(name for name in VARIANTS if "graphs" not in name) if context.is_gpu else ("safelight-fused",)
    for size in context.smallest_and_largest_batch if context.is_gpu else (1,):
        yield from _steps(context, recipes, (size,))


def models(context: BenchContext) -> Iterator[dict]:
    """SD2.1 at 512 px and SDXL at 1024 px, at the batch sizes of published figures; nothing on a CPU."""
    if not context.is_gpu:
        return
    if context.gpu_gib < HUGE_GIB:
        note = f"skipped: SDXL at batch 8 needs {HUGE_GIB} GiB, this GPU has {context.gpu_gib:.0f}"
        yield context.make_record("models", {}, {}, note)
        return
    for base, side, sizes in (("random:sd21", 64, (32, 64)), ("random:sdxl", 128, (8,))):
        work = replace(context.work, base=base, latent_size=side)
        yield from _steps(replace(context, work=work), ("safelight-graphs", OURS), sizes)
        if context.remaining() < 30:
            return


def steps_from_a_cache(context: BenchContext) -> Iterator[dict]:
    yield from _steps(context, (OURS,), (8,) if context.is_gpu else (2,), loader=True)


def recipe(name: str, sizes: tuple[int, ...], on_cpu: bool, context: BenchContext) -> Iterator[dict]:
    """Time one published recipe. on_cpu: whether the CPU rehearsal includes it; Inductor would take minutes there."""
    if context.is_gpu or on_cpu:
        yield from _steps(context, (name,), sizes if context.is_gpu else (1,))


def mlperf(context: BenchContext) -> Iterator[dict]:
    """MLPerf's recipe on SD2.1, its own model, if that fits, else on ours. Compilation takes minutes."""
    if context.is_gpu:
        is_huge = context.gpu_gib > HUGE_GIB
        work = replace(context.work, base="random:sd21", latent_size=64) if is_huge else context.work
        yield from _steps(replace(context, work=work), ("mlperf",), (32 if is_huge else 4,))


def whole_loop(context: BenchContext) -> Iterator[dict]:
    """Seconds per epoch of the whole training loop, ours and EveryDream's."""
    size, photographs = (4, 32) if context.is_gpu else (2, 4)
    checkpointing = "none" if context.gpu_gib > LARGE_GIB or not context.is_gpu else "full"
    work = replace(context.work, batch_size=size, checkpointing=checkpointing)
    yield from bench_loop(work, photographs, 3)


def profile(context: BenchContext) -> Iterator[dict]:
    """Launches, synchronizations and time by operator class of our step, from the profiler."""
    from safelight.bench.counting.profiled import profile_step

    for size in (1, 8) if context.is_gpu else (1,):
        work = replace(context.work, batch_size=size)
        trainer, (batch,) = build(OURS, work), random_batches(1, work)
        figures = profile_step(lambda trainer=trainer, batch=batch: trainer.step(batch), context.device)
        yield context.make_record("profile", {"recipe": OURS, **asdict(work)}, figures)
        del trainer
        free(context.device)


def rooflines(context: BenchContext) -> Iterator[dict]:
    """Our step against the device's ceilings, at batch 1 and 8."""
    for size in (1, 8) if context.is_gpu else (1,):
        yield roofline(replace(context.work, batch_size=size), *((10, 5) if context.is_gpu else (1, 1)))
        if context.remaining() < 15:
            return


def gpu_tests(context: BenchContext) -> Iterator[dict]:
    """The tests marked gpu, if this is a checkout."""
    if not (ROOT / "tests").is_dir():
        yield context.make_record("tests", {"marker": "gpu"}, {}, "no tests: this is not a checkout")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    status, tail, seconds = call(command, min(150.0, context.remaining()), context.out / "gpu_tests.log")
    # pytest exits with 5 if no test has the marker
    figures = {"exit_status": status, "seconds": round(seconds, 1)} | ({} if status in (0, 5) else {"failed": True})
    yield context.make_record("tests", {"marker": "gpu"}, figures, tail)


def attention(context: BenchContext) -> Iterator[dict]:
    """Every attention backend at the models' shapes, until the time is up; on a CPU four small shapes."""
    models, batch, repeats = (("sd15", "sdxl", "sd21"), 8, 10) if context.is_gpu else (("sdxl",), 1, 1)
    for line in bench_attention(models, batch, context.work.dtype, context.device, repeats):
        yield line
        if context.remaining() < 5:
            return


def memory(context: BenchContext) -> Iterator[dict]:
    """Memory of a step of batch 1 by optimizer, memory mode and checkpointing, until the time is up."""
    # the CPU rehearsal takes only the first
    names = () if context.is_gpu else tuple(offered(context.work.dtype))[:1]
    for line in bench_memory(context.work, names):
        yield line
        if context.remaining() < 10:
            return


def kernels(context: BenchContext) -> Iterator[dict]:
    """Bytes of the kernels and, on a GPU, their speed at SD1.5's largest layers. compiled_kernels has torch.compile."""
    lines = bench_kernels(
        ("sd15",),
        (1, 8) if context.is_gpu else (1,),
        context.work.dtype,
        context.device,
        times=context.is_gpu,
        with_compile=False,
    )
    for line in lines:
        yield line
        if context.remaining() < 5:
            return


def compiled_kernels(context: BenchContext) -> Iterator[dict]:
    """The kernels against torch.compile, one shape per kernel; the CPU rehearsal times one kernel's reference."""
    lines = bench_kernels(
        ("sd15",),
        (8 if context.is_gpu else 1,),
        context.work.dtype,
        context.device,
        ops=() if context.is_gpu else ("geglu",),
        num_shapes=1,
        with_bytes=False,
        repeats=20 if context.is_gpu else 1,
        with_compile=context.is_gpu,
    )
    for line in lines:
        yield line
        if context.remaining() < 10:
            return


def optimizers(context: BenchContext) -> Iterator[dict]:
    """Every optimizer on a part of SD1.5's tensors."""
    yield from bench_optimizers(
        context.device, context.work.dtype, 8 if context.is_gpu else 343, 10 if context.is_gpu else 1
    )


def training_run(context: BenchContext) -> Iterator[dict]:
    """A short `safelight train` of the tiny base, from photographs to a checkpoint, through the command line."""
    if context.is_gpu:
        run = ShortRun("tiny", "tiny", 128, photos=32, steps=60, batch_size=8)
    else:
        run = ShortRun("tiny", "tiny", 128, photos=8, steps=4, batch_size=2)
    yield _run(context, run, 120)


def full_size_run(context: BenchContext) -> Iterator[dict]:
    """The same at SD1.5's size and 512 px with random weights, and with validation if the GPU is large.

    The CPU rehearsal uses the smallest random base.
    """
    if context.is_gpu:
        is_large = context.gpu_gib > LARGE_GIB
        run = ShortRun(
            "sd15",
            "random:sd15",
            512,
            photos=64,
            steps=300 if is_large else 24,
            batch_size=4,
            checkpointing="none" if is_large else "full",
            validates=is_large,
        )
    else:
        run = ShortRun("sd15", "random:small", 128, photos=2, steps=1, batch_size=1, checkpointing="full")
    free_gib = shutil.disk_usage(context.out).free / GIB
    if context.is_gpu and free_gib < RUN_DISK_GIB:
        note = f"skipped: a checkpoint needs {RUN_DISK_GIB} GiB of disk, {free_gib:.0f} are free"
        yield context.make_record("training_run", {"base": run.base}, {}, note)
        return
    yield _run(context, run, 240)


def _run(context: BenchContext, run: ShortRun, seconds: float) -> dict:
    end = min(context.end, time.monotonic() + seconds)
    figures = train(run, context.out / f"run_{run.base.replace(':', '_')}", context.work.device, end)
    return context.make_record("training_run", asdict(run), figures)


class Part(NamedTuple):
    """A benchmark of `bench all`.

    min_s: remaining seconds below which it is skipped on a GPU. silence_limit_s: seconds without a result after which
    its subprocess is ended.
    """

    name: str
    min_s: float
    measure: Callable[[BenchContext], Iterator[dict]]
    silence_limit_s: float = SILENCE_LIMIT_S


# the most valuable first
PARTS = (
    Part("ceilings", 5, _ceilings),
    Part("steps", 20, steps),
    Part("graphs", 15, graphs),
    Part("ablation", 20, ablation),
    Part("models", 40, models),
    Part("profile", 15, profile),
    Part("roofline", 30, rooflines),
    Part("attention", 10, attention),
    Part("memory", 20, memory),
    Part("kernels", 15, kernels),
    Part("optimizer", 10, optimizers),
    Part("tests", 20, gpu_tests, LONG_SILENCE_LIMIT_S),
    Part("cache", 15, steps_from_a_cache),
    Part("training_run", 30, training_run, LONG_SILENCE_LIMIT_S),
    Part("full_size_run", 60, full_size_run, LONG_SILENCE_LIMIT_S),
    Part("everydream", 30, partial(recipe, "everydream", (1, 4), True)),
    Part("kohya", 15, partial(recipe, "kohya", (1, 4), True)),
    Part("diffusers_16bit", 15, partial(recipe, "diffusers-16bit", (1, 8), True)),
    Part("loop", 60, whole_loop, LONG_SILENCE_LIMIT_S),
    Part("mlperf", 90, mlperf, LONG_SILENCE_LIMIT_S),
    Part("diffusers_compiled", 60, partial(recipe, "diffusers-compiled", (8,), False), LONG_SILENCE_LIMIT_S),
    Part("compiled_kernels", 60, compiled_kernels, LONG_SILENCE_LIMIT_S),
)


def run_parts(minutes: float, out: Path, work: Workload, only: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield every result line after appending it to OUT/results.jsonl. only: names of parts; all if empty.

    Raises UserError for an unknown part or a time limit that is not positive.
    """
    names = [part.name for part in PARTS]
    if minutes <= 0:
        raise UserError(f"--minutes {minutes:g} must be above 0; use for example 8")
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"there is no part {', '.join(unknown)} of bench all; use {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    chosen = tuple(part for part in PARTS if not only or part.name in only)
    end = time.monotonic() + 60 * minutes
    # on a GPU this process makes no CUDA call: it must survive a CUDA error
    measure_parts = _measure_in_subprocesses if pick_device(work.device).type == "cuda" else _measure_here
    for record in measure_parts(chosen, out.resolve(), work, end):
        append(out / "results.jsonl", record)
        yield record


def _measure_here(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[dict]:
    """Yield the parts' result lines, measured in this process."""
    yield from (record for name, record in part_events(parts, out, work, end) if name and record is not None)


def _measure_in_subprocesses(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[dict]:
    """Yield the parts' result lines, measured in a subprocess; after a failure the remaining parts get a new one."""
    remaining, blank = parts, None
    while remaining:
        current, began = remaining[0], time.monotonic()

        def silence_limit_s() -> float:
            # the closure must see the part that is running now
            return min(current.silence_limit_s, max(0.0, end - time.monotonic()) + OVERTIME_S)  # noqa: B023

        with closing(
            run_in_subprocess(part_events, remaining, out, work, end, silence_limit_s=silence_limit_s)
        ) as events:
            try:
                for name, record in events:
                    if not name:
                        blank = record
                    elif record is None:
                        current, began = next(part for part in remaining if part.name == name), time.monotonic()
                    else:
                        yield record
            except SubprocessEnded as error:
                if blank is None:
                    raise RuntimeError(f"the benchmark process could not start: {error}") from None
                figures = {"failed": True, "seconds": round(time.monotonic() - began, 1)}
                yield {**blank, "bench": current.name, "figures": figures, "note": str(error)}
        remaining = remaining[remaining.index(current) + 1 :]


def part_events(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[tuple[str, dict | None]]:
    """Measure the parts and yield events: ("", a result line without figures) first, which describes the machine;
    then (name, None) as each part starts and (name, result line) for each of its results.

    On a GPU a failing part is the last one, because the state it leaves on the device goes away only with the process.
    """
    context = BenchContext(out, work.resolved(), end)
    yield "", context.make_record("", {}, {})
    for part in parts:
        yield part.name, None
        began = time.monotonic()
        if context.remaining() < (part.min_s if context.is_gpu else 1):
            yield part.name, context.make_record(part.name, {}, {}, "skipped: not enough time left")
            continue
        try:
            for record in part.measure(context):
                yield part.name, record
        except Exception as error:
            # any failure is recorded, so that the remaining parts still run
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            figures = {"failed": True, "seconds": round(time.monotonic() - began, 1)}
            yield part.name, context.make_record(part.name, {}, figures, message)
            if context.is_gpu:
                return
        free(context.device)
