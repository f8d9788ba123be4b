"""Run a command in this process and capture its output and exit status."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

from safelight import library_log
from safelight.__main__ import main


@dataclass(frozen=True)
class Called:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str

    def line(self, part: str) -> str:
        """Return the only line on stderr that contains `part`."""
        lines = [line for line in self.err.split("\n") if part in line]
        assert len(lines) == 1, f"{part!r} is on {len(lines)} lines of:\n{self.err}"
        return lines[0]

    def report(self) -> str:
        """Return the text of the bug report that the command wrote, and delete the file."""
        place = re.search(r"details are in (.+?); please", self.err)
        path = Path(place[1])
        text = path.read_text(encoding="utf-8")
        path.unlink()
        return text

    def assert_refused(self, command: str, part: str) -> None:
        """Check for exit status 2 and a single line of ours, the last, that contains `part`."""
        assert self.status == 2, self.err
        lines = self.err.removesuffix("\n").split("\n")
        assert lines[-1].startswith(f"safelight {command}: ")
        assert part in lines[-1]
        assert sum(line.startswith("safelight ") for line in lines) == 1
        assert "Traceback" not in self.err


def call(*argv: object, may_fail: bool = False) -> Called:
    """Run a command. A bug fails the test and shows its report, unless may_fail."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
        finally:
            # a command captures logging and warnings for its process; here those are the tests' own
            library_log.release()
    called = Called(status, out.getvalue(), err.getvalue())
    if "this is a bug" in called.err and not may_fail:
        raise AssertionError(f"a bug: {called.report()}")
    return called
