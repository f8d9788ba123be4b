"""Plans an epoch (the order of its samples, with variant and caption of each) and loads its rows ahead of the step.

The plan is a pure function of its arguments. Draws are keyed by (sample id, epoch, occurrence), so a sample gets the
same crop and caption whatever the batch size, the order of the manifest or the step a run was resumed at.
Shapes: B batch, C channels, H x W, T tokens, D embedding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from safelight.data.buckets import Bucket
from safelight.data.draws import draw_words, to_integers, to_uniforms
from safelight.data.samples import Sample
from safelight.data.shards import Cache
from safelight.data.tensor_record import TensorRecord
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, sort_key

EMPTY_CAPTION = -1


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


@dataclass(frozen=True)
class Batch(TensorRecord):
    """A micro-batch's rows, float32, on the CPU or copied to a device. logvar_BCHW: None for a VAE without posterior.

    conditioning: the UNet's conditioning inputs, in the record type of the model family; see trainer/families.
    mask_B1HW: what the error of each latent pixel is multiplied by, None if no sample of the run has a mask. scales_B:
    what the loss of each sample is multiplied by, None if that is 1 for all samples of the run.
    """

    mean_BCHW: Tensor
    logvar_BCHW: Tensor | None
    conditioning: TensorRecord
    sample_ids: tuple[int, ...]
    occurrences: tuple[int, ...]
    bucket: Bucket
    mask_B1HW: Tensor | None = None
    scales_B: Tensor | None = None


@dataclass(frozen=True)
class RowSource:
    """Where the rows of batches come from.

    empty_key: key of the empty caption's row, see samples.empty_text_key. condition: turns float32 text rows, stacked
    along a first dimension, into the conditioning of a batch. has_masks, has_scales: whether batches have masks and
    loss scales. All batches of a run do or none, so that its steps are the same operations. mask_weight: the weight of
    what a mask leaves out.
    """

    cache: Cache
    samples: Sequence[Sample]
    empty_key: str
    condition: Callable[[Tensor], TensorRecord]
    has_masks: bool = False
    has_scales: bool = False
    mask_weight: float = 0.0


class Transport(Protocol):
    """Copies batches to a device, as SideStream does. send runs in the loader's thread, receive in the consumer's."""

    def send(self, batch: Batch) -> tuple[Batch, object]: ...

    def receive(self, sent: Batch, arrived: object) -> Batch: ...


def _meetings(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Return (sample id, occurrence) of each sample; a sample listed again is its next occurrence."""
    seen: dict[int, int] = {}
    meetings = []
    for sample in samples:
        sample_id = sample.photo.sample_id
        meetings.append((sample_id, seen.get(sample_id, 0)))
        seen[sample_id] = seen.get(sample_id, 0) + 1
    return meetings


def plan_epoch(
    samples: Sequence[Sample], *, seed: int, epoch: int, batch_size: int, caption_dropout: float, grouped: bool = False
) -> list[MicroBatch]:
    """Return the epoch's micro-batches in the order they are trained; every sample is in exactly one.

    Samples are shuffled, then fill the batches of their buckets in that order; what remains of a bucket is a shorter
    batch; then the batches are shuffled. grouped: the same batches, reordered by shape, see `_grouped`.
    Raises ValueError for no samples, batch_size < 1 or a caption_dropout outside 0 to 1.
    """
    if not samples:
        raise UserError("there is no sample to train on; prepare some photos first")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 1 or more")
    if not 0 <= caption_dropout <= 1:
        raise ValueError(f"caption_dropout {caption_dropout} is outside 0 to 1; use 0.1, or 0 for none")
    meetings = _meetings(samples)

    def draws(purpose: Purpose) -> np.ndarray:
        return draw_words([Key(seed, purpose, sample_id, epoch, occurrence) for sample_id, occurrence in meetings])

    order_words = draws(Purpose.EPOCH_ORDER)[:, :2]
    variants = to_integers(draws(Purpose.VARIANT)[:, 0], [len(sample.latent_keys) for sample in samples])
    captions = to_integers(draws(Purpose.CAPTION_CHOICE)[:, 0], [len(sample.text_keys) for sample in samples])
    is_dropped = to_uniforms(draws(Purpose.CAPTION_DROPOUT)[:, 0]) < caption_dropout
    captions = np.where(is_dropped, EMPTY_CAPTION, captions)
    # the sample id breaks a tie of draws, so that the result does not depend on the manifest's order
    order = sorted(range(len(samples)), key=lambda i: (*order_words[i].tolist(), *meetings[i]))
    groups: list[list[SampleRef]] = []
    open_groups: dict[Bucket, list[SampleRef]] = {}
    bucket_of_group = []
    for i in order:
        bucket = samples[i].bucket
        group = open_groups.get(bucket)
        if group is None or len(group) == batch_size:
            group = open_groups[bucket] = []
            groups.append(group)
            bucket_of_group.append(bucket)
        sample_id, occurrence = meetings[i]
        group.append(SampleRef(sample_id, i, occurrence, int(variants[i]), int(captions[i])))
    batches = [MicroBatch(bucket, tuple(group)) for bucket, group in zip(bucket_of_group, groups, strict=True)]

    def place(batch: MicroBatch) -> tuple[int, int, int]:
        # a batch is named by its first sample, which no other batch holds
        first = batch.refs[0]
        key = Key(seed, Purpose.BATCH_ORDER, first.sample_id, epoch, first.occurrence)
        return sort_key(key), first.sample_id, first.occurrence

    shuffled = sorted(batches, key=place)
    return _grouped(shuffled, batch_size) if grouped else shuffled


def _grouped(shuffled: list[MicroBatch], batch_size: int) -> list[MicroBatch]:
    """Return the full batches of each bucket together, and the short ones after all of them.

    Buckets and the batches of one stand in the order that they are first met in: as random as the shuffle, by its keys.
    """
    first_met: dict[Bucket, int] = {}
    for batch in shuffled:
        if len(batch.refs) == batch_size:
            first_met.setdefault(batch.bucket, len(first_met))
    # sorting is stable; short batches are one a bucket, each a shape of its own
    return sorted(shuffled, key=lambda b: first_met[b.bucket] if len(b.refs) == batch_size else len(first_met))


def load_batch(rows: RowSource, micro_batch: MicroBatch) -> Batch:
    """Return the rows of a micro-batch. Raises UserError if a row is missing, CorruptRow if one is damaged."""
    chosen = [(rows.samples[ref.sample_index], ref) for ref in micro_batch.refs]
    latent_keys = [sample.latent_keys[ref.variant] for sample, ref in chosen]
    text_keys = [
        rows.empty_key if ref.caption == EMPTY_CAPTION else sample.text_keys[ref.caption] for sample, ref in chosen
    ]
    latents = torch.from_numpy(rows.cache.read(latent_keys).astype(np.float32))
    mean, logvar = latents, None
    if rows.cache.kind_of(latent_keys[0]) == "posterior":
        mean, logvar = (half.contiguous() for half in latents.chunk(2, dim=1))
    return Batch(
        mean,
        logvar,
        rows.condition(torch.from_numpy(rows.cache.read(text_keys).astype(np.float32))),
        tuple(ref.sample_id for ref in micro_batch.refs),
        tuple(ref.occurrence for ref in micro_batch.refs),
        micro_batch.bucket,
        _masks(rows, chosen, latents.shape[2:]) if rows.has_masks else None,
        torch.tensor([sample.photo.settings.loss_scale for sample, _ in chosen]) if rows.has_scales else None,
    )


def _masks(rows: RowSource, chosen: list[tuple[Sample, SampleRef]], size_hw: Sequence[int]) -> Tensor:
    """Return the weights of a batch's latent pixels, (B, 1, H, W): 1 inside a mask, rows.mask_weight outside."""
    masks_B1HW = torch.ones(len(chosen), 1, *size_hw)
    keys = {i: sample.mask_keys[ref.variant] for i, (sample, ref) in enumerate(chosen) if sample.mask_keys}
    if keys:
        inside = torch.from_numpy(rows.cache.read(list(keys.values())).astype(np.float32))
        masks_B1HW[list(keys)] = inside + (1 - inside) * rows.mask_weight
    return masks_B1HW


def iterate(
    rows: RowSource,
    micro_batches: Iterable[MicroBatch],
    prefetch: int = 2,
    transport: Transport | None = None,
) -> Iterator[Batch]:
    """Yield the loaded micro-batches in order, up to `prefetch` (1 or more) ahead on a thread.

    transport: sends each on its way to the device as soon as it is loaded; without one they stay on the CPU.
    An error of the thread is raised where its batch would have come. Closing the iterator stops the thread.
    """
    if prefetch < 1:
        raise ValueError(f"prefetch {prefetch} is below 1; use 2")
    pending: deque[Future] = deque()
    executor = ThreadPoolExecutor(1, thread_name_prefix="load-batch")

    def load(micro_batch: MicroBatch) -> tuple[Batch, object]:
        batch = load_batch(rows, micro_batch)
        return (batch, None) if transport is None else transport.send(batch)

    def first() -> Batch:
        sent, arrived = pending.popleft().result()
        return sent if transport is None else transport.receive(sent, arrived)

    try:
        for micro_batch in micro_batches:
            pending.append(executor.submit(load, micro_batch))
            if len(pending) > prefetch:
                yield first()
        while pending:
            yield first()
    finally:
        executor.shutdown(cancel_futures=True)
