"""LoRA, DoRA and rsLoRA against peft's own modules: output, gradients, several steps; the UNet patched and not."""

import copy

import peft
import pytest
import torch
from torch import nn

from safelight.kernels.unet import patch
from safelight.kernels.unet.low_rank import adapter_of
from safelight.trainer.adapters.lora import LoRA, peft_config
from safelight.trainer.config.schema import Adapter
from tests.kernels.unet.unets import CONFIGS, inputs_of, make

EVERYTHING = ["linear", "convolution"]


def pair(name: str, **settings) -> tuple[nn.Module, LoRA]:
    """Return a UNet with peft's adapters and one with ours, with equal random weights, fp64."""
    settings = Adapter(kind="lora", **{"rank": 3, "alpha": 5.0, **settings})
    theirs = make(CONFIGS[name], torch.float64)
    ours = LoRA(copy.deepcopy(theirs), settings, seed=7)
    values = peft_config(settings, list(ours.layers))
    config = peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in values.items()})
    peft.inject_adapter_in_model(config, theirs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer_name, layer in ours.layers.items():
            other = theirs.get_submodule(layer_name)
            for parameter_name, parameter in adapter_of(layer).named_parameters():
                twin = twin_of(other, parameter_name)
                assert twin.shape == parameter.shape
                if parameter_name == "lora_magnitude_vector":
                    # both begin with the norm of the frozen weight
                    torch.testing.assert_close(twin.double(), parameter)
                    parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
                else:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
                twin.copy_(parameter)
    theirs.double()
    ours.mark()
    return theirs, ours


def twin_of(layer: nn.Module, name: str) -> nn.Parameter:
    module = getattr(layer, name)["default"]
    return module.weight


def run(unet: nn.Module, inputs: dict, target: torch.Tensor) -> torch.Tensor:
    loss = (unet(**inputs, return_dict=False)[0] - target).square().mean()
    loss.backward()
    return loss.detach()


def assert_equal_gradients(theirs: nn.Module, ours: LoRA) -> None:
    for layer_name, layer in ours.layers.items():
        other = theirs.get_submodule(layer_name)
        for name, parameter in adapter_of(layer).named_parameters():
            truth = twin_of(other, name).grad
            assert truth is not None, (layer_name, name)
            torch.testing.assert_close(
                parameter.grad, truth, rtol=1e-7, atol=1e-10, msg=lambda text, at=(layer_name, name): f"{at}: {text}"
            )


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_loss_and_gradients_equal_pefts_over_several_steps(name, patched, kind):
    """Every linear layer and every convolution has an adapter."""
    theirs, ours = pair(name, target=EVERYTHING, **kind)
    unet = ours.unet
    if patched:
        patch.apply(unet)
    inputs = inputs_of(theirs, torch.float64)
    inputs = {key: value.detach() if torch.is_tensor(value) else value for key, value in inputs.items()}
    target = torch.randn(unet(**inputs, return_dict=False)[0].shape, dtype=torch.float64)
    optimizers = [
        torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3) for module in (theirs, unet)
    ]
    trained = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (theirs, unet)]
    assert trained[0] == trained[1] > 0
    for _ in range(3):
        losses = [run(module, inputs, target) for module in (theirs, unet)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
        assert_equal_gradients(theirs, ours)
        assert not any(p.grad is not None for p in unet.parameters() if not p.requires_grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
