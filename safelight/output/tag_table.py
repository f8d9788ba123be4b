"""What `safelight caption --tags` prints at its end."""

from __future__ import annotations

from pathlib import Path

from safelight.output.show import print_table
from safelight.text import counted
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.tagging.tag_dataset import TagSummary

MAX_LISTED = 5
MAX_TAGS = 20


def tags_json(summary: TagSummary, dataset: Path) -> dict:
    """Return the result as `--json` prints it."""
    return {
        "dataset": str(dataset),
        "photos": len(summary.photos),
        "tagged": summary.num_tagged,
        "looked_at": summary.made,
        "from_journal": summary.known,
        "nothing_found": summary.empty,
        "unchanged": summary.unchanged,
        "kept_human": summary.human,
        "unreadable": [{"file": file, "reason": reason} for file, reason in summary.unread],
        "not_reached": summary.left,
        "photos_per_s": round(summary.photos_per_s, 3),
        "tags": [
            {"tag": name, "photos": num, "mean_weight": round(weight, 3)} for name, num, weight in summary.commonest()
        ],
    }


def print_tags(summary: TagSummary, dataset: Path, terminal: Terminal) -> None:
    """Print how many photos were tagged, kept and left out, and the commonest tags."""
    for file, reason in summary.unread[:MAX_LISTED]:
        terminal.say(f"not tagged: {file}: {reason}")
    if len(summary.unread) > MAX_LISTED:
        terminal.say(f"and {len(summary.unread) - MAX_LISTED:,} more that cannot be read")
    rate = f"{summary.photos_per_s:.3g} photographs/s" if summary.made else ""
    rows = [
        ("tagged", summary.made + summary.known - summary.empty, rate),
        ("nothing found", summary.empty, ""),
        ("tagged so already", summary.unchanged, ""),
        ("kept: tagged by a person", summary.human, "--overwrite replaces them" if summary.human else ""),
        ("cannot be read", len(summary.unread), ""),
        ("not reached", summary.left, ""),
    ]
    print_table(
        f"{dataset}: {counted(len(summary.photos), 'photograph')}, {summary.num_tagged:,} of them with a model's tags",
        ("", "photographs", ""),
        [row for row in rows if row[1]],
    )
    if found := summary.commonest():
        shown = found[:MAX_TAGS]
        more = f", the {len(shown)} commonest of {len(found):,}" if len(found) > len(shown) else ""
        rows = [(name, num, f"{num / len(summary.photos):.0%}", f"{weight:.2f}") for name, num, weight in shown]
        print_table(f"tags{more}", ("", "photographs", "share", "mean weight"), rows)
