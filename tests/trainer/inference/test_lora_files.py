"""A LoRA's files for other programs: kohya's names of all layers of SD 1.5 and SDXL, and what its numbers mean."""

import math
from pathlib import Path

import pytest
import torch

from safelight.kernels.unet.low_rank import adapter_of
from safelight.trainer.adapters.lora import LoRA, scaling_of
from safelight.trainer.config.schema import Adapter
from safelight.trainer.families.original_layout import unet_layout
from safelight.trainer.inference.lora_files import kohya_name, kohya_tensors
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import meta_unet
from tests.trainer.families.small_sdxl import small_unet

# written by hand from the structure of both models, not by our code
NAMES = Path(__file__).parent / "kohya_names.txt"
EVERYTHING = ["linear", "convolution"]


def written(name: str) -> list[str]:
    _, *lists = NAMES.read_text().split("# ")
    return next(names.split("\n")[1:] for names in lists if names.startswith(f"{name}:"))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_layer_has_kohyas_name(name):
    base = resolve_base(f"random:{name}")
    unet = meta_unet(base)
    layout = unet_layout(unet.state_dict(), unet.config.layers_per_block)
    lora = LoRA(unet, Adapter(kind="lora", rank=1, target=EVERYTHING), seed=0)
    assert sorted(kohya_name(layer, base.family, layout) for layer in lora.layers) == sorted(
        filter(None, written(name))
    )


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "alpha": 3.0}, {"dora": True, "alpha": 1.0}])
def test_kohyas_readers_compute_what_was_trained(settings):
    """They add up @ down * alpha / rank, or with dora_scale scale the sum to that norm, as ComfyUI does."""
    torch.manual_seed(0)
    unet = small_unet()
    layout = unet_layout(unet.state_dict(), unet.config.layers_per_block)
    adapter = Adapter(kind="lora", rank=4, target=EVERYTHING, **settings)
    weights = {name: p.detach().clone() for name, p in unet.named_parameters()}
    lora = LoRA(unet, adapter, seed=0)
    family = resolve_base("tiny-xl").family
    values = {}
    for layer_name, layer in lora.layers.items():
        for name, parameter in adapter_of(layer).named_parameters():
            with torch.no_grad():
                parameter.mul_(1.2) if name == "lora_magnitude_vector" else parameter.normal_(std=0.1)
            values[f"{layer_name}.adapter.{name}"] = parameter.detach()
    tensors = kohya_tensors(values, adapter, family, layout)
    for layer_name, layer in lora.layers.items():
        name, weight = kohya_name(layer_name, family, layout), weights[f"{layer_name}.weight"]
        up, down, alpha = (tensors[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        total = weight + (up.flatten(1) @ down.flatten(1)).view(weight.shape) * alpha / down.shape[0]
        if (dora_scale := tensors.get(f"{name}.dora_scale")) is not None:
            norm = total.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
            assert dora_scale.shape == norm.shape
            total = total * dora_scale / norm
        torch.testing.assert_close(total, adapter_of(layer).merged(weight).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rank": 8}, 1),
        ({"rank": 8, "alpha": 4.0}, 0.5),
        ({"rank": 16, "alpha": 8.0, "rslora": True}, 8 / math.sqrt(16)),
    ],
)
def test_scaling(settings, scaling):
    assert scaling_of(Adapter(kind="lora", **settings)) == scaling
