"""Loads the rows of an epoch's micro-batches ahead of the step.

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
from safelight.data.epochs import EMPTY_CAPTION, MicroBatch, SampleRef
from safelight.data.samples import Sample
from safelight.data.shards import Cache
from safelight.data.tensor_record import TensorRecord


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

    empty_key: key of the empty caption's row, see samples.empty_text_key. reads_tokens: whether captions are rows of
    token ids, not of embeddings. condition: turns text rows, float32 or token ids, stacked along a first dimension, and
    the samples' sizes, (B, 6) float32, into the conditioning of a batch. has_masks,
    has_scales: whether batches have masks and loss scales. All batches of a run do or none, so that its steps are the
    same operations. mask_weight: the weight of what a mask leaves out.
    """

    cache: Cache
    samples: Sequence[Sample]
    empty_key: str
    condition: Callable[[Tensor, Tensor], TensorRecord]
    has_masks: bool = False
    has_scales: bool = False
    mask_weight: float = 0.0
    reads_tokens: bool = False

    def text_keys(self, sample: Sample) -> tuple[str, ...]:
        """Return the keys of a sample's captions, as batches read them."""
        return sample.token_keys if self.reads_tokens else sample.text_keys


class Transport(Protocol):
    """Copies batches to a device, as SideStream does. send runs in the loader's thread, receive in the consumer's."""

    def send(self, batch: Batch) -> tuple[Batch, object]: ...

    def receive(self, sent: Batch, arrived: object) -> Batch: ...


def load_batch(rows: RowSource, micro_batch: MicroBatch) -> Batch:
    """Return the rows of a micro-batch. Raises UserError if a row is missing, CorruptRow if one is damaged."""
    chosen = [(rows.samples[ref.sample_index], ref) for ref in micro_batch.refs]
    latent_keys = [sample.latent_keys[ref.variant] for sample, ref in chosen]
    text_keys = [
        rows.empty_key if ref.caption == EMPTY_CAPTION else rows.text_keys(sample)[ref.caption]
        for sample, ref in chosen
    ]
    texts = rows.cache.read(text_keys).astype(np.int64 if rows.reads_tokens else np.float32)
    sizes_B6 = torch.tensor([sample.sizes(ref.variant) for sample, ref in chosen], dtype=torch.float32)
    latents = torch.from_numpy(rows.cache.read(latent_keys).astype(np.float32))
    mean, logvar = latents, None
    if rows.cache.kind_of(latent_keys[0]) == "posterior":
        mean, logvar = (half.contiguous() for half in latents.chunk(2, dim=1))
    return Batch(
        mean,
        logvar,
        rows.condition(torch.from_numpy(texts), sizes_B6),
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
