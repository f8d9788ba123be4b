"""Unsplash tables of invented rows: reading, drawing, and datasets made of what a server on this machine serves."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.photo import Credit
from safelight.data.prepare.ingest import ingest
from safelight.data.sources import unsplash
from safelight.data.sources.download import ALSO_FROM, Limits
from safelight.data.sources.unsplash import Request, choose, image_address, tables_of
from safelight.errors import UserError
from safelight.trainer.captioning.caption_dataset import is_human
from tests.data.photo_server import PhotoServer, jpeg

COLUMNS = (
    *("photo_id", "photo_url", "photo_image_url", "photo_submitted_at", "photo_width", "photo_height"),
    *("photo_description", "photographer_username", "photographer_first_name", "photographer_last_name"),
    *("exif_camera_make", "exif_camera_model", "photo_location_country", "ai_description", "blur_hash"),
)
QUICK = Limits(read_s=0.3, total_s=2, connect_s=1, first_wait_s=0.01, num_tries=2)


def photo_id(number: int) -> str:
    """Return an invented id; every third begins with `-`, others with `_`."""
    return f"{'-_a'[number % 3]}{number:08d}{'-_'[number % 2]}Z"


def row(number: int, **changes: str) -> dict[str, str]:
    name = photo_id(number)
    return {
        "photo_id": name,
        "photo_url": f"https://unsplash.example/photos/{name}",
        "photo_image_url": f"https://images.unsplash.example/photo-{number}",
        "photo_submitted_at": "2026-01-02 03:04:05.6",
        "photo_width": str(3000 + number),
        "photo_height": "2000" if number % 2 else "5000",
        "photo_description": f'A hill,\tseen from the {number}th window\nof a "train"' if number % 2 else "",
        "photographer_username": f"user{number % 5}",
        "photographer_first_name": "Zoë",
        "photographer_last_name": f"Invented {number % 5}",
        "exif_camera_make": "Canon" if number % 4 else "NIKON",
        "exif_camera_model": "EOS",
        "photo_location_country": "",
        "ai_description": f"green hill number {number}" if number % 7 else "",
        "blur_hash": "LEHV6nWB2yk8",
        **changes,
    }


def write_table(path: Path, rows: list[dict[str, str]], columns=COLUMNS, delimiter="\t", newline="\n") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, delimiter=delimiter, lineterminator=newline, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return path


def ids(request: Request) -> list[str]:
    return [one.id for one in choose(request)[0]]


def test_a_table_is_read_by_its_header_with_csv_quoting(tmp_path):
    rows = [row(number) for number in range(20)]
    forms = {
        "photos.tsv000": {},
        "photos.csv000": {"delimiter": ","},
        "windows.tsv000": {"newline": "\r\n"},
        # of another release: columns in another order, some gone, some new
        "other.tsv000": {"columns": ("new", *reversed(COLUMNS[:-2]), COLUMNS[-2])},
    }
    for name, form in forms.items():
        chosen, rejected, num = choose(
            Request((write_table(tmp_path / name, rows, **form),), limit=20, captions="photographer")
        )
        assert (rejected, num) == ([], 20)
        by_id = {one.id: one for one in chosen}
        assert by_id.keys() == {photo_id(number) for number in range(20)}
        first = by_id[photo_id(1)]
        assert first.caption == 'A hill, seen from the 1th window of a "train"'
        assert first.credit == Credit("Zoë Invented 1", f"https://unsplash.example/photos/{photo_id(1)}")
        assert first.address == "https://images.unsplash.example/photo-1?w=1600&fit=max&fm=jpg&q=85"


def test_a_byte_order_mark_and_bytes_that_are_no_utf8_are_read(tmp_path):
    path = write_table(tmp_path / "photos.tsv000", [row(1, ai_description="caf\xe9"), row(2)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace("é".encode(), b"\xe9"))
    chosen = choose(Request((path,), captions="ai"))[0]
    assert {one.caption for one in chosen} == {"caf\ufffd", "green hill number 2"}


def test_the_address_keeps_what_it_had_and_asks_for_a_jpeg_of_the_width():
    assert image_address("https://x.example/p?ixid=a%20b&w=5", 800) == (
        "https://x.example/p?ixid=a+b&w=800&fit=max&fm=jpg&q=85"
    )


def test_the_draw_depends_on_seed_and_ids_alone(tmp_path):
    rows = [row(number) for number in range(5000)]
    table = write_table(tmp_path / "a.tsv000", rows)
    backwards = write_table(tmp_path / "b.tsv000", rows[::-1])
    parts = tuple(write_table(tmp_path / f"c.tsv00{part}", rows[part::3]) for part in range(3))
    drawn = ids(Request((table,), limit=100, seed=1))
    assert len(set(drawn)) == 100
    assert drawn == ids(Request((backwards,), limit=100, seed=1)) == ids(Request(parts, limit=100, seed=1))
    # a larger limit adds to a smaller one, also where conditions leave rows out
    assert ids(Request((table,), limit=300, seed=1))[:100] == drawn
    odd = [one for one in drawn if int(one[1:9]) % 2]
    assert ids(Request((table,), limit=100, seed=1, where="photo_height = 2000"))[: len(odd)] == odd
    other = ids(Request((table,), limit=100, seed=2))
    assert len({*drawn} & {*other}) < 15
    # spread over the table
    numbers = [int(one[1:9]) for one in drawn]
    assert 2000 < sum(numbers) / 100 < 3000
    # pinned: the same seed draws the same photographs in every release
    assert drawn[:3] == ["_00000352-Z", "a00003158-Z", "_00003532-Z"]


def test_a_photograph_that_is_listed_twice_is_drawn_once(tmp_path):
    table = write_table(tmp_path / "photos.tsv000", [row(1), row(2), row(1, ai_description="other"), row(2)])
    chosen, rejected, _ = choose(Request((table, table), limit=10, captions="ai"))
    assert sorted((one.id, one.caption) for one in chosen) == sorted(
        [(photo_id(1), "green hill number 1"), (photo_id(2), "green hill number 2")]
    )
    assert rejected == []


BAD_IDS = [
    "",
    "short",
    "x" * 12,
    "../../../ab",
    "/etc/passwd",
    "--out=a b c",
    "abcdefghij\n",
    "äbcdefghijk",
    "a\0cdefghijk",
]


def test_rows_that_cannot_be_used_are_named_by_their_line(tmp_path):
    rows = [row(1), *(row(2, photo_id=bad) for bad in BAD_IDS), row(3, photo_image_url="file:///etc/passwd"), row(4)]
    path = write_table(tmp_path / "photos.tsv000", rows)
    path.write_bytes(path.read_bytes() + b"too\tfew\n\n")
    chosen, rejected, num = choose(Request((path,), limit=10))
    assert {one.id for one in chosen} == {photo_id(1), photo_id(4)}
    assert num == 2
    assert len(rejected) == len(BAD_IDS) + 2
    assert {rejection.kind for rejection in rejected} == {"row"}
    # each of row 1 and the bad ones before has a line break in its description
    lines = path.read_bytes().split(b"\n")
    for rejection, bad in zip(rejected, BAD_IDS, strict=False):
        name, _, line = rejection.path.rpartition(":")
        assert name == str(path)
        assert lines[int(line) - 1].startswith(bad.split("\n")[0].encode()) or lines[int(line) - 1].startswith(b'"')
        assert rejection.reason.startswith("the row's photo_id ")
    assert rejected[-2].reason == "the row's photo_image_url 'file:///etc/passwd' is no http or https address"
    assert rejected[-1].reason == "the row has 2 columns, and the header 15"


def test_of_very_many_bad_rows_the_first_are_listed(tmp_path):
    table = write_table(tmp_path / "photos.tsv000", [row(1)] + [row(2, photo_id="bad")] * 1500)
    _, rejected, _ = choose(Request((table,)))
    assert len(rejected) == 1001
    assert rejected[-1].num == 500


def test_an_open_quote_and_endless_lines_cost_some_rows_only(tmp_path):
    head, body = (
        write_table(tmp_path / "photos.tsv000", [row(number) for number in range(3000)]).read_bytes().split(b"\n", 1)
    )
    path = tmp_path / "broken.tsv000"
    endless = b"x" * 10**6 + b"\n"
    many_texts = b'"a\n"\t' * 10**5 + b"\n"
    path.write_bytes(b"\n".join((head, b'"open\t' + body[:50_000] + b"\n" + endless + many_texts + body)))
    chosen, rejected, _ = choose(Request((path,), limit=10**4))
    assert {one.id for one in chosen} == {photo_id(number) for number in range(3000)}
    assert 0 < len(rejected) < 400
    reasons = " ".join(one.reason for one in rejected)
    assert "is a quote not closed?" in reasons
    assert "has more than 262,144 bytes" in reasons


def test_memory_does_not_grow_with_the_table(tmp_path):
    path = write_table(tmp_path / "photos.tsv000", [row(number) for number in range(100)])
    body = path.read_bytes().split(b"\n", 1)[1]
    small = Request((path,), limit=10)
    choose(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with path.open("ab") as file:
        for _ in range(200):
            file.write(body)
    assert choose(small)[2] == 100 * 201
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    {
        b"": "has no header; give photos.tsv000",
        b"photo_id\tkeyword\nx\ty\n": "has no column photo_image_url; give photos.tsv000",
        b"photo_image_url\nx\n": "has no column photo_id",
        b"photo_id,photo_image_url\n": "none of 0 rows in",
        b"photo_id,photo_image_url\nbad,x\n": "photos:2: the row's photo_id 'bad' is not 11 letters",
        b"x" * 10**6: "has no header",
        b"photo_id\rphoto_image_url\n": "has no header",
        b"PK\x03\x04\x00\n": "is an archive; unpack it, and give the photos.tsv000 in it",
    }.items(),
)
def test_a_file_that_is_no_table_of_photographs(tmp_path, content, message):
    (tmp_path / "photos").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        choose(Request((tmp_path / "photos",)))


def test_captions_need_their_column(tmp_path):
    columns = [name for name in COLUMNS if name != "ai_description"]
    table = write_table(tmp_path / "photos.tsv000", [row(1)], columns)
    with pytest.raises(UserError, match="has no column ai_description"):
        choose(Request((table,), captions="ai"))
    assert len(choose(Request((table,), captions="photographer"))[0]) == 1


def test_conditions_that_no_row_meets(tmp_path):
    table = write_table(tmp_path / "photos.tsv000", [row(1), row(3)])
    with pytest.raises(UserError, match=r"none of 2 rows in .*photos.tsv000 meets --where 'portrait'"):
        choose(Request((table,), where="portrait"))


def test_tables_are_named_by_file_glob_and_folder(tmp_path, monkeypatch):
    for name in ("photos.tsv000", "photos.tsv001", "keywords.tsv000", "odd[1].tsv000"):
        (tmp_path / name).touch()
    both = [tmp_path / "photos.tsv000", tmp_path / "photos.tsv001"]
    assert tables_of(f"unsplash:{tmp_path}/photos.tsv000") == both[:1]
    assert tables_of(f"unsplash:{tmp_path}/photos.tsv*") == both
    assert tables_of(f"unsplash:{tmp_path}") == both
    assert tables_of(f"unsplash:{tmp_path}/odd[1].tsv000") == [tmp_path / "odd[1].tsv000"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables_of("unsplash:~/photos.tsv000") == both[:1]
    for missing in (f"unsplash:{tmp_path}/nothing*", "unsplash:"):
        with pytest.raises(UserError, match="names no file; give the table"):
            tables_of(missing)


@pytest.mark.parametrize(
    "change", [{"limit": 0}, {"limit": 10**7}, {"width": 10}, {"width": 10**5}, {"seed": -1}, {"seed": 2**64}]
)
def test_settings_out_of_range(tmp_path, change):
    with pytest.raises(UserError, match=f"--{next(iter(change))} .* is outside"):
        unsplash.fetch(Request((), **change), tmp_path, False, print)


@pytest.fixture
def server(monkeypatch):
    server = PhotoServer()
    monkeypatch.setenv(ALSO_FROM, server.address)
    yield server
    server.close()


@pytest.fixture
def table(tmp_path, server):
    """Forty invented photographs that the server serves."""
    rows = []
    for number in range(40):
        server.add(f"/photo-{number}", jpeg(number, 160, 120))
        rows.append(row(number, photo_image_url=server.url(f"/photo-{number}")))
    return write_table(tmp_path / "photos.tsv000", rows)


def prepare(dataset, request, prune=False, sources=()):
    fetch = partial(unsplash.fetch, request, prune=prune, progress=lambda *_: None, limits=QUICK)
    return ingest([*sources], dataset, prune=prune, fetch=fetch)


def test_a_dataset_with_captions_and_credits(tmp_path, server, table):
    dataset = tmp_path / "dataset"
    summary = prepare(dataset, Request((table,), limit=12, width=800, captions="ai"))
    photos = read_manifest(dataset)
    assert len(photos) == 12
    assert summary.rejected == []
    for photo in photos:
        number = int(re.search(r"unsplash/.(\d{8}).Z\.jpg", photo.source)[1])
        text = f"green hill number {number}" if number % 7 else ""
        assert photo.captions == (text,)
        assert photo.caption_source == f"metadata.jsonl: {'ai_description' if text else 'no caption'}"
        assert photo.credit == Credit(
            f"Zoë Invented {number % 5}", f"https://unsplash.example/photos/{photo_id(number)}"
        )
        assert (dataset / photo.file).read_bytes() == jpeg(number, 160, 120)
    assert all("?w=800&fit=max&fm=jpg&q=85" in path for path, _ in server.requests)
    assert any(photo.source.startswith("unsplash/-") for photo in photos)


@pytest.mark.parametrize("captions", ["photographer", "none"])
def test_captions_that_are_not_there_are_empty_and_said(tmp_path, table, captions):
    summary = prepare(tmp_path / "dataset", Request((table,), limit=10, captions=captions))
    texts = [photo.captions[0] for photo in summary.photos]
    num_empty = texts.count("")
    assert num_empty == 10 if captions == "none" else 0 < num_empty < 10
    note = "no captions were asked for" if captions == "none" else f"{num_empty} of 10 photographs have no photo_desc"
    assert any(note in text for text in summary.warnings)


def test_a_table_of_ids_and_addresses_alone_is_enough(tmp_path, server):
    url = server.add("/a", jpeg(1, 160, 120))
    table = write_table(tmp_path / "photos.tsv000", [row(1, photo_image_url=url)], ("photo_id", "photo_image_url"))
    [photo] = prepare(tmp_path / "dataset", Request((table,))).photos
    assert (photo.captions, photo.credit) == (("",), Credit("", url))


def test_a_caption_of_the_users_own_copy_is_taken_and_the_credit_stays(tmp_path, server, table):
    request = Request((table,), limit=1)
    number = int(ids(request)[0][1:9])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.jpg").write_bytes(jpeg(number, 160, 120))
    (tmp_path / "mine" / "x.txt").write_text("my hill")
    dataset = tmp_path / "dataset"
    prepare(dataset, request)
    [photo] = prepare(dataset, request, sources=[tmp_path / "mine"]).photos
    assert photo.captions == ("my hill",)
    assert photo.credit.photographer == f"Zoë Invented {number % 5}"


def test_a_larger_limit_downloads_only_what_is_new(tmp_path, server, table):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=5, captions="ai")
    few = prepare(dataset, request).photos
    assert len(server.requests) == 5
    many = prepare(dataset, replace(request, limit=15)).photos
    assert len(server.requests) == 15
    assert {photo.sha256 for photo in few} < {photo.sha256 for photo in many}
    assert len(many) == 15
    assert prepare(dataset, replace(request, limit=15)).photos == many
    assert len(server.requests) == 15


def test_photographs_of_an_earlier_draw_stay_until_they_are_pruned(tmp_path, server, table):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=8, captions="ai", seed=1)
    prepare(dataset, request)
    other = replace(request, seed=2)
    both = {*ids(request), *ids(other)}
    summary = prepare(dataset, other)
    assert len(summary.photos) == len(both) > 8
    assert all(photo.credit.photographer for photo in summary.photos)
    assert f"{len(both) - 8} photographs of earlier draws" in " ".join(summary.warnings)
    pruned = prepare(dataset, other, prune=True)
    assert {photo.source for photo in pruned.photos} == {f"unsplash/{name}.jpg" for name in ids(other)}
    assert len(list((dataset / "downloads" / "unsplash").glob("*.jpg"))) == 8
    assert len(list((dataset / "images").iterdir())) == 8


@pytest.mark.parametrize(("link", "target"), [("downloads", "moved"), ("downloads/unsplash", "../images")])
def test_nothing_behind_a_link_is_pruned(tmp_path, server, table, link, target):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=2, captions="ai")
    prepare(dataset, request)
    (dataset / link).rename(dataset / "moved")
    (dataset / link).symlink_to(target)
    # as long as a photograph's id
    (dataset / "images" / "ab-12345678.jpg").write_text("precious")
    with pytest.raises(UserError, match=f"{link} is a link where a dataset keeps a folder"):
        prepare(dataset, request, prune=True)
    assert (dataset / "images" / "ab-12345678.jpg").read_text() == "precious"


@pytest.mark.parametrize("form", ["{}.jpg", ".{}.jpg.part", ".{}.jpg.note"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_no_download(tmp_path, server, table, form, make):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=4, captions="ai", seed=1)
    name, *others = ids(request)
    place = dataset / "downloads" / "unsplash" / form.format(name)
    place.parent.mkdir(parents=True)
    make(place)
    summary = prepare(dataset, request)
    assert [item.reason for item in summary.rejected if "move it away" in item.reason] == [
        f"{place} is no file; move it away"
    ]
    assert {photo.source for photo in summary.photos} == {f"unsplash/{other}.jpg" for other in others}
    assert f"{name}.jpg" not in (place.parent / "metadata.jsonl").read_text()
    # nor is it in the way of another draw
    assert prepare(dataset, replace(request, seed=2, limit=2), prune=True).photos
    assert not os.path.lexists(place) or place.is_dir()


def test_a_photograph_that_fails_this_time_is_not_pruned(tmp_path, server, table):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=4)
    before = prepare(dataset, request).photos
    shutil.rmtree(dataset / "downloads")
    del server.files[f"/photo-{int(ids(request)[0][1:9])}"]
    assert prepare(dataset, request, prune=True).photos == before


def test_photographs_that_fail_are_left_out_with_their_reason(tmp_path, server, table):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=6)
    gone, broken = (int(name[1:9]) for name in ids(request)[:2])
    del server.files[f"/photo-{gone}"]
    server.add(f"/photo-{broken}", lambda handler, num: handler.send(503))
    summary = prepare(dataset, request)
    assert len(summary.photos) == 4
    listed = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    assert [(one["path"].partition("?")[0], one["reason"]) for one in listed] == [
        (server.url(f"/photo-{gone}"), "the server answers 404 Not Found"),
        (server.url(f"/photo-{broken}"), "the server answers 503 Service Unavailable (tried 2 times)"),
    ]
    # the next call asks for them again, and for nothing else
    num = len(server.requests)
    del server.behaviours[f"/photo-{broken}"]
    assert len(prepare(dataset, request).photos) == 5
    assert len(server.requests) == num + 2


def test_if_all_fail_it_is_an_error(tmp_path, server, table, monkeypatch):
    server.files.clear()
    with pytest.raises(
        UserError, match=r"none of 3 photographs can be downloaded; the first is http.*: .* 404 Not Found"
    ):
        prepare(tmp_path / "dataset", Request((table,), limit=3))
    # nothing is there yet of that width
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    with pytest.raises(UserError, match="404 Not Found; downloads do not use the proxy of HTTPS_PROXY"):
        prepare(tmp_path / "dataset", Request((table,), limit=3, width=800))


def test_what_a_captioner_wrote_stays_where_the_table_has_nothing(tmp_path, table):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=10)
    photos = prepare(dataset, request).photos
    assert not any(is_human(photo) for photo in photos)
    blip = {"captions": ("a hill",), "caption_source": "captioner blip", "captioner": "{}"}
    write_manifest(dataset, [replace(photo, **blip) for photo in photos])
    again = {photo.source: photo for photo in prepare(dataset, replace(request, limit=12)).photos}
    assert [again[photo.source].captions for photo in photos] == [("a hill",)] * 10
    assert len(again) == 12
    # a description that is asked for is somebody's own
    described = prepare(dataset, replace(request, limit=12, captions="photographer")).photos
    assert {photo.captions[0][:6] for photo in described} == {"A hill", "a hill", ""}


def test_another_width_is_refused(tmp_path, table):
    dataset = tmp_path / "dataset"
    prepare(dataset, Request((table,), limit=3))
    with pytest.raises(UserError, match="were downloaded with --width 1600; give the same width, or another dataset"):
        prepare(dataset, Request((table,), limit=3, width=800))
    (dataset / "downloads" / "unsplash" / ".asked.json").write_text("{")
    with pytest.raises(UserError, match=r"delete .*downloads/unsplash to download its photographs again"):
        prepare(dataset, Request((table,), limit=3))


def test_a_table_beside_a_folder(tmp_path, table):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "hill_1.jpg").write_bytes(jpeg(1000))
    dataset = tmp_path / "dataset"
    summary = prepare(dataset, Request((table,), limit=3), sources=[tmp_path / "mine"])
    assert sorted(photo.source.split("/")[0] for photo in summary.photos) == ["mine", *["unsplash"] * 3]
    # later, the folder alone: what was downloaded stays
    assert len(ingest([tmp_path / "mine"], dataset).photos) == 4
    assert len(ingest([tmp_path / "mine"], dataset, prune=True).photos) == 1


def test_a_dataset_that_was_moved_goes_on(tmp_path, server, table):
    prepare(tmp_path / "dataset", Request((table,), limit=5))
    (tmp_path / "dataset").rename(tmp_path / "moved")
    summary = prepare(tmp_path / "moved", Request((table,), limit=8))
    assert len(summary.photos) == 8
    assert len(server.requests) == 8
    assert {photo.source.split("/")[0] for photo in summary.photos} == {"unsplash"}


def test_a_damaged_metadata_file_is_written_anew(tmp_path, table):
    dataset = tmp_path / "dataset"
    request = Request((table,), limit=5, captions="ai")
    before = prepare(dataset, request).photos
    metadata = dataset / "downloads" / "unsplash" / "metadata.jsonl"
    metadata.write_bytes(b'[]\n{"file_name": "../../x.jpg"}\n{"file_name": 3}\n\xff{\n' + metadata.read_bytes()[:50])
    assert prepare(dataset, request).photos == before


def test_a_link_or_a_file_in_place_of_the_downloads_is_refused(tmp_path, table):
    dataset = tmp_path / "dataset"
    (tmp_path / "elsewhere").mkdir()
    dataset.mkdir()
    (dataset / "downloads").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to"):
        prepare(dataset, Request((table,), limit=3))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (dataset / "downloads").unlink()
    (dataset / "downloads").touch()
    with pytest.raises(UserError, match="is a file where a dataset keeps a folder; move it away"):
        prepare(dataset, Request((table,), limit=3))
