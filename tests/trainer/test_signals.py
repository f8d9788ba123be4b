"""Ctrl-C once and twice, and SIGTERM as Colab and Slurm send it: what each leaves, and that the run resumes."""

from __future__ import annotations

import json
import signal

import pytest

from safelight.trainer.checkpoint.files import check_files, folder_of, list_checkpoints
from safelight.trainer.config.toml import to_toml


@pytest.fixture
def job(small_config, tmp_path):
    """A function that returns a `train` job with slow steps; signals are sent once its first checkpoint exists."""
    config = small_config(
        train={"batch_size": 2, "max_steps": 6},
        stage=[{"epochs": 2}],
        log={"every_steps": 1},
        validate={"every_epochs": 0},
        sample={"every_epochs": 0},
        save={"every_steps": 2, "every_epochs": 0, "keep": 9},
    )
    (tmp_path / "run.toml").write_text(to_toml(config))

    def make(*signals: str, step_s: float = 0.3, once: str = "run/checkpoints/step-00000002") -> dict:
        return {
            "words": ["train", str(tmp_path / "run.toml"), "--resume"],
            "log": str(tmp_path / "log"),
            "step_s": step_s,
            "once": str(tmp_path / once),
            "signals": signals,
        }

    return make


def steps_logged(folder) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def events_logged(folder) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [(row["event"], row["step"]) for row in rows if row["kind"] == "event"]
    return [event for event in events if event[0] in ("stopped", "resumed")]


@pytest.mark.long
def test_asked_once_it_saves_and_goes_on(run, job, tmp_path):
    """By SIGTERM; by Ctrl-C: tests/trainer/test_cli.py."""
    assert run(**job("SIGTERM")) == 130
    step = list_checkpoints(tmp_path / "run")[-1]
    assert 2 < step < 6
    check_files(folder_of(tmp_path / "run", step))
    said = (tmp_path / "log").read_text().splitlines()
    assert said[-1] == f"saved at step {step}; continue with: safelight train {tmp_path}/run/config.toml --resume"
    started = json.loads((tmp_path / "run" / "environment.json").read_text())["started"]
    assert run(**job(step_s=0, once="run.toml")) == 0
    # the start of the run, not of the resume
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["started"] == started
    assert events_logged(tmp_path / "run") == [("stopped", step), ("resumed", step)]
    assert list_checkpoints(tmp_path / "run")[-1] == 6
    assert steps_logged(tmp_path / "run") == list(range(1, 7))


@pytest.mark.long
def test_asked_twice_it_leaves_at_once_and_keeps_its_checkpoints(run, job, tmp_path):
    """The second Ctrl-C comes before the step finishes: it is not saved, and the checkpoint before is intact."""
    assert run(**job("SIGINT", "SIGINT", step_s=1.0)) == 130
    said = (tmp_path / "log").read_text()
    assert "press Ctrl-C again to leave at once" in said
    assert said.endswith("interrupted\n")
    assert "Traceback" not in said
    assert list_checkpoints(tmp_path / "run") == [2]
    check_files(folder_of(tmp_path / "run", 2))
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_signal_before_the_first_step_just_ends_it(run, job, tmp_path):
    """There is nothing to save yet: SIGTERM ends the process as usual and leaves no lock."""
    assert run(**job("SIGTERM", once="run.toml")) == -signal.SIGTERM
    assert list_checkpoints(tmp_path / "run") == []
    assert run(**job(step_s=0, once="run.toml")) == 0
