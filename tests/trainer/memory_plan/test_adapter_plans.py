"""Golden plans of a LoRA on a full, an 8-bit and an NF4 base, for SD 1.5 at 512 px and SDXL at 1024 px, batch size 1.

`python tests/trainer/memory_plan/test_adapter_plans.py` rewrites them.
"""

import json
from pathlib import Path

import pytest

from safelight.kernels.ops.quantized_weight import FORMATS
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import find_card
from safelight.units import GIB

GOLDEN = Path(__file__).parent / "golden_adapter_plans.json"
CARD = "6GiB"
BASES = {"sd15": 512, "sdxl": 1024}
CHECKPOINTING = ("none", "full", "offload")


def config_of(base: str, held: str, resolution: int, **train):
    settings = {
        "model": {"base": base},
        "adapter": {"kind": "lora", "base": held},
        "data": {"resolution": resolution},
        "train": {"batch_size": 1, **train},
    }
    return parse_config(settings, "here")


def plans(base: str, held: str) -> dict[str, Candidate]:
    estimator = MemoryEstimator(config_of(f"random:{base}", held, BASES[base]), find_card(CARD))
    return {mode: estimator.estimate("exact", mode, 1, False) for mode in CHECKPOINTING}


def golden(base: str, held: str) -> dict[str, float]:
    """Return GiB of the whole run by checkpointing mode."""
    return {mode: round(plan.needed_bytes / GIB, 3) for mode, plan in plans(base, held).items()}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("held", ["full", *FORMATS])
def test_golden_plans(base, held):
    assert golden(base, held) == json.loads(GOLDEN.read_text())[base][held]


def test_golden_figures_of_sdxl_fit_6_gib():
    sdxl = json.loads(GOLDEN.read_text())["sdxl"]
    for held in FORMATS:
        assert sdxl[held]["full"] < 6
    for mode in CHECKPOINTING:
        assert sdxl["nf4"][mode] < sdxl["8bit"][mode] < sdxl["full"][mode]


@pytest.mark.parametrize("held", FORMATS)
def test_what_a_quantized_base_saves_is_what_its_weights_save(held):
    """A step holds less by the difference of the weights; one dense weight at a time is added to it."""
    candidates = {}
    for one in ("full", held):
        estimator = MemoryEstimator(config_of("tiny", one, 64), find_card(CARD))
        candidates[one] = estimator.estimate("exact", "none", 2, False)
    full, quantized = candidates["full"], candidates[held]
    saved = full.bytes_by_kind["weights"] - quantized.bytes_by_kind["weights"]
    assert saved > 0.2 * full.bytes_by_kind["weights"]
    # less a table of codes, which all weights share
    assert 0 <= saved - (full.held_bytes - quantized.held_bytes) <= 1024
    assert abs(quantized.step_bytes - full.step_bytes) < 2**20


if __name__ == "__main__":
    rows = {base: {held: golden(base, held) for held in ("full", *FORMATS)} for base in BASES}
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
