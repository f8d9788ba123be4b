"""The summary that `safelight prepare` prints: what was left out and why, where captions came from, what comes next."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from safelight.data.captions import FILE_NAME, is_camera_name
from safelight.data.ingest import REJECTED_NAME, IngestSummary
from safelight.output.show import print_line
from safelight.text import counted
from safelight.trainer.run_log.terminal import Terminal

# more would fill the screen
MAX_LISTED = 20
# rejected rows of caption tables: a table often describes more photographs than the folder holds
MAX_ROWS = 3
WRITE_CAPTIONS = "to caption a photograph, write IMG_1.txt beside IMG_1.jpg, or a captions.jsonl"


def print_dataset(summary: IngestSummary, out: Path, terminal: Terminal) -> None:
    """Print rejections and warnings to stderr, and the result to stdout."""
    caption_rows = [r for r in summary.rejected if r.is_row]
    left_out = [r for r in summary.rejected if not r.is_row]
    full_list = out / REJECTED_NAME
    for rejection in left_out[:MAX_LISTED]:
        terminal.say(f"left out {rejection.path}: {rejection.reason}")
    if len(left_out) > MAX_LISTED:
        terminal.say(f"and {len(left_out) - MAX_LISTED} more; all are listed in {full_list}")
    for row in caption_rows[:MAX_ROWS]:
        terminal.say(f"left out {row.path}: {row.reason}")
    if len(caption_rows) > MAX_ROWS:
        terminal.say(f"and {counted(len(caption_rows) - MAX_ROWS, 'more caption row')}; all are listed in {full_list}")
    for warning in summary.warnings[:MAX_LISTED]:
        terminal.say(f"note: {warning}")
    if len(summary.warnings) > MAX_LISTED:
        terminal.say(f"and {len(summary.warnings) - MAX_LISTED} more notes; --json prints them all")
    camera_named = [
        p for p in summary.photos if p.caption_source == FILE_NAME and all(c and is_camera_name(c) for c in p.captions)
    ]
    if camera_named:
        example = camera_named[0]
        terminal.say(
            f"note: {len(camera_named)} of the photographs have a camera's file name as their only caption "
            f"({example.source}: {example.captions[0]!r}); the model would learn it as a word. {WRITE_CAPTIONS}"
        )
    sources = Counter(p.caption_source for p in summary.photos)
    rows = f", {counted(len(caption_rows), 'caption row')}" if caption_rows else ""
    print_line(
        f"{counted(len(summary.photos), 'photograph')} in {out} ({summary.num_copied} copied unchanged, "
        f"{summary.num_shrunk} shrunk, {counted(summary.num_duplicates, 'duplicate')} dropped, "
        f"{len(left_out) - summary.num_duplicates} left out{rows})"
    )
    print_line("captions: " + ", ".join(f"{num} from {source}" for source, num in sources.most_common()))
    named = [p for p in summary.photos if p.caption_source == FILE_NAME and p.captions]
    if named:
        print_line(f"example of a caption from a file name: {named[0].source} is {named[0].captions[0]!r}")
    if len(named) > 1 and len({p.captions for p in named}) == 1 and not camera_named:
        terminal.say(f"note: the file names of {len(named)} photographs give them all this caption; {WRITE_CAPTIONS}")
    print_line(
        f"next: safelight train run.toml --data.path {shlex.quote(str(out))} "
        "(`safelight plan` shows first whether it fits)"
    )
