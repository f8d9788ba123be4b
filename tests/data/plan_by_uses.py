"""An epoch's plan made a use at a time: what data/epochs.py must equal, which plans with arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from safelight.data.draws import draw_words_at, to_integers, to_uniforms
from safelight.data.epochs import EMPTY_CAPTION, Group, MicroBatch, SampleRef, group_of, num_uses
from safelight.data.samples import Sample
from safelight.kernels.philox import Key, Purpose, sort_key


class _Use(NamedTuple):
    """A sample that is due in an epoch. occurrence: counts the sample id's uses due in that epoch."""

    sample_index: int
    epoch: int
    occurrence: int


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


def plan_by_uses(
    samples: Sequence[Sample],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    caption_dropout: float,
    grouped: bool = False,
    carried: Mapping[Group, int] | None = None,
) -> list[MicroBatch]:
    """Return what plan_epoch returns."""
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
    if not grouped:
        return shuffled
    met = list(dict.fromkeys(batch.bucket for batch in shuffled if len(batch.refs) == batch_size))
    return sorted(shuffled, key=lambda b: met.index(b.bucket) if len(b.refs) == batch_size else len(met))


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
