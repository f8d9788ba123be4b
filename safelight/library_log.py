"""Keeps libraries' log messages and warnings off the terminal, and stores them for bug reports and libraries.log.

A command prints only its own lines. The last MAX_MESSAGES distinct messages of libraries stay in memory for a bug
report, and a run also writes them to libraries.log in its folder. logging and warnings are global to a process, and so
is this module's state.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from safelight.text import printable_lines
from safelight.untrusted import UnsafeFile, open_append

MAX_MESSAGES = 200
# a logged traceback can be long, and its end says what happened
MAX_MESSAGE_CHARS = 4000
FILE_NAME = "libraries.log"
# ignored: only a library's developers can act on these
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)

_lock = threading.Lock()
# message -> number of occurrences
_messages: OrderedDict[str, int] = OrderedDict()
_folder: Path | None = None
_name = FILE_NAME
_last_folder: Path | None = None
_num_written = 0
_call_handlers = logging.Logger.callHandlers
# restores what `capture` replaced; None while nothing is captured
_undo: ExitStack | None = None


def capture() -> None:
    """Capture libraries' warnings, and log records from WARNING up, until `release`.

    CRITICAL records are also handled as usual. An OSError that ends a library's thread is stored instead of printed:
    when the disk is full, TensorBoard's writer thread dies of one and raises it again in ours.
    """
    global _undo
    if _undo is not None:
        return
    _undo = ExitStack()
    _undo.callback(setattr, logging.Logger, "callHandlers", logging.Logger.callHandlers)
    _undo.callback(setattr, threading, "excepthook", threading.excepthook)
    _undo.enter_context(warnings.catch_warnings())
    # patched on the class, to capture loggers that do not propagate and those created later, too
    logging.Logger.callHandlers = _keep_record
    threading.excepthook = _keep_thread_error
    warnings.showwarning = _keep_warning
    warnings.simplefilter("default")
    for category in FOR_DEVELOPERS:
        warnings.simplefilter("ignore", category)


def release() -> None:
    """Undo `capture` and delete the stored messages."""
    global _undo, _last_folder
    with _lock:
        _messages.clear()
        _last_folder = None
    if _undo is not None:
        _undo.close()
        _undo = None


def lines() -> list[str]:
    """Return the stored messages, oldest first, with the number of repeats."""
    with _lock:
        return [f"{text} (x{num})" if num > 1 else text for text, num in _messages.items()]


@contextmanager
def written_to(folder: Path, name: str = FILE_NAME) -> Iterator[None]:
    """Append stored messages, and those captured inside the block, to FOLDER/NAME, created only if needed.

    A second block of a command with the same folder goes on where the first one ended.
    """
    global _folder, _name, _last_folder, _num_written
    with _lock:
        _folder, _name = folder, name
        if folder != _last_folder:
            _last_folder, _num_written = folder, 0
            for text in _messages:
                _append(text)
    try:
        yield
    finally:
        with _lock:
            _folder = None


def _keep(text: str) -> None:
    text = printable_lines(text.strip())
    if len(text) > MAX_MESSAGE_CHARS:
        text = f"... {text[-MAX_MESSAGE_CHARS:]}"
    with _lock:
        is_new = text not in _messages
        _messages[text] = _messages.get(text, 0) + 1
        if len(_messages) > MAX_MESSAGES:
            _messages.popitem(last=False)
        if is_new:
            _append(text)


def _append(text: str) -> None:
    global _num_written
    if _folder is None or _num_written > MAX_MESSAGES:
        return
    _num_written += 1
    if _num_written > MAX_MESSAGES:
        text = f"more than {MAX_MESSAGES} messages: the rest is left out"
    elif _num_written == 1:
        text = f"# {datetime.now():%Y-%m-%d %H:%M:%S}, process {os.getpid()}\n{text}"
    try:
        with open_append(_folder / _name) as file:
            file.write(f"{text}\n".encode(errors="backslashreplace"))
    except (OSError, UnsafeFile):
        # neither a full disk nor a link in its place may end the run because of a warning, which is still in memory
        pass


def _keep_record(logger: logging.Logger, record: logging.LogRecord) -> None:
    if record.levelno >= logging.WARNING:
        try:
            text = logging.Formatter("%(levelname)s %(name)s: %(message)s").format(record)
        except (TypeError, ValueError, KeyError) as error:
            # the record's arguments do not fit its format string; logging itself does not raise for that either
            text = f"{record.levelname} {record.name}: {record.msg} ({error})"
        _keep(text)
    if record.levelno >= logging.CRITICAL:
        _call_handlers(logger, record)


def _keep_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _keep(f"{category.__name__} {filename}:{lineno}: {message}")


def _keep_thread_error(failure: threading.ExceptHookArgs) -> None:
    if issubclass(failure.exc_type, OSError):
        _keep(
            f"thread {failure.thread.name if failure.thread else ''}: {failure.exc_type.__name__}: {failure.exc_value}"
        )
    else:
        threading.__excepthook__(failure)
