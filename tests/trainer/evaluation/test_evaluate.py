"""An evaluation from pictures to record: what is computed, what is kept, what is said where something is missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.__main__ import main
from safelight.data.manifest import read_manifest
from safelight.errors import UserError
from safelight.trainer.evaluation import evaluate as module
from safelight.trainer.evaluation.evaluate import Means, evaluate
from safelight.trainer.evaluation.kept import FOLDER
from safelight.trainer.inference import pictures
from safelight.trainer.inference.compared_prompts import Prompt, compared_prompts
from safelight.trainer.inference.draw import open_run
from safelight.trainer.report.evaluation import Evaluation
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.tagging.taggers import open_detector
from tests.trainer.inference.exported_runs import STEP, make_run

SAMPLE = {"prompts": [], "num_prompts": 2, "steps": 1, "width": 64, "height": 64}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory) -> Path:
    """A run with one checkpoint, a third of its photographs held out, that logged two validations. Read only."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    make_run(folder, sample=SAMPLE, data={"path": str(tiny_dataset), "resolution": 64})
    files = [photo.file for photo in read_manifest(tiny_dataset)]
    (folder / "split.json").write_text(json.dumps({"train": files[::3] + files[1::3], "validation": files[2::3]}))
    with (folder / "metrics.jsonl").open("a") as log:
        for step, loss in ((0, 0.3), (STEP, 0.2)):
            line = {"kind": "validation", "split": "held_out", "step": step, "epoch": float(step), "loss": loss}
            log.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    """The run, whose models draw noise, that of the checkpoint brighter."""

    def draw(run, wanted, **_):
        for number, request in enumerate(wanted):
            noise = np.random.default_rng([request.place, request.settings.seed % 1000]).normal(0, 30, (64, 64, 3))
            level = 110 if request.weights.step is None else 140
            yield number, Image.fromarray(np.clip(level + noise, 0, 255).astype(np.uint8))

    monkeypatch.setattr(pictures, "draw_pictures", draw)
    return open_run(Path(shutil.copytree(whole, tmp_path / "run")))


def prompts(num: int) -> list[Prompt]:
    return [Prompt(f"prompt {number}") for number in range(num)]


def test_a_second_evaluation_computes_nothing_again(run, monkeypatch):
    first, num_computed = evaluate(run, [STEP], prompts(8), Means(("tiny",)), CPU)
    assert num_computed > 3
    assert [metric.title for metric in first.metrics][:1] == ["KID × 1000"]
    assert {estimate.model for estimate in first.metrics[0].values} == {"base", f"step-{STEP}"}
    assert [model.held_out_loss for model in first.models] == [0.3, 0.2]
    assert first.suggestion is not None
    assert any("no detector is named" in line for line in first.not_computed)
    assert read_run_folder(run.run_dir).evaluation == first

    def refuse(*arguments, **_):
        raise AssertionError("computed again")

    for name in ("metrics_of", "judge_memorisation", "judge_burn"):
        monkeypatch.setattr(module, name, refuse)
    assert evaluate(run, [STEP], prompts(8), Means(("tiny",)), CPU) == (first, 0)
    # a result that is damaged is computed again, the others are not
    monkeypatch.undo()
    for path in (run.run_dir / FOLDER).iterdir():
        path.write_text(path.read_text()[:-20])
    assert Evaluation.model_validate_json((run.run_dir / "evaluation.json").read_text()) == first


def test_what_cannot_be_opened_is_one_line_and_the_rest_is_computed(run, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    means = Means(
        ("tiny", str(tmp_path / "broken.onnx")),
        detector=open_detector(str(tmp_path / "none.onnx")),
        lpips=str(tmp_path / "x"),
    )
    said = []
    evaluation, _ = evaluate(run, [STEP], prompts(8), means, CPU, say=said.append)
    assert len([line for line in evaluation.not_computed if "broken.onnx" in line]) == 1
    assert len([line for line in evaluation.not_computed if "none.onnx" in line]) == 1
    assert len([line for line in evaluation.not_computed if str(tmp_path / "x") in line]) == 1
    assert all("\n" not in line for line in evaluation.not_computed)
    assert any(metric.id.startswith("kid_") for metric in evaluation.metrics)
    assert sum("broken.onnx" in line for line in said) == 1


def test_too_few_prompts_give_no_figure_without_saying_so(run):
    evaluation, _ = evaluate(run, [STEP], prompts(3), Means(), CPU)
    assert not evaluation.metrics
    assert any("KID" in line and "3 of the 5 prompts" in line for line in evaluation.not_computed)


def test_a_run_whose_dataset_is_gone_says_so(run):
    run.config.data.path = "/nowhere/dataset"
    with pytest.raises(
        UserError,
        match=r"dataset, does not exist, so there are no photographs to compare with; set data\.path in .* is now$",
    ):
        evaluate(run, [STEP], prompts(8), Means(), CPU)
    # before anything is drawn
    assert not list((run.run_dir / "compare").glob("*"))


def test_a_damaged_list_of_photographs_is_said_before_anything_is_drawn(run):
    (run.run_dir / "split.json").write_text("{")
    with pytest.raises(UserError, match="unknown which photographs were held out"):
        evaluate(run, [STEP], prompts(8), Means(), CPU)
    assert not list((run.run_dir / "compare").glob("*"))


def test_another_dataset_than_the_runs_is_refused_and_missing_photographs_are_said(run):
    path = run.run_dir / "split.json"
    split = json.loads(path.read_text())
    path.write_text(json.dumps({"train": ["images/gone-1.png", *split["train"]], "validation": split["validation"]}))
    evaluation, _ = evaluate(run, [STEP], prompts(3), Means(), CPU)
    assert "1 photograph that the run used, no longer in the dataset: left out" in evaluation.not_computed
    for halves, said in (
        ({"train": ["images/a-1.png"], "validation": ["images/b-2.png"]}, "none of the photographs that the run used"),
        ({"train": split["train"], "validation": split["train"][:1]}, "as trained on and as held out"),
    ):
        path.write_text(json.dumps(halves))
        with pytest.raises(UserError, match=said):
            evaluate(run, [STEP], prompts(3), Means(), CPU)


def test_a_photograph_that_is_a_prompts_own_shares_its_group(run):
    from safelight.trainer.evaluation.pictures import photographs

    listed = compared_prompts(run, 2)
    captions = {prompt.photo.sha256: prompt.text for prompt in listed}
    found = photographs(run, 16, 16, captions)
    assert {prompt.text for prompt in listed} <= {picture.group for picture in found.all}
    assert all(picture.decode().size == (16, 16) for picture in found.all[:2])
    none = photographs(run, 4096, 4096, captions)
    assert (none.all, none.num_small) == ((), len(found.all))


def test_the_burn_check_draws_all_prompts_at_other_scales_too(run, monkeypatch):
    judged = []
    judge = module.judge_burn
    monkeypatch.setattr(module, "judge_burn", lambda real, sets, *more: judge(real, judged.extend(sets) or sets, *more))
    own = run.config.sample.cfg
    evaluate(run, [STEP], prompts(6), Means(), CPU, guidance=[2.0, own])
    models = ("base", f"step-{STEP}")
    assert [(each.model, each.cfg) for each in judged] == [(model, scale) for scale in (own, 2.0) for model in models]
    assert all((run.run_dir / "compare" / file).is_file() for each in judged for file in each.files)
    assert len({file for each in judged for file in each.files}) == 4 * 6


def test_what_the_burn_check_flags_is_copied_for_a_dataset(run, tmp_path, monkeypatch):
    """As many pictures as it counts, those of all scales, with their prompts beside them."""

    def draw(run, wanted, **_):
        for number, request in enumerate(wanted):
            # the checkpoint's: two saturated colours, beside each other
            draws = np.random.default_rng([request.place, round(request.settings.cfg)])
            pixels = np.clip(120 + draws.normal(0, 20, (64, 64, 3)), 0, 255)
            if request.weights.step is not None:
                pixels = np.where(draws.random((8, 8, 1)).repeat(8, 0).repeat(8, 1) > 0.5, (255, 0, 0), (0, 0, 255))
            yield number, Image.fromarray(pixels.astype(np.uint8))

    monkeypatch.setattr(pictures, "draw_pictures", draw)
    # the dataset is smaller than a limit takes
    for place in ("metrics", "evaluation"):
        monkeypatch.setattr(f"safelight.trainer.{place}.burn.MIN_PHOTOGRAPHS", 3)
    folder, said = tmp_path / "faults", []
    evaluation, _ = evaluate(
        run, [STEP], prompts(4), Means(), CPU, guidance=[2.0], flagged=folder, say=lambda text: said.append(text)
    )
    own = [one for one in evaluation.burn.sets if one.model != "real"]
    counts = {
        name: round(sum(getattr(one, f"share_{name}") * one.num for one in own)) for name in ("burnt", "smoothed")
    }
    assert counts["burnt"] >= 8
    for name, count in counts.items():
        files = sorted((folder / name).glob("*.png"))
        assert len(files) == count
        assert all(file.with_suffix(".txt").read_text().startswith("prompt ") for file in files)
    assert any(f"safelight prepare {folder}" in line for line in said)
    with pytest.raises(UserError, match="is not an empty folder"):
        evaluate(run, [STEP], prompts(4), Means(), CPU, flagged=folder)


def test_a_folder_in_the_records_place_is_refused_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr(pictures, "draw_pictures", None)
    (run.run_dir / "evaluation.json").mkdir()
    with pytest.raises(UserError, match=r"evaluation\.json"):
        evaluate(run, [STEP], prompts(6), Means(), CPU)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--guidance", "0"], "--guidance 0 is not above 0 and up to 100"),
        (["--features", "./nope.onnx#features"], "--features './nope.onnx#features' does not exist; check the path"),
        (["--lpips", "nope"], "--lpips 'nope' does not exist; check the path"),
        (["--crop-features", "tiny"], "--crop-features describes what a detector finds, and none is named"),
        (["--detector", "a/b", "--crop-features", "tiny"], "--crop-features 'tiny' is not among --features"),
        (["--suggest", "--json"], "--suggest and --json exclude each other"),
    ],
)
def test_options_that_cannot_be_meant_so_are_refused(whole, capsys, options, said):
    assert main(["evaluate", str(whole), *options]) == 2
    assert said in capsys.readouterr().err
