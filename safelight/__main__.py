"""The command line: finds the command, keeps libraries quiet, and tells a failure in one line."""

from __future__ import annotations

import os
import sys
import threading

from safelight import commands
from safelight.commands import COMMANDS, EXIT_INTERRUPTED
from safelight.errors import UserError

USAGE = """Safelight fine-tunes Stable Diffusion, the whole UNet, on the one GPU you have.

usage: safelight COMMAND ...       (`safelight COMMAND --help` tells the rest)

{commands}

The usual way:
  safelight demo                                        see it work
  safelight init sd15 -o run.toml                       settings, commented
  safelight prepare my_photos -o datasets/mine          photos and captions
  safelight plan run.toml --data.path datasets/mine     does it fit, how long
  safelight train run.toml --data.path datasets/mine    any setting like this
  safelight compare runs/sd15                           base beside trained
  safelight report runs/sd15                            one HTML file
  safelight export runs/sd15 -o mine.safetensors        for A1111 and ComfyUI
"""

EXIT_BAD_INPUT = 2


def _tell_unless_oserror(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def quiet_libraries() -> None:
    """Keep the notices of imported libraries off the terminal: a command prints our lines only.

    Nothing of ours goes through logging or warnings, and an exception is printed as ever.
    """
    import logging
    import warnings

    # level 40 and below, of every logger there is or will be: libraries log what they merely could not optimise
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # C++ parts write to stderr themselves: torch's own, and TensorFlow's where TensorBoard finds it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorBoard's writer meets a full disk in its own thread, and raises it again in ours
    threading.excepthook = _tell_unless_oserror


def _explain_failure(error: Exception) -> str | None:
    """Return a readable line for bad input, a full disk, too little memory; None for what is a fault of ours."""
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return (
            "the GPU's memory is full; lower train.batch_size and raise train.accumulate, "
            f'or set train.checkpointing = "full" ({str(error).splitlines()[0][:120]})'
        )
    if kind == "SafetensorError" or (isinstance(error, OSError) and error.errno is not None):
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        what = f"{where}{getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        is_full = any(name in what for name in ("No space left", "quota exceeded", "File too large"))
        return f"{what}; free some disk and run it again: what was saved before is whole" if is_full else what
    if type(error).__module__ == "sqlite3":
        return f"the cache's index: {error}; free some disk, or delete the dataset's cache folder to make it again"
    return str(error) if isinstance(error, UserError) else None


def _dispatch(argv: list[str]) -> int:
    """Run a command, or say which there are. `help COMMAND` is `COMMAND --help`."""
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
            f"safelight: {name!r} is no command" + (f"; did you mean {near[0]}?" if near else "; see safelight --help"),
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    quiet_libraries()
    return getattr(commands, name)(rest)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for bad input, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _dispatch(argv)
        finally:
            # what is still in the buffer meets a broken pipe here rather than at the interpreter's end
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader went away (`| head`): nothing to say, and nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        # any kind, to tell the user's and the machine's failures in a line; ours pass with their traceback
        message = _explain_failure(error)
        if message is None or os.environ.get("SAFELIGHT_TRACEBACK"):
            raise
        print(f"safelight {argv[0]}: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
