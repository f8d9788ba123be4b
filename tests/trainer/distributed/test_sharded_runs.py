"""Whole runs whose processes divide the optimizer's state, against runs of one process, and resumed by others."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config
from tests.small_base import small_base
from tests.trainer.distributed.several import train_run
from tests.trainer.equal_runs import assert_equal_runs, assert_equal_weights

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


def settings_for(folder: Path, dataset: Path, **tables) -> dict:
    settings = {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base(), "precision": "bf16"},
        "data": {"path": str(dataset), "resolution": 64, "variants": 2, "caption_dropout": 0.2},
        "train": {"batch_size": 4, "accumulate": 2},
        "optimizer": {"lr": 1e-3, "schedule": "cosine"},
        "stage": [{"epochs": 1}, {"epochs": 1, "lr": 5e-4, "batch_size": 3}],
        "sample": {"steps": 2, "num_prompts": 2, "every_epochs": 1, "compare_at_end": False},
        "validate": {"timesteps": 2, "every_epochs": 1},
        "save": {"every_epochs": 1, "keep": 9},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, values in tables.items():
        settings[name] = {**settings[name], **values} if isinstance(settings.get(name), dict) else values
    return settings


# tables of a run, and its trained weights in a checkpoint
RUNS = {
    "average": ({"train": {"ema_decay": 0.9}}, WEIGHTS),
    "text encoder, fused": (
        {"text_encoder": {"train": True, "lr": 1e-3, "epochs": 1}, "optimizer": {"fused_backward": True}},
        WEIGHTS,
    ),
    "lora": ({"adapter": {"kind": "lora", "rank": 4}, "train": {"ema_decay": 0.5}}, LORA_WEIGHTS),
    "paged": ({"optimizer": {"memory": "paged"}}, WEIGHTS),
    "rounded": ({"optimizer": {"memory": "rounded", "fused_backward": True, "clipping": "per-tensor"}}, WEIGHTS),
    "schedule-free": (
        {"optimizer": {"name": "schedulefree_adamw", "lr": 1e-3, "schedule": "constant"}},
        WEIGHTS,
    ),
    "fp16, bitsandbytes": ({"model": {"precision": "fp16"}, "optimizer": {"name": "bnb_adamw8bit"}}, WEIGHTS),
    "best of a stage": (
        {"stage": [{"epochs": 2, "lr": 1e-2}, {"epochs": 1, "start_from": "best"}], "train": {"ema_decay": 0.9}},
        WEIGHTS,
    ),
    "word": (
        {"adapter": {"kind": "embedding"}, "embedding": {"word": "<look>", "initial_text": "a square", "vectors": 3}},
        "embedding/learned_embeds.safetensors",
    ),
    # at the first stage's rate the held-out loss does not improve
    "patience": (
        {
            "validate": {"timesteps": 1, "every_epochs": 1, "patience": 1},
            "stage": [{"epochs": 6, "lr": 1e-9}, {"epochs": 1, "lr": 1e-3}],
        },
        WEIGHTS,
    ),
}


# runs that are also tested without sharding
WHOLE = ("average", "text encoder, fused", "lora", "best of a stage", "patience")
SPREAD = [*(("states", what) for what in RUNS), *(("none", what) for what in WHOLE)]


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "what"), SPREAD)
def test_a_run_of_two_processes_equals_one_of_one(processes, tiny_dataset, tmp_path, shard, what):
    tables, weights = RUNS[what]
    alone = settings_for(tmp_path / "alone", tiny_dataset, **copy.deepcopy(tables))
    spread = settings_for(tmp_path / "spread", tiny_dataset, **copy.deepcopy(tables), distributed={"shard": shard})
    processes(train_run, num=1, settings=alone)
    processes(train_run, settings=spread)
    assert_equal_runs(tmp_path / "alone", tmp_path / "spread", weights)
    if what == "patience":
        assert "stage ended early" in rows_of(tmp_path / "spread", "event", "event")


def stopped_after(settings: dict, epochs: int) -> dict:
    """Return settings that end after an epoch; with more epochs a resume goes on."""
    return {**settings, "optimizer": {**settings["optimizer"], "schedule": "constant"}, "stage": [{"epochs": epochs}]}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [("states", "states", "none"), ("none", "states", "states")])
def test_resumed_by_other_numbers_of_processes(processes, tiny_dataset, tmp_path, shards):
    """1 -> 2 -> 4 -> 1 processes: whoever owns the state, the bits are the same, and one process is near throughout."""
    tables = {"train": {"ema_decay": 0.9, "accumulate": 4, "batch_size": 2}, "optimizer": {"memory": "exact"}}
    alone = stopped_after(settings_for(tmp_path / "alone", tiny_dataset, **copy.deepcopy(tables)), 4)
    processes(train_run, num=1, settings=alone)
    for name, each in (("changing", shards), ("undivided", ("none", "none", "none"))):
        changing = settings_for(tmp_path / name, tiny_dataset, **copy.deepcopy(tables))
        processes(train_run, num=1, settings=stopped_after(changing, 1))
        for epochs, num, shard in zip((2, 3, 4), (2, 4, 1), each, strict=True):
            settings = {**stopped_after(changing, epochs), "distributed": {"shard": shard}}
            # gloo reduces to one process in another order than to all
            processes(train_run, num=num, settings=settings, resume=True, adds_in_order=num > 1)
    assert list_checkpoints(tmp_path / "alone") == list_checkpoints(tmp_path / "changing")
    assert_equal_weights(tmp_path / "undivided", tmp_path / "changing", WEIGHTS)
    alone, changing, undivided = (
        rows_of(tmp_path / name, "train", "loss") for name in ("alone", "changing", "undivided")
    )
    assert changing == undivided
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(changing), rtol=2e-2, atol=0)


def rows_of(run: Path, kind: str, name: str) -> list:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if row["kind"] == kind]


def assert_near(one: Path, other: Path, far: float) -> None:
    """Assert that two runs have checkpoints of the same steps, keys and forms, near weights and near losses."""
    assert list_checkpoints(one) == list_checkpoints(other)
    for step in list_checkpoints(one):
        for name in (WEIGHTS, "state.safetensors"):
            a, b = (load_file(folder_of(run, step) / name) for run in (one, other))
            assert {key: (x.shape, x.dtype) for key, x in a.items()} == {k: (x.shape, x.dtype) for k, x in b.items()}
            if name == WEIGHTS:
                assert max((a[key].float() - b[key].float()).abs().max() for key in a) < far
        configs = [(folder_of(run, step) / "unet" / "config.json").read_text() for run in (one, other)]
        assert configs[0] == configs[1]
    for kind in ("train", "validation"):
        torch.testing.assert_close(
            *(torch.tensor(rows_of(run, kind, "loss")) for run in (one, other)), rtol=2e-2, atol=1e-3
        )
    samples = [sorted(path.relative_to(run) for path in run.glob("samples/*/*")) for run in (one, other)]
    assert samples[0] == samples[1] != []


CUT_RUNS = {
    "average": {"train": {"ema_decay": 0.9}},
    "fp32 fused": {"model": {"precision": "fp32"}, "optimizer": {"fused_backward": True}},
    "checkpointing": {"train": {"checkpointing": "full", "accumulate": 4, "batch_size": 2}},
    "text encoder": {"text_encoder": {"train": True, "lr": 1e-3}},
    "fp16": {"model": {"precision": "fp16"}},
    "paged": {"optimizer": {"memory": "paged"}},
}
FAST_CUT = ("average",)
CUT_PARAMS = [pytest.param(what, marks=() if what in FAST_CUT else pytest.mark.slow) for what in CUT_RUNS]


@pytest.mark.parametrize("what", CUT_PARAMS)
@pytest.mark.long
def test_a_run_with_cut_weights_is_near_one_of_one_process(processes, tiny_dataset, tmp_path, what):
    def settings(name: str, shard: str, epochs: int) -> dict:
        tables = copy.deepcopy(CUT_RUNS[what])
        made = stopped_after(settings_for(tmp_path / name, tiny_dataset, **tables), epochs)
        made["optimizer"]["lr"] = 1e-4
        return {**made, "distributed": {"shard": shard}}

    processes(train_run, num=1, settings=settings("alone", "none", 2))
    processes(train_run, settings=settings("cut", "full", 1))
    # of the fast one, another number of processes goes on, which cuts nothing
    processes(train_run, num=1 if what in FAST_CUT else 2, settings=settings("cut", "full", 2), resume=True)
    # 4 steps of 1e-4, in bf16
    assert_near(tmp_path / "alone", tmp_path / "cut", 1e-2)


@pytest.mark.slow
def test_a_run_with_cut_weights_goes_through_stages_and_patience_ends_one(processes, tiny_dataset, tmp_path):
    for num, (name, shard) in enumerate((("alone", "none"), ("cut", "full")), start=1):
        settings = settings_for(
            tmp_path / name,
            tiny_dataset,
            validate={"patience": 1, "patience_ends": "stage"},
            # at the first stage's rate the held-out loss does not improve
            stage=[{"epochs": 6, "lr": 1e-9}, {"epochs": 1, "lr": 1e-4, "batch_size": 3}],
            distributed={"shard": shard},
        )
        processes(train_run, num=num, settings=settings)
    assert_near(tmp_path / "alone", tmp_path / "cut", 1e-2)
    events = [
        [*zip(*(rows_of(tmp_path / name, "event", key) for key in ("step", "event")), strict=True)]
        for name in ("alone", "cut")
    ]
    assert events[0] == events[1]
    assert "stage ended early" in [event for _, event in events[0]]


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [({"name": "prodigy", "lr": 1.0}, "one learning rate"), ({"memory": "streamed"}, "host memory")],
)
def test_state_that_cannot_be_divided_is_refused(optimizer, reason):
    with pytest.raises(UserError, match=f"distributed.shard states does not .*{reason}.*shard none"):
        parse_config({"optimizer": optimizer, "distributed": {"shard": "states"}}, "test")


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"optimizer": {"name": "adamw"}}, "needs optimizer.name adamw8bit, not adamw"),
        ({"adapter": {"kind": "lora"}}, "adapter.kind lora trains a few MB"),
        ({"train": {"kernels": "on"}}, "train.kernels on"),
        ({"train": {"checkpointing": "offload"}}, "train.checkpointing offload"),
        ({"optimizer": {"fused_backward": True, "clipping": "per-tensor"}}, "clipping per-tensor"),
    ],
)
def test_what_cannot_be_cut_is_refused(tables, reason):
    with pytest.raises(UserError, match=f"distributed.shard full .*{reason}"):
        parse_config({**tables, "distributed": {"shard": "full"}}, "test")
