"""What makes a folder a run. Free of torch, so that a wrong name is told at once."""

from __future__ import annotations

from pathlib import Path


def require_run(run_dir: Path) -> None:
    """Raise ValueError if the folder is no run: a run's first file is its config.toml."""
    if not (run_dir / "config.toml").is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.toml; train first, or name runs/NAME")
