"""Opens a prepared dataset and fills its cache: all of `safelight cache`, and the first part of `safelight train`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from safelight.data.batches import RowSource
from safelight.data.cache import (
    Sample,
    empty_text_key,
    encode_latent,
    fill_latents,
    fill_texts,
    latent_kind,
    latent_shape,
    plan_samples,
    sample_captions,
    text_key,
)
from safelight.data.manifest import read_manifest, split_validation
from safelight.data.masks import encode_mask, fill_masks
from safelight.data.samples import with_masks
from safelight.data.shards import Cache
from safelight.data.verify import NeededRow
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.config.schema import MAX_CHUNKS, Config
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.family import uncropped_sizes
from safelight.trainer.inference.sampling import PromptGroup, Settings
from safelight.trainer.models import placing
from safelight.trainer.models.base import Base
from safelight.trainer.models.encoders import (
    CaptionEncoder,
    LatentCodec,
    load_caption_encoder,
    load_codec,
    prompt_of_caption,
)
from safelight.trainer.models.prompt_weights import has_weights
from safelight.untrusted import check_links

NUM_EXAMPLES = 12
ENCODE_BATCH_CPU, ENCODE_BATCH_GPU = 8, 4

Progress = Callable[[str, int, int], None]


@dataclass
class Dataset:
    """Training and held-out samples over one open cache.

    placed: the photographs in their buckets, and those that are left out. empty_key: cache key of the empty caption.
    scaling_factor: what unscaled latents are multiplied by to get unit variance. latent_factor: pixels per latent.
    condition: turns text rows and sizes into the UNet's conditioning, see RowSource.
    num_encoded: rows encoded on opening, of which num_damaged replaced damaged ones. cuts: prompt -> the end of what
    the text encoder reads of it, for prompts that are longer. cut_notes: lines that name what is cut. length_note: a
    line on how long the captions are. num_cut_captions: distinct captions of which the text encoder reads only the
    beginning. sampled: (places, cache keys, key of the negative prompt) of the prompts that
    the run samples, grouped by the length of their embeddings. mask_weight: loss.mask_weight.
    """

    path: Path
    cache: Cache
    train: list[Sample]
    validation: list[Sample]
    placed: placing.Placed
    empty_key: str
    scaling_factor: float
    latent_factor: int
    condition: Callable[[Tensor, Tensor], TextConditioning]
    num_encoded: int = 0
    num_damaged: int = 0
    cuts: dict[str, str] = field(default_factory=dict)
    cut_notes: list[str] = field(default_factory=list)
    length_note: str = ""
    num_cut_captions: int = 0
    sampled: list[tuple[tuple[int, ...], list[str], str]] = field(default_factory=list)
    mask_weight: float = 0.0

    @property
    def samples(self) -> list[Sample]:
        return [*self.train, *self.validation]

    def rows(self, samples: Sequence[Sample]) -> RowSource:
        """Return the source of some samples' cached rows."""
        return RowSource(
            self.cache,
            samples,
            self.empty_key,
            self.condition,
            has_masks=any(sample.mask_keys for sample in samples),
            has_scales=any(sample.photo.settings.loss_scale != 1 for sample in samples),
            mask_weight=self.mask_weight,
        )

    def prompt_groups(self, settings: Settings) -> list[PromptGroup]:
        """Return the conditioning of the prompts that the run samples, for pictures of the settings' size."""

        def conditioning(keys: list[str]) -> TextConditioning:
            sizes = uncropped_sizes(len(keys), settings.height, settings.width)
            return self.condition(torch.from_numpy(self.cache.read(keys)).float(), sizes)

        return [
            PromptGroup(places, conditioning(keys), conditioning([negative])) for places, keys, negative in self.sampled
        ]

    def sample_prompts(self, config: Config) -> list[str]:
        """Return the prompts to sample during the run: the config's, or captions of the first held-out photographs."""
        if config.sample.prompts:
            return list(config.sample.prompts)
        captions = [prompt_of_caption(config, s.captions[0]) for s in self.validation or self.train if s.captions[0]]
        return list(dict.fromkeys(captions))[: config.sample.num_prompts]

    @property
    def num_captions(self) -> int:
        """Distinct captions of each photograph, added up."""
        return sum(len(set(s.captions)) for s in placing.once_each(self.samples))

    @property
    def num_tagged(self) -> int:
        """Photographs with tags."""
        return sum(bool(s.photo.tags) for s in placing.once_each(self.samples))

    @property
    def tag_note(self) -> str:
        """A line on the captions of photographs with tags, '' if there are none."""
        if not self.num_tagged:
            return ""
        most = max(len(set(s.captions)) // len(set(s.photo.captions)) for s in self.samples)
        photos = counted(len(placing.once_each(self.samples)), "photograph")
        return (
            f"{counted(self.num_captions, 'distinct caption')} of {photos}; "
            f"{self.num_tagged} {'has' if self.num_tagged == 1 else 'have'} tags, in up to {counted(most, 'order')}"
        )

    def counts(self) -> list[dict]:
        """Return the number of photographs in each bucket that has any, and the fraction of pixels that crops lose."""
        halves = self.placed.train, self.placed.validation
        train, validation = (Counter(one.bucket for one in half) for half in halves)
        rows = []
        for bucket in sorted(set(train) | set(validation)):
            lost = placing.crop_loss([one for half in halves for one in half if one.bucket == bucket])
            counts = {"num_train": train[bucket], "num_validation": validation[bucket]}
            rows.append({"width": bucket.width, "height": bucket.height, **counts, "crop_loss": round(lost, 6)})
        return rows


@dataclass
class Plan:
    """A dataset and what encodes its rows. The cache is open; the caller closes it.

    texts: the texts whose embeddings the run needs, with the encoder that reads them: the captions, then each prompt
    that it samples. The empty text goes with each.
    """

    dataset: Dataset
    codec: LatentCodec
    texts: list[tuple[CaptionEncoder, list[str]]]

    def rows(self) -> dict[str, NeededRow]:
        """Return every row that the run needs, by its key."""
        codec, dtype, path = self.codec, self.dataset.cache.dtype, self.dataset.path
        rows: dict[str, NeededRow] = {}
        for sample in self.dataset.samples:
            name, latent = sample.photo.source, latent_shape(codec, sample.bucket)
            for variant, key in enumerate(sample.latent_keys):
                again = partial(encode_latent, path, sample, variant, codec)
                rows.setdefault(key, NeededRow(latent_kind(codec), latent, name, again, variant))
            mask = (1, *latent[1:])
            for variant, key in enumerate(sample.mask_keys):
                again = partial(encode_mask, path, sample, variant, codec.factor)
                rows.setdefault(key, NeededRow("mask", mask, name, again, variant))
        named = {caption: sample.photo.source for sample in self.dataset.samples for caption in sample.captions}
        for reader, texts in self.texts:
            for text in ["", *texts]:
                name = f"the caption of {named[text]}" if text in named else "a sample prompt" if text else "no caption"
                again = partial(_encode_text, reader, text)
                needed = NeededRow("text", reader.row_shape, name, again)
                rows.setdefault(text_key(text, reader.fingerprint, dtype), needed)
        return rows

    @property
    def files(self) -> set[str]:
        """The files of the run's photographs and masks, by their paths in the dataset."""
        photos = [sample.photo for sample in self.dataset.samples]
        return {photo.file for photo in photos} | {photo.mask for photo in photos if photo.mask}


def _encode_text(reader: CaptionEncoder, text: str) -> np.ndarray:
    return reader.encode([text])[0].detach().to("cpu", torch.float32).numpy()


def open_dataset(
    config: Config,
    base: Base,
    device: torch.device,
    progress: Progress | None = None,
    check: Callable[[Dataset], None] | None = None,
) -> Dataset:
    """Return the run's dataset, after encoding what its cache lacks. The encoders are freed before it returns.

    progress: called with (what is encoded, rows done, total). check: called before anything is encoded, and raises
    UserError to prevent it. Raises UserError as `plan_dataset`.
    """
    plan = plan_dataset(config, base, device)
    try:
        if check is not None:
            check(plan.dataset)
        _fill(plan, config, ENCODE_BATCH_CPU if device.type == "cpu" else ENCODE_BATCH_GPU, progress)
    except BaseException:
        plan.dataset.cache.close()
        raise
    return plan.dataset


def plan_dataset(config: Config, base: Base, device: torch.device, exclusive: bool = False) -> Plan:
    """Return the run's dataset, its cache as it is, and the encoders of its rows. Encodes nothing.

    exclusive: nobody else may use the cache until it is closed. Raises UserError for a dataset that was not prepared,
    or settings that do not fit it, and for one with a link that leads out of its folder.
    """
    path = Path(config.data.path)
    photos = read_manifest(path)
    # the cache is written to, and photographs are read by the manifest's paths
    check_links(path)
    halves = split_validation(photos, config.data.validation_fraction, config.run.seed)
    if not halves[0]:
        raise UserError(f"{path} has {len(photos)} photographs, none left to train on; lower data.validation_fraction")
    codec = load_codec(config, base, device)
    encoder = load_caption_encoder(config, base, device)
    _check_fit(base, codec, encoder)
    placed = placing.place(config, placing.budgets_of(base, config.data, codec.factor), *halves)
    common = {
        "crop_jitter": config.data.crop_jitter,
        "flip_p": config.data.flip_p,
        "seed": config.run.seed,
        "vae_fingerprint": codec.fingerprint,
        "text_fingerprint": encoder.fingerprint,
        "dtype": config.data.cache_dtype,
        "suffix": config.data.caption_suffix,
        "tags": config.data.tags,
    }
    train = plan_samples(placed.train, variants=config.data.variants, **common)
    validation = plan_samples(placed.validation, variants=1, **common)
    if config.loss.mask_weight != 1:
        train, validation = (with_masks(half, codec.factor, config.data.cache_dtype) for half in (train, validation))
    cache = Cache(path / "cache", config.data.cache_dtype, exclusive)
    dataset = Dataset(
        path,
        cache,
        train,
        validation,
        placed,
        empty_text_key(encoder.fingerprint, cache.dtype),
        codec.scaling_factor,
        codec.factor,
        partial(base.family.conditioning, base.config_of("unet")),
        mask_weight=config.loss.mask_weight,
    )
    plan = Plan(dataset, codec, [(encoder, sample_captions(dataset.samples))])
    prompts, negative = dataset.sample_prompts(config), config.sample.negative_prompt
    for num_chunks, places in encoder.group_prompts(prompts, negative).items():
        keys = []
        for text in [*(prompts[place] for place in places), negative]:
            # a prompt without weights shares the row of the same caption
            reader = encoder.reading(has_weights(text), num_chunks)
            plan.texts.append((reader, [text]))
            keys.append(text_key(text, reader.fingerprint, cache.dtype))
        dataset.sampled.append((tuple(places), keys[:-1], keys[-1]))
    return plan


def _fill(plan: Plan, config: Config, batch_size: int, progress: Progress | None) -> None:
    """Encode the rows that are missing from the cache or damaged in it."""
    dataset, (encoder, captions) = plan.dataset, plan.texts[0]
    cache, samples = dataset.cache, dataset.samples
    prompts, negative = dataset.sample_prompts(config), config.sample.negative_prompt

    def report(what: str):
        return None if progress is None else lambda done, total: progress(what, done, total)

    prompt_reader = encoder.reading(weights=True, num_chunks=MAX_CHUNKS)
    dataset.cuts = prompt_reader.cuts([*prompts, negative])
    named_prompts = [("the negative prompt", negative)]
    named_prompts += [(f"sample prompt {number}", prompt) for number, prompt in enumerate(config.sample.prompts, 1)]
    named_captions = sorted((f"a caption of {s.photo.source}", c) for s in dataset.samples for c in s.captions)
    caption_cuts = encoder.cuts(captions)
    dataset.num_cut_captions = len(caption_cuts)
    dataset.cut_notes = [
        f"note: {reader.describe_cuts(named)}"
        for reader, texts, cuts in (
            (prompt_reader, named_prompts, dataset.cuts),
            (encoder, named_captions, caption_cuts),
        )
        # a photograph is named once, in however many orders its tags stand
        if (named := list({name: cuts[text] for name, text in texts if text in cuts}.items()))
    ]
    dataset.length_note = _length_note(encoder, [caption for caption in captions if caption])
    dataset.num_encoded = fill_texts(cache, captions, encoder, 4 * batch_size, report("captions"))
    for reader, texts in plan.texts[1:]:
        dataset.num_encoded += fill_texts(cache, texts, reader, 1)
    dataset.num_encoded += fill_latents(cache, dataset.path, samples, plan.codec, batch_size, report("latents"))
    dataset.num_encoded += fill_masks(cache, dataset.path, samples, plan.codec.factor, report("masks"))
    dataset.num_damaged = cache.num_dropped


def _length_note(encoder: CaptionEncoder, captions: list[str]) -> str:
    """Return a line on how many tokens captions have, '' if there are none."""
    if not captions:
        return ""
    lengths = encoder.lengths(captions)
    num_read = encoder.num_chunks * (encoder.chunk_tokens - 2)
    num_cut = sum(length > num_read for length in lengths)
    cut = f"; {num_cut:,} of them {'is' if num_cut == 1 else 'are'} cut" if num_cut else ""
    return (
        f"captions have {min(lengths)} to {max(lengths)} tokens, half of them up to {round(median(lengths))}; the text "
        f"encoder reads {num_read}{cut}"
    )


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
    if (pooled := base.family.pooled_width(unet)) != encoder.pooled_dim:
        raise UserError(
            f"the UNet takes a pooled text embedding of width {pooled}, the text encoder gives {encoder.pooled_dim}; "
            "use the base's own text encoder"
        )
