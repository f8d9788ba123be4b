"""Train the embedded tiny base from scratch.

    python -m tools.tiny_base.pretrain --work DIR --out DIR

Four stages: a byte-level vocabulary; the VAE; the UNet together with the text encoder (real Stable Diffusion uses a
pretrained text encoder, which a tiny one does not have); and the pipeline folder in fp16. The data are drawn by
scenes.py. Every choice is a Philox draw of (seed, step, element), so a training that was stopped resumes as if it had
not been. Everything runs on one thread, because the order of sums, and so the weights' bits, would otherwise depend on
the number of cores; bf16 autocast on the CPU makes it faster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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
from tools.tiny_base.words import WORDS

SEED = 20261122
NUM_SCENES = 16000
NUM_CLUTTER = 6000
VAE_STEPS, VAE_BATCH, VAE_LR = 1600, 32, 2e-3
UNET_STEPS, UNET_BATCH, UNET_LR = 5000, 32, 1.2e-3
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
FILLER_SHARE = 0.3
SPOKEN_FOR = {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *PATTERNS, *" ".join(POSITIONS).split()}
FILLERS = tuple(word for word in WORDS if word not in SPOKEN_FOR)
MIN_SNR_GAMMA = 5.0
SAVE_SECONDS = 90


def filler(number: int) -> str:
    """Return words unrelated to the scene for 30 % of the captions, "" for the others.

    They teach the text encoder to ignore other words, which a pretrained one already does.
    """
    u = uniforms(Key(SEED, Purpose.CAPTION_CHOICE, number, 1), 5)
    if u[0] >= FILLER_SHARE:
        return ""
    return ", " + " ".join(pick(FILLERS, v) for v in u[2 : 3 + int(3 * u[1])])


def _scene_row(number: int) -> tuple[tuple[int, int], np.ndarray, str]:
    scene = random_scene(SEED, number)
    return (scene.width, scene.height), np.asarray(draw(scene)), caption(scene, SEED, number) + filler(number)


def _clutter_row(number: int) -> np.ndarray:
    return np.asarray(draw_clutter(SEED, number, 64, 64))


def make_data() -> tuple[dict[tuple[int, int], np.ndarray], dict[tuple[int, int], list[str]], np.ndarray]:
    """Return (images, captions, clutter): images and captions by (width, height).

    images: uint8 (N, H, W, 3) each. clutter: uint8 (M, 64, 64, 3).
    """
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(_scene_row, range(NUM_SCENES), chunksize=200))
        clutter = np.stack(list(pool.map(_clutter_row, range(NUM_CLUTTER), chunksize=200)))
    sizes = sorted({size for size, _, _ in rows})
    images = {size: np.stack([pixels for s, pixels, _ in rows if s == size]) for size in sizes}
    captions = {size: [text for s, _, text in rows if s == size] for size in sizes}
    return images, captions, clutter


def to_pixels(images: np.ndarray) -> Tensor:
    """Return uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def pick_batch(purpose: Purpose, step: int, sizes: dict[tuple[int, int], int], num: int) -> tuple[tuple, np.ndarray]:
    """Return a bucket, chosen in proportion to its number of images, and `num` row indices into it."""
    keys = sorted(sizes)
    share = np.cumsum([sizes[key] for key in keys]) / sum(sizes.values())
    bucket = keys[int(np.searchsorted(share, uniforms(Key(SEED, purpose, step))[0]))]
    return bucket, integers(Key(SEED, purpose, step, 1), sizes[bucket], num)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up over the first 2 %, then a cosine down to 2 % of the peak."""
    warm = max(1, total // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * (step - warm) / (total - warm))))


class Progress:
    """Weights, Adam moments, EMA and step of one stage. Saved every 90 seconds; loaded if the file exists."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], peak_lr: float):
        self.path, self.modules = path, modules
        self.named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}
        self.step, self.cpu_seconds, self._saved_at, self._cpu_at = 0, 0.0, time.monotonic(), time.process_time()
        if path.exists():
            self._load()

    def _load(self) -> None:
        state = load_file(self.path)
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(state[f"weight/{name}"])
                self.ema[name].copy_(state[f"ema/{name}"])
                self.optimizer.state[p] = {
                    "step": state["step"].clone().float(),
                    "exp_avg": state[f"m/{name}"],
                    "exp_avg_sq": state[f"v/{name}"],
                }
        self.step, self.cpu_seconds = int(state["step"]), float(state["cpu_seconds"])

    def save(self) -> None:
        state = {"step": torch.tensor(self.step), "cpu_seconds": torch.tensor(self.total_cpu_seconds())}
        for name, p in self.named.items():
            state[f"weight/{name}"], state[f"ema/{name}"] = p.detach(), self.ema[name]
            state[f"m/{name}"] = self.optimizer.state[p]["exp_avg"]
            state[f"v/{name}"] = self.optimizer.state[p]["exp_avg_sq"]
        partial = self.path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in state.items()}, partial)
        partial.replace(self.path)

    def total_cpu_seconds(self) -> float:
        return self.cpu_seconds + time.process_time() - self._cpu_at

    def update(self, loss: Tensor, lr: float, max_norm: float = 1.0) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.named.values()], 1 - decay)
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()
            self._saved_at = time.monotonic()

    def take_ema(self) -> None:
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(self.ema[name])


class Log:
    """Appends JSON lines and prints them."""

    def __init__(self, path: Path):
        self.path, self.began = path, time.monotonic()

    def write(self, **row) -> None:
        row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        row["seconds"] = round(time.monotonic() - self.began, 1)
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(row, flush=True)


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


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: dict) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Return posterior means and standard deviations by (width, height), each (N, 4, H/4, W/4)."""
    latents = {}
    for size, rows in images.items():
        parts = [vae.encode(to_pixels(rows[i : i + 100])).latent_dist for i in range(0, len(rows), 100)]
        latents[size] = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
    return latents


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: dict[tuple[int, int], tuple[Tensor, Tensor]],
    captions: dict[tuple[int, int], list[str]],
    scale: float,
    work: Path,
    log: Log,
) -> None:
    """Train UNet and text encoder together to predict the noise, min-SNR weighted, with 10 % caption dropout."""
    alphas = make_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    pad = {"padding": "max_length", "truncation": True, "max_length": NUM_TOKENS, "return_tensors": "pt"}
    tokens = {size: tokenizer(texts, **pad).input_ids for size, texts in captions.items()}
    empty = tokenizer([""], **pad).input_ids
    counts = {size: len(texts) for size, texts in captions.items()}
    progress = Progress(work / "unet.safetensors", {"unet": unet, "text_encoder": text_encoder}, UNET_LR)
    average = None
    while progress.step < UNET_STEPS:
        step = progress.step
        bucket, rows = pick_batch(Purpose.EPOCH_ORDER, step, counts, UNET_BATCH)
        mean, std = latents[bucket][0][rows], latents[bucket][1][rows]
        keys = [Key(SEED, purpose, step) for purpose in (Purpose.NOISE, Purpose.POSTERIOR)]
        noise, draw_ = normals_torch(keys, tuple(mean.shape))
        clean = (mean + std * draw_) * scale
        timesteps = torch.from_numpy(integers(Key(SEED, Purpose.TIMESTEP, step), 1000, UNET_BATCH))
        a = alphas[timesteps, None, None, None]
        dropped = torch.from_numpy(uniforms(Key(SEED, Purpose.CAPTION_DROPOUT, step), UNET_BATCH) < CAPTION_DROPOUT)
        ids = torch.where(dropped[:, None], empty, tokens[bucket][rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = text_encoder(ids).last_hidden_state
            predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, timesteps, text).sample
        loss = ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weight[timesteps]).mean()
        progress.update(loss, learning_rate(step, UNET_STEPS, UNET_LR))
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if progress.step % 50 == 0:
            log.write(stage="unet", step=progress.step, loss=average, cpu_seconds=progress.total_cpu_seconds())
    progress.save()
    progress.take_ema()


def make_scheduler() -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def write_pipeline(out: Path, vae, unet, text_encoder, tokenizer) -> str:
    """Write the pipeline in diffusers format in fp16; return the SHA-256 of its weight files, sorted by path."""
    scheduler = DDIMScheduler.from_config(make_scheduler().config, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out, safe_serialization=True)
    # transformers loads the text encoder in the dtype named in its config, while diffusers loads the others in fp32
    config = out / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for resumable state and the log")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    log = Log(work / "log.jsonl")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    images, captions, clutter = make_data()
    log.write(stage="data", scenes=NUM_SCENES, clutter=NUM_CLUTTER)
    texts = sorted(text for rows in captions.values() for text in rows)
    texts.sort(key=lambda text: sort_key(Key(SEED, Purpose.SPLIT, int.from_bytes(text.encode()[:7], "big"))))
    tokenizer = make_tokenizer(texts[:4000])
    vae, unet, text_encoder = make_vae(), make_unet(), make_text_encoder(tokenizer)
    log.write(
        stage="models",
        tokens=len(tokenizer),
        **{
            name: sum(p.numel() for p in module.parameters())
            for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder))
        },
    )
    train_vae(vae, images, clutter, work, log)
    vae.eval().requires_grad_(False)
    latents = encode_all(vae, images)
    spread = torch.cat([mean.flatten() for mean, _ in latents.values()]).std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    log.write(stage="latents", std=spread)
    train_unet(unet, text_encoder, tokenizer, latents, captions, vae.config.scaling_factor, work, log)
    log.write(stage="done", sha256=write_pipeline(arguments.out, vae, unet, text_encoder, tokenizer))


if __name__ == "__main__":
    main()
