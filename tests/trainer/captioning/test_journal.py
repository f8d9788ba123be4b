"""A journal may come from anybody: it costs no more than the dataset's photos explain."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from safelight.data.manifest import read_manifest
from safelight.errors import UserError
from safelight.trainer.captioning import journal as module
from safelight.trainer.captioning.journal import Journal
from safelight.trainer.captioning.models import Described
from safelight.trainer.tagging.boxes import Box
from safelight.trainer.tagging.taggers import BOXES

RECORD = {"weights": "0" * 16}


@pytest.fixture
def photos(dataset):
    return read_manifest(dataset)


@pytest.mark.parametrize(
    ("form", "said"), [(module.TEXTS, Described("a dog", 2)), (BOXES, [Box("dog", 0.9, 0.1, 0.1, 0.5, 0.5)])]
)
def test_only_the_last_row_of_each_of_the_datasets_photos_is_read(dataset, photos, monkeypatch, form, said):
    journal = Journal(dataset, RECORD, photos, form)
    strangers = [replace(photos[0], sha256=f"{number:064x}") for number in range(50)]
    journal.add([*strangers, *photos, *strangers], [said] * (len(strangers) * 2 + len(photos)))
    journal.add(photos, [said] * len(photos))
    read, parse_json = [], module.parse_json

    def spy(line):
        read.append(line)
        return parse_json(line)

    monkeypatch.setattr(module, "parse_json", spy)
    assert Journal(dataset, RECORD, photos, form).said == {photo.sha256: said for photo in photos}
    assert len(read) == len(photos)


def test_a_journal_is_bounded_by_the_number_of_photos(dataset, photos, monkeypatch):
    journal = Journal(dataset, RECORD, photos)
    journal.add(photos, [Described("a dog", 2)] * len(photos))
    os.truncate(journal.path, module.MIN_JOURNAL_BYTES + 1)
    with pytest.raises(UserError, match=r"jsonl has 16,777,217 bytes, more than what was said of 9 photographs"):
        Journal(dataset, RECORD, photos)
    # more photos, more bytes
    monkeypatch.setattr(module, "BYTES_PER_PHOTO", module.MIN_JOURNAL_BYTES // len(photos) + 1)
    assert len(Journal(dataset, RECORD, photos).said) == len(photos)


def test_rows_written_before_are_still_found(dataset, photos):
    """What a row begins with is how its photo is found."""
    journal = Journal(dataset, RECORD, photos)
    journal.add(photos[:1], [Described("a dog", 2)])
    row = json.dumps({"sha256": photos[0].sha256, "text": "a dog", "tokens": 2})
    assert journal.path.read_text() == f"{json.dumps(RECORD, separators=(',', ':'))}\n{row}\n"
