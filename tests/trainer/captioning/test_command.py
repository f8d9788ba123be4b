"""safelight caption, as it is typed: names and aliases, what it prints, how it stops, mistakes."""

from __future__ import annotations

import json
import re

import pytest

from safelight.data.manifest import read_manifest
from safelight.options.arguments import Caption
from safelight.options.parsing import parse
from safelight.trainer.between_steps import stop
from safelight.trainer.captioning.models import Captioner
from tests.called import call

SHORT = ("--num-beams", "1", "--max-new-tokens", "4", "--device", "cpu")


@pytest.fixture
def words(dataset, captioner_folder) -> tuple:
    return ("caption", dataset, "--model", captioner_folder("blip"), *SHORT)


def test_the_reports_names_are_aliases():
    ours = parse(Caption, ["d", "--repetition-penalty", "1.4", "--min-new-tokens", "30"], "caption", "")
    theirs = parse(Caption, ["d", "--q-factor", "1.4", "--min-words", "30"], "caption", "")
    assert ours == theirs
    assert (ours.repetition_penalty, ours.min_new_tokens) == (1.4, 30)


def test_what_it_prints(words, dataset):
    done = call(*words, "--suffix", " unsplash photography", "--replace", "house=castle", "--replace", "red=")
    assert done.status == 0
    assert "captioned" in done.out
    assert "kept: captioned by a person" in done.out
    assert "tokens, mean" in done.out
    assert done.err.endswith(f"next: safelight train run.toml --data.path {dataset}\n")
    texts = [entry.captions[0] for entry in read_manifest(dataset)][2:]
    assert all(text.endswith(" unsplash photography") for text in texts)
    assert not any(word in text.split() for text in texts for word in ("house", "red"))
    result = json.loads(call(*words, "--json").out)
    assert (result["photos"], result["generated"], result["from_journal"], result["kept_human"]) == (9, 0, 7, 2)
    assert (result["unreadable"], result["not_reached"]) == ([], 0)
    assert 0 < result["mean_tokens"] <= 4


def test_ctrl_c_keeps_what_is_done_and_names_the_command_to_go_on(words, dataset, monkeypatch):
    monkeypatch.setattr(stop.Stop, "__call__", lambda self: True)
    stopped = call(*words, "--batch-size", 3, "--suffix", " a b")
    assert stopped.status == 130
    assert "not reached" in stopped.out
    line = stopped.line("Go on with")
    assert line.startswith("stopped; what is done is in the dataset. Go on with: safelight caption ")
    assert line.endswith("--batch-size 3 --suffix ' a b'")
    assert sum(bool(entry.captioner) for entry in read_manifest(dataset)) == 3


def test_a_preview_names_its_page(words, dataset):
    shown = call(*words, "--preview", "2", "--q-factor", "1.1", "--min-words=2", "--replace", "a=--preview")
    assert shown.status == 0
    assert shown.out == f"{dataset}/captions/preview.html\n"
    page = (dataset / "captions" / "preview.html").read_text()
    assert "--q-factor" not in page
    assert "--min-words" not in page
    commands = re.sub("<.*?>", "", page)
    assert "--replace a=--preview --min-new-tokens 4 --repetition-penalty 1.2" in commands


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replace", "dog"], "--replace 'dog' is not of the form OLD=NEW"),
        (["--num-beams", "0"], "--num-beams 0 is outside 1 to 64"),
        (["--top-p", "0.9"], "--top-p 0.9 samples and --num-beams 2 searches"),
        (["--batch-size", "0"], "--batch-size 0 is below 1"),
        (["--preview", "-1"], "--preview -1 is outside 1 to 50"),
        (["--preview", "51"], "--preview 51 is outside 1 to 50"),
        (["--min-words", "many"], "--min-words/--min-new-tokens many is not a whole number"),
        (["--preset", "best"], "invalid choice 'best'"),
        (["--model", ""], "--model is empty; give a model of the hub or a folder"),
        (["--model", "/nowhere/to/be/found"], "is neither a folder on this machine nor a Hugging Face id"),
    ],
)
def test_a_mistake_is_one_line(options, message, dataset):
    call("caption", dataset, "--num-beams", "2", *options).assert_refused("caption", message)


def test_a_folder_of_photos_is_told_from_a_dataset(source, captioner_folder):
    refused = call("caption", source, "--model", captioner_folder("blip"))
    refused.assert_refused("caption", "holds photographs and is no dataset yet; run `safelight prepare")


def test_a_failure_while_a_dataset_is_described_is_a_bug_with_a_report(words, monkeypatch):
    describe = Captioner.describe

    def fail(self, images, generation, *ids):
        if generation.max_new_tokens == 4:
            raise RuntimeError("shapes differ")
        return describe(self, images, generation, *ids)

    monkeypatch.setattr(Captioner, "describe", fail)
    failed = call(*words, may_fail=True)
    assert failed.status == 1
    assert "shapes differ" in failed.report()
