"""`safelight bench all`: everything worth knowing of a GPU in one call, most valuable first, safe to cut off.

Each result is on disk as soon as it is there. A part that fails leaves a line that says why, and the next part begins;
a part whose time is up leaves a line that says so. On a GPU the parts run in a process of their own, and after one that
failed in a new one: an illegal address, a crash or a hang spoils that part alone. On a CPU the same parts run small, in this
process: a rehearsal.
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
from safelight.bench.all.subprocess_runner import Ended, apart
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

# weights, master and moments of SD1.5, and room to write them
RUN_DISK_GIB = 12
# from here on SD1.5 trains at batch 32 without checkpointing, and from here on SDXL at batch 8
LARGE_GIB, HUGE_GIB = 30, 70
# Triton, Inductor and cuDNN may be silent for long; whoever is for longer hangs
PATIENCE_S, LONG_PATIENCE_S = 120, 300
# a part may be cut off by its patience this long after the time is up
OVERTIME_S = 60


@dataclass
class Session:
    """What the parts share. end: time.monotonic() at which all should be over."""

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
        """The GPU's memory; 0 on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory / GIB if self.is_gpu else 0

    @property
    def ends_of_sizes(self) -> tuple[int, int]:
        """The smallest batch, which a host bounds, and one that fills the GPU."""
        return (1, 32 if self.gpu_gib > LARGE_GIB else 4)

    def remaining(self) -> float:
        return self.end - time.monotonic()

    def record(self, bench: str, config: dict, found: dict, note: str = "") -> dict:
        return make_record(bench, config, found, self.device, note)


def _ceilings(session: Session) -> Iterator[dict]:
    config = {"precision": session.work.precision}
    yield session.record("ceilings", config, ceilings(session.device, session.work.dtype, small=not session.is_gpu))


def _steps(session: Session, recipes: tuple[str, ...], sizes: tuple[int, ...], loader: bool = False) -> Iterator[dict]:
    """Measure the variants one after another, as long as there is time."""
    lines = measure(variants(recipes, sizes, session.work), 12 if session.is_gpu else 1, loader, together=False)
    for line in lines:
        yield line
        if session.remaining() < 5:
            lines.close()
            return


def steps(session: Session) -> Iterator[dict]:
    sizes = tuple(sorted({*session.ends_of_sizes, 8})) if session.is_gpu else (1, 2)
    yield from _steps(session, (OURS, "diffusers"), sizes)


def graphs(session: Session) -> Iterator[dict]:
    """Ours replayed as CUDA graphs; a CPU has none."""
    if session.is_gpu:
        yield from _steps(session, tuple(name for name in VARIANTS if "graphs" in name), session.ends_of_sizes)


def ablation(session: Session) -> Iterator[dict]:
    """Ours with each other technique more or less, at both ends of batch sizes; on a CPU one of them."""
    recipes = tuple(name for name in VARIANTS if "graphs" not in name) if session.is_gpu else ("safelight-fused",)
    for size in session.ends_of_sizes if session.is_gpu else (1,):
        yield from _steps(session, recipes, (size,))


def models(session: Session) -> Iterator[dict]:
    """SD2.1 at 512 px and SDXL at 1024 px, at the batch sizes of published figures; not on a CPU."""
    if not session.is_gpu:
        return
    if session.gpu_gib < HUGE_GIB:
        note = f"left out: SDXL at batch 8 wants {HUGE_GIB} GiB, this GPU has {session.gpu_gib:.0f}"
        yield session.record("models", {}, {}, note)
        return
    for base, side, sizes in (("random:sd21", 64, (32, 64)), ("random:sdxl", 128, (8,))):
        work = replace(session.work, base=base, latent_size=side)
        yield from _steps(replace(session, work=work), ("safelight-graphs", OURS), sizes)
        if session.remaining() < 30:
            return


def steps_from_a_cache(session: Session) -> Iterator[dict]:
    yield from _steps(session, (OURS,), (8,) if session.is_gpu else (2,), loader=True)


def recipe(name: str, sizes: tuple[int, ...], on_cpu: bool, session: Session) -> Iterator[dict]:
    """Measure another's recipe. on_cpu: rehearsed there; Inductor would take minutes."""
    if session.is_gpu or on_cpu:
        yield from _steps(session, (name,), sizes if session.is_gpu else (1,))


def mlperf(session: Session) -> Iterator[dict]:
    """MLPerf's recipe on its own model where that fits, else on ours; it takes minutes to begin."""
    if session.is_gpu:
        is_huge = session.gpu_gib > HUGE_GIB
        work = replace(session.work, base="random:sd21", latent_size=64) if is_huge else session.work
        yield from _steps(replace(session, work=work), ("mlperf",), (32 if is_huge else 4,))


def whole_loop(session: Session) -> Iterator[dict]:
    """Seconds an epoch, everything included, ours against EveryDream's way."""
    size, photographs = (4, 32) if session.is_gpu else (2, 4)
    checkpointing = "none" if session.gpu_gib > LARGE_GIB or not session.is_gpu else "full"
    work = replace(session.work, batch_size=size, checkpointing=checkpointing)
    yield from bench_loop(work, photographs, 3)


def profile(session: Session) -> Iterator[dict]:
    from safelight.bench.counting.profiled import profile_step

    for size in (1, 8) if session.is_gpu else (1,):
        work = replace(session.work, batch_size=size)
        trainer, (batch,) = build(OURS, work), random_batches(1, work)
        found = profile_step(lambda trainer=trainer, batch=batch: trainer.step(batch), session.device)
        yield session.record("profile", {"recipe": OURS, **asdict(work)}, found)
        del trainer
        free(session.device)


def rooflines(session: Session) -> Iterator[dict]:
    """The step against the ceilings, and where the rest of its time goes, at both ends of batch sizes."""
    for size in (1, 8) if session.is_gpu else (1,):
        yield roofline(replace(session.work, batch_size=size), *((10, 5) if session.is_gpu else (1, 1)))
        if session.remaining() < 15:
            return


def gpu_tests(session: Session) -> Iterator[dict]:
    """The tests marked gpu, where the checkout and pytest are there."""
    if not (ROOT / "tests").is_dir():
        yield session.record("tests", {"marker": "gpu"}, {}, "no tests: this is not a checkout")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    status, tail, seconds = call(command, min(150.0, session.remaining()), session.out / "gpu_tests.log")
    # pytest's 5: no test is marked so
    found = {"exit_status": status, "seconds": round(seconds, 1)} | ({} if status in (0, 5) else {"failed": True})
    yield session.record("tests", {"marker": "gpu"}, found, tail)


def attention(session: Session) -> Iterator[dict]:
    """Every backend at the models' shapes, as long as there is time; on a CPU four small shapes."""
    models, batch, repeats = (("sd15", "sdxl", "sd21"), 8, 10) if session.is_gpu else (("sdxl",), 1, 1)
    for line in bench_attention(models, batch, session.work.dtype, session.device, repeats):
        yield line
        if session.remaining() < 5:
            return


def memory(session: Session) -> Iterator[dict]:
    """What a step of batch 1 needs, by optimizer, memory mode and checkpointing, as long as there is time."""
    # a rehearsal takes the first alone
    names = () if session.is_gpu else tuple(offered(session.work.dtype))[:1]
    for line in bench_memory(session.work, names):
        yield line
        if session.remaining() < 10:
            return


def kernels(session: Session) -> Iterator[dict]:
    """The kernels' bytes and, on a GPU, their speed at SD1.5's largest layers; torch.compile has its own part."""
    lines = bench_kernels(
        ("sd15",),
        (1, 8) if session.is_gpu else (1,),
        session.work.dtype,
        session.device,
        times=session.is_gpu,
        with_compile=False,
    )
    for line in lines:
        yield line
        if session.remaining() < 5:
            return


def compiled_kernels(session: Session) -> Iterator[dict]:
    """The same beside torch.compile, one shape a kernel; on a CPU the references of one kernel rehearse it."""
    lines = bench_kernels(
        ("sd15",),
        (8 if session.is_gpu else 1,),
        session.work.dtype,
        session.device,
        ops=() if session.is_gpu else ("geglu",),
        num_shapes=1,
        with_bytes=False,
        repeats=20 if session.is_gpu else 1,
        with_compile=session.is_gpu,
    )
    for line in lines:
        yield line
        if session.remaining() < 10:
            return


def optimizers(session: Session) -> Iterator[dict]:
    yield from bench_optimizers(
        session.device, session.work.dtype, 8 if session.is_gpu else 343, 10 if session.is_gpu else 1
    )


def training_run(session: Session) -> Iterator[dict]:
    """A short `safelight train` of the tiny base, from photographs to a checkpoint: the commands themselves."""
    if session.is_gpu:
        run = ShortRun("tiny", "tiny", 128, photos=32, steps=60, batch_size=8)
    else:
        run = ShortRun("tiny", "tiny", 128, photos=8, steps=4, batch_size=2)
    yield _run(session, run, 120)


def full_size_run(session: Session) -> Iterator[dict]:
    """The same of SD1.5's size at 512 px, random weights, with validation where the GPU is quick; rehearsed on a CPU by the
    smallest of the random bases."""
    if session.is_gpu:
        is_large = session.gpu_gib > LARGE_GIB
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
    free_gib = shutil.disk_usage(session.out).free / GIB
    if session.is_gpu and free_gib < RUN_DISK_GIB:
        note = f"skipped: a checkpoint needs {RUN_DISK_GIB} GiB of disk, {free_gib:.0f} are free"
        yield session.record("training_run", {"base": run.base}, {}, note)
        return
    yield _run(session, run, 240)


def _run(session: Session, run: ShortRun, seconds: float) -> dict:
    end = min(session.end, time.monotonic() + seconds)
    found = train(run, session.out / f"run_{run.base.replace(':', '_')}", session.work.device, end)
    return session.record("training_run", asdict(run), found)


class Part(NamedTuple):
    """least_s: what it wants on a GPU; patience_s: for how long it may be silent."""

    name: str
    least_s: float
    measure: Callable[[Session], Iterator[dict]]
    patience_s: float = PATIENCE_S


# most valuable first
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
    Part("tests", 20, gpu_tests, LONG_PATIENCE_S),
    Part("cache", 15, steps_from_a_cache),
    Part("training_run", 30, training_run, LONG_PATIENCE_S),
    Part("full_size_run", 60, full_size_run, LONG_PATIENCE_S),
    Part("everydream", 30, partial(recipe, "everydream", (1, 4), True)),
    Part("kohya", 15, partial(recipe, "kohya", (1, 4), True)),
    Part("diffusers_16bit", 15, partial(recipe, "diffusers-16bit", (1, 8), True)),
    Part("loop", 60, whole_loop, LONG_PATIENCE_S),
    Part("mlperf", 90, mlperf, LONG_PATIENCE_S),
    Part("diffusers_compiled", 60, partial(recipe, "diffusers-compiled", (8,), False), LONG_PATIENCE_S),
    Part("compiled_kernels", 60, compiled_kernels, LONG_PATIENCE_S),
)


def run_all(minutes: float, out: Path, work: Workload, only: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield every result line, each already in OUT/results.jsonl. only: names of parts; empty for all.

    Raises ValueError for an unknown part or no time.
    """
    names = [part.name for part in PARTS]
    if minutes <= 0 or any(name not in names for name in only):
        raise UserError(f"minutes {minutes} must be above 0 and parts {list(only)} among {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    chosen = tuple(part for part in PARTS if not only or part.name in only)
    end = time.monotonic() + 60 * minutes
    # no device is touched here: what goes wrong on it would stay with this process
    is_apart = pick_device(work.device).type == "cuda"
    for record in (
        _without_end(chosen, out.resolve(), work, end) if is_apart else _lines(chosen, out.resolve(), work, end)
    ):
        append(out / "results.jsonl", record)
        yield record


def _lines(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[dict]:
    """Yield the parts' lines, measured in this process."""
    yield from (found for name, found in told(parts, out, work, end) if name and found is not None)


def _without_end(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[dict]:
    """Yield the parts' lines, measured in a process of their own, and in another from each part on that ends one."""
    waiting, form = parts, None
    while waiting:
        at, began = waiting[0], time.monotonic()

        def patience_s() -> float:
            return min(at.patience_s, max(0.0, end - time.monotonic()) + OVERTIME_S)  # noqa: B023  the part that is under way

        with closing(apart(told, waiting, out, work, end, patience_s=patience_s)) as events:
            try:
                for name, found in events:
                    if not name:
                        form = found
                    elif found is None:
                        at, began = next(part for part in waiting if part.name == name), time.monotonic()
                    else:
                        yield found
            except Ended as ended:
                if form is None:
                    raise RuntimeError(f"nothing can be measured here: {ended}") from None
                found = {"failed": True, "seconds": round(time.monotonic() - began, 1)}
                yield {**form, "bench": at.name, "figures": found, "note": str(ended)}
        waiting = waiting[waiting.index(at) + 1 :]


def told(parts: tuple[Part, ...], out: Path, work: Workload, end: float) -> Iterator[tuple[str, dict | None]]:
    """Yield ("", a line without figures); then for each part (its name, None) as it begins, and (its name, line) of each line.

    On a GPU a part that fails is the last one: whatever it has left there goes with the process.
    """
    session = Session(out, work.resolved(), end)
    yield "", session.record("", {}, {})
    for part in parts:
        yield part.name, None
        began = time.monotonic()
        if session.remaining() < (part.least_s if session.is_gpu else 1):
            yield part.name, session.record(part.name, {}, {}, "left out: the time was up")
            continue
        try:
            for record in part.measure(session):
                yield part.name, record
        except Exception as error:
            # whatever the failure: the next part shall begin
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            found = {"failed": True, "seconds": round(time.monotonic() - began, 1)}
            yield part.name, session.record(part.name, {}, found, message)
            if session.is_gpu:
                return
        free(session.device)
