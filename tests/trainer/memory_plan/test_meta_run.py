"""A step on meta tensors, for every optimizer of a library: it runs, and holds what the registry says."""

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


@pytest.mark.parametrize("name", ["adafactor", "bnb_lion8bit", "bnb_paged_adamw8bit"])
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
    # besides the moments only the loss scale and its counter
    assert 0 < first.held[OPTIMIZER] - moments <= 2 * 512
    fp32_bytes = 4 * sum(shape.numel() for shape in shapes)
    # packed weights share an allocation
    assert fp32_bytes <= first.held[MASTER] <= sum(rounded_up(4 * shape.numel()) for shape in shapes)
    # the fp32 gradients of the masters all exist at once
    assert first.transient > fp32_bytes


def test_a_plan_says_why_a_library_optimizer_has_no_graphs():
    planner = Planner(parse_config({"optimizer": {"name": "adafactor"}}, "here"), Card("100 GiB", 100))
    assert planner.ways() == [("fp32", "none", False)]
    need = planner.choose()
    assert (need.memory, need.fused_backward) == ("fp32", False)
    assert need.no_graphs == "adafactor reads from the device at every step"
    assert planner.noise([1e-6]) == {}
