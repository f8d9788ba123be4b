"""Each process of a run learns within seconds that another one has ended, and within a stated time that one hangs.

A thread of each process keeps a connection to rank 0. The system closes it when a process ends, however it ends; over
it a process says every second how long its main thread has not moved. What ends the run is told by rank 0, once; by
another rank if rank 0 is the one that is gone. All others then end by themselves: what they wait for in an exchange
fails, and a process that still runs GRACE_S later leaves at once.

torch's own watchdogs would abort the process after a time, with a trace in C++ and without naming the culprit; the
process groups get a timeout so long that this thread comes first.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from safelight.errors import Diverged
from safelight.trainer.distributed import started
from safelight.trainer.distributed.fault import EXIT_FAULT, Fault, PeerFailed
from safelight.trainer.distributed.meeting import Peer, name
from safelight.untrusted import parse_json

TICK_S = 0.5
BEAT_S = 1.0
# for the main thread: to finish a checkpoint that is being written, and to release its locks
GRACE_S = 25.0
# an exchange fails before the thread has learned why
LEARN_S = 10.0
CONNECT_TIMEOUT_S = 60.0
# for rank 0, at the end of a run, to say what there is to say
LAST_WORDS_S = 120.0
MAX_MESSAGE_BYTES = 2**20
# where a main thread that does not move waits for another process: in torch's exchanges and in ours
WAITS_IN = (
    *(f"{Path(module).parent}{os.sep}" for module in (dist.__file__, __file__)),
    *(str(Path(__file__).parents[2] / name) for name in ("trainer/optim/reduction.py", "data/claims.py")),
)
# below which all of a process runs that torch's launcher has forked
LAUNCHED_BY = tuple(f"{Path(dist.__file__).parent / name}{os.sep}" for name in ("elastic", "launcher"))
# how torch begins what it says of an exchange that failed
EXCHANGE_ERRORS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass
class _Connection:
    """To one other process. heard_at: when it last said something. still_s: how long its main thread had not moved.

    waits: whether that is because it waits for another process.
    """

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    heard_at: float = field(default_factory=time.monotonic)
    still_s: float = 0.0
    waits: bool = False

    def send(self, message: dict) -> None:
        # a process that is gone is noticed when reading
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


class Watch:
    """The processes that this one knows to live, and the fault that ended the run, if one has.

    say: prints a fault's lines on the run's terminal. command: the name of what the processes run, such as train.
    outlook: returns what follows an exit status: a restart, or the command that resumes. timeout_s: how long a process
    may show no sign of life, or its main thread may not move. note_final: called by rank 0 with the exit status of all,
    before they end.
    """

    def __init__(
        self,
        store: dist.Store,
        peers: tuple[Peer, ...],
        timeout_s: float,
        say: Callable[[str], None],
        command: str,
        outlook: Callable[[int], str],
        note_final: Callable[[int], None] = lambda status: None,
    ):
        self.rank, self.peers, self.timeout_s = started.rank(), peers, timeout_s
        self.fault: Fault | None = None
        self._say, self._command, self.outlook, self.note_final = say, command, outlook, note_final
        self._told = threading.Event()
        self._lock = threading.Lock()
        self.is_closed = False
        self._leaves_at: float | None = None
        self._main_thread = threading.main_thread().ident
        self._place: tuple = ()
        self._moved_at = time.monotonic()
        self._parent, self._is_orphan = os.getppid(), False
        self._connections = _accept(store, peers) if self.rank == 0 else {0: _connect(store, self.rank)}
        self._thread = threading.Thread(target=self._run, name="watch-processes", daemon=True)
        self._thread.start()

    def report(self, fault: Fault) -> None:
        """Tell all processes of a fault of this one, and have it said once. The first fault of a run counts."""
        if self.rank == 0:
            self._end(fault, says=True)
            return
        connection = self._connections.get(0)
        if connection is not None:
            connection.send({"fault": fault.to_json()})
        if connection is None or not self._told.wait(LEARN_S):
            self._end(fault, says=True)

    def learn(self, error: BaseException) -> Fault | None:
        """Return the fault that has ended the run, if `error` may follow from it; waits for it if it must have."""
        if self.fault is None and is_exchange_error(error):
            self._told.wait(LEARN_S)
        elif self.fault is None and isinstance(error, Diverged) and self.rank:
            # rank 0 most likely sees it, too, and reports it
            self._told.wait(LEARN_S)
        return self.fault

    def close(self, waits_for_main: bool) -> None:
        """Stop watching, once all processes have come to the run's end.

        waits_for_main: return in the other processes once rank 0 has ended, because torchrun ends the rest as soon as
        one has ended with a status other than 0.
        """
        self.is_closed = True
        connections = [*self._connections.values()]
        for connection in connections:
            connection.send({"bye": True})
        self._thread.join()
        if self.rank == 0 or not waits_for_main:
            return
        for connection in connections:
            connection.socket.settimeout(LAST_WORDS_S)
            with suppress(OSError):
                while connection.socket.recv(2**16):
                    pass

    def on_sigterm(self, number: int, frame: object) -> None:
        """Handle the SIGTERM with which torchrun ends the other processes: first, let it be said what happened."""
        if self._told.wait(LEARN_S / 2):
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, connection in self._connections.items():
            selector.register(connection.socket, selectors.EVENT_READ, rank)
        ticked_at = beat_at = time.monotonic()
        while not self.is_closed:
            for key, _ in selector.select(TICK_S):
                if not self._receive(key.data):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now - ticked_at > 5 * TICK_S:
                # this process itself did not run, as after a laptop's sleep: nobody could be heard meanwhile
                for connection in self._connections.values():
                    connection.heard_at += now - ticked_at
                self._moved_at += now - ticked_at
            ticked_at = now
            still_s, waits = self._look_at_main_thread(now)
            if now - beat_at >= BEAT_S:
                beat_at = now
                for connection in self._connections.values():
                    connection.send({"beat": [round(still_s, 1), waits]})
            if self.fault is None:
                self._judge(now, still_s, waits)
            elif now > self._leaves_at:
                for stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        stream.flush()
                os._exit(self.fault.status)
            if os.getppid() != self._parent and not self._is_orphan:
                # what started this process is gone: stop as if asked to
                self._is_orphan = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _look_at_main_thread(self, now: float) -> tuple[float, bool]:
        """Return how long the main thread has not moved, in seconds, and whether it waits for another process."""
        frame, place, waits = sys._current_frames().get(self._main_thread), [], False
        while frame is not None:
            place.append((frame.f_code, frame.f_lasti))
            file = frame.f_code.co_filename
            waits = waits or (file.startswith(WAITS_IN) and not file.startswith(LAUNCHED_BY))
            frame = frame.f_back
        if (place := tuple(place)) != self._place:
            self._place, self._moved_at = place, now
        return now - self._moved_at, waits

    def _receive(self, rank: int) -> bool:
        """Read what a process has said; return False once its connection is closed."""
        connection = self._connections[rank]
        try:
            content = connection.socket.recv(2**16)
        except TimeoutError:
            return True
        except OSError:
            content = b""
        if not content:
            self._lost(rank)
            return False
        connection.heard_at = time.monotonic()
        connection.received += content
        *lines, rest = bytes(connection.received).split(b"\n")
        connection.received = bytearray(rest)
        for line in lines if len(rest) <= MAX_MESSAGE_BYTES else ():
            with suppress(ValueError, KeyError, TypeError):
                message = parse_json(line)
                if "fault" in message:
                    self._end(Fault.from_json(message["fault"]), says=self.rank == 0)
                elif "bye" in message:
                    del self._connections[rank]
                    return False
                else:
                    still_s, waits = message["beat"]
                    connection.still_s, connection.waits = float(still_s), bool(waits)
        return True

    def _lost(self, rank: int) -> None:
        del self._connections[rank]
        what = "has ended without a word: it was killed, for example because memory was full, or its machine failed"
        self._end(self._fault_of((rank,), what), says=self._is_speaker())

    def _judge(self, now: float, still_s: float, waits: bool) -> None:
        """End the run if a process has hung for too long."""
        known = {rank: (c.still_s, c.waits, now - c.heard_at) for rank, c in self._connections.items()}
        silent = tuple(rank for rank, (_, _, silent_s) in known.items() if silent_s > self.timeout_s)
        if silent:
            what = f"gave no sign of life for {self.timeout_s:g} s (distributed.timeout_s)"
            self._end(self._fault_of(silent, what, killed=silent), says=self._is_speaker())
        elif self.rank == 0:
            known[0] = (still_s, waits, 0.0)
            stuck = {rank: waits for rank, (still_s, waits, _) in sorted(known.items()) if still_s > self.timeout_s}
            hung = tuple(rank for rank, waits in stuck.items() if not waits)
            if hung:
                what = f"did nothing for {self.timeout_s:g} s (distributed.timeout_s)"
                self._end(self._fault_of(hung, what, killed=hung), says=True)
            elif len(stuck) == started.world_size():
                what = f"waited for one another for {self.timeout_s:g} s (distributed.timeout_s)"
                self._end(self._fault_of(tuple(stuck), what), says=True)

    def _fault_of(self, ranks: tuple[int, ...], what: str, killed: tuple[int, ...] = ()) -> Fault:
        shown = name(self.peers, ranks[0])
        if len(ranks) > 1:
            shown += f" and {name(self.peers, ranks[1])}" if len(ranks) == 2 else f" and {len(ranks) - 1} others"
        return Fault(ranks[0], f"safelight {self._command}: {shown} {what}; {self.outlook(EXIT_FAULT)}", killed=killed)

    def _is_speaker(self) -> bool:
        """Return whether this process tells that another one is gone: rank 0, or instead of it one on each machine."""
        ranks = [rank for rank, peer in enumerate(self.peers) if rank and peer.host == self.peers[self.rank].host]
        return self.rank == 0 or self.rank == min(ranks)

    def _end(self, fault: Fault, says: bool) -> None:
        """Take note of what ends the run, pass it on, and say it if this process is to."""
        with self._lock:
            if self.fault is not None or self.is_closed:
                return
            self._leaves_at = time.monotonic() + GRACE_S
            self.fault = fault
        if says:
            started.note_that_said()
            self._say(fault.text)
        if self.rank == 0:
            for connection in [*self._connections.values()]:
                connection.send({"fault": fault.to_json()})
            with suppress(RuntimeError):
                self.note_final(fault.status)
        for rank in fault.killed:
            # else its other end keeps the rest waiting
            if rank != self.rank and self.peers[rank].place == self.peers[self.rank].place:
                with suppress(OSError):
                    os.kill(self.peers[rank].pid, signal.SIGKILL)
        self._told.set()


def is_exchange_error(error: BaseException) -> bool:
    """Return whether an exchange between processes has failed, as torch says it, or another process has."""
    return isinstance(error, dist.DistError | PeerFailed) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in EXCHANGE_ERRORS)
    )


def _accept(store: dist.Store, peers: tuple[Peer, ...]) -> dict[int, _Connection]:
    """Return rank 0's connections, by rank, once all others have connected."""
    on_one_machine = all(peer.host == peers[0].host for peer in peers)
    if on_one_machine:
        server = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    token = secrets.token_hex(16)
    where = {"port": server.getsockname()[1], "address": "127.0.0.1" if on_one_machine else _own_address()}
    store.set("watch", json.dumps({**where, "token": token}))
    connections: dict[int, _Connection] = {}
    ends_at = time.monotonic() + CONNECT_TIMEOUT_S
    with server:
        while len(connections) < len(peers) - 1:
            server.settimeout(max(0.01, ends_at - time.monotonic()))
            other, _ = server.accept()
            other.settimeout(5.0)
            try:
                line = bytearray()
                while not line.endswith(b"\n") and len(line) < 200 and (one := other.recv(1)):
                    line += one
                message = parse_json(bytes(line))
                rank = int(message["rank"])
                is_ours = secrets.compare_digest(str(message["token"]), token) and 0 < rank < len(peers)
            except (OSError, ValueError, KeyError, TypeError):
                is_ours = False
            if is_ours:
                connections[rank] = _Connection(other)
            else:
                other.close()
    return connections


def _connect(store: dist.Store, rank: int) -> _Connection:
    where = parse_json(store.get("watch"))
    # '' if rank 0 knows itself by an address that only its machine has
    address = where["address"] or os.environ["MASTER_ADDR"]
    connection = _Connection(socket.create_connection((address, where["port"]), CONNECT_TIMEOUT_S))
    connection.socket.settimeout(5.0)
    connection.send({"rank": rank, "token": where["token"]})
    return connection


def _own_address() -> str:
    """Return the address under which this machine reaches the one that the processes meet on; '' if that is itself."""
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, *_, place = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        # sends nothing
        probe.connect(place)
        address = probe.getsockname()[0]
    return "" if address.startswith("127.") or address == "::1" else address
