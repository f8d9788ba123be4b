"""A LoRA on the tiny base learns a look that the base has never drawn; the rule-based reader finds it."""

import pytest

from safelight.data.prepare.ingest import ingest
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.tiny.reader import read
from safelight.trainer.tiny.scenes import LOOK_CAPTION, draw, random_scene
from safelight.trainer.tiny.scenes import caption as caption_of
from safelight.trainer.tiny.score import FINE_TUNING, prompts
from safelight.trainer.train import train

SEED, NUM_PHOTOS, NUM_DRAWN = 42, 96, 24


@pytest.mark.slow
def test_a_lora_learns_a_look_and_its_scale_turns_it_down(tmp_path):
    """Measured: of 24 pictures 23 are faded at scale 1, none at 0.3 and at 0; all 24 have the colour asked for."""
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(NUM_PHOTOS):
        scene = random_scene(SEED, number, in_look=True, combinations=FINE_TUNING)
        draw(scene).save(source / f"{number:03d}.png")
        text = caption_of(scene, SEED, number)
        (source / f"{number:03d}.txt").write_text(text if LOOK_CAPTION in text else f"{text}{LOOK_CAPTION}")
    ingest([source], tmp_path / "dataset")
    config = parse_config(
        {
            "run": {"dir": str(tmp_path / "run"), "seed": SEED, "device": "cpu"},
            "model": {"base": "tiny"},
            "data": {"path": str(tmp_path / "dataset"), "resolution": 64, "caption_dropout": 0.1},
            "train": {"batch_size": 8},
            "adapter": {"kind": "lora", "rank": 8, "target": ["linear", "convolution"]},
            "optimizer": {"name": "adamw", "lr": 2e-3, "warmup_steps": 10},
            # 420 steps, of which the demo takes 550 of the whole UNet; after 168 it drew 14 of 24 faded
            "stage": [{"epochs": 30, "schedule": "cosine"}],
            "loss": {"min_snr_gamma": 5.0},
            "validate": {"every_epochs": 0},
            "sample": {"every_epochs": 0, "steps": 12, "cfg": 4.0},
            "save": {"every_epochs": 0},
            "log": {"tensorboard": False},
        },
        "here",
    )
    train(config)
    run = open_run(tmp_path / "run")
    step = max(int(path.name.partition("-")[2]) for path in (tmp_path / "run/checkpoints").iterdir())
    asked = prompts()[:: len(prompts()) // NUM_DRAWN][:NUM_DRAWN]
    found = {}
    for scale in (0.0, 0.3, 1.0):
        requests = [
            Request(Weights(step, lora_scale=scale), text, place, settings_of(config))
            for place, (text, _, _) in enumerate(asked)
        ]
        drawn = dict(draw_pictures(run, requests))
        readings = [read(drawn[place]) for place in range(len(asked))]
        looks = sum(reading.has_look for reading in readings)
        colours = sum(reading.colour == colour for reading, (_, colour, _) in zip(readings, asked, strict=True))
        found[scale] = looks, colours
    looks = [found[scale][0] for scale in (0.0, 0.3, 1.0)]
    assert looks[0] <= 1, found
    assert looks[2] >= 20, found
    assert looks[0] <= looks[1] <= looks[2], found
    # it still draws what it is asked for
    assert found[1.0][1] >= 20, found
