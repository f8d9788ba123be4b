"""The encoders return what diffusers' own calls return, and diffusers can draw with the built-in base."""

import functools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.trainer.models import encoders
from safelight.trainer.models.base import resolve_base, tiny_folder, vae_config
from safelight.trainer.models.encoders import CaptionEncoder, LatentCodec, decode_bytes
from safelight.trainer.models.weights import load_texts, load_vae

CPU = torch.device("cpu")
CAPTIONS = ["a large red circle on a grey background", "", "An Émigré's cat; 猫 🐈" * 20]


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    # without a dtype, so that every part is loaded in fp32
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_caption_fingerprint_changes_with_clip_skip_and_vocabulary(tiny, tmp_path):
    ((tokenizer, text_encoder),) = load_texts(tiny, "", 0)
    prints = {CaptionEncoder.of(tiny, [(tokenizer, text_encoder)], CPU, skip).fingerprint for skip in (0, 1)}
    folder = shutil.copytree(tiny_folder() / "tokenizer", tmp_path / "tokenizer")
    contents = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = contents["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    other = type(tokenizer).from_pretrained(folder)
    prints.add(CaptionEncoder.of(tiny, [(other, text_encoder)], CPU).fingerprint)
    assert len(prints) == 3


def test_a_clip_skip_that_leaves_no_layer_is_refused(tiny):
    ((tokenizer, text_encoder),) = load_texts(tiny, "", 0)
    with pytest.raises(ValueError, match="clip_skip 2 leaves none of the text encoder's layers; use 1 or less"):
        CaptionEncoder.of(tiny, [(tokenizer, text_encoder)], CPU, 2)


@pytest.mark.parametrize(
    "text", [", ".join(f"Tag{n}" for n in range(40)), "a  cat\n" * 60, "Émigré 猫🐈 " * 30, "x" * 900]
)
def test_a_cut_is_where_the_encoder_stops_reading(tiny, text):
    ((tokenizer, text_encoder),) = load_texts(tiny, "", 0)
    encoder = CaptionEncoder.of(tiny, [(tokenizer, text_encoder)], CPU)
    short = "a red circle"
    cuts = encoder.cuts([short, text, short, ""])
    assert cuts.keys() == {text}
    end = cuts[text].removeprefix("...")
    assert 0 < len(end) <= 24
    # what follows the cut has no effect
    first, second = encoder.encode([text, text + " and something else entirely"])
    assert torch.equal(first, second)
    if text.startswith("Tag"):
        start, stop = text.index(end), text.index(end) + len(end)
        rest_of_word = text[stop:].partition(" ")[0]
        whole, earlier = encoder.encode([text[:stop] + rest_of_word, text[:start] + "x" + text[start + 1 :]])
        assert torch.equal(whole, first)
        assert not torch.equal(earlier, first)


def test_cuts_are_told_in_one_line(tiny):
    ((tokenizer, text_encoder),) = load_texts(tiny, "", 0)
    encoder = CaptionEncoder.of(tiny, [(tokenizer, text_encoder)], CPU)
    assert encoder.describe_cuts([("the prompt", "...the end")]) == (
        "the prompt is cut after '...the end': the text encoder reads 46 tokens"
    )
    named = [(f"a caption of {n}.jpg", f"...{n}") for n in range(7)]
    assert encoder.describe_cuts(named) == (
        "a caption of 0.jpg is cut after '...0', a caption of 1.jpg after '...1', a caption of 2.jpg after '...2', "
        "a caption of 3.jpg after '...3', a caption of 4.jpg after '...4', and 2 more: the text encoder reads 46 tokens"
    )


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
    most = encoders.TILE_LATENTS + 2 * encoders.halo_of((1, 1, 1))
    assert len(sizes) == 6
    assert max(map(max, sizes)) == most
    # with less around the tiles, their edges differ
    monkeypatch.setattr(encoders, "halo_of", lambda blocks: 1)
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


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_embeddings_are_those_of_diffusers(tiny, pipeline, clip_skip, monkeypatch):
    """In diffusers, clip_skip 1 is the output of the layer before the last."""
    if not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers 0.42 still expects the wrapper that transformers 5 removed
        wrapper = property(lambda text_encoder: text_encoder)
        monkeypatch.setattr(type(pipeline.text_encoder), "text_model", wrapper, raising=False)
    encoder = CaptionEncoder.of(tiny, load_texts(tiny, "", 0), CPU, clip_skip)
    with torch.no_grad():
        expected, empty = pipeline.encode_prompt(CAPTIONS, CPU, 1, True, [""] * 3, clip_skip=clip_skip or None)
    encoded = encoder.encode(CAPTIONS)
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 1e-3, (
        "the captions have equal embeddings, so the comparison above shows nothing"
    )
    if clip_skip == 0:
        torch.testing.assert_close(encoded[1], empty[0], rtol=0, atol=1e-6)


def test_clip_skip_changes_the_embeddings(tiny):
    ((tokenizer, text_encoder),) = load_texts(tiny, "", 0)
    texts = [(tokenizer, text_encoder)]
    last, before = (CaptionEncoder.of(tiny, texts, CPU, skip).encode(CAPTIONS[:1]) for skip in (0, 1))
    assert (last - before).abs().max() > 1e-3


def test_encoders_are_frozen(tiny):
    for module in (load_vae(tiny, "", 0), load_texts(tiny, "", 0)[0][1]):
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training


# the tokenizer and the whole pipeline


def test_the_vocabulary_is_small(tiny):
    assert len(load_texts(tiny, "", 0)[0][0]) <= 2000


@functools.cache
def tiny_tokenizer():
    return load_texts(resolve_base("tiny"), "", 0)[0][0]


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
def test_any_text_is_encoded_without_unknown_tokens(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, truncation=False).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # the end token doubles as the unknown token, so it must not occur in between
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])
    # CLIP normalizes white space and case; nothing else may be lost
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "".join(normal.split())


def test_diffusers_draws_with_the_built_in_folder(pipeline):
    def draw(prompt: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(prompt, height=64, width=48, num_inference_steps=3, generator=generator, output_type="pt")
        return images.images[0]

    image = draw("a red circle on a dark background", 1)
    assert image.shape == (3, 64, 48)
    assert image.isfinite().all()
    assert image.std() > 0.01
    assert torch.equal(image, draw("a red circle on a dark background", 1))
    assert not torch.equal(image, draw("a blue square on a silver background", 1))
    assert not torch.equal(image, draw("a red circle on a dark background", 2))
