"""Comparisons: which prompts, photographs and checkpoints; what is drawn again, kept, taken from samples, removed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.data.cache import decode_photo
from safelight.data.manifest import read_manifest
from safelight.errors import UserError
from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.inference import after_training, compare_page, pictures
from safelight.trainer.inference.after_training import compare_after_training
from safelight.trainer.inference.compare import compare
from safelight.trainer.inference.compared_prompts import Prompt, compared_prompts, held_out_prompts, sampled_prompts
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.gallery import read_key, save_png
from safelight.trainer.inference.pictures import Request, Weights, sample_key
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.report.comparison import Comparison
from safelight.trainer.report.run_reader import read_run_folder
from tests.trainer.inference.exported_runs import STEP, make_run

SAMPLE = {"prompts": [], "num_prompts": 2, "steps": 1, "width": 32, "height": 48}
SEED = 2**64 - 1


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory) -> Path:
    """A run of two held-out photographs and two trained on, with one checkpoint. Read only."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    make_run(folder, sample=SAMPLE, data={"path": str(tiny_dataset), "resolution": 64})
    files = [photo.file for photo in read_manifest(tiny_dataset)]
    (folder / "split.json").write_text(json.dumps({"train": files[:2], "validation": files[2:4]}))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    opened = open_run(Path(shutil.copytree(whole, tmp_path / "run")))
    opened.config.run.seed = SEED
    return opened


@pytest.fixture
def drawn(monkeypatch) -> list[Request]:
    """What is drawn: here grey pictures."""
    requests = []

    def draw(run, wanted, **_):
        for number, request in enumerate(wanted):
            requests.append(request)
            yield number, Image.new("RGB", (request.settings.width, request.settings.height), "grey")

    monkeypatch.setattr(pictures, "draw_pictures", draw)
    return requests


def captions(run) -> list[str]:
    return [photo.captions[0] for photo in read_manifest(Path(run.config.data.path))]


def test_the_prompts_are_the_runs_own_and_then_held_out_captions(run):
    known, said = captions(run), []
    run.config.sample.prompts = ["a barn", known[0], "a barn", known[3]]
    prompts = compared_prompts(run, 9, said.append)
    assert [prompt.text for prompt in prompts] == ["a barn", known[0], known[3], known[2]]
    photos = read_manifest(Path(run.config.data.path))
    assert [prompt.photo for prompt in prompts] == [None, photos[0], photos[3], photos[2]]
    assert [prompt.held_out for prompt in prompts] == [False, False, True, True]
    assert said == ["comparing 4 prompts instead of 9: there are no more prompts and held-out captions"]
    assert compared_prompts(run, 2) == prompts[:2]
    assert sampled_prompts(run) == prompts[:3]
    run.config.sample.prompts = []
    assert [prompt.text for prompt in sampled_prompts(run)] == known[2:4]
    (run.run_dir / "split.json").write_text(json.dumps({"train": [photos[1].file], "validation": []}))
    assert held_out_prompts(run) == [Prompt(known[1], photos[1])]


def test_without_the_dataset_there_are_no_photographs_and_that_is_said(run):
    run.config.data.path = str(run.run_dir / "gone")
    with pytest.raises(
        UserError,
        match=r"there are no captions; set data\.path in .* to where the dataset is now, or set sample\.pr",
    ):
        compared_prompts(run, 1)
    run.config.data.path = "datasets/gone"
    with pytest.raises(UserError, match=r"captions; run this in the folder where the run was started, or set dat"):
        compared_prompts(run, 1)
    run.config.sample.prompts, said = ["a barn"], []
    assert compared_prompts(run, 1, said.append) == [Prompt("a barn")]
    assert said[0].startswith("note: no photographs beside the pictures: data.path ")
    with pytest.raises(UserError, match="does not exist, so there are no captions"):
        compared_prompts(run, 2)
    (run.run_dir / "split.json").unlink()
    run.config.sample.prompts = []
    with pytest.raises(UserError, match="there are no prompts to draw"):
        compared_prompts(run, 1)
    for num in (0, 1001):
        with pytest.raises(UserError, match=f"--num {num} is not from 1 to 1000"):
            compared_prompts(run, num)


def test_the_record_names_every_picture_and_its_photograph(run, drawn):
    comparison = compare(run, [STEP], compared_prompts(run, 2), num_seeds=2)
    folder = run.run_dir / "compare"
    assert Comparison.model_validate_json((folder / "index.json").read_bytes()) == comparison
    assert [(model.id, model.step) for model in comparison.models] == [("base", 0), ("step-7", 7)]
    assert (
        comparison.models[1].weights
        == json.loads((folder_of(run.run_dir, 7) / "state.json").read_text())["sha256"][
            "unet/diffusion_pytorch_model.safetensors"
        ]
    )
    # the run's seed, and the next one
    assert [(row.place, row.seed) for row in comparison.rows] == [(0, SEED), (0, 0), (1, SEED), (1, 0)]
    assert {row.prompt for row in comparison.rows} == set(captions(run)[2:4])
    assert all(row.held_out for row in comparison.rows)
    by_file = {file: (row, model) for row in comparison.rows for model, file in row.images.items()}
    assert len(by_file) == len(drawn) == 8
    for file in (*by_file, *(row.photo for row in comparison.rows)):
        with Image.open(folder / file) as image:
            assert image.size == (32, 48)
    asked = {(request.weights.step, request.place, request.settings.seed) for request in drawn}
    assert asked == {(step, place, seed) for step in (None, 7) for place in (0, 1) for seed in (SEED, 0)}
    # the largest upright window of the square photograph, from its middle
    photo = decode_photo(Path(run.config.data.path), read_manifest(Path(run.config.data.path))[2])
    width = round(photo.height * 2 / 3)
    left = (photo.width - width) // 2
    crop = photo.crop((left, 0, left + width, photo.height)).resize((32, 48), Image.Resampling.LANCZOS)
    with Image.open(folder / comparison.rows[0].photo) as image:
        assert np.abs(np.asarray(image, np.int16) - np.asarray(crop, np.int16)).mean() < 2
    assert {path.name for path in folder.glob("*.png")} == {
        *by_file,
        *(row.photo for row in comparison.rows),
        "contact-sheet.png",
    }


def test_only_what_is_not_there_is_drawn(run, drawn):
    folder, prompts = run.run_dir / "compare", compared_prompts(run, 2)
    compare(run, [STEP], prompts[:1])
    photo = next(folder.glob("photo-*.png"))
    before = photo.stat().st_mtime_ns
    drawn.clear()
    compare(run, [STEP], prompts)
    assert {request.place for request in drawn} == {1}
    drawn.clear()
    compare(run, [STEP], prompts)
    assert drawn == []
    assert photo.stat().st_mtime_ns == before
    # a smaller comparison leaves the others' pictures for later, but does not show them
    assert len(compare(run, [STEP], prompts[:1]).rows) == 1
    compare(run, [STEP], prompts)
    assert drawn == []
    run.config.sample.cfg = 2.0
    compare(run, [STEP], prompts)
    assert len(drawn) == 4
    run.config.sample.width = 48
    compare(run, [STEP], prompts)
    with Image.open(photo) as image:
        assert image.size == (48, 48)


def test_pictures_of_earlier_versions_and_of_replaced_prompts_are_removed(run, drawn):
    folder = run.run_dir / "compare"
    prompts = [Prompt("a barn"), Prompt("a hen"), Prompt("a cow")]
    compare(run, [STEP], prompts, num_seeds=2)
    old = ("base-007.png", "trained-007-x.png", "step3-007-x.png", f"base-{'9' * 200}.png", "contact-sheet-2.png")
    for name in (*old, "mine.png"):
        (folder / name).write_bytes(b"old")
    compare(run, [STEP], [Prompt("a barn"), Prompt("a duck")])
    names = {path.name for path in folder.glob("*.png")}
    stems = [f"{model}{seed}" for model in ("base", "step7") for seed in ("", "-seed0")]
    kept = {f"{stem}-{rest}.png" for stem in stems for rest in ("000-a-barn", "002-a-cow")}
    assert names == kept | {"base-001-a-duck.png", "step7-001-a-duck.png", "contact-sheet.png", "mine.png"}


def test_a_photograph_that_cannot_be_read_is_said_and_the_rest_is_drawn(run, drawn, tiny_dataset, tmp_path):
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset", ignore=shutil.ignore_patterns("cache")))
    run.config.data.path, said = str(dataset), []
    prompts = compared_prompts(run, 2)
    (dataset / prompts[0].photo.file).write_bytes(b"changed")
    comparison = compare(run, [STEP], prompts, say=said.append)
    assert [bool(row.photo) for row in comparison.rows] == [False, True]
    (line,) = (line for line in said if line.startswith("note: no photograph beside a picture: "))
    assert prompts[0].photo.file in line


def test_what_training_sampled_is_not_drawn_again(run, drawn):
    known, settings = captions(run)[2:4], settings_of(run.config)
    request = Request(Weights(STEP), known[0], 0, settings, "", 0)
    other = replace(request, prompt=known[1], place=1, settings=replace(settings, cfg=9.0))
    folder = run.run_dir / "samples" / f"step-{STEP:08d}"
    for sampled, name in ((request, "000"), (other, "001")):
        words = "-".join(sampled.prompt.replace(",", "").split())
        comparison = compare(run, [STEP], [Prompt(known[0]), Prompt(known[1])])
        file = comparison.rows[sampled.place].images["step-7"].replace("step7", f"step{STEP}")
        assert name in file
        assert words[:10] in file
        save_png(Image.new("RGB", (32, 48), "red"), folder / file, "", sample_key(sampled, {}))
    shutil.rmtree(run.run_dir / "compare")
    drawn.clear()
    # not said to be of these weights
    compare(run, [STEP], [Prompt(known[0]), Prompt(known[1])], sampled=(0,))
    assert len(drawn) == 4
    shutil.rmtree(run.run_dir / "compare")
    drawn.clear()
    comparison = compare(run, [STEP], [Prompt(known[0]), Prompt(known[1])], sampled=(0, STEP))
    # the second was sampled with another cfg
    assert [(request.weights.step, request.place) for request in drawn] == [(None, 0), (None, 1), (STEP, 1)]
    path = run.run_dir / "compare" / comparison.rows[0].images["step-7"]
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
        assert "Model: run step 7" in image.info["parameters"]
    assert read_key(path) not in ("", sample_key(request, {}))


def test_the_comparison_after_training_is_of_the_sampled_prompts_and_may_be_turned_off(run, drawn, monkeypatch):
    said = []
    monkeypatch.setattr(after_training, "open_run", lambda _, **__: run)
    comparison = compare_after_training(run.run_dir, STEP, lambda *_: None, said.append)
    assert [row.prompt for row in comparison.rows] == captions(run)[2:4]
    for table in ({"compare_at_end": False}, {"every_epochs": 0}):
        with monkeypatch.context() as patch:
            patch.setattr(run.config, "sample", run.config.sample.model_copy(update=table))
            assert compare_after_training(run.run_dir, STEP, lambda *_: None, said.append) is None
    assert said == []
    (run.run_dir / "split.json").write_text("{}")
    assert compare_after_training(run.run_dir, STEP, lambda *_: None, said.append) is None
    assert said[0].startswith("base and trained are not compared: ")
    (run.run_dir / "split.json").unlink()
    assert compare_after_training(run.run_dir, STEP, lambda *_: None, said.append) is None
    assert len(said) == 1


def test_too_many_rows_and_columns_are_refused(run, drawn):
    with pytest.raises(UserError, match="--seeds 2501 is not from 1 to 2500, with 2 prompts; use 1"):
        compare(run, [STEP], [Prompt("a"), Prompt("b")], num_seeds=2501)
    with pytest.raises(UserError, match="--seeds 0 is not from 1 to 5000"):
        compare(run, [STEP], [Prompt("a")], num_seeds=0)
    with pytest.raises(UserError, match="200 checkpoints are more than the 199 that fit"):
        compare(run, list(range(200)), [Prompt("a")])
    assert drawn == []


def test_text_of_a_dataset_is_escaped_and_can_be_stored(run, drawn):
    prompts = [Prompt("<script>alert(1)</script>"), Prompt("x" * 30_000)]
    comparison = compare(run, [STEP], prompts)
    assert len(comparison.rows[1].prompt) == 20_000
    page = (run.run_dir / "compare" / "index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_of_many_rows_shows_some_and_links_to_all(run, drawn, monkeypatch):
    monkeypatch.setattr(compare_page, "MAX_SHOWN", 6)
    compare(run, [STEP], [Prompt(f"prompt {number}") for number in range(9)])
    page = (run.run_dir / "compare" / "index.html").read_text()
    assert page.count("<img") == 6
    assert "Shown are 3 of 9 rows. All of them: <a href=" in page
    assert all(f"prompt {number}<" in page.replace("”", "<") for number in (0, 4, 8))


def test_the_report_shows_a_comparison(run, drawn):
    comparison = compare(run, [STEP], compared_prompts(run, 2))
    shown = read_run_folder(run.run_dir)
    assert shown.problems == []
    assert shown.comparison == comparison
    (run.run_dir / "compare" / "index.json").write_text('{"rows": [], "models": 3}')
    assert "compare/index.json could not be read" in read_run_folder(run.run_dir).problems[-1]
