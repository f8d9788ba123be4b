"""The plan of a run that trains a word: frozen weights without states, text encoders with activations."""

from __future__ import annotations

import pytest
import torch

from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.allocation_trace import ACTIVATIONS, GRADIENTS, MASTER, OPTIMIZER, WEIGHTS
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import CARDS
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.static_bytes import static_bytes
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import meta_texts, meta_unet


def config_of(vectors: int = 4, **tables) -> Config:
    return Config(
        model={"base": "tiny"},
        data={"resolution": 64},
        adapter={"kind": "embedding"},
        embedding={"vectors": vectors},
        **tables,
    )


def num_values(modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_bytes_are_those_of_frozen_weights_and_a_word(dtype):
    base = resolve_base("tiny")
    unet, texts = num_values([meta_unet(base)]), num_values(meta_texts(base).values())
    static = static_bytes(config_of(optimizer={"name": "adamw"}), torch.device("cpu"), dtype)
    own = 4 * 4 * 128
    # two moments in fp32, and a count of steps
    assert 2 * own <= static.moments <= 2 * own + 8
    assert (static.weights, static.frozen_text) == (unet * dtype.itemsize + own, 4 * texts)
    assert (static.master, static.average, static.gradients, static.num_trained) == (0, 0, own, 4 * 128)
    assert static.checkpoint == own + static.moments
    assert static.total == static.weights + static.frozen_text + static.moments + own


def test_the_traced_step_holds_what_is_frozen_and_keeps_activations():
    card = CARDS["rtx3060"]
    base = resolve_base("tiny")
    estimator = MemoryEstimator(config_of(), card)
    candidate = estimator.estimate("fp32", "none", 2)
    kinds = candidate.bytes_by_kind
    frozen = 2 * num_values([meta_unet(base)]) + 4 * num_values(meta_texts(base).values())
    # the allocator rounds every tensor up
    assert frozen <= kinds[WEIGHTS] <= 1.2 * frozen
    assert kinds[MASTER] == 0
    assert kinds[OPTIMIZER] < 2**16
    assert kinds[GRADIENTS] < 2**16
    assert kinds[ACTIVATIONS] > 2**20
    assert candidate.no_graphs == "captions are read inside the step, whose text encoders are not captured"
    # more images, more activations; what is held stays
    larger = estimator.estimate("fp32", "none", 4)
    assert larger.held_bytes == candidate.held_bytes
    assert larger.step_bytes > 1.8 * candidate.step_bytes


def test_only_checkpointing_is_chosen():
    planner = Planner(config_of(train={"checkpointing": "auto"}), CARDS["rtx3060"])
    assert {(memory, fused) for memory, _, fused in planner.combinations()} == {("fp32", False)}
    assert planner.choose().checkpointing == "none"
    assert planner.rounding_noise([1e-3]) == {}
