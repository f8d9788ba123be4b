"""The command line: runs a command, keeps libraries quiet, and turns errors into one line or a bug report."""

from __future__ import annotations

import sys

try:
    import contextlib
    import errno
    import io
    import os
    import traceback
    from typing import NoReturn

    from safelight import bug_report, commands, library_log
    from safelight.broken_imports import broken_import
    from safelight.commands import COMMANDS
    from safelight.errors import EXIT_INTERRUPTED, Diverged, OutOfMemory, UserError
    from safelight.text import printable, printable_lines
    from safelight.trainer.distributed import started
except KeyboardInterrupt:
    # `main`, which handles Ctrl-C from here on, does not exist yet
    print("interrupted", file=sys.stderr)
    sys.exit(130)

USAGE = """Safelight fine-tunes Stable Diffusion on the one GPU you have:
the whole UNet, some layers, a LoRA or a word.

usage: safelight COMMAND ...       (`safelight COMMAND --help` for its options)

{commands}

A typical session:
  safelight demo                                        see it work first
  safelight init sd15 -o run.toml                       settings; or sd15-lora
  safelight prepare my_photos -o datasets/mine          import your photos
  safelight plan run.toml --data.path datasets/mine     memory and duration
  safelight train run.toml --data.path datasets/mine    train
  safelight compare runs/sd15                           before and after
  safelight grid runs/sd15 --x cfg=3,5,7 --y steps=9,25 settings side by side
  safelight evaluate runs/sd15                          better? which epoch?
  safelight report runs/sd15                            one HTML file
  safelight report runs --serve                         watch them in a browser
  safelight export runs/sd15 -o mine.safetensors        for A1111 and ComfyUI
"""

EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
# commands whose memory these settings decide
WITH_BATCHES = ("cache", "train", "profile", "plan")
# torch and Python raise a plain RuntimeError with one of these texts
CPU_MEMORY_IS_FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "can't start new thread",
)
# oneDNN, which torch uses on a CPU; with more words it means something else
ONEDNN_MEMORY_IS_FULL = "could not create a primitive"
# from pinning host memory, and from a GPU that is full before torch allocates there
CUDA_MEMORY_IS_FULL = "CUDA error: out of memory"


def quiet_libraries() -> None:
    """Keep imported libraries off the terminal, where a command prints only its own lines.

    Their messages are stored for bug reports and the run's libraries.log (library_log.py).
    """
    library_log.capture()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # C++ code writes to stderr directly: torch's, and TensorFlow's if TensorBoard finds it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


# what to do about an OSError that nobody explained, by its number
ADVICE = {
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "this disk cannot be written to; name another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "a folder has a file's name; move it away, or name another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "links lead in a circle; check the path",
    errno.EIO: "the disk fails; check it, and copy what is on it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def _explain(error: Exception, command: str = "") -> str | None:
    """Return the message for an error that the user can fix, None for a bug."""
    kind, first = type(error).__name__, (str(error).splitlines() or [""])[0]
    if isinstance(error, UserError):
        return str(error)
    # by name, because torch and safetensors may not be imported
    if kind == "OutOfMemoryError":
        return (
            "the GPU's memory is full; lower train.batch_size and raise train.accumulate, "
            f'or set train.checkpointing = "full" ({first[:120]})'
        )
    if CUDA_MEMORY_IS_FULL in str(error):
        return (
            "CUDA has no memory left, on the GPU or in the part of the computer's memory that it copies through; "
            "close other programs, or lower train.batch_size"
        )
    if _is_memory_full(error):
        settings = ", or lower train.batch_size and data.resolution" if command in WITH_BATCHES else ""
        return f"the computer's memory is full; close other programs{settings}"
    if isinstance(error, FileExistsError) and error.filename and not os.path.isdir(error.filename):
        return f"{error.filename} is not a folder; name another path"
    if kind == "SafetensorError" or (isinstance(error, OSError) and error.errno is not None):
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        what = f"{where}{getattr(error, 'strerror', None) or first}"
        is_full = any(name in what for name in ("No space left", "quota exceeded", "File too large"))
        if is_full:
            return f"{what}; free some disk space and run it again: everything saved before is intact"
        advice = ADVICE.get(getattr(error, "errno", None))
        return f"{what}; {advice}" if advice else what
    if (broken := broken_import(error)) is not None:
        return broken
    if _is_index_failure(error):
        return f"the cache's index: {error}; free some disk space, or delete the dataset's cache folder to rebuild it"
    return None


def _is_memory_full(error: Exception) -> bool:
    """Return whether the host's memory is full, as Python, the system or torch says it."""
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_said = str(error) == ONEDNN_MEMORY_IS_FULL or any(text in str(error) for text in CPU_MEMORY_IS_FULL)
    return isinstance(error, MemoryError) or is_refused or is_said


def _is_index_failure(error: Exception) -> bool:
    """Return whether SQLite failed on its file; its other errors (misuse, a broken constraint) are bugs."""
    sqlite3 = sys.modules.get("sqlite3")
    return sqlite3 is not None and (isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError)


def _print_error(text: str) -> None:
    """Print to stderr, unless its terminal is closed: the exit status still tells."""
    with contextlib.suppress(OSError):
        print(printable_lines(text), file=sys.stderr, flush=True)


def _report_bug(error: Exception, argv: list[str]) -> str:
    """Write a bug report and return the lines that say where it is."""
    try:
        file = bug_report.write(error, argv)
    except OSError as failure:
        said = "".join(traceback.format_exception(error))
        return f"{said}safelight {argv[0]}: this is a bug, and its report cannot be written: {failure}"
    return bug_report.summary(error, argv[0], file)


def _end(text: str, status: int, command: str = "") -> int:
    """Print how a command ended, once for all processes of a run, and return the exit status.

    command: its name; if given, also say which of several processes it was and how to go on.
    """
    if started.is_one_of_several():
        from safelight.trainer.distributed.ending import tell

        return tell(printable_lines(text), status, command)
    _print_error(text)
    return status


def _ended_by_other(error: BaseException) -> int | None:
    """Return the exit status if another process of the run has ended it, and has said so; else None."""
    if not started.is_one_of_several():
        return None
    from safelight.trainer.distributed.ending import status_of_other

    return status_of_other(error)


def _dispatch(argv: list[str]) -> int:
    """Run a command, or list them. `help COMMAND` is `COMMAND --help`."""
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        from safelight.output.columns import listed

        print(USAGE.format(commands=listed(COMMANDS)))
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] == "--version":
        from safelight import __version__

        print(f"safelight {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(
            f"safelight: {name!r} is not a command"
            + (f"; did you mean {near[0]}?" if near else "; see safelight --help"),
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    quiet_libraries()
    if started.rank() and started.is_one_of_several():
        # the main process of several says it all
        from safelight.trainer.distributed import outputs

        outputs.hold_back()
    return getattr(commands, name)(rest)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for a bug, 2 for an error the user can fix, 3 for a run that
    diverged, 130 if interrupted.

    With the environment variable SAFELIGHT_TRACEBACK=1 every error is raised instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    # None if the shell closed them, as `>&-` does
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        for stream in (sys.stdout, sys.stderr):
            # a caption in characters that the terminal's encoding lacks must not end a command
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        bug_report.belongs_to(None)
        try:
            return _dispatch(argv)
        finally:
            # so that a broken pipe raises here rather than while the interpreter shuts down
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader of our output has exited, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _end("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if os.environ.get("SAFELIGHT_TRACEBACK"):
            raise
        if (status := _ended_by_other(error)) is not None:
            return status
        message = _explain(error, argv[0])
        if message is None:
            return _end(_report_bug(error, argv), EXIT_BUG, argv[0])
        if not isinstance(error, UserError):
            # whose lines are its own; a file name in another error may hold a line break, and then words of a stranger
            message = printable(message)
        status = EXIT_DIVERGED if isinstance(error, Diverged) else EXIT_BAD_INPUT
        is_of_settings = isinstance(error, UserError) and not isinstance(error, OutOfMemory)
        return _end(f"safelight {argv[0]}: {message}", status, "" if is_of_settings else argv[0])


def leave(status: int) -> NoReturn:
    """Exit with a status. One of several processes does not wait for what torch's exchanges have left unfinished."""
    if started.is_one_of_several():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
