"""The parts of `safelight bench all`, in order: the most valuable first.

By our estimate for an H200 the parts up to `roofline`, which measure every goal of goals.toml, take six minutes, and
those up to `cache` eight; what follows runs if time is left. max_s bounds each of them, so that a part that takes
longer than expected ends with what it has, and the next ones keep their time.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from safelight.bench.all.short_training_run import ShortRun, call, train
from safelight.bench.core.ceilings import ceilings
from safelight.bench.core.results import ROOT, make_record
from safelight.bench.measure.attention import bench_attention
from safelight.bench.measure.cache_growth import bench_encoding
from safelight.bench.measure.kernels import bench_kernels
from safelight.bench.measure.loop import bench_loop
from safelight.bench.measure.memory import bench_memory
from safelight.bench.measure.optimizers import bench_optimizers, offered
from safelight.bench.measure.roofline import roofline
from safelight.bench.measure.sampling import bench_sampling
from safelight.bench.recipes.suite import OURS, VARIANTS, build, free, measure, variants
from safelight.bench.recipes.workload import Workload, random_batches
from safelight.data.decode_memory import available_bytes
from safelight.trainer.registry.optimizers import MEMORY_MODES
from safelight.units import GIB

# a checkpoint of SD1.5 (weights, master weights and moments) and space to write it
RUN_DISK_GIB = 12
# GPU memory from which SD1.5 trains at batch 32 without checkpointing, and SDXL at batch 8
LARGE_GIB, HUGE_GIB = 30, 70
# SDXL's weights in fp32 and the copy that is trained
SDXL_HOST_GIB = 22
# memory modes of 16-bit weights, the most exact first
MODES = tuple(mode for mode in MEMORY_MODES if mode not in ("auto", "fp32"))
# compilation (Triton, Inductor, cuDNN) can be silent for minutes; after this long without a result we assume a hang
SILENCE_LIMIT_S, LONG_SILENCE_LIMIT_S = 120, 300


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
    def sdxl(self) -> str:
        """The base of SDXL's kind that is measured: itself on a GPU."""
        return "random:sdxl" if self.is_gpu else "tiny-xl"

    @property
    def smallest_and_largest_batch(self) -> tuple[int, int]:
        """Batch 1, where the host is the bottleneck, and a batch that fills the GPU."""
        return (1, 32 if self.gpu_gib > LARGE_GIB else 4)

    def remaining(self) -> float:
        return self.end - time.monotonic()

    def with_work(self, **changes: object) -> BenchContext:
        """Return this context with another workload. A change of base takes the size that its UNet was made for."""
        changes = {"latent_size": 0, **changes} if "base" in changes else changes
        return replace(self, work=replace(self.work, **changes).resolved())

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
    recipes = tuple(name for name, options in VARIANTS.items() if not {"graphs", "adapter"} & options.keys())
    recipes = recipes if context.is_gpu else ("safelight-fused",)
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
        yield from _steps(context.with_work(base=base, latent_size=side), ("safelight-graphs", OURS), sizes)
        if context.remaining() < 30:
            return


def memory_modes(context: BenchContext) -> Iterator[dict]:
    """Our step of batch 1 in each memory mode, at the smallest settings: full checkpointing, stepped inside backward.

    Speed and peak. On a CPU, where weights are fp32, two modes of bf16 weights.
    """
    modes = MODES if context.is_gpu else ("exact", "streamed")
    yield from _in_memory_modes(context if context.is_gpu else context.with_work(precision="bf16"), modes)


def _in_memory_modes(context: BenchContext, modes: tuple[str, ...]) -> Iterator[dict]:
    for mode in modes:
        changes = {"optimizer": f"adamw8bit, {mode}", "checkpointing": "full"}
        yield from _steps(context.with_work(**changes), ("safelight-fused",), (1,))
        if context.remaining() < 5:
            return


def sdxl_lora(context: BenchContext) -> Iterator[dict]:
    """A LoRA's step on SDXL at 1024 px, on a 16-bit and an nf4 base; on a CPU on the small model of SDXL's kind."""
    if note := _no_room_for_sdxl(context):
        yield context.make_record("sdxl_lora", {}, {}, note)
        return
    sizes = (1, 4) if context.gpu_gib > LARGE_GIB else (1,)
    yield from _steps(context.with_work(base=context.sdxl), ("safelight-lora", "safelight-lora-nf4"), sizes)


def sdxl_memory(context: BenchContext) -> Iterator[dict]:
    """SDXL's step of batch 1 in the memory modes that smaller cards need, as memory_modes has them."""
    if note := _no_room_for_sdxl(context):
        yield context.make_record("sdxl_memory", {}, {}, note)
        return
    if context.is_gpu:
        yield from _in_memory_modes(context.with_work(base=context.sdxl), MODES[1:])
    else:
        yield from _in_memory_modes(context.with_work(base=context.sdxl, precision="bf16"), ("paged",))


def _no_room_for_sdxl(context: BenchContext) -> str:
    """Return why there is no host memory for SDXL's weights, '' if there is."""
    available = available_bytes()
    if not context.is_gpu or available is None or available >= SDXL_HOST_GIB * GIB:
        return ""
    return f"skipped: SDXL's weights need {SDXL_HOST_GIB} GiB of host memory, {available / GIB:.0f} are free"


def sampling(context: BenchContext) -> Iterator[dict]:
    """Pictures/s of the sampler, as samples, comparisons and evaluation draw them."""
    if context.is_gpu:
        yield from bench_sampling(context.work, (1, 8), repeats=3)
    else:
        yield from bench_sampling(context.work, (1, 2), repeats=1, steps=2)


def encoding(context: BenchContext) -> Iterator[dict]:
    """Images/s of the autoencoder alone, and of filling a cache with it."""
    if context.is_gpu:
        yield bench_encoding(context.work, num=64, batch_size=4, repeats=2)
    else:
        yield bench_encoding(context.work, num=4, batch_size=2, repeats=1)


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
        if is_huge:
            context = context.with_work(base="random:sd21", latent_size=64)
        yield from _steps(context, ("mlperf",), (32 if is_huge else 4,))


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
    if not (places := _places_of_gpu_tests(ROOT / "tests")):
        yield context.make_record("tests", {"marker": "gpu"}, {}, "no tests: this is not a checkout")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, places)]
    status, tail, seconds = call(command, min(150.0, context.remaining()), context.out / "gpu_tests.log")
    # pytest exits with 5 if no test has the marker
    figures = {"exit_status": status, "seconds": round(seconds, 1)} | ({} if status in (0, 5) else {"failed": True})
    yield context.make_record("tests", {"marker": "gpu"}, figures, tail)


def _places_of_gpu_tests(tests: Path) -> list[Path]:
    """Return the files with tests marked gpu, then the folders whose conftest.py marks them, which have thousands.

    Importing all other files of tests takes longer than these tests.
    """
    marked = [file for file in sorted(tests.rglob("*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    folders = [file.parent for file in marked if file.name == "conftest.py"]
    files = (file for file in marked if file.name.startswith("test_"))
    return [*(file for file in files if not any(file.is_relative_to(folder) for folder in folders)), *folders]


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

    min_s: remaining seconds below which it is skipped on a GPU. max_s: seconds after which it takes no more
    measurements on a GPU. silence_limit_s: seconds without a result after which its subprocess is ended.
    """

    name: str
    min_s: float
    max_s: float
    measure: Callable[[BenchContext], Iterator[dict]]
    silence_limit_s: float = SILENCE_LIMIT_S


PARTS = (
    Part("ceilings", 5, 10, _ceilings),
    Part("steps", 20, 75, steps),
    Part("graphs", 15, 40, graphs),
    Part("memory_modes", 15, 40, memory_modes),
    Part("models", 40, 100, models),
    Part("sdxl_lora", 25, 50, sdxl_lora),
    Part("sdxl_memory", 25, 50, sdxl_memory),
    Part("sampling", 15, 30, sampling),
    Part("encoding", 15, 25, encoding),
    Part("profile", 15, 20, profile),
    Part("roofline", 30, 40, rooflines),
    Part("ablation", 20, 35, ablation),
    Part("attention", 10, 20, attention),
    Part("kernels", 15, 20, kernels),
    Part("memory", 20, 20, memory),
    Part("optimizer", 10, 15, optimizers),
    Part("cache", 10, 10, steps_from_a_cache),
    Part("tests", 20, 150, gpu_tests, LONG_SILENCE_LIMIT_S),
    Part("training_run", 30, 60, training_run, LONG_SILENCE_LIMIT_S),
    Part("full_size_run", 60, 120, full_size_run, LONG_SILENCE_LIMIT_S),
    Part("everydream", 30, 40, partial(recipe, "everydream", (1, 4), True)),
    Part("kohya", 15, 30, partial(recipe, "kohya", (1, 4), True)),
    Part("diffusers_16bit", 15, 30, partial(recipe, "diffusers-16bit", (1, 8), True)),
    Part("loop", 60, 90, whole_loop, LONG_SILENCE_LIMIT_S),
    Part("mlperf", 90, 120, mlperf, LONG_SILENCE_LIMIT_S),
    Part("diffusers_compiled", 60, 90, partial(recipe, "diffusers-compiled", (8,), False), LONG_SILENCE_LIMIT_S),
    Part("compiled_kernels", 60, 90, compiled_kernels, LONG_SILENCE_LIMIT_S),
)
