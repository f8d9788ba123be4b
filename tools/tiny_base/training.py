"""What the pretrainings share: the loop over a UNet and its text encoders, resumable progress, the log.

Every choice is a Philox draw of (seed, step, element), so a training that was stopped resumes as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.kernels.philox import Key, Purpose, integers, normals_torch, uniforms

SEED = 20261122
UNET_BATCH = 32
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
SAVE_SECONDS = 90
# what a config says of the place that a part was loaded from
LOCAL = ("_name_or_path", "is_local", "local_files_only")

# (width, height) of images in px
Size = tuple[int, int]


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
        named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.named = {name: p for name, p in named.items() if p.requires_grad}
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


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: dict) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Return posterior means and standard deviations by (width, height), each (N, 4, H/4, W/4)."""
    latents = {}
    for size, rows in images.items():
        parts = [vae.encode(to_pixels(rows[i : i + 100])).latent_dist for i in range(0, len(rows), 100)]
        latents[size] = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
    return latents


@dataclass(frozen=True)
class Task:
    """What a UNet learns, together with its text encoders.

    modules: "unet", and the text encoders; all are trained where they require gradients. condition(size, rows, dropped)
    returns the UNet's keyword arguments for rows of a bucket; where dropped (B,) is true, those of an empty caption.
    """

    modules: dict[str, nn.Module]
    condition: Callable[[Size, np.ndarray, Tensor], dict]
    latents: dict[Size, tuple[Tensor, Tensor]]
    latent_scale: float
    scheduler: DDPMScheduler
    num_steps: int
    peak_lr: float


def loss_weights(scheduler: DDPMScheduler) -> Tensor:
    """Return the loss weight of each timestep: min-SNR for epsilon, Hang et al. 2023; 1 for v, as in SD 2.x.

    Min-SNR would give the last timestep of a zero-terminal-SNR schedule no weight at all.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return torch.ones(len(scheduler.alphas_cumprod))
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def train_unet(task: Task, work: Path, log: Log) -> None:
    """Train UNet and text encoders to predict the noise or v, with 10 % caption dropout."""
    alphas, weight = task.scheduler.alphas_cumprod, loss_weights(task.scheduler)
    predicts_v = task.scheduler.config.prediction_type == "v_prediction"
    counts = {size: len(mean) for size, (mean, _) in task.latents.items()}
    progress = Progress(work / "unet.safetensors", task.modules, task.peak_lr)
    average = None
    while progress.step < task.num_steps:
        step = progress.step
        size, rows = pick_batch(Purpose.EPOCH_ORDER, step, counts, UNET_BATCH)
        mean, std = (part[rows] for part in task.latents[size])
        keys = [Key(SEED, purpose, step) for purpose in (Purpose.NOISE, Purpose.POSTERIOR)]
        noise, draw_ = normals_torch(keys, tuple(mean.shape))
        clean = (mean + std * draw_) * task.latent_scale
        timesteps = torch.from_numpy(integers(Key(SEED, Purpose.TIMESTEP, step), 1000, UNET_BATCH))
        a = alphas[timesteps, None, None, None]
        dropped = torch.from_numpy(uniforms(Key(SEED, Purpose.CAPTION_DROPOUT, step), UNET_BATCH) < CAPTION_DROPOUT)
        target = a.sqrt() * noise - (1 - a).sqrt() * clean if predicts_v else noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            conditioning = task.condition(size, rows, dropped)
            noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
            predicted = task.modules["unet"](noisy, timesteps, **conditioning).sample
        loss = ((predicted.float() - target).square().mean(dim=(1, 2, 3)) * weight[timesteps]).mean()
        progress.update(loss, learning_rate(step, task.num_steps, task.peak_lr))
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if progress.step % 50 == 0:
            log.write(stage="unet", step=progress.step, loss=average, cpu_seconds=progress.total_cpu_seconds())
    progress.save()
    progress.take_ema()


def log_models(log: Log, num_tokens: int, modules: dict[str, nn.Module]) -> None:
    """Log the size of the vocabulary and each module's number of parameters."""
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    log.write(stage="models", tokens=num_tokens, **counts)


def clean_configs(out: Path) -> None:
    """Rewrite a pipeline's configs without paths of this machine, and with fp32 as the dtype of text encoders.

    transformers loads a text encoder in the dtype named in its config, while diffusers loads the others in fp32.
    """
    for path in (*out.glob("*/config.json"), *out.glob("*/tokenizer_config.json")):
        values = {key: value for key, value in json.loads(path.read_text()).items() if key not in LOCAL}
        path.write_text(json.dumps(values | ({"dtype": "float32"} if "dtype" in values else {}), indent=2) + "\n")


def write_pipeline(out: Path, pipeline: DiffusionPipeline) -> str:
    """Write the pipeline in diffusers format in fp16; return the SHA-256 of its weight files, sorted by path."""
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    clean_configs(out)
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
