"""Checkpointing of a UNet, patched and not: same bits, less memory, and only the stated extra FLOPs."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from safelight.bench.counting.counters import SavedBytes
from safelight.kernels.unet import checkpointing, patch
from safelight.kernels.unet.checkpointing import apply_checkpointing

CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@pytest.fixture
def build():
    def make(patched: bool) -> UNet2DConditionModel:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**CONFIG).train()
        if patched:
            patch.apply(unet)
        return unet

    return make


@pytest.fixture
def selective_contexts(monkeypatch):
    """The contexts of selective checkpointing created so far; what they keep is not seen by saved-tensor hooks."""
    contexts = []

    def make(policy):
        contexts.append(create_selective_checkpoint_contexts(policy))
        return contexts[-1]

    monkeypatch.setattr(checkpointing, "create_selective_checkpoint_contexts", make)
    return contexts


def measured(unet, selective_contexts):
    """Return (gradients, bytes saved for backward, FLOPs) of a step."""
    generator = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(shape, generator=generator) for shape in [(2, 4, 16, 8), (2, 7, 24)])
    saved = SavedBytes(unet.parameters())
    unet.zero_grad()
    selective_contexts.clear()
    with FlopCounterMode(display=False) as flops:
        with saved:
            loss = unet(sample, torch.tensor([3, 900]), text).sample.square().mean()
        cached = [x for caching, _ in selective_contexts for x in tree_leaves(dict(caching.storage))]
        outputs = [x.val for x in cached if hasattr(x, "val")]
        outputs = [x for x in outputs if isinstance(x, torch.Tensor)]
        kept = saved.total + sum(x.numel() * x.element_size() for x in outputs)
        loss.backward()
    return {name: p.grad for name, p in unet.named_parameters()}, kept, flops.get_total_flops()


@pytest.mark.parametrize("patched", [False, True])
def test_gradients_have_the_same_bits_for_less_memory(build, selective_contexts, patched):
    unet = build(patched)
    plain, plain_bytes, plain_flops = measured(unet, selective_contexts)
    kept, flops = {}, {}
    for mode in ("selective", "full"):
        apply_checkpointing(unet, mode)
        grads, kept[mode], flops[mode] = measured(unet, selective_contexts)
        assert all(torch.equal(grads[name], g) for name, g in plain.items()), mode
    assert kept["full"] < kept["selective"] < plain_bytes
    assert kept["full"] < plain_bytes / 2
    if not patched:
        # no matmul runs twice
        assert flops["selective"] == plain_flops
    assert plain_flops < flops["full"] <= 4 / 3 * plain_flops
    apply_checkpointing(unet, "none")
    assert measured(unet, selective_contexts)[1:] == (plain_bytes, plain_flops)


def test_a_patched_unet_saves_less_than_selective_checkpointing_of_an_unpatched_one(build, selective_contexts):
    original = build(False)
    apply_checkpointing(original, "selective")
    assert measured(build(True), selective_contexts)[1] < measured(original, selective_contexts)[1]


def test_selective_checkpointing_of_a_patched_unet_repeats_one_matmul(build, selective_contexts):
    unet = build(True)
    _, plain_bytes, plain_flops = measured(unet, selective_contexts)
    apply_checkpointing(unet, "selective")
    _, kept, flops = measured(unet, selective_contexts)
    # tokens x (dim x 8 dim): blocks of 32 at 16 x 8, one down, two up; one of 64 in the middle at 8 x 4
    rows = {32: 3 * 2 * 16 * 8, 64: 2 * 8 * 4}
    assert flops - plain_flops == sum(2 * n * d * 8 * d for d, n in rows.items())
    assert plain_bytes - kept == 4 * sum(n * 8 * d for d, n in rows.items())


def test_unpatched_blocks_are_checkpointed_beside_patched_ones(build, selective_contexts):
    unet = build(False)
    unet.up_blocks[0].resnets[0].dropout.p = 0.5
    unpatched = unet.up_blocks[0].resnets[0]
    patch.apply(unet)
    torch.manual_seed(5)
    plain, plain_bytes, _ = measured(unet, selective_contexts)
    apply_checkpointing(unet, "selective")
    torch.manual_seed(5)
    grads, kept, _ = measured(unet, selective_contexts)
    assert kept < plain_bytes
    assert type(unpatched).__name__ == "ResnetBlock2D"
    # dropout drew the same numbers in the recomputation
    assert all(torch.equal(grads[name], g) for name, g in plain.items())


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="checkpointing 'some' is unknown; use none, selective, full, offload"):
        apply_checkpointing(nn.Linear(1, 1), "some")
