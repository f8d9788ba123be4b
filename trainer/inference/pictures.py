"""Draws the pictures that are asked for into a folder, only those that it lacks.

A picture's key is a hash of everything its pixels depend on, except float rounding: the weights of UNet, autoencoder
and text encoder, prompt, negative prompt, noise and settings. It is stored in the picture's PNG, so that a folder
tells which of its pictures are still the ones asked for: after a kill only those of the last batch are drawn again,
and after a change of weights or settings those that changed.

Several processes share the batches, which are the same ones that a single process draws; so are the pictures.
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
from safelight.trainer.checkpoint.files import CheckpointGone, list_checkpoints
from safelight.trainer.distributed.spread import own_batches
from safelight.trainer.distributed.together import Others, together
from safelight.trainer.distributed.world import World
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.family import uncropped_sizes
from safelight.trainer.inference.gallery import Drawn, read_key
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, NotFinitePicture, Settings, check_size, generate
from safelight.trainer.models.base import latent_factor, vae_config
from safelight.trainer.models.device import PRECISIONS
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.latent_codec import LatentCodec
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
NO_BYTES = torch.zeros(0, dtype=torch.uint8)
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
    missing = run.world.from_main([name for name, key in keys.items() if read_key(folder / name) != key])
    if unknown := set(missing) - keys.keys():
        raise UserError(
            f"processes are to draw different pictures, such as {min(unknown)}, into {folder}; all machines must read "
            "the same run folder, and no training may go on in it"
        )
    num_there = len(requests) - len(missing)
    if num_there and missing and say is not None:
        say(f"{counted(num_there, 'picture')} of {len(requests):,} are there already")
    folder.mkdir(parents=True, exist_ok=True)
    with together(run.world, CheckpointGone) as others:
        report = followed(others, progress)
        for number, image in draw_pictures(run, [requests[name] for name in missing], progress=report, say=say):
            name = missing[number]
            save_picture(run, image, folder / name, requests[name], keys[name])
    return missing


def followed(others: Others, progress: Progress | None) -> Progress:
    """Return a callback for a process's own denoising steps, which tells those of all processes."""

    def report(done: int, total: int) -> None:
        others.check()
        whole = others.whole(done)
        if progress is not None:
            progress(whole, total)

    return report


def gathered(world: World, requests: Sequence[Request], images: Mapping[int, Image.Image]) -> dict[int, Image.Image]:
    """Return the images of all processes by their number in `requests`, in all processes. images: this one's."""
    if world.size == 1:
        return dict(images)
    numbers = world.gather(list(images))
    content = b"".join(image.tobytes() for image in images.values())
    parts = world.gather_rows(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else NO_BYTES)
    found: dict[int, Image.Image] = {}
    for own, part in zip(numbers, parts, strict=True):
        pixels, start = part.numpy(), 0
        for number in own:
            width, height = requests[number].settings.width, requests[number].settings.height
            end = start + 3 * width * height
            found[number] = Image.fromarray(pixels[start:end].reshape(height, width, 3))
            start = end
    return found


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

    Of several processes, each draws its share of the batches, inside `together`. Each UNet is loaded once, in the order
    in which the requests first name it, and each prompt is encoded once.
    Arguments and errors are those of `draw_missing`.
    """
    factor = latent_factor(vae_config(run.base, run.config.model.vae))
    for settings in dict.fromkeys(request.settings for request in requests):
        check_size(settings, factor)
    if not requests:
        return
    texts = _encoded(run, requests)
    batches = _batches_by_weights(run, requests, texts)
    own = [batch for _, batch in own_batches(run.world, batches)]
    counter = _Counter(requests, [requests[number] for batch in own for number in batch], progress, say)
    for weights in dict.fromkeys(requests[batch[0]].weights for batch in own):
        of_unet = [batch for batch in own if requests[batch[0]].weights == weights]
        # in a function, so that a UNet is freed before the next one is loaded
        yield from _draw_with(run, run.unet(*astuple(weights)), requests, of_unet, texts, counter, say)


def _batches_by_weights(run: OpenRun, requests: Sequence[Request], texts: Texts) -> list[list[int]]:
    """Return the batches that requests are drawn in if memory allows, as numbers of requests, UNet after UNet."""
    batches = []
    for weights in dict.fromkeys(request.weights for request in requests):
        numbers = [number for number, request in enumerate(requests) if request.weights == weights]
        batches += _batches(requests, texts, numbers, lambda settings: run.fit_to_memory(settings)[1])
    return batches


def _draw_with(
    run: OpenRun,
    unet: nn.Module,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    texts: Texts,
    counter: _Counter,
    say: Say | None,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield what `draw_pictures` yields for some batches of the requests, those of one UNet."""
    # of pictures alike, from the first batch that did not fit on
    smaller: dict[tuple, int] = {}
    # where pictures alike are decoded: asked before a graph holds memory
    decoded_on: dict[tuple, torch.device] = {}
    graphs = run.graphs(unet)
    for whole_batch in batches:
        alike = _batched_with(requests[whole_batch[0]], texts.num_chunks[whole_batch[0]])
        waiting = list(whole_batch)
        while waiting:
            if alike not in decoded_on:
                if graphs is not None:
                    graphs.release()
                decoded_on[alike], _ = run.fit_to_memory(requests[waiting[0]].settings)
                if decoded_on[alike] != run.device and say is not None:
                    say("the GPU has too little free memory to decode images: the CPU decodes them, which takes longer")
            batch_size = min(smaller.get(alike, len(waiting)), len(waiting))
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
                        decode_on=decoded_on[alike],
                        progress=counter.of_batch(batch_size),
                        graphs=graphs,
                    )
            except torch.OutOfMemoryError:
                # handled below: here the exception still holds the tensors of the batch
                pass
            if images is None:
                if graphs is not None:
                    graphs.release()
                smaller[alike] = _smaller(batch[0].settings, batch_size, say)
                continue
            counter.end_batch(batch)
            yield from zip(waiting[:batch_size], images, strict=True)
            waiting = waiting[batch_size:]


def _batches(
    requests: Sequence[Request], texts: Texts, numbers: Sequence[int], batch_size: Callable[[Settings], int]
) -> list[list[int]]:
    """Return numbers of requests in batches of pictures that are drawn alike. batch_size: of such pictures, at most."""
    groups: dict[tuple, list[int]] = {}
    for number in numbers:
        groups.setdefault(_batched_with(requests[number], texts.num_chunks[number]), []).append(number)
    batches = []
    for group in groups.values():
        size = batch_size(requests[group[0]].settings)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


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
    """Counts the denoising steps of pictures. A batch that is drawn again in parts counts once.

    requests: all pictures, whose steps are the total. own: those that this process draws. say: called after the first
    batch with how long the others will take, if that is long.
    """

    def __init__(self, requests: Sequence[Request], own: Sequence[Request], progress: Progress | None, say: Say | None):
        self.total, self._cost = sum(request.settings.steps for request in requests), _cost(own)
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
    world: World = World(),  # noqa: B008  it is frozen
) -> list[Image.Image]:
    """Return an RGB image for each request, drawn by a UNet that is in memory, whatever weights the requests name.

    Other arguments and errors are those of `generate`; NotFinitePicture has the number of the request. progress: called
    with (done, total) denoising steps of all pictures. world: whose processes share the batches; all have all images.
    """
    batches = _batches(requests, texts, range(len(requests)), lambda settings: batch_size)
    images: dict[int, Image.Image] = {}
    total, done = sum(request.settings.steps for request in requests), 0
    # (place of the batch, number of the request) of the first picture that is not finite
    broken: list[int] = []
    with together(world) as others:
        follow = followed(others, progress)
        for place, numbers in own_batches(world, batches):
            batch = [requests[number] for number in numbers]

            def report(steps: int, _: int, before: int = done, num: int = len(numbers)) -> None:
                follow(before + steps * num, total)

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
                broken = [place, own]
                break
            done += sum(request.settings.steps for request in batch)
            images |= dict(zip(numbers, drawn, strict=True))
    if found := [one for one in world.gather(broken) if one]:
        # the one that a single process meets first
        raise NotFinitePicture(min(found)[1])
    images = gathered(world, requests, images)
    return [images[number] for number in range(len(requests))]
