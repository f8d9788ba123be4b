"""From what the burn check flags to a negative word that draws, by the commands of docs/adapters.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.data.manifest import read_manifest
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.models.embeddings import open_embedding
from safelight.trainer.report.records import read_grids
from safelight.trainer.tiny.scenes import caption, draw, random_scene
from tests.called import call

NUM_PHOTOS = 40
# far above what the tiny base is drawn with: its pictures clip and lose their middle tones
GUIDANCE = (30, 60)


def go(*argv: object) -> str:
    """Run a command and return what it prints."""
    done = call(*argv)
    assert done.status == 0, done.err
    return done.out + done.err


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.slow
def test_what_is_flagged_becomes_a_negative_word_for_sample_and_grid(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(NUM_PHOTOS):
        scene = random_scene(5, number)
        draw(scene).resize((64, 64)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(caption(scene, 5, number))
    dataset, run = tmp_path / "dataset", tmp_path / "run"
    settings = tmp_path / "run.toml"
    go("init", "tiny", "-o", settings)
    go("prepare", photos, "-o", dataset)
    brief = ["--validate.every-epochs", 0, "--sample.every-epochs", 0, "--log.tensorboard", "false"]
    brief += ["--data.variants", 1, "--run.device", "cpu", "--sample.steps", 10]
    go("train", settings, "--run.dir", run, "--data.path", dataset, "--train.max-steps", 4, *brief)

    # the check finds what guidance burns, and copies it with its prompts
    faults = tmp_path / "faults"
    said = go("evaluate", run, "--num", 12, "--guidance", *GUIDANCE, "--flagged", faults)
    flagged = sorted((faults / "burnt").glob("*.png"))
    burn = json.loads((run / "evaluation.json").read_text())["burn"]
    assert len(flagged) == round(sum(one["share_burnt"] * one["num"] for one in burn["sets"] if one["model"] != "real"))
    assert len(flagged) >= 12
    assert f"safelight prepare {faults / 'burnt'} -o DATASET" in said
    burnt = tmp_path / "burnt"
    go("prepare", faults / "burnt", "-o", burnt)
    photos_of = read_manifest(burnt)
    assert len(photos_of) > len(flagged) / 2
    assert all(photo.captions[0] for photo in photos_of)

    # a word learns it; its samples have it in the negative prompt
    word = tmp_path / "word"
    own = ["--run.dir", word, "--data.path", burnt, "--model.base", "tiny", "--data.resolution", 64]
    own += ["--embedding.word", "<burnt>", "--embedding.initial-text", "picture", "--embedding.negative", "true"]
    go("init", "sd15-embedding", "-o", tmp_path / "word.toml")
    go("train", tmp_path / "word.toml", *own, *brief, "--stage.0.epochs", 6, "--stage.1.epochs", 1)
    assert list_checkpoints(word)
    file = tmp_path / "burnt.safetensors"
    go("export", word, "-o", file)
    learned = open_embedding(str(file), {"text_encoder": 128}, "--embedding")
    assert learned.is_negative

    # another run draws with it, and says where nothing names it
    prompt = ["--prompt", "a large red circle", "--cfg", 12, "--embedding", file]
    plain = go("sample", run, *prompt, "-o", tmp_path / "plain.png")
    assert "note: --embedding burnt has no effect" in plain
    said = go("sample", run, *prompt, "--negative-prompt", "burnt", "-o", tmp_path / "away.png")
    assert "has no effect" not in said
    assert np.abs(pixels(tmp_path / "plain.png") - pixels(tmp_path / "away.png")).max() > 8
    with Image.open(tmp_path / "away.png") as image:
        assert f'TI hashes: "burnt: {learned.file_hash[:12]}"' in image.text["parameters"]

    axes = ["--x", "negative-embedding=none,burnt", "--y", "cfg=4,12"]
    go("grid", run, "--embedding", file, "--prompt", "a large red circle", *axes)
    (saved,) = read_grids(run, [])
    folder = run / "grids" / saved.name
    cells = {(cell.x, cell.y): pixels(folder / cell.file) for cell in saved.grid.cells}
    assert len(cells) == 4
    # the pictures of sample, but for how a batch of four is rounded, and the word changes both rows
    assert np.abs(cells[0, 1] - pixels(tmp_path / "plain.png")).max() <= 2
    assert np.abs(cells[1, 1] - pixels(tmp_path / "away.png")).max() <= 2
    assert (cells[0, 0] != cells[1, 0]).any()
    assert "negative-embedding" in (run / "report.html").read_text()
