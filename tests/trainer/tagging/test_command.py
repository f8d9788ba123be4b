"""safelight caption --tags and --tags-from-detector, as they are typed: what they print, how they stop, mistakes."""

from __future__ import annotations

import json

import pytest

from safelight.data.manifest import read_manifest
from safelight.trainer.between_steps import stop
from safelight.trainer.captioning.options import MIN_CONFIDENCE
from safelight.trainer.tagging.categories import DEFAULT_TEXT
from tests.called import call

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture
def words(dataset, yolox_file) -> tuple:
    return ("caption", dataset, "--tags-from-detector", yolox_file)


def test_what_it_prints(words, dataset):
    done = call(*words)
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert f"{dataset}: 6 photographs, 5 of them with a model's tags" in done.out
    assert lines[2][:2] == ["tagged", "5"]
    assert "kept: tagged by a person" in done.out
    # commonest first, then by name, with the share of photos and the mean weight
    assert [line[:3] for line in lines if line and line[0] in ("animal", "cat", "dog")] == [
        ["animal", "5", "83%"],
        ["cat", "5", "83%"],
        ["dog", "5", "83%"],
    ]
    assert done.err.endswith(f"next: safelight train run.toml --data.path {dataset}\n")
    result = json.loads(call(*words, "--json").out)
    assert (result["photos"], result["tagged"], result["looked_at"], result["unchanged"]) == (6, 5, 0, 5)
    assert (result["kept_human"], result["unreadable"], result["not_reached"]) == (1, [], 0)
    assert result["tags"][0]["tag"] == "animal"


def test_the_file_of_categories_is_written_once_and_then_read(words, dataset, tmp_path):
    path = tmp_path / "categories.txt"
    first = call(*words, "--tags", path)
    assert f"wrote {path} with the usual categories; edit it, and run this command again" in first.err
    assert path.read_text() == DEFAULT_TEXT
    path.write_text("pet: dog\n")
    second = call(*words, "--tags", path)
    assert "wrote" not in second.err
    assert [tag.name for tag in read_manifest(dataset)[2].tags] == ["pet", "dog", "cat"]


def test_clip_is_the_model_of_tags_without_a_detector(dataset, model_folder, tmp_path):
    (tmp_path / "categories.txt").write_text("animal: cat\nplant\n")
    words = ("caption", dataset, "--tags", tmp_path / "categories.txt", "--model", model_folder("clip"))
    done = call(*words, "--min-confidence", "0.3", "--device", "cpu")
    assert done.status == 0
    assert "5 of them with a model's tags" in done.out
    assert {json.loads(entry.tagger)["kind"] for entry in read_manifest(dataset)[1:]} == {"clip"}


def test_ctrl_c_keeps_what_is_done_and_names_the_command_to_go_on(words, dataset, monkeypatch):
    monkeypatch.setattr(stop.Stop, "__call__", lambda self: True)
    stopped = call(*words, "--batch-size", 2)
    assert stopped.status == 130
    assert "not reached" in stopped.out
    line = stopped.line("Go on with")
    assert line.startswith("stopped; what is done is in the dataset. Go on with: safelight caption ")
    assert line.endswith("--batch-size 2")
    assert sum(bool(entry.tagger) for entry in read_manifest(dataset)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suffix", " x"], "--suffix is of captions and has no effect on tags"),
        (["--preview", "5"], "--preview is of captions and has no effect on tags"),
        (["--replace", "a=b"], "--replace is of captions and has no effect on tags"),
        (["--model", "owner/clip"], "--model is of --tags without a detector"),
        (["--min-confidence", "0.05"], "--min-confidence 0.05 is outside 0.1 to 1"),
        (["--min-confidence", "nan"], "--min-confidence nan is outside 0.1 to 1"),
        (["--batch-size", "0"], "--batch-size 0 is below 1"),
        (["--tags", "/nowhere/categories.txt"], "its folder does not exist"),
    ],
)
def test_a_mistake_is_one_line(words, options, message):
    call(*words, *options).assert_refused("caption", message)


def test_options_of_tags_alone_are_refused_for_captions(dataset):
    call("caption", dataset, "--min-confidence", "0.5").assert_refused("caption", "--min-confidence is of tags")


def test_help_says_the_defaults():
    text = " ".join(call("caption", "--help").out.split())
    assert "--tags-from-detector MODEL" in text
    assert f"(default: {MIN_CONFIDENCE})" in text
