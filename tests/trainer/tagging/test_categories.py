"""The file of categories: what is read, what is refused, what is written if there is none."""

from __future__ import annotations

import os

import pytest

from safelight.errors import UserError
from safelight.trainer.tagging.categories import DEFAULT_TEXT, parse_categories, read_categories
from safelight.trainer.tagging.yolox import COCO_NAMES


def test_a_line_is_a_category_and_its_things():
    categories = parse_categories("# words\n\nanimal: cat,  wild   dog , \nlandscape\n food:# none\nhuman: Person\n")
    assert categories.record() == {
        "animal": ["cat", "wild dog"],
        "landscape": [],
        "food": [],
        "human": ["Person"],
    }
    assert categories.names == ("animal", "cat", "wild dog", "landscape", "food", "human", "Person")
    assert categories.category_of("person") == "human"
    assert categories.category_of("animal") == categories.category_of("toaster") == ""


def test_the_usual_categories_hold_every_class_of_coco():
    categories = parse_categories(DEFAULT_TEXT)
    assert [name for name in COCO_NAMES if not categories.category_of(name)] == []
    assert len(COCO_NAMES) == len(set(COCO_NAMES)) == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n\n", "has no category"),
        ("animal: cat\nfood: Cat", "line 2: 'Cat' is already in line 1"),
        ("animal: animal", "line 1: 'animal' is already in line 1"),
        ("animal: cat, cat", "line 1: 'cat' is already in line 1"),
        ("animal: cat: dog", "line 1: 'cat: dog' is no word"),
        ("animal: a|b", r"line 1: 'a|b' is no word"),
        (": cat", "line 1: '' is no word"),
        ("12: cat", "line 1: '12' is no word"),
        (f"animal: {'x' * 61}", "longer than 60 characters"),
        ("\n".join(f"word{n}" for n in range(1001)), "line 1001: it has more than 1,000 words"),
    ],
)
def test_a_mistake_names_its_line(text, message):
    with pytest.raises(UserError) as error:
        parse_categories(text)
    assert message in str(error.value)


def test_the_file_is_written_if_there_is_none_and_never_again(tmp_path):
    path = tmp_path / "categories.txt"
    categories, is_new = read_categories(path)
    assert is_new
    assert path.read_text() == DEFAULT_TEXT
    path.write_text("\ufeffanimal: cat\n")
    categories, is_new = read_categories(path)
    assert (categories.record(), is_new) == ({"animal": ["cat"]}, False)


@pytest.mark.parametrize("name", ["captions.jsonl", "photo.png", "tags.toml"])
def test_a_missing_file_that_would_be_no_text_is_not_written(tmp_path, name):
    with pytest.raises(
        UserError, match=r"does not exist, and a new file of categories.* such as --tags categories\.txt"
    ):
        read_categories(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_used_are_one_line(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_bytes(b"# " + b"x" * 2**18)
    (tmp_path / "empty").write_text("# nothing")
    with pytest.raises(UserError, match=r"empty has no category; write lines such as"):
        read_categories(tmp_path / "empty")
    (tmp_path / "bad").write_text("animal: cat: dog")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("bytes", "is not UTF-8 text"),
        ("large", "over the limit of 262,144"),
        ("bad", "bad line 1: 'cat: dog' is no word"),
        ("pipe", "not a regular file"),
        ("", "not a regular file but a folder"),
        ("nowhere/categories.txt", "cannot be written: its folder does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read_categories(tmp_path / name)
