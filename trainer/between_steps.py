"""What a run does between steps: the loss on fixed noise and the fixed prompts, at the start, by epochs and at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch

from safelight.data.atomic import atomic_write_text
from safelight.data.text import counted
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, generate, settings_of
from safelight.trainer.job import Job
from safelight.trainer.memory_plan.candidate import Between
from safelight.trainer.step.validate import Validation, choose_subset, validate
from safelight.trainer.stop import Stopped


def measure(job: Job, position: Position) -> Position:
    """Validate and sample as is due here: by epochs, and at the start and the end of the run.

    Asked to stop in between, return the position `unmeasured`; a resumed run comes here again and does the rest.
    """
    config = job.config
    at_an_end = position.step == 0 or position.step >= job.timeline.num_steps

    def due(every: int) -> bool:
        return every > 0 if at_an_end else is_due(every, position.epoch)

    began = time.monotonic()
    try:
        with nullcontext() if job.ema is None or position.step == 0 else job.ema.applied():
            if due(config.validate_.every_epochs) and not job.metrics.has_validation(position.step):
                position = _validate(job, position)
            if due(config.sample.every_epochs):
                _sample(job, position)
    except Stopped:
        return replace(position, unmeasured=True)
    # the clock of images/s runs over training alone
    job.window_began += time.monotonic() - began
    return replace(position, unmeasured=False)


def is_due(every: int, count: int) -> bool:
    """Return whether something done every so many is due; 0 is never."""
    return every > 0 and count % every == 0


def _tell(job: Job, position: Position, what: str) -> Callable[[int, int], None]:
    """Return what long work between steps reports to: the terminal's line, and the end of the work if a stop is asked for."""

    def told(done: int, total: int) -> None:
        if position.step == 0:
            # a count of its own: the time left of training is not told by it
            job.terminal.update(what, done, total)
        else:
            job.terminal.update("training", position.step, job.timeline.num_steps, f"{what} {done}/{total}")
        if job.stop_requested():
            raise Stopped

    return told


def epoch_fraction(job: Job, position: Position) -> float:
    per_epoch = job.timeline.stage_steps_per_epoch[job.timeline.stage_of(position.epoch)]
    return position.epoch + position.step_in_epoch / per_epoch


def _between(job: Job) -> Between:
    """Return how the plan of the GPU's memory lets validation and drawing be done; the usual way without a plan."""
    return Between() if job.planned is None else job.planned.between


def describe_validation(before: Position, held_out: Validation, trained_on: Validation) -> str:
    """Return what a validation leaves on the terminal, one line. before: the position with the best until now."""
    told = f"step {before.step}: held-out loss {held_out.loss:.4f}"
    if before.best_loss is None:
        told += f" on {counted(held_out.num_images, 'photograph')}"
    elif held_out.loss < before.best_loss:
        told += f", best so far by {before.best_loss - held_out.loss:.4f}"
    else:
        told += f", {held_out.loss - before.best_loss:.4f} above the best (step {before.best_step})"
    return f"{told}; training photographs {trained_on.loss:.4f}"


def _validate(job: Job, position: Position) -> Position:
    """Measure the held-out set and the training subset; return the position with the best so far."""
    settings = job.config.validate_
    if not job.dataset.validation:
        return position
    held_out = choose_subset(job.dataset.validation, settings.max_images, job.config.run.seed)
    results = {
        split: validate(
            job.unet,
            job.dataset.cache,
            samples,
            job.dataset.empty_key,
            job.schedule,
            job.dataset.scaling_factor,
            seed=job.config.run.seed,
            num_bands=settings.timesteps,
            batch_size=_between(job).validated or settings.batch_size,
            progress=_tell(job, position, f"validating {label}"),
        )
        for split, label, samples in (("held_out", "held out", held_out), ("train_subset", "trained on", job.subset))
    }
    job.terminal.say(describe_validation(position, results["held_out"], results["train_subset"]))
    for split, result in results.items():
        job.metrics.write(
            "validation",
            position.step,
            epoch=round(epoch_fraction(job, position), 6),
            split=split,
            loss=result.loss,
            loss_by_timestep=list(result.loss_by_timestep),
            num_images=result.num_images,
        )
        if split == "held_out" and (position.best_loss is None or result.loss < position.best_loss):
            position = replace(position, best_step=position.step, best_loss=result.loss)
            job.metrics.write("event", position.step, event="best so far", detail=f"held-out loss {result.loss:.5f}")
    return position


def _sample(job: Job, position: Position) -> None:
    """Draw the fixed prompts into samples/step-XXXXXXXX."""
    config = job.config
    prompts = job.dataset.sample_prompts(config)
    if not prompts:
        return
    settings, between = settings_of(config), _between(job)
    text, negative = job.dataset.texts(prompts), job.dataset.texts([config.sample.negative_prompt])
    images = generate(
        job.unet,
        job.codec,
        text,
        negative,
        job.schedule,
        settings,
        batch_size=between.prompts or SAMPLE_BATCH_SIZE,
        decode_on=torch.device("cpu") if between.decode_on == "cpu" else job.device,
        progress=_tell(job, position, "drawing"),
    )
    folder = job.run_dir / "samples" / f"step-{position.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        image.save(folder / f"{index:03d}.png")
        rows.append(
            {
                "file": f"{index:03d}.png",
                "prompt": prompt,
                "seed": settings.seed,
                "cfg": settings.cfg,
                "num_steps": settings.steps,
            }
        )
    index_json = {"step": position.step, "epoch": round(epoch_fraction(job, position), 6), "images": rows}
    atomic_write_text(folder / "index.json", json.dumps(index_json, indent=1, ensure_ascii=False))
