"""Fixtures: commands in several processes, as torch's launcher starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.trainer.config.toml import to_toml
from tests.trainer.distributed import launched_runs

# a command that ends by itself, or by its faults, does so long before
TIMEOUT_S = 600.0


class Ranks:
    """A small run in two processes. folder: its run folder. lines: what the last command printed, without notes."""

    def __init__(self, processes, tmp_path: Path, config):
        self._processes, self._tmp_path, self._config = processes, tmp_path, config
        self.folder = Path(config.run.dir)
        self.lines: list[str] = []
        self._num = 0

    def words(self, **changes) -> list[str]:
        """Return the command that trains, with some tables changed."""
        self._num += 1
        values = self._config.model_dump(by_alias=True)
        changed = {table: {**values[table], **more} for table, more in changes.items()}
        path = self._tmp_path / f"run-{self._num}.toml"
        path.write_text(to_toml(type(self._config).model_validate({**values, **changed})))
        return ["train", str(path)]

    def __call__(self, words: list[str] | None = None, **job) -> dict:
        pids = self._tmp_path / f"pids-{len(list(self._tmp_path.glob('pids-*')))}"
        pids.mkdir()
        log = self._tmp_path / "log"
        job |= {"words": words or self.words(), "pids": str(pids), "log": str(log)}
        (answer,) = self._processes(launched_runs.run, num=1, timeout_s=TIMEOUT_S, job=job)
        self.lines = [line for line in log.read_text().splitlines() if not line.startswith("note: ")]
        return answer

    def once_saved(self, step: int, folder: Path | None = None) -> str:
        """Return a path that exists as soon as a step's checkpoint is complete."""
        return str((folder or self.folder) / "checkpoints" / f"step-{step:08d}" / "state.json")

    def said(self) -> list[str]:
        """Return the lines that the last command ended with, without the run's usual ones."""
        return [
            line for line in self.lines if line.startswith(("safelight train:", "restart ", "interrupted", "saved "))
        ]


@pytest.fixture
def ranks(processes, small_config, tmp_path) -> Ranks:
    """A run of eight steps in two processes that saves every two."""
    config = small_config(
        train={"batch_size": 2, "accumulate": 2, "max_steps": 8},
        data={"validation_fraction": 0.0},
        log={"every_steps": 1},
        validate={"every_epochs": 0},
        sample={"every_epochs": 0},
        save={"every_steps": 2, "every_epochs": 0, "keep": 9},
    )
    return Ranks(processes, tmp_path, config)
