"""The optimizer's state in a checkpoint: complete, a copy, and refused where it is another's."""

import pytest
import torch

from safelight.trainer.checkpoint.files import load_checkpoint, save_checkpoint
from safelight.trainer.config.toml import Optimizer
from safelight.trainer.optim.optimizer import UNetOptimizer
from tests.trainer.checkpoints import IDENTITY, POSITION, make_unet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def steps(unet, optimizer: UNetOptimizer, first: int, last: int) -> list[torch.Tensor]:
    """Take steps with gradients that depend on the step alone, of which step 1 has an infinite one; return the norms."""
    norms = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if number == 1:
            unet.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        norms.append(optimizer.step(1e-3 / (number + 1), 0.01, 0.5)[0])
    return norms


@pytest.mark.parametrize("name", ["adamw", "bnb_adamw8bit", "adamw8bit"])
@pytest.mark.parametrize("precision", DTYPES)
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path, name, precision):
    config = Optimizer(name=name, lr=1e-3)
    unet = make_unet(1)
    optimizer = UNetOptimizer(unet, config, DTYPES[precision])
    steps(unet, optimizer, 0, 3)
    save_checkpoint(tmp_path, unet, optimizer.state_tensors(), POSITION, IDENTITY)

    resumed_unet = make_unet(2)
    resumed = UNetOptimizer(resumed_unet, config, DTYPES[precision])
    resumed.load_state_tensors(load_checkpoint(tmp_path, 7, resumed_unet)[0])
    scale = resumed.loss_scale.scale.item()
    assert scale == (2.0**15 if precision == "fp16" else 1.0), "the infinite gradient halved it"

    for norm, resumed_norm in zip(steps(unet, optimizer, 3, 6), steps(resumed_unet, resumed, 3, 6), strict=True):
        assert torch.equal(norm, resumed_norm)
    weights = unet.state_dict()
    assert {value.dtype for value in weights.values()} == {DTYPES[precision]}
    for key, value in resumed_unet.state_dict().items():
        assert torch.equal(value, weights[key]), key
    state, resumed_state = optimizer.state_tensors(), resumed.state_tensors()
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(state[key], resumed_state[key]) for key in state)
    beside = "remainder/" if name == "adamw8bit" else "master/"
    assert any(key.startswith(beside) for key in state) == (precision != "fp32")
    if name != "adamw":
        assert {value.dtype for key, value in state.items() if key.startswith("state1/")} == {
            torch.uint8,
            torch.float32,
        }


def test_the_state_is_a_copy(tmp_path):
    unet = make_unet()
    optimizer = UNetOptimizer(unet, Optimizer(name="adamw"), torch.bfloat16)
    steps(unet, optimizer, 0, 1)
    state = optimizer.state_tensors()
    before = {key: value.clone() for key, value in state.items()}
    steps(unet, optimizer, 2, 3)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_state_of_another_optimizer_precision_or_unet_is_refused():
    unet = make_unet()
    optimizer = UNetOptimizer(unet, Optimizer(name="adamw"))
    steps(unet, optimizer, 0, 1)
    state = optimizer.state_tensors()
    with pytest.raises(ValueError, match="are not of optimizer adamw8bit"):
        UNetOptimizer(make_unet(), Optimizer(name="adamw8bit")).load_state_tensors(state)
    with pytest.raises(ValueError, match=r"no fp32 master of conv_in.* it was saved at another precision"):
        UNetOptimizer(make_unet(), Optimizer(name="adamw"), torch.bfloat16).load_state_tensors(state)
    with pytest.raises(ValueError, match="names elsewhere, which this UNet does not train"):
        optimizer.load_state_tensors({**state, "exp_avg/elsewhere": torch.ones(1)})
    with pytest.raises(ValueError, match=r"moments of conv_in\.weight have shape \(3,\), not"):
        optimizer.load_state_tensors({**state, "exp_avg/conv_in.weight": torch.ones(3)})
