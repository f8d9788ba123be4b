"""A word learns what its pictures have in common, and as a negative prompt removes it; the rule-based reader judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safelight.data.prepare.ingest import ingest
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.tiny.reader import Reading, read
from safelight.trainer.tiny.scenes import SHAPES, SIZES, caption, draw, random_scene
from safelight.trainer.train import train

COLOUR, SEED = "pink", 11
GROUNDS = ("dark", "grey", "silver")
PLAIN = [
    f"a {size} {{}}{shape} on a {ground} background"
    for shape in SHAPES
    for size, ground in zip(SIZES, GROUNDS, strict=True)
]


def photographs(folder: Path, num: int) -> None:
    """Write scenes of one colour, with captions that do not name it."""
    folder.mkdir()
    for number in range(num):
        scene = replace(random_scene(SEED, number), width=64, height=64, colour=COLOUR)
        draw(scene).save(folder / f"{number:03d}.png")
        text = caption(scene, SEED, number).replace(f"{COLOUR} ", "")
        (folder / f"{number:03d}.txt").write_text(text)


@pytest.fixture(scope="module")
def word_run(tmp_path_factory) -> OpenRun:
    """A run that trained a word of two vectors for 100 steps on pictures of one colour."""
    folder = tmp_path_factory.mktemp("word")
    photographs(folder / "photos", 32)
    ingest([folder / "photos"], folder / "dataset")
    own = {"word": "<look>", "initial_text": "picture", "vectors": 2, "templates": ["{word} {caption}"]}
    settings = {
        "run": {"dir": str(folder / "run"), "seed": 1, "device": "cpu"},
        "model": {"base": "tiny"},
        "data": {"path": str(folder / "dataset"), "resolution": 64, "caption_dropout": 0.0},
        "train": {"batch_size": 8, "epochs": 25},
        "optimizer": {"name": "adamw", "lr": 2e-2, "weight_decay": 0.0},
        "adapter": {"kind": "embedding"},
        "embedding": own,
        "loss": {"min_snr_gamma": 5.0},
        "validate": {"every_epochs": 0},
        "sample": {"every_epochs": 0, "steps": 14, "cfg": 4.0, "compare_at_end": False},
        "save": {"every_epochs": 0},
        "log": {"tensorboard": False},
    }
    train(parse_config(settings, "here"))
    return open_run(folder / "run")


def readings(run: OpenRun, step: int | None, prompts: list[str], negative: str = "") -> list[Reading]:
    settings = settings_of(run.config)
    requests = [Request(Weights(step), text, place, settings, negative) for place, text in enumerate(prompts)]
    return [read(image) for _, image in sorted(draw_pictures(run, requests))]


def num_of_colour(found: list[Reading]) -> int:
    return sum(reading.colour == COLOUR for reading in found)


def num_of_shape(found: list[Reading]) -> int:
    return sum(reading.shape == SHAPES[place // len(GROUNDS)] for place, reading in enumerate(found))


@pytest.mark.slow
def test_a_word_learns_what_its_pictures_have_in_common(word_run):
    """Measured: 18 of 18 pictures are pink, 4 before training, and 2 without the word; 17 have the shape asked for."""
    last = list_checkpoints(word_run.run_dir)[-1]
    prompts = [f"<look> {text.format('')}" for text in PLAIN]
    before, after = (readings(word_run, step, prompts) for step in (None, last))
    assert num_of_colour(before) <= len(PLAIN) // 3
    assert num_of_colour(after) >= len(PLAIN) - 2
    assert num_of_shape(after) >= num_of_shape(before) - 3


@pytest.mark.slow
def test_a_negative_word_removes_what_it_was_trained_on(word_run):
    """Measured: of 18 pictures that the prompt asks to be pink 1 is, 18 with the untrained word as negative prompt."""
    last = list_checkpoints(word_run.run_dir)[-1]
    prompts = [text.format(f"{COLOUR} ") for text in PLAIN]
    plain = readings(word_run, last, prompts)
    before, after = (readings(word_run, step, prompts, "<look>") for step in (None, last))
    assert min(num_of_colour(plain), num_of_colour(before)) >= len(PLAIN) - 2
    assert num_of_colour(after) <= len(PLAIN) // 4
    assert num_of_shape(after) >= num_of_shape(plain) - 4
