"""A patched UNet against the original: output, gradients, memory order, state, and what is left alone."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.bench.counters import Counter
from safelight.kernels import aot, patch
from safelight.trainer.checkpoint import Position, load_checkpoint, save_checkpoint
from safelight.trainer.config import Optimizer
from safelight.trainer.identity import Identity
from safelight.trainer.optim import UNetOptimizer
from safelight.trainer.random_models import RANDOM_MODELS

_SMALL = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8, "cross_attention_dim": 24}
# the shapes of the models at a tenth of their width
CONFIGS = {
    "sd15": {**RANDOM_MODELS["sd15"]["unet"], **_SMALL, "block_out_channels": [32, 64, 64, 64], "attention_head_dim": 4},
    "sd21": {
        **RANDOM_MODELS["sd15"]["unet"], **_SMALL, "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True, "upcast_attention": True,
    },
    "sdxl": {
        **_SMALL, "block_out_channels": [32, 64, 64], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4, 8], "transformer_layers_per_block": [1, 2, 3], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
    },
}  # fmt: skip


def one_block(width, heads, text):
    """Return a UNet of one level: every kind of module once or twice."""
    return {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [width], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
        "cross_attention_dim": text, "attention_head_dim": heads,
    }  # fmt: skip


def make(config, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).to(dtype).train()
    for name, p in unet.named_parameters():
        # norms that do something, biases that are not zero
        if p.dim() == 1:
            nn.init.normal_(p, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
    return unet


def inputs_of(unet, dtype=torch.float32, sides=(16, 8), batch=2, text_grad=True):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {
        "sample": draw(batch, 4, *sides).requires_grad_(), "timestep": torch.tensor([3, 500, 999][:batch]),
        "encoder_hidden_states": draw(batch, 7, unet.config.cross_attention_dim).requires_grad_(text_grad),
    }  # fmt: skip
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": draw(batch, 16), "time_ids": draw(batch, 6) * 100}
    return inputs


def run(unet, inputs):
    """Return output and gradients by name."""
    y = unet(**inputs).sample
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    leaves = {"sample": inputs["sample"], "text": inputs["encoder_hidden_states"], **dict(unet.named_parameters())}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), up)
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def worst(found, truth):
    """Return the largest error of any tensor, relative to that tensor's largest value."""
    return max(
        ((found[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-12)).item() for name, x in truth.items()
    )


@pytest.mark.parametrize(("name", "recompute"), [("sd15", True), ("sd15", False), ("sd21", False), ("sdxl", True)])
def test_output_and_every_gradient_are_the_originals(name, recompute):
    """In fp64 there is no room for a wrong formula; text and image gradients are among them."""
    unet = make(CONFIGS[name], torch.float64)
    inputs = inputs_of(unet, torch.float64)
    truth = run(unet, inputs)
    done = patch.apply(unet, recompute=recompute)
    assert not done.refused
    found = run(unet, inputs)
    assert found.keys() == truth.keys()
    assert worst(found, truth) < 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_errs_no_more_than_the_original(name):
    truth_unet = make(CONFIGS[name], torch.float64)
    truth = run(truth_unet, inputs_of(truth_unet, torch.float64))
    unet = make(CONFIGS[name])
    inputs = inputs_of(unet)
    allowed = 2 * worst(run(unet, inputs), truth) + 1e-6
    patch.apply(unet)
    assert worst(run(unet, inputs), truth) <= allowed


TRUE_WIDTHS = [
    pytest.param(320, 8, 768, id="320"),
    pytest.param(640, 8, 768, marks=pytest.mark.slow, id="640"),
    pytest.param(1280, 20, 2048, marks=pytest.mark.slow, id="1280"),
]


@pytest.mark.parametrize(("width", "heads", "text"), TRUE_WIDTHS)
def test_single_blocks_at_true_width(width, heads, text):
    config = one_block(width, heads, text)
    unet = make(config)
    inputs = inputs_of(unet, sides=(4, 4), batch=1)
    plain = run(unet, inputs)
    exact_unet = make(config, torch.float64)
    truth = run(exact_unet, inputs_of(exact_unet, torch.float64, sides=(4, 4), batch=1))
    del exact_unet
    done = patch.apply(unet)
    assert {kind for _, kind in done.swapped} >= {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock"}
    assert worst(run(unet, inputs), truth) <= 2 * worst(plain, truth) + 1e-6


def test_the_kernels_themselves_in_a_unet(device):
    """Interpreted on the CPU, compiled on a GPU: one level, against the references."""
    config = {**one_block(16, 2, 8), "norm_num_groups": 4, "sample_size": 4, "mid_block_type": None}
    unet = make(config)
    inputs = inputs_of(unet, sides=(4, 4), batch=2)
    truth_unet = make(config, torch.float64)
    truth = run(truth_unet, inputs_of(truth_unet, torch.float64, sides=(4, 4), batch=2))
    allowed = 2 * worst(run(unet, inputs), truth) + 1e-6
    unet = unet.to(device)
    inputs = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in inputs.items()}
    patch.apply(unet)
    found = {name: x.cpu() for name, x in run(unet, inputs).items()}
    assert worst(found, truth) <= allowed


class Seen(TorchDispatchMode):
    """Whether what convolutions got, images, weights and gradients, is channels-last."""

    def __init__(self):
        super().__init__()
        self.layouts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            self.layouts += [x.is_contiguous(memory_format=torch.channels_last) for x in args[: 2 + (name[-1] == "d")]]
        return func(*args, **kwargs or {})


def test_it_is_channels_last_end_to_end():
    unet = make(CONFIGS["sd15"])
    patch.apply(unet)
    inputs = inputs_of(unet)
    inputs["sample"] = inputs["sample"].detach()
    with Seen() as seen:
        y = unet(**inputs).sample
        y.backward(torch.ones_like(y))
    assert all(seen.layouts)
    # 52 convolutions, forward and backward: those of 1x1, in 16 transformers and 13 residual blocks, are matrix products
    assert len(seen.layouts) == 52 * (2 + 3)


def test_what_is_swapped_and_left_is_told():
    unet = make(CONFIGS["sd15"])
    done = patch.apply(unet)
    kinds = [kind for _, kind in done.swapped]
    assert [kinds.count(k) for k in ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Upsample2D")] == [
        22, 16, 16, 3,
    ]  # fmt: skip
    assert {name for name, _ in done.left} == {
        "time_embedding.linear_1", "time_embedding.linear_2", "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.downsamplers.0.conv", "down_blocks.2.downsamplers.0.conv",
    }  # fmt: skip
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
    requantised, within the bound that tests/kernels/test_adamw8bit.py holds.
    """

    def build(patched, seed):
        unet = make({**one_block(32, 4, 24), "norm_num_groups": 8}, seed=seed)
        if patched:
            patch.apply(unet)
        optimizer = UNetOptimizer(unet, Optimizer(name=name), dtype)
        if patched:
            patch.repack(unet)
        return unet, optimizer

    def step(unet, optimizer):
        inputs = inputs_of(unet)
        inputs = {k: v.detach().to(dtype) if k != "timestep" else v for k, v in inputs.items()}
        unet(**inputs).sample.float().square().mean().backward()
        assert optimizer.step(1e-4, 0.01, 1.0)[1]

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


def test_every_kernel_of_a_patched_sd15_step_is_in_the_ahead_of_time_table():
    def step(dtype):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**RANDOM_MODELS["sd15"]["unet"]).to(dtype).train()
        patch.apply(unet)
        inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in ((1, 4, 64, 64), (1, 77, 768))]
        # convolutions on meta tensors are channels-last as on a GPU
        with Counter("channels_last"):
            y = unet(inputs[0], torch.empty(1, dtype=torch.int64, device="meta"), inputs[1]).sample
            y.backward(torch.empty_like(y))

    for dtype, target in ((torch.bfloat16, 90), (torch.float16, 75)):
        needed = aot.cases_of(step, dtype)
        assert len(needed) > 50
        table = aot.wanted()[target]
        assert not [case.label for case in needed if case.label not in table]


def test_when_it_is_wanted():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [patch.is_wanted(s, d) for s in ("auto", "on", "off") for d in (cpu, cuda)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip


def test_groups_of_text_projections_are_bounded(monkeypatch):
    monkeypatch.setattr(patch, "MAX_TEXT_BYTES", 30_000)
    unet = make(CONFIGS["sdxl"], torch.float64)
    inputs = inputs_of(unet, torch.float64)
    truth = run(unet, inputs)
    done = patch.apply(unet)
    sizes = [size for what, _, size in done.packed if "text" in what]
    assert len(sizes) > 3
    assert max(sizes) <= 30_000
    assert worst(run(unet, inputs), truth) < 1e-9
