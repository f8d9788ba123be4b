"""Variants on a CPU that are timed by turns, in processes of their own.

So none has the memory, the allocator's settings or the caches of another: each is as if its trainer ran alone, and the
noise of the machine still meets all of them.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import torch

from safelight.errors import UserError
from safelight.trainer.run_log.metrics import peak_memory_gib

CPU = torch.device("cpu")


class Prepared(NamedTuple):
    """What a process has to run. runs: by name, each called with the number of the repeat; notes: said of them."""

    runs: Mapping[str, Callable[[int], None]]
    notes: str


class Player:
    """A process that prepares its runs, and then runs one whenever it is its turn. notes: what it said of them."""

    def __init__(self, prepare: Callable[..., AbstractContextManager[Prepared]], arguments: tuple):
        # what libraries print, and the last words of a process that dies
        self._log = NamedTemporaryFile("r", prefix="safelight-bench-", suffix=".log")  # noqa: SIM115  closed by kill
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_play,
            args=(theirs, pickle.dumps((prepare, arguments)), torch.get_num_threads(), self._log.name),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self.notes = ""

    def wait(self) -> None:
        """Wait until the runs are prepared. Raises what preparing them raised."""
        self.notes = self._answer()

    def turn(self, name: str, number: int) -> float:
        """Run one of the runs, and return its seconds. Raises what it raised."""
        self._connection.send((name, number))
        return self._answer()

    def end(self) -> float:
        """End the process, and return its peak memory in GiB."""
        self._connection.send(None)
        peak = self._answer()
        self._process.join()
        return peak

    def kill(self) -> None:
        """End the process wherever it is."""
        self._process.kill()
        self._process.join()
        self._log.close()

    def _answer(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            last = self._log.read().strip().rpartition("\n")[2][:200]
            why = f" ({last})" if last else ""
            raise UserError(
                f"a measured process ended with exit code {self._process.exitcode}{why}; is the memory full?"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _play(connection: Connection, pickled: bytes, num_threads: int, log: str) -> None:
    # before what is pickled imports libraries, which have much to say
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(num_threads)
    try:
        prepare, arguments = pickle.loads(pickled)
        with prepare(*arguments) as (runs, notes):
            connection.send(notes)
            while (turn := connection.recv()) is not None:
                name, number = turn
                began = time.perf_counter()
                runs[name](number)
                connection.send(time.perf_counter() - began)
            connection.send(peak_memory_gib(CPU))
    except Exception as error:
        connection.send(error)


@contextmanager
def players(
    prepare: Callable[..., AbstractContextManager[Prepared]], arguments: Mapping[str, tuple]
) -> Iterator[dict[str, Player]]:
    """A process for each name, prepared by `prepare` with its arguments; none is left behind. All prepare at once."""
    started: dict[str, Player] = {}
    try:
        for name, values in arguments.items():
            started[name] = Player(prepare, values)
        for player in started.values():
            player.wait()
        yield started
    finally:
        for player in started.values():
            player.kill()
