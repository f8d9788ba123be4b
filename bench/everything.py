"""`safelight bench all`: everything worth knowing of a GPU in one call, most valuable first, safe to cut off.

Each result is on disk as soon as it is there. A part that fails leaves a line that says why, and the next part begins;
a part whose time is up leaves a line that says so. On a CPU the same parts run small: a rehearsal.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from safelight.bench.attention import bench_attention
from safelight.bench.ceilings import ceilings
from safelight.bench.kernels import bench_kernels
from safelight.bench.memory import bench_memory
from safelight.bench.optimizers import bench_optimizers, offered
from safelight.bench.results import ROOT, append, make_record
from safelight.bench.roofline import roofline
from safelight.bench.short_run import ShortRun, call, train
from safelight.bench.suite import OURS, VARIANTS, build, free, measure, variants
from safelight.bench.workload import Workload, random_batches

GIB = 2**30
# weights, master and moments of SD1.5, and room to write them
RUN_DISK_GIB = 12


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
    yield from _steps(session, (OURS, "diffusers"), (1, 8, 32) if session.is_gpu else (1, 2))


def ablation(session: Session) -> Iterator[dict]:
    """Ours with each technique more or less, at both ends of batch sizes; on a CPU, which has no graphs, one of them."""
    recipes = tuple(VARIANTS) if session.is_gpu else ("safelight-fused",)
    for size in (1, 32) if session.is_gpu else (1,):
        yield from _steps(session, recipes, (size,))


def steps_from_a_cache(session: Session) -> Iterator[dict]:
    yield from _steps(session, (OURS,), (8,) if session.is_gpu else (2,), loader=True)


def other_baselines(session: Session) -> Iterator[dict]:
    """The 16-bit recipe, then the compiled one, which takes minutes to begin."""
    yield from _steps(session, ("diffusers-16bit",), (1, 8) if session.is_gpu else (1,))
    if session.is_gpu:
        yield from _steps(session, ("diffusers-compiled",), (8,))


def profile(session: Session) -> Iterator[dict]:
    from safelight.bench.profiled import profile_step

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
    found = {"exit_status": status, "seconds": round(seconds, 1)}
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
        ("sd15",), (1, 8) if session.is_gpu else (1,), session.work.dtype, session.device, times=session.is_gpu,
        with_compile=False,
    )  # fmt: skip
    for line in lines:
        yield line
        if session.remaining() < 5:
            return


def compiled_kernels(session: Session) -> Iterator[dict]:
    """The same beside torch.compile, one shape a kernel; on a CPU the references of one kernel rehearse it."""
    lines = bench_kernels(
        ("sd15",), (8 if session.is_gpu else 1,), session.work.dtype, session.device, ops=() if session.is_gpu else ("geglu",),
        num_shapes=1, with_bytes=False, repeats=20 if session.is_gpu else 1, with_compile=session.is_gpu,
    )  # fmt: skip
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
    """The same of SD1.5's size at 512 px, random weights; rehearsed on a CPU by the smallest of the random bases."""
    if session.is_gpu:
        total = torch.cuda.get_device_properties(session.device).total_memory / GIB
        checkpointing = "none" if total > 30 else "full"
        run = ShortRun("sd15", "random:sd15", 512, photos=16, steps=24, batch_size=4, checkpointing=checkpointing)
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


# most valuable first; (name, seconds it wants on a GPU at the least, function)
PARTS: tuple[tuple[str, float, Callable[[Session], Iterator[dict]]], ...] = (
    ("ceilings", 5, _ceilings),
    ("steps", 20, steps),
    ("ablation", 20, ablation),
    ("profile", 15, profile),
    ("roofline", 30, rooflines),
    ("attention", 10, attention),
    ("memory", 20, memory),
    ("kernels", 15, kernels),
    ("optimizer", 10, optimizers),
    ("tests", 20, gpu_tests),
    ("cache", 15, steps_from_a_cache),
    ("training_run", 30, training_run),
    ("full_size_run", 60, full_size_run),
    ("baselines", 30, other_baselines),
    ("compiled_kernels", 60, compiled_kernels),
)


def run_all(minutes: float, out: Path, work: Workload, only: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield every result line, each already in OUT/results.jsonl. only: names of parts; empty for all.

    Raises ValueError for an unknown part or no time.
    """
    names = [name for name, _, _ in PARTS]
    if minutes <= 0 or any(name not in names for name in only):
        raise ValueError(f"minutes {minutes} must be above 0 and parts {list(only)} among {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    session = Session(out.resolve(), work.resolved(), time.monotonic() + 60 * minutes)
    for name, seconds, part in PARTS:
        if only and name not in only:
            continue
        if session.remaining() < (seconds if session.is_gpu else 1):
            records: Iterator[dict] = iter([session.record(name, {}, {}, "left out: the time was up")])
        else:
            records = _guarded(session, name, part)
        for record in records:
            append(out / "results.jsonl", record)
            yield record


def _guarded(session: Session, name: str, part: Callable[[Session], Iterator[dict]]) -> Iterator[dict]:
    """Yield a part's lines; where it fails, whatever the failure, a line with it, so that the next part begins."""
    began = time.monotonic()
    try:
        yield from part(session)
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        yield session.record(name, {}, {"failed": True, "seconds": round(time.monotonic() - began, 1)}, message)
    free(session.device)
