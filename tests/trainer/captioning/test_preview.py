"""The preview page: the settings that it compares, their commands, and that hostile captions do nothing."""

from __future__ import annotations

import hashlib
import html
import re
import shlex
from dataclasses import replace

import pytest
from PIL import Image

from safelight.data.manifest import read_manifest, write_manifest
from safelight.errors import UserError
from safelight.options.arguments import Caption
from safelight.options.parsing import parse
from safelight.trainer.captioning.caption_dataset import caption_dataset
from safelight.trainer.captioning.models import Captioner
from safelight.trainer.captioning.options import Generation, Wording
from safelight.trainer.captioning.preview import pick_photos, settings_to_try, write_preview
from safelight.trainer.report.theme import content_security_policy
from tests.trainer.captioning.conftest import CPU

WORDING = Wording(suffix=" & more")
BASE = Generation(num_beams=1, max_new_tokens=12)


@pytest.fixture
def preview(captioner_folder, dataset):
    """A function that writes the page and returns its text."""

    def write(num=3, base=BASE, wording=WORDING):
        words = ["safelight", "caption", str(dataset), "--suffix", " & more"]
        return write_preview(dataset, num, str(captioner_folder("blip")), base, wording, CPU, words).read_text()

    return write


def test_the_settings_are_the_two_that_the_report_searched():
    tried = settings_to_try(Generation(num_beams=16))
    pairs = [(penalty, length) for length in (10, 30) for penalty in (1.0, 1.2, 1.4)]
    assert [(one.repetition_penalty, one.min_new_tokens) for one in tried] == pairs
    assert {one.num_beams for one in tried} == {16}
    assert len(settings_to_try(Generation(max_new_tokens=8))) == 3


def test_the_page_has_every_caption_and_a_command_for_each_setting(preview, dataset):
    page = preview()
    assert page.count("<article") == 3
    assert page.count("&amp; more</span>") == 18
    texts = [re.sub("<.*?>", "", text) for text in re.findall("<pre>(.*?)</pre>", page)]
    commands = [shlex.split(html.unescape(text)) for text in texts]
    assert len(commands) == 6
    for command, generation in zip(commands, settings_to_try(BASE), strict=True):
        arguments = parse(Caption, command[2:], "caption", "")
        assert arguments.dataset == dataset
        assert arguments.suffix == " & more"
        assert arguments.repetition_penalty == generation.repetition_penalty
        assert arguments.min_new_tokens == generation.min_new_tokens


def test_captions_that_people_wrote_are_replaced_only_if_all_are_theirs(preview, dataset):
    assert "--overwrite" not in preview(num=1)
    photos = read_manifest(dataset)
    write_manifest(
        dataset, [replace(photo, captions=("by hand",), caption_source="s", captioner="") for photo in photos]
    )
    assert preview(num=1).count("--overwrite") == 6


def test_photographs_as_large_as_prepare_stores_them_are_shown(preview, dataset):
    photos = read_manifest(dataset)
    for photo in photos:
        (dataset / photo.file).unlink()
    large = Image.effect_noise((1400, 1000), 90).convert("RGB")
    large.save(dataset / "images" / "large.jpg", quality=95)
    content = (dataset / "images" / "large.jpg").read_bytes()
    changes = {"file": "images/large.jpg", "sha256": hashlib.sha256(content).hexdigest(), "width": 1400, "height": 1000}
    write_manifest(dataset, [replace(photos[0], **changes)])
    page = preview(num=1)
    assert page.count("data:image/webp") == 1
    assert "cannot be read" not in page


def test_captioning_with_a_previewed_setting_takes_its_captions(preview, dataset, captioner_folder, monkeypatch):
    preview()
    described, describe = [], Captioner.describe
    monkeypatch.setattr(Captioner, "describe", lambda self, *a: described.append(len(a[0])) or describe(self, *a))
    preview()
    assert described == []
    chosen = settings_to_try(BASE)[4]
    summary = caption_dataset(dataset, str(captioner_folder("blip")), chosen, Wording(), CPU, overwrite=True)
    assert (summary.known, summary.made) == (3, 6)


def test_the_page_is_self_contained_and_hostile_captions_do_nothing(preview, dataset):
    entries = read_manifest(dataset)
    hostile = "</dd><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e"
    write_manifest(dataset, [replace(entry, captions=(hostile,), source=hostile) for entry in entries])
    page = preview()
    assert "<script" not in page
    assert "onerror=alert(1)&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert html.escape(content_security_policy()) in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_the_photos_are_drawn_by_the_seed(dataset):
    entries = read_manifest(dataset)
    first = pick_photos(entries, 3, 1)
    assert pick_photos(entries[::-1], 3, 1)[::-1] == first
    assert pick_photos(entries, 3, 4) != first
    assert pick_photos(entries, 99, 1) == entries


def test_a_dataset_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_preview(tmp_path / "none", 5, "x", BASE, Wording(), CPU, [])


def test_a_folder_in_the_pages_place_is_refused_before_a_model_is_opened(dataset):
    (dataset / "captions" / "preview.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"preview\.html is a folder where a dataset keeps a file; move it away"):
        write_preview(dataset, 5, "no model", BASE, Wording(), CPU, [])
