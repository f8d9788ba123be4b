"""Names and texts of others on one line of ours: what a file is called must not break it, nor steer the terminal."""

from __future__ import annotations

import os


def printable(text: str | os.PathLike) -> str:
    """Return the text with every character that does not print as its escape: a newline as \\n, a stray byte as \\udce9."""
    text = os.fspath(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def storable(text: str) -> str:
    """Return the text with what UTF-8 cannot hold, the stray bytes of a file name among it, as escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def counted(num: int, name: str) -> str:
    """Return a number with what it counts: 1 image, 2 images, 1,000 images."""
    return f"{num:,} {name}{'s' * (num != 1)}"
