"""`safelight caption DATASET --preview 5`: a few photos captioned with several settings, side by side in one page.

The source report chose its repetition penalty ("q_factor") and least length ("min_words") by looking at five photos.
The page shows the same two, and beside each caption how long it is and how much of it is said twice.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import safelight
from safelight.data.atomic import atomic_write_text
from safelight.data.cache import decode_photo
from safelight.data.lock import FolderLock
from safelight.data.manifest import read_manifest
from safelight.data.photo import Photo
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, sort_key
from safelight.text import counted
from safelight.trainer.captioning.caption_dataset import (
    ADVICE,
    BatchedCaptioner,
    decoded_batches,
    describe_batch,
    is_human,
    repetition,
)
from safelight.trainer.captioning.journal import FOLDER_NAME, Journal
from safelight.trainer.captioning.models import Described, open_captioner
from safelight.trainer.captioning.options import Generation, Wording
from safelight.trainer.report.markup import Markup, join, shorten, table, tag
from safelight.trainer.report.pictures import Picture, embed_images, placeholder
from safelight.trainer.report.theme import CSS, content_security_policy
from safelight.untrusted import check_kinds

PAGE_NAME = "preview.html"
# the grid: how much repeated words are held back, and the least length in tokens
PENALTIES, LENGTHS = (1.0, 1.2, 1.4), (10, 30)
EDGES_PX, BUDGET_BYTES = (640, 480, 320), 6_000_000
MAX_CAPTION_CHARACTERS = 800
LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Tried:
    """What one setting gave. said: by the photo's hash. command: that captions the whole dataset with it."""

    letter: str
    generation: Generation
    command: str
    said: dict[str, Described]

    @property
    def mean_tokens(self) -> float:
        return sum(said.num_tokens for said in self.said.values()) / max(1, len(self.said))

    @property
    def mean_repetition(self) -> float:
        return sum(repetition(said.text) for said in self.said.values()) / max(1, len(self.said))


def settings_to_try(base: Generation) -> list[Generation]:
    """Return the settings of the grid, the shorter captions first; everything else is as in `base`."""
    lengths = dict.fromkeys(min(length, base.max_new_tokens) for length in LENGTHS)
    return [replace(base, min_new_tokens=n, repetition_penalty=penalty) for n in lengths for penalty in PENALTIES]


def pick_photos(photos: Sequence[Photo], num: int, seed: int) -> list[Photo]:
    """Return `num` photos, or all if there are fewer: those with the smallest keyed draws, in manifest order."""
    order = sorted(photos, key=lambda photo: (sort_key(Key(seed, Purpose.PREVIEW, photo.sample_id)), photo.sha256))
    chosen = {photo.sha256 for photo in order[:num]}
    return [photo for photo in photos if photo.sha256 in chosen]


def write_preview(
    dataset: Path,
    num: int,
    model: str,
    base: Generation,
    wording: Wording,
    device: torch.device,
    words: Sequence[str],
    batch_size: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Caption `num` photos with each setting of the grid, write DATASET/captions/preview.html and return its path.

    words: of the command that captions the dataset, to which a setting's options are added, and --overwrite if people
    wrote all captions, since it would change nothing otherwise. What is generated is kept in the journal, so that
    captioning with a setting that was previewed does not repeat it. Raises UserError.
    """
    dataset = Path(dataset)
    read_manifest(dataset)
    with FolderLock(dataset, "check its permissions", ADVICE):
        check_kinds(dataset, (FOLDER_NAME,), (f"{FOLDER_NAME}/{PAGE_NAME}",), "a dataset")
        all_photos = read_manifest(dataset)
        if all(map(is_human, all_photos)) and "--overwrite" not in words:
            words = [*words, "--overwrite"]
        photos = pick_photos(all_photos, num, base.seed)
        settings = settings_to_try(base)
        tried, num_done, began = [], 0, time.monotonic()
        batched: BatchedCaptioner | None = None
        progress(0, len(settings) * len(photos), "")
        with open_captioner(model) as source:
            for letter, generation in zip(LETTERS, settings, strict=False):
                journal = Journal(dataset, {"weights": source.fingerprint[:16], **generation.record()}, all_photos)
                todo = [photo for photo in photos if photo.sha256 not in journal.said]
                if todo:
                    batched = batched or BatchedCaptioner(source.build(device, generation), batch_size, say)
                    for batch in decoded_batches(dataset, todo, batched):
                        describe_batch(batch, batched, journal, generation)
                num_done += len(photos)
                rate = num_done / (time.monotonic() - began)
                progress(num_done, len(settings) * len(photos), f"{rate:.3g} captions/s")
                said = {photo.sha256: journal.said[photo.sha256] for photo in photos if photo.sha256 in journal.said}
                tried.append(Tried(letter, generation, _command(words, generation), said))
        pictures = embed_images([_small(dataset, photo) for photo in photos], EDGES_PX, BUDGET_BYTES)
        path = dataset / FOLDER_NAME / PAGE_NAME
        atomic_write_text(path, _page(dataset, model, photos, pictures, tried, wording))
        return path


def _small(dataset: Path, photo: Photo) -> Image.Image | None:
    """Return a photo as large as the page may show it, None if it cannot be read."""
    try:
        image = decode_photo(dataset, photo)
    except UserError:
        return None
    image.thumbnail((max(EDGES_PX), max(EDGES_PX)), Image.Resampling.LANCZOS)
    return image


def _command(words: Sequence[str], generation: Generation) -> str:
    """Return the command that captions the dataset with a setting of the grid."""
    options = {
        "--min-new-tokens": generation.min_new_tokens,
        "--repetition-penalty": f"{generation.repetition_penalty:g}",
    }
    return shlex.join([*words, *(str(word) for option in options.items() for word in option)])


def _page(
    dataset: Path,
    model: str,
    photos: Sequence[Photo],
    pictures: Sequence[Picture | None],
    tried: Sequence[Tried],
    wording: Wording,
) -> str:
    title = "Which captions?"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=content_security_policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"Safelight {safelight.__version__}"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · Safelight"),
        tag("style", Markup(CSS)),
    )
    intro = (
        f"{counted(len(photos), 'photograph')} of {shorten(dataset, 200)}, captioned by {shorten(model, 200)} with "
        f"{counted(len(tried), 'setting')}."
    )
    advice = (
        "Read the captions, choose the setting whose words you would have written, and run its command, at the page's "
        "end. A higher repetition penalty (q_factor) makes repeated words less likely; a greater least length "
        "(min_words, counted in tokens) makes the model go on when it would have stopped, which often invents things."
    )
    body = join(
        tag("header", tag("h1", title), tag("p", intro, class_="sub"), tag("p", advice, class_="note")),
        tag(
            "main",
            tag("section", tag("h2", "Settings"), _summary(tried)),
            tag(
                "section",
                tag("h2", "Photographs"),
                [_photo(photo, picture, tried, wording) for photo, picture in zip(photos, pictures, strict=True)],
            ),
            tag("section", tag("h2", "Commands"), [_choice(one) for one in tried]),
        ),
        tag("footer", f"Written by Safelight {safelight.__version__}."),
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _values(generation: Generation) -> str:
    return f"penalty {generation.repetition_penalty:g}, at least {generation.min_new_tokens} tokens"


def _summary(tried: Sequence[Tried]) -> Markup:
    head = ("", "penalty", "least tokens", "mean tokens", "repeated")
    rows = [
        (
            one.letter,
            f"{one.generation.repetition_penalty:g}",
            one.generation.min_new_tokens,
            f"{one.mean_tokens:.1f}",
            f"{one.mean_repetition:.0%}",
        )
        for one in tried
    ]
    return table(head, rows, class_="figures compared")


def _choice(one: Tried) -> Markup:
    label = tag("p", tag("strong", one.letter), f" {_values(one.generation)}", class_="meta")
    # a line is not broken behind the hyphens of an option
    words = [tag("span", word, class_="nowrap") if word.startswith("--") else word for word in one.command.split(" ")]
    spaced = [part for word in words for part in (" ", word)][1:]
    return tag("div", label, tag("pre", spaced), class_="choice")


def _photo(photo: Photo, picture: Picture | None, tried: Sequence[Tried], wording: Wording) -> Markup:
    image = placeholder("cannot be read") if picture is None else picture.img(photo.file)
    today = photo.captions[0] if photo.captions else ""
    rows = [tag("div", tag("dt", one.letter), _caption(one, photo, wording)) for one in tried]
    now = tag("div", tag("dt", "now"), tag("dd", shorten(today, MAX_CAPTION_CHARACTERS) or "none", dir="auto"))
    return tag(
        "article", tag("div", image, tag("p", photo.source, class_="meta")), tag("dl", rows, now), class_="tried"
    )


def _caption(one: Tried, photo: Photo, wording: Wording) -> Markup:
    said = one.said.get(photo.sha256)
    if said is None:
        return tag("dd", tag("span", "cannot be read", class_="meta"))
    text = tag("span", shorten(wording.apply(said.text), MAX_CAPTION_CHARACTERS), class_="prompt", dir="auto")
    twice = repetition(said.text)
    note = f"{_values(one.generation)}: {counted(said.num_tokens, 'token')}"
    repeated = [", ", tag("strong", f"{twice:.0%} repeated words")] if twice else None
    return tag("dd", text, tag("span", note, repeated, class_="meta"))
