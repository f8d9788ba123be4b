"""Opens a prepared dataset and fills its cache: all of `safelight cache`, and the first part of `safelight train`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    fill_tokens,
    latent_kind,
    latent_shape,
    plan_samples,
    read_pixels,
    sample_captions,
    text_key,
)
from safelight.data.index import TOKENS
from safelight.data.manifest import Photo, read_manifest
from safelight.data.masks import encode_mask, fill_masks
from safelight.data.samples import photo_captions, token_key, with_masks, with_texts, with_tokens
from safelight.data.shards import Cache
from safelight.data.verify import MAX_BFLOAT16_ROUNDINGS, MAX_ROUNDINGS, NeededRow
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.config.schema import MAX_CHUNKS, Config
from safelight.trainer.distributed.together import together
from safelight.trainer.distributed.world import World
from safelight.trainer.families.conditioning import TextConditioning, TokenConditioning, token_conditioning
from safelight.trainer.inference.class_images import Painter, drawn_photos
from safelight.trainer.inference.pictures import Texts, chunks_of
from safelight.trainer.inference.prompt_file import SampledPicture, SamplePrompt, pictures_of, prompts_of
from safelight.trainer.models import placing
from safelight.trainer.models.base import Base, check_vae
from safelight.trainer.models.class_photos import Drawing, is_class_image, split_photos
from safelight.trainer.models.embeddings import Embedding, open_embeddings
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder, prompt_of_caption
from safelight.trainer.models.latent_codec import LatentCodec, load_codec, require_close
from safelight.trainer.models.prompt_weights import has_weights
from safelight.untrusted import check_links

NUM_EXAMPLES = 12
ENCODE_BATCH_CPU, ENCODE_BATCH_GPU = 8, 4
# photographs on which an autoencoder in 16 bits is compared with fp32
NUM_CHECKED = 3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SampledTexts:
    """The texts of the pictures that a run samples.

    num_chunks: of each picture, in how many chunks its texts are read. keys: the row in the cache of each text as it is
    read in so many chunks. embeddings: words that texts may have and captions may not.
    """

    num_chunks: tuple[int, ...]
    keys: dict[tuple[str, int], str]
    embeddings: tuple[Embedding, ...] = ()

    @classmethod
    def of(
        cls,
        pictures: Sequence[SampledPicture],
        encoder: CaptionEncoder,
        dtype: str,
        embeddings: tuple[Embedding, ...] = (),
    ) -> SampledTexts:
        """Return the texts of pictures with the keys of what an encoder makes of them. dtype: the cache's."""
        requests = [picture.request for picture in pictures]
        reader = encoder.knowing((*encoder.embeddings, *embeddings))
        num_chunks = chunks_of(reader, requests)
        texts = [
            (text, chunks)
            for request, chunks in zip(requests, num_chunks, strict=True)
            for text in (request.prompt, request.negative)
        ]
        keys = {key: text_key(key[0], reader_of(reader, *key).fingerprint, dtype) for key in dict.fromkeys(texts)}
        return cls(tuple(num_chunks), keys, embeddings)

    def read_by(self, encoder: CaptionEncoder) -> list[tuple[CaptionEncoder, str]]:
        """Return each text with what reads it."""
        encoder = encoder.knowing((*encoder.embeddings, *self.embeddings))
        return [(reader_of(encoder, *key), key[0]) for key in self.keys]


def reader_of(encoder: CaptionEncoder, text: str, num_chunks: int) -> CaptionEncoder:
    """Return the encoder that reads a prompt in so many chunks."""
    # a prompt without weights and embeddings shares the row of the same caption
    return encoder.for_text(text).reading(has_weights(text), num_chunks)


@dataclass
class Dataset:
    """Training and held-out samples over one open cache.

    placed: the photographs in their buckets, and those that are left out. empty_key: cache key of the empty caption.
    scaling_factor: what unscaled latents are multiplied by to get unit variance. latent_factor: pixels per latent.
    condition: turns text rows and sizes into the UNet's conditioning, see RowSource.
    num_encoded: rows encoded on opening, of which num_damaged replaced damaged ones. cuts: prompt -> the end of what
    the text encoder reads of it, for prompts that are longer. cut_notes: lines that name what is cut. length_note: a
    line on how long the captions are. num_cut_captions: distinct captions of which the text encoder reads only the
    beginning. vae_note: a line on an autoencoder that encodes in 16 bits, '' in fp32. pictures: what the run samples,
    of prompts; sampled: their texts. mask_weight: loss.mask_weight.
    embeddings: words from files that the sampled prompts may have.
    token_condition: turns token ids and sizes into what the step reads while it trains the text
    encoder, None if captions are embeddings.
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
    vae_note: str = ""
    num_cut_captions: int = 0
    prompts: list[SamplePrompt] = field(default_factory=list)
    pictures: list[SampledPicture] = field(default_factory=list)
    sampled: SampledTexts = field(default_factory=lambda: SampledTexts((), {}))
    embeddings: tuple[Embedding, ...] = ()
    mask_weight: float = 0.0
    token_condition: Callable[[Tensor, Tensor], TokenConditioning] | None = None

    @property
    def samples(self) -> list[Sample]:
        return [*self.train, *self.validation]

    def rows(self, samples: Sequence[Sample]) -> RowSource:
        """Return the source of some samples' cached rows."""
        return RowSource(
            self.cache,
            samples,
            self.empty_key,
            self.token_condition or self.condition,
            has_masks=any(sample.mask_keys for sample in samples),
            has_scales=any(sample.photo.settings.loss_scale != 1 for sample in samples),
            mask_weight=self.mask_weight,
            reads_tokens=self.token_condition is not None,
        )

    def sample_texts(self, encoder: CaptionEncoder | None = None) -> Texts:
        """Return the conditioning of the pictures that the run samples.

        encoder: reads the prompts, with its present weights. None: their rows are in the cache.
        """
        keys, num_chunks = self.sampled.keys, self.sampled.num_chunks
        rows: dict[tuple[str, int], Tensor] = {}
        if encoder is not None:
            encoder = encoder.knowing((*encoder.embeddings, *self.sampled.embeddings))
        for key in keys:
            if encoder is None:
                rows[key] = torch.from_numpy(self.cache.read([keys[key]])).float()[0]
            else:
                rows[key] = reader_of(encoder, *key).encode([key[0]])[0]
        requests = [picture.request for picture in self.pictures]
        return Texts(requests, num_chunks, self.condition, lambda n, text: rows[text, num_chunks[n]])

    def set_prompts(self, config: Config, prompts: Sequence[SamplePrompt], encoder: CaptionEncoder) -> None:
        """Sample other prompts from now on; their texts are not in the cache yet. encoder: reads them.

        Raises UserError, and changes nothing, for a size that does not fit the autoencoder, or too many pictures.
        """
        pictures = pictures_of(config, prompts, self.sample_captions(config), self.latent_factor)
        texts = [text for picture in pictures for text in (picture.request.prompt, picture.request.negative)]
        reader = encoder.knowing((*encoder.embeddings, *self.embeddings))
        self.cuts = reader.reading(weights=True, num_chunks=MAX_CHUNKS).cuts(texts)
        self.prompts, self.pictures = list(prompts), pictures
        self.sampled = SampledTexts.of(pictures, encoder, self.cache.dtype, self.embeddings)

    def read_embeddings(self, encoder: CaptionEncoder, batch_size: int, progress: Progress | None = None) -> None:
        """Encode all captions and prompts by a text encoder that is no longer trained, and read them from now on.

        progress: as for `open_dataset`.
        """
        dtype = self.cache.dtype
        self.train, self.validation = (
            with_texts(half, encoder.fingerprint, dtype) for half in (self.train, self.validation)
        )
        self.empty_key, self.token_condition = empty_text_key(encoder.fingerprint, dtype), None
        self.sampled = SampledTexts.of(self.pictures, encoder, dtype, self.embeddings)
        self.fill_texts(encoder, batch_size, progress)

    def fill_texts(self, encoder: CaptionEncoder, batch_size: int, progress: Progress | None = None) -> None:
        """Store the embeddings of captions and prompts that the cache lacks."""
        report = None if progress is None else partial(progress, "captions")
        self.num_encoded += fill_texts(self.cache, sample_captions(self.samples), encoder, 4 * batch_size, report)
        self.fill_prompts(encoder)

    def fill_prompts(self, encoder: CaptionEncoder) -> None:
        """Store the embeddings of prompts that the cache lacks."""
        for reader, text in self.sampled.read_by(encoder):
            self.num_encoded += fill_texts(self.cache, [text], reader, 1)

    def file_embeddings(self, *texts: str) -> dict[str, str]:
        """Return name -> hash of the embeddings from files that texts name."""
        return {own.name: own.fingerprint for own in self.embeddings if own.is_named(*texts)}

    def sample_prompts(self, config: Config) -> list[SamplePrompt]:
        """Return the prompts to sample during the run: the config's, or captions of the first held-out photographs."""
        named = prompts_of(config)
        if named is not None:
            return list(named)
        return [SamplePrompt(prompt=text) for text in self.sample_captions(config)[: config.sample.num_prompts]]

    def named_prompts(self, config: Config) -> list[tuple[str, str]]:
        """Return (name for messages, text) of the prompts and negative prompts that the settings name."""
        named = [("the negative prompt", config.negative_text)]
        if prompts_of(config) is not None:
            named += [(f"sample prompt {number}", prompt.prompt) for number, prompt in enumerate(self.prompts, 1)]
            named += [
                (f"negative prompt {number}", prompt.negative_prompt)
                for number, prompt in enumerate(self.prompts, 1)
                if prompt.negative_prompt
            ]
        return named

    def sample_captions(self, config: Config) -> list[str]:
        """Return the captions that can be prompts: of the held-out photographs, else of those to train on."""
        captions = [s.captions[0] for s in self.validation or self.train]
        if config.prompt_templates != config.caption_templates:
            # captions as they are, without the negative word that is trained
            photos, data = [s.photo for s in self.validation or self.train], config.data
            captions = [
                own[0] for own in photo_captions(photos, data.tags, config.run.seed, suffix=data.caption_suffix)
            ]
        captions = [prompt_of_caption(config, caption) for caption in captions if caption]
        return list(dict.fromkeys(captions))

    @property
    def trained_photos(self) -> list[Sample]:
        """One sample of each photograph that is trained on, without class images."""
        return [sample for sample in placing.once_each(self.train) if not is_class_image(sample.photo)]

    @property
    def class_images(self) -> list[Sample]:
        """One sample of each class image."""
        return [sample for sample in placing.once_each(self.train) if is_class_image(sample.photo)]

    @property
    def num_captions(self) -> int:
        """Distinct captions of each photograph, added up; without those of class images."""
        return sum(len(set(s.captions)) for s in (*self.trained_photos, *placing.once_each(self.validation)))

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

    encoder: reads captions and prompts.
    """

    dataset: Dataset
    codec: LatentCodec
    encoder: CaptionEncoder

    def rows(self) -> dict[str, NeededRow]:
        """Return every row that the run needs, by its key."""
        codec, dtype, path = self.codec, self.dataset.cache.dtype, self.dataset.path
        rows: dict[str, NeededRow] = {}
        limit = MAX_BFLOAT16_ROUNDINGS if codec.dtype == torch.bfloat16 else MAX_ROUNDINGS
        for sample in self.dataset.samples:
            name, latent = sample.photo.source, latent_shape(codec, sample.bucket)
            for variant, key in enumerate(sample.latent_keys):
                again = partial(encode_latent, path, sample, variant, codec)
                rows.setdefault(key, NeededRow(latent_kind(codec), latent, name, again, variant, limit))
            mask = (1, *latent[1:])
            for variant, key in enumerate(sample.mask_keys):
                again = partial(encode_mask, path, sample, variant, codec.factor)
                rows.setdefault(key, NeededRow("mask", mask, name, again, variant))
        named = {caption: sample.photo.source for sample in self.dataset.samples for caption in sample.captions}

        def name_of(text: str) -> str:
            return f"the caption of {named[text]}" if text in named else "a sample prompt" if text else "no caption"

        captions, encoder = sample_captions(self.dataset.samples), self.encoder
        if self.dataset.token_condition is not None:
            for text in ["", *captions]:
                again = partial(_tokens_of, encoder, text)
                needed = NeededRow(TOKENS, encoder.token_shape, name_of(text), again)
                rows.setdefault(token_key(text, encoder.tokenizer_fingerprint), needed)
            return rows
        prompts = [(reader, [text]) for reader, text in self.dataset.sampled.read_by(encoder)]
        for reader, texts in [(encoder, captions), *prompts]:
            for text in ["", *texts]:
                needed = NeededRow("text", reader.row_shape, name_of(text), partial(_encode_text, reader, text))
                rows.setdefault(text_key(text, reader.fingerprint, dtype), needed)
        return rows

    @property
    def files(self) -> set[str]:
        """The files of the run's photographs and masks, by their paths in the dataset."""
        photos = [sample.photo for sample in self.dataset.samples]
        return {photo.file for photo in photos} | {photo.mask for photo in photos if photo.mask}


def _encode_text(reader: CaptionEncoder, text: str) -> np.ndarray:
    return reader.encode([text])[0].detach().to("cpu", torch.float32).numpy()


def encode_batch_size(device: torch.device) -> int:
    """Return how many images a device encodes at a time; of captions, four times as many."""
    return ENCODE_BATCH_CPU if device.type == "cpu" else ENCODE_BATCH_GPU


def _tokens_of(encoder: CaptionEncoder, text: str) -> np.ndarray:
    return encoder.token_ids([text])[0].numpy()


def open_dataset(
    config: Config,
    base: Base,
    device: torch.device,
    progress: Progress | None = None,
    check: Callable[[Dataset], None] | None = None,
    encoder: CaptionEncoder | None = None,
    reads_tokens: bool | None = None,
    world: World = World(),  # noqa: B008  it is frozen
) -> Dataset:
    """Return the run's dataset, after encoding what its cache lacks. The encoders are freed before it returns.

    progress: called with (what is encoded, rows done, total). check: called before anything is encoded, and raises
    UserError to prevent it. world: whose processes share the work; each has the whole dataset then, and the numbers of
    rows that all have encoded. Raises UserError and takes encoder and reads_tokens as `plan_dataset`.
    """
    group, checker = _sharers(world, Path(config.data.path))
    with together(world) as others:

        def report(what: str, done: int, total: int) -> None:
            others.check()
            if progress is not None:
                progress(what, done, total)

        plan = plan_dataset(
            config,
            base,
            device,
            encoder=encoder,
            reads_tokens=reads_tokens,
            draws_class_images=True,
            progress=report,
        )
        try:
            if check is not None:
                check(plan.dataset)
            plan.dataset.cache.checker, plan.dataset.cache.num_checkers = checker, len(group)
            _fill(plan, config, encode_batch_size(device), report)
        except BaseException:
            plan.dataset.cache.close()
            raise
    dataset = plan.dataset
    counts = world.gather([dataset.num_encoded, dataset.num_damaged, list(group)])
    dataset.num_encoded = sum(num for num, _, _ in counts)
    # machines that share a folder may have found the same rows
    dataset.num_damaged = max(sum(counts[rank][1] for rank in ranks) for _, _, ranks in counts)
    return dataset


def _sharers(world: World, path: Path) -> tuple[tuple[int, ...], int]:
    """Return the ranks of this machine's processes that have the same dataset folder, and this one's place among them.

    Other machines may have a copy of it, with a cache of their own.
    """
    if world.size == 1:
        return (0,), 0
    mine = [world.peers[world.rank].place]
    with suppress(OSError):
        found = path.stat()
        mine += [found.st_dev, found.st_ino]
    everyone = world.gather(mine)
    ranks = tuple(rank for rank, theirs in enumerate(everyone) if theirs == mine)
    return ranks, ranks.index(world.rank)


def plan_dataset(
    config: Config,
    base: Base,
    device: torch.device,
    exclusive: bool = False,
    encoder: CaptionEncoder | None = None,
    reads_tokens: bool | None = None,
    draws_class_images: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Return the run's dataset, its cache as it is, and the encoders of its rows. Encodes nothing.

    draws_class_images: draw the class images that are missing, and tell progress; else, leave them out. exclusive:
    nobody else may use the cache until it is closed. encoder: reads the texts, None for the base's.
    reads_tokens: whether captions are token ids; None: as a run begins. Raises UserError for a dataset that was not
    prepared, or settings that do not fit it, and for one with a link that leads out of its folder.
    """
    path = Path(config.data.path)
    photos = read_manifest(path)
    # the cache is written to, and photographs are read by the manifest's paths
    check_links(path)
    check_vae(base, config.model.vae)
    codec = load_codec(config, base, device)
    # an encoder that is given has been trained, and class images are the base's
    own_encoder = None if encoder is not None else load_caption_encoder(config, base, device)
    encoder = encoder or own_encoder
    _check_fit(config, base, codec, encoder)
    budgets = placing.budgets_of(base, config.data, codec.factor)
    painter = Painter(config, base, device, codec, own_encoder, progress)
    common = {
        "crop_jitter": config.data.crop_jitter,
        "flip_p": config.data.flip_p,
        "seed": config.run.seed,
        "vae_fingerprint": codec.fingerprint,
        "text_fingerprint": encoder.fingerprint,
        "dtype": config.data.cache_dtype,
        "suffix": config.data.caption_suffix,
        "tags": config.data.tags,
        "templates": config.caption_templates,
    }

    def drawn(drawings: list[Drawing]) -> list[Photo]:
        if draws_class_images:
            # the autoencoder decodes them before it encodes anything
            own, _ = split_photos(config, budgets, photos, lambda drawings: [])
            _check_codec(codec, path, plan_samples(placing.place(config, budgets, own, ()).train, variants=1, **common))
        return drawn_photos(painter, draws_class_images, drawings)

    halves = split_photos(config, budgets, photos, drawn)
    if all(is_class_image(photo) for photo in halves[0]):
        raise UserError(f"{path} has {len(photos)} photographs, none left to train on; lower data.validation_fraction")
    placed = placing.place(config, budgets, *halves)
    train = plan_samples(placed.train, variants=config.data.variants, **common)
    validation = plan_samples(placed.validation, variants=1, **common)
    if config.loss.mask_weight != 1:
        train, validation = (with_masks(half, codec.factor, config.data.cache_dtype) for half in (train, validation))
    _check_named(encoder, (*train, *validation))
    empty_key, token_condition = empty_text_key(encoder.fingerprint, config.data.cache_dtype), None
    if config.reads_captions_in_step:
        train, validation = (with_tokens(half, encoder.tokenizer_fingerprint) for half in (train, validation))
        if reads_tokens is not False:
            empty_key = token_key("", encoder.tokenizer_fingerprint)
            num_own = sum(own.num_vectors for own in encoder.embeddings)
            num_ids = [one.config.vocab_size + num_own for one in encoder.text_encoders]
            token_condition = partial(token_conditioning, num_ids)
    cache = Cache(path / "cache", config.data.cache_dtype, exclusive)
    dataset = Dataset(
        path,
        cache,
        train,
        validation,
        placed,
        empty_key,
        codec.scaling_factor,
        codec.factor,
        partial(base.family.conditioning, base.config_of("unet")),
        mask_weight=config.loss.mask_weight,
        token_condition=token_condition,
    )
    dataset.embeddings = open_embeddings(config.sample.embeddings, encoder.widths, "sample.embeddings")
    dataset.set_prompts(config, dataset.sample_prompts(config), encoder)
    return Plan(dataset, codec, encoder)


def _check_named(encoder: CaptionEncoder, samples: Sequence[Sample]) -> None:
    """Raise UserError unless a caption has the word that the run trains, the only one that captions are read with."""
    for word in encoder.embeddings:
        if not word.is_named(*sample_captions(samples)):
            raise UserError(
                f"no caption has the word {word.name!r} that is to be trained; put {{word}} into embedding.templates, "
                "or the word into the captions"
            )


def _fill(plan: Plan, config: Config, batch_size: int, progress: Progress | None) -> None:
    """Encode the rows that are missing from the cache or damaged in it."""
    dataset, encoder = plan.dataset, plan.encoder
    cache, samples = dataset.cache, dataset.samples
    captions = sample_captions(samples)

    def report(what: str):
        return None if progress is None else lambda done, total: progress(what, done, total)

    prompt_reader = encoder.knowing((*encoder.embeddings, *dataset.embeddings)).reading(True, MAX_CHUNKS)
    named_prompts = dataset.named_prompts(config)
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
    if dataset.token_condition is None:
        dataset.fill_texts(encoder, batch_size, progress)
    else:
        dataset.num_encoded += fill_tokens(cache, captions, encoder, 4 * batch_size)
    dataset.vae_note = _check_codec(plan.codec, dataset.path, samples)
    dataset.num_encoded += fill_latents(cache, dataset.path, samples, plan.codec, batch_size, report("latents"))
    dataset.num_encoded += fill_masks(cache, dataset.path, samples, plan.codec.factor, report("masks"))
    dataset.num_damaged = cache.num_dropped


def _check_codec(codec: LatentCodec, path: Path, samples: Sequence[Sample]) -> str:
    """Compare an autoencoder in 16 bits with fp32 on the first photographs; return a line on it, '' in fp32.

    Raises UserError if it rounds too much.
    """
    if codec.dtype == torch.float32:
        return ""
    checked = codec.check_precision([read_pixels(path, sample) for sample in samples[:NUM_CHECKED]])
    require_close(checked)
    return str(checked)


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


def _check_fit(config: Config, base: Base, codec: LatentCodec, encoder: CaptionEncoder) -> None:
    unet = base.config_of("unet")
    if unet["in_channels"] != codec.latent_channels:
        named = f"model.vae {config.model.vae!r}" if config.model.vae else f"the autoencoder of {base.setting}"
        raise UserError(
            f"{named} makes latents of {codec.latent_channels} channels, and the UNet of {base.setting} takes "
            f"{unet['in_channels']}; set model.vae to an autoencoder that makes as many"
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
