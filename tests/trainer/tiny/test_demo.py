"""The demo, run once as a user would: an epoch a stage to see that all is made, and in the slow tests its scores, with
shorter stages and whole on each base."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from safelight.data.manifest import read_manifest
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.schema import Config
from safelight.trainer.evaluation import pictures as evaluated_pictures
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.metrics import resampling
from safelight.trainer.models.base import Base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.report.comparison import Comparison
from safelight.trainer.report.evaluation import Evaluation
from safelight.trainer.report.grid_record import Grid
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.tiny import demo as tiny_demo
from safelight.trainer.tiny.demo import (
    KINDS,
    NUM_PHOTOS,
    RUN_NAME,
    demo_config,
    draw_photos,
    photo_name,
    run_demo,
    scene_of,
)
from safelight.trainer.tiny.reader import read
from safelight.trainer.tiny.scenes import LOOK_CAPTION
from safelight.trainer.tiny.score import HELD_OUT, hits, prompts, wilson
from tools.tiny_base.architecture import make_unet


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("brief", "tiny"), marks=pytest.mark.long),
        *(pytest.param(which, marks=pytest.mark.slow) for which in (("short", "tiny"), *(("whole", x) for x in KINDS))),
    ],
    ids="-".join,
)
def demo(request, tmp_path_factory):
    """The folder of a demo and what it returned.

    The short one takes 130 of 572 steps, enough to learn the look; the brief one 52, and draws in two.
    """
    length, base = request.param
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        if length != "whole":
            patch.setattr(tiny_demo, "demo_config", short_config if length == "short" else brief_config)
            # what an evaluation costs beside drawing: looks at photographs, and bootstrap draws
            patch.setattr(evaluated_pictures, "MAX_PHOTOGRAPHS", 40)
            patch.setattr(resampling, "NUM_DRAWS", 1000)
        return folder, run_demo(folder, Terminal(), base)


def short_config(folder: Path, base: str) -> Config:
    config = demo_config(folder, base)
    # drawing takes a third of the demo; with half of the steps the scores are the same but for one picture
    config.sample.steps = 7
    for stage, epochs in zip(config.stage, (3, 2), strict=True):
        stage.epochs = epochs
    return config


def brief_config(folder: Path, base: str) -> Config:
    config = demo_config(folder, base)
    config.sample.steps = 2
    for stage in config.stage:
        stage.epochs = 1
    return config


# the brief demo shows that everything is made, not what is learned
learned = pytest.mark.parametrize(
    "demo",
    [pytest.param(which, marks=pytest.mark.slow) for which in (("short", "tiny"), *(("whole", x) for x in KINDS))],
    ids="-".join,
    indirect=True,
)


def row(result: dict, what: str) -> dict:
    return next(r for r in result["rows"] if r["what"] == what)


@learned
def test_it_learnt_the_look(demo):
    """The 99 % interval of trained minus base is above zero, on combinations that no fine-tuning image shows."""
    _, result = demo
    look = row(result, "the new look")
    assert result["num_samples"] >= 96
    assert look["difference"][1] > 0
    assert look["base"][0] < 0.1


@learned
def test_obedience_did_not_fall(demo):
    """In colour, shape and both, the trained model is not worse than the base beyond the 99 % interval."""
    _, result = demo
    for what in ("right colour", "right shape", "both obeyed"):
        scores = row(result, what)
        assert scores["difference"][2] >= 0, what
        assert scores["difference"][0] >= -0.05, what


@learned
def test_obedience_stays_above_chance(demo):
    _, result = demo
    for what in ("right colour", "right shape", "both obeyed"):
        assert row(result, what)["trained"][1] > row(result, what)["chance"], what
    assert row(result, "right colour")["difference"][2] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("demo", [("whole", "tiny")], ids="-".join, indirect=True)
def test_an_untrained_unet_is_at_chance(demo, monkeypatch):
    """The same prompts and noise with random weights: the score is not above chance and the look is absent."""
    folder, result = demo
    run = open_run(folder / RUN_NAME)
    torch.manual_seed(0)
    untrained = make_unet().eval().requires_grad_(False)
    texts = [text for text, _, _ in prompts()]
    monkeypatch.setattr(OpenRun, "unet", lambda *_: untrained)
    settings = settings_of(run.config)
    requests = [Request(Weights(), text, place, settings) for place, text in enumerate(texts)]
    drawn = dict(draw_pictures(run, requests))
    images = [drawn[place] for place in range(len(texts))]
    num_hits = hits(images)
    assert wilson(num_hits["the new look"], len(images))[1] <= 0.05
    for what in ("right colour", "right shape", "both obeyed"):
        _, low, high = wilson(num_hits[what], len(images))
        # noise is often unreadable, so there may be fewer hits than by chance, but not more
        assert low <= row(result, what)["chance"], what
        assert high < row(result, what)["trained"][1], what


def test_the_fine_tuning_images_show_none_of_the_scored_pairs(tmp_path):
    num_drawn = 8
    draw_photos(tmp_path / "photos", num_drawn)
    for number in range(NUM_PHOTOS):
        scene = scene_of(number)
        assert (scene.colour, scene.shape) not in HELD_OUT
        if number >= num_drawn:
            continue
        with Image.open(tmp_path / "photos" / photo_name(number)) as image:
            assert read(image).has_look
            assert read(image).colour == scene.colour
    assert {path.suffix for path in (tmp_path / "photos").iterdir()} == {".png"}


def test_the_photographs_have_the_captions_of_the_embedded_captioner(demo):
    """At least nine in ten name colour and shape as drawn, and all end with the look."""
    folder, result = demo
    photos = read_manifest(folder / "dataset")
    assert len(photos) == result["captions"] == NUM_PHOTOS
    assert all(json.loads(photo.captioner)["model"] == "tiny" for photo in photos)
    assert all(text.endswith(LOOK_CAPTION) for photo in photos for text in photo.captions)
    scenes = {photo_name(number): scene_of(number) for number in range(NUM_PHOTOS)}
    drawn = [scenes[photo.source.rpartition("/")[2]] for photo in photos]
    right = [f"{scene.colour} {scene.shape}" in photo.captions[0] for scene, photo in zip(drawn, photos, strict=True)]
    assert result["captions_right"] == sum(right)
    assert sum(right) >= 0.9 * NUM_PHOTOS


def test_the_demo_writes_report_comparison_split_and_checkpoints(demo):
    folder, result = demo
    run_dir = folder / RUN_NAME
    assert (run_dir / "report.html").stat().st_size > 100_000
    assert list_checkpoints(run_dir)
    compared = Comparison.model_validate_json((run_dir / "compare" / "index.json").read_bytes())
    assert len(compared.rows) >= 96 + 15
    assert len(compared.models) in (2, 3)
    assert all((run_dir / "compare" / file).is_file() for row in compared.rows for file in row.images.values())
    evaluation = Evaluation.model_validate_json((run_dir / "evaluation.json").read_bytes())
    assert evaluation.not_computed == ()
    assert {metric.title for metric in evaluation.metrics} >= {"KID × 1000", "Density", "Coverage"}
    assert None not in (evaluation.burn, evaluation.memorisation, evaluation.suggestion)
    # a finding of the rules that drew the scenes: base and trained draw other tones
    assert evaluation.crops[0].divergences[0].pooled.p < 0.05
    grid = Grid.model_validate_json((run_dir / "grids" / "cfg-steps-checkpoint" / "index.json").read_bytes())
    assert len(grid.cells) == 4 * 3 * 2
    split = json.loads((run_dir / "split.json").read_text())
    assert len(split["validation"]) == 20
    assert not set(split["validation"]) & set(split["train"])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = {stage: [r["lr"] for r in rows if r["kind"] == "train" and r["stage"] == stage] for stage in (0, 1)}
    assert rates[0][-1] == 1e-4
    assert rates[1] == sorted(rates[1], reverse=True)
    assert rates[1][-1] < 1e-6
    held_out = [r["loss"] for r in rows if r["kind"] == "validation" and r["split"] == "held_out"]
    assert held_out[-1] < held_out[0]
    assert result["report"] == str(run_dir / "report.html")


def test_the_scored_unet_is_the_checkpoint(demo):
    """Guards against scoring the base twice: nearly all trained tensors differ from the base's."""
    folder, _ = demo
    run = open_run(folder / RUN_NAME)
    base, trained = run.unet(None), run.unet(list_checkpoints(folder / RUN_NAME)[-1])
    assert isinstance(run.base, Base)
    fresh = load_unet(run.base, 0)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), fresh.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), trained.parameters(), strict=True)]
    assert sum(moved) > 0.95 * len(moved)


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        run_demo(tmp_path, Terminal())
    assert (tmp_path / "precious.txt").read_text() == "keep me"
