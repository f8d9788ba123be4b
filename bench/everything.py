"""`safelight bench all`: everything worth knowing of a GPU in one call, most valuable first, safe to cut off.

Each result is on disk as soon as it is there. A part that fails leaves a line that says why, and the next part begins;
a part whose time is up leaves a line that says so. On a CPU the same parts run small: a rehearsal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from safelight.bench.attention import bench_attention
from safelight.bench.ceilings import ceilings
from safelight.bench.harness import interleave
from safelight.bench.results import ROOT, append, make_record
from safelight.bench.suite import OURS, build, free, measure, variants
from safelight.bench.workload import Workload, random_batches
from safelight.trainer.log import peak_memory_gib, reset_peak_memory

CAPS_GIB = (16, 12, 8, 6, 4)


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


def gpu_tests(session: Session) -> Iterator[dict]:
    """The tests marked gpu, where the checkout and pytest are there."""
    if not (ROOT / "tests").is_dir():
        yield session.record("tests", {"marker": "gpu"}, {}, "no tests: this is not a checkout")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    status, tail, seconds = _call(command, min(150.0, session.remaining()), session.out / "gpu_tests.log")
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


def memory_caps(session: Session) -> Iterator[dict]:
    """Whether a step of batch 1 fits into an emulated card, by checkpointing; the CUDA context comes on top."""
    if not session.is_gpu:
        yield session.record("memory", {}, {}, "skipped: a cap can be put on a GPU alone")
        return
    total = torch.cuda.get_device_properties(session.device).total_memory / 2**30
    for cap in CAPS_GIB:
        for checkpointing in ("none", "full"):
            if cap > total or session.remaining() < 5:
                continue
            work = replace(session.work, checkpointing=checkpointing)
            torch.cuda.set_per_process_memory_fraction(cap / total, session.device)
            try:
                found = _try_steps(work)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, session.device)
                free(session.device)
            yield session.record("memory", {"cap_gib": cap, "recipe": OURS, **asdict(work)}, found)


def _try_steps(work: Workload) -> dict:
    """Return whether three steps fit, with their peak and speed if so."""
    device = torch.device(work.device)
    reset_peak_memory(device)
    try:
        trainer, batches = build(OURS, work), random_batches(3, work)
        seconds = interleave({"": lambda n: trainer.step(batches[n % 3])}, device, repeats=2, warmup=1)[""]
    except torch.cuda.OutOfMemoryError:
        return {"fits": False}
    return {"fits": True, "peak_gib": round(peak_memory_gib(device), 3), "step_ms": round(1e3 * min(seconds), 2)}


def training_run(session: Session) -> Iterator[dict]:
    """A short `safelight train` of the tiny base, from photographs to report: the commands themselves, on this device."""
    from safelight.trainer.tiny.scenes import caption, draw, random_scene

    folder = session.out / "training_run"
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(32 if session.is_gpu else 8):
        scene = random_scene(7, number)
        draw(scene).save(photos / f"{number:03d}.png")
        (photos / f"{number:03d}.txt").write_text(caption(scene, 7, number))
    places = [
        "--data.path",
        str(folder / "dataset"),
        "--run.dir",
        str(folder / "run"),
        "--run.device",
        session.work.device,
    ]
    settings = (
        f"--train.max-steps {60 if session.is_gpu else 4} --validate.every-epochs 0 --sample.every-epochs 0".split()
    )
    # a last step is logged whatever its number
    settings += ["--train.batch-size", "8" if session.is_gpu else "2", "--log.tensorboard", "False"]
    seconds_of = {}
    for words in (
        ["init", "tiny", "-o", str(folder / "run.toml"), "--force"],
        ["prepare", str(photos), "-o", str(folder / "dataset")],
        ["train", str(folder / "run.toml"), *places, *settings],
    ):
        log = session.out / f"{words[0]}.log"
        status, tail, seconds = _call([sys.executable, "-m", "safelight", *words], min(120.0, session.remaining()), log)
        seconds_of[f"{words[0]}_s"] = round(seconds, 1)
        if status != 0:
            raise RuntimeError(f"safelight {words[0]} ended with {status}: {tail}")
    import json

    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    last = trained[-1]
    found = {
        **seconds_of,
        "steps": last["step"],
        "images_per_s": last["images_per_s"],
        "loss": last["loss"],
        "peak_gib": last["memory_gib"],
    }
    yield session.record("training_run", {"base": "tiny"}, found)


def _call(command: list[str], timeout_s: float, log: Path) -> tuple[int, str, float]:
    """Run a command in a process group of its own; return (exit status, its last line, seconds). 124: out of time."""
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
    lines = log.read_text(errors="replace").strip().splitlines()
    return status, lines[-1][:200] if lines else "", time.monotonic() - began


# most valuable first; (name, seconds it wants on a GPU at the least, function)
PARTS: tuple[tuple[str, float, Callable[[Session], Iterator[dict]]], ...] = (
    ("ceilings", 5, _ceilings),
    ("steps", 20, steps),
    ("profile", 15, profile),
    ("attention", 10, attention),
    ("memory", 15, memory_caps),
    ("tests", 20, gpu_tests),
    ("cache", 15, steps_from_a_cache),
    ("training_run", 30, training_run),
    ("baselines", 30, other_baselines),
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
