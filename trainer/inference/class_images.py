"""Draws the class images that a run needs and its dataset lacks, with the base as it is before training.

Each picture is a file of DATASET/class_images/RECIPE/, written at once and complete, and its noise is keyed by the
run's seed and its number. So a run that was killed goes on with the next picture, and gets the ones it would have got;
another run with the same base, seed and prompt uses them again. Pictures are drawn one at a time: how many are missing
must not change how any of them is rounded. Several processes share them by claims, as they share a cache.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from safelight.data.atomic import atomic_write_bytes
from safelight.data.claims import Claims, Patience
from safelight.data.photo import Photo
from safelight.errors import UserError
from safelight.kernels.unet.attention import apply_attention, attention_cases, choose_attention
from safelight.trainer.config.schema import Config
from safelight.trainer.families.family import uncropped_sizes
from safelight.trainer.inference.sampling import NotFinitePicture, Settings, generate
from safelight.trainer.models.base import Base, vae_bytes, vae_config
from safelight.trainer.models.class_photos import (
    Drawing,
    drawn_file,
    drawn_photo,
    missing_drawings,
    recipe,
)
from safelight.trainer.models.device import pick_dtype
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder
from safelight.trainer.models.latent_codec import LatentCodec, decode_bytes
from safelight.trainer.models.weights import load_unet, unet_fingerprint
from safelight.untrusted import path_in, read_bytes

# of any size; a picture of 4096 x 4096 px has 48 MiB without compression
MAX_PICTURE_BYTES = 2**26
SAMPLER = "ddim"


@dataclass(frozen=True)
class Painter:
    """What draws class images. encoder: the base's, None to load it. progress: called with (what, done, total)."""

    config: Config
    base: Base
    device: torch.device
    codec: LatentCodec
    encoder: CaptionEncoder | None
    progress: Callable[[str, int, int], None] | None = None


def drawn_photos(painter: Painter, draws_missing: bool, drawings: list[Drawing]) -> list[Photo]:
    """Return the photos of drawn pictures, after drawing those that are missing; else, of those that exist.

    Raises UserError if the base cannot draw them.
    """
    config, dataset = painter.config, Path(painter.config.data.path)
    folder = recipe(config, unet_fingerprint(painter.base, config.run.seed), painter.codec.fingerprint)
    if draws_missing and (missing := missing_drawings(dataset, folder, drawings)):
        _draw(painter, dataset, folder, missing)
    absent = set(missing_drawings(dataset, folder, drawings))
    photos = []
    for drawing in drawings:
        if drawing not in absent:
            content = read_bytes(path_in(dataset, drawn_file(folder, drawing)), MAX_PICTURE_BYTES)
            photos.append(drawn_photo(config, folder, drawing, hashlib.sha256(content).hexdigest()))
    return photos


def _draw(painter: Painter, dataset: Path, folder: str, missing: Sequence[Drawing]) -> None:
    config, base, device, prior = painter.config, painter.base, painter.device, painter.config.prior
    encoder = painter.encoder or load_caption_encoder(config, base, device)
    rows = encoder.encode([prior.prompt, prior.negative_prompt])
    condition = partial(base.family.conditioning, base.config_of("unet"))
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)
    dtype = pick_dtype(config.model.precision, device)
    try:
        unet = load_unet(base, config.run.seed, dtype).to(device).eval().requires_grad_(False)
        side = config.data.max_resolution // painter.codec.factor
        apply_attention(unet, choose_attention(device, dtype, attention_cases(unet, (side, side))))
        for drawing in _shared(dataset, folder, missing, painter.progress):
            width, height, place = drawing
            both = condition(rows, uncropped_sizes(2, height, width))
            (image,) = generate(
                unet,
                painter.codec,
                both[slice(0, 1)],
                both[slice(1, 2)],
                schedule.to(device),
                Settings(width, height, prior.steps, prior.cfg, config.run.seed, SAMPLER),
                places=[place],
                batch_size=1,
                decode_on=_decode_on(painter, width, height),
            )
            content = io.BytesIO()
            image.save(content, "PNG")
            atomic_write_bytes(dataset / drawn_file(folder, drawing), content.getvalue())
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU has too little memory to draw class images with the base; close other programs that use it, or "
            "add class images to the dataset, as photographs that say class_image, and set prior.prompt to ''"
        ) from None
    except NotFinitePicture:
        raise UserError(
            f"the base {config.model.base} draws no picture of prior.prompt {prior.prompt!r}, but values that are not "
            "finite: set model.precision to bf16 or fp32, or use another model.base"
        ) from None


def _shared(
    dataset: Path, folder: str, missing: Sequence[Drawing], progress: Callable[[str, int, int], None] | None
) -> Iterator[Drawing]:
    """Yield each missing picture that is for this process to draw; at the end there are all, also those of others."""
    place = (dataset / drawn_file(folder, missing[0])).parent
    place.mkdir(parents=True, exist_ok=True)
    left, patience = list(missing), Patience()
    with Claims(place) as claims:
        while left:
            for drawing in left:
                name = drawn_file(folder, drawing)
                if not claims.take(name) and not patience.is_over:
                    continue
                # another process may have drawn it meanwhile
                if missing_drawings(dataset, folder, [drawing]):
                    yield drawing
                claims.give_up(name)
                if progress is not None:
                    progress(
                        "class images", len(missing) - len(missing_drawings(dataset, folder, missing)), len(missing)
                    )
            if left := missing_drawings(dataset, folder, left):
                patience.wait(len(left))


def _decode_on(painter: Painter, width: int, height: int) -> torch.device:
    """Return the device to decode a picture on: the CPU if the GPU has too little free memory."""
    if painter.device.type != "cuda":
        return painter.device
    vae = painter.config.model.vae
    needed = decode_bytes(width, height, vae_bytes(painter.base, vae), vae_config(painter.base, vae))
    cached = torch.cuda.memory_reserved(painter.device) - torch.cuda.memory_allocated(painter.device)
    free = torch.cuda.mem_get_info(painter.device)[0] + cached
    return painter.device if needed < free else torch.device("cpu")
