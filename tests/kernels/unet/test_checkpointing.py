"""Checkpointing of a UNet, patched and not: the same bits, less memory, no more work than said."""

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
def selected(monkeypatch):
    """The contexts of selective checkpointing made so far: what they keep is no saved tensor."""
    contexts = []

    def make(policy):
        contexts.append(create_selective_checkpoint_contexts(policy))
        return contexts[-1]

    monkeypatch.setattr(checkpointing, "create_selective_checkpoint_contexts", make)
    return contexts


def measured(unet, selected):
    """Return (gradients, bytes kept, FLOPs) of a step."""
    generator = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(shape, generator=generator) for shape in [(2, 4, 16, 8), (2, 7, 24)])
    saved = SavedBytes(unet.parameters())
    unet.zero_grad()
    selected.clear()
    with FlopCounterMode(display=False) as flops:
        with saved:
            loss = unet(sample, torch.tensor([3, 900]), text).sample.square().mean()
        outputs = [x.val for caching, _ in selected for x in tree_leaves(dict(caching.storage)) if hasattr(x, "val")]
        outputs = [x for x in outputs if isinstance(x, torch.Tensor)]
        kept = saved.total + sum(x.numel() * x.element_size() for x in outputs)
        loss.backward()
    return {name: p.grad for name, p in unet.named_parameters()}, kept, flops.get_total_flops()


@pytest.mark.parametrize("patched", [False, True])
def test_gradients_have_the_same_bits_for_less_memory(build, selected, patched):
    unet = build(patched)
    plain, most, least_work = measured(unet, selected)
    kept, work = {}, {}
    for mode in ("selective", "full"):
        apply_checkpointing(unet, mode)
        found, kept[mode], work[mode] = measured(unet, selected)
        assert all(torch.equal(found[name], g) for name, g in plain.items()), mode
    assert kept["full"] < kept["selective"] < most
    assert kept["full"] < most / 2
    if not patched:
        # no matrix work twice; blocks begin behind the first product that is kept
        assert work["selective"] == least_work
    assert least_work < work["full"] <= 4 / 3 * least_work
    apply_checkpointing(unet, "none")
    assert measured(unet, selected)[1:] == (most, least_work)


def test_a_patched_unet_keeps_less_than_selective_checkpointing_of_an_original(build, selected):
    original = build(False)
    apply_checkpointing(original, "selective")
    assert measured(build(True), selected)[1] < measured(original, selected)[1]


def test_of_a_patched_unet_selective_makes_one_product_again(build, selected):
    unet = build(True)
    _, most, least_work = measured(unet, selected)
    apply_checkpointing(unet, "selective")
    _, kept, work = measured(unet, selected)
    # tokens x (dim x 8 dim): blocks of 32 at 16 x 8, one down, two up; one of 64 in the middle at 8 x 4
    rows = {32: 3 * 2 * 16 * 8, 64: 2 * 8 * 4}
    assert work - least_work == sum(2 * n * d * 8 * d for d, n in rows.items())
    assert most - kept == 4 * sum(n * 8 * d for d, n in rows.items())


def test_blocks_that_were_left_are_checkpointed_beside_patched_ones(build, selected):
    unet = build(False)
    unet.up_blocks[0].resnets[0].dropout.p = 0.5
    plain_left = unet.up_blocks[0].resnets[0]
    patch.apply(unet)
    torch.manual_seed(5)
    plain, most, _ = measured(unet, selected)
    apply_checkpointing(unet, "selective")
    torch.manual_seed(5)
    found, kept, _ = measured(unet, selected)
    assert kept < most
    assert type(plain_left).__name__ == "ResnetBlock2D"
    # dropout draws the same numbers again
    assert all(torch.equal(found[name], g) for name, g in plain.items())


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="checkpointing 'some' is unknown; use none, selective, full, offload"):
        apply_checkpointing(nn.Linear(1, 1), "some")
