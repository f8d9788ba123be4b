"""Texts of a megabyte that would take hours where a pattern goes back over what it has read."""

import signal
from contextlib import contextmanager

import pytest

from safelight.data.headers import check, jpeg_without_metadata
from safelight.data.photo import Photo
from safelight.data.prepare.caption_words import caption_words
from safelight.data.sources.caption import is_camera_name
from safelight.data.sources.folder_settings import kohya_entry, looks_like_kohya
from safelight.data.sources.tables import csv_rows
from safelight.data.sources.tag_text import parse_tags, split_tags
from safelight.errors import UserError
from safelight.trainer.models.prompt_weights import parse_weights

MIB = 2**20
# of processor time; each takes less than 1
LIMIT_S = 5
REPEATED = ("1", ":", " ", "a", ".1", "(a)", " BREAK")


@contextmanager
def limited():
    def stop(*_):
        raise AssertionError(f"takes more than {LIMIT_S} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    try:
        yield
    except UserError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def long(start: str, part: str, end: str, num: int = MIB) -> str:
    return start + part * ((num - len(start) - len(end)) // len(part)) + end


@pytest.mark.parametrize("part", REPEATED)
def test_tags_behind_a_caption(part):
    with limited():
        split_tags(long("x | a:", part, "x"))


@pytest.mark.parametrize("part", REPEATED)
def test_weights_in_a_prompt(part):
    with limited():
        parse_weights(long("(a:", part, "x", MIB // 4))


@pytest.mark.parametrize("part", ["1", " ", "a"])
def test_names_tags_and_words(part):
    text = long("10_", part, "!")
    with limited():
        parse_tags(text)
    with limited():
        list(csv_rows(f"file_name,tags\na.png,{long('a:', part, 'x')[:131_000]}\n"))
    with limited():
        is_camera_name(text)
        kohya_entry(text)
        looks_like_kohya([text])
        caption_words([Photo("a.png", "", 1, 1, (text,), "", "")])


@pytest.mark.parametrize("end", [b"", b"\0"])
def test_filling_before_a_jpegs_marker(end):
    content = b"\xff\xd8" + b"\xff" * MIB + end
    with limited():
        check(content)
    with limited():
        jpeg_without_metadata(content)
