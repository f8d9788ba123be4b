"""Processes that do not match are refused before training, by rank and host, and in what they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safelight.__main__ import main
from safelight.trainer.config.toml import to_toml
from safelight.trainer.distributed.meeting import Peer, refuse

VERSIONS = {"safelight": "1.0", "torch": "2.13.0"}
PEER = Peer("alpha", 1, "alpha/1", 0, 0, "cuda", "T4 GPU-1", VERSIONS, {"optimizer.lr": "1e-06"})
OTHER = replace(PEER, host="beta", pid=2, gpu="T4 GPU-2")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (OTHER, ""),
        (
            replace(OTHER, versions=VERSIONS | {"torch": "2.12.0"}),
            "rank 2 on beta has torch 2.12.0, but rank 0 on alpha has 2.13.0; install the same version on all machines",
        ),
        (
            replace(OTHER, device="cpu", gpu=""),
            "rank 2 on beta trains on a CPU, but rank 0 on alpha on a GPU; all must train on the same: see run.device",
        ),
        (
            replace(OTHER, settings={"optimizer.lr": "1e-05"}),
            "optimizer.lr is 1e-05 in rank 2 on beta, but 1e-06 in rank 0 on alpha; give all processes the same "
            "settings",
        ),
        (
            replace(OTHER, settings={"optimizer.lr": "1e-06", "stage.0.lr": "1"}),
            "stage.0.lr is 1 in rank 2 on beta, but None in rank 0 on alpha; give all processes the same settings",
        ),
        (
            replace(OTHER, host="alpha", gpu="T4 GPU-1"),
            "ranks 0 and 2 on alpha are on one GPU, T4 GPU-1; start no more processes there than it has GPUs",
        ),
        # another machine's GPU may have the same name
        (replace(OTHER, gpu="T4 GPU-1"), ""),
    ],
)
def test_what_differs_is_named(other, said):
    assert refuse([PEER, replace(PEER, gpu="T4 GPU-3"), other]) == said


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--gpus", "0"], {}, "--gpus 0 is less than 1; give the number of GPUs to use"),
        (["--max-restarts", "2"], {}, "--max-restarts 2 needs --gpus; torchrun has its own --max-restarts"),
        (
            ["--gpus", "2", "--max-restarts", "-1"],
            {},
            "--max-restarts -1 is less than 0; 0 never starts the processes again",
        ),
        (
            ["--gpus", "2", "--find-lr"],
            {},
            "--find-lr measures in one process: leave out --gpus, or torchrun",
        ),
        (
            ["--gpus", "2"],
            {"TORCHELASTIC_RUN_ID": "x"},
            "--gpus starts the processes itself, and torchrun has already: leave out one of the two",
        ),
        (
            ["--gpus", "2"],
            {"WORLD_SIZE": "2"},
            "--gpus starts the processes itself, but WORLD_SIZE is 2: torchrun has started them, or the shell has it "
            "set. Leave out --gpus, or unset WORLD_SIZE",
        ),
        (
            ["--gpus", "2"],
            {"WORLD_SIZE": "abc"},
            "WORLD_SIZE is 'abc' in the environment, where torchrun sets a number: unset it, or start the run with "
            "torchrun",
        ),
        (
            [],
            {"WORLD_SIZE": "2", "RANK": "x"},
            "RANK is 'x' in the environment, where torchrun sets a number: unset it, or start the run with torchrun",
        ),
        (
            ["--gpus", "2"],
            {"OMP_NUM_THREADS": "all"},
            "OMP_NUM_THREADS is 'all' in the environment; give a number of threads, or unset it",
        ),
    ],
)
def test_options_that_contradict_each_other(options, environment, said, small_config, tmp_path, capfd, monkeypatch):
    (tmp_path / "run.toml").write_text(to_toml(small_config()))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(tmp_path / "run.toml"), *options]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"safelight train: {said}"
    assert not (tmp_path / "run").exists()


def test_more_gpus_than_there_are(small_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (tmp_path / "run.toml").write_text(to_toml(small_config(run={"device": "auto"})))
    assert main(["train", str(tmp_path / "run.toml"), "--gpus", "4"]) == 2
    said = "safelight train: --gpus 4: this machine has 2 GPUs; use --gpus 2"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize("command", ["train", "cache"])
def test_more_processes_than_cores(command, small_config, tmp_path, capsys, monkeypatch):
    """Each would hold the libraries and the model, so a thousand would take the machine down."""
    monkeypatch.setattr("safelight.trainer.distributed.launch.num_cores", lambda: 4)
    # the first command would start them
    monkeypatch.setattr("safelight.trainer.distributed.launch.launch", lambda *arguments: 0)
    (tmp_path / "run.toml").write_text(to_toml(small_config()))
    assert main([command, str(tmp_path / "run.toml"), "--gpus", "16"]) == 0
    assert main([command, str(tmp_path / "run.toml"), "--gpus", "1000"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"safelight {command}: --gpus 1000: without a GPU the processes run on the CPU, where at most 16 are allowed; "
        "it has 4 cores for them, so use --gpus 4"
    )


def test_threads_of_nested_regions(monkeypatch):
    from safelight.trainer.distributed.launch import threads_each

    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads_each(2) == 3


def test_what_to_do_after_a_fault(tmp_path):
    """A run that ended before it had begun to write has no config.toml to go on with."""
    from safelight.trainer.loading.processes import outlook

    assert outlook("train", tmp_path / "run", 1) == "nothing is written yet; give the same command again"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    assert outlook("train", tmp_path / "run", 1) == (
        f"there is no checkpoint yet; go on with: safelight train {tmp_path / 'run'}/config.toml --resume"
    )


@pytest.mark.long
def test_a_setting_that_differs(ranks):
    """In two processes that meet: rank 0 alone says so, and nothing is written."""
    answer = ranks(words_of={"1": ranks.words(optimizer={"lr": 3e-5})})
    assert set(answer["codes"].values()) == {2}
    assert len(ranks.said()) == 1
    assert ranks.said()[0].startswith("safelight train: optimizer.lr is 3e-05 in rank 1 on ")
    assert not ranks.folder.exists()


@pytest.mark.long
def test_processes_that_wait_in_each_step_are_said(ranks, tmp_path):
    ranks(ranks.words(train={"accumulate": 3, "max_steps": 1}))
    note = "note: train.accumulate is 3, which 2 GPUs cannot share evenly: each runs 2 micro-batches a step, and 1 of 4"
    assert (tmp_path / "log").read_text().count(note) == 1


@pytest.mark.slow
def test_a_folder_that_is_not_shared(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("safelight.trainer.distributed.shared_folder.SHOWN_WITHIN_S", 0.5)
    answer = ranks(words_of={"1": ranks.words(run={"dir": str(tmp_path / "other")})})
    assert set(answer["codes"].values()) == {2}
    (said,) = ranks.said()
    assert said.startswith("safelight train: run.dir ")
    assert "is not the folder of rank 0 on " in said
    assert not ranks.folder.exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_another_version_of_torch(ranks):
    answer = ranks(versions={"1": "2.9.0"})
    assert set(answer["codes"].values()) == {2}
    (said,) = ranks.said()
    assert "rank 1 on " in said
    assert " has torch 2.9.0, but rank 0 on " in said


@pytest.mark.slow
def test_an_option_that_is_wrong_in_one_process_is_said_once(ranks):
    words = ranks.words()
    answer = ranks(words, words_of={"1": [*words, "--optimizer.lr", "much"]})
    assert set(answer["codes"].values()) == {2}
    assert len(ranks.said()) == 1
    assert "optimizer.lr" in ranks.said()[0]
    assert not ranks.folder.exists()
