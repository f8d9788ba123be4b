"""What a run does about the GPU's memory, as far as it can be seen without one."""

from pathlib import Path

import pytest
import torch

from safelight.data.buckets import Bucket
from safelight.trainer import train as train_module
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, Card
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.resolve_auto import cap, compare, describe, out_of_memory, record, settle, settle_on
from safelight.trainer.train import train
from safelight.units import GIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOMY = Card("roomy", 100.0)


def config_of(**sections: dict):
    train = {"checkpointing": "auto", "batch_size": 64}
    none = {"validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
    return parse_config(
        {"model": {"base": "tiny"}, "data": {"resolution": 64}, "train": train, **none, **sections}, "here"
    )


def test_auto_is_filled_in_by_the_card_and_kept_on_resume():
    settled, need = settle_on(config_of(), ROOMY)
    assert (settled.optimizer.memory, settled.train.checkpointing) == ("exact", "none")
    assert "memory mode exact, checkpointing none" in describe(need)
    before = record(need) | {"memory": "near", "checkpointing": "full"}
    again, _ = settle_on(config_of(), ROOMY, before)
    assert (again.optimizer.memory, again.train.checkpointing) == ("near", "full")
    # what is set is not auto, and damage is no record
    pinned, _ = settle_on(config_of(optimizer={"memory": "rounded"}), ROOMY, before)
    assert pinned.optimizer.memory == "rounded"
    anew, _ = settle_on(config_of(), ROOMY, {"unreadable": "environment.json"})
    assert anew == settled
    # fp32 weights have one mode
    whole, _ = settle_on(config_of(model={"base": "tiny", "precision": "fp32"}), ROOMY)
    assert whole.optimizer.memory == "auto"


def test_what_cannot_fit_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"this run needs \d\.\d+ GiB at batch size 64, and small has 0\.50 GiB"):
        settle_on(config_of(), Card("small", 0.5))


def test_on_a_cpu_nothing_is_settled_or_capped():
    config = config_of(memory={"limit_gib": 0.01})
    assert settle(config, CPU, None) == (config, None)
    cap(CPU, 0.01)


def test_the_cap_leaves_room_for_the_context(monkeypatch):
    told = []
    total = type("Properties", (), {"total_memory": 10 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *x: told.append(x))
    cap(CUDA, 0)
    cap(CUDA, 5)
    cap(CUDA, 99)
    assert told == [((5 * GIB - CONTEXT_BYTES) / (10 * GIB), CUDA), (1.0, CUDA)]
    with pytest.raises(ValueError, match=r"memory.limit_gib 0.3 is no more than the CUDA context takes"):
        cap(CUDA, 0.3)


def test_prediction_beside_measurement():
    need = Planner(config_of(), ROOMY).need("exact", "none", 64)
    line = compare(need, round(1.1 * (need.held + need.step)), 2 * GIB)
    assert "(+10.0%)" in line
    assert line.endswith("measured 2.500")


def test_a_full_memory_names_the_bucket_and_a_plan_that_needs_less():
    need = Planner(config_of(), ROOMY).need("exact", "none", 64)
    line = out_of_memory(config_of(), ROOMY, need, Bucket(96, 64), 64, 7, 5)
    assert line.startswith(
        "the GPU's memory was full in step 7, bucket 96 x 64, batch size 64; the checkpoint of step 5 is whole; "
    )
    assert "GiB are planned with --optimizer.memory" in line
    assert float(line.split("; ")[2].split()[0]) * GIB < need.needed
    # with a checkpoint, what a run may change when it goes on; without one, all
    assert "--optimizer.fused-backward false --train.batch-size 64" in line
    planner = Planner(config_of(), ROOMY)
    for memory, going_on in (
        ("exact", "--optimizer.memory paged"),
        ("paged", "cannot go on in less; a new one is planned at"),
    ):
        need = planner.need(memory, "offload", 64)
        line = out_of_memory(config_of(), ROOMY, need, Bucket(96, 64), 64, 7, 5)
        assert going_on in line
        assert ("--train.batch-size 64" in line) == (memory == "exact")
        anew = out_of_memory(config_of(), ROOMY, need, Bucket(96, 64), 64, 7, -1)
        assert "; nothing was saved yet; " in anew
        assert "go on" not in anew


def test_a_run_whose_memory_is_full_ends_in_one_line_and_keeps_what_was_saved(make_config, monkeypatch):
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


def test_what_is_done_between_steps_fills_the_room_that_is_left_and_decides_nothing():
    config, roomy = sd15(9)
    _, with_room = settle_on(config, roomy)
    assert (with_room.between.prompts, with_room.between.validated, with_room.between.decode_on) == (8, 8, "gpu")
    assert "between" not in describe(with_room)
    assert with_room.needed < with_room.between.most <= 9 * GIB
    # a limit that leaves no room for CUDA graphs
    config, tight = sd15(5.7)
    _, need = settle_on(config, tight)
    assert need.needed == with_room.needed
    assert need.between.most <= 5.7 * GIB
    assert need.between.decode_on == "cpu"
    assert need.between.prompts in (1, 2, 4)
    line = describe(need)
    assert line.endswith("decodes samples on the CPU, which takes longer")
    assert f"draws {need.between.prompts} prompt" in line
    # a run that goes on does as it began, where that fits
    _, again = settle_on(config, Card("larger", 9.0), record(need))
    assert (again.between.prompts, again.between.decode_on) == (need.between.prompts, "cpu")
    _, anew = settle_on(config, tight, record(with_room))
    assert anew.between == need.between
    for damage in ({"prompts": 3}, {"prompts": 8, "decode_on": "moon"}, "?", None, {"more": 1}):
        assert settle_on(config, tight, record(need) | {"between": damage})[1].between == need.between
    # what a run does not do is not planned
    none = {"validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
    assert settle_on(sd15(5.7, **none)[0], tight)[1].between.describe() == ""
