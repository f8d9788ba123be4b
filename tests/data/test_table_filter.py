"""Conditions of `--where`: what they mean, and that nothing in them is evaluated."""

from __future__ import annotations

import re

import pytest

from safelight.data.sources.table_filter import columns_of, holds, parse_conditions
from safelight.data.sources.unsplash import DERIVED
from safelight.errors import UserError

ROW = {
    "photo_width": "4000",
    "photo_height": "3000",
    "exif_iso": "",
    "exif_aperture_value": "2.8",
    "exif_camera_make": "Canon",
    "exif_camera_model": "EOS 5D Mark IV",
    "photo_location_country": "Cote d'Ivoire",
    "stats_views": "1000000",
}


def meets(text, row=ROW):
    conditions = parse_conditions(text)
    columns_of(conditions, row, DERIVED)
    return all(holds(condition, row, DERIVED) for condition in conditions)


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "": True,
        "  ": True,
        "photo_width >= 1600": True,
        "photo_width>=4000": True,
        "photo_width > 4000": False,
        "photo_width <= 4e3": True,
        "photo_width < 4000": False,
        "photo_width = 4000.0": True,
        "photo_width == 4000": True,
        "photo_width != 4000": False,
        # as numbers, not as texts
        "stats_views > 999": True,
        # a camera that did not say so
        "exif_iso <= 100": False,
        "exif_iso > 0": False,
        "exif_iso = ''": True,
        'exif_iso != ""': False,
        "exif_camera_make = canon": True,
        "exif_camera_make != NIKON": True,
        "camera ~ eos": True,
        "camera ~ canon eos 5d": True,
        'camera ~ "Canon  EOS"': False,
        "camera ~ 'mark iv'": True,
        "camera ~ nikon": False,
        'photo_location_country = "Cote d\'Ivoire"': True,
        "landscape": True,
        "portrait": False,
        "square": False,
        "shorter_side >= 3000 and landscape AND exif_aperture_value < 4": True,
        "shorter_side > 3000 and landscape": False,
        "landscape and portrait": False,
        "photo_location_country ~ 'and'": False,
    }.items(),
)
def test_what_a_condition_means(text, expected):
    assert meets(text) == expected


@pytest.mark.parametrize(
    ("width", "height", "shapes"),
    [("3", "2", ["landscape"]), ("2", "3", ["portrait"]), ("2", "2", ["square"]), ("", "2", []), ("x", "nan", [])],
)
def test_shapes(width, height, shapes):
    row = {"photo_width": width, "photo_height": height}
    assert [name for name in ("landscape", "portrait", "square") if meets(name, row)] == shapes
    assert meets("shorter_side >= 2", row) == bool(shapes)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "photo_with > 3": "there is no column photo_with; did you mean photo_width?",
        "lanscape": "there is no column lanscape; did you mean landscape?",
        "zzz = 1": "there is no column zzz; there are landscape, portrait, square, shorter_side, camera, photo_width",
        "photo_width": "photo_width is compared with nothing; write photo_width = VALUE",
        "photo_width >": "'photo_width >' is no condition; write COLUMN = | != | < | <= | > | >= | ~ VALUE, joined by",
        "> 3": "'> 3' is no condition",
        "photo_width 3": "'photo_width 3' is no condition",
        "photo_width > 3 < 4": "'photo_width > 3 < 4' is no condition",
        "landscape and": "'' is no condition",
        "landscape or portrait": "'landscape or portrait' is no condition",
        "and": "'' is no condition",
        "photo_width > wide": "'wide' is no number, which photo_width > needs",
        "camera ~ 'canon": '"\'canon" cannot be read; quote it',
        "country = Cote d'Ivoire": '"\'Ivoire" cannot be read; quote it',
        "camera ! canon": "'! canon' cannot be read; quote it",
        "__import__('os').system('touch /tmp/x')": "is no condition",
        "x" * 2000: "--where has 2,000 characters (limit 1,000)",
    }.items(),
)
def test_what_cannot_be_read_is_said(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        meets(text)
