"""What every optimizer does alike: its state in a checkpoint, dry runs, fp16's loss scale."""

import copy

import pytest
import torch

from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import load_checkpoint, save_checkpoint
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.optim.base import LossScale
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.trainer.registry.optimizers import OPTIMIZERS
from tests.trainer.checkpoints import IDENTITY, POSITION, make_unet, state_tensors, writes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_A_CPU = [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices]


def take_steps(unet, optimizer: UNetOptimizer, first: int, last: int) -> list[torch.Tensor]:
    """Take steps with gradients that depend on the step's number only, infinite in step 1. Return the norms."""
    norms = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if number == 1:
            unet.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        optimizer.set_hyper(1e-3 / (number + 1), 0.01, 0.5)
        norms.append(optimizer.step()[0])
    return norms


def everything(unet, optimizer: UNetOptimizer) -> dict[str, torch.Tensor]:
    return {key: x.clone() for key, x in {**unet.state_dict(), **state_tensors(optimizer)}.items()}


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [key for key in some if not torch.equal(some[key], others[key])] == []


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path, name, precision):
    config = Optimizer(name=name, lr=1e-3)
    unet = make_unet(1)
    optimizer = make_optimizer(unet, config, DTYPES[precision])
    take_steps(unet, optimizer, 0, 3)
    save_checkpoint(tmp_path, writes(unet), state_tensors(optimizer), POSITION, IDENTITY)

    resumed_unet = make_unet(2)
    resumed = make_optimizer(resumed_unet, config, DTYPES[precision])
    resumed.load_state_tensors(load_checkpoint(tmp_path, 7, FullFineTune(resumed_unet))[0])
    scale = resumed.loss_scale.scale.item()
    assert scale == (2.0**15 if precision == "fp16" else 1.0), "the infinite gradient halves it"

    norms, resumed_norms = take_steps(unet, optimizer, 3, 6), take_steps(resumed_unet, resumed, 3, 6)
    assert all(map(torch.equal, norms, resumed_norms))
    assert {value.dtype for value in unet.state_dict().values()} == {DTYPES[precision]}
    assert_same(everything(unet, optimizer), everything(resumed_unet, resumed))
    completes = "remainder/" if optimizer.memory == "exact" else "master/"
    assert any(key.startswith(completes) for key in state_tensors(optimizer)) == (precision != "fp32")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("adamw8bit", {"step", "state1", "state2", "absmax1", "absmax2", "remainder"}),
        ("bnb_adamw8bit", {"step", "state1", "state2", "absmax1", "absmax2", "master"}),
        ("bnb_lion8bit", {"step", "state1", "absmax1", "master"}),
        ("adamw", {"step", "exp_avg", "exp_avg_sq", "master"}),
        ("adafactor", {"step", "row_var", "col_var", "variance", "master"}),
    ],
)
def test_the_names_of_a_checkpoints_tensors_stay(name, parts):
    unet = make_unet()
    optimizer = make_optimizer(unet, Optimizer(name=name), torch.bfloat16)
    take_steps(unet, optimizer, 0, 1)
    state = state_tensors(optimizer)
    assert {"loss_scale/scale", "loss_scale/num_good"} <= state.keys()
    assert {key.split("/")[0] for key in state} == parts | {"loss_scale"}
    if "state1" in parts:
        assert {x.dtype for key, x in state.items() if key.startswith("state1/")} == {torch.uint8, torch.float32}


def test_the_state_is_a_copy():
    unet = make_unet()
    optimizer = make_optimizer(unet, Optimizer(name="adamw"), torch.bfloat16)
    take_steps(unet, optimizer, 0, 1)
    state = state_tensors(optimizer)
    before = {key: value.clone() for key, value in state.items()}
    take_steps(unet, optimizer, 2, 3)
    assert_same(state, before)


def test_a_state_of_another_optimizer_precision_or_unet_is_refused():
    unet = make_unet()
    optimizer = make_optimizer(unet, Optimizer(name="adamw"))
    take_steps(unet, optimizer, 0, 1)
    state = state_tensors(optimizer)
    for name in ("adamw8bit", "adafactor"):
        with pytest.raises(ValueError, match=f"are not of optimizer {name}"):
            make_optimizer(make_unet(), Optimizer(name=name)).load_state_tensors(state)
    with pytest.raises(ValueError, match=r"no fp32 master of conv_in.* it was saved at another precision"):
        make_optimizer(make_unet(), Optimizer(name="adamw"), torch.bfloat16).load_state_tensors(state)
    with pytest.raises(ValueError, match="names 'exp_avg/elsewhere', which this UNet does not train"):
        optimizer.load_state_tensors({**state, "exp_avg/elsewhere": torch.ones(1)})
    with pytest.raises(ValueError, match=r"moments of conv_in\.weight have shape \(3,\), not"):
        optimizer.load_state_tensors({**state, "exp_avg/conv_in.weight": torch.ones(3)})


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_dry_run_changes_nothing(name):
    unet = make_unet()
    optimizer = make_optimizer(unet, Optimizer(name=name), torch.float16)
    for number in (2, 3):
        before = everything(unet, optimizer)
        # a finite step and an overflow
        for dry_number in (5, 1):
            with optimizer.dry_run():
                take_steps(unet, optimizer, dry_number, dry_number + 1)
            assert all(p.grad is None for p in unet.parameters())
        assert_same(everything(unet, optimizer), before)
        take_steps(unet, optimizer, number, number + 1)
        # of the state at least: RAdam and Prodigy hardly move weights in their first steps
        after = everything(unet, optimizer)
        assert any(not torch.equal(after[name], before[name]) for name in before)


def test_the_loss_scale_follows_its_formula_in_place():
    scale = LossScale(torch.device("cpu"), True)
    expected, good = 2.0**16, 0
    addresses = scale.scale.data_ptr(), scale.num_good.data_ptr()
    for number in range(2200):
        is_finite = number % 1070 != 5
        good = good + 1 if is_finite else 0
        expected *= (2 if good >= 1000 else 1) if is_finite else 0.5
        good = 0 if good >= 1000 else good
        scale.update(torch.tensor(is_finite))
        assert (float(scale.scale), int(scale.num_good)) == (expected, good)
    assert expected != 2.0**16
    assert addresses == (scale.scale.data_ptr(), scale.num_good.data_ptr())
    other = copy.deepcopy(scale)
    for _ in range(60):
        other.update(torch.tensor(False))
    assert float(other.scale) == 2.0**-14
