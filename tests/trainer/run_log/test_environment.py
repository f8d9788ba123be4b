"""What environment.json says of the processes of a run."""

import sys

import pytest
import torch

from safelight.trainer.run_log.environment import describe


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({}, "safelight train run.toml"),
        ({"WORLD_SIZE": "2", "SAFELIGHT_GPUS": "2"}, "safelight train run.toml --gpus 2"),
        ({"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}, "safelight train run.toml --gpus 4"),
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}, "safelight train run.toml"),
    ],
)
def test_the_command_starts_as_many_processes(variables, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["safelight", "train", "run.toml"])
    for name in ("WORLD_SIZE", "SAFELIGHT_GPUS", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    record = describe(torch.device("cpu"))
    assert record["command"] == command
    assert record.get("processes") == variables.get("WORLD_SIZE")


def test_the_command_can_be_given_to_a_shell_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["safelight", "train", "run.toml", "--data.path", "my photos"])
    assert describe(torch.device("cpu"))["command"] == "safelight train run.toml --data.path 'my photos'"
