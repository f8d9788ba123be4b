"""Tagging a dataset: whose tags are replaced, what is done again, what survives a stop and preparing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safelight.data.manifest import read_manifest
from safelight.data.photo import Tag
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from safelight.trainer.tagging import yolox
from safelight.trainer.tagging.categories import DEFAULT_CATEGORIES, parse_categories
from safelight.trainer.tagging.clip import Clip
from safelight.trainer.tagging.tag_dataset import TagCount, tag_dataset
from safelight.trainer.tagging.taggers import open_clip, open_detector
from tests.trainer.captioning.conftest import photo
from tests.trainer.tagging.conftest import CPU

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture
def run(yolox_file, dataset):
    """A function that tags the dataset with the small YOLOX: run(categories, min_confidence, ...)."""

    def tag(categories=DEFAULT_CATEGORIES, min_confidence=0.5, **options):
        return tag_dataset(dataset, open_detector(str(yolox_file)), categories, min_confidence, CPU, **options)

    return tag


@pytest.fixture
def looked(monkeypatch) -> list[int]:
    """The sizes of the batches of photos that the YOLOX looked at."""
    sizes, find = [], yolox.Yolox.find

    def spy(self, images):
        sizes.append(len(images))
        return find(self, images)

    monkeypatch.setattr(yolox.Yolox, "find", spy)
    return sizes


def tags(dataset: Path) -> dict[str, list[str]]:
    return {entry.source: [tag.name for tag in entry.tags] for entry in read_manifest(dataset)}


def test_photos_that_nobody_tagged_get_tags_the_best_category_first(run, dataset, looked):
    summary = run(batch_size=2)
    assert (summary.made, summary.human, summary.num_tagged, looked) == (5, 1, 5, [2, 2, 1])
    first, *others = read_manifest(dataset)
    assert (first.tags, first.tagger) == ((Tag("animal", 1.5), Tag("park", 1.0)), "")
    for entry in others:
        assert [tag.name for tag in entry.tags] == ["animal", "dog", "cat"]
        weights = [tag.weight for tag in entry.tags]
        assert 2 >= weights[0] >= weights[1] > weights[2] > 1
        record = json.loads(entry.tagger)
        assert (record["kind"], record["min_confidence"], len(record["weights"])) == ("yolox", 0.5, 16)
    # what a person wrote is left as it is
    assert others[0].captions == ("a caption without tags",)
    assert summary.commonest()[0] == TagCount("animal", 5, pytest.approx(sum(e.tags[0].weight for e in others) / 5))


def test_overwrite_replaces_tags_of_people(run, dataset):
    run()
    summary = run(overwrite=True)
    assert (summary.made, summary.unchanged, summary.human) == (1, 5, 0)
    assert all(entry.tagger for entry in read_manifest(dataset))
    assert tags(dataset)["photos/DSC_000.png"] == ["animal", "dog", "cat"]


def test_a_later_run_does_only_what_changed(run, dataset, looked):
    run()
    before = (dataset / "manifest.jsonl").stat().st_mtime_ns
    looked.clear()
    again = run()
    assert (again.made, again.known, again.unchanged, looked) == (0, 0, 5, [])
    assert (dataset / "manifest.jsonl").stat().st_mtime_ns == before
    # other categories or another confidence need no second look
    pets = run(parse_categories("pet: dog, cat"))
    assert (pets.made, pets.known, looked) == (0, 5, [])
    assert tags(dataset)["photos/DSC_002.png"] == ["pet", "dog", "cat"]
    more = run(min_confidence=0.2)
    assert (more.made, more.known, looked) == (0, 5, [])
    assert tags(dataset)["photos/DSC_002.png"] == ["animal", "dog", "cat", "tableware", "spoon"]
    none = run(min_confidence=0.95)
    assert (none.known, none.empty, none.num_tagged) == (5, 5, 0)
    assert tags(dataset)["photos/DSC_002.png"] == []
    # that nothing was found is known as well
    assert run(min_confidence=0.95).unchanged == 5


def test_preparing_again_keeps_a_models_tags_unless_a_person_wrote_some(run, dataset, source, looked):
    run()
    photo(20).save(source / "DSC_020.png")
    (source / "DSC_003.txt").write_text("a person wrote this | fence:2, hill")
    (source / "DSC_004.txt").write_text("a caption alone")
    (source / "DSC_005.png").rename(source / "DSC_905.png")
    ingest([source], dataset)
    entries = {entry.source: entry for entry in read_manifest(dataset)}
    assert entries["photos/DSC_003.png"].tags == (Tag("fence", 2.0), Tag("hill", 1.0))
    assert entries["photos/DSC_003.png"].tagger == ""
    for name in ("DSC_004", "DSC_905", "DSC_002"):
        assert [tag.name for tag in entries[f"photos/{name}.png"].tags] == ["animal", "dog", "cat"]
        assert entries[f"photos/{name}.png"].tagger
    assert entries["photos/DSC_004.png"].captions == ("a caption alone",)
    looked.clear()
    summary = run()
    assert (summary.made, summary.human, summary.unchanged, looked) == (1, 2, 4, [1])


def test_a_caption_of_a_duplicate_replaces_tags_only_by_tags(run, dataset, source, tmp_path):
    """A second source has the same pictures, with captions by people: one with tags, one without."""
    run()
    other = tmp_path / "other"
    other.mkdir()
    for number, text in ((2, "somebody's caption"), (3, "another | fence:2")):
        photo(number).save(other / f"copy_{number}.png")
        (other / f"copy_{number}.txt").write_text(text)
    ingest([source, other], dataset)
    entries = {entry.source: entry for entry in read_manifest(dataset)}
    second, third = entries["photos/DSC_002.png"], entries["photos/DSC_003.png"]
    assert (second.captions, third.captions) == (("somebody's caption",), ("another",))
    assert [tag.name for tag in second.tags] == ["animal", "dog", "cat"]
    assert second.tagger
    assert (third.tags, third.tagger) == ((Tag("fence", 2.0),), "")


def test_a_stop_keeps_what_is_done_and_the_next_run_goes_on(run, dataset, looked):
    stopped = run(batch_size=2, stop_requested=lambda: len(looked) == 1)
    assert (stopped.made, stopped.left) == (2, 3)
    assert sum(bool(entry.tagger) for entry in read_manifest(dataset)) == 2
    looked.clear()
    rest = run(batch_size=2)
    assert (rest.made, rest.unchanged, looked) == (3, 2, [2, 1])


def test_what_was_seen_before_a_kill_is_not_looked_at_again(run, dataset, looked, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2, progress=lambda done, total, note: killed() if done == 4 else None)
    (journal,) = (dataset / "tags").iterdir()
    journal.write_bytes(journal.read_bytes()[:-7])
    looked.clear()
    summary = run(batch_size=2)
    assert (summary.made, summary.known, looked) == (2, 3, [2])


def test_a_photo_that_cannot_be_read_is_named_and_keeps_its_tags(run, dataset):
    entry = read_manifest(dataset)[2]
    (dataset / entry.file).write_bytes(b"no picture")
    summary = run()
    assert (summary.made, [file for file, _ in summary.unread]) == (4, [entry.file])
    assert read_manifest(dataset)[2] == entry


def test_clip_needs_no_second_look_for_other_categories(model_folder, dataset, monkeypatch):
    looked, embed = [], Clip.embed_images

    def spy(self, images):
        looked.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Clip, "embed_images", spy)
    source = str(model_folder("clip"))
    first = tag_dataset(dataset, open_clip(source), parse_categories("animal: cat\nplant"), 0.1, CPU)
    assert (first.made, first.num_tagged, sum(looked)) == (5, 5, 6)
    assert {name for names in tags(dataset).values() for name in names} <= {"animal", "cat", "plant", "park"}
    looked.clear()
    second = tag_dataset(dataset, open_clip(source), parse_categories("sea\nhouse"), 0.1, CPU)
    # a grey picture, when the model is tried
    assert (second.made, second.known, looked) == (0, 5, [1])
    assert {name for names in tags(dataset).values() for name in names} <= {"sea", "house", "animal", "park"}
    looked.clear()
    assert tag_dataset(dataset, open_clip(source), parse_categories("sea\nhouse"), 0.1, CPU).unchanged == 5
    assert looked == []


def test_a_folder_where_a_file_is_kept_is_refused_before_work(run, dataset, looked):
    (dataset / "tags").touch()
    with pytest.raises(UserError, match="tags is a file where a dataset keeps a folder"):
        run()
    assert looked == []
