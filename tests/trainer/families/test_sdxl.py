"""SDXL's texts and sizes against diffusers' own pipeline, on small random models."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from safelight.data.buckets import Bucket
from safelight.data.photo import Photo
from safelight.data.samples import Crop, Sample
from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.families.family import uncropped_sizes
from safelight.trainer.families.original_layout import to_original, vae_layout
from safelight.trainer.inference.draw import open_run, sample
from safelight.trainer.inference.export import export
from safelight.trainer.inference.sampling import Settings, generate, make_scheduler
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.models.weights import fingerprint, load_texts, load_unet, load_vae
from tests.trainer.families.small_sdxl import write_small_sdxl
from tests.trainer.inference.exported_runs import checkpoint_unet, make_run

CPU = torch.device("cpu")
PROMPTS = ["a red circle on a wall", "two hens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base(folder):
    return resolve_base(str(folder))


@pytest.fixture(scope="module")
def encoder(base):
    return CaptionEncoder.of(base, load_texts(base, "", 0), CPU)


def conditioning(base, encoder, texts, height=32, width=48):
    return base.family.conditioning(
        base.config_of("unet"), encoder.encode(texts), uncropped_sizes(len(texts), height, width)
    )


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_conditioning_is_that_of_diffusers_pipeline(base, pipeline, clip_skip):
    encoder = CaptionEncoder.of(base, load_texts(base, "", 0), CPU, clip_skip)
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, device=CPU, do_classifier_free_guidance=False, clip_skip=clip_skip or None
        )
    ours = conditioning(base, encoder, PROMPTS)
    assert torch.equal(ours.text_BTD, expected)
    assert torch.equal(ours.pooled_BP, pooled)
    expected_sizes = pipeline._get_add_time_ids((32, 48), (0, 0), (32, 48), torch.float32, pooled.shape[1])
    assert torch.equal(ours.sizes_B6, expected_sizes.repeat(2, 1))


def test_the_empty_text_is_zeros_as_the_pipelines_negative_prompt(base, encoder, pipeline):
    _, expected, _, pooled = pipeline.encode_prompt(PROMPTS[:1], device=CPU)
    ours = conditioning(base, encoder, [""])
    assert torch.equal(ours.text_BTD, expected)
    assert torch.equal(ours.pooled_BP, pooled)
    assert not encoder.encode([""]).any()
    assert encoder.encode(["a"]).any()


def test_chunks_follow_each_other_and_the_first_one_is_pooled(base, encoder):
    long = ", ".join(["a very long walk"] * 12)
    reader = encoder.reading(weights=False, num_chunks=2)
    plain, chunks = conditioning(base, encoder, [long]), conditioning(base, reader, [long])
    assert chunks.text_BTD.shape[1] == 2 * plain.text_BTD.shape[1] == 2 * encoder.chunk_tokens
    assert chunks.pooled_BP.shape == plain.pooled_BP.shape
    assert reader.row_shape == (chunks.text_BTD[0].numel() + chunks.pooled_BP[0].numel(),)


def test_the_same_picture_as_the_pipeline(base, encoder, pipeline):
    settings = Settings(48, 32, 3, 5.0, 7, "ddim")
    codec = LatentCodec(load_vae(base, "", 0), CPU)
    unet = load_unet(base, 0).eval()
    schedule = base.noise_schedule()
    positive, negative = (conditioning(base, encoder, texts) for texts in (PROMPTS, [""]))
    ours = generate(unet, codec, positive, negative, schedule, settings)
    pipeline.scheduler = make_scheduler(schedule, "ddim")
    keys = [Key(7, Purpose.SAMPLE_NOISE, place) for place in range(2)]
    latents = normals_torch(keys, (4, 32 // codec.factor, 48 // codec.factor), CPU)
    theirs = pipeline(
        PROMPTS, height=32, width=48, num_inference_steps=3, guidance_scale=5.0, latents=latents, output_type="pil"
    ).images
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_sizes_are_those_of_the_real_crop():
    photo = Photo("images/a.jpg", "0" * 64, 600, 400, ("a",), "a.jpg", "file")
    crops = (Crop((100, 0, 500, 400), False), Crop((100, 0, 500, 400), True), Crop((180, 0, 580, 400), True))
    sample = Sample(photo, Bucket(64, 64), ("", "", ""), ("",), crops, ("a",))
    # the photo is scaled by 64 / 400
    assert sample.sizes(0) == (400, 600, 0, 16, 64, 64)
    # mirrored, the right edge is the left one
    assert sample.sizes(1) == (400, 600, 0, 16, 64, 64)
    assert sample.sizes(2) == (400, 600, 0, 3, 64, 64)


def test_exports_draw_the_same_picture_in_diffusers_and_are_bases_again(folder, tmp_path):
    run = make_run(tmp_path / "run", model={"base": str(folder)})
    export(run, tmp_path / "out", dtype="fp32")
    export(run, tmp_path / "out.safetensors", dtype="fp32")
    of_folder = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", add_watermarker=False)
    of_file = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(tmp_path / "out"), add_watermarker=False
    )
    pictures = [draw(pipeline) for pipeline in (of_folder, of_file)]
    assert np.isfinite(pictures[0]).all()
    assert np.array_equal(*pictures)
    bases = [
        resolve_base(str(tmp_path / "out")),
        resolve_base(str(tmp_path / "out.safetensors"), str(tmp_path / "out")),
    ]
    trained = checkpoint_unet(run)
    for again in bases:
        state = load_unet(again, 0).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
        assert again.zeroes_empty_text
        assert [fingerprint(m) for _, m in load_texts(again, "", 0)] == [
            fingerprint(m) for _, m in load_texts(resolve_base(str(folder)), "", 0)
        ]


def test_a_v_prediction_base_with_zero_terminal_snr_stays_one(tmp_path):
    scheduler = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    run = make_run(tmp_path / "run", model={"base": str(write_small_sdxl(tmp_path / "base", **scheduler))})
    out, file = tmp_path / "out", tmp_path / "out.safetensors"
    export(run, out)
    export(run, file)
    saved = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler.items() <= saved.items()
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    # the configs beside the file say epsilon: the file's own markers count
    for again in (resolve_base(str(out)), resolve_base(str(file), str(write_small_sdxl(tmp_path / "epsilon")))):
        schedule = again.noise_schedule()
        assert (schedule.prediction_type, schedule.zero_terminal_snr) == ("v_prediction", True)
        assert schedule.alphas_cumprod_T[-1] == 0


def test_clip_skip_counts_from_the_last_layer_but_one_as_in_diffusers_and_forge(folder, tmp_path):
    run = make_run(tmp_path / "run", model={"base": str(folder), "clip_skip": 1})
    assert export(run, tmp_path / "out").notes == [
        "trained with clip_skip 1: use clip_skip=1 in diffusers, Clip skip 3 in Forge; A1111 ignores it for Stable "
        "Diffusion XL and draws as without"
    ]
    (file,) = sample(open_run(run), ["a"], "last", tmp_path / "a.png", {"steps": 1, "cfg": 1.0})
    with Image.open(file) as image:
        text = image.text["parameters"]
    assert text.startswith("a\nSteps: 1, Sampler: ")
    assert "Size: 64x64, " in text
    assert "Model: run step 7, Clip skip: 3, " in text


@pytest.mark.parametrize("form", ["the base's file", "model.vae, a file", "model.vae, a folder"])
def test_a_vae_in_fp16_is_computed_with_in_fp32(folder, tmp_path, form):
    """SDXL's autoencoder overflows in fp16, so whatever its file has, nothing is computed in fp16."""
    half = tmp_path / "half"
    vae = load_vae(resolve_base(str(folder)), "", 0).half()
    vae.save_pretrained(half)
    override, base, config = str(half), str(folder), ""
    if form == "model.vae, a file":
        override = str(half / "vae.safetensors")
        save_file(to_original(vae.state_dict(), vae_layout(vae.state_dict())), override)
    elif form == "the base's file":
        run = make_run(tmp_path / "run", model={"base": base})
        override, base, config = "", str(export(run, tmp_path / "out.safetensors", dtype="fp16").path), base
    loaded = load_vae(resolve_base(base, config), override, 0)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor.half(), vae.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    codec, seen = LatentCodec(loaded, CPU), set()
    for half_of_it in (loaded.encoder, loaded.decoder):
        half_of_it.conv_in.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    mean, _ = codec.encode(torch.zeros(1, 3, 32, 32, dtype=torch.float16))
    codec.decode(mean.half())
    assert seen == {torch.float32}


@pytest.mark.parametrize("lacks", ["conditioner.", "first_stage_model.", ("conditioner.", "first_stage_model.")])
def test_a_file_without_some_parts_takes_them_from_model_config(folder, tmp_path, lacks):
    run = make_run(tmp_path / "run", model={"base": str(folder)})
    whole = load_file(export(run, tmp_path / "whole.safetensors", dtype="fp32").path)
    file = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in whole.items() if not name.startswith(lacks)}, file)
    base, source = resolve_base(str(file), str(folder)), resolve_base(str(folder))
    unet, trained = load_unet(base, 0).state_dict(), checkpoint_unet(run)
    assert all(torch.equal(unet[name], tensor) for name, tensor in trained.items())
    assert fingerprint(load_vae(base, "", 0)) == fingerprint(load_vae(source, "", 0))
    for (tokenizer, one), (expected, other) in zip(load_texts(base, "", 0), load_texts(source, "", 0), strict=True):
        assert fingerprint(one) == fingerprint(other)
        assert tokenizer.pad_token == expected.pad_token
    assert base.zeroes_empty_text


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS[0],
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
