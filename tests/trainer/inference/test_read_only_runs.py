"""A run on a read-only disk: what draws into it says so before anything is drawn."""

import errno
import shutil
from pathlib import Path

import pytest

from safelight.data import atomic
from safelight.errors import UserError
from safelight.trainer.inference import draw
from safelight.trainer.inference.draw import open_run, sample
from tests.called import call

SMALL = {"steps": 1, "width": 32, "height": 32}


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch) -> Path:
    """A run that takes no new file, and from which nothing can be drawn without failing this test."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (folder / "images").mkdir()
    create = atomic.tempfile.TemporaryFile

    def refuse(*arguments, dir, **options):
        if Path(dir).is_relative_to(folder):
            raise OSError(errno.EROFS, "Read-only file system")
        return create(*arguments, dir=dir, **options)

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(draw, "load_unet", lambda *arguments: pytest.fail("loaded"))
    return folder


def test_samples_go_elsewhere(run, tmp_path):
    with pytest.raises(
        UserError, match=r"images cannot be written \(Read-only file system\); name another place with -o"
    ):
        sample(open_run(run), ["a barn"], "last", run / "images", SMALL)
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        sample(open_run(run), ["a barn"], "last", tmp_path / "out", SMALL)


@pytest.mark.parametrize(
    "command", [["compare", "--num", "1"], ["grid", "--x", "cfg=1,2", "--prompt", "a barn"], ["evaluate", "--num", "1"]]
)
def test_pictures_that_are_kept_in_the_run_are_not_begun(run, command):
    with (run / "config.toml").open("r+") as file:
        text = file.read().replace("prompts = []", 'prompts = ["a barn"]')
        file.seek(0)
        file.write(text)
    name, *options = command
    call(name, str(run), *options).assert_refused(name, "cannot be written (Read-only file system); what is drawn")
