"""What is measured of `safelight prepare` is that process, not the one that measures, which has torch loaded."""

from pathlib import Path

import pytest

from tools.prepare_speed import timed


def test_the_peak_is_the_commands_own():
    least, more = (timed(["-c", f"b'x' * {num_bytes}"], Path.cwd())[2] for num_bytes in (1, 2**27))
    assert least < 0.1
    assert more - least == pytest.approx(0.125, rel=0.1)


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match="ended with 1"):
        timed(["-c", "raise SystemExit(3)"], Path.cwd())
