"""What `safelight prepare` says of the dataset it wrote: what was left out and why, where captions come from, what is next."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from safelight.data.captions import FILE_NAME, says_nothing
from safelight.data.ingest import REJECTED_NAME, IngestSummary
from safelight.data.text import counted, printable
from safelight.trainer.run_log.terminal import Terminal

# a list of captions for a thousand photos beside twenty of them would fill the screen
MOST_LISTED = 20
# of a captions file that describes more photographs than are here
MOST_ROWS = 3
WRITE_CAPTIONS = "write IMG_1.txt beside IMG_1.jpg, or a captions.jsonl"


def print_dataset(summary: IngestSummary, out: Path, terminal: Terminal) -> None:
    """Print what there is to know on stderr, the result on stdout."""
    caption_rows = [r for r in summary.rejected if r.is_row]
    left_out = [r for r in summary.rejected if not r.is_row]
    listed = out / REJECTED_NAME
    for rejection in left_out[:MOST_LISTED]:
        terminal.say(printable(f"left out {rejection.path}: {rejection.reason}"))
    if len(left_out) > MOST_LISTED:
        terminal.say(f"and {len(left_out) - MOST_LISTED} more, all listed in {listed}")
    for row in caption_rows[:MOST_ROWS]:
        terminal.say(printable(f"left out {row.path}: {row.reason}"))
    if len(caption_rows) > MOST_ROWS:
        terminal.say(f"and {counted(len(caption_rows) - MOST_ROWS, 'more caption row')}, all listed in {listed}")
    for warning in summary.warnings[:MOST_LISTED]:
        terminal.say(f"note: {warning}")
    if len(summary.warnings) > MOST_LISTED:
        terminal.say(f"and {len(summary.warnings) - MOST_LISTED} more notes; --json prints them all")
    unsaid = [
        p for p in summary.photos if p.caption_source == FILE_NAME and all(c and says_nothing(c) for c in p.captions)
    ]
    if unsaid:
        terminal.say(
            f"note: {len(unsaid)} of the photographs have no caption but a camera's file name ({unsaid[0].source}: "
            f"{unsaid[0].captions[0]!r}), which would be learnt as a word; {WRITE_CAPTIONS}"
        )
    sources = Counter(p.caption_source for p in summary.photos)
    rows = f", {counted(len(caption_rows), 'caption row')}" if caption_rows else ""
    print(
        f"{counted(len(summary.photos), 'photograph')} in {out} ({summary.num_copied} copied as they are, {summary.num_shrunk} shrunk, "
        f"{counted(summary.num_duplicates, 'duplicate')} dropped, {len(left_out) - summary.num_duplicates} left out{rows})"
    )
    print("captions: " + ", ".join(f"{num} from {source}" for source, num in sources.most_common()))
    named = [p for p in summary.photos if p.caption_source == FILE_NAME and p.captions]
    if named:
        print(printable(f"a caption from a file name, for example: {named[0].source} is {named[0].captions[0]!r}"))
    if len(named) > 1 and len({p.captions for p in named}) == 1 and not unsaid:
        terminal.say(f"note: {len(named)} photographs have this one caption from their names; {WRITE_CAPTIONS}")
    print(
        f"next: safelight train run.toml --data.path {shlex.quote(str(out))} (`safelight plan` tells first what fits)"
    )
