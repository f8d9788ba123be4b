"""The text encoders as the cache and the sampler use them: captions to embeddings."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.config.schema import MAX_CHUNKS, Config
from safelight.trainer.families.family import Family
from safelight.trainer.models.base import Base
from safelight.trainer.models.embeddings import Embedding, check_distinct, pattern_of, read_ids
from safelight.trainer.models.prompt_weights import (
    VERSION,
    Chunk,
    Span,
    apply_weights,
    escape,
    parse_weights,
    split_chunks,
)
from safelight.trainer.models.weights import fingerprint, load_texts

# characters shown of a text that is cut, before the cut; and how many such texts are named
MAX_END_CHARS, MAX_NAMED_CUTS = 24, 5


@dataclass
class CaptionEncoder:
    """The text encoders of a model, each with its tokenizer.

    tokenizers, text_encoders: one each, in the order of family.text_encoders. The tokenizers cut texts alike and differ
    in their padding. zeroes_empty_text: whether the row of the empty text is all zeros. weights: whether texts are read
    in A1111's syntax (prompt_weights.py). num_chunks: how many chunks of tokens are encoded of every text, each by
    itself; shorter texts are padded with empty chunks. embeddings: words that texts may have besides those of the
    tokenizer.
    """

    family: Family
    tokenizers: tuple
    text_encoders: nn.ModuleList
    device: torch.device
    clip_skip: int = 0
    zeroes_empty_text: bool = False
    weights: bool = False
    num_chunks: int = 1
    embeddings: tuple[Embedding, ...] = ()
    fingerprint: str = field(init=False)

    @classmethod
    def of(
        cls,
        base: Base,
        texts: Sequence[tuple[object, nn.Module]],
        device: torch.device,
        clip_skip: int = 0,
        weights: bool = False,
        num_chunks: int = 1,
    ) -> CaptionEncoder:
        """Return the encoder of a base on a device. texts: as `load_texts` returns them."""
        tokenizers, text_encoders = zip(*texts, strict=True)
        modules = nn.ModuleList(text_encoders)
        return cls(base.family, tokenizers, modules, device, clip_skip, base.zeroes_empty_text, weights, num_chunks)

    def __post_init__(self):
        if self.clip_skip > self.most_clip_skip:
            raise UserError(
                f"model.clip_skip {self.clip_skip} leaves none of the text encoder's layers; use "
                f"{self.most_clip_skip} or less"
            )
        if len({tokenizer.model_max_length for tokenizer in self.tokenizers}) > 1:
            raise UserError("the base's tokenizers read texts of different lengths; use another model.base")
        self.take_fingerprint()
        self.text_encoders.to(self.device)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[Self]:
        """Move the text encoders to `device` inside the block and back afterwards."""
        home = self.device
        self.device = device
        self.text_encoders.to(device)
        try:
            yield self
        finally:
            self.device = home
            self.text_encoders.to(home)
            if device.type == "cuda" and home != device:
                torch.cuda.empty_cache()

    def take_fingerprint(self) -> None:
        """Set the fingerprint to that of the present weights: call it when they have changed."""
        prints = [
            fingerprint(text_encoder, *_facts(tokenizer), str(self.clip_skip))
            for tokenizer, text_encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        self._plain_fingerprint = ", ".join([*prints, *["empty text is zeros"] * self.zeroes_empty_text])
        self._set_fingerprint()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The text encoders by their folders in a model."""
        return dict(zip(self.family.text_encoders, self.text_encoders, strict=True))

    @property
    def family_parts(self) -> tuple[str, ...]:
        """The folders of the text encoders, in their order."""
        return tuple(self.family.text_encoders)

    def move_home(self) -> None:
        """Move the text encoders to host memory for good."""
        self.device = torch.device("cpu")
        self.text_encoders.to(self.device)

    @property
    def tokenizer_fingerprint(self) -> str:
        """A hash of what the token ids of a text depend on."""
        facts = [fact for tokenizer in self.tokenizers for fact in (*_facts(tokenizer), str(tokenizer.pad_token_id))]
        facts.append(str(self.num_chunks))
        facts += [f"embedding {own.name.lower()} of {own.num_vectors}" for own in self.embeddings]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _set_fingerprint(self) -> None:
        self.fingerprint = self._plain_fingerprint
        if self._reads_chunks:
            self.fingerprint += f", chunks {self.num_chunks}, weights {VERSION if self.weights else 'off'}"
        for own in self.embeddings:
            self.fingerprint += f", embedding {own.name.lower()} {own.fingerprint}"

    @property
    def _reads_chunks(self) -> bool:
        return self.weights or self.num_chunks > 1 or bool(self.embeddings)

    def reading(self, weights: bool, num_chunks: int) -> CaptionEncoder:
        """Return an encoder of the same weights that reads texts another way."""
        other = copy.copy(self)
        other.weights, other.num_chunks = weights, num_chunks
        other._set_fingerprint()
        return other

    def knowing(self, embeddings: Iterable[Embedding]) -> CaptionEncoder:
        """Return an encoder of the same weights whose texts may have these words besides those of the tokenizer.

        Raises UserError for two of one name.
        """
        other = copy.copy(self)
        other.embeddings = tuple(embeddings)
        check_distinct(other.embeddings)
        other._set_fingerprint()
        return other

    def for_text(self, *texts: str) -> CaptionEncoder:
        """Return an encoder that knows those of the embeddings that texts name: others change nothing of what it
        returns, and are no part of its fingerprint."""
        return self.knowing(own for own in self.embeddings if own.is_named(*texts))

    @property
    def widths(self) -> dict[str, int]:
        """D of each text encoder, by its folder in a model."""
        return {part: text_encoder.config.hidden_size for part, text_encoder in self.parts.items()}

    def group_prompts(self, prompts: list[str], negative: str) -> dict[int, list[int]]:
        """Return number of chunks -> the places of the prompts that, with the negative one, are encoded as so many.

        A prompt's embeddings therefore do not depend on the other prompts. MAX_CHUNKS at most.
        """
        reader = self.reading(True, MAX_CHUNKS)
        least = len(reader.chunks(negative))
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(min(MAX_CHUNKS, max(least, len(reader.chunks(prompt)))), []).append(place)
        return groups

    @property
    def tokenizer(self):
        """The tokenizer that tells how texts are cut into tokens."""
        return self.tokenizers[0]

    @property
    def most_clip_skip(self) -> int:
        """The largest clip_skip that leaves a layer of every text encoder."""
        layers = min(text_encoder.config.num_hidden_layers for text_encoder in self.text_encoders)
        return layers - 1 - self.family.skipped_layers

    @property
    def chunk_tokens(self) -> int:
        """How many tokens the text encoder reads at a time, start and end included."""
        return self.tokenizer.model_max_length

    @property
    def num_tokens(self) -> int:
        """T of the embeddings of one text."""
        return self.chunk_tokens * self.num_chunks

    @property
    def embedding_dim(self) -> int:
        """D of the embeddings, of all text encoders together."""
        return sum(text_encoder.config.hidden_size for text_encoder in self.text_encoders)

    @property
    def pooled_dim(self) -> int:
        """P of the pooled embedding, 0 if there is none."""
        *_, last = self.text_encoders
        return last.config.projection_dim if hasattr(last, "text_projection") else 0

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of what the cache keeps of one text."""
        return self.family.text_row_shape(self.num_tokens, self.embedding_dim, self.pooled_dim)

    def cuts(self, captions: Iterable[str]) -> dict[str, str]:
        """Return caption -> the end of what is read of it, for captions with more tokens than the encoder reads."""
        captions = list(dict.fromkeys(captions))
        if self._reads_chunks:
            chunks = {caption: self.chunks(caption) for caption in captions}
            return {
                caption: _end_of(self._text_of(found[self.num_chunks - 1].ids))
                for caption, found in chunks.items()
                if len(found) > self.num_chunks
            }
        encoded = self.tokenizer(captions, return_offsets_mapping=True)
        # the first token that is read begins the text and the last one ends it
        return {
            caption: _end_of(caption[: offsets[self.num_tokens - 2][1]])
            for caption, offsets in zip(captions, encoded.offset_mapping, strict=True)
            if len(offsets) > self.num_tokens
        }

    def lengths(self, captions: list[str]) -> list[int]:
        """Return how many tokens each caption has, without start and end, whether they are read or not."""
        if self._reads_chunks:
            return [sum(len(chunk.ids) for chunk in self.chunks(caption)) for caption in captions]
        found = self.tokenizer(captions, add_special_tokens=False, verbose=False).input_ids if captions else []
        return [len(ids) for ids in found]

    def describe_cuts(self, cuts: Iterable[tuple[str, str]]) -> str:
        """Return in one line which texts are cut, and where. cuts: (name of the text, end of what is read), at least
        one."""
        (first, end), *others = cuts
        named = [f"{first} is cut after {end!r}", *(f"{name} after {end!r}" for name, end in others)]
        more = f", and {len(named) - MAX_NAMED_CUTS:,} more" if len(named) > MAX_NAMED_CUTS else ""
        num_read = self.num_chunks * (self.chunk_tokens - 2)
        return f"{', '.join(named[:MAX_NAMED_CUTS])}{more}: the text encoder reads {num_read} tokens"

    def chunks(self, text: str) -> list[Chunk]:
        """Return the tokens of a text in chunks that the encoder reads at a time; at least one."""
        spans = parse_weights(text) if self.weights else [Span(text)]
        commas = self.tokenizer(",", add_special_tokens=False, verbose=False).input_ids
        return split_chunks(spans, self._tokenize, self.chunk_tokens - 2, commas[0] if len(commas) == 1 else None)

    def _tokenize(self, texts: list[str]) -> list[list[int | tuple[int, ...]]]:
        """Return the token ids of texts without start and end; of an embedding a tuple of numbers below zero.

        -1 is the first vector of the first embedding, -2 the next one.
        """
        if not self.embeddings:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        words, first = {}, 1
        for own in self.embeddings:
            words[own.name.lower()] = tuple(-number for number in range(first, first + own.num_vectors))
            first += own.num_vectors
        pattern, found = pattern_of(list(words)), []
        for text in texts:
            ids: list[int | tuple[int, ...]] = []
            names = [match[0].lower() for match in pattern.finditer(text)]
            for number, part in enumerate(pattern.split(text)):
                ids += self.tokenizer(part, add_special_tokens=False, verbose=False).input_ids
                ids += [words[name] for name in names[number : number + 1]]
            found.append(ids)
        return found

    def _text_of(self, ids: list[int]) -> str:
        """Return the text of token ids, and of embeddings their names."""
        numbers = [number for number, own in enumerate(self.embeddings) for _ in range(own.num_vectors)]
        texts: list[str] = []
        for is_own, group in itertools.groupby(ids, lambda token: numbers[-1 - token] if token < 0 else -1):
            texts.append(self.tokenizer.decode(list(group)) if is_own < 0 else self.embeddings[is_own].name)
        return " ".join(texts)

    @property
    def token_shape(self) -> tuple[int, int]:
        """Shape of the token ids of one text: encoders, and the tokens of its chunks after each other."""
        return len(self.tokenizers), self.num_tokens

    def token_ids(self, captions: list[str]) -> Tensor:
        """Return the token ids of each caption as each text encoder reads them, (B, *token_shape), int64.

        Call it of an encoder without weights only: the ids do not tell them.
        """
        chunks = [self.chunks(caption) for caption in captions] if self._reads_chunks else None
        columns = [
            self._plain_ids(tokenizer, captions)
            if chunks is None
            else torch.cat([self._column(place, chunks, number) for number in range(self.num_chunks)], dim=1)
            for place, tokenizer in enumerate(self.tokenizers)
        ]
        return torch.stack(columns, dim=1)

    def _plain_ids(self, tokenizer, captions: list[str]) -> Tensor:
        return tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
        ).input_ids

    def _column(self, place: int, chunks: list[list[Chunk]], number: int) -> Tensor:
        """Return the ids of one chunk of each text. place: of the text encoder that reads them."""
        column = [found[number] if number < len(found) else Chunk() for found in chunks]
        ids = torch.tensor([self._padded(self.tokenizers[place], chunk.ids) for chunk in column])
        # the vectors of embeddings follow the vocabulary
        return torch.where(ids < 0, self.text_encoders[place].config.vocab_size - 1 - ids, ids)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Tensor:
        """Return what the cache keeps of each caption, (B, *row_shape), float32 on the CPU: see family.text_row.

        The chunks of a text follow each other along T. A pooled embedding is that of the first chunk.
        """
        chunks = [self.chunks(caption) for caption in captions] if self._reads_chunks else None
        embeddings, pooled = [], None
        for place, tokenizer in enumerate(self.tokenizers):
            if chunks is None:
                states, pooled = self._read(place, self._plain_ids(tokenizer, captions))
            else:
                states, pooled = self._read_chunks(place, chunks)
            embeddings.append(states)
        rows = self.family.text_row(torch.cat(embeddings, dim=2), pooled)
        if self.zeroes_empty_text:
            rows[[number for number, caption in enumerate(captions) if not caption]] = 0
        return rows

    def _read_chunks(self, place: int, chunks: list[list[Chunk]]) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of texts and the first pooled one; the chunks of each beyond num_chunks are cut."""
        rows, pooled = [], []
        for number in range(self.num_chunks):
            column = [found[number] if number < len(found) else Chunk() for found in chunks]
            embeddings, pooled_BP = self._read(place, self._column(place, chunks, number))
            weights = [[1.0, *chunk.weights, *[1.0] * (self.chunk_tokens - 1 - len(chunk.ids))] for chunk in column]
            rows.append(apply_weights(embeddings, torch.tensor(weights)))
            pooled.append(pooled_BP)
        return torch.cat(rows, dim=1), pooled[0]

    def _padded(self, tokenizer, ids: list[int]) -> list[int]:
        """Return a chunk's ids with start, end and padding, as the tokenizer pads."""
        missing = self.chunk_tokens - 2 - len(ids)
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * missing]

    def _read(self, place: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings and the pooled one of token ids, float32 on the CPU. place: of the text encoder."""
        part = self.family_parts[place]
        own = [one.vectors[part].to(self.device) for one in self.embeddings]
        own_KD = torch.cat(own) if own else None
        text_encoder = self.text_encoders[place]
        states, pooled = read_ids(self.family, text_encoder, ids.to(self.device), self.clip_skip, own_KD)
        return states.float().cpu(), None if pooled is None else pooled.float().cpu()


def _facts(tokenizer) -> tuple[str, str]:
    """Return what a tokenizer's ids depend on."""
    return json.dumps(sorted(tokenizer.get_vocab().items())), str(tokenizer.model_max_length)


def _end_of(text: str) -> str:
    """Return the last words of a text."""
    text = " ".join(text.split())
    if len(text) <= MAX_END_CHARS:
        return text
    end = text[-MAX_END_CHARS:]
    return f"...{end.partition(' ')[2] or end}"


def load_caption_encoder(config: Config, base: Base, device: torch.device) -> CaptionEncoder:
    """Return the run's text encoder on a device, reading texts as the run's captions are read."""
    texts, data = load_texts(base, config.model.tokenizer, config.run.seed), config.data
    clip_skip = config.model.clip_skip
    encoder = CaptionEncoder.of(base, texts, device, clip_skip, data.prompt_weights, data.caption_chunks)
    return encoder.knowing([initial_word(config, encoder)]) if config.trains_word else encoder


def initial_word(config: Config, encoder: CaptionEncoder) -> Embedding:
    """Return the word that a run trains, as it is before training: with the vectors of embedding.initial_text's tokens.

    With fewer tokens than vectors, each token's vector is repeated. Raises UserError if there are more, or none.
    """
    own, vectors = config.embedding, {}
    for tokenizer, (part, text_encoder) in zip(encoder.tokenizers, encoder.parts.items(), strict=True):
        ids = tokenizer(own.initial_text, add_special_tokens=False, verbose=False).input_ids
        if not 1 <= len(ids) <= own.vectors:
            what = "no token" if not ids else f"{len(ids)} tokens, more than embedding.vectors {own.vectors}"
            fix = "give a word" if not ids else f"set embedding.vectors to {len(ids)} or more, or give fewer words"
            raise UserError(f"embedding.initial_text {own.initial_text!r} has {what}; {fix}")
        table = text_encoder.get_input_embeddings().weight
        spread = [ids[place * len(ids) // own.vectors] for place in range(own.vectors)]
        vectors[part] = table[spread].detach().float().cpu().clone()
    return Embedding(own.word, vectors, own.negative)


def prompt_of_caption(config: Config, caption: str) -> str:
    """Return the prompt that is read as the run's captions are."""
    return caption if config.data.prompt_weights else escape(caption)
