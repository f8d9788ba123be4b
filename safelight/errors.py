"""The exception for errors that users can fix. Every folder may import this module."""


class UserError(ValueError):
    """Something the user can fix: a setting, a file, a folder, a device without enough memory.

    Its message names the value, the limit and the fix. The command line prints it as one line and exits with status 2;
    any other exception is a bug and is reported as one (safelight/bug_report.py).
    """
