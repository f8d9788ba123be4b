"""Attention dispatch: what was probed is what runs, and it says so."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

from safelight.kernels import attention
from safelight.kernels.attention import apply_attention, attention_modules, choose_attention, head_dim_of

CPU = torch.device("cpu")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def test_on_the_cpu_it_is_sdpa_and_says_why(unet):
    dims = {head_dim_of(m) for m in attention_modules(unet)}
    assert dims == {8, 16}
    choice = choose_attention(CPU, torch.float32, dims)
    assert choice.backends == {8: "sdpa", 16: "sdpa"}
    assert str(choice) == "attention on cpu, float32: sdpa for head dim 8, 16 (xformers has no CPU operator)"


def test_each_head_dim_gets_the_backend_that_passed_its_probe(unet, monkeypatch):
    """As on a card whose kernels take head dim 8 and fail, forward or backward, at 16."""
    monkeypatch.setattr(
        attention, "_probe_xformers", lambda device, dtype, dim: "" if dim == 8 else "xformers: head dim too large"
    )
    choice = choose_attention(torch.device("meta"), torch.float16, {8, 16})
    assert choice.backends == {8: "xformers", 16: "sdpa"}
    assert "xformers for head dim 8; sdpa for head dim 16 (xformers: head dim too large)" in str(choice)
    apply_attention(unet, choice)
    expected = {8: XFormersAttnProcessor, 16: AttnProcessor2_0}
    assert all(type(m.processor) is expected[head_dim_of(m)] for m in attention_modules(unet))
    assert len(attention_modules(unet)) == 8


def test_a_probe_on_the_cpu_fails_with_a_reason():
    """xformers has no operator here, so the probe itself can be seen to refuse."""
    pytest.importorskip("xformers")
    assert attention._probe_xformers(CPU, torch.float32, 40).startswith("xformers")


def test_sdpa_computes_softmax_attention(unet):
    apply_attention(unet, choose_attention(CPU, torch.float32, {8, 16}))
    module = attention_modules(unet)[0]
    x = torch.randn(2, 9, module.to_q.in_features)
    q, k, v = (
        f(x).view(2, 9, module.heads, head_dim_of(module)).transpose(1, 2)
        for f in (module.to_q, module.to_k, module.to_v)
    )
    weights = (q @ k.transpose(-1, -2) / head_dim_of(module) ** 0.5).softmax(-1)
    expected = module.to_out[0]((weights @ v).transpose(1, 2).reshape(2, 9, -1))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dim", [40, 64, 80, 160])
def test_on_a_gpu_the_chosen_backend_runs_both_ways(dim):
    choice = choose_attention(torch.device("cuda"), torch.float16, {dim})
    if choice.backends[dim] == "xformers":
        assert attention._probe_xformers(torch.device("cuda"), torch.float16, dim) == ""
    else:
        assert choice.reasons[dim]
