"""Resolving `auto`, the memory cap and the out-of-memory message, tested without a GPU."""

import re
from pathlib import Path

import pytest
import torch

from safelight.data.buckets import Bucket
from safelight.trainer import train as train_module
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan import resolve_auto
from safelight.trainer.memory_plan.communication import Ranks
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, Card
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.resolve_auto import cap, compare, describe, out_of_memory, resolve, resolve_for
from safelight.trainer.train import train
from safelight.units import GIB
from tests.small_base import small_base

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOMY = Card("roomy", 100.0)


def config_of(**sections: dict):
    train = {"checkpointing": "auto", "batch_size": 64}
    none = {"validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
    return parse_config(
        {"model": {"base": "tiny"}, "data": {"resolution": 64}, "train": train, **none, **sections}, "here"
    )


def test_auto_is_filled_in_by_the_card_and_kept_on_resume():
    resolved, candidate = resolve_for(config_of(), ROOMY)
    assert (resolved.optimizer.memory, resolved.train.checkpointing) == ("exact", "none")
    assert "memory mode exact, checkpointing none" in describe(candidate)
    recorded = candidate.to_json() | {"memory": "near", "checkpointing": "full"}
    again, _ = resolve_for(config_of(), ROOMY, recorded)
    assert (again.optimizer.memory, again.train.checkpointing) == ("near", "full")
    # explicit settings are kept, and a damaged record is ignored
    pinned, _ = resolve_for(config_of(optimizer={"memory": "rounded"}), ROOMY, recorded)
    assert pinned.optimizer.memory == "rounded"
    anew, _ = resolve_for(config_of(), ROOMY, {"unreadable": "environment.json"})
    assert anew == resolved
    # fp32 weights have one mode
    whole, _ = resolve_for(config_of(model={"base": "tiny", "precision": "fp32"}), ROOMY)
    assert whole.optimizer.memory == "auto"


def test_a_run_in_several_processes_is_planned_as_one_of_them(monkeypatch):
    """With a micro-batch for each process, none sums gradients over micro-steps, but buckets of them are exchanged."""
    monkeypatch.setattr(resolve_auto, "this_card", lambda device: ROOMY)
    config = config_of(model={"base": small_base()}, train={"batch_size": 4, "accumulate": 2, "checkpointing": "none"})
    one, two = (resolve(config, CUDA, None, num_processes=num)[1] for num in (1, 2))
    assert one.needed_bytes != two.needed_bytes
    assert two.needed_bytes == Planner(config, ROOMY, Ranks(2)).choose().needed_bytes
    # what the main process has chosen, the others do
    followed, _ = resolve(config, CUDA, two.to_json() | {"memory": "near"}, num_processes=2)
    assert followed.optimizer.memory == "near"


def test_a_run_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match=r"this run needs \d\.\d+ GiB at batch size 64, but small has 0\.50 GiB"):
        resolve_for(config_of(model={"base": small_base()}), Card("small", 0.5))


def test_on_a_cpu_nothing_is_resolved_or_capped():
    config = config_of(memory={"limit_gib": 0.01})
    assert resolve(config, CPU, None) == (config, None)
    cap(CPU, 0.01)


def test_the_cap_leaves_room_for_the_context(monkeypatch):
    calls = []
    total = type("Properties", (), {"total_memory": 10 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *x: calls.append(x))
    cap(CUDA, 0)
    cap(CUDA, 5)
    cap(CUDA, 99)
    assert calls == [((5 * GIB - CONTEXT_BYTES) / (10 * GIB), CUDA), (1.0, CUDA)]
    with pytest.raises(ValueError, match=r"memory.limit_gib 0.3 is no more than the CUDA context takes"):
        cap(CUDA, 0.3)


def test_prediction_is_compared_with_measurement():
    candidate = MemoryEstimator(config_of(), ROOMY).estimate("exact", "none", 64)
    line = compare(candidate, round(1.1 * (candidate.held_bytes + candidate.step_bytes)), 2 * GIB)
    assert "(+10.0%)" in line
    assert line.endswith("measured 2.500")


@pytest.mark.long
def test_an_out_of_memory_error_names_the_bucket_and_a_smaller_plan():
    candidate = MemoryEstimator(config_of(), ROOMY).estimate("exact", "none", 64)
    line = out_of_memory(config_of(), ROOMY, candidate, Bucket(96, 64), 64, 7, 5)
    assert line.startswith(
        "the GPU's memory was full in step 7, bucket 96 x 64, batch size 64; the checkpoint of step 5 is whole; "
    )
    assert "the plan needs" in line
    assert (
        float(re.search(r"the plan needs (\d+\.\d+) GiB with --optimizer.memory", line)[1]) * GIB
        < candidate.needed_bytes
    )
    # with a checkpoint, only what a resumed run may change; without one, anything
    assert "--optimizer.fused-backward false --train.batch-size 64" in line
    estimator = MemoryEstimator(config_of(), ROOMY)
    for memory, expected in (
        ("exact", "--optimizer.memory paged"),
        ("streamed", "cannot resume with less memory; a new run needs"),
    ):
        candidate = estimator.estimate(memory, "offload", 64, memory == "streamed")
        line = out_of_memory(config_of(), ROOMY, candidate, Bucket(96, 64), 64, 7, 5)
        assert expected in line
        assert ("--train.batch-size 64" in line) == (memory == "exact")
        anew = out_of_memory(config_of(), ROOMY, candidate, Bucket(96, 64), 64, 7, -1)
        assert "; nothing was saved yet; " in anew
        assert "resume" not in anew


def test_an_out_of_memory_error_ends_a_run_in_one_line_and_keeps_its_checkpoints(make_config, monkeypatch):
    config = make_config(
        save={"every_steps": 1, "every_epochs": 0}, validate={"every_epochs": 0}, sample={"every_epochs": 0}
    )
    step, calls = train_module.train_step, []

    def full(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(*args, **options)

    monkeypatch.setattr(train_module, "train_step", full)
    with pytest.raises(
        ValueError, match=r"memory was full in step 3, bucket \d+ x \d+, batch size \d+; the checkpoint of step 2"
    ):
        train(config)
    assert list_checkpoints(Path(config.run.dir))[-1] == 2
    calls.clear()
    monkeypatch.setattr(train_module, "train_step", step)
    config.train.max_steps = 3
    assert train(config, resume=True).position.step == 3


def sd15(gib: float, **sections):
    train = {"batch_size": 1, "checkpointing": "full"}
    sections = {"data": {"resolution": 512}, "train": train, **sections}
    optimizer = {"memory": "exact", "fused_backward": True}
    config = parse_config({"model": {"base": "random:sd15"}, "optimizer": optimizer, **sections}, "here")
    return config, Card(f"{gib:g} GiB", gib)


def test_validation_and_sampling_use_the_memory_that_is_left():
    config, roomy = sd15(9)
    _, with_room = resolve_for(config, roomy)
    assert (
        with_room.eval_batching.prompts,
        with_room.eval_batching.validation_images,
        with_room.eval_batching.decode_on,
    ) == (8, 8, "gpu")
    assert "between" not in describe(with_room)
    assert with_room.needed_bytes < with_room.eval_batching.peak_bytes <= 9 * GIB
    # no memory is left for CUDA graphs
    config, tight = sd15(5.7)
    _, candidate = resolve_for(config, tight)
    assert candidate.needed_bytes == with_room.needed_bytes
    assert candidate.eval_batching.peak_bytes <= 5.7 * GIB
    assert candidate.eval_batching.decode_on == "cpu"
    assert candidate.eval_batching.prompts in (1, 2, 4)
    line = describe(candidate)
    assert line.endswith("decodes samples on the CPU, which is slower")
    assert f"samples {candidate.eval_batching.prompts} prompt" in line
    # a resumed run keeps its batches if they still fit
    _, again = resolve_for(config, Card("larger", 9.0), candidate.to_json())
    assert (again.eval_batching.prompts, again.eval_batching.decode_on) == (candidate.eval_batching.prompts, "cpu")
    _, anew = resolve_for(config, tight, with_room.to_json())
    assert anew.eval_batching == candidate.eval_batching
    for damage in ({"prompts": 3}, {"prompts": 8, "decode_on": "moon"}, "?", None, {"more": 1}):
        assert (
            resolve_for(config, tight, candidate.to_json() | {"between": damage})[1].eval_batching
            == candidate.eval_batching
        )
    # a run without validation and samples plans none
    none = {"validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
    assert resolve_for(sd15(5.7, **none)[0], tight)[1].eval_batching.describe() == ""
