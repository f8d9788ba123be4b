"""Images of a finished or running run: by prompt, and base beside trained from the same noise."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from safelight.data.atomic import atomic_write_text
from safelight.data.manifest import read_manifest
from safelight.errors import UserError
from safelight.kernels.unet.attention import apply_attention, attention_cases, choose_attention
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import check_files, folder_of, list_checkpoints, read_record
from safelight.trainer.config.toml import Config, explain, load_config, require_run
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, Settings, check_size, generate, settings_of
from safelight.trainer.models.base import Base, base_of, latent_factor, vae_bytes, vae_config
from safelight.trainer.models.device import pick_device, pick_dtype
from safelight.trainer.models.encoders import (
    CaptionEncoder,
    LatentCodec,
    decode_bytes,
    load_caption_encoder,
    load_codec,
)
from safelight.trainer.models.noise_schedule import NoiseSchedule, make_schedule
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.ema import load_averages
from safelight.trainer.run_log.environment import MEMORY_PLAN, recorded, recorded_attention

Progress = Callable[[int, int], None]


@dataclass
class OpenRun:
    """A run's models, each loaded when it is asked for, without its dataset."""

    run_dir: Path
    config: Config
    base: Base
    device: torch.device
    schedule: NoiseSchedule

    # the encoders wait in host memory and visit the GPU

    @functools.cached_property
    def codec(self) -> LatentCodec:
        return load_codec(self.config, self.base, torch.device("cpu"))

    @functools.cached_property
    def encoder(self) -> CaptionEncoder:
        return load_caption_encoder(self.config, self.base, torch.device("cpu"))

    def unet(self, step: int | None) -> nn.Module:
        """Return the UNet of a checkpoint, its moving average where it has one, or of the base for None."""
        dtype = pick_dtype(self.config.model.precision, self.device)
        unet = load_unet(self.base, self.config.run.seed, dtype)
        if step is not None:
            check_files(folder_of(self.run_dir, step))
            FullFineTune(unet).load(folder_of(self.run_dir, step))
            load_averages(folder_of(self.run_dir, step), unet)
        unet.to(self.device).eval().requires_grad_(False)
        side = self.config.data.resolution // self.codec.factor
        # what the run trained with where this is its device, whatever works elsewhere
        attention = choose_attention(
            self.device, dtype, attention_cases(unet, (side, side)), previous=recorded_attention(self.run_dir)
        )
        apply_attention(unet, attention)
        return unet

    def draw(
        self,
        unet: nn.Module,
        prompts: list[str],
        settings: Settings,
        negative: str | None = None,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> list[Image.Image]:
        """Return an image for each prompt; image i has the same noise whatever draws it. say: told what is done for want of room."""
        negative = self.config.sample.negative_prompt if negative is None else negative
        with self.encoder.on(self.device) as encoder:
            given, without = (self.base.family.conditioning(encoder.encode(t)) for t in (prompts, [negative]))
        decode_on, prompts_at_a_time = self._room(settings)
        if decode_on != self.device and say is not None:
            say("the GPU has no room to decode: the CPU does, which takes longer")
        return generate(
            unet,
            self.codec,
            given,
            without,
            self.schedule,
            settings,
            batch_size=prompts_at_a_time,
            decode_on=decode_on,
            progress=progress,
        )

    def _room(self, settings: Settings) -> tuple[torch.device, int]:
        """Return where to decode by what is free of the GPU, and how many prompts to draw at a time: as the run did."""
        if self.device.type != "cuda":
            return self.device, SAMPLE_BATCH_SIZE
        plan = recorded(self.run_dir, MEMORY_PLAN) or {}
        prompts = (plan.get("between") or {}).get("prompts") or SAMPLE_BATCH_SIZE
        needed = decode_bytes(settings.width, settings.height, vae_bytes(self.base, self.config.model.vae))
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + cached
        return self.device if needed < free else torch.device("cpu"), prompts


def open_run(run_dir: Path) -> OpenRun:
    """Return a run's models. Raises UserError if the folder is no run."""
    require_run(run_dir)
    config = load_config(run_dir / "config.toml")
    device = pick_device(config.run.device)
    base = base_of(config.model)
    schedule = make_schedule(base.config_of("scheduler"), config.loss.prediction, config.loss.zero_terminal_snr)
    return OpenRun(run_dir, config, base, device, schedule)


def pick_step(run_dir: Path, wanted: str, has_base: bool = True) -> int | None:
    """Return the step of `last`, `best` or a number; None for `base`, where that is a choice.

    Raises UserError where there is no such checkpoint.
    """
    steps = list_checkpoints(run_dir)
    if wanted == "base" and has_base:
        return None
    if not steps:
        raise UserError(f"{run_dir} holds no checkpoint yet")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = read_record(folder_of(run_dir, steps[-1]))["position"]["best_step"]
        if best not in steps:
            why = "the base itself is best by validation loss" if best == 0 else "there was no validation"
            raise UserError(f"{run_dir} has no best checkpoint: {why}; use last or one of {steps}")
        return best
    if wanted.isdigit() and int(wanted) in steps:
        return int(wanted)
    names = "last, best, base" if has_base else "last, best"
    raise UserError(f"checkpoint {wanted!r} is not in {run_dir}; use {names} or one of {', '.join(map(str, steps))}")


def validation_captions(run: OpenRun) -> list[str]:
    """Return the first captions of the held-out photographs, of the training ones if none are held out."""
    path = run.run_dir / "split.json"
    if not path.is_file():
        return []
    try:
        split = json.loads(path.read_bytes())
        files = split["validation"] or split["train"]
    except (ValueError, KeyError, TypeError, RecursionError):
        command = f"safelight train {run.run_dir / 'config.toml'} --resume"
        raise UserError(f"{path} is damaged; `{command}` writes it anew, or set sample.prompts") from None
    dataset = Path(run.config.data.path)
    if not dataset.is_dir():
        raise UserError(
            f"the run's dataset, data.path {str(dataset)!r}, is not here, and its captions with it; start from the folder "
            f"the run was started from, or set sample.prompts in {run.run_dir / 'config.toml'}"
        )
    captions = {photo.file: photo.captions[0] for photo in read_manifest(dataset) if photo.captions}
    suffix = run.config.data.caption_suffix
    return list(dict.fromkeys(captions[file] + suffix for file in files if captions.get(file)))


def compare(
    run: OpenRun, checkpoint: str, num: int, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """Draw base and trained from the same noise into RUN/compare and return that folder.

    The prompts are the run's, then captions of held-out photographs, `num` in all; `say` is told where there are fewer.
    """
    if num < 1:
        raise UserError(f"--num {num} is below 1; use 8")
    step = pick_step(run.run_dir, checkpoint, has_base=False)
    prompts = list(dict.fromkeys(run.config.sample.prompts))
    if len(prompts) < num:
        prompts = list(dict.fromkeys([*prompts, *validation_captions(run)]))
    prompts = prompts[:num]
    if say is not None and 0 < len(prompts) < num:
        say(f"{len(prompts)} pairs, not {num}: there are no more prompts and held-out captions")
    if not prompts:
        raise UserError("there is nothing to draw: set sample.prompts or hold photographs out for validation")
    settings = settings_of(run.config)
    folder = run.run_dir / "compare"
    folder.mkdir(exist_ok=True)
    pairs = [{"prompt": p, "seed": settings.seed, "cfg": settings.cfg, "num_steps": settings.steps} for p in prompts]
    for turn, (name, chosen) in enumerate((("base", None), ("trained", step))):

        def told(done: int, total: int, turn: int = turn) -> None:
            if progress is not None:
                progress(turn * total + done, 2 * total)

        images = run.draw(run.unet(chosen), prompts, settings, progress=told, say=say)
        for index, image in enumerate(images):
            pairs[index][name] = f"{name}-{index:03d}.png"
            image.save(folder / pairs[index][name])
    record = {"base": run.config.model.base, "trained": f"step {step}", "step": step, "pairs": pairs}
    atomic_write_text(folder / "index.json", json.dumps(record, indent=1, ensure_ascii=False))
    return folder


def sample(
    run: OpenRun,
    prompts: list[str],
    checkpoint: str,
    out: Path,
    changes: dict[str, int | float | str],
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """Draw prompts with a checkpoint into `out` and return the new files.

    changes: settings of the [sample] table, or seed, in place of the run's. Raises UserError where one is impossible.
    """
    if not prompts:
        raise UserError('there is nothing to draw; give --prompt "..."')
    config = run.config.model_copy(deep=True)
    for name, value in changes.items():
        try:
            setattr(config.run if name == "seed" else config.sample, name, value)
        except ValidationError as error:
            raise UserError(explain(error, "command line")) from None
    settings = settings_of(config)
    step = pick_step(run.run_dir, checkpoint)
    check_size(settings, latent_factor(vae_config(run.base, config.model.vae)))
    images = run.draw(run.unet(step), prompts, settings, config.sample.negative_prompt, progress, say)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{'base' if step is None else f'step{step}'}-seed{settings.seed}"
    # earlier images stay: other prompts would have the same name
    first = 1 + max((int(p.stem.rsplit("-", 1)[1]) for p in out.glob(f"{stem}-???.png")), default=-1)
    files = []
    for index, image in enumerate(images, first):
        path = out / f"{stem}-{index:03d}.png"
        image.save(path)
        files.append(path)
    return files
