"""Explains a library that cannot be imported: a wheel for another CUDA or Python, half an installation, a missing part.

diffusers imports xformers and bitsandbytes if they are installed, and torch imports triton, so that a broken one fails
commands that never use it. No import of ours is guarded for that: the error is explained where a command ends.
"""

from __future__ import annotations

import traceback

MAX_REASON_CHARS = 200
# what to do about a library that Safelight can do without; the others have to be installed again
WITHOUT = {
    **dict.fromkeys(("bitsandbytes", "prodigyopt", "schedulefree"), "or uninstall it and use another optimizer.name"),
    "tensorboard": "or set log.tensorboard = false",
    "wandb": "or set log.wandb = false",
    "triton": "or uninstall it, and PyTorch's own operations run instead",
    "xformers": "or uninstall it, and PyTorch's own attention runs instead",
}


def broken_import(error: BaseException) -> str | None:
    """Return the message for an error that importing a library raised, None for any other error."""
    root = _root_of(error)
    library = _library_of(root)
    return None if library is None else message(library, root)


def message(library: str, error: BaseException) -> str:
    """Return the message for a library whose import raised an error."""
    reason = (str(error).strip().splitlines() or [""])[0][:MAX_REASON_CHARS] or type(error).__name__
    advice = WITHOUT.get(library, "")
    return f"{library} cannot be imported ({reason}); install it again: pip install --force-reinstall {library}" + (
        f", {advice}" if advice else ""
    )


def _root_of(error: BaseException) -> BaseException:
    """Return the first of a chain of errors. diffusers and transformers raise a RuntimeError from any other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _library_of(error: BaseException) -> str | None:
    """Return the library that raised an error while it was imported, None if it was none of those that we use."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name
    else:
        # the code of a module runs once, when it is imported
        modules = [
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_name == "<module>"
        ]
        name = modules[-1] if modules else ""
    library = name.partition(".")[0]
    return None if library in ("", "safelight", "__main__") else library
