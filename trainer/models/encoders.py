"""The frozen encoders, as the cache and the sampler use them: pixels to latents and back, captions to embeddings."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.models.base import Base
from safelight.trainer.models.weights import fingerprint, load_text, load_vae
from safelight.units import GIB

# activations of the autoencoder in fp32 per pixel of an image (see LatentCodec.decode)
DECODE_BYTES_PER_PIXEL = 0.75 * GIB / 512**2


# characters shown of a text that is cut, before the cut; and how many such texts are named
MAX_END_CHARS, MAX_NAMED_CUTS = 24, 5


class _Movable:
    """Wrapper of a frozen module that can work on another device temporarily."""

    module_name: str
    device: torch.device

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[Self]:
        """Move the module to `device` inside the block and back afterwards."""
        home, module = self.device, getattr(self, self.module_name)
        self.device = device
        module.to(device)
        try:
            yield self
        finally:
            self.device = home
            module.to(home)
            if device.type == "cuda" and home != device:
                torch.cuda.empty_cache()


@dataclass
class LatentCodec(_Movable):
    """An autoencoder: encodes pixels to the unscaled posterior, decodes scaled latents to pixels."""

    module_name = "vae"
    vae: nn.Module
    device: torch.device
    fingerprint: str = field(init=False)

    def __post_init__(self):
        self.fingerprint = fingerprint(self.vae, type(self.vae).__name__)
        self.vae.to(self.device)

    @property
    def has_posterior(self) -> bool:
        return hasattr(self.vae, "quant_conv")

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """How many pixels one latent covers along each side."""
        channels = self.vae.config.get("block_out_channels") or self.vae.config.encoder_block_out_channels
        return 2 ** (len(channels) - 1)

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)

    @torch.inference_mode()
    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (mean, logvar) of unscaled latents, float32 on the CPU; logvar is None if there is no posterior."""
        pixels = pixels_BCHW.to(self.device, next(self.vae.parameters()).dtype)
        if not self.has_posterior:
            return self.vae.encode(pixels).latents.float().cpu(), None
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W) in [0, 1], float32 on the CPU, from scaled latents."""
        latents = latents_BCHW.to(self.device, next(self.vae.parameters()).dtype) / self.scaling_factor
        # one image at a time: activations in fp32 are 0.75 GiB for 512 px, and larger batches are no faster
        images = [self.vae.decode(latents[i : i + 1]).sample.float().cpu() for i in range(len(latents))]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


@dataclass
class CaptionEncoder(_Movable):
    """A frozen CLIP text encoder and its tokenizer."""

    module_name = "text_encoder"
    tokenizer: object
    text_encoder: nn.Module
    device: torch.device
    clip_skip: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self):
        layers = self.text_encoder.config.num_hidden_layers
        if self.clip_skip >= layers:
            raise UserError(
                f"model.clip_skip {self.clip_skip} leaves none of the text encoder's {layers} layers; "
                f"use {layers - 1} or less"
            )
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        self.fingerprint = fingerprint(self.text_encoder, vocabulary, str(self.num_tokens), str(self.clip_skip))
        self.text_encoder.to(self.device)

    @property
    def num_tokens(self) -> int:
        return self.tokenizer.model_max_length

    @property
    def embedding_dim(self) -> int:
        return self.text_encoder.config.hidden_size

    def cuts(self, captions: Iterable[str]) -> dict[str, str]:
        """Return caption -> the end of what is read of it, for captions with more tokens than the encoder reads."""
        captions = list(dict.fromkeys(captions))
        encoded = self.tokenizer(captions, return_offsets_mapping=True)
        # the first token that is read begins the text and the last one ends it
        return {
            caption: _end_of(caption[: offsets[self.num_tokens - 2][1]])
            for caption, offsets in zip(captions, encoded.offset_mapping, strict=True)
            if len(offsets) > self.num_tokens
        }

    def describe_cuts(self, cuts: Iterable[tuple[str, str]]) -> str:
        """Return in one line which texts are cut, and where. cuts: (name of the text, end of what is read), at least
        one."""
        (first, end), *others = cuts
        named = [f"{first} is cut after {end!r}", *(f"{name} after {end!r}" for name, end in others)]
        more = f", and {len(named) - MAX_NAMED_CUTS:,} more" if len(named) > MAX_NAMED_CUTS else ""
        return f"{', '.join(named[:MAX_NAMED_CUTS])}{more}: the text encoder reads {self.num_tokens - 2} tokens"

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Tensor:
        """Return embeddings (B, T, D), float32 on the CPU: the last hidden state, after the final layer norm.

        With clip_skip it is the hidden state of that many layers before, after the same norm.
        """
        ids = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
        ).input_ids
        output = self.text_encoder(ids.to(self.device), output_hidden_states=self.clip_skip > 0)
        if self.clip_skip == 0:
            return output.last_hidden_state.float().cpu()
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        return inner.final_layer_norm(output.hidden_states[-1 - self.clip_skip]).float().cpu()


def _end_of(text: str) -> str:
    """Return the last words of a text."""
    text = " ".join(text.split())
    if len(text) <= MAX_END_CHARS:
        return text
    end = text[-MAX_END_CHARS:]
    return f"...{end.partition(' ')[2] or end}"


def load_codec(config: Config, base: Base, device: torch.device) -> LatentCodec:
    """Return the run's autoencoder on a device."""
    return LatentCodec(load_vae(base, config.model.vae, config.run.seed), device)


def load_caption_encoder(config: Config, base: Base, device: torch.device) -> CaptionEncoder:
    """Return the run's text encoder on a device."""
    tokenizer, text_encoder = load_text(base, config.model.tokenizer, config.run.seed)
    return CaptionEncoder(tokenizer, text_encoder, device, config.model.clip_skip)


def decode_bytes(width: int, height: int, weights: int) -> int:
    """Return the bytes that decoding one image needs. width, height: px; weights: bytes of the autoencoder."""
    return weights + round(width * height * DECODE_BYTES_PER_PIXEL)
