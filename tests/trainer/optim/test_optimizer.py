"""Which optimizers and memory modes a config can have, and how what they cannot do is refused."""

import pytest
import torch

from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.optim import optimizer as module
from safelight.trainer.optim.optimizer import make_optimizer, memory_mode
from safelight.trainer.registry.optimizers import OPTIMIZERS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LIBRARIES = [name for name in OPTIMIZERS if name != "adamw8bit"]


@pytest.mark.parametrize(
    ("name", "memory", "dtype", "expected"),
    [
        ("adamw8bit", "auto", torch.float32, "fp32"),
        ("adamw8bit", "auto", torch.bfloat16, "exact"),
        ("adamw8bit", "near", torch.float16, "near"),
        ("adamw8bit", "paged", torch.float16, "paged"),
        *((name, memory, torch.bfloat16, "fp32") for name in LIBRARIES for memory in ("auto", "fp32")),
    ],
)
def test_the_memory_mode_of_a_config(name, memory, dtype, expected):
    assert memory_mode(Optimizer(name=name, memory=memory), dtype) == expected


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("memory", ["exact", "near", "rounded", "paged"])
def test_a_library_refuses_the_kernels_memory_modes(name, memory):
    message = rf"^optimizer\.memory {memory} needs adamw8bit; {name} keeps fp32 masters: use auto or fp32$"
    with pytest.raises(ValueError, match=message):
        memory_mode(Optimizer(name=name, memory=memory), torch.bfloat16)


@pytest.mark.parametrize("memory", ["exact", "near", "rounded", "paged"])
def test_modes_of_16_bit_weights_are_refused_for_fp32(memory):
    with pytest.raises(
        ValueError, match=rf"memory {memory} is for 16-bit weights, and model\.precision is fp32 here; use"
    ):
        memory_mode(Optimizer(memory=memory), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fused_backward": True, "clipping": "global"},
            "clipping global does not work with optimizer.fused_backward true; use auto or lagged or",
        ),
        (
            {"fused_backward": False, "clipping": "lagged"},
            "clipping lagged does not work with optimizer.fused_backward false; use auto or global",
        ),
        *(
            (
                {"fused_backward": True, "name": name},
                f"^optimizer.fused_backward needs adamw8bit; {name} steps after backward: set it to false$",
            )
            for name in LIBRARIES
        ),
        ({"name": "adafactor", "betas": (0.9, 0.99)}, "^optimizer.betas has no effect on adafactor; leave it out$"),
        ({"name": "adafactor", "eps": 1e-6}, "^optimizer.eps has no effect on adafactor; leave it out$"),
        ({"name": "bnb_lion8bit", "eps": 1e-6}, "^optimizer.eps has no effect on bnb_lion8bit; leave it out$"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        memory_mode(Optimizer(**options), torch.bfloat16)


def test_unified_memory_is_refused_on_a_cpu_in_one_line():
    config = Optimizer(name="bnb_paged_adamw8bit")
    message = (
        "bnb_paged_adamw8bit keeps its moments in CUDA's unified memory, and this run is on a CPU; use bnb_adamw8bit$"
    )
    with pytest.raises(ValueError, match=message):
        make_optimizer(torch.nn.Linear(4, 4), config, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        memory_mode(config, torch.bfloat16, CPU)
    assert memory_mode(config, torch.bfloat16, CUDA) == "fp32"


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"name bnb_lion8bit needs bitsandbytes, which is not installed; use"):
        memory_mode(Optimizer(name="bnb_lion8bit"), torch.bfloat16)


def test_an_unknown_name_or_mode_is_answered_with_the_known_ones():
    for section, known in (
        ({"memory": "host"}, "'auto', 'exact', 'near', 'rounded', 'paged', 'streamed' or 'fp32'"),
        ({"name": "sgd"}, ", ".join(f"'{name}'" for name in list(OPTIMIZERS)[:-1]) + f" or '{list(OPTIMIZERS)[-1]}'"),
    ):
        (field, value), *_ = section.items()
        with pytest.raises(ValueError, match=rf"^here: optimizer\.{field} = '{value}': input should be {known}$"):
            parse_config({"optimizer": section}, "here")


def test_a_step_inside_backward_is_chosen_by_the_config():
    linear = torch.nn.Linear(4, 4)
    assert not make_optimizer(linear, Optimizer()).is_fused
    assert make_optimizer(linear, Optimizer(clipping="lagged")).is_fused
    # `auto` never asks an optimizer for what it cannot do
    assert not make_optimizer(linear, Optimizer(name="adamw")).is_fused
