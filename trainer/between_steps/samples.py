"""The pictures that a run samples while it trains, every few epochs, and its prompt file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.distributed.together import together
from safelight.trainer.inference.gallery import Drawn, file_name, save_png
from safelight.trainer.inference.pictures import Request, Texts, Weights, draw_held, drawn_of, sample_key
from safelight.trainer.inference.prompt_file import (
    RECORD_NAME,
    SampledPicture,
    SamplePrompt,
    pictures_of,
    read_prompt_file,
    record_of,
    recorded_prompts,
)
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, NotFinitePicture
from safelight.trainer.loading.job import Job
from safelight.trainer.memory_plan.candidate import EvalBatching
from safelight.trainer.models.embeddings import file_hashes
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder

Report = Callable[[int, int], None]


def planned(job: Job) -> EvalBatching:
    """Return the planned batch sizes of validation and sampling; without a plan, fields that mean the defaults."""
    return EvalBatching() if job.run.plan is None else job.run.plan.eval_batching


def draw_samples(job: Job, position: Position, report: Report) -> None:
    """Draw the run's prompts with the present weights, and write them to samples/step-XXXXXXXX and to the boards.

    All processes draw, and the main one writes. report: called with (done, total) denoising steps; an exception that it
    raises stops the drawing.
    """
    refresh_prompts(job, position)
    # as in the stage that led here
    config, dataset = job.timeline.stages[position.stage].config, job.dataset
    pictures = pictures_of(config, dataset.prompts, dataset.sample_captions(config), dataset.latent_factor)
    if not pictures:
        return
    encoder = None if job.models.context.texts is None else job.models.encoder
    requests = [at(picture.request, position) for picture in pictures]
    images = draw(job, position, requests, dataset.sample_texts(encoder), report)
    if images is None:
        return
    # a disk that is full ends the run in all processes
    with together(job.world):
        if job.world.is_main:
            _write_samples(job, position, pictures, requests, images)


def _write_samples(
    job: Job,
    position: Position,
    pictures: Sequence[SampledPicture],
    requests: Sequence[Request],
    images: Sequence[Image.Image],
) -> None:
    dataset = job.dataset
    folder = job.run.run_dir / "samples" / f"step-{position.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    cuts, rows = dataset.cuts, []
    for picture, request, image in zip(pictures, requests, images, strict=True):
        file = file_name(f"step{position.step}{picture.stem}", picture.number, request.prompt)
        drawn = drawn_of(file, request, cuts.get(request.prompt, ""))
        embeddings = dataset.file_embeddings(request.prompt, request.negative)
        save_png(image, folder / file, parameters_of(job, drawn), sample_key(request, embeddings))
        rows.append(_row(drawn))
    index: dict = {"step": position.step, "epoch": job.progress.epoch_fraction(position), "images": rows}
    if file := job.run.user_config.sample.prompts_file:
        index["prompts_file"] = file
    atomic_write_text(folder / "index.json", json.dumps(index, indent=1, ensure_ascii=False))
    named = [(one.number, one.stem, one.request.prompt, image) for one, image in zip(pictures, images, strict=True)]
    job.progress.metrics.write_images(position.step, named)


def draw(
    job: Job, position: Position, requests: Sequence[Request], texts: Texts, report: Report
) -> list[Image.Image] | None:
    """Return the pictures of requests, drawn with the present weights; None, after saying so, if one is not finite."""
    batching, context = planned(job), job.models.context
    try:
        return draw_held(
            context.unet,
            job.models.codec,
            requests,
            texts,
            context.schedule,
            batch_size=batching.prompts or SAMPLE_BATCH_SIZE,
            decode_on=torch.device("cpu") if batching.decode_on == "cpu" else job.run.device,
            progress=report,
            world=job.world,
        )
    except NotFinitePicture as error:
        prompt = requests[error.index].prompt
        line = f"step {position.step}: no samples: what the UNet draws for {prompt!r} is not finite"
        job.progress.terminal.say(line)
        job.progress.metrics.write("event", position.step, event="sample not finite", detail=line)
        return None


def at(request: Request, position: Position) -> Request:
    """Return a request for a picture by the weights of a position."""
    return replace(request, weights=Weights(position.step or None))


def parameters_of(job: Job, drawn: Drawn) -> str:
    """Return the parameters inside the PNG of a picture that training draws.

    The weights have no file yet, and so no hash.
    """
    config = job.run.user_config
    base = Path(config.model.base).name
    model = base if drawn.step < 0 else f"{base} step {drawn.step}"
    clip_skip = job.run.base.family.clip_skip_elsewhere(config.model.clip_skip)
    words = file_hashes(job.dataset.embeddings, drawn.prompt, drawn.negative_prompt)
    return drawn.parameters(model, clip_skip=clip_skip, words=words)


def _row(drawn: Drawn) -> dict:
    """Return what index.json says of a picture."""
    row = {
        "file": drawn.file,
        "prompt": drawn.prompt,
        "negative_prompt": drawn.negative_prompt,
        "seed": drawn.seed,
        "cfg": drawn.cfg,
        "num_steps": drawn.num_steps,
        "sampler": drawn.sampler,
        "spacing": drawn.spacing,
        "width": drawn.width,
        "height": drawn.height,
    }
    return {**row, "cut_after": drawn.cut_after} if drawn.cut_after else row


# the prompt file


def record_prompts(job: Job, position: Position) -> None:
    """Record the prompts that a run with a prompt file begins or goes on with, and say if they have changed since."""
    config = job.run.user_config
    if not config.sample.prompts_file:
        return
    if job.world.is_main:
        before = recorded_prompts(job.run.run_dir, config.sample.prompts_file)
        if before is not None and list(before.prompts) != job.dataset.prompts:
            _say_changed(job, position)
    refresh_prompts(job, position)


def refresh_prompts(job: Job, position: Position) -> None:
    """Read the run's prompt file again; sample its prompts from now on if they are others than before.

    An error in it is said once, and the prompts stay as they were. The main process reads the file, the others hear of
    what is new in it.
    """
    config, dataset = job.run.user_config, job.dataset
    if not config.sample.prompts_file:
        return
    with together(job.world):
        changed = _read_prompts(job, position) if job.world.is_main else None
    rows = job.world.from_main(None if changed is None else [one.model_dump(exclude_defaults=True) for one in changed])
    if job.world.is_main or rows is None:
        return
    with reader(job) as encoder:
        dataset.set_prompts(config, [SamplePrompt(**row) for row in rows], encoder)


def _read_prompts(job: Job, position: Position) -> Sequence[SamplePrompt] | None:
    """Read the prompt file, and return its prompts if they are others than before. See `refresh_prompts`."""
    config, dataset, changed = job.run.user_config, job.dataset, None
    try:
        found = read_prompt_file(Path(config.sample.prompts_file), config.data.max_resolution)
        if list(found.prompts) != dataset.prompts:
            _check_planned(job, found.prompts)
            with reader(job) as encoder:
                dataset.set_prompts(config, found.prompts, encoder)
                # a run that trains the text encoder reads its prompts anew each time
                if dataset.token_condition is None:
                    dataset.fill_prompts(encoder)
            changed = found.prompts
            _say_changed(job, position)
            for note in found.notes:
                job.progress.terminal.say(f"note: {note}")
    except UserError as error:
        if str(error) != job.said_of_prompts:
            job.said_of_prompts = str(error)
            line = f"{error}; the prompts stay as they were"
            job.progress.terminal.say(f"note: {line}")
            job.progress.metrics.write("event", position.step, event="prompts not read", detail=line)
        return changed
    job.said_of_prompts = ""
    record = json.dumps(record_of(config.sample.prompts_file, found), indent=1, ensure_ascii=False)
    atomic_write_text(job.run.run_dir / RECORD_NAME, record + "\n")
    return changed


def _say_changed(job: Job, position: Position) -> None:
    num = counted(len(job.dataset.pictures), "picture")
    line = f"{job.run.user_config.sample.prompts_file} has changed: {num} at a time from now on"
    job.progress.terminal.say(line)
    job.progress.metrics.write("event", position.step, event="prompts changed", detail=line)


def _check_planned(job: Job, prompts: Sequence) -> None:
    """Raise UserError if a picture is larger than what the plan left memory for."""
    for prompt in prompts:
        check_planned_size(job, prompt.width or 0, prompt.height or 0)


def check_planned_size(job: Job, width: int, height: int) -> None:
    """Raise UserError if a picture of width x height px is larger than what the plan left memory for."""
    if job.run.plan is None:
        return
    most = job.planned_size
    if width * height > most[0] * most[1]:
        raise UserError(
            f"{width}x{height} px is larger than {most[0]}x{most[1]}, the largest that memory was planned for; draw "
            "smaller pictures, or stop the run and resume it with such a prompt"
        )


def reader(job: Job) -> AbstractContextManager[CaptionEncoder]:
    """Return a context manager with the text encoder that reads prompts, in host memory."""
    if job.models.encoder is not None:
        return job.models.encoder.on(job.models.encoder.device)
    encoder: CaptionEncoder = load_caption_encoder(job.run.user_config, job.run.base, torch.device("cpu"))
    return encoder.on(encoder.device)
