"""The exceptions for errors that users can fix, and for runs that diverge; what a library says of its own errors.

Every folder may import this module.
"""

from safelight.text import printable

# of a command that Ctrl-C or SIGTERM ended, as shells have it
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """Something the user can fix: a setting, a file, a folder, a device without enough memory.

    Its message names the value, the limit and the fix: one line, or one for each of several mistakes. The command line
    prints it and exits with status 2; any other exception is a bug and is reported as one (safelight/bug_report.py).
    Messages quote names from files that somebody else may have made, so control characters in a line are escaped here,
    for all of them.
    """

    def __init__(self, *lines: object):
        super().__init__("\n".join(printable(str(line)) for line in lines))


class Diverged(UserError):
    """A run ended because its loss is no longer finite; the message names the step, the likely cause and the command
    that goes on. The command line exits with status 3."""


class OutOfMemory(UserError):
    """A GPU's memory was too small for what the settings ask of it."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, at most 200 characters; the name of its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
