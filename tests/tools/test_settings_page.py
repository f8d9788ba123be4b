"""docs/settings.md is what its generator writes, and every setting has a row of other trainers' names."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from tools.settings_page import PAGE, missing_rows, page, read_peers, values_of


def test_every_setting_has_a_row_of_names():
    assert missing_rows(read_peers()) == [], "add the rows to tools/settings_peers.toml"


def test_a_setting_without_a_row_and_a_row_without_a_setting_are_told():
    peers = read_peers()
    del peers["train"]["batch_size"]
    peers["train"]["gone"] = ["", "", ""]
    peers["run"]["seed"] = ["seed"]
    assert missing_rows(peers) == [
        "train.batch_size has no row in settings_peers.toml",
        "train.gone in settings_peers.toml is no setting",
        "run.seed in settings_peers.toml needs 3 names",
    ]


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tools.settings_page`"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Annotated[int, Field(ge=1, le=64)], "whole number, 1 to 64"),
        (Annotated[float, Field(gt=0)], "number, above 0"),
        (Annotated[float, Field(ge=0, lt=1)], "number, 0 or more, below 1"),
        (int | list[int], "whole number or list of whole numbers"),
        (Literal["auto", True, False], "`auto`, `true`, `false`"),
        (
            tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
            "2 numbers, each 0 or more, below 1",
        ),
        (Annotated[str, Field(max_length=2000)], "text, at most 2,000 characters"),
        (bool | None, "`true`, `false`"),
    ],
)
def test_values_in_words(kind, words):
    assert values_of(kind) == words
