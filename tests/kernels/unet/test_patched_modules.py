"""What the patch swaps, refuses and leaves alone, checkpoints with and without it, and its removal."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from safelight.kernels.unet import patch
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import Position, load_checkpoint, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.optim.optimizer import make_optimizer
from tests.kernels.unet.unets import CONFIGS, inputs_of, make, one_block, run, worst_error
from tests.trainer.checkpoints import state_tensors, writes


def test_what_is_swapped_packed_and_unpatched_is_reported():
    unet = make(CONFIGS["sd15"])
    result = patch.apply(unet)
    kinds = [kind for _, kind in result.swapped]
    assert [kinds.count(k) for k in ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Upsample2D")] == [
        22,
        16,
        16,
        3,
    ]
    assert {name for name, _ in result.unpatched} == {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.downsamplers.0.conv",
        "down_blocks.2.downsamplers.0.conv",
    }
    # 16 self-attentions; the time projections' weights and two rounds of biases; the text projections
    assert [what for what, *_ in result.packed].count("q, k, v of a self-attention") == 16
    assert len(result.packed) == 20
    assert str(result) == (
        "kernels in 16 Transformer2DModel, 16 BasicTransformerBlock, 22 ResnetBlock2D, 3 Upsample2D, 2 Conv2d, "
        "1 GroupNorm; 5 other modules unchanged"
    )


class CustomResnetBlock(ResnetBlock2D):
    def forward(self, input_tensor, temb, *args, **kwargs):
        return super().forward(input_tensor, temb * 0.5)


def with_dropout(unet):
    unet.down_blocks[0].resnets[0].dropout.p = 0.5
    unet.down_blocks[0].resnets[0].eval()
    return ["down_blocks.0.resnets.0"]


def with_a_subclass(unet):
    unet.up_blocks[1].resnets[1].__class__ = CustomResnetBlock
    return ["up_blocks.1.resnets.1.norm1"]


def with_a_custom_processor(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class CustomProcessor(AttnProcessor2_0):
        pass

    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(CustomProcessor())
    return ["mid_block.attentions.0.transformer_blocks.0"]


@pytest.mark.parametrize("change", [with_dropout, with_a_subclass, with_a_custom_processor])
def test_unsupported_modules_are_unchanged_and_named(change):
    unet = make(CONFIGS["sdxl"], torch.float64)
    names = change(unet)
    inputs = inputs_of(unet, torch.float64)
    truth = run(unet, inputs)
    result = patch.apply(unet)
    assert set(names) <= {name for name, _ in (*result.unsupported, *result.unpatched)}
    assert all(f"not in {name}: {why}" in str(result) for name, why in result.unsupported)
    assert worst_error(run(unet, inputs), truth) < 1e-9
    patch.remove(unet)
    assert worst_error(run(unet, inputs), truth) == 0


def test_removing_restores_the_original_with_the_trained_weights():
    unet = make(CONFIGS["sdxl"])
    kept = copy.deepcopy(unet)
    classes = {name: type(m) for name, m in unet.named_modules()}
    identities = {name: id(p) for name, p in unet.named_parameters()}
    patch.apply(unet)
    inputs = inputs_of(unet)
    run(unet, inputs)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-2)
    unet(**inputs).sample.square().mean().backward()
    optimizer.step()
    trained = {name: p.detach().clone() for name, p in unet.named_parameters()}
    patch.remove(unet)
    assert {name: type(m) for name, m in unet.named_modules()} == classes
    assert {name: id(p) for name, p in unet.named_parameters()} == identities
    assert set(vars(unet)) == set(vars(kept))
    for name, p in unet.named_parameters():
        assert torch.equal(p, trained[name])
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    assert not torch.equal(unet.conv_in.weight, kept.conv_in.weight)
    kept.load_state_dict(unet.state_dict())
    assert worst_error(run(unet, inputs), {k: x.double() for k, x in run(kept, inputs).items()}) == 0
    patch.remove(unet)
    patch.apply(unet)
    assert patch.is_patched(unet)


def test_saved_weights_are_diffusers_and_round_trip_bitwise(tmp_path):
    unet = make(CONFIGS["sdxl"])
    before = {name: x.clone() for name, x in unet.state_dict().items()}
    patch.apply(unet)
    save_checkpoint(tmp_path, writes(unet), {"x": torch.zeros(1)}, Position(step=1), Identity({}, [], ""))
    read = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoints" / "step-00000001" / "unet")
    assert type(read) is UNet2DConditionModel
    assert list(read.state_dict()) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in read.state_dict().items())
    other = make(CONFIGS["sdxl"], seed=7)
    patch.apply(other)
    load_checkpoint(tmp_path, 1, FullFineTune(other))
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    # raises if loading moved the weights out of their packed buffers
    run(other, inputs_of(other))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_and_unpatched_resume_from_each_others_state(name, dtype):
    """State saved with the patch loads without it bit for bit, and the reverse.

    The exception are 8-bit moments of channels-last convolutions, whose blocks follow memory order: they are
    requantized, within the bound that tests/kernels/optim/test_adamw8bit.py checks.
    """

    def build(patched, seed):
        unet = make({**one_block(32, 4, 24), "norm_num_groups": 8}, seed=seed)
        if patched:
            patch.apply(unet)
        optimizer = make_optimizer(unet, Optimizer(name=name), dtype)
        if patched:
            patch.repack(unet)
        optimizer.set_hyper(1e-4, 0.01, 1.0)
        return unet, optimizer

    def step(unet, optimizer):
        inputs = inputs_of(unet)
        inputs = {k: v.detach().to(dtype) if k != "timestep" else v for k, v in inputs.items()}
        unet(**inputs).sample.float().square().mean().backward()
        assert optimizer.step()[1]

    for first in (True, False):
        unet, optimizer = build(first, 0)
        step(unet, optimizer)
        weights, state = unet.state_dict(), state_tensors(optimizer)
        other, other_optimizer = build(not first, 7)
        other.load_state_dict(weights)
        other_optimizer.load_state_tensors(state)
        assert all(torch.equal(x, weights[k]) for k, x in other.state_dict().items())
        loaded = state_tensors(other_optimizer)
        reordered = {key.split("/", 1)[1] for key in (*loaded, *state) if key.startswith("strides/")}
        assert all(weights[key].dim() == 4 for key in reordered)
        exact = {
            key
            for key in state
            if key.split("/", 1)[1] not in reordered or key.split("/")[0] in ("step", "master", "remainder")
        }
        assert len(exact) > len(weights)
        assert all(torch.equal(loaded[key], state[key]) for key in exact)
        assert loaded.keys() - state.keys() <= {f"strides/{key}" for key in reordered}
        assert all(x.is_contiguous() for x in state.values())
        step(other, other_optimizer)


def test_moved_weights_raise_until_they_are_repacked():
    unet = make(CONFIGS["sdxl"])
    patch.apply(unet)
    unet.double()
    inputs = inputs_of(unet, torch.float64)
    with pytest.raises(ValueError, match="no longer share their memory"):
        unet(**inputs)
    orders = {name: p.stride() for name, p in unet.named_parameters()}
    patch.repack(unet)
    assert {name: p.stride() for name, p in unet.named_parameters()} == orders
    run(unet, inputs)


def test_unsupported_calls_are_refused():
    unet = make(CONFIGS["sd15"])
    with pytest.raises(ValueError, match="takes an unpatched UNet2DConditionModel"):
        patch.apply(nn.Linear(2, 2))
    patch.apply(unet)
    with pytest.raises(ValueError, match="the UNet is patched already"):
        patch.apply(unet)
    inputs = inputs_of(unet)
    with pytest.raises(ValueError, match="no attention mask"):
        unet(**inputs, encoder_attention_mask=torch.ones(2, 7))


def test_should_patch():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [patch.should_patch(s, d) for s in ("auto", "on", "off") for d in (cpu, cuda)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]
