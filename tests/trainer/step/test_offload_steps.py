"""Steps with offloaded activations give the same weights, also fused; and what the memory tracer sees of them."""

import copy

import pytest
import torch

from safelight.kernels.ops.noising import Noised
from safelight.kernels.unet import activation_offload as offload
from safelight.kernels.unet import patch
from safelight.kernels.unet.activation_offload import offload_of
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.memory_plan.memory_tracer import ACTIVATIONS
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import accumulate

SCHEDULE = make_schedule(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
)


def weights_after_two_steps(small_unet, mode, fused, dtype):
    """Return the fp32 weights, and how often each parameter got a gradient in each backward pass."""
    unet = copy.deepcopy(small_unet)
    patch.apply(unet)
    apply_checkpointing(unet, mode)
    optimizer = make_optimizer(unet, Optimizer(fused_backward=fused), dtype, 3)
    patch.repack(unet)
    optimizer.set_hyper(1e-3, 0.01, 1.0)
    arrived = dict.fromkeys(optimizer.parameters, 0)
    for name, p in optimizer.parameters.items():
        p.register_post_accumulate_grad_hook(lambda _, name=name: arrived.update({name: arrived[name] + 1}))
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        shapes = [(2, 4, 8, 8), (2, 4, 8, 8), (2, 6, 16)]
        sample, target, text = (torch.randn(s, generator=generator) for s in shapes)
        optimizer.prepare_backward()
        noised = Noised(sample, target, torch.tensor([100, 700]))
        accumulate(unet, noised, TextConditioning(text), SCHEDULE, Loss(), 2, optimizer.loss_scale.scale)
        optimizer.step()
    if mode == "offload":
        assert offload_of(unet).copied_bytes > 0
    return {name: optimizer.value(name).clone() for name in optimizer.parameters}, arrived


@pytest.mark.parametrize(("fused", "dtype"), [(True, torch.bfloat16), (True, torch.float32), (False, torch.bfloat16)])
def test_gradients_arrive_once_and_the_step_is_the_same(small_unet, fused, dtype, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 512)
    expected, _ = weights_after_two_steps(small_unet, "none", fused, dtype)
    found, arrived = weights_after_two_steps(small_unet, "offload", fused, dtype)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert set(arrived.values()) == {2}


def test_the_trace_of_a_plan_sees_activations_leave_the_device(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 512)
    config = parse_config({"train": {"kernels": "on"}, "optimizer": {"fused_backward": True}}, "here")
    run = MetaRun(config, resolve_base("tiny"), torch.device("cuda"), torch.bfloat16)
    traced = {}
    for mode in ("full", "offload"):
        run.checkpoint(mode)
        run.step(1, 8, 8)
        held = run.live.total
        traced[mode] = run.step(32, 16, 16)
        # host memory is not the card's
        assert run.live.total == held
    assert traced["offload"].transient < 0.8 * traced["full"].transient
    assert traced["offload"].peak.kinds[ACTIVATIONS] < 0.2 * traced["full"].peak.kinds[ACTIVATIONS]
    found = offload_of(run.unet)
    assert 0 < found.copied_bytes <= found.host_bytes
