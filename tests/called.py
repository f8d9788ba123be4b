"""A command run in this process as a user runs it."""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import dataclass

from safelight.__main__ import main


@dataclass(frozen=True)
class Called:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str

    def line(self, part: str) -> str:
        """Return the one line of standard error that holds a part."""
        found = [line for line in self.err.split("\n") if part in line]
        assert len(found) == 1, f"{part!r} stands on {len(found)} lines of:\n{self.err}"
        return found[0]

    def assert_refused(self, command: str, part: str) -> None:
        """Exit 2, and one line of ours that says why, the last."""
        assert self.status == 2, self.err
        lines = self.err.removesuffix("\n").split("\n")
        assert lines[-1].startswith(f"safelight {command}: ")
        assert part in lines[-1]
        assert sum(line.startswith("safelight ") for line in lines) == 1
        assert "Traceback" not in self.err


def call(*argv: object) -> Called:
    """Run a command and return what it left; an error of ours is raised as it is."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
        finally:
            # a command silences logging for its process; here that is the tests' own
            logging.disable(logging.NOTSET)
    return Called(status, out.getvalue(), err.getvalue())
