"""Drawn images explain themselves: file names, A1111's parameters in the PNG, the folder's record and page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.inference.gallery import (
    MAX_SLUG_BYTES,
    MAX_SLUG_CHARS,
    PAGE_NAME,
    RECORD_NAME,
    Drawn,
    check_folder,
    file_name,
    read_drawn,
    save_png,
    slug,
    write_drawn,
    write_page,
)
from safelight.untrusted import UnsafeFile

EXAMPLE = Drawn("a.png", "a red barn", 'blurry, "dark"', 300, 7, 7.5, 25, "dpm++", 512, 640)


def images_of(folder: Path, *drawn: Drawn) -> list[Drawn]:
    for number, image in enumerate(drawn):
        save_png(Image.new("RGB", (16, 16), (40 * number, 90, 200)), folder / image.file, image.parameters("m"))
    return list(drawn)


def test_parameters_have_the_web_uis_form():
    assert EXAMPLE.parameters("barns step 300", "0123456789", clip_skip=2) == (
        "a red barn\n"
        'Negative prompt: blurry, "dark"\n'
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 7.5, Seed: 7, Size: 512x640, "
        "Model hash: 0123456789, Model: barns step 300, Clip skip: 2, Version: Safelight 0.1.0"
    )
    # modules/sd_hijack_clip.py joins them so, and its writer quotes what has a comma or a colon
    words = EXAMPLE.parameters("m", words={"faded": "a" * 64, "bad-hands": "b" * 64})
    assert f'Model: m, TI hashes: "faded: {"a" * 12}, bad-hands: {"b" * 12}", Version' in words
    plain = dataclasses.replace(EXAMPLE, negative_prompt="", sampler="ddim", cfg=4.0)
    # values that hold its separators are quoted, as JSON
    assert plain.parameters('a: "b", c').split("\n") == [
        "a red barn",
        'Steps: 25, Sampler: DDIM, CFG scale: 4, Seed: 7, Size: 512x640, Model: "a: \\"b\\", c", '
        "Version: Safelight 0.1.0",
    ]


def test_the_web_uis_reader_finds_every_value():
    """Its regular expression (modules/infotext_utils.py, re_param), over the last line."""
    line = EXAMPLE.parameters("x, y: z").splitlines()[-1]
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
    assert json.loads(found["Model"]) == "x, y: z"
    assert (found["Steps"], found["CFG scale"], found["Seed"], found["Size"]) == ("25", "7.5", "7", "512x640")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a Red barn, in the SNOW!", "a-red-barn-in-the-snow"),
        ("CON: <aux>/../\\..|?*\0\x1b[31m", "con-aux-31m"),
        ("été à Paris", "été-à-paris"),
        ("红色 谷仓", "红色-谷仓"),
        ("...  ", ""),
        ("", ""),
        ("word " * 50, "word-word-word-word-word-word-word-word"),
        ("x" * 300, "x" * MAX_SLUG_CHARS),
        ("仓" * 300, "仓" * (MAX_SLUG_BYTES // 3)),
        ("\ud800\udfff", ""),
    ],
)
def test_names_tell_the_prompt_on_every_system(prompt, words, tmp_path):
    assert slug(prompt) == words
    name = file_name("step300-seed7", 4, prompt)
    assert name == f"step300-seed7-004{'-' * bool(words)}{words}.png"
    assert len(name.encode()) < 120
    assert not set(name) & set('<>:"/\\|?* ')
    (tmp_path / name).touch()


def test_a_png_holds_its_parameters_and_replaces_a_link(tmp_path):
    mine = tmp_path / "mine.jpg"
    mine.write_bytes(b"precious")
    (tmp_path / "a.png").symlink_to(mine)
    for prompt in ("a barn", "été 漢字", "undecodable \udce9"):
        drawn = dataclasses.replace(EXAMPLE, prompt=prompt)
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", drawn.parameters("m"))
        expected = drawn.parameters("m").replace("\udce9", "\\udce9")
        assert Image.open(tmp_path / "a.png").text["parameters"] == expected
    assert mine.read_bytes() == b"precious"


def test_the_record_goes_on_and_drops_what_is_gone_or_invalid(tmp_path):
    assert read_drawn(tmp_path) == []
    drawn = images_of(tmp_path, EXAMPLE, dataclasses.replace(EXAMPLE, file="b.png", step=-1, cut_after="the end"))
    write_drawn(tmp_path, drawn)
    assert read_drawn(tmp_path) == drawn
    (tmp_path / "a.png").unlink()
    assert read_drawn(tmp_path) == drawn[1:]

    outside = tmp_path.parent / "outside.png"
    outside.touch()
    (tmp_path / "link.png").symlink_to(outside)
    os.mkfifo(tmp_path / "pipe.png")
    good = dataclasses.asdict(drawn[1])
    bad = [
        {"file": "../outside.png"},
        {"file": str(outside)},
        {"file": "link.png"},
        {"file": "pipe.png"},
        {"file": ""},
        {"file": 3},
        {"step": True},
        {"seed": "x"},
        {"cfg": None},
        {"prompt": []},
        {"more": 1},
    ]
    rows = [{**good, **change} for change in bad]
    (tmp_path / RECORD_NAME).write_text(json.dumps({"images": ["no row", None, {}, *rows, good]}))
    assert read_drawn(tmp_path) == drawn[1:]
    for text in ("{}", '{"images": 3}'):
        (tmp_path / RECORD_NAME).write_text(text)
        assert read_drawn(tmp_path) == []
    for text in ("[1]", "{", "[" * 100_000, '{"images": ' + "9" * 5000 + "}"):
        (tmp_path / RECORD_NAME).write_text(text)
        with pytest.raises(UnsafeFile, match=RECORD_NAME):
            read_drawn(tmp_path)


@pytest.mark.parametrize("name", [RECORD_NAME, PAGE_NAME])
def test_what_a_link_leads_to_is_not_shown_to_whoever_gets_the_folder(tmp_path, name):
    gallery, secret = tmp_path / "gallery", tmp_path / "secret"
    for folder in (gallery, secret):
        folder.mkdir()
        images_of(folder, EXAMPLE)
    write_drawn(secret, [EXAMPLE])
    write_page(secret, "secret", [EXAMPLE])
    write_drawn(gallery, [EXAMPLE])
    (gallery / name).unlink(missing_ok=True)
    (gallery / name).symlink_to(f"../secret/{name}")
    with pytest.raises(UserError, match=f"gallery/{name} is a link to .*secret/{name}, outside .*: delete it, or name"):
        check_folder(gallery)
    if name == RECORD_NAME:
        with pytest.raises(UnsafeFile, match="leads out of this folder"):
            read_drawn(gallery)
    (gallery / name).unlink()
    # one that stays inside is fine
    write_drawn(gallery, [EXAMPLE])
    (gallery / PAGE_NAME).unlink(missing_ok=True)
    (gallery / RECORD_NAME).rename(gallery / "mine.json")
    (gallery / RECORD_NAME).symlink_to("mine.json")
    check_folder(gallery)
    assert read_drawn(gallery) == [EXAMPLE]


@pytest.mark.parametrize("name", [RECORD_NAME, PAGE_NAME])
def test_a_folder_in_the_place_of_a_gallerys_file_is_refused_before_anything_is_drawn(tmp_path, name):
    write_drawn(tmp_path, images_of(tmp_path, EXAMPLE))
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(UnsafeFile, match=f"{name} is a folder where a folder of images keeps a file; move it away"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", [b"\xe9.png", b"a \xff#.png"])
def test_a_page_links_to_a_file_whose_name_is_no_text(tmp_path, name):
    drawn = images_of(tmp_path, dataclasses.replace(EXAMPLE, file=os.fsdecode(name)))
    html = write_page(tmp_path, "run", drawn).read_text()
    (url,) = re.findall(r'href="\./([^"]*)"', html)
    assert unquote_to_bytes(url) == name


def test_the_page_is_a_grid_of_prompts_and_steps(tmp_path):
    drawn = images_of(
        tmp_path,
        dataclasses.replace(EXAMPLE, file="base.png", step=-1),
        EXAMPLE,
        dataclasses.replace(EXAMPLE, file="seed 8#.png", seed=8),
        dataclasses.replace(EXAMPLE, file="other.png", prompt="<script>alert(1)</script>", cut_after="...the <end>"),
    )
    html = write_page(tmp_path, "a <run>", drawn).read_text()
    assert html.startswith("<!doctype html>")
    # three columns: base, step 300 with seed 7, and with seed 8; a row of pictures for each of two prompts
    assert re.findall(r'<th scope="col"><div>([^<]*)</div><div>([^<]*)</div>', html) == [
        ("base model", "seed 7"),
        ("step 300", "seed 7"),
        ("step 300", "seed 8"),
    ]
    assert html.count("<tbody>") == 1
    assert [row.count("<img") for row in re.findall(r"<tr><td[ >].*?</tr>", html)] == [3, 1]
    assert "(cut after “...the &lt;end&gt;”)" in html
    assert "<script>alert" not in html
    assert "a &lt;run&gt;" in html
    # sent alone, it still shows the pictures; beside them, it links to them
    assert 'src="data:image/webp' in html
    assert re.findall(r'href="(\./[^"]*)"', html) == ["./base.png", "./a.png", "./seed%208%23.png", "./other.png"]
    assert (tmp_path / PAGE_NAME).is_file()


def test_files_of_somebody_else_are_not_replaced(tmp_path):
    page, record = tmp_path / PAGE_NAME, tmp_path / RECORD_NAME
    check_folder(tmp_path)
    page.write_text("<!doctype html><title>My homepage</title>")
    with pytest.raises(UserError, match=r"index\.html is not a page of Safelight's; name another folder with -o"):
        check_folder(tmp_path)
    page.unlink()
    for text in ("{}", '{"images": ["cat.jpg"]}', '{"images": [], "more": 1}', "[1]", "{"):
        record.write_text(text)
        with pytest.raises(UserError, match=f"{RECORD_NAME}.*name another folder with -o"):
            check_folder(tmp_path)
    record.unlink()
    drawn = images_of(tmp_path, EXAMPLE)
    write_page(tmp_path, "run", drawn)
    check_folder(tmp_path)
    write_drawn(tmp_path, drawn)
    # a page of an earlier version
    page.write_text("<!doctype html>")
    check_folder(tmp_path)
