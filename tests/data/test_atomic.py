"""data/atomic.py: what has a name is deleted, whatever it is, and nothing that a link leads to."""

import pytest

from safelight.data.atomic import remove


@pytest.mark.parametrize("kind", ["nothing", "file", "folder", "link to a file", "link to a folder", "dangling link"])
def test_whatever_has_a_name_is_deleted_and_nothing_else(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").write_text("precious")
    place = tmp_path / "place"
    if kind == "file":
        place.touch()
    elif kind == "folder":
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "link").symlink_to(tmp_path / "mine")
        (place / "link").symlink_to(tmp_path / "mine" / "photo")
    elif kind != "nothing":
        targets = {"link to a file": "mine/photo", "link to a folder": "mine", "dangling link": "none"}
        place.symlink_to(targets[kind])
    remove(place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "photo").read_text() == "precious"
