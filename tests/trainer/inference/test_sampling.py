"""Sampling equals diffusers' own pipeline, and noise depends only on (seed, index)."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.distributed.together import Stopped
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.inference import sampling
from safelight.trainer.inference.sampling import NotFinitePicture, Settings, generate, make_scheduler
from safelight.trainer.models.base import resolve_base, tiny_folder
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_texts, load_unet, load_vae
from safelight.trainer.registry.samplers import SAMPLERS, SPACINGS

CPU = torch.device("cpu")
TINY = tiny_folder()
CONFIG = resolve_base("tiny").config_of("scheduler")
SETTINGS = Settings(width=48, height=64, steps=4, cfg=3.0, seed=12, sampler="ddim")
PROMPTS = ["a red circle on a black background", "small blue star, grey background", "a green ring"]


@pytest.fixture(scope="module")
def parts():
    base = resolve_base("tiny")
    codec = LatentCodec(load_vae(base, "", 0), CPU)
    encoder = CaptionEncoder.of(base, load_texts(base, "", 0), CPU)
    schedule = make_schedule(base.config_of("scheduler"))
    return (
        load_unet(base, 0).eval(),
        codec,
        TextConditioning(encoder.encode(PROMPTS)),
        TextConditioning(encoder.encode([""])),
        schedule,
    )


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in images])


def noise_of_steps(keys: list[Key], shape: tuple) -> Iterator[torch.Tensor]:
    """Yield the noise that ancestral steps add, one step after another."""
    for number in itertools.count():
        step_keys = [key._replace(purpose=Purpose.SAMPLE_STEP_NOISE, occurrence=number) for key in keys]
        yield normals_torch(step_keys, shape)


def theirs(monkeypatch, scheduler, cfg: float, *, base: Path = TINY, negative: str = "") -> np.ndarray:
    """Return the pictures of diffusers' own pipeline from the noise of ours, with a scheduler of theirs."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    keys = [Key(12, Purpose.SAMPLE_NOISE, i) for i in range(3)]
    noise = noise_of_steps(keys, (4, 16, 12))
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *args, **kwargs: next(noise))
    return pixels(
        pipeline(
            PROMPTS,
            negative_prompt=[negative] * 3,
            height=64,
            width=48,
            num_inference_steps=4,
            guidance_scale=cfg,
            latents=normals_torch(keys, (4, 16, 12)),
        ).images
    )


def plain_scheduler(sampler: str, spacing: str, config: dict, **more):
    """Return diffusers' scheduler as its documentation has it, from the base's own config."""
    kinds = {
        "ddim": DDIMScheduler,
        "dpm++": DPMSolverMultistepScheduler,
        "dpm++-karras": DPMSolverMultistepScheduler,
        "euler": EulerDiscreteScheduler,
        "euler-a": EulerAncestralDiscreteScheduler,
        "unipc": UniPCMultistepScheduler,
    }
    # what published models have for steps that leave out the last timestep
    more |= {"steps_offset": 1} if spacing == "leading" else {"steps_offset": 0}
    more |= {"use_karras_sigmas": True} if sampler == "dpm++-karras" else {}
    more |= {"set_alpha_to_one": spacing != "leading", "clip_sample": False} if sampler == "ddim" else {}
    return kinds[sampler].from_config(config, timestep_spacing=spacing, **more)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_equals_diffusers_pipeline(parts, monkeypatch, sampler, cfg):
    """The pipeline with the library's own scheduler, from the same noise, draws the same images, to rounding."""
    ours = pixels(generate(*parts, replace(SETTINGS, sampler=sampler, cfg=cfg)))
    expected = theirs(monkeypatch, plain_scheduler(sampler, "trailing", CONFIG), cfg)
    difference = np.abs(ours - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.05
    assert ours.std() > 5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.long
def test_every_spacing_equals_diffusers(parts, monkeypatch, sampler, spacing):
    ours = pixels(generate(*parts, replace(SETTINGS, sampler=sampler, spacing=spacing)))
    expected = theirs(monkeypatch, plain_scheduler(sampler, spacing, CONFIG), 3.0)
    assert np.abs(ours - expected).max() <= 2
    trailing = pixels(generate(*parts, replace(SETTINGS, sampler=sampler)))
    # which has noise levels of its own
    assert np.array_equal(ours, trailing) == (sampler == "dpm++-karras")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_v_prediction_and_zero_terminal_snr_equal_diffusers(monkeypatch, sampler, zero_terminal_snr):
    base = resolve_base("tiny-v")
    config = {**base.config_of("scheduler"), "rescale_betas_zero_snr": zero_terminal_snr}
    schedule = make_schedule(config)
    assert schedule.zero_terminal_snr == zero_terminal_snr
    assert schedule.prediction_type == "v_prediction"
    encoder = CaptionEncoder.of(base, load_texts(base, "", 0), CPU)
    texts = [TextConditioning(encoder.encode(prompts)) for prompts in (PROMPTS, [""])]
    codec = LatentCodec(load_vae(base, "", 0), CPU)
    settings = replace(SETTINGS, sampler=sampler)
    ours = pixels(generate(load_unet(base, 0).eval(), codec, *texts, schedule, settings))
    expected = theirs(monkeypatch, plain_scheduler(sampler, "trailing", config), 3.0, base=base.folder)
    difference = np.abs(ours - expected)
    # the noise level of a schedule with zero terminal SNR is 4096, of which fp32 keeps four digits behind the point
    assert np.percentile(difference, 99) <= 2
    assert difference.mean() < 0.3
    assert ours.std() > 5


def test_ancestral_noise_is_a_function_of_the_key_alone(parts):
    """Neither the batch, the neighbours nor torch's generator decide it, and drawing leaves that generator as it is."""
    settings = replace(SETTINGS, sampler="euler-a")
    state = torch.get_rng_state()
    whole = pixels(generate(*parts, settings))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    one_by_one = pixels(generate(*parts, settings, batch_size=1))
    assert np.abs(whole - one_by_one).max() <= 1
    plain = pixels(generate(*parts, replace(SETTINGS, sampler="euler")))
    assert np.abs(whole - plain).mean() > 1
    other = pixels(generate(*parts, replace(settings, seed=13)))
    assert np.abs(whole - other).mean() > 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_schedule_that_ends_in_pure_noise_must_begin_there(spacing):
    schedule = make_schedule(resolve_base("tiny-v").config_of("scheduler"), zero_terminal_snr=True)
    if spacing == "leading":
        with pytest.raises(UserError, match=r"leading leaves out the last timestep.*; use trailing"):
            make_scheduler(schedule, "euler", spacing)
        return
    for sampler in SAMPLERS:
        scheduler = make_scheduler(schedule, sampler, spacing)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == schedule.num_timesteps - 1, sampler


def test_an_image_does_not_depend_on_its_neighbours(parts):
    whole = pixels(generate(*parts, SETTINGS))
    one_by_one = pixels(generate(*parts, SETTINGS, batch_size=1))
    assert np.abs(whole - one_by_one).max() <= 1


def test_other_seeds_and_indices_give_other_images(parts):
    unet, codec, text, negative, schedule = parts
    same = text[[0, 0]]
    first, second = pixels(generate(unet, codec, same, negative, schedule, SETTINGS))
    assert np.abs(first - second).mean() > 3
    (other,) = pixels(generate(unet, codec, same[:1], negative, schedule, replace(SETTINGS, seed=13)))
    assert np.abs(first - other).mean() > 3


def test_guidance_is_an_extrapolation_and_the_caption_matters(parts):
    unet, codec, text, negative, schedule = parts
    plain = pixels(generate(unet, codec, text, negative, schedule, replace(SETTINGS, cfg=1.0)))
    # with the caption's own embedding as the negative, any scale changes nothing
    own = pixels(generate(unet, codec, text[:1], text[:1], schedule, replace(SETTINGS, cfg=9.0)))
    assert np.abs(own[0] - plain[0]).max() <= 1
    guided = pixels(generate(unet, codec, text, negative, schedule, SETTINGS))
    assert np.abs(guided - plain).mean() > 0.5


def test_progress_counts_the_denoising_steps_of_all_batches_and_can_stop_them(parts):
    seen = []
    generate(*parts, SETTINGS, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    total = 2 * SETTINGS.steps
    assert seen == [(done, total) for done in range(1, total + 1)]

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        generate(*parts, SETTINGS, progress=stop)


def test_a_size_that_is_not_a_multiple_of_the_latent_factor_is_refused(parts):
    with pytest.raises(ValueError, match="width 50 is not a multiple of 4; use 48 or 52"):
        generate(*parts, replace(SETTINGS, width=50))


def test_an_unknown_sampler_is_refused(parts):
    with pytest.raises(ValueError, match="ddim, dpm"):
        make_scheduler(parts[-1], "magic")


def test_a_picture_that_is_not_finite_is_no_picture(parts):
    """Weights that are not finite are found at the first denoising step; the UNet goes back to its mode."""
    unet = copy.deepcopy(parts[0]).train()
    with torch.no_grad():
        unet.conv_out.bias[1] = float("nan")
    seen = []
    with pytest.raises(NotFinitePicture) as error:
        generate(unet, *parts[1:], SETTINGS, batch_size=1, progress=lambda done, total: seen.append(done))
    assert (error.value.index, seen, unet.training) == (0, [], True)


def test_a_picture_that_is_decoded_to_no_number_is_named(parts, monkeypatch):
    decode = LatentCodec.decode

    def broken(self, latents):
        pixels = decode(self, latents).clone()
        pixels[-1, 0, 0, 0] = float("nan")
        return pixels

    monkeypatch.setattr(LatentCodec, "decode", broken)
    with pytest.raises(NotFinitePicture, match="picture 3 has values that are not finite"):
        generate(*parts, SETTINGS)


class Untouched(torch.nn.Module):
    """A UNet that predicts its input, on a device that has no values to read."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))
        self.timesteps: list[torch.Tensor] = []

    def forward(self, latents, timestep, **arguments):
        self.timesteps.append(timestep)
        return SimpleNamespace(sample=latents)


class NoPixels:
    """An autoencoder on the same device, whose pixels are the latents."""

    factor, latent_channels, device = 8, 4, torch.device("meta")

    def on(self, device):
        return contextlib.nullcontext()

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_denoising_steps_read_no_value_from_the_device(parts, monkeypatch, sampler):
    """Reading one would wait for the GPU. Meta tensors have none to read: an attempt raises."""
    checks = []
    monkeypatch.setattr(sampling, "_check_finite", lambda x, places: checks.append(x.device.type))
    # there are no generators for meta tensors
    monkeypatch.setattr(sampling, "_unused_generator", lambda device: torch.Generator())
    monkeypatch.setattr(sampling, "to_images", lambda pixels: ["image"] * len(pixels))
    unet, (_, _, positive, negative, schedule) = Untouched(), parts
    settings = replace(SETTINGS, sampler=sampler, steps=6)
    assert generate(unet, NoPixels(), positive, negative, schedule, settings, batch_size=3) == ["image"] * 3
    # the first step's latents, the last one's, and the pixels, however many steps there are
    assert checks == ["meta"] * 3
    assert [timestep.device.type for timestep in unet.timesteps] == ["meta"] * 6
