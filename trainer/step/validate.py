"""Validation loss on fixed noise, comparable between steps, batch sizes, machines and configs.

Each image is evaluated at one timestep in each of K equal bands. Noise and timestep are keyed by (seed, image, band);
latents are the mean of the posterior; there is no caption dropout, crop jitter, loss weighting or loss scale. Masks
count as in training: what is not learned is not measured either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from safelight.data.batches import RowSource, load_batch
from safelight.data.cache import Sample
from safelight.data.epochs import MicroBatch, SampleRef
from safelight.errors import UserError
from safelight.kernels.ops.noising import Purposes, key_words, noising
from safelight.kernels.philox import Key, Purpose, sort_key, uniforms
from safelight.trainer.distributed.spread import own_batches
from safelight.trainer.distributed.together import together
from safelight.trainer.distributed.world import World
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.step.step import sample_losses
from safelight.trainer.step.text_training import TextTraining

PURPOSES = Purposes(noise=Purpose.VALIDATION_NOISE)


@dataclass(frozen=True)
class Validation:
    """loss: mean over images and bands. loss_by_timestep: mean of each band, in order of increasing noise.

    not_finite: indices of the samples with a loss that is not finite.
    """

    loss: float
    loss_by_timestep: tuple[float, ...]
    num_images: int
    not_finite: tuple[int, ...] = ()


def choose_subset(samples: Sequence[Sample], max_samples: int, seed: int) -> list[Sample]:
    """Return at most `max_samples` samples in their given order, chosen by seed and sample id alone."""
    chosen = sorted(samples, key=lambda s: sort_key(Key(seed, Purpose.SPLIT, s.sample_id, 1)))[:max_samples]
    keep = {s.sample_id for s in chosen}
    return [s for s in samples if s.sample_id in keep]


def _batches(samples: Sequence[Sample], num_bands: int, batch_size: int) -> list[tuple[MicroBatch, list[int]]]:
    """Return what is computed at a time: rows of one bucket, and the band of each. An image has a row for every band,
    so that batches are full where buckets have few images."""
    by_bucket: dict = {}
    for index, sample in enumerate(samples):
        ref = SampleRef(sample.sample_id, index, 0, 0, 0)
        by_bucket.setdefault(sample.bucket, []).extend((ref, k) for k in range(num_bands))
    batches = []
    for bucket, rows in sorted(by_bucket.items()):
        for i in range(0, len(rows), batch_size):
            refs, bands = zip(*rows[i : i + batch_size], strict=True)
            batches.append((MicroBatch(bucket, refs), list(bands)))
    return batches


@torch.no_grad()
def validate(
    unet: nn.Module,
    rows: RowSource,
    schedule: NoiseSchedule,
    scaling_factor: float,
    *,
    seed: int,
    num_bands: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    texts: TextTraining | None = None,
    world: World = World(),  # noqa: B008  it is frozen
) -> Validation:
    """Return the loss on the samples of `rows`, with center crops and first captions. Raises UserError without samples.

    world: whose processes share the batches; all have the result, which does not depend on their number.
    texts: reads the captions if `rows` has them as token ids.
    progress: called with (done, total) after each forward pass; an exception it raises aborts the validation.
    """
    samples = rows.samples
    if not samples:
        raise UserError("there are no images to validate on; set data.validation_fraction above 0")
    device = schedule.alphas_cumprod_T.device
    was_training = unet.training
    unet.eval()
    dtype = next(unet.parameters()).dtype
    losses = torch.zeros(len(samples), num_bands, dtype=torch.float64)
    band = schedule.num_timesteps / num_bands
    batches = _batches(samples, num_bands, batch_size)
    with together(world) as others:
        for index, (_, (micro_batch, bands)) in enumerate(own_batches(world, batches)):
            batch = load_batch(rows, micro_batch).map(lambda x: x.to(device))
            conditioning = batch.conditioning if texts is None else texts.conditioning(batch.conditioning)
            places = list(zip(batch.sample_ids, bands, strict=True))
            noise_keys = [Key(seed, Purpose.VALIDATION_NOISE, i, 0, k) for i, k in places]
            draws = [uniforms(Key(seed, Purpose.VALIDATION_TIMESTEP, i, 0, k))[0] for i, k in places]
            timesteps = [int((k + draw) * band) for k, draw in zip(bands, draws, strict=True)]
            noised = noising(
                batch.mean_BCHW,
                None,
                key_words(noise_keys, device),
                schedule.alphas_cumprod_T,
                timesteps_B=torch.tensor(timesteps, device=device),
                prediction_type=schedule.prediction_type,
                scaling_factor=scaling_factor,
                dtype=dtype,
                purposes=PURPOSES,
            )
            indices = [ref.sample_index for ref in micro_batch.refs]
            losses[indices, bands] = sample_losses(unet, noised, conditioning, batch.mask_B1HW).double().cpu()
            others.check()
            progress(others.whole(index + 1), len(batches))
    # each loss was computed by one process, and is zero in the others
    losses = torch.stack(world.gather_rows(losses)).sum(dim=0)
    unet.train(was_training)
    not_finite = tuple((~losses.isfinite().all(dim=1)).nonzero().flatten().tolist())
    return Validation(losses.mean().item(), tuple(losses.mean(dim=0).tolist()), len(samples), not_finite)
