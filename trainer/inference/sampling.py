"""Images from captions. The noise of an image depends only on (seed, index), not on the model or the batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.data.tensor_record import concatenate
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.config.schema import Config
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.inference.unet_graphs import UNetGraphs, predict
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.registry.samplers import SAMPLERS

# prompts drawn at a time if memory allows
SAMPLE_BATCH_SIZE = 8


class NotFinitePicture(UserError):
    """A UNet drew a picture of which some pixels are not finite numbers. index: of the picture."""

    def __init__(self, index: int):
        super().__init__(f"picture {index + 1} has values that are not finite")
        self.index = index


@dataclass(frozen=True)
class Settings:
    """How to draw. width, height: px. cfg: scale of classifier-free guidance, 1 for none.

    sampler: one of registry.samplers. spacing: of its timesteps.
    """

    width: int
    height: int
    steps: int
    cfg: float
    seed: int
    sampler: str
    spacing: str = "trailing"

    def with_seed(self, seed: int) -> Settings:
        return replace(self, seed=seed)


def settings_of(config: Config) -> Settings:
    """Return the settings that a run draws its samples and comparisons with: the first cfg if there are several."""
    side, sample = config.data.max_resolution, config.sample
    width, height = sample.width or side, sample.height or side
    return Settings(width, height, sample.steps, sample.cfgs[0], config.run.seed, sample.sampler, sample.spacing)


def check_size(settings: Settings, factor: int) -> None:
    """Raise UserError, with the nearest valid sizes, if a side is not a multiple of factor, the pixels per latent."""
    for name, value in (("width", settings.width), ("height", settings.height)):
        if value % factor:
            below = value - value % factor
            raise UserError(f"{name} {value} is not a multiple of {factor}; use {below or factor} or {below + factor}")


def make_scheduler(schedule: NoiseSchedule, sampler: str, spacing: str = "trailing"):
    """Return diffusers' scheduler for a sampler, with the run's noise schedule.

    spacing: of the timesteps. Raises ValueError for an unknown sampler, UserError for a spacing that leaves out the
    pure noise of a zero-terminal schedule.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

    check_spacing(spacing, schedule.zero_terminal_snr)
    is_leading = spacing == "leading"
    options = {
        "trained_betas": _betas(schedule),
        "prediction_type": schedule.prediction_type,
        "num_train_timesteps": schedule.num_timesteps,
        "timestep_spacing": spacing,
        # as in the schedulers of the published models, so that the smallest timestep is 1
        "steps_offset": 1 if is_leading else 0,
        # the last timestep has no signal: its noise level is infinite, and those that compute with it take a large one
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    if sampler == "ddim":
        # with leading timesteps the last step ends at the first one's noise level
        return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=not is_leading)
    if sampler == "dpm++":
        return DPMSolverMultistepScheduler(**options)
    if sampler == "dpm++-karras":
        return DPMSolverMultistepScheduler(**options, use_karras_sigmas=True)
    if sampler == "euler":
        return EulerDiscreteScheduler(**options)
    if sampler == "euler-a":
        return _keyed_euler_ancestral(options)
    if sampler == "unipc":
        return UniPCMultistepScheduler(**options)
    raise ValueError(f"sampler {sampler!r} is unknown; use {', '.join(SAMPLERS)}")


def check_spacing(spacing: str, zero_terminal_snr: bool) -> None:
    """Raise UserError for a spacing that begins below the last timestep of a schedule whose last one is pure noise."""
    if zero_terminal_snr and spacing == "leading":
        raise UserError(
            "sample.spacing leading leaves out the last timestep, which a schedule with zero terminal SNR must begin "
            "with; use trailing"
        )


def _keyed_euler_ancestral(options: dict):
    """Return diffusers' EulerAncestralDiscreteScheduler, whose steps take their noise from the caller."""
    from diffusers import EulerAncestralDiscreteScheduler

    class KeyedEulerAncestral(EulerAncestralDiscreteScheduler):
        def keyed_step(self, predicted: Tensor, timestep: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
            """Return the latents after a step. noise: standard normals, which diffusers would draw itself.

            Source: sample_euler_ancestral and get_ancestral_step of k-diffusion, with eta 1.
            """
            if self.step_index is None:
                self._init_step_index(timestep)
            sigma, below = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
            up = (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5
            down = (below**2 - up**2) ** 0.5
            # the denoised image, by the library; the noise that it adds besides is not used
            denoised = self.step(
                predicted, timestep, latents, generator=_unused_generator(latents.device)
            ).pred_original_sample
            return latents + (latents - denoised) / sigma * (down - sigma) + noise * up

    return KeyedEulerAncestral(**options)


def _unused_generator(device: torch.device) -> torch.Generator:
    """Return a generator of its own, so that the global one, which others may use, stays as it is."""
    return torch.Generator(device)


def _betas(schedule: NoiseSchedule) -> np.ndarray:
    a = schedule.alphas_cumprod_T.double().cpu()
    return (
        (1 - a / torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])).clamp(max=0.999999).numpy().astype(np.float32)
    )


def _rows(
    conditioning: TextConditioning, negative: TextConditioning | None, rows: slice, device: torch.device
) -> TextConditioning:
    """Return some rows of the conditioning on a device, after as many of the negative prompt if there is one.

    negative: a row each, or one for all.
    """
    batch = conditioning[rows]
    if negative is not None:
        is_shared = len(negative.tensors()[0]) == 1
        batch = concatenate([negative[[0] * len(batch.tensors()[0])] if is_shared else negative[rows], batch])
    return batch.map(lambda x: x.to(device))


@torch.no_grad()
def generate(
    unet: nn.Module,
    codec: LatentCodec,
    conditioning: TextConditioning,
    negative: TextConditioning,
    schedule: NoiseSchedule,
    settings: Settings,
    *,
    places: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    cfgs: Sequence[float] | None = None,
    batch_size: int = SAMPLE_BATCH_SIZE,
    decode_on: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    graphs: UNetGraphs | None = None,
) -> list[Image.Image]:
    """Return an RGB image for each row of the conditioning.

    negative: one row, which classifier-free guidance steers away from, or a row each. places, seeds: of the rows,
    which key their images' noise; by default 0, 1, ... and settings.seed. cfgs: of the rows, by default settings.cfg.
    batch_size: images at a time. decode_on: the device to decode on, where the codec moves
    temporarily; by default its own. batch_size and decode_on change images only by float rounding. progress: called
    with (done, total) denoising steps of whole batches; an exception that it raises stops the drawing. graphs: those of
    the UNet, None to call it without.
    Raises UserError if the size is not a multiple of the pixels per latent, NotFinitePicture if the UNet draws
    values that are not finite.
    """
    factor = codec.factor
    check_size(settings, factor)
    weight = next(unet.parameters())
    num_rows = len(conditioning.tensors()[0])
    places = range(num_rows) if places is None else places
    seeds = [settings.seed] * num_rows if seeds is None else seeds
    cfgs = [settings.cfg] * num_rows if cfgs is None else cfgs
    cfg_B111 = torch.tensor(cfgs, dtype=torch.float32)[:, None, None, None]
    is_guided = bool((cfg_B111 != 1).any())
    cfg_B111 = cfg_B111.to(weight.device)
    call = partial(predict, unet) if graphs is None else graphs
    shape = (codec.latent_channels, settings.height // factor, settings.width // factor)
    images: list[Image.Image] = []
    num_batches, num_done = -(-num_rows // batch_size), 0
    with _in_eval_mode(unet):
        for start in range(0, num_rows, batch_size):
            stop = min(start + batch_size, num_rows)
            drawn = zip(seeds[start:stop], places[start:stop], strict=True)
            keys = [Key(seed, Purpose.SAMPLE_NOISE, place) for seed, place in drawn]
            scheduler = make_scheduler(schedule, settings.sampler, settings.spacing)
            # the scheduler's on the CPU, where it looks up their noise levels: DDIM's would wait for the GPU six times
            # a step; the UNet's on its own device
            scheduler.set_timesteps(settings.steps)
            unet_timesteps = scheduler.timesteps.to(weight.device)
            is_ancestral = SAMPLERS[settings.sampler].is_ancestral
            latents = normals_torch(keys, shape, weight.device) * scheduler.init_noise_sigma
            rows = slice(start, stop)
            batch = _rows(conditioning, negative if is_guided else None, rows, weight.device)
            arguments = batch.unet_arguments(weight.dtype)
            for number, timestep in enumerate(scheduler.timesteps):
                model_input = scheduler.scale_model_input(latents, timestep).to(weight.dtype)
                if is_guided:
                    model_input = torch.cat([model_input, model_input])
                predicted = call(model_input, unet_timesteps[number], arguments).float()
                if is_guided:
                    without, with_caption = predicted.chunk(2)
                    predicted = without + cfg_B111[rows] * (with_caption - without)
                if is_ancestral:
                    step_keys = [key._replace(purpose=Purpose.SAMPLE_STEP_NOISE, occurrence=number) for key in keys]
                    noise = normals_torch(step_keys, shape, weight.device)
                    latents = scheduler.keyed_step(predicted, timestep, latents, noise)
                else:
                    latents = scheduler.step(predicted, timestep, latents).prev_sample
                if number == 0:
                    # broken weights show at once
                    _check_finite(latents, places[start:stop])
                num_done += 1
                if progress is not None:
                    progress(num_done, num_batches * len(scheduler.timesteps))
            _check_finite(latents, places[start:stop])
            with codec.on(decode_on or codec.device):
                pixels = codec.decode(latents)
            _check_finite(pixels, places[start:stop])
            images.extend(to_images(pixels))
    return images


@contextlib.contextmanager
def _in_eval_mode(unet: nn.Module) -> Iterator[None]:
    was_training = unet.training
    unet.eval()
    try:
        yield
    finally:
        unet.train(was_training)


def _check_finite(x_BCHW: Tensor, places: Sequence[int]) -> None:
    """Raise NotFinitePicture if a value is not finite. places: of the batch's pictures among all."""
    is_finite = x_BCHW.isfinite().flatten(1).all(dim=1)
    if not is_finite.all():
        raise NotFinitePicture(places[int(is_finite.int().argmin())])


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """Return RGB images from pixels in [0, 1]."""
    array = (pixels_BCHW.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(image) for image in array]
