"""Runs with 4-bit moments: one that is resumed equals one that never stopped, in every memory mode."""

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.train import train


def config_of(small_config, run_dir, precision: str, max_steps: int, adapter: dict, **optimizer):
    return small_config(
        run={"dir": str(run_dir)},
        model={"precision": precision},
        optimizer={"name": "adamw8bit", "lr": 1e-3, **optimizer},
        adapter=adapter,
        stage=[{"epochs": 2}],
        train={"max_steps": max_steps, "batch_size": 8},
        save={"every_steps": 2, "every_epochs": 0},
        validate={"every_epochs": 0},
        sample={"every_epochs": 0},
    )


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{name}": x for file in folder.rglob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "optimizer", "adapter"),
    [
        ("fp32", {}, {}),
        ("bf16", {"memory": "exact", "fused_backward": True}, {}),
        ("bf16", {"memory": "rounded"}, {}),
        ("bf16", {"memory": "paged"}, {}),
        ("bf16", {"memory": "streamed"}, {}),
        ("bf16", {}, {"kind": "lora", "rank": 64}),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(small_config, tmp_path, precision, optimizer, adapter):
    ends = []
    for num_steps in ([4], [2, 4]):
        run_dir = tmp_path / str(len(num_steps))
        for place, max_steps in enumerate(num_steps):
            config = config_of(small_config, run_dir, precision, max_steps, adapter, moments="4bit", **optimizer)
            train(config, resume=place > 0)
        ends.append(all_tensors(folder_of(run_dir, 4)))
    one, other = ends
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    packed = [x for key, x in one.items() if "/packed/" in key]
    assert packed
    assert {x.dtype for x in packed} == {torch.uint8}
    # both codes of an element in one byte: no second state but of small tensors
    assert all(x.dtype == torch.float32 for key, x in one.items() if "/state2/" in key)
    # and they moved
    assert all(len(x.unique()) > 16 for x in packed)
    other_kind = config_of(small_config, run_dir, precision, 6, adapter, moments="8bit", **optimizer)
    with pytest.raises(ValueError, match=r"optimizer\.moments is '8bit', but '4bit' in the checkpoint"):
        train(other_kind, resume=True)
