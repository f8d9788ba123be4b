"""The summary that `safelight prepare` prints: what was left out and why, the captions' sources, the next command."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from safelight.data.captions import FILE_NAME, says_nothing
from safelight.data.ingest import REJECTED_NAME, IngestSummary
from safelight.data.text import counted, printable
from safelight.trainer.run_log.terminal import Terminal

# a long list would scroll everything else away
MAX_LISTED = 20
# caption rows without a photograph: a captions file may describe thousands more than were given
MAX_CAPTION_ROWS = 3
WRITE_CAPTIONS = "write IMG_1.txt beside IMG_1.jpg, or a captions.jsonl"


def print_dataset(summary: IngestSummary, out: Path, terminal: Terminal) -> None:
    """Print notes on stderr and the result on stdout."""
    caption_rows = [r for r in summary.rejected if r.is_row]
    left_out = [r for r in summary.rejected if not r.is_row]
    listed = out / REJECTED_NAME
    for rejection in left_out[:MAX_LISTED]:
        terminal.say(printable(f"left out {rejection.path}: {rejection.reason}"))
    if len(left_out) > MAX_LISTED:
        terminal.say(f"and {len(left_out) - MAX_LISTED} more, all listed in {listed}")
    for row in caption_rows[:MAX_CAPTION_ROWS]:
        terminal.say(printable(f"left out {row.path}: {row.reason}"))
    if len(caption_rows) > MAX_CAPTION_ROWS:
        terminal.say(f"and {counted(len(caption_rows) - MAX_CAPTION_ROWS, 'more caption row')}, all listed in {listed}")
    for warning in summary.warnings[:MAX_LISTED]:
        terminal.say(f"note: {warning}")
    if len(summary.warnings) > MAX_LISTED:
        terminal.say(f"and {len(summary.warnings) - MAX_LISTED} more notes; --json prints them all")
    uncaptioned = [
        p for p in summary.photos if p.caption_source == FILE_NAME and all(c and says_nothing(c) for c in p.captions)
    ]
    if uncaptioned:
        terminal.say(
            f"note: {len(uncaptioned)} of the photographs have only a camera's file name for a caption "
            f"({uncaptioned[0].source}: "
            f"{uncaptioned[0].captions[0]!r}), which the model would learn as a word; {WRITE_CAPTIONS}"
        )
    sources = Counter(p.caption_source for p in summary.photos)
    rows = f", {counted(len(caption_rows), 'caption row')}" if caption_rows else ""
    print(
        f"{counted(len(summary.photos), 'photograph')} in {out} ({summary.num_copied} copied unchanged, "
        f"{summary.num_shrunk} shrunk, "
        f"{counted(summary.num_duplicates, 'duplicate')} dropped, "
        f"{len(left_out) - summary.num_duplicates} left out{rows})"
    )
    print("captions: " + ", ".join(f"{num} from {source}" for source, num in sources.most_common()))
    named = [p for p in summary.photos if p.caption_source == FILE_NAME and p.captions]
    if named:
        print(printable(f"example of a caption from a file name: {named[0].source} -> {named[0].captions[0]!r}"))
    if len(named) > 1 and len({p.captions for p in named}) == 1 and not uncaptioned:
        terminal.say(f"note: {len(named)} photographs share this caption, taken from their names; {WRITE_CAPTIONS}")
    print(
        f"next: safelight train run.toml --data.path {shlex.quote(str(out))} "
        "(run `safelight plan` first to see what fits)"
    )
