"""docs/settings.md is what its generator writes, and every setting has a row of other trainers' names."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from safelight.trainer.config.names_elsewhere import SETTINGS, WITHOUT
from tools.settings_page import (
    OTHER_DEFAULTS,
    PAGE,
    PEER_NAMES,
    missing_rows,
    page,
    read_peers,
    tables,
    values_of,
)


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


def names_in(cell: str) -> list[str]:
    """Return the bare names of a cell of settings_peers.toml: no dashes, tables, brackets and words behind them."""
    parts = [part.split()[0] for part in cell.strip("()").split(", ") if part]
    return [part.lstrip("-").rpartition(".")[2] for part in parts]


def test_the_messages_and_the_page_give_a_name_one_meaning():
    """Names that messages translate stand in the page's row of the same setting, and those without one in none."""
    peers = {
        (table, setting): {name for cell in cells for name in names_in(cell)}
        for table, rows in read_peers().items()
        for setting, cells in rows.items()
    }
    # of diffusers' scripts or written from memory, which the page does not list; and our own in another table
    unlisted = {"scheduler", "num_train_epochs", "network_rank"}
    own = {setting for _, setting in peers}
    for name, place in SETTINGS.items():
        assert name in peers[place] or name in unlisted | own, f"{name} is not in the row of {'.'.join(place)}"
    plain = {
        name
        for rows in read_peers().values()
        for cells in rows.values()
        for cell in cells
        if not cell.startswith("(")
        for name in names_in(cell)
    }
    without = {name for row in WITHOUT for name in row.names}
    # optimizer_args holds the settings of several rows
    assert without & plain <= {"optimizer_args"}


def test_defaults_that_are_said_to_differ_do():
    peers = read_peers()
    for setting, (option, default) in OTHER_DEFAULTS.items():
        table, _, name = setting.partition(".")
        assert option.lstrip("-") in names_in(peers[table][name][PEER_NAMES.index("kohya")]), setting
        field = dict(tables())[table].model_fields[name]
        assert float(field.get_default()) != float(default), setting


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
