"""What `safelight caption` prints at its end."""

from __future__ import annotations

from pathlib import Path

from safelight.output.show import print_table
from safelight.text import counted
from safelight.trainer.captioning.caption_dataset import CaptionSummary
from safelight.trainer.run_log.terminal import Terminal

MAX_LISTED = 5
MAX_EXAMPLES = 3


def caption_json(summary: CaptionSummary, dataset: Path) -> dict:
    """Return the result as `--json` prints it."""
    return {
        "dataset": str(dataset),
        "photos": len(summary.photos),
        "generated": summary.made,
        "from_journal": summary.known,
        "unchanged": summary.unchanged,
        "kept_human": summary.human,
        "unreadable": [{"file": file, "reason": reason} for file, reason in summary.unread],
        "not_reached": summary.left,
        "mean_tokens": round(summary.mean_tokens, 2),
        "shared_captions": summary.num_shared,
        "repetitive_captions": summary.num_repetitive,
        "captions_per_s": round(summary.photos_per_s, 3),
    }


def print_captions(summary: CaptionSummary, dataset: Path, terminal: Terminal) -> None:
    """Print how many photos were captioned, kept and left out, and how the captions are."""
    for file, reason in summary.unread[:MAX_LISTED]:
        terminal.say(f"not captioned: {file}: {reason}")
    if len(summary.unread) > MAX_LISTED:
        terminal.say(f"and {len(summary.unread) - MAX_LISTED:,} more that cannot be read")
    rows = [
        ("captioned", summary.made, f"{summary.photos_per_s:.3g} a second" if summary.made else ""),
        ("captioned with texts of an earlier call", summary.known, ""),
        ("had this caption already", summary.unchanged, ""),
        ("kept: captioned by a person", summary.human, "--overwrite replaces them" if summary.human else ""),
        ("cannot be read", len(summary.unread), ""),
        ("not reached", summary.left, ""),
    ]
    print_table(
        f"{dataset}: {counted(len(summary.photos), 'photograph')}",
        ("", "photographs", ""),
        [row for row in rows if row[1]],
    )
    if summary.said:
        num = len(summary.said)
        print_table(
            "captions by this model",
            ("", "", ""),
            [
                ("tokens, mean", f"{summary.mean_tokens:.1f}", ""),
                ("same caption as another photograph", summary.num_shared, f"{summary.num_shared / num:.0%}"),
                ("say three words twice", summary.num_repetitive, f"{summary.num_repetitive / num:.0%}"),
            ],
        )
