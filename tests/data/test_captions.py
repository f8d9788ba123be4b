"""Captions: which sources are read, which of them wins, and how bad ones are reported."""

import itertools
import json
import os
import random
import time
from pathlib import Path

import pytest

from safelight.data.photo import Credit
from safelight.data.sources.caption import caption_of_name
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.encodings import decode_text
from safelight.data.sources.listing import list_folder


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
        "null",
        {"file_name": "sub/cat_2.jpg", "repeats": -1},
    )
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("good row",)
    listed = {int(item.path.rsplit(":", 1)[1]): item.reason for item in reader.rejections}
    expected = {
        1: "it is not JSON",
        2: "it is a list, not an object",
        3: "it has no 'file_name'",
        4: "its file_name '../secret.jpg' is outside",
        5: "its file_name '/etc/passwd' is outside",
        6: "it has neither",
        7: "its text [1] is neither a string",
        8: "its text is empty",
        9: "it names gone.jpg, which does not exist",
        12: "it is a second row",
        13: "it is null, not an object",
        14: "its repeats -1 is not a number from 0 to 10000",
    }
    assert listed.keys() == expected.keys()
    for line, part in expected.items():
        assert listed[line].startswith(part)


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (
            {"photographer": "Ann  Example\n", "page": "https://x.example/a"},
            Credit("Ann Example", "https://x.example/a"),
        ),
        ({"page": "https://x.example/a", "licence": "CC0"}, Credit("", "https://x.example/a")),
        ("https://x.example/a", Credit("", "https://x.example/a")),
        ("Ann Example", Credit("Ann Example", "")),
        # other programs may mean anything by the word
        ({"photographer": ["Ann"], "page": 3}, Credit()),
        (17, Credit()),
        (None, Credit()),
    ],
)
def test_a_row_may_say_whose_the_photo_is(root, credit, expected):
    rows(root / "metadata.jsonl", {"file_name": "a dog_1.jpg", "text": "a dog", "credit": credit})
    reader = CaptionReader(root)
    caption = reader.read(root / "a dog_1.jpg")
    assert (caption.texts, caption.credit, reader.rejections) == (("a dog",), expected, [])


def test_a_sidecar_captions_a_photo_and_its_row_credits_it(root):
    rows(root / "metadata.jsonl", {"file_name": "a dog_1.jpg", "text": "a dog", "credit": "Ann"})
    (root / "a dog_1.txt").write_text("my dog")
    caption = CaptionReader(root).read(root / "a dog_1.jpg")
    assert (caption.texts, caption.credit) == (("my dog",), Credit("Ann"))


def test_a_row_with_a_credit_may_have_an_empty_caption(root):
    """It stands for a photograph that nobody has captioned, whose file name is no caption either."""
    rows(root / "metadata.jsonl", {"file_name": "a dog_1.jpg", "text": "", "credit": {"photographer": "Ann"}})
    assert read(root, "a dog_1.jpg")[:2] == (("",), "metadata.jsonl")


def test_composed_and_decomposed_names_are_the_same(root):
    (root / "cafe\u0301.jpg").write_bytes(b"")
    for name in ("cafe\u0301.jpg", "caf\u00e9.jpg"):
        rows(root / "captions.jsonl", {"file_name": name, "text": "coffee"})
        assert read(root, "cafe\u0301.jpg")[0] == ("coffee",)


@pytest.mark.parametrize(
    ("picture", "sidecar"),
    [
        ("img.jpg", "img.jpg.txt"),
        ("img.jpg", "IMG.TXT"),
        ("IMG_1.JPG", "img_1.txt"),
        ("IMG_1.JPG", "Img_1.jpg.Caption"),
        ("straße.jpg", "STRASSE.txt"),
        ("café.jpg", "cafe\u0301.txt"),
        ("cafe\u0301.jpg", "café.txt"),
        ("CAFE\u0301.jpg", "café.JPG.TXT"),
        ("a.b.jpg", "a.b.txt"),
        ("no suffix", "no suffix.txt"),
    ],
)
def test_sidecars_are_found_in_any_letter_case_and_form(tmp_path, picture, sidecar):
    (tmp_path / picture).write_bytes(b"")
    (tmp_path / sidecar).write_text("a caption")
    assert read(tmp_path, picture)[0] == ("a caption",)


def test_the_sidecar_that_names_the_suffix_wins_and_equal_names_before_other_cases(tmp_path):
    (tmp_path / "img.jpg").write_bytes(b"")
    for name in ("IMG.caption", "img.caption", "img.jpg.caption", "IMG.TXT", "img.TXT", "img.txt", "IMG.jpg.txt"):
        (tmp_path / name).write_text(name)
        assert read(tmp_path, "img.jpg")[0] == (name,)


def test_a_sidecar_of_an_equal_name_is_not_lent_to_another_case(tmp_path):
    for name in ("img.jpg", "IMG.jpg", "img.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "img.txt").write_text("mine")
    assert [read(tmp_path, name)[0] for name in ("img.jpg", "img.png", "IMG.jpg")] == [("mine",), ("mine",), ("IMG",)]


def test_rows_name_files_in_any_letter_case(tmp_path):
    (tmp_path / "Sub").mkdir()
    for name in ("Sub/IMG_1.JPG", "a.jpg", "A.jpg", "cafe\u0301.jpg"):
        (tmp_path / name).write_bytes(b"")
    names = ("sub/img_1.jpg", "a.jpg", "A.jpg", "CAFÉ.jpg", "SUB/IMG_1.JPG", "gone/a.jpg")
    rows(tmp_path / "Metadata.JSONL", *({"file_name": name, "text": name} for name in names))
    reader = CaptionReader(tmp_path)
    found = ("Sub/IMG_1.JPG", "a.jpg", "A.jpg", "cafe\u0301.jpg")
    assert [reader.read(tmp_path / name).texts[0] for name in found] == list(names[:4])
    assert [item.reason for item in reader.rejections] == [
        "it is a second row for Sub/IMG_1.JPG; give one row a list of texts instead",
        "it names gone/a.jpg, which does not exist",
    ]


def test_rows_with_whole_paths_and_backslashes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("p")
    names = ("sub/a.jpg", "b.jpg", "c.jpg", "d.jpg", "e\\f.jpg", "g.jpg", "sub/h.jpg")
    for name in names:
        (tmp_path / "p" / name).write_bytes(b"")
    (tmp_path / "out.jpg").write_bytes(b"")
    place = tmp_path / "link"
    written = (
        "sub\\a.jpg",
        f"{place}/b.jpg",
        f"{tmp_path}/p/c.jpg",
        "~/p/d.jpg",
        "e\\f.jpg",
        ".\\g.jpg",
        "x\\..\\sub\\h.jpg",
    )
    bad = ("..\\out.jpg", "~/out.jpg", f"{place}/../out.jpg", "sub\\..\\..\\out.jpg")
    rows(place / "captions.jsonl", *({"file_name": name, "text": name} for name in (*written, *bad)))
    reader = CaptionReader(place)
    assert [reader.read(place / name).texts[0] for name in names] == list(written)
    assert len(reader.rejections) == len(bad)


RUSSIAN, CHINESE = "кот на крыше", "红色的谷仓，在雪中\n"


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        (b"a red barn", "a red barn", ""),
        ("żółw".encode("utf-8-sig"), "żółw", ""),
        ("a red barn".encode("utf-16"), "a red barn", ""),
        (b"\xfe\xff" + "a barn".encode("utf-16-be"), "a barn", ""),
        *(
            (t.encode(f"utf-16-{e}"), t, "UTF-16")
            for e in ("le", "be")
            for t in ("a red barn", RUSSIAN, CHINESE, "кот")
        ),
        (b"caf\xe9 noir", "café noir", "is not UTF-8 (byte 3); it was read as Windows-1252"),
        (b"\x93a dog\x94 \x81", "“a dog” \ufffd", "is not UTF-8 (byte 0); it was read as Windows-1252"),
        ("żółw".encode()[:-2] + b"w", "żó\ufffdw", "is not UTF-8 (byte 4); invalid bytes were replaced"),
        (b"\xff\xfea\0b", "a\ufffd", "is not UTF-16"),
        ("Où".encode("latin-1"), "Où", "Windows-1252"),
        (b"one\0\x1b[31mtwo", "one\0\x1b[31mtwo", ""),
        (b"", "", ""),
    ],
)
def test_encodings(content, text, note):
    decoded = decode_text(content)
    assert decoded[0] == text
    assert (note in decoded[1]) if note else (decoded[1] == "")


WIDE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


def random_bytes(seed: int, num: int = 300) -> bytes:
    return random.Random(seed).randbytes(num)


@pytest.mark.parametrize(
    "content",
    [
        b"one\0two",
        b"\0" * 50,
        "a dog".encode("utf-32-le"),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\x1f\x8b\x08\x1b\x01" + b"letters",
        b"\x81\x8d\x8f\x90 kanji",
        *map(random_bytes, range(5)),
        *(random_bytes(seed).replace(b"\0", b"") for seed in range(5, 10)),
        *(mark + random_bytes(seed) for seed, mark in ((10, b"\xff\xfe"), (11, b"\xfe\xff"), (12, b"\xef\xbb\xbf"))),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "caption"])
def test_bytes_that_are_no_text_are_no_caption(root, content, suffix):
    path = root / f"a dog_1.{suffix}"
    path.write_bytes(content)
    texts, source, reader = read(root, "a dog_1.jpg")
    assert (texts, source) == (("a dog",), "file name")
    assert [(item.path, item.kind, item.reason) for item in reader.rejections] == [
        (str(path), "caption", "not text, or in an unknown encoding; delete it, or save it as UTF-8")
    ]
    assert reader.warnings == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"caf\xe9", "café"),
        (b"\x93a dog\x94 \x81", "“a dog” \ufffd"),
        ("żółw".encode()[:-2] + b"w", "żó\ufffdw"),
        (b"a \x1b[31mdog", "a [31mdog"),
        (b"a\x0bdog\x0c", "a dog"),
        ("a dog \uf8ff".encode(), "a dog \uf8ff"),
        *((text.encode(encoding), text) for text in (RUSSIAN, CHINESE, "a red barn") for encoding in WIDE),
    ],
)
def test_texts_with_a_damaged_character_are_captions(root, content, text):
    (root / "a dog_1.txt").write_bytes(content)
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == (" ".join(text.split()),)
    assert reader.rejections == []


def test_a_note_names_the_file_of_another_encoding(root):
    (root / "a dog_1.txt").write_bytes(b"caf\xe9 dog")
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("café dog",)
    assert "a dog_1.txt is not UTF-8 (byte 3)" in reader.warnings[0]


@pytest.mark.parametrize("name", ["a dog_1.txt", "metadata.jsonl"])
def test_a_caption_file_that_is_a_pipe_is_listed_and_not_opened(root, name):
    os.mkfifo(root / name)
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("a dog",)
    assert [(item.kind, item.reason) for item in reader.rejections] == [
        ("caption", "not a regular file but a device or pipe")
    ]


@pytest.mark.parametrize("name", ["a dog_1.txt", "a dog_1.jpg.caption", "metadata.jsonl", "sub/../captions.jsonl"])
def test_a_caption_file_that_is_a_link_out_of_the_source_is_listed_and_not_read(root, name):
    outside = root.parent / "elsewhere.jsonl"
    rows(outside, {"file_name": "a dog_1.jpg", "text": "a secret"})
    (root / name).symlink_to(outside)
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("a dog",)
    assert [(item.kind, item.reason) for item in reader.rejections] == [
        ("caption", "a link out of this folder, which is not followed; copy the file it points to")
    ]
    outside.unlink()


def test_links_inside_a_source_are_read_and_those_in_a_linked_folder_are_not(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "b_1.jpg").touch()
    for folder, name in ((root, "a dog_1.txt"), (elsewhere, "b_1.txt")):
        (folder / "shared").write_text("a shared caption")
        (folder / name).symlink_to("shared")
    (elsewhere / "c_1.jpg").touch()
    (elsewhere / "c_1.txt").write_text("a text")
    (root / "inner").mkdir()
    (root / "inner" / "d_1.jpg").touch()
    (root / "inner" / "d_1.txt").write_text("a text inside")
    (root / "also inner").symlink_to("inner")
    for name, text in (("a dog_1", "a shared caption"), ("also inner/d_1", "a text inside")):
        texts, _, reader = read(root, f"{name}.jpg")
        assert (texts, reader.rejections, reader.unread) == ((text,), [], set())
    texts, _, reader = read(root, "linked/b_1.jpg")
    assert texts == ("b",)
    assert [Path(item.path).name for item in reader.rejections] == ["b_1.txt"]
    texts, _, reader = read(root, "linked/c_1.jpg")
    assert (texts, reader.rejections, reader.unread) == (("c",), [], {root / "linked" / "c_1.txt"})


def test_of_many_bad_rows_only_the_first_are_kept(root):
    (root / "captions.jsonl").write_text("1\n" * 5000 + '{"file_name": "a dog_1.jpg", "text": "last"}\n' + "1\n" * 500)
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("last",)
    assert len(reader.rejections) == 1001
    assert [item.num for item in reader.rejections[-2:]] == [1, 4500]
    assert reader.rejections[0].path == f"{root}/captions.jsonl:1"
    assert (reader.rejections[-1].path, reader.rejections[-1].reason) == (
        f"{root}/captions.jsonl",
        "4,500 more rows that cannot be used; only the first 1,000 are listed",
    )


def test_rows_beyond_the_limit_are_not_read(root, monkeypatch):
    monkeypatch.setattr("safelight.data.sources.caption_tables.MAX_TABLE_ROWS", 2)
    row = {"file_name": "a dog_1.jpg", "text": "a caption"}
    rows(root / "captions.jsonl", "", row, {**row, "file_name": "sub/cat_2.jpg"}, "1", "1")
    assert read(root, "a dog_1.jpg")[0] == ("a caption",)
    texts, _, reader = read(root, "sub/cat_2.jpg")
    assert texts == ("cat",)
    assert [item.path for item in reader.rejections] == [f"{root}/captions.jsonl:3"]
    assert reader.rejections[0].reason == "the rows from this one on, as a table may have 2; split it by folder"


def test_a_row_larger_than_a_sidecar_is_rejected(root):
    rows(root / "captions.jsonl", {"file_name": "a dog_1.jpg", "text": ["a"] * 300_000})
    texts, _, reader = read(root, "a dog_1.jpg")
    assert texts == ("a dog",)
    assert "1,500,038 characters, too many for captions" in reader.rejections[0].reason


def test_a_name_of_many_accents_takes_no_time(root):
    rows(root / "captions.jsonl", {"file_name": "a" + "\u0315\u0300" * 15_000, "text": "x"})
    start = time.process_time()
    assert "does not exist" in read(root, "a dog_1.jpg")[2].rejections[0].reason
    assert time.process_time() - start < 0.5


def test_a_sidecar_is_not_given_to_countless_names_of_other_letter_case(root):
    names = ["".join(letters) for letters in itertools.product("aA", "bB", "cC", "dD", "eE")]
    for name in names[:20]:
        (root / f"{name}.png").touch()
    for name in names[16:]:
        (root / f"{name}.txt").write_text("a letter")
    listing = list_folder(root)
    assert listing.unclaimed == [f"{name}.txt" for name in sorted(names[20:])]
    assert listing.sidecars == {f"{name}.png": [f"{name}.txt"] for name in names[16:20]}
