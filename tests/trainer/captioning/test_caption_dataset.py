"""Captioning a dataset: whose captions are replaced, what is done again, what survives a stop, a kill or a full GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safelight.data.lock import FolderLock
from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.photo import Photo
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from safelight.trainer.captioning import caption_dataset as module
from safelight.trainer.captioning.caption_dataset import BatchedCaptioner, caption_dataset, counts, is_human, repetition
from safelight.trainer.captioning.models import Captioner, Described
from safelight.trainer.captioning.options import Generation, Wording
from tests.trainer.captioning.conftest import CPU, photo
from tests.trainer.captioning.small_captioners import change_json

SHORT = Generation(num_beams=1, max_new_tokens=5)
PLAIN = Wording()
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run(captioner_folder, dataset):
    """A function that captions the dataset with the small BLIP: run(generation, wording, ...)."""

    def caption(generation=SHORT, wording=PLAIN, **options):
        return caption_dataset(dataset, str(captioner_folder("blip")), generation, wording, CPU, **options)

    return caption


def is_trial(images) -> bool:
    """Return whether a captioner is tried on a grey picture after it was loaded."""
    return [image.size for image in images] == [(64, 64)]


@pytest.fixture
def described(monkeypatch) -> list[int]:
    """The sizes of the batches of photos that a model described."""
    sizes, describe = [], Captioner.describe

    def spy(self, images, generation, *ids):
        if not is_trial(images):
            sizes.append(len(images))
        return describe(self, images, generation, *ids)

    monkeypatch.setattr(Captioner, "describe", spy)
    return sizes


def captions(dataset: Path) -> dict[str, tuple[str, ...]]:
    return {photo.source: photo.captions for photo in read_manifest(dataset)}


def test_only_photos_that_nobody_captioned_are_captioned(run, dataset, described):
    summary = run(batch_size=4)
    assert (summary.made, summary.human, summary.unchanged, described) == (7, 2, 0, [4, 3])
    for number, entry in enumerate(read_manifest(dataset)):
        if number < 2:
            assert entry.captions == (f"written by hand, number {number}",)
            assert (entry.caption_source, entry.captioner) == ("sidecar .txt", "")
            continue
        record = json.loads(entry.captioner)
        assert entry.captions[0] not in ("", "DSC")
        assert entry.caption_source == "captioner blip"
        assert (record["num_beams"], record["max_new_tokens"], len(record["weights"])) == (1, 5, 16)
        assert record["model"].endswith("/blip")
    assert run(overwrite=True).made == 2
    assert all(entry.captioner for entry in read_manifest(dataset))


def test_a_caption_that_somebody_corrected_in_the_manifest_stays(run, dataset):
    run()
    photos = read_manifest(dataset)
    photos[5] = replace(photos[5], captions=("corrected by hand",))
    write_manifest(dataset, photos)
    again = run()
    assert (again.made, again.known, again.unchanged, again.human) == (0, 0, 6, 3)
    assert read_manifest(dataset)[5].captions == ("corrected by hand",)
    assert run(overwrite=True).known == 1
    assert read_manifest(dataset)[5].captions != ("corrected by hand",)


def test_a_later_run_does_only_what_changed(run, dataset, described):
    run()
    first = captions(dataset)
    before = (dataset / "manifest.jsonl").stat().st_mtime_ns
    described.clear()
    again = run()
    assert (again.made, again.known, again.unchanged, described) == (0, 0, 7, [])
    assert (dataset / "manifest.jsonl").stat().st_mtime_ns == before
    other = run(wording=Wording(suffix=" unsplash photography"))
    assert (other.made, other.known, described) == (0, 7, [])
    assert all(
        text[0] == f"{first[name][0]} unsplash photography" for name, text in list(captions(dataset).items())[2:]
    )
    assert run(Generation(num_beams=2, max_new_tokens=5)).made == 7


def test_a_new_photo_is_captioned_alone_and_preparing_again_keeps_the_captions(run, dataset, source, described):
    run()
    before = captions(dataset)
    photo(20).save(source / "DSC_020.png")
    (source / "DSC_003.txt").write_text("a person wrote this later")
    (source / "DSC_004.png").rename(source / "DSC_904.png")
    ingest([source], dataset)
    ingest([source], dataset, max_megapixels=0.01)
    entries = {entry.source: entry for entry in read_manifest(dataset)}
    assert entries["photos/DSC_003.png"].captions == ("a person wrote this later",)
    assert entries["photos/DSC_003.png"].captioner == ""
    assert entries["photos/DSC_904.png"].captions == before["photos/DSC_004.png"]
    assert json.loads(entries["photos/DSC_904.png"].captioner)["num_beams"] == 1
    described.clear()
    summary = run()
    assert (summary.made, summary.human, summary.unchanged, described) == (1, 3, 6, [1])


def test_a_stop_keeps_what_is_done_and_the_next_run_goes_on(run, dataset, described):
    stopped = run(batch_size=2, stop_requested=lambda: len(described) == 2)
    assert (stopped.made, stopped.left) == (4, 3)
    assert sum(bool(entry.captioner) for entry in read_manifest(dataset)) == 4
    rest = run(batch_size=2)
    assert (rest.made, rest.unchanged, described) == (3, 4, [2, 2, 2, 1])
    assert counts(rest) == "9 photographs: 3 captioned, 4 had this caption already, 2 with a person's caption"


def forget(dataset: Path) -> None:
    """Take what captioners wrote out of the manifest, as if they had been killed before it was written."""
    manifest = dataset / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    unknown = {"captions": [""], "caption_source": "file name", "captioner": ""}
    rows = [{**row, **unknown} if row.get("captioner") else row for row in rows]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_journal_that_a_kill_cut_short_is_continued(run, dataset, described):
    run(batch_size=2)
    expected = captions(dataset)
    (journal,) = (dataset / "captions").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    # the fifth photo's row is cut; rows that nothing of ours wrote stand between
    junk = [
        b"[]\n",
        b'{"sha256": 7, "text": "x", "tokens": 1}\n',
        b"\xff\xfe\n",
        b'{"text": "x"}\n',
        b"x" * 2**17 + b"\n",
    ]
    journal.write_bytes(b"".join(lines[:5] + junk) + lines[5][:-9])
    forget(dataset)
    described.clear()
    summary = run(batch_size=8)
    assert (summary.known, summary.made, described) == (4, 3, [3])
    assert captions(dataset) == expected
    described.clear()
    assert run(wording=Wording(prefix="x ")).known == 7
    assert described == []


def test_a_full_gpu_halves_the_batch(run, monkeypatch):
    describe, sizes, said = Captioner.describe, [], []

    def full(self, images, generation, *ids):
        if not is_trial(images):
            sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return describe(self, images, generation, *ids)

    monkeypatch.setattr(Captioner, "describe", full)
    summary = run(batch_size=7, say=said.append)
    assert (sizes, summary.made, summary.batch_size) == ([7, 3, 1, 1, 1, 1, 1, 1, 1], 7, 1)
    assert said == [f"the GPU's memory is full; going on with batches of {size}" for size in (3, 1)]


def test_a_gpu_that_is_full_with_one_photo_or_the_model_is_one_line(captioner, run, monkeypatch):
    def full(self, images, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    captioner = captioner("blip")
    monkeypatch.setattr(Captioner, "describe", full)
    with pytest.raises(UserError, match="full with a single photo; lower --num-beams"):
        BatchedCaptioner(captioner, 1, print).describe([photo(1)], SHORT, [1])
    with pytest.raises(UserError, match="blip' does not fit the GPU's memory; close other programs"):
        run()


def test_photos_that_cannot_be_read_or_described_keep_their_captions(run, dataset, monkeypatch):
    entries = read_manifest(dataset)
    (dataset / entries[4].file).write_bytes(b"no picture")
    (dataset / entries[5].file).unlink()
    describe = Captioner.describe

    def silent(self, images, *args):
        return [Described("", 0), *describe(self, images, *args)[1:]]

    monkeypatch.setattr(Captioner, "describe", silent)
    summary = run(batch_size=9)
    assert [file for file, _ in summary.unread] == [entries[number].file for number in (4, 5, 2)]
    assert summary.unread[2][1] == "the model said nothing"
    assert summary.made == 4
    assert read_manifest(dataset)[4].captions == ("DSC",)
    assert counts(summary) == "9 photographs: 4 captioned, 2 with a person's caption, 3 unreadable"


def test_a_dataset_in_use_or_of_another_kind_is_refused(run, dataset, tmp_path):
    with FolderLock(dataset, "wait"), pytest.raises(UserError, match="is in use by process"):
        run()
    (dataset / "captions").write_text("a file")
    with pytest.raises(UserError, match="captions is a file where a dataset keeps a folder"):
        run()
    (dataset / "captions").unlink()
    (dataset / "captions").symlink_to(tmp_path)
    with pytest.raises(UserError, match="links out of a folder are never followed"):
        run()
    with pytest.raises(UserError, match="does not exist; create it with `safelight prepare"):
        caption_dataset(tmp_path / "none", "blip", SHORT, Wording(), CPU)
    assert not (tmp_path / "none").exists()


def test_memory_holds_two_batches_of_pictures_at_most(run, monkeypatch):
    decoded, most, decode = [], [], module._decoded

    def counted(dataset, entry):
        picture = decode(dataset, entry)
        decoded.append(weakref.ref(picture))
        return picture

    def describe(self, images, generation, *ids):
        if is_trial(images):
            return []
        most.append(sum(picture() is not None for picture in decoded))
        return [Described("a dog", 2)] * len(images)

    monkeypatch.setattr(module, "_decoded", counted)
    monkeypatch.setattr(Captioner, "describe", describe)
    run(batch_size=1)
    assert len(decoded) == len(most) == 7
    # the one that is described, and the next
    assert max(most) <= 2


def test_repetition_counts_runs_of_three_words():
    assert repetition("a dog on grass") == repetition("") == 0
    assert repetition("the sky is blue and The sky is red") == pytest.approx(1 / 7)
    assert repetition("dog dog dog dog dog") == pytest.approx(2 / 3)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_captions(run, dataset, captioner_folder):
    run(batch_size=1)
    expected = captions(dataset)
    (journal,) = (dataset / "captions").iterdir()
    journal.unlink()
    forget(dataset)
    options = ["--num-beams", "1", "--max-new-tokens", "5", "--batch-size", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "safelight", "caption", dataset, "--model", captioner_folder("blip"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for num_rows in (1, 3, 5):
        process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"sha256") >= num_rows:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    assert captions(dataset) == expected
    shas = [json.loads(line)["sha256"] for line in journal.read_bytes().splitlines() if b"sha256" in line]
    assert len(shas) == len(set(shas)) == 7


@pytest.mark.parametrize(
    ("caption", "source", "expected"),
    [
        ("a red barn", "file name", True),
        ("red barn", "file name", True),
        ("portrait0", "file name", False),
        ("IMG 0012", "file name", False),
        ("DSC01234", "file name", False),
        ("2024 05 17", "file name", False),
        ("barn", "sidecar .txt", True),
        ("", "sidecar .txt", False),
    ],
)
def test_whose_caption_it_is(caption, source, expected):
    assert is_human(Photo("images/0.png", "0" * 64, 9, 9, (caption,), "p/0.png", source)) == expected


@pytest.mark.parametrize("kind", ["blip", "idefics3"])
def test_a_model_is_tried_with_the_options_and_the_prompt_of_the_user(captioner_folder, dataset, tmp_path, kind):
    """What only these meet is found before the first photo, and is one line."""
    folder = Path(shutil.copytree(captioner_folder(kind), tmp_path / "model"))
    if kind == "blip":
        change_json(folder / "generation_config.json", length_penalty="x")
        bad, good = Generation(num_beams=2, max_new_tokens=5), SHORT
    else:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(
            "{% if 'zoo' in messages[0]['content'][1]['text'] %}{{ raise_exception('boo') }}{% endif %}" + template
        )
        bad, good = replace(SHORT, prompt="zoo"), SHORT
    with pytest.raises(UserError, match=r"model: it cannot describe a picture \(.*(boo|'str').*\)") as error:
        caption_dataset(dataset, str(folder), bad, PLAIN, CPU)
    assert "\n" not in str(error.value)
    assert not (dataset / "captions").exists()
    assert caption_dataset(dataset, str(folder), good, PLAIN, CPU).made == 7


def test_a_model_that_fails_after_its_trial_is_one_line(run, dataset, monkeypatch):
    class PanicException(BaseException):
        """As tokenizers raises it."""

    generate, errors = Captioner._inputs, [TypeError("pow() of a str\nand more"), PanicException("a regex")]

    def fail(self, images, prompt):
        if is_trial(images):
            return generate(self, images, prompt)
        raise errors[0]

    monkeypatch.setattr(Captioner, "_inputs", fail)
    for reason in (r"pow\(\) of a str", "a regex"):
        with pytest.raises(UserError, match=rf"blip: it cannot describe a picture \({reason}\); get this") as error:
            run()
        assert "\n" not in str(error.value)
        del errors[0]
    errors[:] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        run()
