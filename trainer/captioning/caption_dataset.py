"""`safelight caption`: describe a dataset's photos and write the captions into its manifest."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from safelight.data.images import RejectedImage, decode_file
from safelight.data.lock import FolderLock
from safelight.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from safelight.data.photo import Photo
from safelight.data.sources.caption import FILE_NAME, is_camera_name
from safelight.errors import UserError
from safelight.text import collapse, counted
from safelight.trainer.captioning.journal import FOLDER_NAME, Journal
from safelight.trainer.captioning.models import Captioner, Described, open_captioner
from safelight.trainer.captioning.options import Generation, Wording, canonical
from safelight.untrusted import check_kinds, parse_json, path_in

# captioners look at 224 to 980 px a side
MAX_MEGAPIXELS = 1.0
BATCH_SIZES = {"cpu": 4, "cuda": 32}
_T = TypeVar("_T")
ADVICE = "wait until it ends, or caption a copy"

# of a file name that somebody wrote as a caption: `red barn`, but not `portrait0`
MIN_NAME_WORDS = 2


@dataclass
class CaptionSummary:
    """What one call did. photos: the manifest after it.

    made, known: photos whose text was generated in this call, or in an earlier one with the same settings. unchanged:
    that had this very caption already. human: that a person has captioned. left: not reached before a stop. unread:
    (file, reason) of photos that cannot be decoded, or of which nothing was said; they keep their captions. said,
    captions: what was generated for the photos of this captioner, and what was made of it.
    """

    photos: list[Photo] = field(default_factory=list)
    made: int = 0
    known: int = 0
    unchanged: int = 0
    human: int = 0
    left: int = 0
    unread: list[tuple[str, str]] = field(default_factory=list)
    said: list[Described] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    photos_per_s: float = 0.0
    batch_size: int = 0

    @property
    def mean_tokens(self) -> float:
        return sum(said.num_tokens for said in self.said) / len(self.said) if self.said else 0.0

    @property
    def num_shared(self) -> int:
        """The number of photos whose caption another photo has too."""
        return sum(num for num in Counter(self.captions).values() if num > 1)

    @property
    def num_repetitive(self) -> int:
        """The number of captions that say three words a second time."""
        return sum(repetition(said.text) > 0 for said in self.said)


def repetition(text: str) -> float:
    """Return the fraction of a text's runs of three words that are there more than once; 0 for none."""
    found = [word.strip(".,;:!?").lower() for word in text.split()]
    runs = [tuple(found[start : start + 3]) for start in range(len(found) - 2)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_human(photo: Photo) -> bool:
    """Return whether a person wrote a photo's captions: also as its file's name, if that has two words or more."""
    if photo.captioner or not any(photo.captions):
        return False
    if photo.caption_source != FILE_NAME:
        return True
    return all(not is_camera_name(c) and sum(map(str.isalpha, c.split())) >= MIN_NAME_WORDS for c in photo.captions)


def identity(captioner: str) -> dict:
    """Return what decides a caption, of `Photo.captioner`: all but the model's name. {} if nothing of ours wrote it."""
    try:
        record = parse_json(captioner)
    except UserError:
        return {}
    return {name: value for name, value in record.items() if name != "model"} if isinstance(record, dict) else {}


class HalvedBatches:
    """Runs a model on photos in batches, halved for good when the GPU's memory is full.

    say: called with a note then. advice: what to do if a single photo is too much.
    """

    def __init__(self, device: torch.device, batch_size: int | None, say: Callable[[str], None], advice: str):
        self.say, self.advice = say, advice
        self.batch_size = batch_size or BATCH_SIZES.get(device.type, BATCH_SIZES["cpu"])

    def run(self, num: int, call: Callable[[slice], list[_T]]) -> list[_T]:
        """Return what `call` returns for `num` photos, called with slices of at most batch_size."""
        done: list[_T] = []
        while len(done) < num:
            part = slice(len(done), min(num, len(done) + self.batch_size))
            try:
                done += call(part)
                continue
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise UserError(f"the GPU's memory is full with a single photo; {self.advice}") from None
            # outside of the handler, whose traceback holds the batch's tensors
            self.batch_size = max(1, min(self.batch_size, part.stop - part.start) // 2)
            self.say(f"the GPU's memory is full; going on with batches of {self.batch_size}")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return done


class BatchedCaptioner(HalvedBatches):
    """Describes photos in batches."""

    def __init__(self, captioner: Captioner, batch_size: int | None, say: Callable[[str], None]):
        advice = "lower --num-beams and --max-new-tokens, choose a smaller model, or add --device cpu"
        super().__init__(captioner.device, batch_size, say, advice)
        self.captioner = captioner

    def describe(self, images: Sequence[Image.Image], generation: Generation, ids: Sequence[int]) -> list[Described]:
        """Return what is said of pictures."""
        return self.run(len(images), lambda part: self.captioner.describe(images[part], generation, ids[part]))


def _decoded(dataset: Path, photo: Photo) -> Image.Image | str:
    """Return a stored photo, or why it cannot be decoded."""
    try:
        return decode_file(path_in(dataset, photo.file), MAX_MEGAPIXELS)[1].image
    except (RejectedImage, UserError) as error:
        return str(error)


def decoded_batches(
    dataset: Path, photos: Sequence[Photo], batched: HalvedBatches
) -> Iterator[list[tuple[Photo, Image.Image | str]]]:
    """Yield photos with their pictures, or why they cannot be decoded, in batches of the model's size.

    Threads decode the next batch meanwhile.
    """
    pending: deque = deque()
    rest = iter(photos)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            while True:
                num_wanted = 2 * batched.batch_size - len(pending)
                for photo in [photo for _, photo in zip(range(num_wanted), rest, strict=False)]:
                    pending.append((photo, threads.submit(_decoded, dataset, photo)))
                if not pending:
                    return
                yield [
                    (photo, picture.result())
                    for photo, picture in (pending.popleft() for _ in range(min(batched.batch_size, len(pending))))
                ]
        finally:
            threads.shutdown(cancel_futures=True)


def describe_batch(
    batch: Sequence[tuple[Photo, Image.Image | str]],
    batched: BatchedCaptioner,
    journal: Journal,
    generation: Generation,
) -> list[tuple[str, str]]:
    """Describe photos, add what was said to the journal, and return (file, reason) of those that cannot be decoded."""
    seen = [(photo, picture) for photo, picture in batch if not isinstance(picture, str)]
    if seen:
        photos, pictures = zip(*seen, strict=True)
        journal.add(photos, batched.describe(pictures, generation, [photo.sample_id for photo in photos]))
    return [(photo.file, picture) for photo, picture in batch if isinstance(picture, str)]


def caption_dataset(
    dataset: Path,
    model: str,
    generation: Generation,
    wording: Wording,
    device: torch.device,
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    say: Callable[[str], None] = lambda text: None,
    stop_requested: Callable[[], bool] = lambda: False,
    guard: AbstractContextManager | None = None,
) -> CaptionSummary:
    """Caption the photos of a dataset that nobody has captioned, and return what was done.

    overwrite: those with captions by people too. batch_size: None for the device's usual one. A caption that this model
    made with these settings is kept; a text that it generated in an earlier, interrupted call is taken from the
    journal. The manifest is replaced once, at the end or after a stop. guard: entered while photos are described, once
    the model is loaded; it handles the signals that request a stop.
    Raises UserError if the dataset or the model cannot be used.
    """
    dataset = Path(dataset)
    read_manifest(dataset)
    with FolderLock(dataset, "check its permissions", ADVICE) as lock:
        if lock.note:
            say(lock.note)
        check_kinds(dataset, (FOLDER_NAME,), (MANIFEST_NAME,), "a dataset")
        photos = read_manifest(dataset)
        wanted = [photo for photo in photos if overwrite or not is_human(photo)]
        summary = CaptionSummary(photos=photos, human=len(photos) - len(wanted))
        if not wanted:
            return summary
        with open_captioner(model) as source:
            record = {"weights": source.fingerprint[:16], **generation.record()}
            journal = Journal(dataset, record, photos)
            todo = [photo for photo in wanted if photo.sha256 not in journal.said]
            if todo:
                batched = BatchedCaptioner(source.build(device, generation), batch_size, say)
                with guard or nullcontext():
                    _describe_all(dataset, batched, journal, generation, todo, summary, progress, stop_requested)
        written = canonical({"model": model, **record, **wording.record()})
        made = {photo.sha256 for photo in todo}
        target = identity(written)
        label = collapse(f"captioner {os.path.basename(model.rstrip('/')) or model}")
        for index, photo in enumerate(photos):
            if (not overwrite and is_human(photo)) or (said := journal.said.get(photo.sha256)) is None:
                continue
            if not said.text:
                summary.unread.append((photo.file, "the model said nothing"))
                continue
            caption = wording.apply(said.text)
            is_same = identity(photo.captioner) == target
            if is_same and photo.captions == (caption,):
                summary.unchanged += 1
            elif is_same and photo.sha256 not in made and not overwrite:
                # somebody has corrected in the manifest what this captioner wrote
                summary.human += 1
                continue
            else:
                summary.made += photo.sha256 in made
                summary.known += photo.sha256 not in made
                photos[index] = replace(photo, captions=(caption,), caption_source=label, captioner=written)
            summary.said.append(said)
            summary.captions.append(caption)
        if summary.made or summary.known:
            write_manifest(dataset, photos)
        return summary


def _describe_all(
    dataset: Path,
    batched: BatchedCaptioner,
    journal: Journal,
    generation: Generation,
    todo: list[Photo],
    summary: CaptionSummary,
    progress: Callable[[int, int, str], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Generate what is missing in the journal, batch by batch, until a stop is requested."""
    num_done, num_said, began = 0, 0, time.monotonic()
    progress(0, len(todo), "")
    for batch in decoded_batches(dataset, todo, batched):
        unread = describe_batch(batch, batched, journal, generation)
        summary.unread += unread
        num_done, num_said = num_done + len(batch), num_said + len(batch) - len(unread)
        summary.photos_per_s = num_said / (time.monotonic() - began)
        progress(num_done, len(todo), f"{summary.photos_per_s:.3g} captions/s")
        if stop_requested():
            break
    summary.left, summary.batch_size = len(todo) - num_done, batched.batch_size


def counts(summary: CaptionSummary) -> str:
    """Return in one line what a call did; the numbers add up to the dataset's photos."""
    parts = {
        "captioned": summary.made + summary.known,
        "had this caption already": summary.unchanged,
        "with a person's caption": summary.human,
        "unreadable": len(summary.unread),
        "not reached": summary.left,
    }
    shown = ", ".join(f"{num:,} {what}" for what, num in parts.items() if num)
    return f"{counted(len(summary.photos), 'photograph')}: {shown}"
