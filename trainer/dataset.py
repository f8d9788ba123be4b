"""Opens a prepared dataset and fills its cache: all of `safelight cache`, and the first part of `safelight train`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from safelight.data.batches import RowSource
from safelight.data.buckets import Bucket
from safelight.data.cache import (
    Sample,
    empty_text_key,
    fill_latents,
    fill_texts,
    plan_samples,
    sample_captions,
    text_key,
)
from safelight.data.manifest import read_manifest, split_validation
from safelight.data.masks import fill_masks
from safelight.data.samples import with_masks
from safelight.data.shards import Cache
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.family import Family
from safelight.trainer.models.base import Base, training_buckets
from safelight.trainer.models.encoders import CaptionEncoder, LatentCodec, load_caption_encoder, load_codec
from safelight.untrusted import check_links

NUM_EXAMPLES = 12
ENCODE_BATCH_CPU, ENCODE_BATCH_GPU = 8, 4

Progress = Callable[[str, int, int], None]


@dataclass
class Dataset:
    """Training and held-out samples over one open cache.

    empty_key: cache key of the empty caption. scaling_factor: what unscaled latents are multiplied by to get unit
    variance. latent_factor: pixels per latent. num_encoded: rows encoded on opening, of which num_damaged replaced
    damaged ones. cuts: text -> the end of what the text encoder reads of it, for captions and prompts that are longer.
    cut_note: the line that says so, '' if none is. mask_weight: loss.mask_weight.
    """

    path: Path
    cache: Cache
    train: list[Sample]
    validation: list[Sample]
    buckets: tuple[Bucket, ...]
    empty_key: str
    scaling_factor: float
    latent_factor: int
    text_fingerprint: str
    family: Family
    num_encoded: int = 0
    num_damaged: int = 0
    cuts: dict[str, str] = field(default_factory=dict)
    cut_note: str = ""
    mask_weight: float = 0.0

    @property
    def samples(self) -> list[Sample]:
        return [*self.train, *self.validation]

    def text_key(self, caption: str) -> str:
        """Return the cache key of a caption, to which no suffix is added."""
        return text_key(caption, self.text_fingerprint, self.cache.dtype)

    def rows(self, samples: Sequence[Sample]) -> RowSource:
        """Return the source of some samples' cached rows."""
        return RowSource(
            self.cache,
            samples,
            self.empty_key,
            self.family.conditioning,
            has_masks=any(sample.mask_keys for sample in samples),
            has_scales=any(sample.photo.settings.loss_scale != 1 for sample in samples),
            mask_weight=self.mask_weight,
        )

    def conditioning(self, captions: list[str]) -> TextConditioning:
        """Return the UNet's conditioning on captions, all of which must be in the cache."""
        rows = torch.from_numpy(self.cache.read([self.text_key(c) for c in captions])).float()
        return self.family.conditioning(rows)

    def sample_prompts(self, config: Config) -> list[str]:
        """Return the prompts to sample during the run: the config's, or captions of the first held-out photographs."""
        if config.sample.prompts:
            return list(config.sample.prompts)
        captions = [s.captions[0] for s in self.validation or self.train if s.captions[0]]
        return list(dict.fromkeys(captions))[: config.sample.num_prompts]

    def counts(self) -> list[dict]:
        """Return the number of photographs in each bucket that has any."""
        train, validation = (Counter(s.bucket for s in half) for half in (self.train, self.validation))
        return [
            {"width": b.width, "height": b.height, "num_train": train[b], "num_validation": validation[b]}
            for b in sorted(set(train) | set(validation))
        ]


def open_dataset(
    config: Config,
    base: Base,
    device: torch.device,
    progress: Progress | None = None,
    check: Callable[[Dataset], None] | None = None,
) -> Dataset:
    """Return the run's dataset, after encoding what its cache lacks. The encoders are freed before it returns.

    progress: called with (what is encoded, rows done, total). check: called before anything is encoded, and raises
    UserError to prevent it. Raises UserError for a dataset that was not prepared, or
    settings that do not fit it, and for one with a link that leads out of its folder.
    """
    path = Path(config.data.path)
    photos = read_manifest(path)
    # the cache is written to, and photographs are read by the manifest's paths
    check_links(path)
    train_photos, validation_photos = split_validation(photos, config.data.validation_fraction, config.run.seed)
    if not train_photos:
        raise UserError(f"{path} has {len(photos)} photographs, none left to train on; lower data.validation_fraction")
    codec = load_codec(config, base, device)
    encoder = load_caption_encoder(config, base, device)
    _check_fit(base, codec, encoder)
    buckets = training_buckets(base, config.data, codec.factor)
    common = {
        "crop_jitter": config.data.crop_jitter,
        "flip_p": config.data.flip_p,
        "seed": config.run.seed,
        "vae_fingerprint": codec.fingerprint,
        "text_fingerprint": encoder.fingerprint,
        "dtype": config.data.cache_dtype,
        "suffix": config.data.caption_suffix,
    }
    train = plan_samples(train_photos, buckets, variants=config.data.variants, **common)
    validation = plan_samples(validation_photos, buckets, variants=1, **common)
    if config.loss.mask_weight != 1:
        train, validation = (with_masks(half, codec.factor, config.data.cache_dtype) for half in (train, validation))
    cache = Cache(path / "cache", config.data.cache_dtype)
    dataset = Dataset(
        path,
        cache,
        train,
        validation,
        buckets,
        empty_text_key(encoder.fingerprint, cache.dtype),
        codec.scaling_factor,
        codec.factor,
        encoder.fingerprint,
        base.family,
        mask_weight=config.loss.mask_weight,
    )
    try:
        if check is not None:
            check(dataset)
        _fill(dataset, config, codec, encoder, ENCODE_BATCH_CPU if device.type == "cpu" else ENCODE_BATCH_GPU, progress)
    except BaseException:
        cache.close()
        raise
    return dataset


def _fill(
    dataset: Dataset,
    config: Config,
    codec: LatentCodec,
    encoder: CaptionEncoder,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Encode the rows that are missing from the cache or damaged in it."""
    cache, samples = dataset.cache, dataset.samples
    captions = [*sample_captions(samples), *dataset.sample_prompts(config), config.sample.negative_prompt]

    def report(what: str):
        return None if progress is None else lambda done, total: progress(what, done, total)

    dataset.cuts = encoder.cuts(captions)
    if named := _named_cuts(dataset, config):
        dataset.cut_note = f"note: {encoder.describe_cuts(named)}"
    dataset.num_encoded = fill_texts(cache, captions, encoder, 4 * batch_size, report("captions"))
    dataset.num_encoded += fill_latents(cache, dataset.path, samples, codec, batch_size, report("latents"))
    dataset.num_encoded += fill_masks(cache, dataset.path, samples, codec.factor, report("masks"))
    dataset.num_damaged = cache.num_dropped
    cache.release()


def _named_cuts(dataset: Dataset, config: Config) -> list[tuple[str, str]]:
    """Return (name, end of what is read) of every prompt and photograph whose text is cut, prompts first."""
    cuts = dataset.cuts
    prompts = [("the negative prompt", config.sample.negative_prompt)]
    prompts += [(f"sample prompt {number}", prompt) for number, prompt in enumerate(config.sample.prompts, 1)]
    photos = sorted((f"a caption of {s.photo.source}", c) for s in dataset.samples for c in s.captions)
    return [(name, cuts[text]) for name, text in (*prompts, *photos) if text in cuts]


def _check_fit(base: Base, codec: LatentCodec, encoder: CaptionEncoder) -> None:
    unet = base.config_of("unet")
    if unet["in_channels"] != codec.latent_channels:
        raise UserError(
            f"the UNet takes {unet['in_channels']} latent channels, the autoencoder makes {codec.latent_channels}; "
            "use the base's own VAE"
        )
    if unet["cross_attention_dim"] != encoder.embedding_dim:
        raise UserError(
            f"the UNet takes text embeddings of width {unet['cross_attention_dim']}, the text encoder gives "
            f"{encoder.embedding_dim}; use the base's own text encoder"
        )
