"""LoRA, DoRA and rsLoRA against peft's own modules: output, gradients, several steps; the UNet patched and not."""

import copy

import peft
import pytest
import torch
from torch import nn

from safelight.kernels.ops.packed_linear import adjacent_view
from safelight.kernels.unet import patch
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.kernels.unet.low_rank import adapter_of, row_norms
from safelight.trainer.adapters.lora import LoRA, peft_config
from safelight.trainer.config.schema import Adapter
from tests.kernels.unet.unets import CONFIGS, inputs_of, make

EVERYTHING = ["linear", "convolution"]


def pair(name: str | dict, **settings) -> tuple[nn.Module, LoRA]:
    """Return a UNet with peft's adapters and one with ours, with equal random weights, fp64.

    name: in CONFIGS, or a config.
    """
    settings = Adapter(kind="lora", **{"rank": 3, "alpha": 5.0, **settings})
    theirs = make(CONFIGS[name] if isinstance(name, str) else name, torch.float64)
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


# in `make test` LoRA and DoRA on each UNet, once patched and once not; rsLoRA has another factor only
SLOW_PAIRS = {("sd15", True), ("sdxl", False)}
KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True}}
CASES = [
    pytest.param(
        name,
        patched,
        kind,
        id=f"{title}-{'patched' if patched else 'unpatched'}-{name}",
        marks=pytest.mark.slow if (name, patched) in SLOW_PAIRS or (title, name) == ("rslora", "sdxl") else (),
    )
    for title, kind in KINDS.items()
    for patched in (False, True)
    for name in ("sd15", "sdxl")
]


@pytest.mark.parametrize(("name", "patched", "kind"), CASES)
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


class OurDropout(nn.Module):
    """Draws the mask of one of our adapters."""

    def __init__(self, adapter: nn.Module):
        super().__init__()
        self._adapter = (adapter,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._adapter[0]._dropped(x)


@pytest.mark.parametrize("kind", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.long
def test_dropout_equals_pefts_with_the_same_masks(kind):
    """Patched: an adapter's mask is its own also where layers share an input. Recomputed blocks draw the same."""
    theirs, ours = pair("sdxl", target=["attention", "feed-forward", "*conv2"], dropout=0.4, **kind)
    for name, layer in ours.layers.items():
        theirs.get_submodule(name).lora_dropout["default"] = OurDropout(adapter_of(layer))
    inputs = {
        key: value.detach() if torch.is_tensor(value) else value
        for key, value in inputs_of(theirs, torch.float64).items()
    }
    target = torch.zeros(inputs["sample"].shape, dtype=torch.float64)
    ours.dropout_key.value = b"step 1"
    truth = run(theirs, inputs, target)
    patch.apply(ours.unet)
    for mode in ("none", "full"):
        apply_checkpointing(ours.unet, mode)
        torch.testing.assert_close(run(ours.unet, inputs, target), truth, rtol=1e-9, atol=0)
        assert_equal_gradients(theirs, ours)
        ours.unet.zero_grad()
    ours.dropout_key.value = b"step 2"
    assert run(ours.unet, inputs, target) != truth
    ours.unet.eval()
    with torch.no_grad():
        drawn = [ours.unet(**inputs, return_dict=False)[0] for _ in range(2)]
    assert torch.equal(*drawn)


def test_dropouts_masks():
    """As many elements as asked for are dropped and the others enlarged, differently for each adapter and key."""
    _, ours = pair("sd15", target=["*attn1.to_q"], dropout=0.25)
    one, other, *_ = (adapter_of(layer) for layer in ours.layers.values())
    x = torch.ones(500, 1000)
    ours.dropout_key.value = b"a"
    mask = one._dropped(x)
    assert sorted(mask.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert torch.equal(one._dropped(x), mask)
    assert ((other._dropped(x) == 0) & (mask == 0)).float().mean().item() == pytest.approx(1 / 16, abs=0.005)
    ours.dropout_key.value = b"b"
    assert not torch.equal(one._dropped(x), mask)


def test_packed_adapters_are_one_product_and_survive_a_cast():
    """q, k and v's A are adjacent in memory, so that one matmul projects by all three."""
    _, ours = pair("sd15", target=["attention"])
    patch.apply(ours.unet)
    group = [group for what, group in patch._packed_groups(ours.unet) if what == "adapters of layers with one input"]
    assert {len(parameters) for parameters in group} == {3, 2 * 16}
    for parameters in group:
        assert adjacent_view(parameters, 0) is not None
    ours.unet.float()
    inputs = inputs_of(ours.unet)
    with pytest.raises(ValueError, match="no longer share their memory"):
        ours.unet(**inputs)
    patch.repack(ours.unet)
    ours.unet(**inputs)


def test_dora_in_16_bits_begins_as_the_base():
    """Magnitudes are rounded to bf16 and the norms of weights are not: what was rounded off must not scale them."""
    base = make(CONFIGS["sd15"])
    ours = LoRA(copy.deepcopy(base), Adapter(kind="lora", rank=2, target=EVERYTHING, dora=True), seed=1)
    for layer in ours.layers.values():
        gain = adapter_of(layer)._gain_less_1(layer)
        assert gain.abs().max() < 1e-6
    ours.unet.bfloat16()
    errors, naive_errors = [], []
    for layer in ours.layers.values():
        adapter = adapter_of(layer)
        errors.append(adapter._gain_less_1(layer).abs())
        naive_errors.append((adapter.lora_magnitude_vector.flatten().float() / row_norms(layer.weight) - 1).abs())
        with torch.no_grad():
            adapter.lora_magnitude_vector.mul_(1.05)
        torch.testing.assert_close(
            adapter._gain_less_1(layer), torch.full_like(adapter._base_norm, 0.05), rtol=0, atol=0.01
        )
    # what is left comes from the weights' own rounding
    assert torch.cat(errors).mean() < 0.3 * torch.cat(naive_errors).mean()
