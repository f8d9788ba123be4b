"""Forms in which other trainers and libraries keep photographs and captions: each is read, and damage is said."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import tarfile
import time
from pathlib import Path

import pytest

from safelight.data.photo import Credit, Photo, PhotoSettings, Tag
from safelight.data.prepare.ingest import ingest
from safelight.data.sources.arrow import ArrowFile, ArrowProcess
from safelight.data.sources.caption import Rejection
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.tag_text import split_tags
from safelight.errors import UserError
from tests.called import call


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture
def prepare(tmp_path, source):
    """Prepare the source; return its photos by the path below it."""

    def call(**options):
        call.summary = ingest([source], tmp_path / "dataset", **options)
        return {photo.source.removeprefix("photos/"): photo for photo in call.summary.photos}

    call.dataset = tmp_path / "dataset"
    return call


@pytest.fixture
def draw(source, make_noise):
    """Save noise pictures below the source."""

    def call(*names: str) -> None:
        for number, name in enumerate(names):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            make_noise(hash_of(name) + number).save(source / name)

    return call


def hash_of(name: str) -> int:
    return sum(ord(char) * 31**place for place, char in enumerate(name)) % 2**31


def png(make_noise, seed: int) -> bytes:
    out = io.BytesIO()
    make_noise(seed).save(out, "PNG")
    return out.getvalue()


def reasons(summary) -> dict[str, str]:
    return {Path(item.path).name: item.reason for item in summary.rejected}


def described(photo: Photo) -> tuple:
    return photo.captions, photo.tags, photo.settings


@pytest.fixture
def read(source):
    """Return (what is said of a.png, what is listed as left out) without making a dataset."""

    def call() -> tuple[tuple, list[Rejection]]:
        (source / "a.png").touch()
        (source / "b.png").touch()
        reader = CaptionReader(source)
        caption = reader.read(source / "a.png")
        return (caption.texts, caption.tags, caption.settings), reader.rejections

    return call


ALL_KEYS = {
    "text": "a dog",
    "tags": {"animal": 1.5, "park": 1},
    "repeats": 2.5,
    "caption_dropout": 0.1,
    "flip_p": 0.5,
    "loss_scale": 0.7,
    "shuffle_tags": True,
    "keep_tags": 1,
    "batch_id": "a",
    "photographer": "Ann",
    "page": "https://example.org/1",
}
ALL_READ = (
    ("a dog",),
    (Tag("animal", 1.5), Tag("park")),
    PhotoSettings(2.5, 0.1, 0.5, 0.7, True, 1, "a"),
)


def test_rows_carry_tags_settings_and_credit_by_our_names(source, draw, prepare):
    draw("a.png", "b.png", "c.png")
    rows = [
        {"file_name": "a.png", **ALL_KEYS},
        {"file_name": "b.png", "text": "b", "tags": ["x", {"tag": "y", "weight": 2}, {"name": "z"}, "x"]},
        {"file_name": "c.png", "repeats": 3},
    ]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    photos = prepare()
    assert described(photos["a.png"]) == ALL_READ
    assert photos["a.png"].credit == Credit("Ann", "https://example.org/1")
    assert described(photos["b.png"])[1] == (Tag("x"), Tag("y", 2), Tag("z"))
    assert described(photos["c.png"]) == (("c",), (), PhotoSettings(repeats=3))
    assert prepare.summary.rejected == []


def test_a_csv_table_of_an_imagefolder(source, draw, prepare):
    draw("a.png", "sub/b.png", "c.png")
    (source / "metadata.csv").write_text(
        "file_name,text,tags,repeats,caption_dropout,flip_p,loss_scale,shuffle_tags,keep_tags,batch_id,photographer,page,more\r\n"
        'a.png,a dog,"animal:1.5, park",2.5,.1,0.5,.7,true,1,a,Ann,https://example.org/1,x\r\n'
        'sub\\b.png,"a ""cat"",\r\nasleep"\r\n'
        "c.png,,,3\r\n"
    )
    photos = prepare()
    assert described(photos["a.png"]) == ALL_READ
    assert photos["a.png"].credit == Credit("Ann", "https://example.org/1")
    assert described(photos["sub/b.png"])[0] == ('a "cat", asleep',)
    assert described(photos["c.png"]) == (("c",), (), PhotoSettings(repeats=3))
    assert photos["a.png"].caption_source == "metadata.csv"
    assert prepare.summary.rejected == []


def test_a_webdataset_tar_is_read_where_it_is(source, prepare, make_noise):
    with tarfile.open(source / "shard-0.tar", "w") as tar:
        members = {
            "a.png": png(make_noise, 1),
            "a.txt": b"a dog | animal:2",
            "./sub/b.png": png(make_noise, 2),
            "./sub/b.json": json.dumps({"caption": "a cat", "width": 40}).encode(),
            "c.png": png(make_noise, 3),
            "c.cls": b"7",
            "d.png": png(make_noise, 4),
            "d.caption": b"a bird",
        }
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    photos = prepare()
    assert {name: photo.captions for name, photo in photos.items()} == {
        "shard-0.tar/a.png": ("a dog",),
        "shard-0.tar/c.png": ("c",),
        "shard-0.tar/d.png": ("a bird",),
        "shard-0.tar/sub/b.png": ("a cat",),
    }
    assert photos["shard-0.tar/a.png"].tags == (Tag("animal", 2),)
    assert prepare.summary.rejected == []
    assert sorted(path.name for path in source.iterdir()) == ["shard-0.tar"]


def test_everydream_folders(source, draw, prepare):
    draw("a.png", "sub/b.png", "sub/deep/c_1.png")
    (source / "global.yaml").write_text("multiply: 2\nflip_p: 0.5\ntags: [photo]\n")
    (source / "multiply.txt").write_text("3")
    (source / "sub/local.yaml").write_text("cond_dropout: 0.2\nmain_prompt: from the folder\n")
    (source / "sub/batch_id.txt").write_text("b\n")
    (source / "sub/loss_scale.txt").write_text("0.5")
    (source / "sub/deep/global.yaml").write_text("flip_p: 0.1\n")
    (source / "sub/deep/shuffle_tags.txt").touch()
    (source / "a.yaml").write_text(
        "main_prompt: a dog, a real one\nrating: 1\ntags:\n- tag: animal\n  weight: 1.5\n- grass\nflip_p: 0\n"
    )
    (source / "sub/deep/c_1.txt").write_text("a bird, small, blue")
    photos = prepare()
    assert described(photos["a.png"]) == (
        ("a dog, a real one",),
        (Tag("animal", 1.5), Tag("grass"), Tag("photo")),
        PhotoSettings(repeats=3, flip_p=0),
    )
    assert described(photos["sub/b.png"]) == (
        ("from the folder",),
        (Tag("photo"),),
        PhotoSettings(2, 0.2, 0.5, 0.5, batch_id="b"),
    )
    assert described(photos["sub/deep/c_1.png"]) == (
        ("a bird",),
        (Tag("small"), Tag("blue"), Tag("photo")),
        PhotoSettings(2, flip_p=0.1, shuffle_tags=True),
    )
    assert prepare.summary.rejected == []
    assert [w.partition("photos/")[2] for w in prepare.summary.warnings] == [
        "a.yaml sets rating, which is not used here"
    ]


def test_kohya_folders_where_asked(source, draw, prepare):
    draw("10_my dog/1.png", "10_my dog/2.png", "3_cat/1.png", "other/x.png")
    (source / "10_my dog/2.txt").write_text("a dog, brown")
    photos = prepare(kohya=True, comma_tags=True)
    assert {name: described(photo) for name, photo in photos.items()} == {
        "10_my dog/1.png": (("my dog",), (), PhotoSettings(repeats=10)),
        "10_my dog/2.png": (("a dog",), (Tag("brown"),), PhotoSettings(repeats=10)),
        "3_cat/1.png": (("cat",), (), PhotoSettings(repeats=3)),
        "other/x.png": (("x",), (), PhotoSettings()),
    }
    assert prepare.summary.warnings == []


def test_numbers_of_kohya_folders_that_are_not_read_as_they_stand_are_said_once(draw, prepare):
    draw("5_/a.png", "7_/b.png", "99999999999_x/c.png", "20000_y/d.png", "10_dog/e.png", "photos of 2023/f.png")
    photos = prepare(kohya=True)
    assert [photo.settings.repeats for photo in photos.values()] == [10, 10_000, 1, 1, 1, 1]
    assert sorted(prepare.summary.warnings) == [
        "--kohya: of 20000_y, the number is over the limit of 10,000 repeats, and is read as that",
        "--kohya: of 5_ and 1 more, no caption follows the number, so that it is not read; name it as in 10_my dog",
        "--kohya: of 99999999999_x, the number is far over the limit of 10,000 repeats, and is not read",
    ]


def pyarrow():
    """Return pyarrow with its modules, or skip the test."""
    module = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[parquet]'")
    pytest.importorskip("pyarrow.parquet")
    return module


def pictures(make_noise, num: int = 5, **columns):
    """Return a table as the datasets library makes it, with embedded pictures."""
    pa = pyarrow()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": png(make_noise, 50 + i), "path": f"folder/{i}.png"} for i in range(num)]
    return pa.table({"image": pa.array(rows, kind), **columns})


def write_stream(table, path: Path, max_chunksize: int = 2) -> None:
    pa = pyarrow()
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)


def test_columns_of_a_parquet_table_may_be_written_in_any_letter_case(source, draw, prepare):
    pa = pyarrow()
    draw("a.png")
    table = pa.table({"File_Name": ["a.png"], "TEXT": ["a dog"], "Tags": [["park"]]})
    pa.parquet.write_table(table, source / "metadata.parquet")
    assert described(prepare()["a.png"])[:2] == (("a dog",), (Tag("park"),))


def test_a_parquet_table_of_an_imagefolder(source, draw, prepare):
    pa = pyarrow()
    draw("a.png", "b.png", "c.png")
    columns = {key: [value, None, None] for key, value in ALL_KEYS.items() if key != "tags"}
    tags = [[{"tag": "animal", "weight": 1.5}, {"tag": "park", "weight": None}], None, None]
    table = pa.table(
        {"file_name": ["a.png", "b.png", "gone.png"], **columns, "tags": tags, "when": [pa.scalar(0, pa.date32())] * 3}
    )
    table = table.set_column(1, "text", pa.array(["a dog", "b", "c"]).dictionary_encode())
    pa.parquet.write_table(table, source / "metadata.parquet")
    photos = prepare()
    assert described(photos["a.png"]) == ALL_READ
    assert photos["a.png"].credit == Credit("Ann", "https://example.org/1")
    assert described(photos["b.png"]) == (("b",), (), PhotoSettings())
    assert (photos["b.png"].caption_source, photos["c.png"].caption_source) == ("metadata.parquet", "file name")
    assert reasons(prepare.summary) == {"metadata.parquet:3": "it names gone.png, which does not exist"}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_pictures_embedded_in_a_table_are_read_where_they_are(source, prepare, make_noise, suffix):
    table = pictures(
        make_noise, text=["a dog | animal:2", "a cat", None, "", "a bird"], multiply=[2.0, None, 3, None, -1]
    )
    if suffix == "parquet":
        pyarrow().parquet.write_table(table, source / "train-0.parquet", row_group_size=2)
    else:
        write_stream(table, source / "train-0.arrow")
    photos = prepare()
    assert {name: described(photo) for name, photo in photos.items()} == {
        f"train-0.{suffix}/0.png": (("a dog",), (Tag("animal", 2),), PhotoSettings(2)),
        f"train-0.{suffix}/1.png": (("a cat",), (), PhotoSettings()),
        f"train-0.{suffix}/2.png": (("2",), (), PhotoSettings(3)),
        f"train-0.{suffix}/3.png": (("3",), (), PhotoSettings()),
        f"train-0.{suffix}/4.png": (("4",), (), PhotoSettings()),
    }
    assert [item.reason for item in prepare.summary.rejected] == ["its repeats -1.0 is not a number from 0 to 10000"]
    # the stored files are the embedded ones
    for index, photo in enumerate(prepare.summary.photos):
        assert (prepare.dataset / photo.file).read_bytes() == png(make_noise, 50 + index)


def test_a_folder_that_the_datasets_library_saved(source, prepare, make_noise):
    pa = pyarrow()
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    info = json.dumps({"info": {"features": features}})
    for split, (first, num) in {"train": (0, 3), "test": (3, 2)}.items():
        (source / split).mkdir()
        table = pictures(make_noise, 5, label=[0, 1, 1, 0, -1]).slice(first, num)
        table = table.replace_schema_metadata({"huggingface": info})
        write_stream(table, source / split / "data-00000-of-00001.arrow")
        write_stream(pa.table({"indices": [1]}), source / split / "cache-0123456789abcdef.arrow")
        (source / split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (source / split / "dataset_info.json").write_text("{}")
    (source / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    photos = prepare()
    assert {name.replace("data-00000-of-00001.arrow", "-"): photo.captions[0] for name, photo in photos.items()} == {
        "train/-/0.png": "cat",
        "train/-/1.png": "dog",
        "train/-/2.png": "dog",
        "test/-/3.png": "cat",
        "test/-/4.png": "4",
    }
    assert reasons(prepare.summary) == {"cache-0123456789abcdef.arrow": "a cache of the datasets library, not its data"}


def test_without_pyarrow_the_message_gives_the_pip_line(source, draw, prepare, monkeypatch):
    draw("a.png")
    for name in ("metadata.parquet", "x.parquet", "y.arrow"):
        (source / name).write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    prepare()
    assert set(reasons(prepare.summary).values()) == {"needs pyarrow to be read: run `pip install pyarrow`"}
    assert len(prepare.summary.rejected) == 3


def test_without_limits_on_memory_the_message_names_the_systems_that_have_them(source, draw, prepare, monkeypatch):
    pyarrow()
    draw("a.png")
    (source / "x.parquet").write_bytes(b"PAR1")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "resource" else find(name))
    prepare()
    wanted = "not read on this system, which cannot limit a process's memory: use Linux or macOS"
    assert reasons(prepare.summary) == {"x.parquet": wanted}


def test_columns_of_structs_are_read_and_are_no_pictures_without_bytes(source, prepare, make_noise):
    """A struct of another kind once made the whole file unreadable, and the message was b'image.bytes'."""
    pa = pyarrow()
    content = png(make_noise, 50)
    table = pa.table({"meta": [{"a": 1}], "a.b": [{"bytes": content, "path": "0.png"}], "text": ["a dog"]})
    pa.parquet.write_table(table, source / "x.parquet")
    pa.parquet.write_table(pa.table({"image": [{"bytes": [content], "path": "0.png"}]}), source / "y.parquet")
    write_stream(pa.table({"image": [{"bytes": "text", "path": "0.png"}]}), source / "z.arrow")
    photos = prepare()
    assert {name: photo.captions for name, photo in photos.items()} == {"x.parquet/0.png": ("a dog",)}
    why = (
        "a table without pictures (its columns: image (struct<bytes: {}, path: string>)); if it has captions of files,"
    )
    refused = reasons(prepare.summary)
    assert refused["y.parquet"].startswith(why.format("list<element: binary>"))
    assert refused["z.arrow"].startswith(why.format("string"))


def test_tables_without_pictures_or_captions_say_so(source, draw, prepare, make_noise):
    pa = pyarrow()
    draw("a.png")
    pa.parquet.write_table(pa.table({"a": [1], "b": ["x"]}), source / "x.parquet")
    pa.parquet.write_table(pa.table({"text": ["x"]}), source / "metadata.parquet")
    pa.parquet.write_table(pictures(make_noise, 1, words=["a dog"]), source / "y.parquet")
    prepare()
    assert reasons(prepare.summary) == {
        "x.parquet": "a table without pictures (its columns: a, b); if it has captions of files, name it "
        "metadata.parquet",
        "metadata.parquet": "it has no column file_name",
        "y.parquet": "no captions of it are used: it has no column text or caption; if words has them, rename it",
    }


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("has_txt", [True, False])
def test_pictures_in_a_column_of_bytes_without_a_known_text_column(source, prepare, make_noise, suffix, has_txt):
    pa = pyarrow()
    columns = {"jpg": pa.array([png(make_noise, 40 + number) for number in range(3)], pa.binary())}
    table = pa.table(columns | ({"txt": ["a dog", "a cat | pet:2", None]} if has_txt else {}))
    if suffix == "parquet":
        pa.parquet.write_table(table, source / "x.parquet", row_group_size=2)
    else:
        write_stream(table, source / "x.arrow")
    texts = [photo.captions for photo in prepare().values()]
    assert texts == ([("a dog",), ("a cat",), ("000002",)] if has_txt else [("000000",), ("000001",), ("000002",)])
    listed = reasons(prepare.summary)
    assert listed == ({} if has_txt else {f"x.{suffix}": listed.get(f"x.{suffix}")})
    assert has_txt or listed[f"x.{suffix}"].endswith("it has no column but jpg")


def test_a_better_column_of_texts_goes_before_txt(source, prepare, make_noise):
    pa = pyarrow()
    columns = {"jpg": pa.array([png(make_noise, 1)], pa.binary()), "txt": ["raw"], "caption": ["a dog"]}
    pa.parquet.write_table(pa.table(columns), source / "x.parquet")
    assert [photo.captions for photo in prepare().values()] == [("a dog",)]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"tags": ["dog", "cat"]}, "2 rows cannot be used, the first is row 1: its tags 'dog' are neither"),
        ({"repeats": [-1, 2], "tags": [None, "cat"]}, "2 rows cannot be used, the first is row 1: "),
        ({"text": ["", None]}, "its column text is empty, or holds no texts"),
    ],
)
def test_a_table_of_which_no_caption_is_used_says_why(source, prepare, make_noise, columns, reason):
    columns = {"text": ["a dog", "a cat"]} | columns
    pyarrow().parquet.write_table(pictures(make_noise, 2, **columns), source / "x.parquet")
    assert len(prepare()) == 2
    assert f"no captions of it are used: {reason}" in reasons(prepare.summary)["x.parquet"]


@pytest.mark.parametrize(
    ("names", "is_hint"),
    [
        (["10_my_dog", "3_cat"], True),
        (["10_my_dog"], True),
        (["10_my_dog", "photos"], False),
        # chapters, cameras' cards, years and days
        (["1_paris", "2_rome", "3_oslo"], False),
        (["100_PANA"], False),
        (["10_PANA"], False),
        (["2023_summer"], False),
        (["01_paris"], False),
        (["12_05"], False),
    ],
)
def test_kohya_folders_are_only_hinted_at_where_not_asked(source, draw, prepare, names, is_hint):
    draw(*(f"{name}/x.png" for name in names))
    photos = prepare()
    assert all(photo.settings == PhotoSettings() for photo in photos.values())
    assert all(photo.captions == ("x",) for photo in photos.values())
    hints = [text for text in prepare.summary.warnings if "--kohya" in text]
    assert len(hints) == is_hint
    if is_hint:
        assert "used 10 times an epoch, with the caption 'my_dog'" in hints[0]


@pytest.mark.parametrize(
    ("text", "caption", "tags"),
    [
        ("a dog on grass | animal:1.5, dog:1.2, park", "a dog on grass", {"animal": 1.5, "dog": 1.2, "park": 1}),
        ("a dog|animal : 2,", "a dog", {"animal": 2}),
        ("| animal:1.5, dog", "", {"animal": 1.5, "dog": 1}),
        ("a dog | x:0, re:zero:.5, a:1, a:2", "a dog", {"x": 0, "re:zero": 0.5, "a": 1}),
        # plain captions
        ("a dog | a park", "a dog | a park", {}),
        ("Sunset | Photo by Ann, 2019", "Sunset | Photo by Ann, 2019", {}),
        ("Big Ben | 10:30", "Big Ben | 10:30", {}),
        ("wallpaper | 16:9", "wallpaper | 16:9", {}),
        ("in the beginning | Genesis 1:1", "in the beginning | Genesis 1:1", {}),
        ("a | b:1 | c:2", "a | b:1 | c:2", {}),
        ("a dog | animal:5000", "a dog | animal:5000", {}),
        ("a dog | animal:-1", "a dog | animal:-1", {}),
        ("a dog, animal:1.5", "a dog, animal:1.5", {}),
        ("|", "|", {}),
        ("a dog |", "a dog |", {}),
    ],
)
def test_tags_behind_a_caption(text, caption, tags):
    assert split_tags(text) == (caption, tuple(Tag(name, weight) for name, weight in tags.items()))


def test_too_many_tags_are_no_tags_of_a_caption_and_cut_in_a_photo(source, draw, prepare):
    text = "a dog | " + ", ".join(f"t{i}x:1" for i in range(1001))
    assert split_tags(text) == (text, ())
    draw("a.png")
    (source / "global.yaml").write_text(json.dumps({"tags": [f"g{i}" for i in range(600)]}))
    (source / "local.yaml").write_text(json.dumps({"tags": [f"l{i}" for i in range(600)]}))
    assert len(prepare()["a.png"].tags) == 1000
    assert "1,200 tags; only the first 1,000 are used" in prepare.summary.warnings[0]


def test_each_value_is_that_of_the_first_source_that_has_it(source, draw, prepare):
    """Beside the photo, tables from near to far, settings of folders, kohya's name; tags are united."""
    draw("5_cat/a.png")
    places = [
        (source / "5_cat/a.yaml", "tags: [one]\nflip_p: 0.1\n"),
        (source / "5_cat/a.json", json.dumps({"tags": ["two", "one"], "flip_p": 0.2, "loss_scale": 0.2})),
        (source / "5_cat/metadata.csv", "file_name,loss_scale,caption_dropout,photographer\na.png,.3,.3,Ann\n"),
        (
            source / "metadata.jsonl",
            json.dumps({"file_name": "5_cat/a.png", "text": "a cat", "keep_tags": 4, "page": "p"}),
        ),
        (source / "5_cat/local.yaml", "multiply: 0\nkeep_tags: 5\nmain_prompt: not this\n"),
        (source / "5_cat/multiply.txt", "7"),
        (source / "global.yml", "shuffle_tags: true\nbatch_id: 6\ntags: [three]\n"),
    ]
    for path, text in places:
        path.write_text(text)
    photo = prepare(kohya=True)["5_cat/a.png"]
    assert described(photo) == (
        ("a cat",),
        (Tag("one"), Tag("two"), Tag("three")),
        PhotoSettings(0, 0.3, 0.1, 0.2, True, 4, "6"),
    )
    assert (photo.credit, photo.caption_source) == (Credit("Ann"), "metadata.jsonl")


def test_files_of_settings_beside_pictures_of_their_name_are_captions(source, draw, prepare):
    draw("multiply.png", "local.png")
    (source / "multiply.txt").write_text("a table of numbers")
    (source / "local.yaml").write_text("main_prompt: a pub\nflip_p: 0.5")
    photos = prepare()
    assert described(photos["multiply.png"]) == (("a table of numbers",), (), PhotoSettings())
    assert described(photos["local.png"]) == (("a pub",), (), PhotoSettings(flip_p=0.5))


def test_a_csv_table_of_a_spreadsheet(source, read):
    """Semicolons, a byte order mark or UTF-16, tabs."""
    for content in (
        "file_name;text\r\na.png;ein Hund, schön\r\n".encode("utf-8-sig"),
        "file_name\ttext\r\na.png\tein Hund, schön\r\n".encode("utf-16"),
    ):
        (source / "metadata.csv").write_bytes(content)
        assert read()[0][0] == ("ein Hund, schön",)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.csv", "File_Name;Text;TAGS\na.png;ein Hund;dog:2\n", "ein Hund"),
        ("metadata.jsonl", '{"FILE_NAME": "a.png", "Text": "ein Hund", "Tags": {"dog": 2}}', "ein Hund"),
        # what is written as we write it counts
        ("metadata.csv", "file_name,Text,text,tags\na.png,no,ein Hund,dog:2\n", "ein Hund"),
    ],
)
def test_names_of_columns_may_be_written_in_any_letter_case(source, read, name, content, expected):
    (source / name).write_text(content)
    captions, tags = read()[0][:2]
    assert (captions, tags) == ((expected,), (Tag("dog", 2.0),))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("name,text\na.png,x\n", {1: "is no header, which must name each column once, file_name among them"}),
        ("file_name,text,text\na.png,x,y\n", {1: "is no header"}),
        ("file_name,text\na.png,x,y\n", {2: "has 3 cells below 2 names"}),
        ('file_name,text\na.png,"x\nb.png,y\n', {2: "on line 4; a quote that opens here is not closed"}),
        (
            'file_name,text\n\na.png,"x\nb.png,"y"\n',
            {3: "expected after '\"', on line 4; a quote that opens here"},
        ),
        ('file_name,text\na.png,"x\n' + "y" * 2**18, {2: "on line 3; a quote that opens here"}),
        ('file_name,text\na.png,"x\ny"\nc.png,c\n', {4: "names c.png"}),
        ('file_name,text\na.png,"x"y\nb.png,b\n', {2: "is not CSV"}),
        ("file_name,text\n../a.png,x\na.png,\n,x\n", {2: "outside", 3: "neither 'text' nor", 4: "no 'file_name'"}),
        ("file_name,text,flip_p\na.png,x,often\n", {2: "its flip_p 'often' is not a number"}),
        ("file_name,text,flip_p\na.png,x,nan\n", {2: "flip_p nan is not a number from 0 to 1"}),
        ("file_name,text,tags\na.png,x,a:9999\n", {2: "tag 'a' has weight"}),
        ("file_name,text\na.png," + "x" * 2**20 + "\n", {2: "is not CSV: field larger than field limit"}),
    ],
)
def test_damaged_csv_is_listed_by_line(source, read, content, expected):
    (source / "metadata.csv").write_text(content)
    listed = {int(Path(item.path).name.partition(":")[2]): item.reason for item in read()[1]}
    assert listed.keys() == expected.keys()
    for line, part in expected.items():
        assert part in listed[line]


def test_a_nul_in_a_csv_cell_is_a_space(source, read):
    (source / "metadata.csv").write_bytes(b"file_name,text\na.png,a\0dog\n")
    assert read()[0][0] == ("a dog",)


DEEP = "[" * 70 + "]" * 70
ALIASES = "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("flip_p: [", "not used: it is not valid YAML: line 1: "),
        ("flip_p: 0.1\n  b: 1", "not used: it is not valid YAML: line 2: mapping values are not allowed here"),
        (ALIASES, "not used: it is not valid YAML: line 2 has an alias, which is not followed; write the value"),
        (DEEP, "not used: it is not valid YAML: it is nested too deeply"),
        ("[" * 60_000, "not used: it is not valid YAML: it is nested too deeply"),
        ("a: " + "x" * 2**16, "not used: it is not valid YAML: it has more than 65,536 bytes"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor for the tag"),
        ("flip_p: 2", "not used: its flip_p 2 is not a number from 0 to 1"),
        ("flip_p: .nan", "not used: its flip_p nan is not a number from 0 to 1"),
        ("multiply: 1e99", "not used: its repeats 1e+99 is not a number from 0 to 10000"),
        ("keep_tags: 1.5", "not used: its keep_tags 1.5 is not a whole number"),
        ("shuffle_tags: maybe", "not used: its shuffle_tags 'maybe' is not true or false"),
        ("batch_id: [1]", "not used: its batch_id [1] is not a text"),
        ("tags: a dog", "not used: its tags 'a dog' are neither a list nor an object of weights"),
        ("tags: [{tag: a, weight: heavy}]", "not used: tag 'a' 'heavy' is not a number from 0 to 1000"),
        ("tags: [{weight: 1}]", "not used: its tag None is not a text"),
        ("main_prompt: 2001-99-99", "month must be in 1..12"),
        ("main_prompt: 2001-09-09", "neither a string nor a list of strings"),
        ("- a\n- b", "not used: it holds a list, not names and values"),
        ("a: \x01", "special characters are not allowed"),
        ("5: x\n? [a]\n: y", "not used: it is not valid YAML"),
    ],
)
@pytest.mark.parametrize("name", ["a.yaml", "local.yaml"])
def test_damaged_yaml_is_listed_at_once(source, read, name, text, reason):
    (source / name).write_text(text)
    began = time.process_time()
    said, rejections = read()
    assert said == (("a",), (), PhotoSettings())
    assert time.process_time() - began < 5
    assert [item.path for item in rejections] == [str(source / name)]
    assert reason in rejections[0].reason


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("multiply.txt", "twice", "not used: its repeats 'twice' is not a number"),
        ("multiply.txt", "-1", "not used: its repeats -1.0 is not a number from 0 to 10000"),
        ("loss_scale.txt", "", "not used: its loss_scale '' is not a number"),
        ("cond_dropout.txt", "inf", "not used: its caption_dropout inf is not a number from 0 to 1"),
        ("a.json", "{", "not used: "),
        ("a.json", '{"tags": "a b"}', "not used: its tags 'a b' are neither a list nor an object of weights"),
        ("a.json", '{"title": "IMG_1"}', "a JSON file (other programs keep captions or settings in such files)"),
        ("a.json", "[1]", "a JSON file"),
        ("a.yaml", "rating: 1", "it holds neither captions nor settings"),
    ],
)
def test_settings_that_cannot_be_used_are_listed(source, read, name, text, reason):
    (source / name).write_text(text)
    said, rejections = read()
    assert said == (("a",), (), PhotoSettings())
    assert [item.path for item in rejections] == [str(source / name)]
    assert rejections[0].reason.startswith(reason)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo | str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))


def test_a_tar_is_a_folder_also_to_tables_settings_and_masks(source, prepare, make_noise):
    mask = io.BytesIO()
    make_noise(7, mode="L").save(mask, "PNG")
    write_tar(
        source / "s.tar",
        ("a.png", png(make_noise, 1)),
        ("a-mask.png", mask.getvalue()),
        ("sub/b.png", png(make_noise, 2)),
        ("metadata.csv", b"file_name,text\nsub/b.png,a cat\n"),
        ("metadata.parquet", b"PAR1"),
        ("sub/multiply.txt", b"2"),
        ("global.yaml", b"flip_p: 0.5"),
    )
    (source / "metadata.jsonl").write_text('{"file_name": "s.tar/a.png", "text": "a dog"}')
    photos = prepare()
    assert {name: described(photo) for name, photo in photos.items()} == {
        "s.tar/a.png": (("a dog",), (), PhotoSettings(flip_p=0.5)),
        "s.tar/sub/b.png": (("a cat",), (), PhotoSettings(repeats=2, flip_p=0.5)),
    }
    assert photos["s.tar/a.png"].mask != ""
    assert photos["s.tar/sub/b.png"].mask == ""
    assert list(reasons(prepare.summary)) == ["metadata.parquet"]


def test_members_that_lead_out_or_are_no_files_are_refused(source, tmp_path, prepare, make_noise):
    picture = png(make_noise, 1)

    def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info, b""

    (tmp_path / "secret.txt").write_text("a secret")
    write_tar(
        source / "s.tar",
        ("good.png", picture),
        ("../out.png", picture),
        ("/etc/out.png", picture),
        ("a/../../out2.png", picture),
        ("a//b.png", picture),
        special("good.txt", tarfile.SYMTYPE, "../../secret.txt"),
        special("hard.png", tarfile.LNKTYPE, "good.png"),
        special("device.png", tarfile.CHRTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
        special("sparse.png", tarfile.GNUTYPE_SPARSE),
        special("folder", tarfile.DIRTYPE),
        ("good.png", picture),
        ("x" * 2000 + ".png", picture),
        ("d/" * 40 + "x.png", picture),
        ("inner.tar", b"x"),
        ("notes.pdf", b"x"),
    )
    photos = prepare()
    assert {name: photo.captions for name, photo in photos.items()} == {"s.tar/good.png": ("good",)}
    listed = reasons(prepare.summary)
    assert listed.keys() >= {"out.png", "out2.png", "b.png", "good.txt", "hard.png", "device.png", "pipe.png"}
    assert listed["good.txt"] == listed["hard.png"] == "not read: it is a link in the archive"
    assert listed["pipe.png"] == "not read: it is no regular file in the archive"
    assert listed["good.png"] == "not read: another member has its name"
    assert "leads out of the archive" in listed["out.png"]
    assert listed["notes.pdf"] == "a document or another program's file, not an image"
    assert "inside another" in listed["inner.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "photos", "secret.txt"]


def test_a_damaged_tar_gives_what_is_before_the_damage_and_loses_nothing(source, prepare, make_noise):
    write_tar(source / "s.tar", *((f"{i}.png", png(make_noise, i)) for i in range(4)))
    whole = (source / "s.tar").read_bytes()
    assert len(prepare()) == 4
    place = whole.index(b"2.png")
    for content, num in (
        (whole[: place + 600], 2),
        (whole[:place] + b"\xff" * 512 + whole[place + 512 :], 2),
        (whole[:100], 0),
        (b"", 0),
        (b"x" * 2000, 0),
    ):
        (source / "s.tar").write_bytes(content)
        # what could not be read stays in the dataset
        (source / "t.png").write_bytes(png(make_noise, 9))
        assert len(prepare(prune=True)) == 5
        reason = reasons(prepare.summary)["s.tar"]
        assert reason.startswith(f"damaged after {num} files, which are used: " if num else "not a tar that can be")


@pytest.mark.parametrize("size", [-1, 2**62, 2**40])
def test_a_tar_header_of_any_size_ends(source, prepare, make_noise, size):
    """A size that leads back, or far beyond the file; the same for the header of a long name."""
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("b.png")
        info.size, info.type = size, kind
        write_tar(source / "s.tar", ("a.png", png(make_noise, 1)))
        content = (source / "s.tar").read_bytes()
        end = content.index(b"\0" * 1024)
        header = info.tobuf(tarfile.GNU_FORMAT)
        (source / "s.tar").write_bytes(content[: end + -end % 512] + header + bytes(1024))
        assert list(prepare()) == ["s.tar/a.png"]


def test_packed_files_keep_their_labels_and_can_be_pruned(source, tmp_path, prepare, make_noise):
    write_tar(source / "s.tar", ("a.png", png(make_noise, 1)), ("b.png", png(make_noise, 2)))
    first = prepare()
    manifest = (prepare.dataset / "manifest.jsonl").read_bytes()
    prepare()
    assert (prepare.dataset / "manifest.jsonl").read_bytes() == manifest
    write_tar(source / "s.tar", ("c.png", png(make_noise, 1)), ("c.txt", b"renamed"))
    assert list(prepare()) == ["s.tar/c.png", "s.tar/b.png"]
    assert [text for text in prepare.summary.warnings if "s.tar/b.png is no longer in its folder" in text]
    photos = prepare(prune=True)
    assert list(photos) == ["s.tar/c.png"]
    assert photos["s.tar/c.png"].sha256 == first["s.tar/a.png"].sha256
    # the tar itself as a source, and unpacked: the same pictures
    alone = ingest([source / "s.tar"], tmp_path / "alone").photos
    assert [(photo.source, photo.captions) for photo in alone] == [("photos/s.tar/c.png", ("renamed",))]


def test_packed_files_that_are_links_out_of_the_source_are_not_read(source, tmp_path, draw, prepare, make_noise):
    draw("a.png")
    write_tar(tmp_path / "s.tar", ("b.png", png(make_noise, 1)))
    for name in ("s.tar", "x.parquet", "metadata.parquet", "metadata.csv"):
        (source / name).symlink_to(tmp_path / "s.tar")
    assert list(prepare()) == ["a.png"]
    assert {item.reason.partition(",")[0] for item in prepare.summary.rejected} == {"a link out of this folder"}
    assert len(prepare.summary.rejected) == 4


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_table_of_pictures_is_listed_and_loses_nothing(source, prepare, make_noise, suffix):
    path = source / f"x.{suffix}"
    table = pictures(make_noise, 4, text=["a", "b", "c", "d"])
    if suffix == "parquet":
        pyarrow().parquet.write_table(table, path, row_group_size=2)
    else:
        write_stream(table, path)
    whole = path.read_bytes()
    assert len(prepare()) == 4
    (source / "t.png").write_bytes(png(make_noise, 9))
    for content in (whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert len(prepare(prune=True)) == 5
        assert reasons(prepare.summary)[path.name].startswith("damaged, or in a form that is not read: ")


def test_a_process_that_dies_or_hangs_while_it_reads_is_a_damaged_file(source, monkeypatch, make_noise):
    pyarrow().parquet.write_table(pictures(make_noise, 2), source / "x.parquet")
    process = ArrowProcess()
    file = ArrowFile(source / "x.parquet", process)
    file.read_pictures()
    assert file.read("0.png") == png(make_noise, 50)
    process._process.kill()
    with pytest.raises(UserError, match="pyarrow did not survive reading it"):
        file.read("0.png")
    # it is started again
    assert file.read("1.png") == png(make_noise, 51)
    monkeypatch.setattr("safelight.data.sources.arrow.MAX_SECONDS", 0.2)
    process._process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=r"pyarrow read for 0\.2 seconds"):
        file.read("0.png")
    process.close()


def test_no_module_in_the_folder_of_photographs_is_imported(source, read, monkeypatch):
    pyarrow().parquet.write_table(
        pyarrow().table({"file_name": ["a.png"], "text": ["a dog"]}), source / "metadata.parquet"
    )
    for name in ("pyarrow", "json", "resource"):
        (source / f"{name}.py").write_text(f"open({str(source / 'ran')!r}, 'w')")
    monkeypatch.chdir(source)
    assert read()[0][0] == ("a dog",)
    assert not (source / "ran").exists()


def test_values_that_stand_for_more_memory_than_there_is_are_refused(source, read):
    """One text of 2 MiB in 40,000 rows: 80 GiB in a few bytes of Parquet."""
    pa = pyarrow()
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 40_000, pa.int32()), pa.array(["x" * 2**21]))
    table = pa.table({"file_name": pa.array(["a.png"] * 40_000).dictionary_encode(), "text": text})
    pa.parquet.write_table(table, source / "metadata.parquet", compression="zstd")
    assert (source / "metadata.parquet").stat().st_size < 2**20
    said, rejections = read()
    assert said[0] == ("a",)
    assert "too many for captions" in rejections[-1].reason


def test_the_summary_says_what_was_read_beside_captions(source, draw, tmp_path):
    draw("a.png", "b.png", "c.png")
    (source / "a.txt").write_text("a dog | animal:1")
    (source / "metadata.csv").write_text("file_name,repeats,flip_p\na.png,2,\nb.png,3,0.5\n")
    called = call("prepare", source, "-o", tmp_path / "dataset")
    assert called.status == 0
    wanted = "read with them: tags of 1 photograph, repeats of 2 photographs, flip_p of 1 photograph"
    assert wanted in called.out.split("\n")


def test_too_many_captions_are_cut(source, draw, prepare):
    draw("a.png")
    row = {"file_name": "a.png", "text": [f"caption {i}" for i in range(1200)]}
    (source / "captions.jsonl").write_text(json.dumps(row))
    captions = prepare()["a.png"].captions
    assert captions == tuple(f"caption {i}" for i in range(1000))
    assert "1,200 captions; only the first 1,000 are used" in prepare.summary.warnings[0]
