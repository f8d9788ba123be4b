"""The embedded tiny base, of Stable Diffusion 1.x's kind, trained from scratch.

Four stages: a byte-level vocabulary; the VAE; the UNet together with the text encoder (real Stable Diffusion uses a
pretrained text encoder, which a tiny one does not have); and the pipeline folder in fp16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safelight.kernels.philox import Key, Purpose, integers, normals_torch, sort_key, uniforms
from safelight.trainer.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    caption,
    draw,
    pick,
    random_scene,
)
from tools.tiny_base.architecture import NUM_TOKENS, make_text_encoder, make_tokenizer, make_unet, make_vae
from tools.tiny_base.clutter import draw_clutter
from tools.tiny_base.training import (
    SEED,
    Log,
    Progress,
    Size,
    Task,
    encode_all,
    learning_rate,
    log_models,
    pick_batch,
    to_pixels,
    train_unet,
    write_pipeline,
)
from tools.tiny_base.words import WORDS

NUM_SCENES = 16000
NUM_CLUTTER = 6000
VAE_STEPS, VAE_BATCH, VAE_LR = 1600, 32, 2e-3
UNET_STEPS, UNET_LR = 5000, 1.2e-3
FILLER_SHARE = 0.3
SPOKEN_FOR = {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *PATTERNS, *" ".join(POSITIONS).split()}
FILLERS = tuple(word for word in WORDS if word not in SPOKEN_FOR)


def filler(number: int) -> str:
    """Return words unrelated to the scene for 30 % of the captions, "" for the others.

    They teach the text encoder to ignore other words, which a pretrained one already does.
    """
    u = uniforms(Key(SEED, Purpose.CAPTION_CHOICE, number, 1), 5)
    if u[0] >= FILLER_SHARE:
        return ""
    return ", " + " ".join(pick(FILLERS, v) for v in u[2 : 3 + int(3 * u[1])])


def _scene_row(number: int) -> tuple[Size, np.ndarray, str]:
    scene = random_scene(SEED, number)
    return (scene.width, scene.height), np.asarray(draw(scene)), caption(scene, SEED, number) + filler(number)


def _clutter_row(number: int) -> np.ndarray:
    return np.asarray(draw_clutter(SEED, number, 64, 64))


def draw_all(draw_one: Callable[[int], object], num: int) -> list:
    """Return what draw_one returns for 0 .. num - 1. draw_one: a function of a module."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(draw_one, range(num), chunksize=200))


def make_scenes() -> tuple[dict[Size, np.ndarray], dict[Size, list[str]]]:
    """Return (images, captions) by (width, height). images: uint8 (N, H, W, 3) each."""
    rows = draw_all(_scene_row, NUM_SCENES)
    sizes = sorted({size for size, _, _ in rows})
    images = {size: np.stack([pixels for s, pixels, _ in rows if s == size]) for size in sizes}
    captions = {size: [text for s, _, text in rows if s == size] for size in sizes}
    return images, captions


def make_clutter() -> np.ndarray:
    """Return pictures for the VAE, uint8 (M, 64, 64, 3)."""
    return np.stack(draw_all(_clutter_row, NUM_CLUTTER))


def train_vae(vae: AutoencoderKL, images: dict, clutter: np.ndarray, work: Path, log: Log) -> None:
    """Train the VAE on scenes and clutter in turn: L1 + squared error, and a small KL term for a narrow posterior."""
    progress = Progress(work / "vae.safetensors", {"vae": vae}, VAE_LR)
    counts = {size: len(rows) for size, rows in images.items()}
    average = None
    while progress.step < VAE_STEPS:
        step = progress.step
        bucket, rows = pick_batch(Purpose.BATCH_ORDER, step, counts, VAE_BATCH)
        if step % 2 == 0:
            rows = integers(Key(SEED, Purpose.BATCH_ORDER, step, 2), len(clutter), VAE_BATCH)
            pixels = to_pixels(clutter[rows])
        else:
            pixels = to_pixels(images[bucket][rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = normals_torch([Key(SEED, Purpose.POSTERIOR, step)], tuple(posterior.mean.shape))[0]
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        error = output.float() - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().float().mean()
        progress.update(loss, learning_rate(step, VAE_STEPS, VAE_LR))
        square = error.square().mean().item()
        average = square if average is None else 0.98 * average + 0.02 * square
        if progress.step % 50 == 0:
            log.write(
                stage="vae",
                step=progress.step,
                mse=average,
                psnr_db=float(-10 * np.log10(average / 4)),
                cpu_seconds=progress.total_cpu_seconds(),
            )
    progress.save()
    progress.take_ema()


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return the padded token ids, (N, NUM_TOKENS) int64."""
    pad = {"padding": "max_length", "truncation": True, "max_length": NUM_TOKENS, "return_tensors": "pt"}
    return tokenizer(list(texts), **pad).input_ids


def last_hidden_state(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: dict[Size, list[str]]
) -> Callable[[Size, np.ndarray, Tensor], dict]:
    """Return the `condition` of a task: what the text encoder makes of the captions."""
    tokens = {size: token_ids(tokenizer, texts) for size, texts in captions.items()}
    empty = token_ids(tokenizer, [""])

    def condition(size: Size, rows: np.ndarray, dropped: Tensor) -> dict:
        ids = torch.where(dropped[:, None], empty, tokens[size][rows])
        return {"encoder_hidden_states": text_encoder(ids).last_hidden_state}

    return condition


def make_scheduler() -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def make_pipeline(vae, unet, text_encoder, tokenizer, scheduler) -> StableDiffusionPipeline:
    """Return the pipeline of a base with one text encoder."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_and_write(
    parts: tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer],
    captions: dict[Size, list[str]],
    latents: dict[Size, tuple[Tensor, Tensor]],
    scheduler: DDPMScheduler,
    steps: int,
    lr: float,
    work: Path,
    out: Path,
    log: Log,
) -> None:
    """Train the UNet and the text encoder of a base that has one, and write its pipeline.

    parts: autoencoder, UNet, text encoder, tokenizer. captions, latents: of the scenes, by their size.
    """
    vae, unet, text_encoder, tokenizer = parts
    task = Task(
        {"unet": unet, "text_encoder": text_encoder},
        last_hidden_state(text_encoder, tokenizer, captions),
        latents,
        vae.config.scaling_factor,
        scheduler,
        steps,
        lr,
    )
    train_unet(task, work, log)
    sampler = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False, steps_offset=1)
    digest = write_pipeline(out, make_pipeline(vae, unet, text_encoder, tokenizer, sampler))
    log.write(stage="done", sha256=digest)


def pretrain(work: Path, out: Path, log: Log) -> None:
    """Train everything and write the pipeline."""
    images, captions = make_scenes()
    clutter = make_clutter()
    log.write(stage="data", scenes=NUM_SCENES, clutter=NUM_CLUTTER)
    texts = sorted(text for rows in captions.values() for text in rows)
    texts.sort(key=lambda text: sort_key(Key(SEED, Purpose.SPLIT, int.from_bytes(text.encode()[:7], "big"))))
    tokenizer = make_tokenizer(texts[:4000])
    vae, unet, text_encoder = make_vae(), make_unet(), make_text_encoder(tokenizer)
    log_models(log, len(tokenizer), {"vae": vae, "unet": unet, "text_encoder": text_encoder})
    train_vae(vae, images, clutter, work, log)
    vae.eval().requires_grad_(False)
    latents = encode_all(vae, images)
    spread = torch.cat([mean.flatten() for mean, _ in latents.values()]).std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    log.write(stage="latents", std=spread)
    parts = vae, unet, text_encoder, tokenizer
    train_and_write(parts, captions, latents, make_scheduler(), UNET_STEPS, UNET_LR, work, out, log)
