"""`safelight caption --tags`: write weighted tags of a dataset's photos into its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from safelight.data.lock import FolderLock
from safelight.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from safelight.data.photo import Photo
from safelight.trainer.captioning.caption_dataset import ADVICE, HalvedBatches, decoded_batches, identity
from safelight.trainer.captioning.journal import Journal
from safelight.trainer.captioning.options import canonical, key_of
from safelight.trainer.tagging.categories import Categories
from safelight.trainer.tagging.taggers import FOLDER_NAME, TaggerSource
from safelight.untrusted import check_kinds


class TagCount(NamedTuple):
    """How many photos have a tag, and its mean weight there."""

    name: str
    num: int
    weight: float


@dataclass
class TagSummary:
    """What one call did. photos: the manifest after it.

    made, known: photos that were looked at in this call, or in an earlier one, and whose tags were written now; empty:
    how many of them nothing was seen in. unchanged: that this model had tagged so before. human: that a person has
    tagged. left: not reached before a stop. unread: (file, reason) of photos that cannot be decoded; they keep their
    tags.
    """

    photos: list[Photo] = field(default_factory=list)
    made: int = 0
    known: int = 0
    empty: int = 0
    unchanged: int = 0
    human: int = 0
    left: int = 0
    unread: list[tuple[str, str]] = field(default_factory=list)
    photos_per_s: float = 0.0

    @property
    def num_tagged(self) -> int:
        """The number of photos with tags of a tagger's."""
        return sum(bool(photo.tagger and photo.tags) for photo in self.photos)

    def commonest(self) -> list[TagCount]:
        """Return the tags of taggers, the commonest first."""
        weights: dict[str, list[float]] = {}
        for photo in self.photos:
            for tag in photo.tags if photo.tagger else ():
                weights.setdefault(tag.name, []).append(tag.weight)
        found = [TagCount(name, len(values), sum(values) / len(values)) for name, values in weights.items()]
        return sorted(found, key=lambda count: (-count.num, count.name))


def has_human_tags(photo: Photo) -> bool:
    """Return whether a person gave a photo its tags."""
    return bool(photo.tags) and not photo.tagger


def tag_dataset(
    dataset: Path,
    opened: AbstractContextManager[TaggerSource],
    categories: Categories,
    min_confidence: float,
    device: torch.device,
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    say: Callable[[str], None] = lambda text: None,
    stop_requested: Callable[[], bool] = lambda: False,
    guard: AbstractContextManager | None = None,
) -> TagSummary:
    """Tag the photos of a dataset that nobody has tagged, and return what was done.

    opened: the model. min_confidence: of what becomes a tag. overwrite: tags of people too. Photos that this model
    tagged with these categories and this confidence are left alone; what it saw in an earlier call, also with others,
    is taken from the journal. The manifest is replaced once, at the end or after a stop. Other arguments as for
    `caption_dataset`. Raises UserError if the dataset or the model cannot be used.
    """
    dataset = Path(dataset)
    read_manifest(dataset)
    with FolderLock(dataset, "check its permissions", ADVICE) as lock:
        if lock.note:
            say(lock.note)
        check_kinds(dataset, (FOLDER_NAME,), (MANIFEST_NAME,), "a dataset")
        photos = read_manifest(dataset)
        wanted = [photo for photo in photos if overwrite or not has_human_tags(photo)]
        summary = TagSummary(photos=photos, human=len(photos) - len(wanted))
        if not wanted:
            return summary
        with opened as source:
            settings = {"categories": key_of(categories.record()), "min_confidence": min_confidence}
            written = canonical({"model": source.model, **source.record, **settings})
            changed = [photo for photo in wanted if identity(photo.tagger) != identity(written)]
            summary.unchanged = len(wanted) - len(changed)
            if not changed:
                return summary
            journal = Journal(dataset, source.record, photos, source.form)
            todo = [photo for photo in changed if photo.sha256 not in journal.said]
            tagger = source.build(device)
            advice = "choose a smaller model, or add --device cpu"
            batched = HalvedBatches(tagger.device, batch_size, say, advice)
            with guard or nullcontext():
                _look_at_all(dataset, tagger.look, batched, journal, todo, summary, progress, stop_requested)
            made, is_changed = {photo.sha256 for photo in todo}, {photo.sha256 for photo in changed}
            for index, photo in enumerate(photos):
                if photo.sha256 not in is_changed or photo.sha256 not in journal.said:
                    continue
                tags = tagger.tags(journal.said[photo.sha256], categories, min_confidence)
                photos[index] = replace(photo, tags=tags, tagger=written)
                summary.made += photo.sha256 in made
                summary.known += photo.sha256 not in made
                summary.empty += not tags
        if summary.made or summary.known:
            write_manifest(dataset, photos)
        return summary


def _look_at_all(
    dataset: Path,
    look: Callable,
    batched: HalvedBatches,
    journal: Journal,
    todo: list[Photo],
    summary: TagSummary,
    progress: Callable[[int, int, str], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Look at the photos that are missing in the journal, batch by batch, until a stop is requested."""
    num_done, began = 0, time.monotonic()
    if todo:
        progress(0, len(todo), "")
    for batch in decoded_batches(dataset, todo, batched):
        seen = [(photo, picture) for photo, picture in batch if not isinstance(picture, str)]
        summary.unread += [(photo.file, picture) for photo, picture in batch if isinstance(picture, str)]
        if seen:
            photos, pictures = zip(*seen, strict=True)
            journal.add(photos, batched.run(len(pictures), lambda part, pictures=pictures: look(pictures[part])))
        num_done += len(batch)
        summary.photos_per_s = (num_done - len(summary.unread)) / (time.monotonic() - began)
        progress(num_done, len(todo), f"{summary.photos_per_s:.3g} photographs/s")
        if stop_requested():
            break
    summary.left = len(todo) - num_done
