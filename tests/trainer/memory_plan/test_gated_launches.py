"""Whatever a preset's training step launches is compiled ahead of time, with the arguments it launches it with."""

from __future__ import annotations

import pytest
import torch

from safelight.data.buckets import make_buckets
from safelight.kernels.aot import compile_all as aot
from safelight.kernels.unet.checkpointing import MODES
from safelight.trainer.config.presets import PRESETS, SD15, SD21, SDXL, preset
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.meta_run import CUDA, MetaRun
from safelight.trainer.models.base import bucket_multiple, resolve_model

pytestmark = pytest.mark.long

# SDXL's UNet takes a minute
NAMES = [pytest.param(name, marks=pytest.mark.slow if "sdxl" in name else ()) for name in PRESETS]

# the same architectures without their weights
RANDOM = {SD15: "random:sd15", SD21: "random:sd21", SDXL: "random:sdxl"}
TRAINED_IN = {torch.bfloat16: 90, torch.float16: 75}


def config_of(name: str, memory: str = "exact") -> Config:
    """Return a preset's settings as a GPU runs them, with what can be switched on beside them."""
    config = preset(name)
    config.model.base = RANDOM.get(config.model.base, config.model.base)
    config.train.kernels, config.train.checkpointing, config.optimizer.fused_backward = "on", "none", False
    if config.optimizer.name == "adamw8bit":
        config.optimizer.memory = memory
    if config.adapter.kind == "none":
        config.train.ema_decay = 0.999
    return config


def not_gated(config: Config, dtype: torch.dtype, is_whole: bool = False, has_masks: bool = False) -> set[str]:
    """Return the labels of the compilations that a run's steps need and the gate lacks.

    is_whole: steps with every checkpointing mode, every bucket of the preset's resolution (its pixels count, not its
    sides), and batches of one, two, three and the preset's size; else two modes and the preset's size.
    """
    base = resolve_model(config.model)
    run = MetaRun(config, base, CUDA, dtype, has_masks)
    side = config.data.resolution
    buckets = make_buckets(side, bucket_multiple(base, 8))
    sizes = {b.width * b.height: (b.height // 8, b.width // 8) for b in buckets}
    modes = MODES if is_whole else ("none", "full")
    steps = [(mode, config.train.batch_size, (side // 8, side // 8)) for mode in modes]
    if is_whole:
        steps += [("none", 2, size) for size in sizes.values()]
        steps += [("none", batch, (side // 8, side // 8)) for batch in (1, 3)]

    def work(_: torch.dtype) -> None:
        for mode, batch, latents in steps:
            run.checkpoint(mode)
            run.step(batch, *latents)

    cases = aot.cases_of(work, dtype)
    assert len(cases) > 50
    assert {"_noising_kernel", "_finish_losses_kernel"} <= {case.launch.kernel.__name__ for case in cases}
    return {case.label for case in cases} - set(aot.required_cases()[TRAINED_IN[dtype]])


@pytest.mark.parametrize("dtype", list(TRAINED_IN))
@pytest.mark.parametrize("name", NAMES)
def test_what_a_preset_launches_is_gated(name, dtype):
    # launches in fp16 differ from those in bf16 by the dtype alone
    assert not_gated(config_of(name), dtype, is_whole=dtype == torch.bfloat16) == set()


@pytest.mark.parametrize("memory", ["near", "rounded", "fp32"])
def test_what_the_memory_modes_launch_is_gated(memory):
    assert not_gated(config_of("sd15", memory), torch.bfloat16) == set()


def test_what_masks_launch_is_gated():
    assert not_gated(config_of("sd15"), torch.bfloat16, has_masks=True) == set()


def test_what_the_gate_lacks_is_noticed(monkeypatch):
    needed = aot.required_cases()
    lacking = {
        target: {label: case for label, case in cases.items() if "_noising_kernel" not in label}
        for target, cases in needed.items()
    }
    monkeypatch.setattr(aot, "required_cases", lambda: lacking)
    assert {label.partition("(")[0] for label in not_gated(config_of("tiny"), torch.bfloat16)} == {
        "noising._noising_kernel"
    }
