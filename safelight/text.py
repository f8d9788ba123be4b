"""Text for people and files: escaping what would break a line or cannot be encoded, and counting nouns."""

from __future__ import annotations

import os
import unicodedata

from safelight.units import GIB, MIB


def printable(text: str | os.PathLike) -> str:
    """Return the text with non-printable characters escaped: a newline as \\n, an undecodable byte as \\udce9.

    File names may contain anything; escaped, they can neither break a line nor send control codes to the terminal.
    """
    text = os.fspath(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """Return the text with non-printable characters escaped, except its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(text: str, max_characters: int = 120) -> str:
    """Return the text with its middle replaced by an ellipsis if it is longer than max_characters."""
    if len(text) <= max_characters:
        return text
    head = max_characters // 2
    return f"{text[:head]}…{text[len(text) - (max_characters - head - 1) :]}"


def storable(text: str) -> str:
    """Return the text with everything that UTF-8 cannot encode escaped, such as undecodable bytes of a file name."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def collapse(text: str) -> str:
    """Return the text stripped, with every run of white space and control characters replaced by one space.

    A lone surrogate, which JSON can contain but UTF-8 cannot encode, becomes U+FFFD.
    """
    if not text.isprintable():
        kinds = {"Cc": " ", "Cs": "\ufffd"}
        text = "".join(kinds.get(unicodedata.category(char), char) for char in text)
    return " ".join(text.split())


def counted(num: int, name: str) -> str:
    """Return a number followed by its noun, in the plural if need be: 1 image, 2 batches, 1,000 images."""
    ending = "es" if name.endswith(("s", "tch")) else "s"
    return f"{num:,} {name}{ending * (num != 1)}"


def size(num_bytes: int) -> str:
    """Return a number of bytes in GiB, or in MiB below one: 9.62 GiB, 34.5 MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
