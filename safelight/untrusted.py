"""Reads files that somebody else may have made: datasets, caches, run folders, models.

Such a folder may contain anything, on purpose or because a disk failed: links to files elsewhere, a pipe in place of a
picture, JSON that is nested a million deep. The functions here check before they read: only regular files, only
inside the folder that the caller names, only up to a size, a nesting depth and a range of numbers. Every reader of
ours goes through them (tests/test_untrusted.py lists the exceptions); docs/security.md says what is trusted.
Every room may import this module.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import UserError

# the largest record, a split.json that names a million photographs, has about 60 MiB
MAX_JSON_BYTES = 2**26
# tomllib takes up to 500 bytes of memory for each byte of text
MAX_TOML_BYTES = 2**19
# a line of a log; ours have less than 4 KiB
MAX_LINE_BYTES = 2**16
# values in a JSON text, each of which takes up to 90 bytes of memory; a split.json of a million photographs has as many
MAX_VALUES = 2**22
# our own files are nested 6 deep at most
MAX_NESTING = 64
# a dotted key of n parts costs tomllib time and memory of order n^2
MAX_KEY_PARTS = 16
# TOML's strings and comments, as tomllib reads them from left to right. The last kind of string never ends: tomllib
# reads nothing behind its start, and so it takes the rest of the text, without which time would be of order n^2
_STRING_OR_COMMENT = re.compile(
    r"""
      "{3} (?: [^"\\]++ | \\. | "(?!"") )*+ "{3,5}
    | "(?!"") (?: [^"\\\n]++ | \\[^\n] )*+ "
    | '{3} (?: [^']++ | '(?!'') )*+ '{3,5}
    | '(?!'') [^'\n]*+ '
    | ["'] .*+
    | \# [^\n]*+
    """,
    re.DOTALL | re.VERBOSE,
)
# PyYAML takes about 1 s for 50 KiB
MAX_YAML_BYTES = 2**16
_KEY_END = re.compile(r"[\n=\[\]{},]")
# seeds are unsigned integers of 64 bits
MAX_INT = 2**64 - 1
_LONG_INTEGER = "it has an integer of more than 64 bits"


class UnsafeFile(UserError):
    """A file or folder that is not read or written: not a regular file, outside its folder, too large, malformed."""


def path_in(folder: Path, name: str | os.PathLike) -> Path:
    """Return folder/name. The path may lead through links, but must end inside the folder; it need not exist.

    Raises UnsafeFile if `name` is absolute, no possible file name, or leads out of the folder.
    """
    text = os.fspath(name)
    if not text or "\0" in text or not _is_encodable(text):
        raise UnsafeFile(f"{folder}: {text!r} is not a file name")
    path = Path(folder) / text
    if os.path.isabs(text) or not _is_inside(path, _real(folder)):
        raise UnsafeFile(f"{folder}: {text!r} leads out of this folder; such a path is never followed")
    return path


def _real(folder: Path) -> str:
    if "\0" in os.fspath(folder):
        raise UnsafeFile(f"{folder} is not a valid path")
    return os.path.realpath(folder)


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        # half a surrogate pair, which JSON can hold
        return False
    return True


def _is_inside(path: Path, real_folder: str) -> bool:
    real = os.path.realpath(path)
    return real == real_folder or real.startswith(real_folder.rstrip(os.sep) + os.sep)


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path ends in a folder, all links on its way followed."""
    return _is_inside(path, _real(folder))


def is_link_out(path: Path, folder: Path) -> bool:
    """Return whether a path is a link that ends outside of a folder."""
    return os.path.islink(path) and not is_inside(path, folder)


def check_links(folder: Path) -> None:
    """Raise UnsafeFile if anything in the folder is a link that leads out of it.

    The folder itself may be a link: the user named it. Called before a folder is written to, so that nothing outside is
    overwritten or deleted. Does nothing if the folder does not exist.
    """
    real_folder = _real(folder)
    pending = [os.fspath(folder)]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        if not _is_inside(Path(entry.path), real_folder):
                            raise UnsafeFile(
                                f"{entry.path} is a link to {os.path.realpath(entry.path)}, outside {folder}; "
                                "links out of a folder are never followed: replace it by what it points to"
                            )
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            # a folder may let its owner in and not be listed; without a way in, nothing there is read or written
            if os.access(current, os.X_OK):
                raise UnsafeFile(f"{current} cannot be searched for links; change its permissions") from None
        except OSError as error:
            raise UnsafeFile(f"{folder} cannot be searched for links: {error.strerror}") from error


def check_kinds(
    folder: Path,
    folders: Iterable[str | os.PathLike],
    files: Iterable[str | os.PathLike],
    keeper: str,
    follow_links: bool = True,
) -> None:
    """Raise UnsafeFile if a name in a folder is not what its keeper makes of it: one of `folders`, or of `files`.

    Called before hours of work, at whose end such a name could not be written. keeper: "the run", in the message.
    follow_links: whether one of `folders` may be a link; not where files are deleted.
    """
    for names, is_kind, kind in ((folders, os.path.isdir, "folder"), (files, os.path.isfile, "file")):
        for path in (Path(folder) / name for name in names):
            if kind == "folder" and not follow_links and path.is_symlink():
                raise UnsafeFile(f"{path} is a link where {keeper} keeps a folder; replace it by what it points to")
            if os.path.lexists(path) and not is_kind(path):
                found = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither file nor folder"
                raise UnsafeFile(f"{path} is {found} where {keeper} keeps a {kind}; move it away")


def open_regular(path: Path, max_bytes: int | None = None, follow_links: bool = True) -> BinaryIO:
    """Return a regular file, opened for reading. max_bytes: its largest size, None for any.

    Opening a pipe would block until somebody writes to it, and reading a device may never end. Raises UnsafeFile if the
    path is anything but a regular file of at most max_bytes, or a link although follow_links is False;
    FileNotFoundError and other OSErrors as open does.
    """
    return os.fdopen(_open_regular(path, os.O_RDONLY, max_bytes, follow_links), "rb")


def open_to_write(path: Path, buffering: int = -1) -> BinaryIO:
    """Return a regular file, opened for reading and writing, created if needed, with its content kept.

    buffering: as for open. Raises UnsafeFile if the path is a link, wherever it leads, or anything but a regular file;
    OSErrors as open does.
    """
    return os.fdopen(_open_regular(path, os.O_RDWR | os.O_CREAT, None, follow_links=False), "r+b", buffering)


def _open_regular(path: Path, flags: int, max_bytes: int | None, follow_links: bool) -> int:
    """Return the descriptor of a regular file, see `open_regular`."""
    # flags that some systems lack. Without O_NONBLOCK, opening a pipe waits for its other end
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except ValueError:
        raise UnsafeFile(f"{path} is not a valid path") from None
    except OSError as error:
        if not follow_links and os.path.islink(path):
            raise UnsafeFile(f"{path} is a link, which is not followed here; delete it") from None
        if error.errno is not None and os.path.lexists(path):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                raise UnsafeFile(f"{path} is not a regular file but a socket") from None
            if stat.S_ISDIR(os.lstat(path).st_mode):
                raise UnsafeFile(f"{path} is not a regular file but a folder") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "device or pipe"
            raise UnsafeFile(f"{path} is not a regular file but a {kind}")
        if max_bytes is not None and status.st_size > max_bytes:
            raise UnsafeFile(f"{path} has {status.st_size:,} bytes, over the limit of {max_bytes:,}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_append(path: Path) -> BinaryIO:
    """Return a regular file, opened for appending and created if needed. Raises as `open_to_write`."""
    # for reading too: opened for writing only, a pipe without a reader is an error, and not seen to be a pipe
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    return os.fdopen(_open_regular(path, flags, None, follow_links=False), "ab")


def check_regular(path: Path) -> None:
    """Raise UnsafeFile if a library that is about to open this file would hang or fail on it: it must be regular."""
    open_regular(path).close()


def read_bytes(path: Path, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file. Raises as `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read()


def read_lines(path: Path, max_bytes: int, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes | None]:
    """Yield the lines of a regular file, each with its newline; None for one of more than max_line_bytes.

    Only one line is held in memory at a time. Raises as `open_regular`, when the first line is asked for.
    """
    with open_regular(path, max_bytes) as file:
        while line := file.readline(max_line_bytes + 1):
            if len(line) <= max_line_bytes:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(2**20)
            yield None


def _bounded_int(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > MAX_INT:
        raise ValueError(f"the number {text[:20]} is too large")
    return int(text)


def _clamped_int(text: str) -> int:
    return max(-MAX_INT, min(MAX_INT, int(text[:22])))


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _decoded(content: bytes) -> str:
    """Return a UTF-8 text, with or without a byte order mark. Raises UnsafeFile with what is wrong."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = "it looks like UTF-16" if is_utf16 else f"{error.reason} at byte {error.start}"
    else:
        # ASCII in UTF-16 without a mark
        if content[:2].count(0) != 1:
            return text
        hint = "it looks like UTF-16"
    raise UnsafeFile(f"it is not UTF-8 text ({hint}); save it as UTF-8")


def count_values(content: bytes | str) -> int:
    """Return a number that a JSON text's values do not exceed, without parsing it. Commas inside texts count."""
    marks = (b",", b"[", b"{") if isinstance(content, bytes) else (",", "[", "{")
    return 1 + sum(map(content.count, marks))


def parse_json(
    content: bytes | str, allow_nan: bool = False, clamp_ints: bool = False, max_values: int = MAX_VALUES
) -> Any:
    """Return the value of a JSON text: numbers up to MAX_INT or finite in float64, nested at most MAX_NESTING deep.

    allow_nan: accept the words NaN, Infinity and -Infinity, which Python writes into logs. clamp_ints: return MAX_INT
    for larger integers, with which other programs mean "no limit". max_values: the most values that it may have, as
    `count_values` counts. Raises UnsafeFile with what is wrong, in words that follow "FILE is not valid JSON: ".
    """
    if count_values(content) > max_values:
        raise UnsafeFile(f"it has more than {max_values:,} values")
    try:
        text = _decoded(content) if isinstance(content, bytes) else content
        value = json.loads(
            text,
            parse_int=_clamped_int if clamp_ints else _bounded_int,
            parse_float=_finite_float,
            parse_constant=float if allow_nan else _no_constant,
        )
    except RecursionError:
        raise UnsafeFile("it is nested too deeply") from None
    except ValueError as error:
        raise UnsafeFile(str(error)) from None
    _check_nesting(value)
    return value


def kind_of(value: object) -> str:
    """Return what a value of a JSON, TOML or YAML text is, in words: a list, a number, null."""
    words = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    words |= {list: "a list", dict: "an object"}
    return words.get(type(value), f"a {type(value).__name__}")


def _check_nesting(value: object) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    raise UnsafeFile("it is nested too deeply")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False, clamp_ints: bool = False) -> Any:
    """Return the value in a JSON file. Raises UnsafeFile naming the file, OSErrors as open does."""
    content = read_bytes(path, max_bytes)
    try:
        return parse_json(content, allow_nan, clamp_ints)
    except UnsafeFile as error:
        raise UnsafeFile(f"{path} is not valid JSON: {error}") from None


def read_json_object(
    path: Path, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False, clamp_ints: bool = False
) -> dict:
    """Return the object in a JSON file. Raises UnsafeFile naming the file, also if it holds another type."""
    value = read_json(path, max_bytes, allow_nan, clamp_ints)
    if not isinstance(value, dict):
        raise UnsafeFile(f"{path} is not valid: it holds {kind_of(value)}, not a JSON object")
    return value


def parse_toml(text: str) -> dict:
    """Return the table of a TOML text of at most MAX_TOML_BYTES. Raises UnsafeFile with what is wrong."""
    if len(text) > MAX_TOML_BYTES:
        raise UnsafeFile(f"it has {len(text):,} characters, over the limit of {MAX_TOML_BYTES:,}")
    _check_dotted_keys(text)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UnsafeFile("it is nested too deeply") from None
    except ValueError as error:
        # "runs\photos" has an escape that TOML does not know, "C:\Users" one without its hex digits
        is_escape = any(word in str(error) for word in ("Unescaped", "Invalid hex value", "Escaped character"))
        hint = "; write / or use single quotes" if is_escape else ""
        raise UnsafeFile(f"{error}{hint}") from None
    _check_nesting(values)
    _check_integers(values)
    return values


def _check_integers(values: object) -> None:
    """Refuse an integer that no setting can take: TOML and YAML have hexadecimal ones of any length, which str refuses.

    values: of TOML or YAML, where an integer may also be a key, or in a set or pair.
    """
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            pending += value
        elif isinstance(value, int) and abs(value) > MAX_INT:
            raise UnsafeFile(_LONG_INTEGER)


def _check_dotted_keys(text: str) -> None:
    """Refuse a.b.c... of more than MAX_KEY_PARTS parts, wherever it stands."""
    # what ends a key cannot stand in it now that strings are gone
    for piece in _KEY_END.split(_STRING_OR_COMMENT.sub("", text)):
        if piece.count(".") >= MAX_KEY_PARTS:
            raise UnsafeFile(f"it has a dotted key of more than {MAX_KEY_PARTS} parts")


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text of at most MAX_YAML_BYTES: plain values, nested at most MAX_NESTING deep.

    Aliases are refused: a few of them stand for billions of values. Raises UnsafeFile with what is wrong, in words that
    follow "FILE is not valid YAML: ".
    """
    # takes 20 ms
    import yaml

    if len(text.encode(errors="replace")) > MAX_YAML_BYTES:
        raise UnsafeFile(f"it has more than {MAX_YAML_BYTES:,} bytes")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_NESTING:
                raise UnsafeFile("it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise UnsafeFile(
                    f"line {event.start_mark.line + 1} has an alias, which is not followed; write the value"
                )
        value = yaml.safe_load(text)
        _check_integers(value)
        return value
    except UnsafeFile:
        raise
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UnsafeFile(f"{place}{error.problem}") from None
    # control characters; dates and integers that Python has not
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        is_integer = "integer string conversion" in str(error)
        raise UnsafeFile(_LONG_INTEGER if is_integer else str(error).partition("\n")[0]) from None
    except (AttributeError, LookupError):
        raise UnsafeFile("a value is not what its tag, such as !!bool or !!int, says") from None


def read_toml(path: Path) -> dict:
    """Return the table in a TOML file. Raises UnsafeFile naming the file, OSErrors as open does."""
    content = read_bytes(path, MAX_TOML_BYTES)
    try:
        return parse_toml(_decoded(content))
    except UnsafeFile as error:
        raise UnsafeFile(f"{path} is not valid TOML: {error}") from None
