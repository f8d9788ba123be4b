"""What the planner, the roofline and the ceilings predict of result lines, beside what was measured.

Nothing is measured here: the plan's traces on meta tensors take seconds to minutes. Only the shapes that come with
Safelight are predicted, because a line of results may name any path as its base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from safelight.bench.core.results import NUMBER, flatten, newest
from safelight.bench.recipes.suite import VARIANTS, recipe_config
from safelight.bench.recipes.workload import Workload, config_of
from safelight.trainer.adapters.trained import trained_dtype
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.communication import Link
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, Card, card_called
from safelight.trainer.memory_plan.meta_run import meta_run
from safelight.trainer.memory_plan.ranks_plan import exchanges_of, ranks_of
from safelight.trainer.models.architectures import RANDOM_MODELS
from safelight.trainer.models.base import EMBEDDED
from safelight.trainer.models.device import DTYPES
from safelight.trainer.optim.optimizer import memory_mode
from safelight.units import GIB, MIB

BASES = (*EMBEDDED, *(f"random:{name}" for name in RANDOM_MODELS))
# no step of ours is larger; a line of results could ask for a trace of any size
MAX_LATENTS, MAX_BATCH_SIZE, MAX_PROCESSES = 512, 4096, 1024
# memory assumed of a GPU whose name the planner does not know
UNKNOWN_GIB = 80.0
SPEED, MEMORY, LAUNCHES = "Speed of steps", "Peak memory", "Launches"
ROOFLINE, OPTIMIZERS, KERNELS, SAMPLING = "Roofline", "Optimizers", "Kernels", "Sampling"
COMMUNICATION = "Communication"
SECTIONS = {
    SPEED: "The plan's estimate for the card's data sheet. A step without CUDA graphs waits for the host.",
    MEMORY: "The plan's bytes and what torch's allocator reserved, without the CUDA context.",
    LAUNCHES: "Kernels of a step, counted on meta tensors and by the profiler.",
    COMMUNICATION: "What each process sends in a step, as the plan of several GPUs has it.",
    SAMPLING: "Denoising without decoding; the UNet's passes at the rates of the card's data sheet.",
    ROOFLINE: "The least time of each class of operators at the machine's ceilings, and its time under the profiler.",
    OPTIMIZERS: "The time for the bytes that a step moves, at the rate of the machine's copies.",
    KERNELS: "The time for the bytes that a kernel moves, at the rate of the machine's copies.",
}


@dataclass(frozen=True)
class Row:
    """A figure that was predicted. measured: None if the step ran out of memory."""

    section: str
    what: str
    unit: str
    predicted: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.measured is not None and self.predicted else None


def rows_of(records: list[dict]) -> list[Row]:
    """Return a row for each figure in the newest lines that was predicted, by section.

    A line whose settings no plan accepts has no row.
    """
    lines = list(newest(records).values())
    copies = {_device(line): _number(line, "copy_gb_per_s") for line in lines if line["bench"] == "ceilings"}
    rows: list[Row] = []
    for line in lines:
        predict = _PREDICTORS.get(line["bench"])
        if predict is None:
            continue
        try:
            rows += predict(line, copies.get(_device(line)))
        except ValueError:
            # settings that a plan refuses, for example in a line of another version
            continue
    return sorted(rows, key=lambda row: list(SECTIONS).index(row.section))


def _number(line: dict, name: str) -> float | None:
    """Return a figure of a line, the middle one of a [p20, p50, p80]; None if it is missing or no number."""
    value = flatten(line["figures"]).get(name)
    return value if NUMBER[1](value) else None


def _device(line: dict) -> str:
    return str(line.get("machine", {}).get("device"))


def _card(line: dict) -> Card | None:
    """Return the GPU of a line, None for a CPU."""
    name = _device(line)
    if line["config"].get("device") != "cuda":
        return None
    return card_called(name) or Card(name, UNKNOWN_GIB)


def _workload(line: dict) -> Workload:
    """Return the workload of a line. Raises ValueError if it is not one that can be traced."""
    config = line["config"]
    sizes = {"latent_size": MAX_LATENTS, "batch_size": MAX_BATCH_SIZE}
    if config.get("base") not in BASES or config.get("precision") not in DTYPES:
        raise ValueError("unknown base or precision")
    if not all(type(config.get(name)) is int and 0 < config[name] <= most for name, most in sizes.items()):
        raise ValueError("sizes out of range")
    texts = {name: config.get(name, getattr(Workload, name)) for name in ("optimizer", "checkpointing")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("optimizer or checkpointing is no text")
    names = ("base", "latent_size", "batch_size", "precision")
    return Workload(**{name: config[name] for name in names}, **texts, device="cuda")


@functools.lru_cache(maxsize=64)
def _candidate(recipe: str, work: Workload, card: Card) -> tuple[Candidate, int]:
    """Return the plan of a variant of ours, and how many kernels its step launches."""
    config = recipe_config(recipe, work)
    estimator = MemoryEstimator(config, card)
    memory = memory_mode(config.trained_optimizer, trained_dtype(config, DTYPES[work.precision]))
    candidate = estimator.estimate(memory, work.checkpointing, work.batch_size)
    trace = estimator.step_trace(work.checkpointing, config.optimizer.is_fused, work.batch_size)
    return candidate, trace.work.launches


def _name(work: Workload, *parts: str) -> str:
    """Return a workload in words: `random:sd15 512 px, batch 1, exact, full checkpointing`."""
    memory = work.optimizer.partition(", ")[2] or (work.optimizer if work.optimizer != "adamw8bit" else "")
    checkpointing = f"{work.checkpointing} checkpointing" if work.checkpointing != "none" else ""
    texts = (f"{work.base.removeprefix('random:')} {8 * work.latent_size} px", f"batch {work.batch_size}")
    return ", ".join(filter(None, (*texts, *parts, memory, checkpointing)))


def _step_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    recipe, card = line["config"].get("recipe"), _card(line)
    if recipe not in VARIANTS or card is None:
        return
    work = _workload(line)
    candidate, _ = _candidate(recipe, work, card)
    technique = recipe.removeprefix("safelight").removeprefix("-").replace("-", " ")
    name = _name(work, technique, "from a cache" if line["config"].get("loader") is True else "")
    speed, peak = _number(line, "images_per_s"), _number(line, "peak_gib")
    if speed is not None and candidate.images_per_s is not None:
        yield Row(SPEED, name, "images/s", candidate.images_per_s, speed)
    if peak is not None or line["figures"].get("fits") is False:
        yield Row(MEMORY, name, "GiB", (candidate.needed_bytes - CONTEXT_BYTES) / GIB, peak)


def _memory_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    name = _name(_workload(line), "one step")
    pairs = (("predicted_allocated_gib", "allocated_gib", "GiB"), ("predicted_step_mib", "step_mib", "MiB"))
    for predicted, measured, unit in pairs:
        values = _number(line, predicted), _number(line, measured)
        if None not in values:
            what = "allocated" if unit == "GiB" else "added by a step"
            yield Row(MEMORY, f"{name}: {what}", unit, *values)


def _profile_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    card, launches = _card(line), _number(line, "launches")
    recipe = line["config"].get("recipe", "safelight")
    if card is not None and launches is not None and recipe in VARIANTS:
        work = _workload(line)
        yield Row(LAUNCHES, _name(work), "kernels", _candidate(recipe, work, card)[1], launches)


def _roofline_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    name, least, measured = _name(_workload(line)), _number(line, "least_ms"), _number(line, "step_ms")
    if least is not None and measured is not None:
        yield Row(ROOFLINE, f"{name}: whole step, without the profiler", "ms", least, measured)
        for kind in line["figures"]["classes"]:
            values = tuple(_number(line, f"classes.{kind}.{figure}") for figure in ("least_ms", "ms"))
            if None not in values and values[0] > 0:
                yield Row(ROOFLINE, f"{name}: {kind}", "ms", *values)


def _optimizer_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    moved, milliseconds = _number(line, "moved_bytes_per_parameter"), _number(line, "step_ms")
    num, name = line["config"].get("parameters"), line["config"].get("optimizer")
    # on a CPU references run, which move far more
    if (
        _card(line) is None
        or None in (moved, milliseconds, copy_gb_per_s)
        or not NUMBER[1](num)
        or not isinstance(name, str)
    ):
        return
    yield Row(OPTIMIZERS, f"{name[:60]}, {num:,} parameters", "ms", moved * num / copy_gb_per_s / 1e6, milliseconds)


def _kernel_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    for direction in ("forward", "backward"):
        milliseconds, share = (_number(line, f"{direction}.{name}") for name in ("ours_ms", "share_of_limit"))
        if milliseconds is not None and share is not None:
            shape = line["config"].get("shape")
            sizes = "x".join(map(str, shape)) if isinstance(shape, list) else ""
            name = f"{line['config'].get('op')} {sizes}"[:60]
            yield Row(KERNELS, f"{name} {direction}", "ms", share * milliseconds, milliseconds)


def _sampling_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    card, measured, steps = _card(line), _number(line, "denoise_s"), line["config"].get("steps")
    if card is None or measured is None or type(steps) is not int:
        return
    work = _workload(line)
    run = meta_run(config_of(work, kernels="off"), DTYPES[work.precision], False, 1)
    # guidance: each picture with its text and without
    rows_per_picture = 1 if line["config"].get("cfg") == 1 else 2
    run.forward(rows_per_picture * work.batch_size, work.latent_size, work.latent_size)
    done = run.live.work
    seconds = card.seconds(done.flops, done.bytes_moved, done.launches)
    if seconds is not None:
        yield Row(SAMPLING, _name(work, f"{steps} steps"), "s", steps * seconds, measured)


def _scale_rows(line: dict, copy_gb_per_s: float | None) -> Iterator[Row]:
    num = line["config"].get("processes")
    # buckets of another size than training's exchange the same bytes in other messages
    if type(num) is not int or not 1 < num <= MAX_PROCESSES or "bucket_mib" in line["config"]:
        return
    work = _workload(line)
    config = config_of(work, kernels="off")
    ranks = ranks_of(config, num, Link("", None, 0.0))
    for name, fused in (("ours", False), ("ours_fused", True)):
        run = meta_run(config, DTYPES[work.precision], fused, 1, is_reduced=True)
        exchanges = exchanges_of(run.optimizer, config, ranks)
        what = _name(work, f"{num} processes", name.replace("_", " "))
        sent, calls = (_number(line, f"{name}.{figure}") for figure in ("sent_mib", "calls"))
        if sent is not None and calls is not None:
            yield Row(COMMUNICATION, what, "MiB", sum(one.sent(num) for one in exchanges) / MIB, sent)
            yield Row(COMMUNICATION, what, "messages", sum(one.calls for one in exchanges), calls)


_PREDICTORS: dict[str, Callable[[dict, float | None], Iterator[Row]]] = {
    "step": _step_rows,
    "quick": _step_rows,
    "memory": _memory_rows,
    "profile": _profile_rows,
    "roofline": _roofline_rows,
    "optimizer": _optimizer_rows,
    "kernels": _kernel_rows,
    "sampling": _sampling_rows,
    "scale": _scale_rows,
}
