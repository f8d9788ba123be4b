"""The encoders return what diffusers' own calls return, and diffusers can draw with the built-in base."""

import functools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.trainer.models.base import resolve_base, tiny_folder
from safelight.trainer.models.encoders import CaptionEncoder
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
