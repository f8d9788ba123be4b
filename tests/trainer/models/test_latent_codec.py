"""The autoencoder returns what diffusers' own calls return; in 16 bits nearly the same, or it is refused."""

import pytest
import torch

from safelight.errors import UserError
from safelight.trainer.models import latent_codec
from safelight.trainer.models.base import tiny_folder, vae_config
from safelight.trainer.models.device import pick_vae_dtype
from safelight.trainer.models.latent_codec import LatentCodec, decode_bytes, require_close
from safelight.trainer.models.weights import load_vae

CPU = torch.device("cpu")
FP16, FP32 = torch.float16, torch.float32


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    # without a dtype, so that every part is loaded in fp32
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_latents_and_pixels_are_those_of_diffusers(tiny, pipeline, pixels):
    codec = LatentCodec(load_vae(tiny, "", 0), CPU)
    assert (codec.has_posterior, codec.factor, codec.latent_channels) == (True, pipeline.vae_scale_factor, 4)
    mean, logvar = codec.encode(pixels)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        scaled = posterior.mean * pipeline.vae.config.scaling_factor
        unscaled = scaled / pipeline.vae.config.scaling_factor
        decoded = torch.cat([pipeline.vae.decode(latents).sample for latents in unscaled.split(1)])
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(logvar, posterior.logvar)
    assert torch.equal(codec.decode(mean * codec.scaling_factor), pipeline.image_processor.postprocess(decoded, "pt"))


def test_an_autoencoder_tiny_in_place_of_the_bases_vae(tiny, small_taesd, pixels):
    from diffusers import AutoencoderTiny

    codec = LatentCodec(load_vae(tiny, str(small_taesd), 0), CPU)
    assert (codec.has_posterior, codec.factor, codec.latent_channels, codec.scaling_factor) == (False, 4, 4, 1.0)
    vae = AutoencoderTiny.from_pretrained(small_taesd)
    latents, logvar = codec.encode(pixels)
    assert logvar is None
    with torch.no_grad():
        assert torch.equal(latents, vae.encode(pixels).latents)
        decoded = torch.cat([vae.decode(one).sample for one in latents.split(1)])
        expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert torch.equal(codec.decode(latents), expected)


def test_a_large_picture_is_decoded_in_tiles_without_seams_and_in_bounded_memory(tiny, small_taesd, monkeypatch):
    codec = LatentCodec(load_vae(tiny, str(small_taesd), 0), CPU)
    latents = torch.randn(1, 4, 150, 100, generator=torch.Generator().manual_seed(0))
    whole = (codec.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    sizes, decode = [], codec.vae.decode
    monkeypatch.setattr(codec.vae, "decode", lambda z: sizes.append(tuple(z.shape[2:])) or decode(z))
    assert (codec.decode(latents) - whole).abs().max() < 1e-5
    most = latent_codec.TILE_LATENTS + 2 * latent_codec.halo_of((1, 1, 1))
    assert len(sizes) == 6
    assert max(map(max, sizes)) == most
    # with less around the tiles, their edges differ
    monkeypatch.setattr(latent_codec, "halo_of", lambda blocks: 1)
    assert (codec.decode(latents) - whole).abs().max() > 1e-4
    monkeypatch.undo()
    vae = vae_config(tiny, str(small_taesd))
    needed = [decode_bytes(side, side, 0, vae) for side in (4 * most, 4 * most + 4, 4096)]
    assert needed == [needed[0]] * 3
    assert decode_bytes(100, 100, 0, vae) < needed[0]
    # an AutoencoderKL sees the whole picture
    assert decode_bytes(4096, 4096, 0, vae_config(tiny, "")) > 100 * needed[0]


def test_a_folder_of_something_else_than_an_autoencoder_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"is not an autoencoder's folder: it has no config\.json; give"):
        load_vae(tiny, str(tmp_path), 0)
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; use an AutoencoderKL or AutoencoderTiny"):
        load_vae(tiny, str(tiny_folder() / "unet"), 0)


@pytest.mark.parametrize("dtype", [FP16, torch.bfloat16])
def test_in_16_bits_latents_and_pixels_are_nearly_the_same_and_their_rows_other_ones(tiny, pixels, dtype):
    exact = LatentCodec(load_vae(tiny, "", 0), CPU)
    codec = LatentCodec(load_vae(tiny, "", 0), CPU, dtype, dtype)
    assert codec.fingerprint == f"{exact.fingerprint}, {'fp16' if dtype == FP16 else 'bf16'}"
    check = codec.check_precision(list(pixels))
    assert check.is_close
    assert check.num_images == 2
    require_close(check)
    # what it says is what it does
    mean, logvar = codec.encode(pixels)
    exact_mean, exact_logvar = exact.encode(pixels)
    errors = [((a - b).pow(2).mean() / b.pow(2).mean()) for a, b in zip(mean, exact_mean, strict=True)]
    # how many images are encoded at a time changes the rounding
    assert check.latents == pytest.approx(float(torch.stack(errors).mean().sqrt()), rel=0.2)
    assert 0 < check.latents < (1e-3 if dtype == FP16 else 8e-3)
    assert 0 < float((logvar - exact_logvar).abs().mean()) < 0.05
    shown, exact_shown = codec.decode(exact_mean * 0.18), exact.decode(exact_mean * 0.18)
    assert 0 < (shown - exact_shown).pow(2).mean().sqrt() < 1 / 255
    # the weights in fp32 are as they were
    for ours, theirs in zip(codec.vae.parameters(), exact.vae.parameters(), strict=True):
        assert ours.dtype == FP32
        assert torch.equal(ours, theirs)


def test_an_autoencoder_that_overflows_in_fp16_is_refused(tiny, pixels):
    vae = load_vae(tiny, "", 0)
    # norms behind it undo the factor in fp32
    vae.encoder.conv_in.weight.mul_(1e6)
    codec = LatentCodec(vae, CPU, FP16, FP16)
    check = codec.check_precision(list(pixels[:1]))
    assert not check.is_close
    with pytest.raises(UserError) as error:
        require_close(check)
    assert str(error.value) == (
        "model.vae_precision fp16: the autoencoder overflows in fp16 (tried on 1 photograph); "
        "set model.vae_precision to fp32"
    )


@pytest.mark.parametrize(
    ("latents", "logvars", "pixels"), [(0.011, 0, 0), (0, 0.11, 0), (0, 0, 1.1), (float("nan"), 0, 0)]
)
def test_each_limit_counts(latents, logvars, pixels):
    with pytest.raises(UserError, match=r"set model\.vae_precision to fp32$"):
        require_close(latent_codec.PrecisionCheck("bf16", latents, logvars, pixels, 3))


def test_the_limits_are_told_beside_what_was_found():
    check = latent_codec.PrecisionCheck("bf16", 0.016, 0.003, 1.88, 3)
    assert str(check) == (
        "the autoencoder in bf16 differs from fp32 by 1.6 % in latents (1 % allowed), by 1.9 of 255 in pixels "
        "(1 allowed) and by 0.003 in the logarithm of variances (0.1 allowed), on 3 photographs"
    )


def test_a_picture_that_overflows_in_fp16_is_decoded_in_fp32(tiny):
    vae = load_vae(tiny, "", 0)
    vae.decoder.conv_in.weight.mul_(1e6)
    codec = LatentCodec(vae, CPU, FP16, FP16)
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(4))
    shown = codec.decode(latents)
    assert shown.isfinite().all()
    assert torch.equal(shown, LatentCodec(vae, CPU).decode(latents))


def test_on_a_cpu_fp32_is_used_for_what_a_gpu_computes_in_16_bits(tiny, pixels):
    """As `auto` has it: a run on a GPU whose pictures are decoded on the CPU."""
    codec, exact = LatentCodec(load_vae(tiny, "", 0), CPU, FP16), LatentCodec(load_vae(tiny, "", 0), CPU)
    assert torch.equal(codec.encode(pixels)[0], exact.encode(pixels)[0])
    # as on a GPU, which a CPU cannot show
    codec._move(torch.device("meta"))
    assert {(p.dtype, p.device.type) for p in codec._working.parameters()} == {(FP16, "meta")}
    assert {(p.dtype, p.device.type) for p in codec.vae.parameters()} == {(FP32, "cpu")}


def test_auto_is_fp16_on_a_gpu_where_the_familys_autoencoder_allows_it(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert [pick_vae_dtype("auto", gpu, allows) for allows in (True, False)] == [FP16, FP32]
    assert [pick_vae_dtype("auto", CPU, allows) for allows in (True, False)] == [FP32, FP32]
    assert [pick_vae_dtype(name, gpu, False) for name in ("fp16", "fp32")] == [FP16, FP32]
    with pytest.raises(UserError, match=r"model\.vae_precision bf16: this GPU has no bf16"):
        pick_vae_dtype("bf16", gpu, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert pick_vae_dtype("bf16", gpu, True) == torch.bfloat16


def test_families_whose_autoencoders_allow_fp16(tiny):
    from safelight.trainer.models.base import resolve_base

    allowed = {name: resolve_base(name).family.vae_allows_fp16 for name in ("tiny", "tiny-v", "tiny-xl")}
    assert allowed == {"tiny": True, "tiny-v": True, "tiny-xl": False}
