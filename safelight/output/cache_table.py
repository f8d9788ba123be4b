"""What `safelight cache --verify`, `--stats` and `--gc` print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safelight.data.cache_stats import Outlier, Stats
from safelight.data.garbage import Freed
from safelight.data.verify import Verified
from safelight.output.show import print_line, print_table
from safelight.text import counted, size

MAX_LISTED = 20
# what the kinds of rows are to people
NAMES = {"posterior": "latents", "latent": "latents", "text": "captions", "mask": "masks", "tokens": "token ids"}


def verified_json(found: Verified) -> dict:
    """Return what `--verify --json` prints."""
    return {**asdict(found), "sound": found.is_sound}


def print_verified(found: Verified, dataset: Path, command: str) -> None:
    """Print what is damaged, by photograph, then how much was checked. command: encodes what is damaged again."""
    if found.problems:
        print_table(
            f"{dataset}: {counted(len(found.problems), 'row')} damaged",
            ("photograph", "row", "what is wrong"),
            [
                (problem.name or "none of this run", f"{NAMES[problem.kind]} {problem.key[:16]}", problem.what)
                for problem in found.problems[:MAX_LISTED]
            ],
        )
        if len(found.problems) > MAX_LISTED:
            print_line(f"and {len(found.problems) - MAX_LISTED:,} more; --json lists all")
    if found.missing:
        names = list(dict.fromkeys(found.missing))
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        print_line(f"{counted(len(found.missing), 'row')} not cached yet: {', '.join(names[:3])}{more}")
    print_line(
        f"{counted(found.num_rows, 'row')} checked, {size(found.num_bytes)}; {found.num_encoded:,} of them encoded "
        f"again, equal up to {found.max_roundings:.2g} roundings of float16"
    )
    if found.num_unneeded:
        print_line(f"{counted(found.num_unneeded, 'row')} not needed by these settings; --gc deletes them")
    print_line("the cache is sound" if found.is_sound else f"`{command}` encodes what is damaged or missing")


def stats_json(stats: Stats, scaling_factor: float) -> dict:
    """Return what `--stats --json` prints."""
    return {**asdict(stats), "scaling_factor": scaling_factor}


def print_stats(stats: Stats, dataset: Path, scaling_factor: float) -> None:
    """Print rows and bytes by kind, the latents by channel, and outliers."""
    num_rows, num_bytes = sum(stats.rows.values()), sum(stats.bytes.values())
    print_table(
        f"{dataset}: {counted(num_rows, 'row')}, {size(num_bytes)}",
        ("kind", "rows", "size", "not needed", "size"),
        [
            (
                NAMES[kind],
                f"{num:,}",
                size(stats.bytes[kind]),
                f"{stats.unneeded_rows.get(kind, 0):,}",
                size(stats.unneeded_bytes.get(kind, 0)),
            )
            for kind, num in sorted(stats.rows.items())
        ],
    )
    if not stats.num_latents:
        print_line("no latents of these settings are in the cache")
        return
    print_table(
        f"latents of {counted(stats.num_latents, 'crop')}, by channel",
        ("channel", "mean", "std", "std scaled"),
        [
            (channel, f"{mean:.3f}", f"{std:.3f}", f"{std * scaling_factor:.3f}")
            for channel, (mean, std) in enumerate(zip(stats.channel_means, stats.channel_stds, strict=True))
        ],
    )
    if stats.num_damaged:
        print_line(f"{counted(stats.num_damaged, 'damaged row')} left out; --verify names them")
    if not stats.outliers:
        print_line("no photograph is far from the others")
        return
    print_table(
        f"{counted(len(stats.outliers), 'photograph')} far from the others: blank, very dark, noise, or damaged?",
        ("photograph", "far crops", "times the usual spread", "what", "here", "usually"),
        [
            (far.name, far.num_crops, f"{far.z:.1f}", f"{far.statistic} of channel {far.channel}", *_numbers(far))
            for far in stats.outliers[:MAX_LISTED]
        ],
    )
    if len(stats.outliers) > MAX_LISTED:
        print_line(f"and {len(stats.outliers) - MAX_LISTED:,} more; --json lists all")


def _numbers(far: Outlier) -> tuple[str, str]:
    return f"{far.value:.3f}", f"{far.usual:.3f}"


def freed_json(freed: Freed, is_dry_run: bool) -> dict:
    """Return what `--gc --json` prints."""
    return {**asdict(freed), "dry_run": is_dry_run}


def print_freed(freed: Freed, dataset: Path, is_dry_run: bool) -> None:
    """Print what was deleted, or would be."""
    verb = "would be " if is_dry_run else ""
    num = sum(freed.rows.values())
    title = (
        f"{dataset}: {counted(num, 'row')} {verb}deleted, {freed.num_kept:,} kept; {size(freed.num_bytes)} {verb}freed"
    )
    if not num:
        print_line(title)
        return
    print_table(
        title,
        ("kind", "rows", "size"),
        [(NAMES[kind], f"{rows:,}", size(freed.bytes[kind])) for kind, rows in sorted(freed.rows.items())],
    )
    if is_dry_run:
        print_line("if other settings use this dataset, name them with --keep, or their rows go as well")
