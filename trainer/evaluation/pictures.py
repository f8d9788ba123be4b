"""The pictures that an evaluation looks at: those of RUN/compare, and the run's photographs as large as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from safelight.data.buckets import Bucket, crop_box
from safelight.data.cache import decode_photo
from safelight.data.images import RejectedImage, decode
from safelight.data.manifest import read_manifest
from safelight.data.photo import Photo
from safelight.errors import UserError
from safelight.text import shortened
from safelight.trainer.inference.compare import FOLDER, MAX_FILE_BYTES
from safelight.trainer.inference.compared_prompts import dataset_of
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.gallery import read_key
from safelight.trainer.inference.pictures import hash_of
from safelight.trainer.inference.sampling import to_images
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.report.comparison import Comparison
from safelight.untrusted import UnsafeFile, path_in, read_bytes, read_json_object

# photographs that are compared with, evenly chosen from all
MAX_PHOTOGRAPHS = 2000
# part of every photograph's key; raise it when a change makes the same photograph give other pixels
CROP_VERSION = 1


@dataclass(frozen=True)
class Picture:
    """A picture to look at. sha256: stands for its pixels, 64 hex digits. decode: returns it in RGB,
    as large as the others.

    group: what pictures share that are not independent: the prompt, also of the photograph that has it as its caption,
    or else what near-copies of a photograph have in common.
    name: its file in RUN/compare, or the photograph's in the dataset.
    """

    sha256: str
    group: str
    decode: Callable[[], Image.Image]
    name: str = ""


@dataclass(frozen=True)
class Photographs:
    """The run's photographs that are at least as large as the drawn pictures, cropped to their size.

    num_small: photographs that are smaller and left out: enlarged, they would look smoothed out. num_missing: those
    that the run used and the dataset no longer has.
    """

    trained: tuple[Picture, ...]
    held_out: tuple[Picture, ...]
    num_small: int = 0
    num_missing: int = 0

    @property
    def all(self) -> tuple[Picture, ...]:
        return self.trained + self.held_out


def drawn_pictures(run_dir: Path, comparison: Comparison) -> dict[str, list[Picture]]:
    """Return the pictures of each model, in the order of the comparison's rows. Raises UserError for a missing one."""
    folder = run_dir / FOLDER
    return {
        model.id: [drawn_picture(folder, row.images[model.id], row.prompt) for row in comparison.rows]
        for model in comparison.models
    }


def drawn_picture(folder: Path, name: str, prompt: str) -> Picture:
    """Return a picture of a comparison's folder. Raises UserError if it is missing."""
    path = path_in(folder, name)
    key = read_key(path)
    if not key:
        raise UserError(f"{path} is missing or was not drawn by `safelight compare`; run this again")
    return Picture(key, prompt, partial(_decode_drawn, path), name)


def _decode_drawn(path: Path) -> Image.Image:
    try:
        return decode(read_bytes(path, MAX_FILE_BYTES)).image
    except (RejectedImage, UnsafeFile, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and run this again") from None


def photographs(run: OpenRun, width: int, height: int, captions: Mapping[str, str]) -> Photographs:
    """Return the photographs that the run trained on and held out, cropped to a size in px.

    captions: photographs by their hash -> the prompt that they are compared with. Raises UserError if the dataset is
    not there or another one, or the run's list of held-out photographs is damaged.
    """
    dataset, halves, every = _dataset(run)
    large = [photo for photo in every if photo.width >= width and photo.height >= height]
    found = []
    for half in halves:
        photos = [photo for photo in large if photo.file in half]
        step = -(-len(photos) // MAX_PHOTOGRAPHS) or 1
        found.append(tuple(_photograph(dataset, photo, width, height, captions) for photo in photos[::step]))
    used = halves[0] | halves[1]
    num_small = sum(photo.file in used for photo in every) - sum(photo.file in used for photo in large)
    return Photographs(*found, num_small, len(used - {photo.file for photo in every}))


def check_photographs(run: OpenRun) -> None:
    """Raise UserError if `photographs` would, before pictures are drawn to be compared with them."""
    _dataset(run)


def _dataset(run: OpenRun) -> tuple[Path, list[set[str]], list[Photo]]:
    """Return (a run's dataset, the files that it trained on and that it held out, all photographs)."""
    dataset = dataset_of(run, "photographs to compare with")
    try:
        split = read_json_object(path_in(run.run_dir, "split.json"))
        halves = [set(map(str, split[name])) for name in ("train", "validation")]
        if both := sorted(halves[0] & halves[1]):
            raise ValueError(f"it has {shortened(both[0])} as trained on and as held out")
    except (OSError, ValueError, KeyError, TypeError) as error:
        split = run.run_dir / "split.json"
        raise UserError(f"{split} cannot be read ({error}), so it is unknown which photographs were held out") from None
    every = read_manifest(dataset)
    if (used := halves[0] | halves[1]) and used.isdisjoint(photo.file for photo in every):
        raise UserError(
            f"data.path {str(dataset)!r} has none of the photographs that the run used, so it is another dataset; set "
            f"data.path in {run.run_dir / 'config.toml'} to where the run's dataset is now"
        )
    return dataset, halves, every


def _photograph(dataset: Path, photo: Photo, width: int, height: int, captions: Mapping[str, str]) -> Picture:
    key = hash_of({"version": CROP_VERSION, "photo": photo.sha256, "size": [width, height]})
    group = captions.get(photo.sha256) or photo.group or photo.file
    return Picture(key, group, partial(_decode_photograph, dataset, photo, width, height), photo.file)


def _decode_photograph(dataset: Path, photo: Photo, width: int, height: int) -> Image.Image:
    image = decode_photo(dataset, photo)
    box = crop_box(*image.size, Bucket(width, height), None, 0)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def groups_of(pictures: Sequence[Picture]) -> list[str]:
    """Return the group of each picture."""
    return [picture.group for picture in pictures]


def mirrored(picture: Picture) -> Picture:
    """Return a picture's mirror image."""
    return replace(
        picture, sha256=hash_of({"mirrored": picture.sha256}), decode=lambda: ImageOps.mirror(picture.decode())
    )


def reconstructed(picture: Picture, codec: LatentCodec) -> Picture:
    """Return a photograph as the autoencoder gives it back, which no model that draws its latents can surpass."""
    key = hash_of({"reconstructed": picture.sha256, "vae": codec.fingerprint})
    return replace(picture, sha256=key, decode=lambda: _reconstruct(picture.decode(), codec))


def _reconstruct(image: Image.Image, codec: LatentCodec) -> Image.Image:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    mean, _ = codec.encode(pixels)
    return to_images(codec.decode(mean * codec.scaling_factor))[0]
