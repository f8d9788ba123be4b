"""Decode the texts that other programs write, in whatever encoding, and tell them from what is no text."""

from __future__ import annotations

import codecs
import unicodedata

# of random bytes, read as any encoding, a tenth or more are characters that nobody writes
_MIN_PER_UNWRITTEN = 20


def _unwritten(text: str) -> set[str]:
    """Return the characters of a text that people do not write."""
    # a set: tables have hundreds of millions of characters, of a few kinds
    kinds = ("Cc", "Cn", "Co", "Cs")
    return {char for char in set(text) if char not in "\t\n\r\f\v" and unicodedata.category(char) in kinds}


def is_caption(text: str) -> bool:
    """Return whether somebody may have written a decoded text.

    It has no NUL, and hardly any control characters and bytes without a meaning; a single one is damage.
    """
    unwritten = _unwritten(text) | {"\ufffd"}
    num_bad = sum(char in unwritten for char in text)
    return "\0" not in text and (num_bad < 2 or num_bad * _MIN_PER_UNWRITTEN <= len(text))


def _utf16_without_mark(content: bytes, is_utf8: bool) -> str | None:
    """Return the text of bytes that are UTF-16 beyond doubt, else None.

    Spaces, line ends and Latin letters have a zero byte, always on the same side; letters of one other alphabet share
    their high byte.
    """
    if len(content) % 2 or len(content) < 6:
        return None
    texts = []
    for low, encoding in ((0, "utf-16-le"), (1, "utf-16-be")):
        lows, highs = content[low::2], content[1 - low :: 2]
        num_high_bytes, num_zeros = len(set(highs)), highs.count(0)
        is_one_alphabet = num_high_bytes <= 1 + len(highs) // 4
        is_one_sided = num_zeros > 0 and lows.count(0) == 0 and (not is_utf8 or num_zeros > len(highs) // 2)
        if is_one_alphabet or is_one_sided:
            try:
                texts.append((num_high_bytes, content.decode(encoding)))
            except UnicodeDecodeError:
                continue
    texts = [(num, text) for num, text in texts if not _unwritten(text)]
    return min(texts)[1] if texts else None


def decode_text(content: bytes) -> tuple[str, str]:
    """Return (text, a note on its encoding or ""). Line ends are kept.

    Reads UTF-8, and what other programs write: UTF-8 and UTF-16 with a byte order mark, UTF-16 without one, and
    Windows-1252, which contains Latin-1. Never fails.
    """
    for mark, encoding, name in (
        (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
        (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
        (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
    ):
        if content.startswith(mark):
            try:
                return content.decode(encoding), ""
            except UnicodeDecodeError as error:
                note = f"is not {name} (byte {error.start}), although it starts like it; invalid bytes were replaced"
                return content.decode(encoding, errors="replace"), note
    try:
        text, bad = content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        text, bad = content.decode("utf-8", errors="replace"), error
    if bad or _unwritten(text):
        wide = _utf16_without_mark(content, is_utf8=bad is None)
        if wide is not None:
            return wide, "has no byte order mark; it was read as UTF-16: if letters are wrong, save it as UTF-8"
    if not bad:
        return text, ""
    what = f"is not UTF-8 (byte {bad.start})"
    # more letters beyond ASCII that are valid than not: UTF-8, damaged
    if sum(char > "\x7f" and char != "\ufffd" for char in text) > text.count("\ufffd"):
        return text, f"{what}; invalid bytes were replaced"
    # errors: five bytes mean nothing in Windows-1252
    text = content.decode("cp1252", errors="replace")
    return text, f"{what}; it was read as Windows-1252 (Latin-1): if letters are wrong, save it as UTF-8"
