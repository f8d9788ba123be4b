"""Runs with replayed steps: stages, accumulation, a moving average, validation, resumes.

A CPU has no graphs, so the recorder calls its function again at every replay; test_cuda_graphs.py tests the graphs.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer import train as loop
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.loading import job, resolve
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.resolve_auto import why_no_cuda_graphs
from safelight.trainer.step import cuda_graphs
from safelight.trainer.step.cuda_graphs import GraphCapture
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.run_log.recorded import RunsAgain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
# an epoch of the first stage, and one more step, of the second
NUM_FIRST = 5
NUM_STEPS = NUM_FIRST + 1


@pytest.fixture
def recorders(monkeypatch) -> list[RunsAgain]:
    """Lets runs use graphs; returns their recorders, one per run, in order."""
    made: list[RunsAgain] = []

    def capture(context, with_graphs):
        assert with_graphs
        made.append(RunsAgain(context.optimizer))
        return GraphCapture(context, made[-1], warms_up=False)

    monkeypatch.setattr(resolve, "why_no_cuda_graphs", lambda *_: "")
    monkeypatch.setattr(job, "graph_capture", capture)
    return made


def trained(config, **options) -> tuple[dict, list[float]]:
    """Return the last checkpoint's tensors and the logged losses of a run."""
    result = train(config, **options)
    folder = folder_of(result.run_dir, list_checkpoints(result.run_dir)[-1])
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") | load_file(
        folder / "state.safetensors"
    )
    rows = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    return tensors, [row["loss"] for row in rows if row["kind"] == "train"]


def assert_same(one: tuple[dict, list], other: tuple[dict, list]) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert not [name for name in one[0] if not torch.equal(one[0][name], other[0][name])]


def config_of(folder: Path, tiny_dataset: Path, **train_settings):
    return parse_config(
        {
            "run": {"dir": str(folder), "device": "cpu"},
            "model": {"base": small_base()},
            "data": {"path": str(tiny_dataset), "resolution": 64, "caption_dropout": 0.3},
            "train": {"batch_size": 4, "accumulate": 2, "ema_decay": 0.9, **train_settings},
            "optimizer": {"lr": 1e-4},
            "stage": [{"epochs": 1}, {"epochs": 1, "lr": 5e-5, "batch_size": 5, "accumulate": 1}],
            "sample": {"every_epochs": 0},
            "validate": {"timesteps": 2},
            "log": {"every_steps": 2, "tensorboard": False},
        },
        "here",
    )


@pytest.mark.long
def test_a_replayed_run_equals_one_in_the_same_order(tiny_dataset, tmp_path, recorders, monkeypatch):
    replayed = trained(config_of(tmp_path / "replayed", tiny_dataset))
    # stage 1: batches of 4, the last of 2, each first or last of its step; stage 2: batches of 5 and what is left
    assert recorders[0].num_captured >= 4
    assert recorders[0].num_replayed > recorders[0].num_captured
    environment = json.loads((tmp_path / "replayed" / "environment.json").read_text())
    assert environment["epoch_order"] == {"grouped": True}
    assert "CUDA graphs" in (tmp_path / "replayed" / "model.json").read_text()
    # stopped, then resumed without graphs: the run keeps its epoch order
    calls = iter(range(100))
    train(config_of(tmp_path / "moved", tiny_dataset), stop_requested=lambda: next(calls) > 10)
    monkeypatch.undo()
    assert_same(replayed, trained(config_of(tmp_path / "moved", tiny_dataset), resume=True))


@pytest.mark.parametrize(
    ("changes", "device", "budget", "expected"),
    [
        ({}, CUDA, 8 * GIB, ""),
        ({"train": {"cuda_graphs": "off"}}, CUDA, 8 * GIB, "is off"),
        ({}, CPU, 0, "CUDA device"),
        ({"optimizer": {"name": "adamw"}}, CUDA, 8 * GIB, "adamw reads"),
        ({"optimizer": {"memory": "paged"}, "model": {"precision": "bf16"}}, CUDA, 8 * GIB, "paged"),
        ({"train": {"checkpointing": "offload"}}, CUDA, 8 * GIB, "offload"),
        ({}, CUDA, 5 * GIB, "5.31 GiB of the 5.00 GiB"),
    ],
)
def test_why_there_are_no_graphs(changes, device, budget, expected, monkeypatch):
    monkeypatch.setattr("safelight.trainer.memory_plan.resolve_auto.has_triton", lambda: True)
    candidate = Candidate(
        "exact", "none", True, 1, 4 * GIB, 3 * GIB, GIB, 4 * GIB + GIB // 4, "forward", {}, None, graph_bytes=GIB // 16
    )
    config = parse_config(changes, "here")
    # `auto` is resolved
    memory = config.optimizer.memory if "optimizer" in changes else candidate.memory
    candidate = replace(candidate, memory=memory, checkpointing=config.train.checkpointing)
    reason = why_no_cuda_graphs(config, device, candidate, budget)
    assert expected in reason
    assert bool(reason) == bool(expected)
    if expected and config.train.cuda_graphs != "off":
        config.train.cuda_graphs = "on"
        with pytest.raises(ValueError, match="cuda_graphs is on, but"):
            why_no_cuda_graphs(config, device, candidate, budget)


@pytest.fixture(scope="module")
def plain(tiny_dataset, tmp_path_factory) -> tuple[dict, list[float]]:
    """The last checkpoint's tensors and the logged losses of an undisturbed run of NUM_STEPS steps."""
    return trained(config_of(tmp_path_factory.mktemp("plain") / "run", tiny_dataset, max_steps=NUM_STEPS))


def test_without_graphs_the_largest_batch_comes_first_and_changes_nothing(
    tiny_dataset, tmp_path, monkeypatch, caplog, plain
):
    caplog.set_level(logging.INFO)
    shapes = []

    def micro_step(context, inputs, *place):
        if context.optimizer.is_dry_run:
            shapes.append(tuple(inputs.mean_BCHW.shape))
        return original(context, inputs, *place)

    original = cuda_graphs.micro_step
    monkeypatch.setattr(cuda_graphs, "micro_step", micro_step)
    monkeypatch.setattr(job, "graph_capture", lambda context, with_graphs: GraphCapture(context, None, warms_up=True))
    assert_same(plain, trained(config_of(tmp_path / "rehearsed", tiny_dataset, max_steps=NUM_STEPS)))
    # the second stage has larger batches
    assert shapes == [(4, 4, 16, 16), (5, 4, 16, 16)]


def test_memory_that_is_full_after_an_epoch_loses_nothing_of_it(tiny_dataset, tmp_path, monkeypatch, plain):
    config = config_of(tmp_path / "full", tiny_dataset, max_steps=NUM_STEPS)
    evaluate = loop.evaluate

    def full(job, position):
        if position.step > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(job, position)

    monkeypatch.setattr(loop, "evaluate", full)
    with pytest.raises(ValueError, match=f"validation or sampling after step {NUM_FIRST}, whose weights are saved"):
        train(config)
    assert list_checkpoints(tmp_path / "full") == [NUM_FIRST]
    monkeypatch.undo()
    assert_same(trained(config, resume=True), plain)
