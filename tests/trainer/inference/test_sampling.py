"""Sampling equals diffusers' own pipeline, and noise depends only on (seed, index)."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.inference.sampling import SAMPLERS, NotFinitePicture, Settings, generate, make_scheduler
from safelight.trainer.models.base import resolve_base, tiny_folder
from safelight.trainer.models.encoders import CaptionEncoder, LatentCodec
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_texts, load_unet, load_vae
from safelight.trainer.stop import Stopped

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_equals_diffusers_pipeline(parts, sampler, cfg):
    """Same latents, scheduler and prompts give the pipeline's images, to rounding."""
    settings = replace(SETTINGS, sampler=sampler, cfg=cfg)
    ours = generate(*parts, settings)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(parts[-1], sampler)
    keys = [Key(12, Purpose.SAMPLE_NOISE, i) for i in range(3)]
    theirs = pipeline(
        PROMPTS,
        height=64,
        width=48,
        num_inference_steps=4,
        guidance_scale=cfg,
        latents=normals_torch(keys, (4, 16, 12)),
    ).images
    difference = np.abs(pixels(ours) - pixels(theirs))
    assert difference.max() <= 2
    assert difference.mean() < 0.05
    assert pixels(ours).std() > 5


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
