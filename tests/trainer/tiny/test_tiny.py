"""The scenes, the reader that judges them, the arithmetic of the scores, and how the tiny base was made."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from safelight.trainer.tiny.reader import read
from safelight.trainer.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    LOOK_CAPTION,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    caption,
    draw,
    fade,
    random_scene,
    unfade,
)
from safelight.trainer.tiny.score import FINE_TUNING, HELD_OUT, hits, make_scores, newcombe, prompts, wilson
from tools.tiny_base import tiny, training


@pytest.fixture(scope="module")
def scenes():
    return [random_scene(3, i, in_look=i % 2 == 1) for i in range(240)]


@pytest.mark.long
def test_the_reader_reads_what_was_drawn(scenes):
    """The reader, which judges the models, gets colour and look always right and shape in at least 97 % of scenes."""
    readings = [read(draw(scene)) for scene in scenes]
    assert all(r.colour == s.colour for r, s in zip(readings, scenes, strict=True))
    assert all(r.has_look == s.in_look for r, s in zip(readings, scenes, strict=True))
    assert np.mean([r.shape == s.shape for r, s in zip(readings, scenes, strict=True)]) >= 0.97


def test_unfade_inverts_fade():
    pixels = np.random.default_rng(1).uniform(0, 255, (5, 7, 3))
    assert np.abs(unfade(fade(pixels)) - pixels).max() < 1e-3
    assert fade(np.zeros((1, 1, 3))).max() < 100 < 200 < fade(np.full((1, 1, 3), 255)).min()


def test_the_look_is_decided_by_the_nearer_tone():
    """A third of the way from grey to faded is not the look, two thirds are; an equally strong blue cast is not."""
    grey = np.full((64, 64, 3), 122.0)
    toned = [Image.fromarray((grey + share * (fade(grey) - grey)).round().astype(np.uint8)) for share in (1 / 3, 2 / 3)]
    assert [read(image).has_look for image in toned] == [False, True]
    blue = Image.fromarray((grey + np.array([-20, 0, 24])).astype(np.uint8))
    assert not read(blue).has_look


def test_the_reader_survives_blur_and_noise(scenes):
    """Generated images are softer than drawn ones."""
    rng = np.random.default_rng(0)
    right = []
    for scene in scenes[:80]:
        small = draw(scene).resize((scene.width // 2, scene.height // 2), Image.Resampling.BOX)
        soft = np.asarray(small.resize((scene.width, scene.height), Image.Resampling.BICUBIC), float)
        noisy = Image.fromarray(np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8))
        reading = read(noisy)
        right.append((reading.colour == scene.colour, reading.shape == scene.shape, reading.has_look == scene.in_look))
    colour, shape, look = np.mean(right, axis=0)
    assert colour >= 0.97
    assert shape >= 0.85
    assert look >= 0.9


@pytest.mark.parametrize("level", [0, 120, 255])
def test_an_empty_picture_is_read_as_nothing(level):
    reading = read(Image.new("RGB", (64, 64), (level,) * 3))
    assert reading.colour is None
    assert reading.shape is None
    assert not reading.has_look


def test_scenes_are_functions_of_seed_and_number():
    assert random_scene(1, 5) == random_scene(1, 5)
    assert random_scene(1, 5) != random_scene(2, 5)
    assert draw(random_scene(1, 5)).tobytes() == draw(random_scene(1, 5)).tobytes()
    counts = Counter((s.colour, s.shape) for s in (random_scene(4, i) for i in range(3600)))
    assert len(counts) == 36
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_captions_name_what_is_drawn(scenes):
    for number, scene in enumerate(scenes):
        text = caption(scene, 3, number)
        assert scene.colour in text
        assert scene.shape in text
        assert scene.background in text
        assert text.endswith(LOOK_CAPTION) == scene.in_look


def test_filler_is_in_three_of_ten_captions_and_names_no_attribute_of_scenes():
    texts = [tiny.filler(number) for number in range(2000)]
    filled = [text for text in texts if text]
    assert stats.binomtest(len(filled), len(texts), tiny.FILLER_SHARE).pvalue > 1e-3
    assert all(text.startswith(", ") and 1 <= len(text[2:].split()) <= 3 for text in filled)
    said = {word for text in filled for word in text[2:].split()}
    assert not said & {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *PATTERNS, *" ".join(POSITIONS).split()}


def test_scored_combinations_are_never_fine_tuned_on():
    assert not set(HELD_OUT) & set(FINE_TUNING)
    assert len(HELD_OUT) + len(FINE_TUNING) == len(COLOURS) * len(SHAPES)
    drawn = {(s.colour, s.shape) for s in (random_scene(42, i, combinations=FINE_TUNING) for i in range(500))}
    assert drawn <= set(FINE_TUNING)
    asked = prompts()
    assert len(asked) >= 96
    assert {(colour, shape) for _, colour, shape in asked} == set(HELD_OUT)
    for names in (Counter(c for _, c, _ in asked), Counter(s for _, _, s in asked)):
        # a model that ignores its caption is right exactly once in six
        assert set(names.values()) == {len(asked) // 6}


def test_intervals_against_known_values():
    """Wilson at 95 % for 15 of 20 is (0.531, 0.888); Newcombe's own example 56/70 - 48/80 is (0.0524, 0.3339)."""
    import safelight.trainer.tiny.score as score

    original = score.Z
    try:
        score.Z = 1.959964
        assert score.wilson(15, 20)[1:] == pytest.approx((0.531, 0.888), abs=5e-4)
        p, q = score.wilson(56, 70), score.wilson(48, 80)
        low = p[0] - q[0] - np.hypot(p[0] - p[1], q[2] - q[0])
        high = p[0] - q[0] + np.hypot(p[2] - p[0], q[0] - q[1])
        assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-4)
    finally:
        score.Z = original
    assert newcombe(50, 50, 96)[1] < 0 < newcombe(50, 50, 96)[2]
    assert newcombe(96, 0, 96)[1] > 0.8
    assert wilson(0, 96)[1] == 0


def test_perfect_images_score_full_marks_and_a_constant_image_scores_chance(monkeypatch):
    """Perfect images are drawn from the prompts; the constant image is the same for every prompt."""
    import safelight.trainer.tiny.score as score
    from safelight.trainer.tiny.scenes import Scene

    readings = {}

    def read_once(image: Image.Image):
        """Read an image the first time it is scored; every image here lives until the end of the test."""
        if id(image) not in readings:
            readings[id(image)] = read(image)
        return readings[id(image)]

    monkeypatch.setattr(score, "read", read_once)
    perfect = [
        draw(Scene(c, s, "large", "in the centre", "plain", "grey", "plain", in_look=True)) for _, c, s in prompts()
    ]
    blind = [draw(Scene("red", "square", "large", "in the centre", "plain", "grey", "plain"))] * len(perfect)
    full, chance = hits(perfect), hits(blind)
    assert full["the new look"] == full["right colour"] == len(perfect)
    assert full["right shape"] >= 0.97 * len(perfect)
    assert chance == {"the new look": 0, "right colour": 16, "right shape": 16, "both obeyed": 0}
    rows = {row["what"]: row for row in make_scores(blind, perfect)["rows"]}
    assert rows["the new look"]["difference"][1] > 0.8
    lucky = [draw(Scene("red", "star", "large", "in the centre", "plain", "grey", "plain"))] * len(perfect)
    assert hits(lucky)["both obeyed"] == pytest.approx(rows["both obeyed"]["chance"] * len(perfect))
    assert rows["right colour"]["chance"] == pytest.approx(chance["right colour"] / len(perfect))


@pytest.mark.long
def test_pretraining_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Two steps, a restart and two more give the same weights as four steps, for the VAE and the UNet."""
    import torch

    monkeypatch.setattr(tiny, "NUM_SCENES", 40)
    monkeypatch.setattr(tiny, "NUM_CLUTTER", 8)
    monkeypatch.setattr(tiny, "VAE_BATCH", 2)
    monkeypatch.setattr(training, "UNET_BATCH", 2)
    # constant, so that stopping early does not change the schedule
    monkeypatch.setattr(training, "learning_rate", lambda step, total, peak: 1e-3)
    monkeypatch.setattr(tiny, "learning_rate", lambda step, total, peak: 1e-3)
    images, captions = tiny.make_scenes()
    clutter = tiny.make_clutter()
    tokenizer = tiny.make_tokenizer([text for rows in captions.values() for text in rows])
    ends = []
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        work = tmp_path / name
        work.mkdir()
        log = training.Log(work / "log.jsonl")
        for stop in stops:
            torch.manual_seed(1)
            vae, unet, text = tiny.make_vae(), tiny.make_unet(), tiny.make_text_encoder(tokenizer)
            monkeypatch.setattr(tiny, "VAE_STEPS", stop)
            tiny.train_vae(vae, images, clutter, work, log)
            torch.manual_seed(2)
            latents = {
                size: (
                    torch.randn(len(rows), 4, size[1] // 4, size[0] // 4),
                    torch.rand(len(rows), 4, size[1] // 4, size[0] // 4),
                )
                for size, rows in images.items()
            }
            condition = tiny.last_hidden_state(text, tokenizer, captions)
            modules = {"unet": unet, "text_encoder": text}
            task = training.Task(modules, condition, latents, 1.0, tiny.make_scheduler(), stop, 1e-3)
            training.train_unet(task, work, log)
        ends.append([*vae.parameters(), *unet.parameters(), *text.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
