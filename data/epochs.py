"""Plans an epoch: how often each sample is used, with which crop and caption, and in which batches.

A plan is a pure function of its arguments. Draws are keyed by (sample id, epoch, occurrence), so a sample gets the
same crop and caption whatever the order of the manifest or the step a run was resumed at, and, unless batches are
carried over, whatever the batch size.

Samples of one bucket and one batch id form a group; every batch comes from one group. What does not fill a batch at an
epoch's end is either a shorter batch or, carried over, waits for the group's samples of the next epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from safelight.data.buckets import Bucket
from safelight.data.draws import draw_words_at, to_integers, to_uniforms
from safelight.data.photo import Photo
from safelight.data.samples import Sample
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, sort_key

EMPTY_CAPTION = -1
# a key holds 16 bits of them
MAX_EPOCHS = 1 << 16
# uses counted in one call
COUNTS_AT_ONCE = 1 << 20


class Placed(Protocol):
    """A photo in its bucket: a Sample, or a Placement that has no cache keys yet."""

    photo: Photo
    bucket: Bucket


class Group(NamedTuple):
    """Samples that may share a batch."""

    bucket: Bucket
    batch_id: str


@dataclass(frozen=True)
class SampleRef:
    """One use of a sample within an epoch.

    sample_index: into the list of samples. occurrence: counts the epoch's uses of this sample id.
    variant: into latent_keys. caption: into text_keys, EMPTY_CAPTION for the empty caption.
    """

    sample_id: int
    sample_index: int
    occurrence: int
    variant: int
    caption: int


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the model together."""

    bucket: Bucket
    refs: tuple[SampleRef, ...]


class _Use(NamedTuple):
    """A sample that is due in an epoch. occurrence: counts the sample id's uses due in that epoch."""

    sample_index: int
    epoch: int
    occurrence: int


def group_of(placed: Placed) -> Group:
    """Return the group whose batches a sample may be in."""
    return Group(placed.bucket, placed.photo.settings.batch_id)


def num_uses(samples: Sequence[Placed], seed: int, epochs: Sequence[int]) -> np.ndarray:
    """Return how often each sample is due in each epoch, (epochs, samples) int64.

    That is its photo's `repeats`; a fraction is one more use in the epochs for which the key (seed, REPEAT, sample id,
    epoch) draws it.
    """
    repeats = np.array([sample.photo.settings.repeats for sample in samples], dtype=np.float64)
    counts = np.broadcast_to(np.floor(repeats).astype(np.int64), (len(epochs), len(samples))).copy()
    fractions = repeats % 1.0
    (partial,) = np.nonzero(fractions)
    if len(partial):
        ids = np.array([samples[i].photo.sample_id for i in partial], dtype=np.uint64)
        words = draw_words_at(seed, Purpose.REPEAT, ids, np.array(epochs, dtype=np.uint64)[:, None])
        counts[:, partial] += to_uniforms(words[..., 0]) < fractions[partial]
    return counts


def _due(samples: Sequence[Sample], seed: int, epoch: int) -> list[_Use]:
    """Return the uses that are due in an epoch. A sample id listed again continues its count of occurrences."""
    counts = num_uses(samples, seed, [epoch])[0].tolist()
    seen: Counter[int] = Counter()
    uses = []
    # one photo's buckets in a fixed order, so that the manifest's order does not matter
    for index in sorted(range(len(samples)), key=lambda i: samples[i].bucket):
        sample_id = samples[index].photo.sample_id
        uses += [_Use(index, epoch, seen[sample_id] + number) for number in range(counts[index])]
        seen[sample_id] += counts[index]
    return uses


def _shuffled(samples: Sequence[Sample], uses: Sequence[_Use], seed: int, epoch: int) -> list[_Use]:
    """Return an epoch's uses in the order of its keyed shuffle."""
    words = _draws(samples, uses, seed, Purpose.EPOCH_ORDER, epoch)[:, :2].tolist()
    ids = [samples[use.sample_index].photo.sample_id for use in uses]
    # the sample id breaks a tie of draws, so that the result does not depend on the manifest's order
    order = sorted(range(len(uses)), key=lambda i: (*words[i], ids[i], uses[i].occurrence))
    return [uses[i] for i in order]


def _draws(samples: Sequence[Sample], uses: Sequence[_Use], seed: int, purpose: Purpose, epoch: int) -> np.ndarray:
    """Return each use's random words, (len(uses), 4), keyed by its sample id and occurrence."""
    ids = np.array([samples[use.sample_index].photo.sample_id for use in uses], dtype=np.uint64)
    occurrences = np.array([use.occurrence for use in uses], dtype=np.uint64)
    return draw_words_at(seed, purpose, ids, epoch, occurrences)


def _waiting(samples: Sequence[Sample], seed: int, epoch: int, carried: Mapping[Group, int]) -> list[_Use]:
    """Return the uses that earlier epochs left over, oldest first. carried: how many of each group."""
    left = {group: num for group, num in carried.items() if num}
    waiting: list[_Use] = []
    for before in range(epoch - 1, -1, -1):
        if not left:
            break
        uses = [use for use in _due(samples, seed, before) if group_of(samples[use.sample_index]) in left]
        found = []
        # the newest are left over
        for use in reversed(_shuffled(samples, uses, seed, before)):
            group = group_of(samples[use.sample_index])
            if left.get(group):
                left[group] -= 1
                found.append(use)
        waiting = found[::-1] + waiting
        left = {group: num for group, num in left.items() if num}
    return waiting


def plan_epoch(
    samples: Sequence[Sample],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    caption_dropout: float,
    grouped: bool = False,
    carried: Mapping[Group, int] | None = None,
) -> list[MicroBatch]:
    """Return the epoch's micro-batches in the order they are trained.

    The uses that are due are shuffled, then fill the batches of their groups in that order; what remains of a group is
    a shorter batch; then the batches are shuffled. grouped: the same batches, reordered by shape, see `_grouped`.
    carried: how many uses each group has left over from earlier epochs (`left_over`); they come first, and
    what remains is left over again. None: nothing is carried over.
    Raises ValueError for no samples, batch_size < 1 or a caption_dropout outside 0 to 1.
    """
    if not samples:
        raise UserError("there is no sample to train on; prepare some photos first")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 1 or more")
    if not 0 <= caption_dropout <= 1:
        raise ValueError(f"caption_dropout {caption_dropout} is outside 0 to 1; use 0.1, or 0 for none")
    ordered = _shuffled(samples, _due(samples, seed, epoch), seed, epoch)
    if carried is not None:
        ordered = _waiting(samples, seed, epoch, carried) + ordered
    chunks: list[list[_Use]] = []
    open_chunks: dict[Group, list[_Use]] = {}
    for use in ordered:
        group = group_of(samples[use.sample_index])
        chunk = open_chunks.get(group)
        if chunk is None or len(chunk) == batch_size:
            chunk = open_chunks[group] = []
            chunks.append(chunk)
        chunk.append(use)
    if carried is not None:
        chunks = [chunk for chunk in chunks if len(chunk) == batch_size]
    refs = iter(_refs(samples, [use for chunk in chunks for use in chunk], seed, epoch, caption_dropout))
    batches = [MicroBatch(samples[chunk[0].sample_index].bucket, tuple(next(refs) for _ in chunk)) for chunk in chunks]

    def place(batch: MicroBatch) -> tuple[int, int, int]:
        # a batch is named by its first sample, which no other batch holds
        first = batch.refs[0]
        key = Key(seed, Purpose.BATCH_ORDER, first.sample_id, epoch, first.occurrence)
        return sort_key(key), first.sample_id, first.occurrence

    shuffled = sorted(batches, key=place)
    return _grouped(shuffled, batch_size) if grouped else shuffled


def _refs(
    samples: Sequence[Sample], uses: list[_Use], seed: int, epoch: int, caption_dropout: float
) -> list[SampleRef]:
    """Return the uses that an epoch trains, with the crop and caption that are drawn for each.

    Their occurrences are counted anew, since some may be left over from earlier epochs.
    """
    seen: Counter[int] = Counter()
    counted = list(uses)
    for i in sorted(range(len(uses)), key=lambda i: (uses[i].epoch, uses[i].occurrence)):
        sample_id = samples[uses[i].sample_index].photo.sample_id
        counted[i] = uses[i]._replace(occurrence=seen[sample_id])
        seen[sample_id] += 1
    used = [samples[use.sample_index] for use in uses]

    def draws(purpose: Purpose) -> np.ndarray:
        return _draws(samples, counted, seed, purpose, epoch)[:, 0]

    variants = to_integers(draws(Purpose.VARIANT), [len(sample.latent_keys) for sample in used])
    captions = to_integers(draws(Purpose.CAPTION_CHOICE), [len(sample.text_keys) for sample in used])
    own = [sample.photo.settings.caption_dropout for sample in used]
    probabilities = np.array([caption_dropout if p is None else p for p in own], dtype=np.float64)
    captions = np.where(to_uniforms(draws(Purpose.CAPTION_DROPOUT)) < probabilities, EMPTY_CAPTION, captions)
    return [
        SampleRef(sample.photo.sample_id, use.sample_index, use.occurrence, int(variant), int(caption))
        for sample, use, variant, caption in zip(used, counted, variants, captions, strict=True)
    ]


def _grouped(shuffled: list[MicroBatch], batch_size: int) -> list[MicroBatch]:
    """Return the full batches of each bucket together, and the short ones after all of them.

    Buckets and the batches of one stand in the order that they are first met in: as random as the shuffle, by its keys.
    """
    first_met: dict[Bucket, int] = {}
    for batch in shuffled:
        if len(batch.refs) == batch_size:
            first_met.setdefault(batch.bucket, len(first_met))
    # sorting is stable; a short batch often has a shape of its own
    return sorted(shuffled, key=lambda b: first_met[b.bucket] if len(b.refs) == batch_size else len(first_met))


class Span(NamedTuple):
    """Consecutive epochs with one batch size: a stage."""

    epochs: int
    batch_size: int


def count_batches(
    samples: Sequence[Placed], spans: Sequence[Span], *, seed: int, carries: bool
) -> list[tuple[int, ...]]:
    """Return for each span the number of micro-batches in each of its epochs; a single number if all are alike.

    carries: whether what does not fill a batch waits for the next epoch. Raises UserError if epochs differ and there
    are more of them than a key can hold.
    """
    if not carries and not any(sample.photo.settings.repeats % 1 for sample in samples):
        (uses,) = _uses_by_group(samples, seed, range(1))
        return [(int((-(-uses // span.batch_size)).sum()),) for span in spans]
    counts = _count_epochs(samples, spans, seed, carries)
    return [tuple(next(counts)[0] for _ in range(span.epochs)) for span in spans]


def uses_by_group(samples: Sequence[Placed], *, seed: int, num_epochs: int) -> dict[Group, int]:
    """Return how many uses of each group are due in a number of epochs, all together."""
    total = np.zeros(len(_groups(samples)), dtype=np.int64)
    if not any(sample.photo.settings.repeats % 1 for sample in samples):
        total += num_epochs * next(_uses_by_group(samples, seed, range(1)))
    else:
        for uses in _uses_by_group(samples, seed, range(min(num_epochs, MAX_EPOCHS))):
            total += uses
    return dict(zip(_groups(samples), total.tolist(), strict=True))


def count_uses(samples: Sequence[Placed], *, seed: int, num_epochs: int) -> int:
    """Return how often samples are due in a number of epochs, all together."""
    return sum(uses_by_group(samples, seed=seed, num_epochs=num_epochs).values())


def left_over(samples: Sequence[Placed], spans: Sequence[Span], *, seed: int, epoch: int) -> dict[Group, int]:
    """Return how many uses each group has left over when an epoch begins, if what fills no batch is carried over."""
    if epoch == 0:
        return {}
    _, left = next(islice(_count_epochs(samples, spans, seed, True), epoch - 1, None))
    return dict(zip(_groups(samples), left.tolist(), strict=True))


def _groups(samples: Sequence[Placed]) -> list[Group]:
    return sorted({group_of(sample) for sample in samples})


def _uses_by_group(samples: Sequence[Placed], seed: int, epochs: range) -> Iterator[np.ndarray]:
    """Yield the uses due in each epoch, (groups,) int64 in the order of `_groups`."""
    column = {group: number for number, group in enumerate(_groups(samples))}
    columns = [column[group_of(sample)] for sample in samples]
    at_once = max(1, COUNTS_AT_ONCE // max(1, len(samples)))
    for start in range(epochs.start, epochs.stop, at_once):
        for counts in num_uses(samples, seed, range(start, min(start + at_once, epochs.stop))):
            yield np.bincount(columns, counts, len(column)).astype(np.int64)


def _count_epochs(
    samples: Sequence[Placed], spans: Sequence[Span], seed: int, carries: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each epoch's number of micro-batches and, by group, what is left over after it."""
    num_epochs = sum(span.epochs for span in spans)
    if num_epochs > MAX_EPOCHS:
        raise UserError(
            f"{num_epochs:,} epochs are more than the {MAX_EPOCHS:,} that random draws are keyed for; lower epochs"
        )
    uses = _uses_by_group(samples, seed, range(num_epochs))
    left = np.zeros(len(_groups(samples)), dtype=np.int64)
    for span in spans:
        for due in islice(uses, span.epochs):
            due = due + left
            if carries:
                left = due % span.batch_size
                yield int((due // span.batch_size).sum()), left
            else:
                yield int((-(-due // span.batch_size)).sum()), left
