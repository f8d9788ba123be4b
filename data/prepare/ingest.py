"""`safelight prepare`: turn folders of photos into a dataset folder.

It holds images/, masks/ and manifest.jsonl; rejected.jsonl, which lists what was left out; prepare_notes.txt, with
what else there is to say; and sources.json, which tells where the photos came from.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, ImageColor

from safelight.data.atomic import atomic_write_bytes, atomic_write_lines
from safelight.data.images import (
    COPYABLE_FORMATS,
    MIN_SIDE_PX,
    WHITE,
    Backdrop,
    Decoded,
    RejectedImage,
    decode_file,
    decode_mask,
    encode,
    read_file,
    upright_size,
)
from safelight.data.lock import FolderLock
from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME, MASKS_FOLDER, write_manifest
from safelight.data.photo import Photo
from safelight.data.prepare.collection import (
    Collection,
    IngestSummary,
    NoPhotograph,
    Note,
    PreparedFile,
    has_written_caption,
    with_caption,
)
from safelight.data.prepare.near_copies import find_near_copies, fingerprint, merge_groups, same_picture, thumbnail
from safelight.data.prepare.quality import doubtful, measure
from safelight.data.sources.caption import Caption, Rejection
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.packed import PackedPicture
from safelight.data.sources.roots import SOURCES_NAME, SourceFile, files_of, find_files, split_label, write_sources
from safelight.data.sources.unsplash import Fetched
from safelight.errors import UserError
from safelight.text import storable
from safelight.untrusted import check_kinds, parse_json, path_in, read_lines

REJECTED_NAME = "rejected.jsonl"
NOTES_NAME = "prepare_notes.txt"
# stored photos are read this small to compare them
THUMBNAIL_MEGAPIXELS = 0.02
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
ADVICE = "choose another dataset folder with -o"
# beyond this aspect ratio even the widest usual bucket, 4 : 1, shows less than half of a photo
MAX_SEEN_ASPECT = 8
MIN_MEGAPIXELS = 0.01
MAX_REJECTIONS_BYTES = 2**30
# the value of --alpha that keeps transparency as a loss mask
ALPHA_IS_MASK = "mask"
# between the channels of a grey picture, of 255: JPEG rounds
MAX_GREY_SPREAD = 8
# threads that sync stored files while the next photos are decoded: syncing one by one took half of the total time
NUM_SYNC_THREADS = 4


def _sizes(decoded: Decoded) -> str:
    """Return the size of a picture, and what it was shrunk to, in words."""
    full, shrunk = (f"{width} x {height} px" for width, height in (decoded.full_size, decoded.image.size))
    return f"{full}, shrunk to {shrunk}" if decoded.is_shrunk else full


def _encode(decoded: Decoded, image_format: str, quality: int) -> tuple[bytes, str]:
    """Return what `encode` does. The reason against it names the picture's size."""
    try:
        return encode(decoded.image, image_format, quality)
    except RejectedImage as error:
        raise RejectedImage(f"{_sizes(decoded)}: {error}") from error


def backdrop_of(alpha: str) -> Backdrop:
    """Return the colour that transparency is composited over. alpha: a colour, or `mask`. Raises UserError."""
    if alpha == ALPHA_IS_MASK:
        return WHITE
    try:
        red, green, blue = ImageColor.getrgb(alpha)
    except ValueError:
        raise UserError(f"alpha {alpha!r} is neither a colour nor mask; use white, black, '#808080' or mask") from None
    return red, green, blue


def _is_same_shape(size: tuple[int, int], full_size: tuple[int, int]) -> bool:
    """Return whether a picture may be another one at its size: it may be off by half a pixel along each side."""
    (width, height), (full_width, full_height) = size, full_size
    return abs(width * full_height - height * full_width) <= max(full_width, full_height)


def _read_mask(path: Path | PackedPicture, decoded: Decoded, stop: threading.Event) -> Image.Image:
    """Return the mask file of a decoded photo at the size that the photo is stored at."""
    try:
        mask = decode_mask(read_file(path), stop)
    except RejectedImage as error:
        raise RejectedImage(f"its mask {path.name} cannot be used: {error}; mend or delete it") from error
    (width, height), (full_width, full_height) = mask.size, decoded.full_size
    if not _is_same_shape(mask.size, decoded.full_size):
        raise RejectedImage(
            f"its mask {path.name} is {width} x {height} px, and the upright photo {full_width} x {full_height} px; "
            "give both the same size, or delete the mask"
        )
    return mask.resize(decoded.image.size, Image.Resampling.BOX)


def _is_mask_of(decoded: Decoded, photo: Path | PackedPicture) -> bool:
    """Return whether a picture, named as the mask of a photo, looks like one: grey, and of the photo's shape.

    The shape may be that of the photo before it was turned upright.
    """
    channels = np.asarray(decoded.image, dtype=np.int16)
    if np.ptp(channels, axis=2).max() > MAX_GREY_SPREAD:
        return False
    try:
        width, height = upright_size(read_file(photo))
    except RejectedImage:
        return False
    return any(_is_same_shape(decoded.full_size, size) for size in ((width, height), (height, width)))


def _like_a_mask(masked: Path) -> NoPhotograph:
    """Return the reason against a picture that looks like the mask of a file."""
    return NoPhotograph(
        f"looks like the mask of {masked.name}; to have it read as one, save it beside that as {masked.stem}-mask.png; "
        "if it is a photograph itself, rename it"
    )


def _encode_mask(mask: Image.Image) -> bytes:
    content = io.BytesIO()
    mask.save(content, "PNG")
    return content.getvalue()


@dataclass(frozen=True)
class _Form:
    """In what form photos are stored: the arguments of `ingest` by the same names."""

    max_megapixels: float
    image_format: str
    quality: int
    alpha: str


def _prepare(file: SourceFile, form: _Form, stop: threading.Event) -> PreparedFile | str:
    """Return the file as it will be stored, or the reason why it cannot be used. stop: see `decode`."""
    mask_path, masked = file.mask, file.may_mask
    try:
        content, decoded = decode_file(file.picture, form.max_megapixels, stop, backdrop_of(form.alpha))
        if masked is not None and _is_mask_of(decoded, file.reader.picture(masked)):
            return _like_a_mask(masked)
        width, height = decoded.image.size
        if min(width, height) < MIN_SIDE_PX:
            raise RejectedImage(
                f"{_sizes(decoded)} is too narrow; each side needs at least {MIN_SIDE_PX} px: crop it, or raise "
                "--max-megapixels"
            )
        if decoded.is_copyable:
            data, suffix = content, COPYABLE_FORMATS[decoded.format]
        else:
            data, suffix = _encode(decoded, form.image_format, form.quality)
        mask = decoded.alpha if form.alpha == ALPHA_IS_MASK else None
        if mask_path is not None:
            mask = _read_mask(mask_path, decoded, stop)
    except RejectedImage as error:
        return str(error)
    warnings = [decoded.warning] if decoded.warning else []
    if max(width, height) > MAX_SEEN_ASPECT * min(width, height):
        warnings.append(f"{_sizes(decoded)} is so long and narrow that training crops away more than half of it")
    if mask is not None and mask.getextrema()[1] == 0:
        warnings.append("its mask is black everywhere, so that nothing of it is learned")
    return PreparedFile(
        data,
        suffix,
        *decoded.image.size,
        origin_sha256=hashlib.sha256(content).hexdigest(),
        content_sha256=decoded.content_sha256,
        is_shrunk=decoded.is_shrunk,
        is_copied=decoded.is_copyable,
        warning="; ".join(warnings),
        fingerprint=fingerprint(decoded.image),
        quality=measure(decoded.image),
        mask=b"" if mask is None else _encode_mask(mask),
        is_transparent=decoded.alpha is not None,
    )


def _in_order(function: Callable, items: list) -> Iterable:
    """Yield function(item, stop) for each item in order. stop: an event, set when no more results are wanted.

    Threads compute results ahead of the consumer, but only a few: each holds a whole image.
    """
    stop = threading.Event()
    num_workers = os.cpu_count() or 1
    executor = ThreadPoolExecutor(num_workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item, stop))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _stored_image(dataset: Path, photo: Photo, max_megapixels: float | None) -> Image.Image | None:
    """Return a stored photo, shrunk, or None if it cannot be read."""
    try:
        return decode_file(dataset / photo.file, max_megapixels)[1].image
    except RejectedImage:
        return None


def _thumbnail(dataset: Path, photo: Photo) -> np.ndarray | None:
    """Return the thumbnail of a stored photo, or None if it cannot be read."""
    image = _stored_image(dataset, photo, THUMBNAIL_MEGAPIXELS)
    return None if image is None else thumbnail(image)


def _measured(dataset: Path, photos: list[Photo]) -> list[Photo]:
    """Return the photos with what earlier versions did not measure: fingerprints and quality."""

    def fill(photo: Photo, stop: threading.Event) -> Photo:
        image = _stored_image(dataset, photo, None)
        if image is None:
            return photo
        return replace(
            photo, fingerprint=photo.fingerprint or fingerprint(image), quality=photo.quality or measure(image)
        )

    missing = [index for index, photo in enumerate(photos) if not photo.fingerprint or photo.quality is None]
    photos = list(photos)
    for index, photo in zip(missing, _in_order(fill, [photos[index] for index in missing]), strict=True):
        photos[index] = photo
    return photos


def _group_near_copies(dataset: Path, photos: list[Photo], compared: set[str], summary: IngestSummary) -> list[Photo]:
    """Return the photos, near-copies with a common group.

    compared: sha256 of the photos that were compared with each other in earlier calls.
    """

    pairs = find_near_copies(
        [photo.fingerprint for photo in photos],
        [photo.width / photo.height for photo in photos],
        [photo.sha256 not in compared for photo in photos],
        lambda index: _thumbnail(dataset, photos[index]),
        dataset,
    )
    groups = merge_groups([photo.group for photo in photos], [photo.sha256 for photo in photos], pairs)
    photos = [
        replace(photo, group=group) if photo.group != group else photo
        for photo, group in zip(photos, groups, strict=True)
    ]
    members: dict[str, list[Photo]] = {}
    for photo in photos:
        if photo.group:
            members.setdefault(photo.group, []).append(photo)
    summary.near_copies = [copies for copies in members.values() if len(copies) > 1]
    return photos


def _drop_near_copies(
    dataset: Path, photos: list[Photo], collection: Collection, summary: IngestSummary
) -> list[Photo]:
    """Return the photos without all but the largest, or else the sharpest, of those that show the same picture.

    The one that stays takes over a caption and a mask that it lacks.
    """
    kept, reasons = {}, {}
    for copies in summary.near_copies:
        # the first of equals
        best, *others = sorted(
            copies, key=lambda p: (p.width * p.height, p.quality.sharpness if p.quality else 0), reverse=True
        )
        kept[best.sha256], taken = _with_what_copies_have(dataset, best, others, summary)
        for photo in others:
            what = " and ".join(name for name, giver in taken.items() if giver is photo)
            reason = f"near-copy of {best.source}, which is larger or sharper"
            reasons[photo.sha256] = f"{reason}, and now uses the {what} of this one" if what else reason
    for photo in photos:
        if reason := reasons.get(photo.sha256):
            summary.rejected.append(Rejection(photo.source, reason, "duplicate"))
            collection.replaced_files |= {photo.file, photo.mask} - {""}
            name = split_label(photo.source)[0]
            summary.num_of_source[collection.folders.get(name, name)] -= 1
    summary.num_near_copies_dropped = len(reasons)
    summary.near_copies = []
    return [kept.get(photo.sha256, photo) for photo in photos if photo.sha256 not in reasons]


def _with_what_copies_have(
    dataset: Path, best: Photo, others: list[Photo], summary: IngestSummary
) -> tuple[Photo, dict[str, Photo]]:
    """Return (a photo with the caption and the mask that it lacks, the near-copies that gave them)."""
    taken: dict[str, Photo] = {}
    photo = best
    if not has_written_caption(best):
        by_people = [other for other in others if has_written_caption(other)]
        by_models = [other for other in others if other.captioner and not best.captioner]
        if giver := next(iter([*by_people, *by_models]), None):
            said = (giver.captions, giver.caption_source, giver.tags, giver.settings, giver.credit, giver.captioner)
            photo, taken["caption"] = with_caption(photo, Caption(*said), giver.tagger), giver
            summary.num_captions_inherited += 1
    masked = [] if best.mask else [other for other in others if other.mask]
    for giver in masked:
        try:
            content = _mask_for(dataset, best, giver)
        except (RejectedImage, UserError) as error:
            summary.note("mask", f"{best.source}: the mask of its near-copy {giver.source} is not used: {error}")
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{MASKS_FOLDER}/{PurePosixPath(best.file).stem}-{sha256[:8]}.png"
        atomic_write_bytes(dataset / file, content)
        photo, taken["mask"] = replace(photo, mask=file, mask_sha256=sha256), giver
        summary.num_masks_inherited += 1
        break
    return photo, taken


def _mask_for(dataset: Path, photo: Photo, giver: Photo) -> bytes:
    """Return the mask of a near-copy as a file of a photo's size.

    Raises RejectedImage or UserError if it does not fit or cannot be read.
    """
    if not _is_same_shape((giver.width, giver.height), (photo.width, photo.height)):
        sizes = f"{giver.width} x {giver.height} px and {photo.width} x {photo.height} px"
        raise RejectedImage(f"their shapes differ, {sizes}; save a mask for the larger one")
    thumbnails = [_thumbnail(dataset, one) for one in (giver, photo)]
    if any(one is None for one in thumbnails) or not same_picture(*(one[None] for one in thumbnails))[0]:
        raise RejectedImage("one is mirrored or damaged; save a mask for the larger one")
    mask = decode_mask(read_file(path_in(dataset, giver.mask)))
    return _encode_mask(mask.resize((photo.width, photo.height), Image.Resampling.BILINEAR))


def _note_near_copies(summary: IngestSummary) -> None:
    for first, *others in summary.near_copies:
        summary.note(
            "near-copies",
            f"near-copies of {first.source}, held out or trained on together with it: "
            + ", ".join(photo.source for photo in others),
        )


def _write_lists(dataset: Path, summary: IngestSummary) -> None:
    """Write everything that was left out and every note; the terminal shows the first of each kind."""
    # ASCII only: a path may contain Unicode line separators, which JSON does not escape otherwise
    lines = (json.dumps({"path": item.path, "reason": item.reason}) for item in summary.rejected)
    atomic_write_lines(dataset / REJECTED_NAME, lines)
    if summary.notes:
        atomic_write_lines(dataset / NOTES_NAME, (storable(note.text) for note in summary.notes))
    else:
        (dataset / NOTES_NAME).unlink(missing_ok=True)


def ingest(
    sources: list[Path],
    dataset: Path,
    max_megapixels: float = 1.5,
    quality: int = 95,
    image_format: Literal["jpeg", "webp"] = "jpeg",
    prune: bool = False,
    progress: Callable[[int, int], None] | None = None,
    fetch: Callable[[Path], Fetched] | None = None,
    alpha: str = "white",
    kohya: bool = False,
    comma_tags: bool = False,
    drop_near_copies: bool = False,
) -> IngestSummary:
    """Add the photos of `sources` (folders or files) to the dataset folder and return a summary of what was done.

    Photos over max_megapixels (10^6 px) are shrunk. Files that need no change are copied byte for byte; all others are
    re-encoded as sRGB at `quality` (1 to 100). Originals are only read. Files that cannot be used, duplicates included,
    are listed with the reason in the summary and in rejected.jsonl. Photos of earlier calls stay in the manifest, and
    repeating a call gives the same manifest; with `prune`, photos that are not, or no longer, in the sources are
    removed. Near-copies get a common group, which the validation split keeps together; with `drop_near_copies` only the
    largest of each group stays. progress(files done, files in
    total) is called after each file. fetch: downloads photographs into the dataset folder and returns where they lie,
    which is one more source. alpha: the colour that transparency is composited over, or `mask`, which also keeps it as
    the photo's loss mask, unless a mask stands beside the photo. kohya,
    comma_tags: how captions are read, see `CaptionReader`.
    Raises UserError if a source does not exist or lies in the dataset, a setting is out of range, no photo can be
    used, the dataset cannot be written, or another process is preparing it.
    """
    if not max_megapixels >= MIN_MEGAPIXELS:
        raise UserError(f"max_megapixels {max_megapixels} is below {MIN_MEGAPIXELS}, 100 x 100 px; use 1.5")
    if not 1 <= quality <= 100:
        raise UserError(f"quality {quality} is outside 1 to 100; use 95")
    if image_format not in ("jpeg", "webp"):
        raise UserError(f"image_format {image_format!r} is not supported; use 'jpeg' or 'webp'")
    form = _Form(max_megapixels, image_format, quality, alpha)
    backdrop_of(alpha)
    dataset = Path(dataset).resolve()
    if dataset.exists() and not dataset.is_dir():
        raise UserError(f"dataset {dataset} is a file; give a folder")
    if (dataset / "config.toml").exists() and (dataset / "metrics.jsonl").exists():
        raise UserError(f"{dataset} is a run folder; {ADVICE}")
    _check_own_lists(dataset)
    single = next((source for source in sources if prune and not os.path.isdir(source)), None)
    if single is not None:
        raise UserError(f"--prune compares the dataset with whole folders, and {single} is none; give its folder")
    files, readers = find_files(sources, dataset, kohya, comma_tags)

    def prepare(file: SourceFile, stop: threading.Event) -> PreparedFile | str:
        return _prepare(file, form, stop)

    try:
        with FolderLock(dataset, ADVICE, f"wait until it ends, or {ADVICE}") as lock:
            summary = IngestSummary()
            if lock.note:
                summary.note("file", lock.note)
            check_kinds(
                dataset,
                (IMAGES_FOLDER, MASKS_FOLDER),
                (MANIFEST_NAME, NOTES_NAME, REJECTED_NAME, SOURCES_NAME),
                "a dataset",
                follow_links=False,
            )
            if fetch is not None:
                fetched = fetch(dataset)
                summary.rejected += fetched.rejected
                for note in fetched.notes:
                    summary.note("source", note)
                found, reader = files_of(fetched.folder, dataset)
                # nothing is known about a photograph that could not be downloaded this time
                reader.unknown |= {fetched.folder / name for name in fetched.failed}
                sources, files, readers = [*sources, fetched.folder], [*files, *found], [*readers, reader]
            _ingest(sources, files, readers, dataset, summary, prepare, prune, drop_near_copies, progress)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(f"{error.filename or dataset} cannot be written ({error.strerror}); {ADVICE}") from error
    finally:
        for reader in readers:
            reader.close()
    return summary


def _ingest(
    sources: list[Path],
    files: list[SourceFile],
    readers: list[CaptionReader],
    dataset: Path,
    summary: IngestSummary,
    prepare: Callable[[SourceFile, threading.Event], PreparedFile | str],
    prune: bool,
    drop_near_copies: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Do the work of `ingest`. The caller holds the dataset's lock."""
    for folder in (IMAGES_FOLDER, MASKS_FOLDER):
        for leftover in (dataset / folder).glob(".*.tmp"):
            # half-written when an earlier call was killed; a folder is none of ours
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink()
    with ThreadPoolExecutor(NUM_SYNC_THREADS) as disk:
        collection = Collection(dataset, readers, files, summary, disk, prune)
        for num_done, (file, prepared) in enumerate(zip(files, _in_order(prepare, files), strict=True), start=1):
            collection.add(file, prepared)
            if progress is not None:
                progress(num_done, len(files))
        moved = collection.find_moved()
        for (index, file), prepared in zip(moved.items(), _in_order(prepare, list(moved.values())), strict=True):
            collection.move(index, file, prepared)
        collection.list_duplicates()
        collection.flush()
        _check_use(sources, collection, readers, dataset)
        collection.take_stock()
        collection.note_links(files, readers)
        collection.note_returned()
    photos = _group_near_copies(dataset, _measured(dataset, collection.photos), collection.compared, summary)
    summary.photos = _drop_near_copies(dataset, photos, collection, summary) if drop_near_copies else photos
    collection.note_masks(summary.photos)
    _note_near_copies(summary)
    for photo, kind, reason in doubtful(summary.photos):
        summary.note(kind, f"{photo.source}: {reason}")
    for reader in readers:
        summary.rejected += reader.rejections
        summary.notes += [Note("caption", text) for text in reader.warnings]
    _write_lists(dataset, summary)
    write_sources(dataset, collection.folders)
    write_manifest(dataset, summary.photos)
    used = {file for photo in summary.photos for file in (photo.file, photo.mask)}
    for file in collection.replaced_files - used:
        # a line of an earlier manifest, which may be a stranger's, may name the manifest itself, a folder, a file
        # behind a link to another folder, or one that is used, written in another way
        path = Path(os.path.realpath((dataset / file).parent)) / PurePosixPath(file).name
        is_ours = str(path) == f"{dataset}/{file}" and file.split("/")[0] in (IMAGES_FOLDER, MASKS_FOLDER)
        if is_ours and not path.is_dir():
            path.unlink(missing_ok=True)


def _check_own_lists(dataset: Path) -> None:
    """Raise UserError if the folder is no dataset and holds files with the names of a dataset's lists."""
    if os.path.lexists(dataset / MANIFEST_NAME) or os.path.lexists(dataset / IMAGES_FOLDER):
        return
    for name in (SOURCES_NAME, REJECTED_NAME):
        path = dataset / name
        # a first call that found no photo it could use has left its list of them
        if path.is_file() and not (name == REJECTED_NAME and _is_rejections(path)):
            raise UserError(f"{dataset} is no dataset and holds {name}, which would be overwritten; {ADVICE}")


def _is_rejections(path: Path) -> bool:
    try:
        first = next(read_lines(path, MAX_REJECTIONS_BYTES), None)
        row = parse_json(first) if first else {}
    except UserError:
        return False
    return isinstance(row, dict) and (not row or {"path", "reason"} <= row.keys())


def _check_use(sources: list[Path], collection: Collection, readers: list[CaptionReader], dataset: Path) -> None:
    """Raise UserError if no photo can be used, or nothing of a source whose other photos would be removed."""
    names = ", ".join(map(str, sources))
    summary = collection.summary
    rejected = [*summary.rejected, *(item for reader in readers for item in reader.rejections if item.kind == "photo")]
    if not collection.decoded and not rejected:
        raise UserError(f"no photos found in {names}; give a folder that contains JPEG, PNG or WebP files")
    if not collection.decoded:
        summary.rejected = rejected
        _write_lists(dataset, summary)
        raise UserError(
            f"none of the photos in {names} can be used ({len(rejected)} rejected); the first is "
            f"{rejected[0].path}: {rejected[0].reason} (full list: {dataset / REJECTED_NAME})"
        )
    used = {split_label(label)[0] for label in collection.decoded}
    for root, name in collection.names.items() if collection.prune else ():
        if name not in used:
            raise UserError(
                f"{root} holds no photograph that can be used; nothing was removed: check it, or leave it out"
            )
