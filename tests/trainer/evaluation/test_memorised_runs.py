"""A tiny run that was trained on eight pictures until it copies them is caught; one on two hundred is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from safelight.data.manifest import read_manifest
from safelight.data.prepare.ingest import ingest
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.evaluation.memorisation import judge_memorisation
from safelight.trainer.features.latents import open_latents
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import Settings
from safelight.trainer.report.comparison import ComparedModel, ComparedRow, Comparison
from safelight.trainer.report.evaluation import Memorisation
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.tiny.demo import SEED, demo_config
from safelight.trainer.tiny.scenes import caption, draw, random_scene
from safelight.trainer.tiny.score import FINE_TUNING
from safelight.trainer.train import train

SOUND_EPOCHS = 6
DRAWN = Settings(64, 64, 14, 4.0, SEED + 1, "dpm++")


def prepare(folder: Path, num: int) -> None:
    """Make a dataset of square faded prints with the captions that they were drawn by."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number in range(num):
        scene = replace(random_scene(SEED, number, in_look=True, combinations=FINE_TUNING), width=64, height=64)
        draw(scene, 3).save(photos / f"{number:03d}.png")
        (photos / f"{number:03d}.txt").write_text(caption(scene, SEED, number))
    ingest([photos], folder / "dataset")


def overfitted(folder: Path) -> Config:
    prepare(folder, 28)
    return parse_config(
        {
            "run": {"dir": str(folder / "run"), "seed": 1},
            "model": {"base": "tiny"},
            "data": {"path": str(folder / "dataset"), "resolution": 64, "validation_fraction": 0.7},
            "train": {"batch_size": 8},
            "optimizer": {"name": "adamw", "lr": 8e-4, "warmup_steps": 10},
            "stage": [{"epochs": 160}],
            "loss": {"min_snr_gamma": 5.0},
            "validate": {"every_epochs": 160},
            "save": {"every_epochs": 160},
            "sample": {"steps": 2, "every_epochs": 160},
            "log": {"tensorboard": False},
        },
        "overfitted",
    )


def sound(folder: Path) -> Config:
    """Return the demo's settings for its first epochs, in which held-out loss falls most."""
    prepare(folder, 200)
    config = demo_config(folder)
    config.run.dir = str(folder / "run")
    config.stage = [config.stage[0].model_copy(update={"epochs": SOUND_EPOCHS})]
    config.validate_.every_epochs = config.sample.every_epochs = config.save.every_epochs = SOUND_EPOCHS
    return config


def judged(folder: Path, num: int) -> Memorisation:
    """Draw num pictures with captions of training photographs, by base and last checkpoint, and judge them."""
    run_dir, dataset = folder / "run", folder / "dataset"
    run, step = open_run(run_dir), list_checkpoints(run_dir)[-1]
    split = json.loads((run_dir / "split.json").read_text())
    photos = {photo.file: photo for photo in read_manifest(dataset)}
    trained = [photos[file] for file in split["train"]]
    prompts = [trained[place % len(trained)].captions[0] for place in range(num)]
    weights = {"base": Weights(), f"step-{step}": Weights(step)}
    rows = tuple(
        ComparedRow(prompt=prompt, place=place, seed=SEED, photo="x", images={m: f"{m}-{place}.png" for m in weights})
        for place, prompt in enumerate(prompts)
    )
    models = tuple(ComparedModel(id=model, step=w.step or 0, epoch=1.0) for model, w in weights.items())
    comparison = Comparison(
        models=models, rows=rows, width=64, height=64, num_steps=DRAWN.steps, cfg=DRAWN.cfg, sampler=DRAWN.sampler
    )
    files = [row.images[model] for model in weights for row in rows]
    requests = [Request(w, prompt, place, DRAWN) for w in weights.values() for place, prompt in enumerate(prompts)]
    extractor = open_latents(run.codec)
    pictures = {files[number]: extractor.features([image])[0] for number, image in draw_pictures(run, requests)}

    def features(names: list[str]):
        return extractor.features([Image.open(dataset / name).convert("RGB") for name in names])

    return judge_memorisation(
        comparison,
        pictures,
        features(split["train"]),
        features(split["validation"]),
        split["train"],
        extractor.name,
        groups=[photo.group for photo in trained],
    )


@pytest.mark.slow
def test_a_run_that_copies_its_eight_pictures_is_caught(tmp_path):
    train(overfitted(tmp_path))
    found = judged(tmp_path, 16)
    assert found.memorised == tuple(model for model in found.num_flagged if model != "base"), found.sentence
    (copied,) = [num for model, num in found.num_flagged.items() if model != "base"]
    # the base draws some of them, too: captions leave little open in these scenes
    assert copied >= 10
    assert copied >= found.num_flagged["base"] + 6
    assert found.sentence.startswith("Training photographs seem to be copied")


@pytest.mark.slow
def test_a_run_on_two_hundred_pictures_copies_nothing(tmp_path):
    train(sound(tmp_path))
    held_out = read_run_folder(tmp_path / "run").metrics.validation["held_out"]
    # it has learned
    assert held_out[-1].loss < 0.5 * held_out[0].loss
    found = judged(tmp_path, 48)
    assert found.memorised == ()
    assert max(found.num_flagged.values()) <= 2
