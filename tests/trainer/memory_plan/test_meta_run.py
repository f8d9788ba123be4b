"""A traced step with library optimizers holds the bytes that the registry predicts."""

import pytest
import torch

from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.allocation_trace import MASTER, OPTIMIZER
from safelight.trainer.memory_plan.estimator import rounded_up
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.models.base import resolve_base
from safelight.trainer.registry.optimizers import OPTIMIZERS

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["adafactor", "bnb_lion8bit", "bnb_paged_adamw8bit", "prodigy", "schedulefree_adamw"])
@pytest.mark.long
def test_a_library_optimizer_is_planned(name):
    if OPTIMIZERS[name].package:
        pytest.importorskip(OPTIMIZERS[name].package)
    config = parse_config({"model": {"base": "tiny"}, "optimizer": {"name": name}}, "here")
    run = MetaRun(config, resolve_base("tiny"), CUDA, torch.bfloat16)
    first, second = run.step(1, 8, 8), run.step(1, 8, 8)
    assert first.held == second.held
    shapes = [p.shape for p in run.unet.parameters()]
    buffers = [buffer for shape in shapes for buffer in OPTIMIZERS[name].moments(shape)]
    moments = sum(rounded_up(buffer.num_elements * buffer.itemsize) for buffer in buffers)
    # in addition to the moments: the loss scale and its counter
    assert 0 < first.held[OPTIMIZER] - moments <= 2 * 512
    fp32_bytes = 4 * sum(shape.numel() for shape in shapes)
    # packed weights share an allocation
    assert fp32_bytes <= first.held[MASTER] <= sum(rounded_up(4 * shape.numel()) for shape in shapes)
    # the fp32 gradients of the masters all exist at once
    assert first.transient > fp32_bytes


def test_the_masks_of_a_batch_are_counted():
    config = parse_config({"model": {"base": "tiny"}}, "here")
    held, peaks = [], []
    for has_masks in (False, True):
        run = MetaRun(config, resolve_base("tiny"), CUDA, torch.bfloat16, has_masks)
        run.step(1, 8, 8)
        trace = run.step(4, 16, 24)
        held.append(trace.held)
        peaks.append(trace.peak.total)
    assert held[0] == held[1]
    assert peaks[1] - peaks[0] == rounded_up(4 * 4 * 16 * 24)


@pytest.mark.long
def test_the_plan_says_why_a_library_optimizer_cannot_use_graphs():
    planner = Planner(parse_config({"optimizer": {"name": "adafactor"}}, "here"), Card("100 GiB", 100))
    assert planner.combinations() == [("fp32", "none", False)]
    candidate = planner.choose()
    assert (candidate.memory, candidate.fused_backward) == ("fp32", False)
    assert candidate.no_graphs == "adafactor reads values back from the GPU at every step"
    assert planner.rounding_noise([1e-6]) == {}
