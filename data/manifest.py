"""The manifest of a dataset, DATASET/manifest.jsonl: its photos and their captions, one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from pathlib import Path

from safelight.data.atomic import atomic_write_lines
from safelight.data.photo import Photo, id_of, photo_of_row, row_of_photo
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, sort_key
from safelight.text import storable
from safelight.untrusted import open_regular, parse_json, path_in

MANIFEST_NAME = "manifest.jsonl"
IMAGES_FOLDER = "images"
MASKS_FOLDER = "masks"
# about two million photos
MAX_MANIFEST_BYTES = 2**30
# captions and tags of all photos, each of which takes some 100 bytes of memory: a manifest of that size has fewer
MAX_TEXTS = 2**25
# captions of one photo; a text file beside a photo is read up to 2^20 bytes
MAX_LINE_BYTES = 2**24
# by its name alone a file counts as a photograph here, in a folder that was given in place of a dataset
_PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".tif", ".tiff")
# more files than this are not looked at
_MAX_LOOKED_AT = 5000


def has_manifest(dataset: Path) -> bool:
    """Return whether a folder has a manifest, of whatever kind: `read_manifest` says what is wrong with it."""
    return os.path.lexists(Path(dataset) / MANIFEST_NAME)


def holds_photos(folder: Path) -> bool:
    """Return whether a folder, or one below it, holds photographs, by their names; the first 5,000 are looked at."""
    if not os.path.isdir(folder):
        return False
    num = 0
    for _, folders, files in os.walk(folder):
        if any(name.lower().endswith(_PHOTO_SUFFIXES) for name in files):
            return True
        num += len(folders) + len(files)
        if num > _MAX_LOOKED_AT:
            break
    return False


def how_to_prepare(dataset: Path) -> tuple[str, Path]:
    """Return the command that makes a dataset that does not exist yet, and the folder it writes.

    That is another folder than `dataset` if someone gave a folder of photographs in place of a dataset.
    """
    if not holds_photos(dataset):
        return f"safelight prepare PHOTOS -o {shlex.quote(str(dataset))}", dataset
    place = Path("datasets") / (dataset.resolve().name or "photos")
    if place.resolve().is_relative_to(dataset.resolve()):
        place = dataset.resolve().with_name(f"{dataset.resolve().name}-prepared")
    return f"safelight prepare {shlex.quote(str(dataset))} -o {shlex.quote(str(place))}", place


def read_manifest(dataset: Path, may_be_empty: bool = False) -> list[Photo]:
    """Return the photos of a dataset folder in manifest order.

    Raises UserError if the manifest is missing, no regular file, or outside the folder; if it has a bad line (which the
    message names); or if it lists no photo while may_be_empty is False.
    """
    if Path(dataset).name == MANIFEST_NAME and os.path.isfile(dataset):
        raise UserError(f"{dataset} is the manifest of a dataset; give its folder: {Path(dataset).parent}")
    path = path_in(Path(dataset), MANIFEST_NAME)
    if not has_manifest(dataset):
        command, place = how_to_prepare(Path(dataset))
        if place != Path(dataset):
            raise UserError(
                f"{dataset} holds photographs and is no dataset yet; run `{command}`, then set data.path to {place}"
            )
        raise UserError(f"{path} does not exist; create it with `{command}`")
    photos: list[Photo] = []
    line_of_file: dict[str, int] = {}
    num_texts = 0
    with open_regular(path, MAX_MANIFEST_BYTES) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"is longer than {MAX_LINE_BYTES:,} bytes")
                # other programs write a byte order mark at the start
                photo = photo_of_row(parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")))
                num_texts += len(photo.captions) + len(photo.tags)
                if num_texts > MAX_TEXTS:
                    raise UserError(f"is where the captions and tags become more than {MAX_TEXTS:,}")
                if photo.file in line_of_file:
                    raise UserError(f"{photo.file} is already listed on line {line_of_file[photo.file]}")
            except UserError as error:
                raise UserError(
                    f"{path} line {number}: {error}; fix or delete the line, "
                    "or move the file away and run `safelight prepare` again"
                ) from error
            line_of_file[photo.file] = number
            photos.append(photo)
    if not photos and not may_be_empty:
        raise UserError(
            f"{path} lists no photos; add some with `safelight prepare PHOTOS -o {shlex.quote(str(dataset))}`"
        )
    return photos


def write_manifest(dataset: Path, photos: list[Photo]) -> None:
    """Replace the manifest of a dataset folder atomically."""
    # half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes its JSON escape again
    lines = (storable(json.dumps(row_of_photo(photo), ensure_ascii=False)) for photo in photos)
    atomic_write_lines(Path(dataset) / MANIFEST_NAME, lines)


def split_validation(photos: list[Photo], fraction: float, seed: int) -> tuple[list[Photo], list[Photo]]:
    """Return (train, validation), both in manifest order. Class images are all trained on, and do not count below.

    If fraction > 0, max(1, ceil(fraction * n)) photos are held out, but never all: those with the smallest draws of
    (seed, SPLIT, sample id). Near-copies are held out or trained on together, by the draw of their group's first photo;
    a group too large for what is left to hold out is passed over. If that leaves none, the smallest group is held out.
    Which photos those are does not depend on the order of `photos`.
    Raises ValueError unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction {fraction} is outside 0 <= fraction < 1; use 0.1, or 0 for none")
    if fraction == 0:
        return list(photos), []
    every, photos = photos, [photo for photo in photos if not photo.settings.class_image]
    # ids, not photos: two entries of the same picture are both held out or both trained on
    group_of = {photo.sample_id: photo.sample_id for photo in photos}
    # sorted, so that the order of photos does not matter, should entries of one picture differ in their group
    group_of |= {photo.sample_id: id_of(photo.group) for photo in sorted(photos, key=lambda p: p.group) if photo.group}
    sizes = Counter(group_of.values())
    # rounded before ceil: 0.07 * 100 is 7.000000000000001 and must hold out 7
    num_left = min(max(1, math.ceil(round(fraction * len(photos), 9))), len(group_of) - 1)
    order = sorted(sizes, key=lambda group: (sort_key(Key(seed, Purpose.SPLIT, group)), group))
    held_out = set()
    for group in order:
        if sizes[group] <= num_left:
            held_out.add(group)
            num_left -= sizes[group]
    if not held_out and len(order) > 1:
        held_out.add(min(order, key=sizes.__getitem__))
    held_out = {sample_id for sample_id, group in group_of.items() if group in held_out}
    train = [photo for photo in every if photo.settings.class_image or photo.sample_id not in held_out]
    return train, [photo for photo in photos if photo.sample_id in held_out]
