"""The autoencoder as the cache and the sampler use it: pixels to latents and back, in fp32 or 16 bits.

In 16 bits it is three times as fast on a T4, and may round too much or overflow, as SDXL's own does in fp16. So a run
compares its first photographs with fp32 before it encodes any (`check_precision`).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.models.base import Base, latent_factor
from safelight.trainer.models.device import PRECISIONS, pick_vae_dtype
from safelight.trainer.models.weights import fingerprint, load_vae
from safelight.units import GIB

# activations of the autoencoder in fp32 per pixel of an image (see LatentCodec.decode)
DECODE_BYTES_PER_PIXEL = 0.75 * GIB / 512**2
# latents along a side of a tile, without those around it that its pixels depend on
TILE_LATENTS = 64
# The most that 16 bits may change. Latents: root mean square, as a part of theirs; a third of the least noise that a
# UNet sees, at the first of Stable Diffusion's timesteps. Log-variances: mean; 5 % of a standard deviation. Pixels:
# root mean square, of 255; what an 8-bit picture can show.
MAX_LATENT_ERROR, MAX_LOGVAR_ERROR, MAX_PIXEL_ERROR = 0.01, 0.1, 1.0
# as diffusers' DiagonalGaussianDistribution clamps them
LOGVAR_RANGE = -30.0, 20.0


@dataclass(frozen=True)
class PrecisionCheck:
    """How far an autoencoder in 16 bits is from itself in fp32; nan for what is not finite.

    latents, logvars, pixels: in the units of the limits above. num_images: on how many.
    """

    precision: str
    latents: float
    logvars: float
    pixels: float
    num_images: int

    @property
    def is_close(self) -> bool:
        """Whether it is within the limits."""
        # a comparison with nan is false
        return self.latents <= MAX_LATENT_ERROR and self.logvars <= MAX_LOGVAR_ERROR and self.pixels <= MAX_PIXEL_ERROR

    def __str__(self) -> str:
        images = f"{self.num_images} photograph{'s' * (self.num_images != 1)}"
        if not math.isfinite(self.latents + self.logvars + self.pixels):
            return f"the autoencoder overflows in {self.precision} (tried on {images})"
        return (
            f"the autoencoder in {self.precision} differs from fp32 by {100 * self.latents:.2g} % in latents "
            f"({100 * MAX_LATENT_ERROR:g} % allowed), by {self.pixels:.2g} of 255 in pixels ({MAX_PIXEL_ERROR:g} "
            f"allowed) and by {self.logvars:.2g} in the logarithm of variances ({MAX_LOGVAR_ERROR:g} allowed), on "
            f"{images}"
        )


@dataclass
class LatentCodec:
    """An autoencoder: encodes pixels to the unscaled posterior, decodes scaled latents to pixels.

    vae: in fp32. dtype: of its arithmetic on the run's device. host_dtype: of its arithmetic on a CPU, where 16 bits
    are slower than fp32 and used only if asked for. fingerprint: a hash of all that latents depend on.
    """

    vae: nn.Module
    device: torch.device
    dtype: torch.dtype = torch.float32
    host_dtype: torch.dtype = torch.float32
    fingerprint: str = field(init=False)

    def __post_init__(self):
        self.fingerprint = fingerprint(self.vae, type(self.vae).__name__)
        if self.dtype != torch.float32:
            # rows in fp32 keep the keys that they have always had
            self.fingerprint += f", {PRECISIONS[self.dtype]}"
        # a copy in 16 bits, made when it is first needed: the weights in fp32 stay as they are
        self._rounded: nn.Module | None = None
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.device = device
        dtype = self.host_dtype if device.type == "cpu" else self.dtype
        if dtype == torch.float32:
            if self._rounded is not None:
                self._rounded.cpu()
            self._working = self.vae.to(device)
        else:
            self.vae.cpu()
            if self._rounded is None:
                self._rounded = copy.deepcopy(self.vae).to(dtype)
            self._working = self._rounded.to(device)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[Self]:
        """Work on `device` inside the block, and where it was afterwards."""
        home = self.device
        if device == home:
            yield self
            return
        self._move(device)
        try:
            yield self
        finally:
            self._move(home)
            if device.type == "cuda":
                torch.cuda.empty_cache()

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

    @property
    def _working_dtype(self) -> torch.dtype:
        return next(self._working.parameters()).dtype

    @torch.inference_mode()
    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (mean, logvar) of unscaled latents, float32 on the CPU; logvar is None if there is no posterior."""
        pixels = pixels_BCHW.to(self.device, self._working_dtype)
        if not self.has_posterior:
            return self._working.encode(pixels).latents.float().cpu(), None
        posterior = self._working.encode(pixels).latent_dist
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W) in [0, 1], float32 on the CPU, from scaled latents.

        An image that overflows in 16 bits is decoded again in fp32.
        """
        latents = latents_BCHW.to(self.device) / self.scaling_factor
        # one image at a time: activations in fp32 are 0.75 GiB for 512 px, and larger batches are no faster
        images = [self._decode_one(latents[i : i + 1].to(self._working_dtype)) for i in range(len(latents))]
        overflown = [i for i, image in enumerate(images) if not image.isfinite().all()]
        if overflown and self._working_dtype != torch.float32 and latents.isfinite().all():
            with self._in_fp32():
                for i in overflown:
                    images[i] = self._decode_one(latents[i : i + 1])
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    @contextlib.contextmanager
    def _in_fp32(self) -> Iterator[None]:
        working, self._working = self._working, self.vae.to(self.device)
        try:
            yield
        finally:
            self._working = working
            self.vae.cpu()

    def check_precision(self, pixels: Sequence[Tensor]) -> PrecisionCheck:
        """Return how 16 bits differ from fp32 on images, each (3, H, W) in [-1, 1], at least one. Works in 16 bits."""
        latents, logvars, shown = [], [], []
        for image in pixels:
            mean, logvar = self.encode(image[None])
            with self._in_fp32():
                exact, exact_logvar = self.encode(image[None])
                exact_shown = self.decode(exact * self.scaling_factor)
            decoded = self._decode_one(exact.to(self.device, self._working_dtype))
            latents.append((mean - exact).pow(2).mean() / exact.pow(2).mean())
            shown.append(((decoded / 2 + 0.5).clamp(0, 1) - exact_shown).pow(2).mean())
            if logvar is not None and exact_logvar is not None:
                logvars.append((logvar.clamp(*LOGVAR_RANGE) - exact_logvar.clamp(*LOGVAR_RANGE)).abs().mean())
        return PrecisionCheck(
            PRECISIONS[self._working_dtype],
            float(torch.stack(latents).mean().sqrt()),
            float(torch.stack(logvars).mean()) if logvars else 0.0,
            255 * float(torch.stack(shown).mean().sqrt()),
            len(pixels),
        )

    def _decode_one(self, latents_1CHW: Tensor) -> Tensor:
        """Return the pixels of one image in [-1, 1], on the CPU: in tiles if it is large and tiles have no seams."""
        height, width = latents_1CHW.shape[2:]
        halo = 0 if self.has_posterior else halo_of(self.vae.config.num_decoder_blocks)
        if not halo or max(height, width) <= TILE_LATENTS + 2 * halo:
            return self._working.decode(latents_1CHW).sample.float().cpu()
        factor, rows = self.factor, []
        for top in range(0, height, TILE_LATENTS):
            row = []
            for left in range(0, width, TILE_LATENTS):
                above, before = min(top, halo), min(left, halo)
                bottom, right = min(top + TILE_LATENTS, height), min(left + TILE_LATENTS, width)
                tile = latents_1CHW[:, :, top - above : bottom + halo, left - before : right + halo]
                pixels = self._working.decode(tile).sample[:, :, above * factor :, before * factor :]
                row.append(pixels[:, :, : (bottom - top) * factor, : (right - left) * factor].float().cpu())
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)


def load_codec(config: Config, base: Base, device: torch.device, runs_on: torch.device | None = None) -> LatentCodec:
    """Return the run's autoencoder on a device. runs_on: the run's device, where it works; None: the same."""
    setting, allows_fp16 = config.model.vae_precision, base.family.vae_allows_fp16
    return LatentCodec(
        load_vae(base, config.model.vae, config.run.seed),
        device,
        pick_vae_dtype(setting, runs_on or device, allows_fp16),
        pick_vae_dtype(setting, torch.device("cpu"), allows_fp16),
    )


def auto_vae_precision(device: torch.device, base: Base) -> str:
    """Return what model.vae_precision auto stands for on a device: fp32 | fp16."""
    return PRECISIONS[pick_vae_dtype("auto", device, base.family.vae_allows_fp16)]


def require_close(check: PrecisionCheck) -> None:
    """Raise UserError if 16 bits change an autoencoder's results too much."""
    if not check.is_close:
        raise UserError(f"model.vae_precision {check.precision}: {check}; set model.vae_precision to fp32")


def halo_of(blocks: Sequence[int]) -> int:
    """Return how many latents around a tile its pixels depend on. blocks: num_decoder_blocks of an AutoencoderTiny.

    Its decoder is convolutions of 3 x 3 alone, so a tile decoded with its halo has the pixels of the whole image. An
    AutoencoderKL's norms and attention see the whole image: tiles of it would differ in tone.
    """
    # three convolutions a block and one behind it; each stage has twice the resolution of the one before
    return 2 + math.ceil(sum((3 * num + 1) / 2**stage for stage, num in enumerate(blocks)))


def decode_bytes(width: int, height: int, weights: int, vae: dict) -> int:
    """Return the bytes that decoding one image needs. width, height: px; weights: bytes of the autoencoder.

    vae: config of the autoencoder, as for `latent_factor`.
    """
    if vae["_class_name"] == "AutoencoderTiny":
        most = (TILE_LATENTS + 2 * halo_of(vae["num_decoder_blocks"])) * latent_factor(vae)
        width, height = min(width, most), min(height, most)
    return weights + round(width * height * DECODE_BYTES_PER_PIXEL)
