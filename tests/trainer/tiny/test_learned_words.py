"""A word learns the look of its pictures, and as a negative prompt removes it; the rule-based reader judges.

The look is the demo's faded print. An embedding can only name what a model draws, and the tiny base has never seen it:
so the base is fine-tuned first, on scenes of which those with a silver background are faded. It then draws the look
where the prompt says silver, and seldom otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from safelight.data.prepare.ingest import ingest
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.export import export
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.tiny.reader import Reading, read
from safelight.trainer.tiny.scenes import COLOURS, SHAPES, Scene, draw, random_scene
from safelight.trainer.train import train

GROUNDS = ("silver", "black", "silver", "dark", "silver", "grey")
COMBINATIONS = [(colour, SHAPES[(place + shift) % 6]) for place, colour in enumerate(COLOURS) for shift in (0, 2, 3)]
PLAIN = [f"a large {colour} {shape}" for colour, shape in COMBINATIONS]
SILVER = [f"{text} on a silver background" for text in PLAIN]


def dataset(folder: Path, num: int, seed: int, ground: Callable[[int], str], text: str) -> Path:
    """Write scenes, those with a silver background faded, with captions, and return the dataset made of them."""
    (folder / "photos").mkdir(parents=True)
    for number in range(num):
        background = ground(number)
        scene: Scene = replace(
            random_scene(seed, number),
            width=64,
            height=64,
            pattern="plain",
            texture="plain",
            background=background,
            in_look=background == "silver",
        )
        draw(scene).save(folder / "photos" / f"{number:03d}.png")
        (folder / "photos" / f"{number:03d}.txt").write_text(text.format(**vars(scene)))
    ingest([folder / "photos"], folder / "dataset")
    return folder / "dataset"


def trained(run_dir: Path, data: dict, **tables) -> OpenRun:
    settings = {
        "run": {"dir": str(run_dir), "seed": 1, "device": "cpu"},
        "data": {"resolution": 64, **data},
        "loss": {"min_snr_gamma": 5.0},
        "validate": {"every_epochs": 0},
        "sample": {"every_epochs": 0, "steps": 14, "cfg": 4.0, "compare_at_end": False},
        "save": {"every_epochs": 0},
        "log": {"tensorboard": False},
        **tables,
    }
    train(parse_config(settings, "here"))
    return open_run(run_dir)


@pytest.fixture(scope="module")
def word_run(tmp_path_factory) -> OpenRun:
    """A run that trained a word of two vectors for 100 steps on faded pictures, of a model that draws such too."""
    folder = tmp_path_factory.mktemp("word")
    text = "a {size} {colour} {shape}"
    both = dataset(folder / "both", 72, 5, lambda n: GROUNDS[n % 6], text + " on a {background} background")
    trained(
        folder / "base-run",
        {"path": str(both), "validation_fraction": 0.02, "caption_dropout": 0.1},
        model={"base": "tiny"},
        train={"batch_size": 8, "epochs": 34},
        optimizer={"name": "adamw", "lr": 2e-4, "warmup_steps": 5},
    )
    export(folder / "base-run", folder / "base", dtype="fp32")
    faded = dataset(folder / "faded", 32, 6, lambda n: "silver", text)
    own = {"word": "<faded>", "initial_text": "picture", "vectors": 2, "templates": ["{caption}, {word}"]}
    return trained(
        folder / "run",
        {"path": str(faded), "validation_fraction": 0.1, "caption_dropout": 0.0},
        model={"base": str(folder / "base")},
        train={"batch_size": 8, "epochs": 25},
        optimizer={"name": "adamw", "lr": 2e-2, "weight_decay": 0.0},
        adapter={"kind": "embedding"},
        embedding=own,
    )


def readings(run: OpenRun, prompts: list[str], negative: str = "", is_trained: bool = True) -> list[Reading]:
    """Read pictures of prompts. is_trained: with the trained word, else with the word as it was before training."""
    step = list_checkpoints(run.run_dir)[-1] if is_trained else None
    settings = settings_of(run.config)
    requests = [Request(Weights(step), text, place, settings, negative) for place, text in enumerate(prompts)]
    return [read(image) for _, image in sorted(draw_pictures(run, requests), key=lambda drawn: drawn[0])]


def looks(found: list[Reading]) -> int:
    return sum(reading.has_look for reading in found)


def obeyed(found: list[Reading]) -> int:
    """Count the pictures that have the colour and the shape of their prompts."""
    return sum((one.colour, one.shape) == asked for one, asked in zip(found, COMBINATIONS, strict=True))


@pytest.mark.slow
def test_a_word_learns_a_look(word_run):
    """Measured: of 18 pictures 18 are faded with the word, 1 with the word before training, 1 without it."""
    prompts = [f"{text}, <faded>" for text in PLAIN]
    before, after = (readings(word_run, prompts, is_trained=is_trained) for is_trained in (False, True))
    without = readings(word_run, PLAIN)
    assert max(looks(before), looks(without)) <= 4
    assert looks(after) >= 16
    # and the prompt is still followed
    assert obeyed(after) >= 13


@pytest.mark.slow
def test_a_negative_word_removes_a_look(word_run):
    """Measured: of 18 pictures of a prompt that is drawn faded 18 are, and 2 with the word as negative prompt."""
    plain, untrained = readings(word_run, SILVER), readings(word_run, SILVER, "<faded>", is_trained=False)
    removed = readings(word_run, SILVER, "<faded>")
    assert looks(plain) >= 16
    assert looks(untrained) >= 12
    assert looks(removed) <= 5
    assert obeyed(removed) >= 12
