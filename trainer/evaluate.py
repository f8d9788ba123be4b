"""Validation and samples of a run: before the first step, every few epochs, and at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from safelight.data.atomic import atomic_write_text
from safelight.text import counted
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.inference.gallery import Drawn, file_name, save_png
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, generate, settings_of
from safelight.trainer.job import Job
from safelight.trainer.memory_plan.candidate import EvalBatching
from safelight.trainer.step.validate import Validation, choose_subset, validate
from safelight.trainer.stop import Stopped


def evaluate(job: Job, position: Position) -> Position:
    """Validate and sample if due at this position, and return the position with the best loss so far.

    If a stop is requested meanwhile, the returned position is `unmeasured`, and a resumed run starts over with it.
    """
    config = job.run.user_config
    is_start_or_end = position.step == 0 or position.step >= job.timeline.num_steps

    def due(every: int) -> bool:
        return every > 0 if is_start_or_end else is_due(every, position.epoch)

    ema = job.models.ema
    try:
        with job.progress.clock_paused(), nullcontext() if ema is None or position.step == 0 else ema.applied():
            if due(config.validate_.every_epochs) and not job.progress.metrics.has_validation(position.step):
                position = _validate(job, position)
            if due(config.sample.every_epochs):
                _sample(job, position)
    except Stopped:
        return replace(position, unmeasured=True)
    return replace(position, unmeasured=False)


def is_due(every: int, count: int) -> bool:
    """Return whether something done every `every` steps or epochs is due after `count` of them; 0 means never."""
    return every > 0 and count % every == 0


def _reporter(job: Job, position: Position, what: str) -> Callable[[int, int], None]:
    """Return a progress callback for validation or sampling; it raises Stopped once a stop is requested."""

    def report(done: int, total: int) -> None:
        if position.step == 0:
            # not on the training bar, whose remaining time it would distort
            job.progress.terminal.update(what, done, total)
        else:
            job.progress.show(position, f"{what} {done}/{total}")
        if job.stop_requested():
            raise Stopped

    return report


def _planned(job: Job) -> EvalBatching:
    """Return the planned batch sizes of validation and sampling; without a plan, fields that mean the defaults."""
    return EvalBatching() if job.run.plan is None else job.run.plan.eval_batching


def describe_validation(before: Position, held_out: Validation, trained_on: Validation) -> str:
    """Return the terminal's line about a validation. before: the position before it, with the best loss until then."""
    line = f"step {before.step}: held-out loss {held_out.loss:.4f}"
    if before.best_loss is None:
        line += f" on {counted(held_out.num_images, 'photograph')}"
    elif held_out.loss < before.best_loss:
        line += f", best so far by {before.best_loss - held_out.loss:.4f}"
    else:
        line += f", {held_out.loss - before.best_loss:.4f} above the best (step {before.best_step})"
    return f"{line}; training photographs {trained_on.loss:.4f}"


def _validate(job: Job, position: Position) -> Position:
    """Validate the held-out set and the training subset; return the position with the best loss so far."""
    settings, context, metrics = job.run.user_config.validate_, job.models.context, job.progress.metrics
    seed = job.run.user_config.run.seed
    if not job.dataset.validation:
        return position
    held_out = choose_subset(job.dataset.validation, settings.max_images, seed)
    results = {
        split: validate(
            context.unet,
            job.dataset.rows(samples),
            context.schedule,
            context.scaling_factor,
            seed=seed,
            num_bands=settings.timesteps,
            batch_size=_planned(job).validation_images or settings.batch_size,
            progress=_reporter(job, position, f"validating {label}"),
        )
        for split, label, samples in (
            ("held_out", "held out", held_out),
            ("train_subset", "trained on", job.train_subset),
        )
    }
    job.progress.terminal.say(describe_validation(position, results["held_out"], results["train_subset"]))
    for split, result in results.items():
        metrics.write(
            "validation",
            position.step,
            epoch=job.progress.epoch_fraction(position),
            split=split,
            loss=result.loss,
            loss_by_timestep=list(result.loss_by_timestep),
            num_images=result.num_images,
        )
        if split == "held_out" and (position.best_loss is None or result.loss < position.best_loss):
            position = replace(position, best_step=position.step, best_loss=result.loss)
            metrics.write("event", position.step, event="best so far", detail=f"held-out loss {result.loss:.5f}")
    return position


def _sample(job: Job, position: Position) -> None:
    """Generate images for the run's prompts and write them to samples/step-XXXXXXXX."""
    config, context = job.run.user_config, job.models.context
    prompts = job.dataset.sample_prompts(config)
    if not prompts:
        return
    settings, planned = settings_of(config), _planned(job)
    positive, negative = job.dataset.conditioning(prompts), job.dataset.conditioning([config.sample.negative_prompt])
    images = generate(
        context.unet,
        job.models.codec,
        positive,
        negative,
        context.schedule,
        settings,
        batch_size=planned.prompts or SAMPLE_BATCH_SIZE,
        decode_on=torch.device("cpu") if planned.decode_on == "cpu" else job.run.device,
        progress=_reporter(job, position, "sampling"),
    )
    folder = job.run.run_dir / "samples" / f"step-{position.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    base, cuts = Path(config.model.base).name, job.dataset.cuts
    model = base if position.step == 0 else f"{base} step {position.step}"
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        file = file_name(f"step{position.step}", index, prompt)
        drawn = Drawn.of(
            file, prompt, config.sample.negative_prompt, position.step or None, settings, cuts.get(prompt, "")
        )
        save_png(image, folder / file, drawn.parameters(model, clip_skip=config.model.clip_skip))
        row = {"file": file, "prompt": prompt, "seed": settings.seed, "cfg": settings.cfg, "num_steps": settings.steps}
        rows.append({**row, "cut_after": cuts[prompt]} if prompt in cuts else row)
    index_json = {"step": position.step, "epoch": job.progress.epoch_fraction(position), "images": rows}
    atomic_write_text(folder / "index.json", json.dumps(index_json, indent=1, ensure_ascii=False))
