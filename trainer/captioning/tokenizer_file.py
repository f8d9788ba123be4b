"""Checks the tokenizer.json of a captioner: its parts may not lengthen a text without bounds, nor search it for ever.

tokenizers runs what the file says, and nothing interrupts it: sixty replacements of one letter by two make 2^60 letters
of one. A text's length is taken here as that of its NFKD form, which Unicode's normal forms and letter cases do not
lengthen; the others multiply it by a factor that the file shows. Regular expressions of pre-tokenizers are tried on the
prompt by prompt_child.py.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from pathlib import Path

from safelight.errors import UserError
from safelight.text import shortened

MAX_PARTS = 32
# ALBERT's parts have 36
MAX_GROWTH = 64
MAX_TOKEN_CHARACTERS = 1000
MAX_ADDED_CHARACTERS = 2**20
# factors of the parts that need no look at their settings. ByteLevel: each byte becomes a letter, some have an accent
_GROWTH = {
    "normalizer": {
        **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt"), 1),
        **{"BertNormalizer": 3, "ByteLevel": 8},
    },
    "pre_tokenizer": {
        **dict.fromkeys(("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation"), 1),
        **dict.fromkeys(("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"), 1),
        **{"ByteLevel": 8, "Metaspace": 2},
    },
    "post_processor": dict.fromkeys(("BertProcessing", "ByteLevel", "RobertaProcessing"), 1),
    "decoder": {
        **dict.fromkeys(("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Strip"), 1),
        # a space for the mark between words, which may be empty, or before a word
        **{"BPEDecoder": 2, "CTC": 2, "WordPiece": 2},
    },
}
_LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


class _Wrong(UserError):
    """What is wrong with a tokenizer.json, in words that follow its path."""


def check_tokenizer(values: dict, path: Path) -> None:
    """Raise UserError unless the parts of a tokenizer.json are known ones within bounds."""
    try:
        # what lengthens what: the pre-tokenizer gets the text of the normalizer
        for kinds in (("normalizer", "pre_tokenizer"), ("post_processor",), ("decoder",)):
            growth, num = 1, 0
            for kind in kinds:
                for part in _parts(kind, values.get(kind)):
                    growth, num = growth * _growth(kind, part), num + 1
                    if growth > MAX_GROWTH or num > MAX_PARTS:
                        raise _Wrong(f"its {kind} can make a text more than {MAX_GROWTH} times as long")
        added = values.get("added_tokens") or []
        if sum(len(str(token.get("content"))) for token in added) > MAX_ADDED_CHARACTERS:
            raise _Wrong(f"its added tokens have more than {MAX_ADDED_CHARACTERS:,} characters")
    except _Wrong as error:
        raise UserError(f"{path}: {error}; get this folder again, or use another model") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); get this folder again") from error


def check_vocabulary(tokenizer) -> None:
    """Raise ValueError if a tokenizer has a token that is too long: a caption has up to 1,024 tokens."""
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise ValueError(f"a token has {longest:,} characters, over the limit of {MAX_TOKEN_CHARACTERS:,}")


def _parts(kind: str, value: dict | None) -> list[dict]:
    """Return the parts of a sequence, at any depth."""
    if value is None:
        return []
    if value["type"] != "Sequence":
        return [value]
    return [part for child in value[_LISTS[kind]] for part in _parts(kind, child)]


def _growth(kind: str, part: dict) -> float:
    """Return how many times as long a part can make a text at most."""
    name = part["type"]
    if name == "Replace" and kind in ("normalizer", "decoder"):
        ((form, pattern),) = part["pattern"].items()
        if form == "String":
            return max(1, _length(part["content"]) / max(1, len(pattern)) + (not pattern))
        if kind == "decoder" or not _is_quick(pattern):
            raise _Wrong(f"its {kind} has the regular expression {shortened(pattern, 60)}, which may take for ever")
        # an empty match replaces nothing
        return 1 + _length(part["content"])
    if name == "Prepend" and kind == "normalizer":
        return 1 + _length(part["prepend"])
    if name == "Precompiled" and kind == "normalizer":
        return _precompiled(part["precompiled_charsmap"])
    if name == "TemplateProcessing" and kind == "post_processor":
        return max(
            _num_pieces(part["single"], part["special_tokens"]), _num_pieces(part["pair"], part["special_tokens"])
        )
    if name not in _GROWTH[kind]:
        raise _Wrong(f"its {kind} is of the kind {shortened(str(name), 60)}, which is not known")
    return _GROWTH[kind][name]


def _num_pieces(template: list[dict], special: dict) -> int:
    """Return how many sequences and special tokens a template puts together."""
    return sum(1 if "Sequence" in piece else len(special[piece["SpecialToken"]["id"]]["ids"]) for piece in template)


def _length(text: str) -> int:
    return len(unicodedata.normalize("NFKD", text))


def _precompiled(charsmap: str) -> int:
    """Return the length of the longest text that sentencepiece's table has for a character.

    The table: the size of a trie (4 bytes), the trie, and all texts, each with a zero behind it.
    """
    try:
        table = base64.b64decode(charsmap, validate=True)
    except binascii.Error as error:
        raise _Wrong(f"its normalizer's table is damaged ({error})") from None
    size = int.from_bytes(table[:4], "little")
    texts = table[4 + size :].decode("utf-8", errors="replace").split("\0")
    return max(1, *map(_length, texts))


def _is_quick(regex: str) -> bool:
    """Return whether a regular expression has no groups, and each of its alternatives at most one repetition."""
    plain = re.sub(r"\\[pP]\{\w+\}|\\.", "x", regex)
    plain = re.sub(r"\[[^\[\]]*\]", "x", plain)
    is_flat = not any(mark in plain for mark in "()[]\\")
    return is_flat and all(len(re.findall(r"[*+?{]", one)) <= 1 for one in plain.split("|"))
