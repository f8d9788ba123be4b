"""Plans an epoch: how often each sample is used, with which crop and caption, and in which batches.

A plan is a pure function of its arguments. Draws are keyed by (sample id, epoch, occurrence), so a sample gets the
same crop and caption whatever the order of the manifest or the step a run was resumed at, and, unless batches are
carried over, whatever the batch size.

Samples of one bucket and one batch id form a group; every batch comes from one group. What does not fill a batch at an
epoch's end is either a shorter batch or, carried over, waits for the group's samples of the next epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple, Protocol

import numpy as np

from safelight.data.buckets import Bucket
from safelight.data.draws import draw_words_at, to_integers, to_uniforms
from safelight.data.photo import Photo
from safelight.data.samples import Sample
from safelight.errors import UserError
from safelight.kernels.philox import Purpose

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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one bucket that go through the model together."""

    bucket: Bucket
    refs: tuple[SampleRef, ...]


class _Uses(NamedTuple):
    """Samples that are due, as columns. occurrence: counts the uses of a sample id that are due in that epoch."""

    sample_index: np.ndarray
    epoch: np.ndarray
    occurrence: np.ndarray

    def at(self, places: np.ndarray) -> _Uses:
        return _Uses(*(column[places] for column in self))

    def before(self, other: _Uses) -> _Uses:
        return _Uses(*map(np.concatenate, zip(self, other, strict=True)))


@dataclass(frozen=True)
class SampleColumns:
    """What a plan needs of every sample, as arrays of one value a sample: 40 bytes.

    ids: sample ids. buckets: ranks of the buckets in their order. groups: numbers of the groups in `all_groups`, which
    are sorted. repeats, caption_dropout: of the photo, NaN if it has none of its own. num_variants, num_captions: how
    many crops and captions there are to draw from.
    """

    ids: np.ndarray
    buckets: np.ndarray
    groups: np.ndarray
    repeats: np.ndarray
    num_variants: np.ndarray
    num_captions: np.ndarray
    caption_dropout: np.ndarray
    all_groups: tuple[Group, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SampleColumns:
        all_groups = tuple(_groups(samples))
        number, rank = _numbers(all_groups), _numbers(sorted({group.bucket for group in all_groups}))
        rank_of_group = np.array([rank[group.bucket] for group in all_groups], dtype=np.int32)
        groups = np.fromiter((number[group_of(sample)] for sample in samples), np.int32, len(samples))
        own = (sample.photo.settings.caption_dropout for sample in samples)
        return cls(
            ids=np.fromiter((sample.photo.sample_id for sample in samples), np.uint64, len(samples)),
            buckets=rank_of_group[groups],
            groups=groups,
            repeats=np.fromiter((sample.photo.settings.repeats for sample in samples), np.float64, len(samples)),
            num_variants=np.fromiter((len(sample.latent_keys) for sample in samples), np.int32, len(samples)),
            num_captions=np.fromiter((len(sample.text_keys) for sample in samples), np.int32, len(samples)),
            caption_dropout=np.fromiter((np.nan if p is None else p for p in own), np.float64, len(samples)),
            all_groups=all_groups,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def draws(self, uses: _Uses, seed: int, purpose: Purpose, epoch: int) -> np.ndarray:
        """Return each use's random words, (uses, 4), keyed by its sample id and occurrence."""
        return draw_words_at(seed, purpose, self.ids[uses.sample_index], epoch, uses.occurrence.astype(np.uint64))


def _numbers(items: Sequence) -> dict:
    return {item: number for number, item in enumerate(items)}


def _numbered(values: np.ndarray) -> np.ndarray:
    """Return for each value how many equal ones stand before it."""
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(values)])
    lengths = np.diff(np.append(starts, len(values)))
    numbers = np.empty(len(values), dtype=np.int64)
    numbers[by_value] = np.arange(len(values)) - np.repeat(starts, lengths)
    return numbers


def group_of(placed: Placed) -> Group:
    """Return the group whose batches a sample may be in."""
    return Group(placed.bucket, placed.photo.settings.batch_id)


def num_uses(samples: Sequence[Placed], seed: int, epochs: Sequence[int]) -> np.ndarray:
    """Return how often each sample is due in each epoch, (epochs, samples) int64.

    That is its photo's `repeats`; a fraction is one more use in the epochs for which the key (seed, REPEAT, sample id,
    epoch) draws it.
    """
    repeats = np.array([sample.photo.settings.repeats for sample in samples], dtype=np.float64)
    (partial,) = np.nonzero(repeats % 1.0)
    return _num_uses(repeats, np.array([samples[i].photo.sample_id for i in partial], dtype=np.uint64), seed, epochs)


def _num_uses(repeats: np.ndarray, partial_ids: np.ndarray, seed: int, epochs: Sequence[int]) -> np.ndarray:
    """Return `num_uses`. partial_ids: the sample ids whose repeats have a fraction."""
    counts = np.broadcast_to(np.floor(repeats).astype(np.int64), (len(epochs), len(repeats))).copy()
    fractions = repeats % 1.0
    (partial,) = np.nonzero(fractions)
    if len(partial):
        words = draw_words_at(seed, Purpose.REPEAT, partial_ids, np.array(epochs, dtype=np.uint64)[:, None])
        counts[:, partial] += to_uniforms(words[..., 0]) < fractions[partial]
    return counts


def _due(columns: SampleColumns, seed: int, epoch: int) -> _Uses:
    """Return the uses that are due in an epoch. A sample id listed again continues its count of occurrences."""
    counts = _num_uses(columns.repeats, columns.ids[columns.repeats % 1.0 > 0], seed, [epoch])[0]
    # one photo's buckets in a fixed order, so that the manifest's order does not matter
    order = np.argsort(columns.buckets, kind="stable")
    index = np.repeat(order, counts[order])
    return _Uses(index, np.full(len(index), epoch), _numbered(columns.ids[index]))


def _shuffled(columns: SampleColumns, uses: _Uses, seed: int, epoch: int) -> _Uses:
    """Return an epoch's uses in the order of its keyed shuffle."""
    words = columns.draws(uses, seed, Purpose.EPOCH_ORDER, epoch)
    return uses.at(_keyed_order(words, columns.ids[uses.sample_index], uses.occurrence))


def _keyed_order(words: np.ndarray, ids: np.ndarray, occurrences: np.ndarray) -> np.ndarray:
    """Return the order of the first two random words of each row.

    The sample id and occurrence break a tie of draws, so that the result does not depend on the manifest's order.
    """
    keys = words[:, 0] << np.uint64(32) | words[:, 1]
    order = np.argsort(keys, kind="stable")
    if (keys[order][1:] == keys[order][:-1]).any():
        return np.lexsort((occurrences, ids, keys))
    return order


def _waiting(columns: SampleColumns, seed: int, epoch: int, carried: Mapping[Group, int]) -> _Uses:
    """Return the uses that earlier epochs left over, oldest first. carried: how many of each group."""
    left = np.array([carried.get(group, 0) for group in columns.all_groups], dtype=np.int64)
    waiting = _Uses(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    for before in range(epoch - 1, -1, -1):
        if not left.any():
            break
        uses = _due(columns, seed, before)
        uses = _shuffled(columns, uses.at(left[columns.groups[uses.sample_index]] > 0), seed, before)
        groups = columns.groups[uses.sample_index]
        # the newest are left over
        is_left = _numbered(groups[::-1])[::-1] < left[groups]
        waiting = uses.at(is_left).before(waiting)
        left = left - np.bincount(groups[is_left], minlength=len(left))
    return waiting


def plan_epoch(
    samples: Sequence[Sample] | SampleColumns,
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
    what remains is left over again. None: nothing is carried over. samples: or their columns, made once for all epochs.
    Raises ValueError for no samples, batch_size < 1 or a caption_dropout outside 0 to 1.
    """
    if not len(samples):
        raise UserError("there is no sample to train on; prepare some photos first")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 1 or more")
    if not 0 <= caption_dropout <= 1:
        raise ValueError(f"caption_dropout {caption_dropout} is outside 0 to 1; use 0.1, or 0 for none")
    columns = samples if isinstance(samples, SampleColumns) else SampleColumns.of(samples)
    uses = _shuffled(columns, _due(columns, seed, epoch), seed, epoch)
    if carried is not None:
        uses = _waiting(columns, seed, epoch, carried).before(uses)
    # the uses of a group stay in their order, and every batch_size of them are a batch
    groups = columns.groups[uses.sample_index]
    by_group = np.argsort(groups, kind="stable")
    uses = uses.at(by_group)
    places = _numbered(groups[by_group])
    if carried is not None:
        # what remains of a group waits
        full = np.bincount(groups, minlength=len(columns.all_groups)) // batch_size * batch_size
        is_used = places < full[groups[by_group]]
        uses, places = uses.at(is_used), places[is_used]
    starts = np.flatnonzero(places % batch_size == 0)
    refs = _refs(columns, uses, seed, epoch, caption_dropout)
    # a batch is named by its first sample, which no other batch holds
    occurrence = np.array([ref.occurrence for ref in refs], dtype=np.int64)[starts]
    first = _Uses(uses.sample_index[starts], uses.epoch[starts], occurrence)
    words = columns.draws(first, seed, Purpose.BATCH_ORDER, epoch)
    ends = np.append(starts[1:], len(refs))
    order = _keyed_order(words, columns.ids[first.sample_index], occurrence)
    buckets = [group.bucket for group in columns.all_groups]
    which = columns.groups[first.sample_index]
    shuffled = [
        MicroBatch(buckets[group], tuple(refs[start:end]))
        for group, start, end in zip(*(x[order].tolist() for x in (which, starts, ends)), strict=True)
    ]
    return _grouped(shuffled, batch_size) if grouped else shuffled


def _refs(columns: SampleColumns, uses: _Uses, seed: int, epoch: int, caption_dropout: float) -> list[SampleRef]:
    """Return the uses that an epoch trains, with the crop and caption that are drawn for each.

    Their occurrences are counted anew, since some may be left over from earlier epochs.
    """
    index = uses.sample_index
    by_age = np.lexsort((uses.occurrence, uses.epoch))
    occurrence = np.empty(len(index), dtype=np.int64)
    occurrence[by_age] = _numbered(columns.ids[index[by_age]])
    counted = _Uses(index, uses.epoch, occurrence)

    def draws(purpose: Purpose) -> np.ndarray:
        return columns.draws(counted, seed, purpose, epoch)[:, 0]

    variants = to_integers(draws(Purpose.VARIANT), columns.num_variants[index])
    captions = to_integers(draws(Purpose.CAPTION_CHOICE), columns.num_captions[index])
    own = columns.caption_dropout[index]
    probabilities = np.where(np.isnan(own), caption_dropout, own)
    captions = np.where(to_uniforms(draws(Purpose.CAPTION_DROPOUT)) < probabilities, EMPTY_CAPTION, captions)
    values = (columns.ids[index], index, occurrence, variants, captions)
    return list(map(SampleRef, *(x.tolist() for x in values)))


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
    column = _numbers(_groups(samples))
    columns = np.fromiter((column[group_of(sample)] for sample in samples), np.int64, len(samples))
    if not any(sample.photo.settings.repeats % 1 for sample in samples):
        # all epochs are alike
        counts = num_uses(samples, seed, [epochs.start])[0]
        yield from repeat(np.bincount(columns, counts, len(column)).astype(np.int64), len(epochs))
        return
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
