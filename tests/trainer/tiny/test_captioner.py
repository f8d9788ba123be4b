"""The embedded captioner: does it name what new scenes show, and how was it made?"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForConditionalGeneration, BlipProcessor

from safelight.trainer.captioning.model_files import tiny_captioner_folder
from safelight.trainer.captioning.models import load_captioner
from safelight.trainer.captioning.options import Generation
from safelight.trainer.tiny.scenes import LOOK_CAPTION, draw, random_scene
from safelight.trainer.tiny.score import ALL_COMBINATIONS
from tools.tiny_captioner import pretrain

# the captioner was trained with the seed before it, and checked with the one after that
SEED = pretrain.SEED + 1000


@pytest.fixture(scope="module")
def captioner():
    """Model and processor, loaded as any BLIP is."""
    folder = tiny_captioner_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(model, BlipForConditionalGeneration)
    assert isinstance(processor, BlipProcessor)
    return model, processor


def test_it_names_color_and_shape_of_new_scenes(captioner):
    """Of 100 scenes of another seed, of all pairs of color and shape; 100 when it was trained."""
    assert pretrain.accuracy(*captioner, 100, ALL_COMBINATIONS, SEED) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "three beams"])
def test_it_names_color_and_shape_of_a_thousand_new_scenes(captioner, options):
    assert pretrain.accuracy(*captioner, 1000, ALL_COMBINATIONS, SEED + 1, **options) >= 0.95


def test_it_names_pairs_that_it_was_never_shown(captioner):
    """Guessing the shape would be right for one in six; 56 of these 60 were right when it was trained."""
    assert pretrain.accuracy(*captioner, 60, pretrain.NEVER_SHOWN, SEED) >= 0.8


def test_safelight_caption_says_what_transformers_says(captioner):
    """`--model tiny` loads it through our own checks; its captions are those of BLIP's own `generate`."""
    model, processor = captioner
    pictures = [draw(random_scene(SEED, number)) for number in range(4)]
    with torch.no_grad():
        tokens = model.generate(**processor(images=pictures, return_tensors="pt"), num_beams=3, max_new_tokens=75)
    ours = load_captioner("tiny", torch.device("cpu")).caption(pictures, Generation())
    assert ours == processor.batch_decode(tokens, skip_special_tokens=True)


def test_the_caption_follows_the_picture_and_not_its_look_or_size(captioner):
    """A faded print of 192 px gets the caption of the plain scene of 64 px, in at least 7 of 8 scenes."""
    model, processor = captioner
    scenes = [random_scene(SEED, number) for number in range(8)]
    plain = [draw(scene) for scene in scenes]
    faded = [draw(replace(scene, in_look=True), 3) for scene in scenes]
    said = []
    for pictures in (plain, faded):
        with torch.no_grad():
            tokens = model.generate(**processor(images=pictures, return_tensors="pt"), max_new_tokens=30)
        said.append(processor.batch_decode(tokens, skip_special_tokens=True))
    named = [
        [scene.colour in text and scene.shape in text for scene, text in zip(scenes, texts, strict=True)]
        for texts in said
    ]
    assert np.mean([one == other for one, other in zip(*named, strict=True)]) >= 7 / 8
    assert not any(LOOK_CAPTION in text for texts in said for text in texts)


def test_no_training_scene_shows_a_pair_that_is_held_out():
    scenes = [pretrain.make_scene(pretrain.SEED, number, pretrain.SHOWN) for number in range(500)]
    assert {(scene.colour, scene.shape) for scene in scenes} == set(pretrain.SHOWN)
    assert 0.4 < np.mean([scene.in_look for scene in scenes]) < 0.6
    assert not any(LOOK_CAPTION in pretrain.text_of(scene, number) for number, scene in enumerate(scenes))


def test_the_embedded_captioner_is_the_one_of_its_training_log():
    """The hash of the committed weights is the last entry of the training log; all files together are at most 8 MB."""
    folder = tiny_captioner_folder()
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1]["stage"] == "done"
    assert rows[-1]["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    steps = [row for row in rows if row["stage"] == "captioner"]
    assert steps[-1]["step"] == pretrain.STEPS
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[-1]["cpu_seconds"] < 3600
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000


def test_the_first_layer_starts_with_whitened_patches():
    """Each of its features has mean 0 and nearly the same variance over the patches of the pictures."""
    scenes, pictures = zip(*(pretrain.training_row(number) for number in range(40)), strict=True)
    processor = pretrain.make_processor([pretrain.text_of(scene, n) for n, scene in enumerate(scenes)])
    model = pretrain.make_captioner(processor)
    pixels = pretrain.to_pixels(np.stack(pictures), processor)
    pretrain.start_embeddings(model, pixels)
    with torch.no_grad():
        features = model.vision_model.embeddings.patch_embedding(pixels).transpose(0, 1).flatten(1)
    assert features.mean(1).abs().max() < 1e-3
    covariance = features @ features.T / features.shape[1]
    assert (covariance - covariance.diag().diag()).abs().max() < 0.01
    assert covariance.diag().max() < 1.001


def test_mirrored_pictures_have_mirrored_captions():
    scenes, pictures = zip(*(pretrain.training_row(number) for number in range(40)), strict=True)
    shown, squares, is_permuted = pretrain.make_batch(0, list(scenes), np.stack(pictures))
    on_side = 0
    for scene, square, permuted in zip(shown, squares, is_permuted, strict=True):
        if scene.position in pretrain.MIRRORED and not permuted and not scene.in_look:
            x = np.argwhere(np.ptp(square.astype(int), axis=2) > 90)[:, 1].mean()
            assert (x < 31.5) == (scene.position == "on the left")
            on_side += 1
    assert on_side >= 3
    assert 0.05 < is_permuted.mean() < 0.6


def test_pretraining_resumes_bit_for_bit(tmp_path, monkeypatch):
    """A step, a restart and another give the same weights as two steps."""
    monkeypatch.setattr(pretrain, "BATCH", 2)
    monkeypatch.setattr(pretrain, "NUM_CHECKED", 2)
    # constant, so that stopping early does not change the schedule
    monkeypatch.setattr(pretrain, "learning_rate", lambda step, total, peak: 1e-3)
    scenes, pictures = zip(*(pretrain.training_row(number) for number in range(8)), strict=True)
    processor = pretrain.make_processor([pretrain.text_of(scene, n) for n, scene in enumerate(scenes)])
    ends = []
    for name, stops in (("whole", (2,)), ("halves", (1, 2))):
        work = tmp_path / name
        work.mkdir()
        for stop in stops:
            monkeypatch.setattr(pretrain, "STEPS", stop)
            torch.manual_seed(1)
            model = pretrain.make_captioner(processor).train()
            pretrain.start_embeddings(model, pretrain.to_pixels(np.stack(pictures), processor))
            pretrain.train(model, processor, scenes, np.stack(pictures), work, pretrain.Log(work / "log.jsonl"))
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
