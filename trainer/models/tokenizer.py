"""Loads the CLIP tokenizer of a model that somebody else may have made.

A tokenizer's files can name other files, bring regular expressions that never end, and claim any length. Only the
vocabulary, the merges and the special tokens are taken from them. They are checked and written into a temporary folder,
and transformers reads that.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from safelight.errors import UserError, first_line
from safelight.trainer.models.model_folder import model_file
from safelight.untrusted import read_bytes, read_json_object

# CLIP has 49,408 tokens; above 100,000 transformers asks the hub about them
MAX_TOKENS = 100_000
MAX_TOKEN_CHARS = 1000
MAX_BYTES = 2**24
# what CLIP's text encoders read; the least that leaves room for a token between the first and the last; the most
DEFAULT_LENGTH, MIN_LENGTH, MAX_LENGTH = 77, 3, 4096
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
# settings that change what the tokenizer returns, or that an export passes on
_CHOICES = {
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
    "split_special_tokens": (False, True),
    "add_prefix_space": (False, True),
    "do_lower_case": (False, True),
    "errors": ("replace",),
}


class _Wrong(UserError):
    """What is wrong with a tokenizer, in words that follow its folder's name."""


def load_tokenizer(folder: Path, part: str, max_positions: int | None = None, vocab_size: int | None = None):
    """Return the CLIPTokenizer in folder/part. folder: the model's, which no file may lie outside of.

    max_positions, vocab_size: of the text encoder, None if it will be made for the tokenizer. The tokenizer's length is
    at most max_positions, and that if the files say none. Raises UserError.
    """
    where = folder / part
    try:
        tokenizer = _load(folder, part, max_positions or DEFAULT_LENGTH, max_positions)
        _check_ids(tokenizer, vocab_size or len(tokenizer))
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not str(error.filename or "").startswith(str(where)):
            # the temporary copy could not be written, for example because the disk is full
            raise
        raise UserError(f"{where}: its tokenizer cannot be used: {error}; get this folder again") from None
    return tokenizer


def _load(folder: Path, part: str, default_length: int, max_length: int | None):
    from transformers import CLIPTokenizer

    def path(name: str) -> Path:
        return model_file(folder, os.path.join(part, name))

    def table(name: str) -> dict:
        return read_json_object(path(name), MAX_BYTES, clamp_ints=True) if path(name).exists() else {}

    settings = _settings(table("tokenizer_config.json"))
    length = settings.get("model_max_length", MAX_LENGTH + 1)
    # many files have 10^30 here, for no limit
    length = default_length if length > MAX_LENGTH else min(length, max_length or length)
    if length < MIN_LENGTH:
        raise _Wrong(f"its model_max_length is {length}, which leaves no room for a caption")
    settings["model_max_length"] = int(length)
    with tempfile.TemporaryDirectory(prefix="safelight-") as staged:

        def write(name: str, value: dict) -> None:
            if value:
                Path(staged, name).write_text(json.dumps(value), encoding="utf-8")

        write("tokenizer.json", _tokenizer_json(path, table("tokenizer.json")))
        write("tokenizer_config.json", settings)
        write("special_tokens_map.json", _special_tokens(table("special_tokens_map.json")))
        write("added_tokens.json", _ids(table("added_tokens.json")))
        try:
            tokenizer = CLIPTokenizer.from_pretrained(staged)
        # whatever the libraries make of tokens that contradict each other
        except Exception as error:
            raise _Wrong(first_line(error)) from error
    tokenizer.name_or_path = ""
    return tokenizer


def _token(value: object) -> str | dict:
    """Return a special token: its text, or a table with its text and how it is matched."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN_CHARS:
        raise _Wrong(f"a special token is {str(value)[:60]!r}, not a short text")
    if not isinstance(value, dict):
        return content
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _Wrong(f"the special token {content[:60]!r} has settings that are not true or false")
    return {"content": content, **flags}


def _marked(value: object) -> str | dict:
    """Return a special token as tokenizer_config.json has it, where tables are marked as tokens."""
    token = _token(value)
    return {"__type": "AddedToken", **token} if isinstance(token, dict) else token


def _special_tokens(values: dict, convert=_token) -> dict:
    """Return the special tokens of a special_tokens_map.json or, with `_marked`, of a tokenizer_config.json."""
    tokens: dict = {name: convert(values[name]) for name in _SPECIAL_TOKENS if values.get(name) is not None}
    for name in _TOKEN_LISTS:
        if value := values.get(name):
            if not isinstance(value, list) or len(value) > MAX_TOKENS:
                raise _Wrong(f"its {name} is not a list of tokens")
            tokens[name] = [convert(token) for token in value]
    return tokens


def _settings(values: dict) -> dict:
    """Return what is kept of a tokenizer_config.json."""
    settings = _special_tokens(values, _marked)
    settings |= {key: values[key] for key, choices in _CHOICES.items() if values.get(key) in choices}
    length = values.get("model_max_length")
    if isinstance(length, int | float) and not isinstance(length, bool):
        settings["model_max_length"] = length
    elif length is not None:
        raise _Wrong(f"its model_max_length is {str(length)[:60]!r}, not a number")
    if added := values.get("added_tokens_decoder"):
        if not isinstance(added, dict) or len(added) > MAX_TOKENS or not all(key.isdecimal() for key in added):
            raise _Wrong("its added_tokens_decoder is not a table from ids to tokens")
        if not all(isinstance(token, dict) for token in added.values()):
            raise _Wrong("its added_tokens_decoder has a token that is not a table")
        settings["added_tokens_decoder"] = {key: _token(token) for key, token in added.items()}
    return settings


def _ids(values: object) -> dict[str, int]:
    """Return a table from tokens to ids."""
    is_valid = isinstance(values, dict) and len(values) <= MAX_TOKENS
    if not is_valid or not all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < MAX_TOKENS
        for number in values.values()
    ):
        raise _Wrong(f"its vocabulary is not a table from tokens to ids below {MAX_TOKENS:,}")
    if len(set(values.values())) != len(values):
        raise _Wrong("its vocabulary has an id twice")
    return values


def _merges(values: object) -> list[list[str]]:
    """Return the pairs of tokens to merge, from a list of pairs or of lines "A B"."""
    lines = values if isinstance(values, list) else []
    pairs = [value.split(" ") if isinstance(value, str) else value for value in lines]
    is_valid = 0 < len(pairs) <= MAX_TOKENS and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(token, str) and token for token in pair)
        for pair in pairs
    )
    if not is_valid:
        raise _Wrong("its merges are not a list of pairs of tokens")
    return pairs


def _tokenizer_json(path, values: dict) -> dict:
    """Return a tokenizer.json with the vocabulary and the merges of another, or of vocab.json and merges.txt.

    path: returns a file of the tokenizer by its name. values: the other tokenizer.json, {} if there is none.
    """
    if values:
        model, added = values.get("model"), values.get("added_tokens", [])
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise _Wrong("its tokenizer.json has no byte-pair encoding")
        vocabulary, merges = model.get("vocab"), model.get("merges")
    elif path("vocab.json").exists() and path("merges.txt").exists():
        added, vocabulary = [], read_json_object(path("vocab.json"), MAX_BYTES)
        try:
            lines = read_bytes(path("merges.txt"), MAX_BYTES).decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise _Wrong(f"its merges.txt is not UTF-8 ({error.reason})") from None
        merges = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
    else:
        raise _Wrong("it has neither tokenizer.json nor vocab.json and merges.txt")
    if not isinstance(added, list) or len(added) > MAX_TOKENS:
        raise _Wrong("its added_tokens is not a list")
    for token in added:
        _ids({"": token.get("id") if isinstance(token, dict) else None})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token["id"], **_token(token)} for token in added],
        # CLIP's own, which transformers adds
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<|endoftext|>",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _ids(vocabulary),
            "merges": _merges(merges),
        },
    }


def _check_ids(tokenizer, vocab_size: int) -> None:
    """Raise UserError unless every token's id is below vocab_size and the special tokens have ids."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise _Wrong(f"it has ids up to {largest:,}, but the text encoder has embeddings for {vocab_size:,} tokens")
    for name in _SPECIAL_TOKENS:
        if getattr(tokenizer, f"{name}_id") is None:
            raise _Wrong(f"its {name} is not in its vocabulary")
