"""Padding heads in attention does not change what a step of SD1.5 needs at its peak, so a plan need not know of it."""

import pytest
import torch

from safelight.kernels.unet import attention_probe
from safelight.kernels.unet.attention_backends import Verdict
from safelight.kernels.unet.padded_attention import padded_name
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import resolve_base


def transient(checkpointing: str, batch_size: int) -> int:
    settings = {"model": {"base": "random:sd15"}, "train": {"checkpointing": checkpointing, "kernels": "on"}}
    run = MetaRun(parse_config(settings, "here"), resolve_base("random:sd15"), torch.device("cuda"), torch.bfloat16)
    return run.step(batch_size, 64, 64).transient


@pytest.mark.long
@pytest.mark.parametrize(("checkpointing", "batch_size"), [("none", 4), ("selective", 4), ("full", 8)])
def test_the_peak_of_a_step_is_the_same_with_padded_heads(monkeypatch, checkpointing, batch_size):
    plain = transient(checkpointing, batch_size)
    chosen = set()

    def padded(case, candidates, *_):
        name = padded_name("flash", case.head_dim)
        chosen.add((case.head_dim, name))
        return Verdict(name, {})

    monkeypatch.setattr(attention_probe, "_judge", padded)
    assert transient(checkpointing, batch_size) == plain
    assert chosen == {(40, "flash@64"), (80, "flash@96"), (160, "flash@192")}
