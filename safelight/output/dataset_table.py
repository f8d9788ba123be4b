"""The summary that `safelight prepare` prints: what was left out and why, where captions came from, what comes next."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

from safelight.data.photo import USUAL_SETTINGS, Photo, PhotoSettings
from safelight.data.prepare.caption_words import MIN_WORDS, CaptionWords, caption_words
from safelight.data.prepare.ingest import ALPHA_IS_MASK, NOTES_NAME, REJECTED_NAME, IngestSummary
from safelight.data.prepare.quality import doubtful
from safelight.data.sources.caption import FILE_NAME, is_camera_name
from safelight.output.columns import hanging
from safelight.output.show import print_line
from safelight.text import counted, printable, shortened
from safelight.trainer.run_log.terminal import Terminal

# of each kind; the rest is in the dataset's rejected.jsonl and prepare_notes.txt
MAX_LISTED = 5
# sources, and kinds of captions
MAX_COUNTED = 20
# captions that several photographs share
MAX_REPEATED = 3
# paths may have thousands of characters
MAX_LINE = 300
# kinds of `Rejection`, as they are counted
LEFT_OUT = {
    "photo": "file",
    "duplicate": "duplicate",
    "other": "other file",
    "caption": "caption file",
    "row": "caption row",
}
WRITE_CAPTIONS = "write IMG_1.txt beside IMG_1.jpg, or let `safelight caption` describe the photographs"


def _wrapped(line: str) -> list[str]:
    """Return a line as it fits a terminal."""
    return hanging(shortened(printable(line), MAX_LINE))


def _say_some(lines: list[str], num: int, more: str, terminal: Terminal) -> None:
    """Print the first lines, and how many more of all `num` there are. more: what follows "and 12"."""
    for line in lines[:MAX_LISTED]:
        for part in _wrapped(line) if terminal.is_live else [line]:
            terminal.say(part)
    if num > MAX_LISTED:
        terminal.say(f"and {num - MAX_LISTED:,} {more}")


def _print(line: str) -> None:
    for part in _wrapped(line) if sys.stdout.isatty() else [line]:
        print_line(part)


def _caption_note(summary: IngestSummary) -> str:
    """Return a note if captions that come from file names are no captions, else an empty text."""
    named = [p for p in summary.photos if p.caption_source == FILE_NAME and p.captions]
    by_camera = [p for p in named if all(caption and is_camera_name(caption) for caption in p.captions)]
    if by_camera:
        first = by_camera[0]
        return (
            f"note: {counted(len(by_camera), 'photograph')} {'have' if len(by_camera) > 1 else 'has'} a camera's file "
            f"name as the only caption ({first.source}: {first.captions[0]!r}); the model would learn it as a word. "
            f"{WRITE_CAPTIONS}"
        )
    if len(named) > 1 and len({p.captions for p in named}) == 1:
        return f"note: the file names of {len(named)} photographs give them all this caption; {WRITE_CAPTIONS}"
    return ""


def _counts(num_of_place: Counter[str], noun: str) -> str:
    """Return from where how many came, the largest numbers first; places may be as many as photographs."""
    shown = [f"{num} from {shortened(place, MAX_LINE)}" for place, num in num_of_place.most_common(MAX_COUNTED)]
    num_more = len(num_of_place) - len(shown)
    return ", ".join([*shown, f"the rest from {counted(num_more, f'other {noun}')}"] if num_more else shown)


def _mask_lines(summary: IngestSummary, alpha: str) -> list[str]:
    """Return what was done with transparency, and how many photographs have a mask. alpha: the value of --alpha."""
    lines = []
    if num := summary.num_transparent:
        done = (
            "composited over white; their alpha is the mask of those that have no mask file"
            if alpha == ALPHA_IS_MASK
            else f"composited over {alpha} (--alpha takes another colour, or mask to learn only what is opaque)"
        )
        lines.append(f"transparency: {counted(num, 'photograph')} {'has' if num == 1 else 'have'} some, {done}")
    if num := sum(bool(photo.mask) for photo in summary.photos):
        have = "has one; it is learned" if num == 1 else "have one; they are learned"
        lines.append(f"masks: {counted(num, 'photograph')} {have} where the mask is white (loss.mask_weight)")
    return lines


def _described(photos: list[Photo]) -> str:
    """Return how many photographs have tags and settings of their own, or an empty text."""
    num_of_setting = Counter(
        field.name
        for photo in photos
        if photo.settings != USUAL_SETTINGS
        for field in fields(PhotoSettings)
        if getattr(photo.settings, field.name) != getattr(USUAL_SETTINGS, field.name)
    )
    num_tagged = sum(bool(photo.tags) for photo in photos)
    parts = [f"{name} of {counted(num, 'photograph')}" for name, num in num_of_setting.items()]
    return ", ".join([f"tags of {counted(num_tagged, 'photograph')}"] * bool(num_tagged) + parts)


def _word_lines(found: CaptionWords, num_photos: int) -> list[str]:
    """Return what the captions have in common: words, captions of several photographs, captions that say little."""
    lines = []
    if found.words and num_photos > 1:
        lines.append("commonest words: " + ", ".join(f"{shortened(w, 40)} {num}" for w, num in found.words.items()))
    if found.captions:
        shown = (f"{shortened(caption, 60)!r} {num}" for caption, num in list(found.captions.items())[:MAX_REPEATED])
        lines.append(f"captions of several photographs: {', '.join(shown)}")
    if found.short:
        num, first = len(found.short), found.short[0]
        have = "has a caption" if num == 1 else "have captions"
        lines.append(
            f"short captions: {counted(num, 'photograph')} {have} of fewer than {MIN_WORDS} words, such as "
            f"{first.source}: {first.captions[0]!r}"
        )
    return lines


def dataset_json(summary: IngestSummary, out: Path) -> dict:
    """Return the result as `--json` prints it."""
    words = caption_words(summary.photos)
    return {
        "dataset": str(out),
        "photos": len(summary.photos),
        "copied": summary.num_copied,
        "shrunk": summary.num_shrunk,
        "converted": summary.num_converted,
        "duplicates": summary.num_duplicates,
        "transparent": summary.num_transparent,
        "masks": sum(bool(photo.mask) for photo in summary.photos),
        "tagged": sum(bool(photo.tags) for photo in summary.photos),
        "sources": [{"folder": folder, "photos": num} for folder, num in summary.num_of_source.items()],
        "near_copies_dropped": summary.num_near_copies_dropped,
        "captions_inherited": summary.num_captions_inherited,
        "masks_inherited": summary.num_masks_inherited,
        "near_copies": [[photo.source for photo in group] for group in summary.near_copies],
        "doubtful": [{"photo": photo.source, "reason": reason} for photo, _, reason in doubtful(summary.photos)],
        "commonest_captions": words.captions,
        "commonest_words": words.words,
        "short_captions": [photo.source for photo in words.short],
        "rejected": [{"path": r.path, "reason": r.reason, "kind": r.kind} for r in summary.rejected],
        "warnings": summary.warnings,
    }


def print_dataset(summary: IngestSummary, out: Path, terminal: Terminal, alpha: str = "white") -> None:
    """Print rejections and notes to stderr, the first of each kind, and the result to stdout. alpha: of --alpha."""
    num: Counter[str] = Counter()
    for rejection in summary.rejected:
        num[rejection.kind] += rejection.num
    for kind, noun in LEFT_OUT.items():
        lines = [f"left out {r.path}: {r.reason}" for r in summary.rejected if r.kind == kind]
        more = counted(num[kind] - MAX_LISTED, f"more {noun}").partition(" ")[2]
        listed = "all are listed" if num[kind] == len(lines) else f"the first {len(lines):,} are listed"
        _say_some(lines, num[kind], f"{more}; {listed} in {out / REJECTED_NAME}", terminal)
    for kind in dict.fromkeys(note.kind for note in summary.notes):
        lines = [f"note: {note.text}" for note in summary.notes if note.kind == kind]
        _say_some(lines, len(lines), f"more like it; all are in {out / NOTES_NAME}", terminal)
    _say_some(list(filter(None, [_caption_note(summary)])), 1, "", terminal)
    extra = "".join(f", {counted(num[k], LEFT_OUT[k])}" for k in ("caption", "row") if num[k])
    _print(
        f"{counted(len(summary.photos), 'photograph')} in {out} ({summary.num_copied} copied unchanged, "
        f"{summary.num_shrunk} shrunk, {summary.num_converted} converted, "
        f"{counted(summary.num_duplicates, 'duplicate')} dropped, {num['photo'] + num['other']} left out{extra})"
    )
    if len(summary.num_of_source) > 1:
        _print(f"sources: {_counts(Counter(summary.num_of_source), 'source')}")
    if summary.num_near_copies_dropped:
        taken = [
            f"{num} with the {what} of a smaller one"
            for num, what in ((summary.num_captions_inherited, "caption"), (summary.num_masks_inherited, "mask"))
            if num
        ]
        _print(
            f"near-copies: {counted(summary.num_near_copies_dropped, 'photograph')} dropped; the largest of each "
            f"{', '.join(['picture stays', *taken])}"
        )
    if summary.near_copies:
        num_copies = sum(map(len, summary.near_copies))
        _print(
            f"near-copies: {num_copies} photographs show {counted(len(summary.near_copies), 'picture')}; "
            "those of one picture are held out or trained on together (--drop-near-duplicates keeps the largest)"
        )
    for line in _mask_lines(summary, alpha):
        _print(line)
    sources = Counter(p.caption_source for p in summary.photos)
    _print(f"captions: {_counts(sources, 'kind')}")
    if described := _described(summary.photos):
        _print(f"read with them: {described}")
    for line in _word_lines(caption_words(summary.photos), len(summary.photos)):
        _print(line)
    named = next((p for p in summary.photos if p.caption_source == FILE_NAME and p.captions), None)
    if named:
        _print(f"example of a caption from a file name: {named.source} is {named.captions[0]!r}")
    # on one line, to be copied
    print_line(
        "next: safelight init sd15 -o run.toml (or sd21, sdxl), then safelight train run.toml --data.path "
        f"{shlex.quote(str(out))} (`safelight plan` shows first whether it fits)"
    )
