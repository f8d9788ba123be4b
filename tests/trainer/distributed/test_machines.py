"""Several machines: torch's elastic agents, each with a process, folders and files of its own, here all on this one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from safelight.trainer.config.toml import to_toml
from tests.trainer.distributed.launched_runs import RENDEZVOUS_S
from tests.trainer.distributed.test_faults import HOST, LOST, SECONDS, assert_ended, newest, steps_logged
from tests.trainer.equal_runs import assert_equal_weights

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TIMEOUT_S = 400.0


@pytest.fixture
def machines(ranks, tmp_path) -> list[Path]:
    """Two folders with one run.toml and copies of its dataset, without a cache, and of its base; the run is shared."""
    config = ranks._config
    folders = [tmp_path / name for name in ("alpha", "beta")]
    for folder in folders:
        shutil.copytree(config.data.path, folder / "photos", ignore=shutil.ignore_patterns("cache"))
        shutil.copytree(config.model.base, folder / "base")
        values = config.model_dump(by_alias=True)
        values["data"]["path"], values["model"]["base"] = "photos", "base"
        values["run"]["dir"] = str(ranks.folder)
        (folder / "run.toml").write_text(to_toml(type(config).model_validate(values)))
    return folders


def start(ranks, machines: list[Path], **job) -> dict:
    """Run `safelight train run.toml` in a process on each of two machines."""
    folders = {str(rank): str(folder) for rank, folder in enumerate(machines)}
    return ranks(["train", "run.toml"], num_launchers=2, folders=folders, **job)


@pytest.mark.slow
def test_torchrun_on_two_machines_gives_the_weights_of_one_process(ranks, machines, tmp_path):
    assert ranks(num=1)["codes"] == {}
    ranks.folder.rename(tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"localhost:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words = [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--local-addr", "127.0.0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []
    for folder in machines:
        with (folder / "log").open("w") as log:
            command = [*words, "-m", "safelight", "train", "run.toml"]
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    try:
        statuses = [one.wait(TIMEOUT_S) for one in started]
    finally:
        for one in started:
            one.kill()
    assert statuses == [0, 0], "".join((folder / "log").read_text() for folder in machines)
    assert_equal_weights(tmp_path / "alone", ranks.folder)
    assert steps_logged(ranks.folder) == steps_logged(tmp_path / "alone") == list(range(1, 9))
    # each machine has filled its own cache
    assert all((folder / "photos" / "cache").is_dir() for folder in machines)


def other_caption(folder: Path) -> None:
    file = next(file for file in sorted((folder / "photos").glob("*.jsonl")) if "caption" in file.read_text())
    file.write_text(file.read_text().replace("a ", "one ", 1))


def other_weights(folder: Path) -> None:
    file = folder / "base" / WEIGHTS
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def other_folder(folder: Path) -> None:
    file = folder / "run.toml"
    lines = [f'dir = "{folder}/run"' if line.startswith("dir = ") else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))


def other_setting(folder: Path) -> None:
    file = folder / "run.toml"
    file.write_text(file.read_text().replace("max_steps = 8", "max_steps = 9"))


REFUSALS = {
    "folder": (other_folder, f"run.dir {{beta}}/run of rank 1 on {HOST} is not the folder of rank 0 on {HOST}; "),
    "caption": (
        other_caption,
        f"data.path photos has other training photographs or captions on rank 1 on {HOST} than ",
    ),
    "base": (other_weights, f"model.base 'base' has other weights on rank 1 on {HOST} than on rank 0 on {HOST}; "),
    "setting": (other_setting, f"train.max_steps is 9 in rank 1 on {HOST}, but 8 in rank 0 on {HOST}; "),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSALS)
def test_a_machine_that_differs_is_refused_before_training(ranks, machines, what):
    change, said = REFUSALS[what]
    change(machines[1])
    assert_ended(start(ranks, machines), 2)
    (line,) = ranks.said()
    assert line.startswith(f"safelight train: {said.format(beta=machines[1])}")
    assert not (ranks.folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_machine_with_another_version_is_refused(ranks, machines):
    assert_ended(start(ranks, machines, versions={"1": "2.9.0"}), 2)
    (line,) = ranks.said()
    assert f"rank 1 on {HOST} has torch 2.9.0, but rank 0 on {HOST} has " in line
    assert not ranks.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_launcher_that_is_killed_stops_both_machines(ranks, machines, number):
    """Its process goes on without it, is noticed to be alone, and asks all to stop: the step is saved."""
    kill = {"once": ranks.once_saved(2), "rank": -1 - number, "signal": "SIGKILL"}
    answer = start(ranks, machines, step_s=0.3, disturb=[kill])
    assert answer["left"] == []
    assert answer["seconds"] < SECONDS
    assert 2 < newest(ranks) < 8


@pytest.mark.slow
def test_a_machine_that_is_gone_ends_the_run(ranks, machines):
    gone = [{"once": ranks.once_saved(4), "rank": rank, "signal": "SIGKILL"} for rank in (-2, 1)]
    answer = start(ranks, machines, step_s=0.3, disturb=gone)
    assert_ended(answer, 1)
    assert answer["seconds"] < SECONDS
    assert ranks.said()[0].startswith(f"safelight train: rank 1 on {HOST} {LOST}; the newest checkpoint is of step ")


@pytest.mark.slow
def test_a_machine_that_does_not_come_back_is_waited_for_no_longer_than_torchrun_does(ranks, machines):
    """Where faults start the processes again."""
    gone = [{"once": ranks.once_saved(4), "rank": rank, "signal": "SIGKILL"} for rank in (-2, 1)]
    answer = start(ranks, machines, step_s=0.3, max_restarts=1, disturb=gone)
    assert_ended(answer, 1)
    assert RENDEZVOUS_S <= answer["seconds"] < RENDEZVOUS_S + SECONDS
    assert ranks.said()[0].startswith(f"safelight train: rank 1 on {HOST} {LOST}; all processes start again from step ")
    assert newest(ranks) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_restarts_those_of_both_machines(ranks, machines, tmp_path, rank):
    assert ranks()["codes"] == {}
    ranks.folder.rename(tmp_path / "unbroken")
    kill = {"once": ranks.once_saved(4), "rank": rank, "signal": "SIGKILL"}
    answer = start(ranks, machines, step_s=0.2, max_restarts=2, disturb=[kill])
    assert (answer["codes"], answer["left"]) == ({}, [])
    assert "restart 1 of 2: going on from the newest checkpoint" in ranks.said()
    assert_equal_weights(tmp_path / "unbroken", ranks.folder)
    assert steps_logged(ranks.folder) == list(range(1, 9))
