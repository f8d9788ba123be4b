"""Validation and samples of a run: before the first step, every few epochs, and at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from safelight.data.cache import Sample
from safelight.text import counted
from safelight.trainer.between_steps.samples import draw_samples, planned
from safelight.trainer.between_steps.stage_end import watch
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.distributed.together import Stopped
from safelight.trainer.loading.job import Job
from safelight.trainer.run_log.divergence import MAX_PROBED_LOSS, NotFinite
from safelight.trainer.run_log.doubts import is_risen
from safelight.trainer.step.validate import Validation, choose_subset, validate

# photographs tried before the weights are found to be broken
MAX_PROBES = 4


def evaluate(job: Job, position: Position) -> Position:
    """Validate and sample if due at this position, and return the position with the best loss so far.

    If a stop is requested meanwhile, the returned position is `unmeasured`, and a resumed run starts over with it.
    """
    # as in the stage that led here
    config = job.timeline.stages[position.stage].config
    is_start_or_end = position.step == 0 or position.step >= job.timeline.num_steps

    def due(every: int) -> bool:
        return every > 0 if is_start_or_end else is_due(every, position.epoch)

    measures = due(config.validate_.every_epochs) or before_best(job, position)
    try:
        with job.progress.clock_paused(), job.models.shown(averages=position.step > 0):
            if measures and not job.progress.metrics.has_validation(position.step):
                position = _validate(job, position)
            if due(config.sample.every_epochs):
                draw_samples(job, position, _reporter(job, position, "sampling"))
    except Stopped:
        job.stop_all()
        return replace(position, unmeasured=True)
    return watch(job, replace(position, unmeasured=False)) if measures else replace(position, unmeasured=False)


def before_best(job: Job, position: Position) -> bool:
    """Return whether a stage ends here, and the next one begins from its best checkpoint."""
    stages, stage = job.timeline.stages, job.timeline.stage_of(position.epoch)
    is_border = position.step_in_epoch == 0 and position.epoch == job.timeline.first_epoch(stage) and position.step > 0
    return is_border and stage > position.stage and stages[stage].start_from == "best"


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
        if job.stop_here():
            raise Stopped

    return report


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


def check_weights(job: Job, position: Position) -> bool:
    """Return whether the UNet's present weights, which are about to be saved, are ruined; the same in all processes.

    Raises NotFinite if they give no finite loss at all.
    """
    # one forward pass; more only if the first photograph is at fault
    for sample in job.train_subset[:MAX_PROBES]:
        probe = _probe(job, sample)
        has_no_room, is_not_finite, is_ruined = job.world.any_of(
            probe is None,
            probe is not None and bool(probe.not_finite),
            probe is not None and probe.loss > MAX_PROBED_LOSS,
        )
        if has_no_room:
            # for a probe beside what training holds; all steps so far have been finite
            return False
        if not is_not_finite:
            return is_ruined
    what = f"with the weights after step {position.step} no loss is finite"
    raise NotFinite(position.step, what, position.step - 1)


def _probe(job: Job, sample: Sample) -> Validation | None:
    """Return the loss of one photograph under the present weights; None if the GPU has no room for it.

    Raises torch.OutOfMemoryError instead if processes divide the weights: the others would wait for this one's part.
    """
    context = job.models.context
    try:
        return validate(
            context.unet,
            job.dataset.rows([sample]),
            context.schedule,
            context.scaling_factor,
            seed=job.run.user_config.run.seed,
            num_bands=1,
            batch_size=1,
            texts=context.texts,
        )
    except torch.OutOfMemoryError:
        if job.run.config.distributed.shard == "full":
            raise
        return None


def _check_validation(position: Position, result: Validation, samples: list[Sample], label: str) -> None:
    """Raise NotFinite if a validation's loss is not finite. label: what kind of photographs they are."""
    if not result.not_finite:
        return
    # all of them: the weights are broken
    photos = [samples[index].photo.file for index in result.not_finite] if len(result.not_finite) < len(samples) else []
    last_sound = position.step if photos else position.step - 1
    raise NotFinite(position.step, f"the loss on {label} photographs is not finite", last_sound, photos)


def _report_rise(job: Job, position: Position, loss: float) -> None:
    """Say that the held-out loss has risen far above the base's, if it has and is still rising."""
    held_out, metrics = job.progress.metrics.held_out, job.progress.metrics
    base = held_out.get(0)
    before = max((step for step in held_out if step < position.step), default=0)
    if not is_risen(loss, base) or loss <= held_out[before]:
        return
    line = (
        f"step {position.step}: the held-out loss {loss:.4f} is {loss / base:.1f} times the base's {base:.4f} and "
        "rising: the run is making the model worse; stop it and use a lower learning rate"
    )
    job.progress.terminal.say(line)
    metrics.write("event", position.step, event="held-out loss rose", detail=line)


def _validate(job: Job, position: Position) -> Position:
    """Validate the held-out set and the training subset; return the position with the best loss so far.

    Raises NotFinite if a loss is not finite.
    """
    settings = job.timeline.stages[position.stage].config.validate_
    context, metrics = job.models.context, job.progress.metrics
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
            batch_size=planned(job).validation_images or settings.batch_size,
            progress=_reporter(job, position, f"validating {label}"),
            texts=context.texts,
            world=job.world,
        )
        for split, label, samples in (
            ("held_out", "held out", held_out),
            ("train_subset", "trained on", job.train_subset),
        )
    }
    _check_validation(position, results["held_out"], held_out, "held-out")
    _check_validation(position, results["train_subset"], job.train_subset, "training")
    job.progress.terminal.say(describe_validation(position, results["held_out"], results["train_subset"]))
    _report_rise(job, position, results["held_out"].loss)
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
    loss, before = results["held_out"].loss, position.stage_best_loss
    # whether or not the settings say so by now, the next stage may begin from it: a resume may add that one
    if position.step > 0 and (before is None or loss < before):
        position = replace(position, stage_best_step=position.step, stage_best_loss=loss)
    return position
