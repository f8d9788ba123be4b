"""What of a UNet is patched, refused and left, what is saved of it, and how it comes back."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from safelight.kernels.unet import patch
from safelight.trainer.checkpoint.files import Position, load_checkpoint, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.config.toml import Optimizer
from safelight.trainer.optim.optimizer import make_optimizer
from tests.kernels.unet.unets import CONFIGS, inputs_of, make, one_block, run, worst


def test_what_is_swapped_and_left_is_told():
    unet = make(CONFIGS["sd15"])
    done = patch.apply(unet)
    kinds = [kind for _, kind in done.swapped]
    assert [kinds.count(k) for k in ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Upsample2D")] == [
        22,
        16,
        16,
        3,
    ]
    assert {name for name, _ in done.left} == {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.downsamplers.0.conv",
        "down_blocks.2.downsamplers.0.conv",
    }
    # 16 self-attentions, the time embeddings' weights and two biases, the text
    assert [what for what, *_ in done.packed].count("q, k, v of a self-attention") == 16
    assert len(done.packed) == 20
    assert str(done) == (
        "kernels in 16 Transformer2DModel, 16 BasicTransformerBlock, 22 ResnetBlock2D, 3 Upsample2D, 2 Conv2d, 1 GroupNorm; "
        "5 other modules as they are"
    )


class TheirResnetBlock(ResnetBlock2D):
    def forward(self, input_tensor, temb, *args, **kwargs):
        return super().forward(input_tensor, temb * 0.5)


def refused_by_setting(unet):
    unet.down_blocks[0].resnets[0].dropout.p = 0.5
    unet.down_blocks[0].resnets[0].eval()
    return ["down_blocks.0.resnets.0"]


def refused_by_class(unet):
    unet.up_blocks[1].resnets[1].__class__ = TheirResnetBlock
    return ["up_blocks.1.resnets.1.norm1"]


def refused_attention(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class TheirProcessor(AttnProcessor2_0):
        pass

    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(TheirProcessor())
    return ["mid_block.attentions.0.transformer_blocks.0"]


@pytest.mark.parametrize("refuse", [refused_by_setting, refused_by_class, refused_attention])
def test_modules_that_are_not_known_are_left_and_named(refuse):
    unet = make(CONFIGS["sdxl"], torch.float64)
    names = refuse(unet)
    inputs = inputs_of(unet, torch.float64)
    truth = run(unet, inputs)
    done = patch.apply(unet)
    assert set(names) <= {name for name, _ in (*done.refused, *done.left)}
    assert all(f"not in {name}, {why}" in str(done) for name, why in done.refused)
    assert worst(run(unet, inputs), truth) < 1e-9
    patch.remove(unet)
    assert worst(run(unet, inputs), truth) == 0


def test_removing_gives_the_original_back_with_the_trained_weights():
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
    assert worst(run(unet, inputs), {k: x.double() for k, x in run(kept, inputs).items()}) == 0
    patch.remove(unet)
    patch.apply(unet)
    assert patch.is_patched(unet)


def test_saved_weights_are_diffusers_and_round_trip_bitwise(tmp_path):
    unet = make(CONFIGS["sdxl"])
    before = {name: x.clone() for name, x in unet.state_dict().items()}
    patch.apply(unet)
    save_checkpoint(tmp_path, unet, {"x": torch.zeros(1)}, Position(step=1), Identity({}, [], ""))
    read = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoints" / "step-00000001" / "unet")
    assert type(read) is UNet2DConditionModel
    assert list(read.state_dict()) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in read.state_dict().items())
    other = make(CONFIGS["sdxl"], seed=7)
    patch.apply(other)
    load_checkpoint(tmp_path, 1, other)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    # loading wrote into the buffers, not beside them
    run(other, inputs_of(other))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_resumes_from_the_others_optimizer(name, dtype):
    """A step with the patch, saved, is the same state without it, bit for bit, and the reverse.

    But for 8-bit moments of our kernel, whose blocks follow memory order: those of channels-last convolutions are
    requantised, within the bound that tests/kernels/optim/test_adamw8bit.py holds.
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
        weights, state = unet.state_dict(), optimizer.state_tensors()
        other, others = build(not first, 7)
        other.load_state_dict(weights)
        others.load_state_tensors(state)
        assert all(torch.equal(x, weights[k]) for k, x in other.state_dict().items())
        found = others.state_tensors()
        reordered = {key.split("/", 1)[1] for key in (*found, *state) if key.startswith("strides/")}
        assert all(weights[key].dim() == 4 for key in reordered)
        exact = {
            key
            for key in state
            if key.split("/", 1)[1] not in reordered or key.split("/")[0] in ("step", "master", "remainder")
        }
        assert len(exact) > len(weights)
        assert all(torch.equal(found[key], state[key]) for key in exact)
        assert found.keys() - state.keys() <= {f"strides/{key}" for key in reordered}
        assert all(x.is_contiguous() for x in state.values())
        step(other, others)


def test_what_moves_the_weights_is_refused_until_they_are_packed_again():
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


def test_what_it_cannot_do_is_refused():
    unet = make(CONFIGS["sd15"])
    with pytest.raises(ValueError, match="takes an unpatched UNet2DConditionModel"):
        patch.apply(nn.Linear(2, 2))
    patch.apply(unet)
    with pytest.raises(ValueError, match="the UNet is patched already"):
        patch.apply(unet)
    inputs = inputs_of(unet)
    with pytest.raises(ValueError, match="no attention mask"):
        unet(**inputs, encoder_attention_mask=torch.ones(2, 7))


def test_when_it_is_wanted():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [patch.is_wanted(s, d) for s in ("auto", "on", "off") for d in (cpu, cuda)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]
