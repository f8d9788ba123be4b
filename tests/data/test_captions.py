"""Captions: which sources are read, which of them wins, and how bad ones are reported."""

import json

import pytest

from safelight.data.captions import CaptionReader, caption_of_name


def rows(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines) + "\n",
        "utf-8",
    )


@pytest.fixture
def root(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("a dog_1.jpg", "sub/cat_2.jpg", "sub/deep/bird_3.jpg"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(root, name):
    reader = CaptionReader(root)
    caption = reader.read(root / name)
    return caption.texts, caption.source, reader


@pytest.mark.parametrize(
    ("stem", "caption"),
    [("a red-haired cat_0001", "a red-haired cat"), ("plain", "plain"), ("a  b_c_d", "a b"), ("_x", "")],
)
def test_file_name(stem, caption):
    assert caption_of_name(stem) == caption


def test_precedence_from_last_to_first(root):
    """Add the sources one by one, weakest first: each overrides those before it."""
    name = "sub/deep/bird_3.jpg"
    photo = root / name
    assert read(root, name)[:2] == (("bird",), "file name")
    for table, file_name in (
        (root / "captions.jsonl", "sub/deep/bird_3.jpg"),
        (root / "metadata.jsonl", "sub/deep/bird_3.jpg"),
        (root / "sub/captions.jsonl", "deep/bird_3.jpg"),
        (root / "sub/deep/captions.jsonl", "bird_3.jpg"),
        (root / "sub/deep/metadata.jsonl", "./bird_3.jpg"),
    ):
        rows(table, {"file_name": file_name, "text": f"from {table}"})
        assert read(root, name)[:2] == ((f"from {table}",), table.name)
    photo.with_suffix(".caption").write_text("from caption")
    assert read(root, name)[:2] == (("from caption",), "sidecar .caption")
    photo.with_suffix(".txt").write_text("from txt")
    assert read(root, name)[:2] == (("from txt",), "sidecar .txt")


def test_tables_above_the_root_are_not_read(root):
    rows(root / "captions.jsonl", {"file_name": "sub/cat_2.jpg", "text": "too high"})
    assert read(root / "sub", "cat_2.jpg")[0] == ("cat",)


def test_a_table_without_the_photo_falls_through(root):
    rows(root / "sub/metadata.jsonl", {"file_name": "deep/bird_3.jpg", "text": "other"})
    rows(root / "captions.jsonl", {"file_name": "sub/cat_2.jpg", "text": "mine"})
    assert read(root, "sub/cat_2.jpg")[0] == ("mine",)


def test_sidecar_is_one_caption_with_white_space_collapsed(root):
    (root / "a dog_1.txt").write_text("a dog,\n  running\tfast \r\n\n")
    assert read(root, "a dog_1.jpg")[0] == ("a dog, running fast",)


def test_empty_sidecar_is_ignored_with_a_warning(root):
    (root / "a dog_1.txt").write_text(" \n")
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("a dog",)
    assert "a dog_1.txt is empty" in reader.warnings[0]


def test_invalid_utf8_is_replaced_with_a_warning(root):
    (root / "a dog_1.txt").write_bytes(b"caf\xe9 dog")
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("caf\ufffd dog",)
    assert "byte 3" in reader.warnings[0]


def test_byte_order_mark_is_not_part_of_the_caption(root):
    (root / "a dog_1.txt").write_bytes(b"\xef\xbb\xbfdog")
    assert read(root, "a dog_1.jpg")[0] == ("dog",)


def test_variants_and_the_caption_key(root):
    rows(
        root / "captions.jsonl",
        {"file_name": "a dog_1.jpg", "text": ["one", " two  words", "one", ""]},
        {"file_name": "sub/cat_2.jpg", "caption": "by caption", "caption_source": "seen by hand"},
    )
    assert read(root, "a dog_1.jpg")[0] == ("one", "two words")
    assert read(root, "sub/cat_2.jpg")[:2] == (("by caption",), "captions.jsonl: seen by hand")


def test_bad_rows_are_rejected_by_line_number_and_good_rows_are_used(root):
    rows(
        root / "metadata.jsonl",
        "{not json",
        [1],
        {"text": "no name"},
        {"file_name": "../secret.jpg", "text": "outside"},
        {"file_name": "/etc/passwd", "text": "outside"},
        {"file_name": "sub/cat_2.jpg"},
        {"file_name": "sub/cat_2.jpg", "text": [1]},
        {"file_name": "sub/cat_2.jpg", "text": "  "},
        {"file_name": "gone.jpg", "text": "x"},
        "",
        {"file_name": "sub/../a dog_1.jpg", "text": "good \u2028 row"},
        {"file_name": "a dog_1.jpg", "text": "again"},
    )
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("good row",)
    listed = {int(item.path.rsplit(":", 1)[1]): item.reason for item in reader.rejections}
    expected = {
        1: "not JSON",
        2: "is a list",
        3: "no 'file_name'",
        4: "outside",
        5: "outside",
        6: "neither",
        7: "neither a string",
        8: "empty",
        9: "does not exist",
        12: "second row",
    }
    assert listed.keys() == expected.keys()
    for line, part in expected.items():
        assert part in listed[line]


def test_composed_and_decomposed_names_are_the_same(root):
    (root / "cafe\u0301.jpg").write_bytes(b"")
    for name in ("cafe\u0301.jpg", "caf\u00e9.jpg"):
        rows(root / "captions.jsonl", {"file_name": name, "text": "coffee"})
        assert read(root, "cafe\u0301.jpg")[0] == ("coffee",)
