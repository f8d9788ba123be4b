"""Features by the run's own autoencoder: what the UNet itself sees of a picture. Always at hand, and rough."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from safelight.trainer.features.extractor import PictureModel, fingerprint_of
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.report.evaluation import OWN_AUTOENCODER

SIDE = 16


def open_latents(codec: LatentCodec) -> PictureModel:
    """Return the extractor of an autoencoder: 16 x 16 latents (the posterior's means, unscaled) of the whole picture.

    Every picture is squashed to one size, as all features have to be of one width.
    """
    side_px = SIDE * codec.factor

    def look(image: Image.Image) -> np.ndarray:
        resized = image.resize((side_px, side_px), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        mean, _ = codec.encode(pixels[None])
        return mean.numpy().ravel()

    width = codec.latent_channels * SIDE**2
    return PictureModel(
        OWN_AUTOENCODER, fingerprint_of(f"latents, version 1, {side_px} px", codec.fingerprint), width, look
    )
