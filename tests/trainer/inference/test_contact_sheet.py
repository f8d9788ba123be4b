"""Contact sheets: every picture in its place under a legible label, in sheets that viewers can open."""

import numpy as np
import pytest
from PIL import Image

from safelight.trainer.inference import contact_sheet
from safelight.trainer.inference.contact_sheet import SheetRow, write_sheets

MAX_PIXELS = 2_000_000
PAPER = (0xFB, 0xFA, 0xF8)
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]


@pytest.fixture
def picture(tmp_path):
    def make(colour, size=(64, 48)):
        path = tmp_path / f"{'-'.join(map(str, (*colour, *size)))}.png"
        Image.new("RGB", size, colour).save(path)
        return path

    return make


def colours_of(path) -> dict[tuple, int]:
    with Image.open(path) as sheet:
        values, counts = np.unique(np.asarray(sheet).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, value)): int(count) for value, count in zip(values, counts, strict=True)}


def test_every_picture_is_shown_whole_below_its_label(tmp_path, picture):
    rows = [SheetRow("a barn", tuple(map(picture, COLOURS[:2]))), SheetRow("a hen", tuple(map(picture, COLOURS[2:])))]
    (name,) = write_sheets(tmp_path, "sheet", ["base", "epoch 3\nstep 9"], rows, (64, 48))
    assert name == "sheet.png"
    found = colours_of(tmp_path / name)
    # enlarged by two, so that the label of a column has room
    assert [found[colour] for colour in COLOURS] == [128 * 96] * 4
    pixels = np.asarray(Image.open(tmp_path / name), np.int16)
    tops = [np.argwhere((pixels == colour).all(axis=2)).min(axis=0) for colour in COLOURS]
    assert tops[0][0] == tops[1][0] < tops[2][0] == tops[3][0]
    assert tops[0][1] == tops[2][1] < tops[1][1] == tops[3][1]
    # ink above the first picture of each row, and in both heads
    for y, x in tops:
        assert (pixels[y - 30 : y - 2, x : x + 60].sum(axis=2) < 400).any() or x > tops[0][1]
    heads = pixels[: tops[0][0] - 45]
    assert all((heads[:, x : x + 100].sum(axis=2) < 400).sum() > 50 for _, x in tops[:2])


def test_a_picture_that_cannot_be_read_is_a_frame_and_an_empty_place_is_paper(tmp_path, picture):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [SheetRow("x", (tmp_path / "broken.png", None, tmp_path / "missing.png", picture(COLOURS[0])))]
    write_sheets(tmp_path, "sheet", list("abcd"), rows, (64, 48))
    found = colours_of(tmp_path / "sheet.png")
    assert found[COLOURS[0]] == 128 * 96
    frames = found[0x6B, 0x64, 0x5F]
    assert 2 * 2 * (128 + 96 - 2) <= frames < 3 * 2 * (128 + 96 - 2)


def test_long_labels_stay_in_their_places(tmp_path, picture):
    path = picture(COLOURS[0])
    labels = ["a very long label " * 9, "\x1b[31mred \N{SNOWMAN} ein Löwe"]
    rows = [SheetRow(f"{'word ' * 200}\n{'unbroken' * 50}", (path, path))]
    write_sheets(tmp_path, "sheet", labels, rows, (64, 48))
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"), np.int16)
    # nothing but paper in the margins and the gap between the columns
    assert (pixels[:, :20] == PAPER).all()
    assert (pixels[:, -20:] == PAPER).all()
    assert (pixels[:40, 24 + 130 : 24 + 134] == PAPER).all()


def test_letters_that_the_font_lacks_lose_their_accents(monkeypatch):
    """Pillow's own font, on a system without others, would show a box in place of each."""
    monkeypatch.setattr(contact_sheet, "FONTS", ("no font has this name",))
    for function in (contact_sheet.label_font, contact_sheet._has_glyph):
        function.cache_clear()
    try:
        assert contact_sheet.legible("ein Löwe, é, 猫\n") == "ein Lowe, e, 猫\\n"
    finally:
        for function in (contact_sheet.label_font, contact_sheet._has_glyph):
            function.cache_clear()


def test_many_rows_are_laid_side_by_side_and_then_in_several_sheets(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_SHEET_PIXELS", MAX_PIXELS)
    for num, size in ((1, (512, 512)), (12, (512, 512)), (60, (64, 64)), (20, (4096, 64))):
        rows = [SheetRow(f"{number}", (None, None, None)) for number in range(num)]
        names = write_sheets(tmp_path, f"sheet{num}", ["a", "b", "c"], rows, size)
        assert (len(names) > 1) == (num == 60)
        for name in names:
            with Image.open(tmp_path / name) as sheet:
                assert sheet.width * sheet.height <= MAX_PIXELS
                assert num == 1 or 0.3 < sheet.width / sheet.height < 3


def test_of_several_sheets_each_row_is_on_one(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_SHEET_PIXELS", 60_000)
    rows = [SheetRow("x", (picture(colour),)) for colour in COLOURS]
    names = write_sheets(tmp_path, "sheet", ["a"], rows, (64, 48))
    assert names == [f"sheet-{number}.png" for number in range(1, len(names) + 1)]
    assert len(names) > 1
    shown = [colour for name in names for colour in COLOURS if colours_of(tmp_path / name).get(colour) == 128 * 96]
    assert shown == COLOURS
