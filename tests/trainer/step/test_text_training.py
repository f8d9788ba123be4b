"""Training the text encoder inside the step: against transformers and diffusers, frozen layers, the empty text."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from safelight.data.batches import Batch
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, integers, normals
from safelight.kernels.unet import patch
from safelight.kernels.unet.checkpointing import MODES, apply_checkpointing
from safelight.trainer.config.schema import Config, Loss
from safelight.trainer.config.toml import parse_config
from safelight.trainer.families.conditioning import TokenConditioning, token_conditioning
from safelight.trainer.families.sdxl import StableDiffusionXL
from safelight.trainer.families.stable_diffusion import StableDiffusion1
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.optim.base import FollowedScale, LossScale
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import StepContext, StepSettings, micro_step, train_step, upload
from safelight.trainer.step.text_training import TextTraining, mark, take_text_state, train_texts
from tests.trainer.step.test_step import CPU, SCALE, SCHEDULER, SEED, make_batch

VOCABULARY, TOKENS, LAYERS = 50, 7, 3
EMPTY = torch.tensor([[48, *[49] * (TOKENS - 1)]])
LR, TEXT_LR = 1e-4, 1e-3


def make_text(kind=CLIPTextModel, width: int = 16, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=48,
        eos_token_id=49,
    )
    return kind(config).eval()


def config_of(**tables) -> Config:
    text = {"train": True, "lr": TEXT_LR, **tables.pop("text_encoder", {})}
    return parse_config({"optimizer": {"name": "adamw", "lr": LR}, **tables, "text_encoder": text}, "here")


def tokens_of(number: int, size: int = 4) -> TokenConditioning:
    generator = torch.Generator().manual_seed(100 + number)
    ids = torch.randint(0, 48, (size, 1, TOKENS), generator=generator)
    ids[:, :, 0], ids[:, :, -1] = 48, 49
    return TokenConditioning(ids, torch.zeros(size, 6))


def context_of(unet, text, config: Config, zeros=None) -> StepContext:
    optimizer = make_optimizer(unet, config.optimizer)
    texts = train_texts(
        config, StableDiffusion1(), {"text_encoder": text}, unet.config, zeros, CPU, optimizer.loss_scale
    )
    return StepContext(unet, optimizer, make_schedule(SCHEDULER), SCALE, Loss(), texts)


def step(context: StepContext, *numbers: int, epoch: int = 3):
    batches = [_with_tokens(number) for number in numbers]
    return train_step(context, batches, StepSettings(4 * len(numbers), LR, 0.01, 1.0, TEXT_LR), seed=SEED, epoch=epoch)


def _with_tokens(number: int) -> Batch:
    return replace(make_batch(number), conditioning=tokens_of(number))


def test_steps_equal_a_plain_loop_of_transformers_and_diffusers(small_unet):
    """Both optimizers are AdamW; each clips by the norm of its own gradients."""
    ours, theirs, text = copy.deepcopy(small_unet), copy.deepcopy(small_unet), make_text()
    start = copy.deepcopy(text)
    plain_text = copy.deepcopy(text)
    context = context_of(ours, text, config_of())
    scheduler = DDPMScheduler(**SCHEDULER)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, **options)
    text_adamw = torch.optim.AdamW(plain_text.parameters(), lr=TEXT_LR, **options)
    for n in range(5):
        batch, result = make_batch(n), step(context, n)
        posterior, noise = (
            torch.from_numpy(np.stack([normals(Key(SEED, purpose, i, 3, 0), (4, 8, 8)) for i in batch.sample_ids]))
            for purpose in (Purpose.POSTERIOR, Purpose.NOISE)
        )
        timesteps = torch.tensor(
            [int(integers(Key(SEED, Purpose.TIMESTEP, i, 3, 0), 1000)[0]) for i in batch.sample_ids]
        )
        latents = (batch.mean_BCHW + torch.exp(0.5 * batch.logvar_BCHW) * posterior) * SCALE
        read = plain_text(tokens_of(n).ids_BEN[:, 0]).last_hidden_state
        loss = F.mse_loss(theirs(scheduler.add_noise(latents, noise, timesteps), timesteps, read).sample, noise)
        loss.backward()
        for module, optimizer in ((theirs, adamw), (plain_text, text_adamw)):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert result.losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    for module, plain, before in ((ours, theirs, small_unet), (text, plain_text, start)):
        for (name, a), b, c in zip(module.named_parameters(), plain.parameters(), before.parameters(), strict=True):
            # the gradient of a bias that shifts every key alike is float error, which Adam enlarges
            if not name.endswith("k_proj.bias"):
                assert (a - b).norm() <= 1e-2 * (b - c).norm() + 1e-7, name
    moved = [(a - b).abs().max() for a, b in zip(text.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 2 * TEXT_LR


def gradients_of(unet, text) -> dict[str, torch.Tensor]:
    """Return the text encoder's gradients in a step."""
    context, gradients = context_of(unet, text, config_of()), {}
    optimizer_step = context.texts.optimizer.step

    def keeping_gradients():
        gradients.update({name: p.grad.clone() for name, p in text.named_parameters()})
        return optimizer_step()

    context.texts.optimizer.step = keeping_gradients
    step(context, 0)
    return gradients


@pytest.mark.parametrize(
    ("patched", "mode"),
    [
        (True, "none"),
        (True, "full"),
        *(pytest.param(patched, mode, marks=pytest.mark.slow) for patched in (False, True) for mode in MODES),
    ],
)
def test_every_checkpointing_mode_passes_the_gradient_to_the_text_encoder(small_unet, patched, mode):
    unet = copy.deepcopy(small_unet)
    if patched:
        patch.apply(unet)
    apply_checkpointing(unet, mode)
    found, expected = (gradients_of(one, make_text()) for one in (unet, copy.deepcopy(small_unet)))
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_only_the_last_layers_and_the_final_norm_change(small_unet):
    text = make_text()
    before = copy.deepcopy(text.state_dict())
    context = context_of(copy.deepcopy(small_unet), text, config_of(text_encoder={"last_layers": 1}))
    for n in range(2):
        step(context, n)
    changed = {name for name, x in text.state_dict().items() if not torch.equal(x, before[name])}
    trained = {name for name in before if f"layers.{LAYERS - 1}." in name or "final_layer_norm" in name}
    # a bias of all keys changes nothing, but weight decay would; it starts at 0
    assert trained - {name for name in trained if "k_proj.bias" in name} <= changed <= trained
    with pytest.raises(UserError, match="last_layers 9 is more than the 3 layers"):
        context_of(copy.deepcopy(small_unet), text, config_of(text_encoder={"last_layers": 9}))


def test_what_the_embeddings_do_not_depend_on_is_not_trained():
    first, second = make_text(), make_text(CLIPTextModelWithProjection)
    mark(StableDiffusionXL(), [first, second], 0, 0)
    ids = tokens_of(0).ids_BEN[:, 0]
    for text, output in ((first, 0), (second, 1)):
        states, pooled = StableDiffusionXL().encode_ids(text, ids, 0)
        (states.sum() if output == 0 else states.sum() + pooled.sum()).backward()
        assert all((p.grad is not None) == p.requires_grad for p in text.parameters())
        text.zero_grad()
    mark(StableDiffusion1(), [first], 1, 0)
    StableDiffusion1().encode_ids(first, ids, 1)[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in first.parameters())


def test_accumulated_micro_batches_train_the_text_encoder_as_a_larger_batch(small_unet):
    results, start = [], make_text().state_dict()
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        text = make_text()
        context = context_of(copy.deepcopy(small_unet), text, config_of(optimizer={"name": "adamw", "lr": LR}))
        context.texts.optimizer.set_hyper(TEXT_LR, 0.01, 1.0)
        whole = upload(_with_tokens(0), CPU, SEED, 3)
        for number, part in enumerate(parts):
            micro_step(context, whole[part], 4, number == 0, number == len(parts) - 1)
        results.append(text.state_dict())
    for name, x in results[0].items():
        if not name.endswith("k_proj.bias"):
            # Adam enlarges the float error of small gradients
            assert (results[1][name] - x).norm() <= 1e-2 * (x - start[name]).norm() + 1e-7, name


def test_the_empty_text_stays_zeros_where_the_base_zeroes_it(small_unet):
    tokens = tokens_of(0)
    tokens.ids_BEN[1] = EMPTY
    with_zeros, without = (
        context_of(copy.deepcopy(small_unet), make_text(), config_of(), zeros).texts for zeros in (EMPTY, None)
    )
    zeroed, read = with_zeros.conditioning(tokens).text_BTD, without.conditioning(tokens).text_BTD
    assert not zeroed[1].any()
    assert read[1].any()
    assert torch.equal(zeroed[[0, 2, 3]], read[[0, 2, 3]])
    zeroed[1].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in with_zeros.parts.parameters())


def test_chunks_follow_each_other_and_the_pooled_embedding_is_of_the_first():
    parts = {"text_encoder": make_text(width=8), "text_encoder_2": make_text(CLIPTextModelWithProjection, 8, 1)}
    unet = {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 8 + 6 * 4, "addition_time_embed_dim": 4}
    leader = LossScale(CPU, False)
    config = config_of(data={"caption_chunks": 2})
    texts = train_texts(config, StableDiffusionXL(), parts, unet, None, CPU, leader)
    one, two = (tokens_of(n, 2).ids_BEN[:, 0] for n in (0, 1))
    both = torch.cat([one, two], dim=1)
    read = texts.conditioning(TokenConditioning(torch.stack([both, both], dim=1), torch.zeros(2, 6)))
    for place, ids in enumerate((one, two)):
        expected = torch.cat([text(ids, output_hidden_states=True).hidden_states[-2] for text in parts.values()], dim=2)
        torch.testing.assert_close(read.text_BTD[:, place * TOKENS : (place + 1) * TOKENS], expected)
    torch.testing.assert_close(read.pooled_BP, parts["text_encoder_2"](one).text_embeds)


def test_an_id_that_the_encoder_lacks_is_refused():
    ids = tokens_of(0).ids_BEN
    assert token_conditioning([VOCABULARY], ids, torch.zeros(4, 6)).ids_BEN is ids
    for bad in (-1, VOCABULARY):
        ids[2, 0, 3] = bad
        with pytest.raises(UserError, match="token ids are not of this text encoder"):
            token_conditioning([VOCABULARY], ids, torch.zeros(4, 6))


def test_an_overflow_in_the_text_encoder_alone_halves_the_shared_scale():
    leader = LossScale(CPU, True)
    follower = FollowedScale(leader)
    before = leader.scale.clone()
    assert follower.scale is leader.scale
    follower.update(torch.tensor(False))
    assert leader.scale == before
    leader.update(torch.tensor(True))
    assert leader.scale == before / 2
    leader.update(torch.tensor(True))
    assert leader.scale == before / 2


@pytest.mark.parametrize("name", ["adamw8bit", "adamw"])
def test_the_optimizers_state_is_resumed_bit_for_bit(small_unet, name):
    config = config_of(optimizer={"name": name, "lr": LR})
    unet, text = copy.deepcopy(small_unet), make_text()
    one = context_of(unet, text, config)
    step(one, 0)
    state = {name: x.clone() for name, x in {**one.optimizer.live_state(), **one.texts.live_state()}.items()}
    two = context_of(copy.deepcopy(unet), copy.deepcopy(text), config)
    take_text_state(state, two.texts)
    assert not any(name.startswith("text/") for name in state)
    two.optimizer.load_state_tensors(state)
    with pytest.raises(
        UserError, match=r"no longer trained in this checkpoint.*set text_encoder\.epochs to 2, as it was"
    ):
        take_text_state({}, two.texts, 2)
    for context in (one, two):
        step(context, 1)
    for a, b in zip(one.texts.parts.parameters(), two.texts.parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_dry_run_changes_nothing(small_unet):
    text = make_text()
    context = context_of(copy.deepcopy(small_unet), text, config_of())
    before = copy.deepcopy(text.state_dict())
    with context.dry_run():
        step(context, 0)
    assert all(torch.equal(x, before[name]) for name, x in text.state_dict().items())
    assert isinstance(context.texts, TextTraining)


def test_the_loss_falls_with_only_the_text_encoder_training(small_unet):
    """The same captions, latents and noise at every step; the UNet's learning rate is 0."""
    unet, text = copy.deepcopy(small_unet), make_text()
    context = context_of(unet, text, config_of())
    settings = StepSettings(4, 0.0, 0.0, 0.0, 3e-3)
    losses = [
        train_step(context, [_with_tokens(0)], settings, seed=SEED, epoch=3).losses.mean().item() for _ in range(25)
    ]
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), small_unet.parameters(), strict=True))
    assert losses[-1] < losses[0] - 1e-3
