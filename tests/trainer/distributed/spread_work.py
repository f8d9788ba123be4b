"""What the tests of work between steps run in each process: phases, caches, pictures, commands, disturbed runs."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image

from safelight.__main__ import main
from safelight.data import filling, shards
from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.trainer import train as training
from safelight.trainer.between_steps import evaluate as evaluating
from safelight.trainer.between_steps import samples
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.distributed import started
from safelight.trainer.distributed.together import Stopped, together
from safelight.trainer.distributed.world import World, join_world, leave_world
from safelight.trainer.inference import class_images, pictures
from safelight.trainer.inference.pictures import Request, Weights, draw_held
from safelight.trainer.inference.sampling import NotFinitePicture, Settings
from safelight.trainer.loading.dataset import open_dataset
from safelight.trainer.models.base import base_of
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.run_log.divergence import NotFinite
from safelight.trainer.step.validate import Validation
from tests.trainer.distributed.several import adding_in_order

CPU = torch.device("cpu")
SETTINGS = Settings(8, 8, 3, 4.0, 7, "ddim")


class Gone(UserError):
    """As CheckpointGone: an error that is raised as itself in all processes."""


FAILURES = {
    "stopped": Stopped(),
    "user": UserError("a photograph has changed"),
    "gone": Gone("step-3 is gone"),
    "disk": OSError(28, "No space left on device", "index.json"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "bug": KeyError("name"),
}

# what fails in a phase, by rank
FAILING = (
    *(("", name) for name in ("stopped", "user", "gone", "disk")),
    *(("memory", "user"), ("stopped", "bug"), ("", "")),
)


@contextmanager
def joined(limit_s: float = 60.0) -> Iterator[World]:
    """The world of all processes of a job, inside the block. limit_s: distributed.timeout_s."""
    world = join_world("cpu", limit_s, {}, {}, print)
    yield world
    leave_world(world, 0)


def phases() -> list[list[str]]:
    """Return what a process raises in phases that fail in some processes: (class, text) of each."""
    found = []
    with joined() as world:
        for failing in FAILING:
            try:
                with together(world, Gone):
                    if name := failing[world.rank]:
                        raise FAILURES[name]
            except Exception as error:
                found.append([type(error).__name__, str(error)])
        assert world.from_main("end") == "end"
    return found


def wait_for_the_slow(limit_s: float, work_s: float) -> list[int]:
    """Return how much of the work is known to be done, during and after it, when one process works far longer."""
    seen = []
    with joined(limit_s) as world, together(world) as others:
        if world.is_main:
            seen.append(others.whole(5))
        else:
            began = time.monotonic()
            while time.monotonic() - began < work_s:
                _descend(64)
            seen.append(others.whole(1))
    return seen


def _descend(depth: int) -> None:
    """Work for a while at every depth of calls: the watch, which looks every half a second, finds it at another one."""
    sum(range(20_000))
    if depth:
        _descend(depth - 1)


def stop_early(work_s: float) -> float:
    """Return how long a process works that another one has stopped."""
    with joined() as world:
        began = time.monotonic()
        with suppress(Stopped), together(world) as others:
            if not world.is_main:
                raise Stopped
            while time.monotonic() - began < work_s:
                time.sleep(0.01)
                others.check()
        return time.monotonic() - began


def fill_cache(settings: dict, batches_per_part: int = 1, kill_rank: int = -1) -> dict:
    """Return what a process encoded of a dataset, and the progress it showed. kill_rank: killed in its first batch."""
    filling.BATCHES_PER_PART, shards.ROWS_OF_CHECKER = batches_per_part, 1
    config = parse_config(settings, "test")
    own, shown = [], []
    encode, generate = LatentCodec.encode, class_images.generate

    def encode_slowly(self, pixels):
        # nobody goes on before all have a part
        Path(config.data.path, f"encodes-{world.rank}").touch()
        ends = time.monotonic() + 30
        while len(list(Path(config.data.path).glob("encodes-*"))) < world.size and time.monotonic() < ends:
            time.sleep(0.01)
        own.append(len(pixels))
        if kill_rank == world.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, pixels)

    def generate_slowly(*args, **options):
        own.append(-1)
        return generate(*args, **options)

    LatentCodec.encode, class_images.generate = encode_slowly, generate_slowly
    try:
        with joined() as world:
            opened = open_dataset(config, base_of(config.model), CPU, lambda *row: shown.append(row), world=world)
            with opened.cache as cache:
                return {
                    "own": sum(num for num in own if num > 0),
                    "drawn": own.count(-1),
                    "num_encoded": opened.num_encoded,
                    "num_damaged": opened.num_damaged,
                    "num_checked": sum(map(sum, cache._checked.values())),
                    "rows": len(cache),
                    "missing": len(cache.missing([key for sample in opened.samples for key in sample.latent_keys])),
                    "last": {what: [done, total] for what, done, total in shown},
                }
    finally:
        LatentCodec.encode, class_images.generate = encode, generate


def draw_requests(count: int, batch_size: int, broken: list[int]) -> dict:
    """Return which pictures a process drew, the pixel that each has, and the picture that is said to be broken."""
    own = []

    def generate(unet, codec, positive, negative, schedule, settings, *, places, progress, **_) -> list[Image.Image]:
        for step in range(settings.steps):
            progress(step + 1, settings.steps)
        own.extend(places)
        if bad := [place for place in places if place in broken]:
            raise NotFinitePicture(bad[0])
        return [Image.new("RGB", (settings.width, settings.height), (place, 0, 0)) for place in places]

    class NoTexts:
        num_chunks = (1,) * count

        def positive(self, numbers):
            return None

        negative = positive

    requests = [Request(Weights(), "a", number, SETTINGS) for number in range(count)]
    drawn, shown, said, original = [], [], None, pictures.generate
    pictures.generate = generate
    try:
        with joined() as world:
            try:
                drawn = draw_held(
                    None,
                    None,
                    requests,
                    NoTexts(),
                    None,
                    batch_size=batch_size,
                    progress=lambda done, total: shown.append([done, total]),
                    world=world,
                )
            except NotFinitePicture as error:
                said = error.index
    finally:
        pictures.generate = original
    return {"own": own, "pixels": [image.getpixel((0, 0))[0] for image in drawn], "shown": shown, "broken": said}


def probe_weights(losses: list[list[float | None]]) -> list[bool | str]:
    """Return what a process finds of weights whose probes give some loss in each process, or fill its memory."""
    found = []
    with joined() as world:
        for of_ranks in losses:

            def validate(*_, loss=of_ranks[world.rank], **__) -> Validation:
                if loss is None:
                    raise torch.OutOfMemoryError
                return Validation(loss, (), 1, (0,) if math.isnan(loss) else ())

            context = SimpleNamespace(unet=None, schedule=None, scaling_factor=1.0, texts=None)
            job = SimpleNamespace(
                world=world,
                train_subset=[None] * 9,
                models=SimpleNamespace(context=context),
                dataset=SimpleNamespace(rows=lambda samples: None),
                run=SimpleNamespace(user_config=Config(), config=Config()),
            )
            with mock.patch.object(evaluating, "validate", validate):
                try:
                    found.append(evaluating.check_weights(job, Position(step=3)))
                except NotFinite:
                    found.append("not finite")
    return found


def run_command(words: list[str], out: str) -> int:
    """Run a command in all processes and return its status. What the main one prints goes to the file `out`."""
    text = Path(f"{out}-{started.rank()}")
    with text.open("w") as file, redirect_stdout(file):
        return main(words)


def disturbed_run(
    settings: dict,
    resume: bool = False,
    stop_in: str = "",
    prompts: list[str] | None = None,
    request: dict | None = None,
    adds_in_order: bool = False,
) -> dict:
    """Train a run with pictures drawn one at a time; return the step, whether it was interrupted, and what was drawn.

    stop_in: validation or sampling, in which the last process alone is asked to stop after the first step. prompts:
    what the main process writes into the prompt file after the first step. request: for pictures, asked for then.
    adds_in_order: add gradients as one process does.
    """
    samples.SAMPLE_BATCH_SIZE = 1
    config = parse_config(copy.deepcopy(settings), "test")
    is_last = started.rank() == started.world_size() - 1
    is_main = started.is_main_process()
    state, num_drawn = {"steps": 0, "stop": False, "is_validating": False}, 0
    train_step, generate, validate = training.train_step, pictures.generate, evaluating.validate

    def step_then_write(*args, **options):
        result = train_step(*args, **options)
        state["steps"] += 1
        if is_main and state["steps"] == 1:
            if prompts is not None:
                Path(config.sample.prompts_file).write_text("\n".join(prompts))
            if request is not None:
                folder = Path(config.run.dir, "live")
                folder.mkdir(exist_ok=True)
                atomic_write_text(folder / f"request-{'0' * 16}.json", json.dumps(request))
                # the inbox is looked into every now and then
                time.sleep(0.3)
        return result

    def count(*args, **options):
        nonlocal num_drawn
        num_drawn += 1
        state["stop"] |= is_last and stop_in == "sampling" and state["steps"] > 0
        return generate(*args, **options)

    def validate_seen(*args, **options):
        # only within it: the same function probes weights before they are saved, where nobody asks for a stop
        state["is_validating"] = state["steps"] > 0
        try:
            return validate(*args, **options)
        finally:
            state["is_validating"] = False

    def is_stopped() -> bool:
        return state["stop"] or (stop_in == "validation" and is_last and state["is_validating"])

    training.train_step, pictures.generate, evaluating.validate = step_then_write, count, validate_seen
    try:
        with adding_in_order() if adds_in_order else nullcontext():
            result = training.train(config, resume=resume, stop_requested=is_stopped)
    finally:
        training.train_step, pictures.generate, evaluating.validate = train_step, generate, validate
    return {"step": result.position.step, "interrupted": result.interrupted, "drawn": num_drawn}
