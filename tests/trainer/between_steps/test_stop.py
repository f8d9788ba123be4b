"""Which signals stop a run, and that the message about it cannot fail it."""

import os
import signal

import pytest

from safelight.trainer.between_steps.stop import Stop


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_requests_a_stop(name, monkeypatch):
    def closed_terminal(descriptor, text):
        raise OSError(5, "Input/output error")

    number, stop = getattr(signal, name), Stop()
    before = signal.getsignal(number)
    monkeypatch.setattr(os, "write", closed_terminal)
    with stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) is before


def test_nohup_keeps_a_run_going():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert stop is None
    finally:
        signal.signal(signal.SIGHUP, before)
