"""Draws the pictures that are asked for into a folder, only those that it lacks.

A picture's key is a hash of everything its pixels depend on, except float rounding: the weights of UNet, autoencoder
and text encoder, prompt, negative prompt, noise and settings. It is stored in the picture's PNG, so that a folder
tells which of its pictures are still the ones asked for: after a kill only those of the last batch are drawn again,
and after a change of weights or settings those that changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.family import uncropped_sizes
from safelight.trainer.inference.gallery import Drawn, read_key
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, NotFinitePicture, Settings, check_size, generate
from safelight.trainer.models.base import latent_factor, vae_config
from safelight.trainer.models.device import PRECISIONS
from safelight.trainer.models.encoders import CaptionEncoder, LatentCodec
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.report.facts import format_duration
from safelight.untrusted import check_kinds

if TYPE_CHECKING:
    from safelight.trainer.inference.draw import OpenRun

Progress = Callable[[int, int], None]
Say = Callable[[str], None]
# part of every key; raise it when a change makes the same request give other pictures
DRAWING_VERSION = 2
# prompts that are encoded at a time
ENCODE_BATCH = 64
# a time to wait that is worth telling
MIN_TOLD_S = 20.0


@dataclass(frozen=True)
class Weights:
    """The UNet that draws. step: of the checkpoint, None for the base.

    averaged: with the checkpoint's moving average if it has one, as samples, exports and reports use it. lora_scale:
    what the adapter of a run that trains a LoRA is multiplied by.
    """

    step: int | None = None
    averaged: bool = True
    lora_scale: float = 1.0


@dataclass(frozen=True)
class Request:
    """A picture to draw. place: with settings.seed, it keys the noise. clip_skip: as model.clip_skip."""

    weights: Weights
    prompt: str
    place: int
    settings: Settings
    negative: str = ""
    clip_skip: int = 0


def keys_of(run: OpenRun, requests: Sequence[Request]) -> list[str]:
    """Return the key of each requested picture, 64 hex digits.

    Raises UserError for a checkpoint whose record is damaged.
    """
    weights = {one: run.weights_hash(one) for one in dict.fromkeys(request.weights for request in requests)}
    common = {
        "version": DRAWING_VERSION,
        "precision": PRECISIONS[run.dtype],
        "vae": run.codec.fingerprint,
        "text": run.encoder.knowing(()).reading(weights=True, num_chunks=1).fingerprint,
        "prediction": run.schedule.prediction_type,
        "schedule": hashlib.sha256(run.schedule.alphas_cumprod_T.numpy().tobytes()).hexdigest(),
    }
    return [
        hash_of(
            {
                **common,
                **asdict(request),
                "weights": weights[request.weights],
                **_embeddings(run.named_embeddings(request.weights.step, request.prompt, request.negative)),
            }
        )
        for request in requests
    ]


def sample_key(request: Request, embeddings: Mapping[str, str]) -> str:
    """Return the key of a picture that training samples, whose weights have no hash yet.

    embeddings: name -> hash of those that its prompts name, without one that the run trains. Two pictures of one run
    with the same weights are equal if their sample keys are.
    """
    return hash_of({"version": DRAWING_VERSION, **asdict(request), "weights": None, **_embeddings(embeddings)})


def _embeddings(named: Mapping[str, str]) -> dict:
    """Return the part of a key about embeddings: nothing for a picture without any."""
    return {"embeddings": dict(named)} if named else {}


def hash_of(values: dict) -> str:
    """Return the SHA-256 of values that JSON can hold, 64 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def draw_missing(
    run: OpenRun,
    requests: Mapping[str, Request],
    folder: Path,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
) -> list[str]:
    """Draw the pictures that a folder lacks and return their file names. requests: the picture of each file name.

    A file with another key than its request's is replaced. Every batch is saved as soon as it is drawn, so that a kill
    loses at most one. progress: called with (done, total) denoising steps of all pictures that are drawn; an exception
    that it raises stops the drawing. say: called with a line about pictures that are there, the time it takes, and
    memory that is short.
    Raises UserError for a size that does not fit the autoencoder, weights that draw no finite picture, a damaged
    checkpoint, or too little GPU memory for a single picture.
    """
    check_kinds(folder, (), requests, "a folder of images")
    keys = dict(zip(requests, keys_of(run, list(requests.values())), strict=True))
    missing = [name for name, key in keys.items() if read_key(folder / name) != key]
    num_there = len(requests) - len(missing)
    if num_there and missing and say is not None:
        say(f"{counted(num_there, 'picture')} of {len(requests):,} are there already")
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in draw_pictures(run, [requests[name] for name in missing], progress=progress, say=say):
        name = missing[number]
        save_picture(run, image, folder / name, requests[name], keys[name])
    return missing


def save_picture(run: OpenRun, image: Image.Image, path: Path, request: Request, key: str) -> None:
    """Write a requested picture with its parameters and its key."""
    run.save(image, path.parent, drawn_of(path.name, request), request.clip_skip, key)


def drawn_of(file: str, request: Request, cut_after: str = "") -> Drawn:
    """Return the record of a requested picture."""
    weights, settings = request.weights, request.settings
    scale = 1.0 if weights.step is None else weights.lora_scale
    return Drawn.of(file, request.prompt, request.negative, weights.step, settings, cut_after, scale)


def draw_pictures(
    run: OpenRun, requests: Sequence[Request], *, progress: Progress | None = None, say: Say | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (number in `requests`, RGB image) for each request, as soon as its batch is drawn.

    Each UNet is loaded once, in the order in which the requests first name it, and each prompt is encoded once.
    Arguments and errors are those of `draw_missing`.
    """
    factor = latent_factor(vae_config(run.base, run.config.model.vae))
    for settings in dict.fromkeys(request.settings for request in requests):
        check_size(settings, factor)
    if not requests:
        return
    texts = _encoded(run, requests)
    counter = _Counter(requests, progress, say)
    for weights in dict.fromkeys(request.weights for request in requests):
        numbers = [number for number, request in enumerate(requests) if request.weights == weights]
        # in a function, so that a UNet is freed before the next one is loaded
        yield from _draw_with(run, run.unet(*astuple(weights)), requests, numbers, texts, counter, say)


def _draw_with(
    run: OpenRun,
    unet: nn.Module,
    requests: Sequence[Request],
    numbers: Sequence[int],
    texts: Texts,
    counter: _Counter,
    say: Say | None,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield what `draw_pictures` yields for some of the requests, those of one UNet."""
    groups: dict[tuple, list[int]] = {}
    for number in numbers:
        groups.setdefault(_batched_with(requests[number], texts.num_chunks[number]), []).append(number)
    for group in groups.values():
        waiting, batch_size = group, 0
        while waiting:
            decode_on, planned = run.fit_to_memory(requests[waiting[0]].settings)
            if decode_on != run.device and not batch_size and say is not None:
                say("the GPU has too little free memory to decode images: the CPU decodes them, which takes longer")
            batch_size = min(batch_size or planned, len(waiting))
            batch = [requests[number] for number in waiting[:batch_size]]
            images = None
            try:
                with _explaining_broken_weights(run, batch):
                    images = generate(
                        unet,
                        run.codec,
                        texts.positive(waiting[:batch_size]),
                        texts.negative(waiting[:batch_size]),
                        run.schedule,
                        batch[0].settings,
                        places=[request.place for request in batch],
                        seeds=[request.settings.seed for request in batch],
                        cfgs=[request.settings.cfg for request in batch],
                        batch_size=batch_size,
                        decode_on=decode_on,
                        progress=counter.of_batch(batch_size),
                    )
            except torch.OutOfMemoryError:
                # handled below: here the exception still holds the tensors of the batch
                pass
            if images is None:
                batch_size = _smaller(batch[0].settings, batch_size, say)
                continue
            counter.end_batch(batch)
            yield from zip(waiting[:batch_size], images, strict=True)
            waiting = waiting[batch_size:]


def _batched_with(request: Request, num_chunks: int) -> tuple:
    """Return what the pictures of a batch have in common: size, sampler, steps, and the form of their texts.

    Also whether they are guided: those that are not need half of the work.
    """
    settings = request.settings
    is_guided = settings.cfg != 1
    return settings.width, settings.height, settings.sampler, settings.spacing, settings.steps, is_guided, num_chunks


def _smaller(settings: Settings, batch_size: int, say: Say | None) -> int:
    """Return half of a batch size that was too large for the GPU. Raises UserError if there is none."""
    torch.cuda.empty_cache()
    if batch_size == 1:
        raise UserError(
            f"the GPU has too little free memory to draw a picture of {settings.width}x{settings.height} px; close "
            "other programs that use it, or draw smaller pictures (sample.width and sample.height)"
        )
    if say is not None:
        say(f"the GPU has too little free memory for {batch_size} pictures at a time: drawing {batch_size // 2}")
    return batch_size // 2


@contextlib.contextmanager
def _explaining_broken_weights(run: OpenRun, batch: Sequence[Request]) -> Iterator[None]:
    """Raise UserError, naming the checkpoint, if it draws values that are not finite."""
    try:
        yield
    except NotFinitePicture as error:
        step = batch[0].weights.step
        prompt = next(request.prompt for request in batch if request.place == error.index)
        others = [other for other in list_checkpoints(run.run_dir) if other != step]
        model = f"the base {run.config.model.base}" if step is None else f"the checkpoint of step {step}"
        use = "another model.base" if step is None else f"--checkpoint {' or '.join(map(str, [*others, 'base']))}"
        raise UserError(
            f"{model} draws no picture of {prompt!r}, but values that are not finite: its weights are broken, or "
            f"exceed the range of {PRECISIONS[run.dtype]}; use {use}"
        ) from None


def _cost(requests: Sequence[Request]) -> int:
    """Return how often a UNet is applied to a picture: twice a step with guidance."""
    return sum(request.settings.steps * (1 if request.settings.cfg == 1 else 2) for request in requests)


class _Counter:
    """Counts the denoising steps of all pictures. A batch that is drawn again in parts counts once.

    say: called after the first batch with how long the others will take, if that is long.
    """

    def __init__(self, requests: Sequence[Request], progress: Progress | None, say: Say | None):
        self.total, self._cost = sum(request.settings.steps for request in requests), _cost(requests)
        self.progress, self.say, self.done, self._began = progress, say, 0, 0.0

    def of_batch(self, num_pictures: int) -> Progress:
        """Return the callback for a batch, which is called with its own denoising steps."""
        self._began = self._began or time.monotonic()

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(self.done + done * num_pictures, self.total)

        return report

    def end_batch(self, batch: Sequence[Request]) -> None:
        is_first = self.done == 0
        self.done += sum(request.settings.steps for request in batch)
        took_s = time.monotonic() - self._began
        left_s = took_s * (self._cost / _cost(batch) - 1)
        if is_first and left_s >= MIN_TOLD_S and self.say is not None:
            first, took, left = counted(len(batch), "picture"), format_duration(took_s), format_duration(left_s)
            self.say(f"{first} took {took}, and the rest will take about {left}")


class Texts:
    """The conditioning of pictures that are drawn, from the embeddings of their texts.

    num_chunks: of each request, how many chunks its prompt and negative prompt are encoded as. row: returns the
    embedding of one of a request's texts. condition: as of a family, with the UNet's config.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        num_chunks: Sequence[int],
        condition: Callable[[Tensor, Tensor], TextConditioning],
        row: Callable[[int, str], Tensor],
    ):
        self._requests, self.num_chunks, self._condition, self._row = requests, num_chunks, condition, row

    def positive(self, numbers: Sequence[int]) -> TextConditioning:
        """Return the conditioning of some requests' prompts, a row each."""
        return self._conditioning(numbers, [self._row(n, self._requests[n].prompt) for n in numbers])

    def negative(self, numbers: Sequence[int]) -> TextConditioning:
        """Return the conditioning of some requests' negative prompts, a row each."""
        return self._conditioning(numbers, [self._row(n, self._requests[n].negative) for n in numbers])

    def _conditioning(self, numbers: Sequence[int], rows: Sequence[Tensor]) -> TextConditioning:
        settings = [self._requests[number].settings for number in numbers]
        sizes = torch.cat([uncropped_sizes(1, one.height, one.width) for one in settings])
        return self._condition(torch.stack(list(rows)), sizes)


def chunks_of(encoder: CaptionEncoder, requests: Sequence[Request]) -> list[int]:
    """Return in how many chunks the prompt and the negative prompt of each request are encoded."""
    num_chunks = [0] * len(requests)
    for negative in dict.fromkeys(request.negative for request in requests):
        own = [number for number, request in enumerate(requests) if request.negative == negative]
        for chunks, places in encoder.group_prompts([requests[n].prompt for n in own], negative).items():
            for place in places:
                num_chunks[own[place]] = chunks
    return num_chunks


def _encoded(run: OpenRun, requests: Sequence[Request]) -> Texts:
    """Return the texts of all requests, each encoded once."""
    rows: dict[tuple[str, tuple, int], Tensor] = {}
    readers = [(run.text_step(request.weights.step), request.clip_skip) for request in requests]
    num_chunks = chunks_of(run.encoder, requests)
    texts: dict[tuple, dict[int, dict[str, None]]] = {}
    for request, reader, chunks in zip(requests, readers, num_chunks, strict=True):
        named = texts.setdefault(reader, {}).setdefault(chunks, {})
        named.update({request.prompt: None, request.negative: None})
    for reader, by_chunks in texts.items():
        # one at a time: each checkpoint of a run that trains the text encoder has its own
        with run.encoder_of(*reader).on(run.device) as encoder:
            for chunks, named in by_chunks.items():
                in_chunks = encoder.reading(weights=True, num_chunks=chunks)
                for text, row in encode_all(in_chunks, list(named)).items():
                    rows[text, reader, chunks] = row
    condition = functools.partial(run.base.family.conditioning, run.base.config_of("unet"))
    return Texts(requests, num_chunks, condition, lambda n, text: rows[text, readers[n], num_chunks[n]])


def encode_all(encoder: CaptionEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return the embedding of each text, encoded a few at a time."""
    rows: dict[str, Tensor] = {}
    for start in range(0, len(texts), ENCODE_BATCH):
        part = texts[start : start + ENCODE_BATCH]
        rows |= dict(zip(part, encoder.encode(part), strict=True))
    return rows


def draw_held(
    unet: nn.Module,
    codec: LatentCodec,
    requests: Sequence[Request],
    texts: Texts,
    schedule: NoiseSchedule,
    *,
    batch_size: int = SAMPLE_BATCH_SIZE,
    decode_on: torch.device | None = None,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Return an RGB image for each request, drawn by a UNet that is in memory, whatever weights the requests name.

    Other arguments and errors are those of `generate`; NotFinitePicture has the number of the request. progress: called
    with (done, total) denoising steps of all pictures.
    """
    groups: dict[tuple, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(_batched_with(request, texts.num_chunks[number]), []).append(number)
    images: dict[int, Image.Image] = {}
    total, done = sum(request.settings.steps for request in requests), 0
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            numbers = group[start : start + batch_size]
            batch = [requests[number] for number in numbers]

            def report(steps: int, _: int, before: int = done, num: int = len(numbers)) -> None:
                if progress is not None:
                    progress(before + steps * num, total)

            try:
                drawn = generate(
                    unet,
                    codec,
                    texts.positive(numbers),
                    texts.negative(numbers),
                    schedule,
                    batch[0].settings,
                    places=[request.place for request in batch],
                    seeds=[request.settings.seed for request in batch],
                    cfgs=[request.settings.cfg for request in batch],
                    batch_size=len(batch),
                    decode_on=decode_on,
                    progress=report,
                )
            except NotFinitePicture as error:
                own = next(n for n, request in zip(numbers, batch, strict=True) if request.place == error.index)
                raise NotFinitePicture(own) from None
            done += sum(request.settings.steps for request in batch)
            images |= dict(zip(numbers, drawn, strict=True))
    return [images[number] for number in range(len(requests))]
