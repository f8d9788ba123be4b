"""Keeps what libraries log and warn of: off the terminal, in memory, and in a run's libraries.log.

A command prints our own lines only. What libraries have to say is kept, so that whoever reports a problem has it: each
message once, the last MAX_MESSAGES of them. logging and warnings are global to a process, and so is this module's
state.
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

MAX_MESSAGES = 200
# a traceback that a library logs is many lines; its end says what happened
MAX_MESSAGE_CHARS = 4000
FILE_NAME = "libraries.log"
# about a library's own code: its developers can act on these, a user cannot
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)

_lock = threading.Lock()
# message -> how often it came
_messages: OrderedDict[str, int] = OrderedDict()
_folder: Path | None = None
_num_written = 0
_call_handlers = logging.Logger.callHandlers
# what puts back what was there before; None while nothing is captured
_undo: ExitStack | None = None


def capture() -> None:
    """Capture what libraries log from WARNING up, and their warnings, until `release`.

    CRITICAL records are also handled as before. An OSError that ends a library's own thread is kept, not printed:
    TensorBoard's writer meets a full disk there and raises it again in our thread.
    """
    global _undo
    if _undo is not None:
        return
    _undo = ExitStack()
    _undo.callback(setattr, logging.Logger, "callHandlers", logging.Logger.callHandlers)
    _undo.callback(setattr, threading, "excepthook", threading.excepthook)
    _undo.enter_context(warnings.catch_warnings())
    # of the class: loggers that do not propagate, and those that are made later, are captured too
    logging.Logger.callHandlers = _keep_record
    threading.excepthook = _keep_thread_error
    warnings.showwarning = _keep_warning
    warnings.simplefilter("default")
    for category in FOR_DEVELOPERS:
        warnings.simplefilter("ignore", category)


def release() -> None:
    """Undo `capture` and forget what was kept."""
    global _undo
    with _lock:
        _messages.clear()
    if _undo is not None:
        _undo.close()
        _undo = None


def lines() -> list[str]:
    """Return what was kept, oldest first, with the number of repeats."""
    with _lock:
        return [f"{text} (x{num})" if num > 1 else text for text, num in _messages.items()]


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Append kept messages, and those that arrive within the block, to FOLDER/libraries.log; no messages, no file."""
    global _folder, _num_written
    with _lock:
        _folder, _num_written = folder, 0
        for text in _messages:
            _append(text)
    try:
        yield
    finally:
        with _lock:
            _folder = None


def _keep(text: str) -> None:
    text = text.strip()
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
        with open(_folder / FILE_NAME, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")
    except OSError:
        # a full disk must not end the run for the sake of a warning; it is still in memory
        pass


def _keep_record(logger: logging.Logger, record: logging.LogRecord) -> None:
    if record.levelno >= logging.WARNING:
        try:
            text = logging.Formatter("%(levelname)s %(name)s: %(message)s").format(record)
        except (TypeError, ValueError, KeyError) as error:
            # the record's arguments do not fit its text, which logging itself reports rather than raises
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
