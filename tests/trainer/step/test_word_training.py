"""A word's training against plain torch: diffusers' UNet, transformers' text encoders with the word in their table."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.unet.attention import attention_cases, choose_attention
from safelight.trainer.config.schema import Config
from safelight.trainer.families.conditioning import TokenConditioning
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import StepContext, StepSettings, train_step
from safelight.trainer.step.text_training import read_words
from tests.trainer.families.small_sdxl import small_unet, write_small_sdxl
from tests.trainer.families.test_parity import EPOCH, SCALE, SCHEDULER, SEED, plain_loss

CPU = torch.device("cpu")
LR, NUM_STEPS, BATCH, NUM_VECTORS = 1e-2, 6, 3, 2
CAPTIONS = ("a red square, <look>", "<look> of a blue star", "", "a green ring on the left, <look>")


def sd1_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=128,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )


def config_of(base: str, **tables) -> Config:
    own = {"word": "<look>", "initial_text": "a square", "vectors": NUM_VECTORS}
    optimizer = {"name": "adamw", "lr": LR}
    return Config(model={"base": base}, adapter={"kind": "embedding"}, embedding=own, optimizer=optimizer, **tables)


def batch_of(encoder: CaptionEncoder, number: int) -> tuple[Batch, list[str]]:
    generator = torch.Generator().manual_seed(number)
    mean, logvar = torch.randn(2, BATCH, 4, 8, 8, generator=generator)
    captions = [CAPTIONS[(number + place) % len(CAPTIONS)] for place in range(BATCH)]
    sizes = torch.randint(32, 1024, (BATCH, 6), generator=generator).float()
    conditioning = TokenConditioning(encoder.token_ids(captions), sizes)
    ids = tuple(1000 * number + place for place in range(BATCH))
    return Batch(mean, logvar - 4, conditioning, ids, (0,) * BATCH, Bucket(32, 32)), captions


class Plain:
    """diffusers' textual inversion: the word's tokens are added to tokenizers and text encoders, and rows trained."""

    def __init__(self, encoder: CaptionEncoder, initial: dict[str, Tensor], unet: nn.Module, config: Config):
        self.family, self.zeroes, self.unet = encoder.family, encoder.zeroes_empty_text, unet
        self.tokenizers, self.parts = copy.deepcopy(encoder.tokenizers), copy.deepcopy(encoder.text_encoders)
        self.tables, self.first = [], []
        for tokenizer, part, vectors in zip(self.tokenizers, self.parts, initial.values(), strict=True):
            self.first.append(len(tokenizer))
            tokenizer.add_tokens(["<look>", *(f"<look>_{number}" for number in range(1, len(vectors)))])
            part.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = part.get_input_embeddings().weight
            with torch.no_grad():
                table[self.first[-1] :] = vectors
            self.tables.append(table)
        unet.requires_grad_(False)
        self.parts.requires_grad_(False)
        for table in self.tables:
            table.requires_grad_(True)
        self.adamw = torch.optim.AdamW(self.tables, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        self.scheduler = DDPMScheduler(**SCHEDULER)

    def vectors(self) -> list[Tensor]:
        return [table.detach()[first:].clone() for table, first in zip(self.tables, self.first, strict=True)]

    def step(self, batch: Batch, captions: list[str]) -> tuple[float, float]:
        texts = [caption.replace("<look>", "<look> <look>_1") for caption in captions]
        states, pooled = [], None
        for tokenizer, part in zip(self.tokenizers, self.parts, strict=True):
            ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            own, pooled = self.family.encode_ids(part, ids, 0)
            states.append(own)
        rows = self.family.text_row(torch.cat(states, dim=2), pooled)
        if self.zeroes:
            rows = rows.clone()
            rows[[number for number, caption in enumerate(captions) if not caption]] = 0
        conditioning = self.family.conditioning(self.unet.config, rows, batch.conditioning.sizes_B6)
        loss = plain_loss(self.unet, self.scheduler, replace(batch, conditioning=conditioning))
        loss.backward()
        for table, first in zip(self.tables, self.first, strict=True):
            table.grad[:first] = 0
        norm = torch.nn.utils.clip_grad_norm_(self.tables, 1.0)
        kept = [table.detach()[:first].clone() for table, first in zip(self.tables, self.first, strict=True)]
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for table, first, before in zip(self.tables, self.first, kept, strict=True):
                table[:first] = before
        return loss.item(), norm.item()


@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("sd1", {}),
        ("sdxl", {}),
        ("sd1", {"kernels": "on"}),
        ("sdxl", {"kernels": "on", "checkpointing": "selective"}),
        ("sd1", {"checkpointing": "selective"}),
        ("sdxl", {"checkpointing": "full"}),
        ("sd1", {"checkpointing": "offload"}),
    ],
)
def test_steps_equal_textual_inversion_in_plain_torch(tmp_path, family, train):
    base = "tiny" if family == "sd1" else str(write_small_sdxl(tmp_path / "base"))
    start = sd1_unet() if family == "sd1" else small_unet()
    config = config_of(base, train=train)
    encoder = load_caption_encoder(config, resolve_base(base), CPU)
    unet = copy.deepcopy(start).train()
    (first,) = encoder.embeddings
    plain = Plain(encoder, first.vectors, copy.deepcopy(start).train(), config)
    attention = choose_attention(CPU, torch.float32, attention_cases(unet, (8, 8)))
    prepared = prepare_unet(unet, config, attention, CPU, torch.float32)
    prepared.trained.reading(encoder)
    zeros = encoder.token_ids([""])[0] if encoder.zeroes_empty_text else None
    texts = read_words(config, encoder.family, encoder.parts, unet.config, zeros, prepared.trained.vectors)
    loss = config.loss
    context = StepContext(unet, prepared.optimizer, make_schedule(SCHEDULER), SCALE, loss, texts)
    frozen = {name: x.clone() for name, x in [*unet.state_dict().items(), *encoder.text_encoders.state_dict().items()]}
    tolerance = 1e-3 if train.get("kernels") == "on" else 1e-4
    for number in range(NUM_STEPS):
        batch, captions = batch_of(encoder, number)
        result = train_step(context, [batch], StepSettings(BATCH, LR, 0.01, 1.0), seed=SEED, epoch=EPOCH)
        expected, norm = plain.step(batch, captions)
        assert result.losses.mean().item() == pytest.approx(expected, rel=1e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-3)
    for ours, theirs, before in zip(
        prepared.trained.vectors.values(), plain.vectors(), first.vectors.values(), strict=True
    ):
        assert (ours - theirs).norm() <= tolerance * (theirs - before).norm()
        assert (theirs - before).abs().max() > NUM_STEPS * LR / 2
    now = dict([*unet.state_dict().items(), *encoder.text_encoders.state_dict().items()])
    assert all(torch.equal(now[name], x) for name, x in frozen.items())
    assert not any(
        p.requires_grad or p.grad is not None for p in [*unet.parameters(), *encoder.text_encoders.parameters()]
    )


def test_accumulated_micro_steps_equal_one_batch(tmp_path):
    config = config_of("tiny", train={"accumulate": 2})
    encoder = load_caption_encoder(config, resolve_base("tiny"), CPU)
    (first,) = encoder.embeddings
    batches = [batch_of(encoder, number)[0] for number in range(2)]
    whole = Batch(
        torch.cat([b.mean_BCHW for b in batches]),
        torch.cat([b.logvar_BCHW for b in batches]),
        TokenConditioning(
            torch.cat([b.conditioning.ids_BEN for b in batches]), torch.cat([b.conditioning.sizes_B6 for b in batches])
        ),
        (*batches[0].sample_ids, *batches[1].sample_ids),
        (0,) * 2 * BATCH,
        batches[0].bucket,
    )
    results = []
    for given in ([whole], batches):
        unet = sd1_unet().train()
        attention = choose_attention(CPU, torch.float32, attention_cases(unet, (8, 8)))
        prepared = prepare_unet(unet, config, attention, CPU, torch.float32)
        prepared.trained.reading(encoder)
        texts = read_words(config, encoder.family, encoder.parts, unet.config, None, prepared.trained.vectors)
        context = StepContext(unet, prepared.optimizer, make_schedule(SCHEDULER), SCALE, config.loss, texts)
        with context.dry_run():
            train_step(context, given, StepSettings(2 * BATCH, LR, 0.0, 0.0), seed=SEED, epoch=EPOCH)
        assert torch.equal(prepared.trained.vectors["text_encoder"], first.vectors["text_encoder"])
        step = train_step(context, given, StepSettings(2 * BATCH, LR, 0.0, 0.0), seed=SEED, epoch=EPOCH)
        results.append((step.grad_norm.item(), prepared.trained.vectors["text_encoder"].detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_16_bit_unet_stays_frozen_and_the_vectors_fp32(precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    config = config_of("tiny")
    unet = sd1_unet().train()
    attention = choose_attention(CPU, dtype, attention_cases(unet, (8, 8)))
    prepared = prepare_unet(unet, config, attention, CPU, dtype)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    assert {p.dtype for p in prepared.trained.vectors.values()} == {torch.float32}
    assert prepared.optimizer.loss_scale.enabled == (precision == "fp16")
    assert set(prepared.optimizer.parameters) == {"text_encoder"}
    encoder = load_caption_encoder(config, resolve_base("tiny"), CPU)
    (first,) = encoder.embeddings
    prepared.trained.reading(encoder)
    texts = read_words(config, encoder.family, encoder.parts, unet.config, None, prepared.trained.vectors)
    context = StepContext(unet, prepared.optimizer, make_schedule(SCHEDULER), SCALE, config.loss, texts)
    batch, _ = batch_of(encoder, 0)
    result = train_step(context, [batch], StepSettings(BATCH, LR, 0.01, 1.0), seed=SEED, epoch=EPOCH)
    assert result.is_applied
    # the gradient is unscaled before it is clipped
    assert 0 < result.grad_norm.item() < 100
    assert not torch.equal(prepared.trained.vectors["text_encoder"], first.vectors["text_encoder"])
