"""The training step of other trainers, written by us from their published behaviour without handicapping them.

A known inefficiency is reproduced only where it defines the trainer: EveryDream2 runs the VAE and text encoder every
step, sd-scripts does not. Synchronizations that none of them needs (`loss.item()`) are left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.bench.recipes.baselines import RECIPES, Baseline, Recipe, make_optimizer
from safelight.bench.recipes.workload import LR, MAX_GRAD_NORM, SEED, WEIGHT_DECAY, Workload
from safelight.data.batches import Batch
from safelight.errors import UserError
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_texts, load_vae

STYLES = {
    "everydream": Recipe(
        "EveryDream2trainer: photographs decoded, cropped, VAE- and text-encoded every step; fp32 weights under fp16 "
        "autocast, GradScaler from 2^17.5, bitsandbytes' AdamW8bit; the text encoder is frozen as in ours, though "
        "EveryDream2 trains it by default"
    ),
    "kohya": Recipe(
        "sd-scripts' --full_bf16 or --full_fp16 with --cache_latents, text embeddings cached too, and Adafactor at a "
        "fixed learning rate; with AdamW8bit it would be diffusers-16bit",
        weights_16bit=True,
        optimizer="adafactor",
    ),
    "kohya-fused": Recipe(
        "kohya with --fused_backward_pass: each tensor is clipped and stepped inside backward and its gradient freed; "
        "not in fp16",
        weights_16bit=True,
        optimizer="adafactor",
    ),
    "mlperf": Recipe(
        "MLPerf Training's Stable Diffusion on NeMo: 16-bit UNet with fp32 master weights, channels-last, Inductor, "
        "the whole step in one CUDA graph, fused AdamW in fp32, no gradient clipping",
        weights_16bit=True,
        channels_last=True,
        compile=True,
        optimizer="adamw",
    ),
}
ALL_RECIPES = {**RECIPES, **STYLES}
EVERYDREAM_SCALE = 2**17.5
NUM_PICTURES, NUM_DECODERS = 16, 4
NUM_GRAPH_WARMUPS = 3


def why_no_everydream(base: str) -> str:
    """Return why there is no step of EveryDream2 with a base, '' if there is one."""
    resolved = resolve_base(base)
    if not resolved.family.pooled_width(resolved.config_of("unet")):
        return ""
    return f"recipe everydream has no SDXL, as EveryDream2 has none; use random:sd21, not {base}"


def make_baseline(name: str, work: Workload) -> Baseline:
    """Return a recipe's training step. Raises UserError for a workload it does not support."""
    kinds = {"everydream": EveryDream, "kohya-fused": FusedAdafactor, "mlperf": MLPerf}
    return kinds.get(name, Baseline)(ALL_RECIPES[name], work)


def write_photographs(folder: Path, num: int, side_px: int) -> list[Path]:
    """Write `num` JPEGs, a quarter larger than they are trained at: smooth noise, which compresses like photographs."""
    generator, large, files = np.random.default_rng(SEED), side_px * 5 // 4, []
    for number in range(num):
        coarse = generator.integers(0, 256, (large // 8, large // 8, 3), np.uint8)
        files.append(folder / f"{number:03d}.jpg")
        Image.fromarray(coarse).resize((large, large), Image.Resampling.BICUBIC).save(files[-1], quality=92)
    return files


def read_photograph(file: Path, side_px: int) -> np.ndarray:
    """Decode a photograph, crop the centre square and resize it (bicubic); return (3, H, W) float32 in -1 to 1."""
    with Image.open(file) as image:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC, box))
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


@dataclass
class Photographs:
    """Photographs with captions, repeated endlessly and decoded ahead by threads."""

    files: list[Path]
    captions: list[str]
    side_px: int

    def __post_init__(self):
        self._pool = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode")
        self._pending: deque[tuple[Future, str]] = deque()
        self._next = 0

    def take(self, num: int) -> tuple[Tensor, list[str]]:
        """Return (pixels (B, 3, H, W), captions) of the next photographs, and start decoding as many again."""
        while len(self._pending) < 2 * num:
            number = self._next % len(self.files)
            self._pending.append(
                (self._pool.submit(read_photograph, self.files[number], self.side_px), self.captions[number])
            )
            self._next += 1
        taken = [self._pending.popleft() for _ in range(num)]
        return torch.from_numpy(np.stack([future.result() for future, _ in taken])), [text for _, text in taken]


class EveryDream(Baseline):
    """EveryDream2's step. It encodes its own photographs and takes only the batch size from the batch."""

    def __init__(self, recipe: Recipe, work: Workload):
        if why := why_no_everydream(work.base):
            raise UserError(why)
        base = resolve_base(work.base)
        # EveryDream2 does not support bf16
        super().__init__(recipe, replace(work, precision="fp32" if work.precision == "fp32" else "fp16"))
        self.scaler = torch.amp.GradScaler(self.device.type, EVERYDREAM_SCALE, enabled=self.scaler.is_enabled())
        self.vae = load_vae(base, "", SEED).to(self.device)
        ((self.tokenizer, text_encoder),) = load_texts(base, "", SEED)
        self.text_encoder = text_encoder.to(self.device)
        self.notes += f"; autocast to {str(self.dtype).removeprefix('torch.')}" if self.uses_autocast else ""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # deleted together with the baseline
        self._folder = tempfile.TemporaryDirectory(prefix="safelight-bench-")
        files = write_photographs(Path(self._folder.name), NUM_PICTURES, factor * work.latent_size)
        captions = [f"a photograph of scene number {number}, unsplash photography" for number in range(len(files))]
        self.photographs = Photographs(files, captions, factor * work.latent_size)

    @torch.no_grad()
    def encode(self, pixels: Tensor, captions: list[str]) -> tuple[Tensor, TextConditioning]:
        """Return (scaled latents (B, C, H, W) drawn from the posterior, the text's conditioning), float32."""
        ids = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        context = torch.autocast(self.device.type, self.dtype) if self.uses_autocast else contextlib.nullcontext()
        with context:
            posterior = self.vae.encode(pixels.to(self.device, non_blocking=True)).latent_dist
            text = self.text_encoder(ids.to(self.device, non_blocking=True)).last_hidden_state
        return posterior.sample().float() * self.vae.config.scaling_factor, TextConditioning(text.float())

    def step(self, batch: Batch) -> Tensor:
        """Train on as many photographs as the batch has rows and return the loss."""
        return self.step_from(*self.encode(*self.photographs.take(len(batch.sample_ids))))


class FusedAdafactor(Baseline):
    """Adafactor inside backward: each tensor is clipped and stepped by a hook that then frees its gradient."""

    def make_optimizer(self, name: str) -> None:
        if next(iter(self.parameters)).dtype == torch.float16:
            raise UserError(
                "recipe kohya-fused needs bf16 or fp32: it steps before fp16's loss scale is known; use kohya"
            )
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(_stepper(parameter, name))

    def update(self, loss: Tensor) -> None:
        """Take the step: backward does."""
        loss.backward()


def _stepper(parameter: Tensor, name: str) -> Callable[[Tensor], None]:
    optimizer = make_optimizer(name, [parameter])

    def step(_: Tensor) -> None:
        torch.nn.utils.clip_grad_norm_([parameter], MAX_GRAD_NORM)
        optimizer.step()
        parameter.grad = None

    return step


def can_compile(device: torch.device) -> bool:
    """Return whether Inductor can compile here: it needs Triton and gcc for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None and shutil.which("gcc") is not None
    return any(shutil.which(name) for name in ("g++", "clang++"))


class MLPerf(Baseline):
    """MLPerf's step: fp32 master weights and a 16-bit UNet; on a GPU one CUDA graph per shape holds the whole step."""

    def __init__(self, recipe: Recipe, work: Workload):
        device = torch.device(work.device)
        super().__init__(replace(recipe, compile=can_compile(device)), work)
        # the gradients of the masters are fp32, which an ordinary GradScaler unscales
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.notes += "; compiled by Inductor" if can_compile(device) else "; not compiled: no compiler found"
        self.notes += "; one CUDA graph per shape" if device.type == "cuda" else "; no CUDA graph on a CPU"

    def make_optimizer(self, name: str) -> torch.optim.Optimizer:
        self.masters = [p.detach().float().clone() for p in self.parameters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        capturable = {"capturable": True} if self.device.type == "cuda" else {}
        return torch.optim.AdamW(self.masters, LR, weight_decay=WEIGHT_DECAY, fused=True, **capturable)

    @torch.no_grad()
    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        torch._foreach_copy_(targets, sources)

    def update(self, loss: Tensor) -> None:
        """Run backward and step the masters. The fused kernel checks for inf itself, so that nothing synchronizes."""
        self.scaler.scale(loss).backward()
        self._copy([master.grad for master in self.masters], [p.grad for p in self.parameters])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._copy([p.detach() for p in self.parameters], self.masters)
        for p in self.parameters:
            p.grad = None

    def step_on(self, batch: Batch) -> Tensor:
        """Train on a batch; on a GPU by replaying the graph of its shapes, captured at its first use."""
        if self.device.type != "cuda":
            return super().step_on(batch)
        key = tuple(x.shape for x in batch.tensors())
        if key not in self.graphs:
            self.graphs[key] = self._capture(batch)
        graph, static, loss = self.graphs[key]
        for target, row in zip(static.tensors(), batch.tensors(), strict=True):
            target.copy_(row, non_blocking=True)
        graph.replay()
        return loss.clone()

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        """Return (graph of a step, the batch it reads, the loss it writes)."""
        static = batch.map(torch.clone)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_GRAPH_WARMUPS):
                super().step_on(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = super().step_on(static)
        return graph, static, loss
