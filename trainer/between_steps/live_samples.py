"""Draws what `safelight sample RUN --live` asks of a run that is going on, between two of its steps.

The weights are only read, and no draw has a state, so a run that was asked ends with the bits of one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.between_steps.samples import at, check_planned_size, draw, parameters_of, reader
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.config.schema import MAX_CHUNKS
from safelight.trainer.distributed.together import Stopped, together
from safelight.trainer.inference.draw import next_number
from safelight.trainer.inference.gallery import (
    Drawn,
    check_folder,
    file_name,
    read_drawn,
    save_png,
    write_drawn,
    write_page,
)
from safelight.trainer.inference.live_request import MAX_PICTURES, LiveInbox, LiveRequest, changed, parse_request
from safelight.trainer.inference.pictures import Request, Texts, chunks_of, drawn_of, encode_all, sample_key
from safelight.trainer.inference.prompt_file import SamplePrompt, pictures_of
from safelight.trainer.inference.sampling import check_spacing
from safelight.trainer.loading.job import Job
from safelight.untrusted import check_kinds

FOLDER = "live"


def answer_live(job: Job, inbox: LiveInbox, position: Position) -> None:
    """Draw and answer the requests that wait. One that fails is answered with the reason, and training goes on.

    Every process calls it after a step, and all draw; the main one reads the requests, writes the pictures and answers.
    """
    waiting = inbox.take() if job.world.is_main else []
    if not job.vote(bool(waiting)):
        return
    requests = job.world.from_main([_told(*one) for one in waiting])
    with job.models.shown(averages=position.step > 0):
        _draw_all(job, inbox, requests, position)


def _draw_all(job: Job, inbox: LiveInbox, requests: Sequence[Sequence], position: Position) -> None:
    """Draw and answer requests, as `_told` gives them."""
    for number, content, error in requests:
        try:
            if error is not None:
                raise UserError(*error.splitlines())
            request = parse_request(number, content.encode("latin-1"))
            with job.progress.clock_paused():
                drawn = _draw(job, request, position)
        except (UserError, OSError) as failure:
            reason = str(failure)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            reason = "the GPU has too little free memory for this beside training; ask for fewer or smaller pictures"
        except Stopped:
            job.stop_all()
            reason = "the run was asked to stop"
        else:
            _answer(job, inbox, number, {"files": drawn, "step": position.step})
            line = f"step {position.step}: drew {counted(len(drawn), 'picture')} on request, in samples/{FOLDER}"
            job.progress.terminal.say(line)
            job.progress.metrics.write("event", position.step, event="drew on request", detail=line)
            continue
        _answer(job, inbox, number, {"error": reason})
        job.progress.terminal.say(f"note: drew nothing on request: {reason}")


def _told(number: str, content: bytes | UserError) -> list[str | None]:
    if isinstance(content, UserError):
        return [number, None, str(content)]
    # any bytes, which are checked by all as a file's
    return [number, content.decode("latin-1"), None]


def _answer(job: Job, inbox: LiveInbox, number: str, values: dict) -> None:
    if job.world.is_main:
        inbox.answer(number, values)


def _draw(job: Job, request: LiveRequest, position: Position) -> list[str]:
    """Draw a request's pictures into RUN/samples/live and return their names."""
    config = changed(job.timeline.stages[position.stage].config, request.changes)
    check_spacing(config.sample.spacing, job.run.schedule.zero_terminal_snr)
    prompts = [SamplePrompt(prompt=text) for text in request.prompts] or job.dataset.prompts
    captions = job.dataset.sample_captions(job.run.user_config)
    pictures = pictures_of(config, prompts, captions, job.dataset.latent_factor)
    if not pictures:
        raise UserError('there is no prompt to draw; give --prompt "..."')
    if len(pictures) > MAX_PICTURES:
        raise UserError(f"{len(pictures)} pictures are more than {MAX_PICTURES} at a time; give fewer prompts")
    for picture in pictures:
        check_planned_size(job, picture.request.settings.width, picture.request.settings.height)
    requests = [at(picture.request, position) for picture in pictures]
    folder = job.run.run_dir / "samples" / FOLDER
    with together(job.world):
        if job.world.is_main:
            check_kinds(folder.parent, (FOLDER,), (), "the run", follow_links=False)
            folder.mkdir(parents=True, exist_ok=True)
            check_folder(folder)

    def report(done: int, total: int) -> None:
        job.progress.show(position, f"drawing on request {done}/{total}")
        if job.stop_here():
            raise Stopped

    with reader(job) as own:
        encoder = own.knowing((*own.embeddings, *job.dataset.embeddings))
        num_chunks, rows = chunks_of(encoder, requests), {}
        for chunks in dict.fromkeys(num_chunks):
            own = [one for one, its in zip(requests, num_chunks, strict=True) if its == chunks]
            texts = list(dict.fromkeys(text for one in own for text in (one.prompt, one.negative)))
            found = encode_all(encoder.reading(weights=True, num_chunks=chunks), texts)
            rows |= {(text, chunks): row for text, row in found.items()}
        all_texts = [text for one in requests for text in (one.prompt, one.negative)]
        cuts = encoder.reading(weights=True, num_chunks=MAX_CHUNKS).cuts(all_texts)
    texts_of = Texts(requests, num_chunks, job.dataset.condition, lambda n, text: rows[text, num_chunks[n]])
    images = draw(job, position, requests, texts_of, report)
    if images is None:
        raise UserError("what the UNet draws is not finite: its weights are broken")
    names: list[str] = []
    with together(job.world):
        if job.world.is_main:
            names = [drawn.file for drawn in _write(job, config.run.seed, position, requests, images, cuts)]
    return job.world.from_main(names)


def _write(
    job: Job,
    seed: int,
    position: Position,
    requests: Sequence[Request],
    images: Sequence[Image.Image],
    cuts: Mapping[str, str],
) -> list[Drawn]:
    """Write pictures into RUN/samples/live and return their records."""
    folder = job.run.run_dir / "samples" / FOLDER
    stem = f"step{position.step}-seed{seed}"
    first, drawn = next_number(folder, stem, len(requests)), []
    earlier = read_drawn(folder)
    for number, (one, image) in enumerate(zip(requests, images, strict=True), first):
        record = drawn_of(file_name(stem, number, one.prompt), one, cuts.get(one.prompt, ""))
        embeddings = job.dataset.file_embeddings(one.prompt, one.negative)
        save_png(image, folder / record.file, parameters_of(job, record), sample_key(one, embeddings))
        drawn.append(record)
    write_drawn(folder, [*earlier, *drawn])
    write_page(folder, f"{job.run.run_dir.resolve().name}: drawn on request", [*earlier, *drawn])
    return drawn
