"""What ends a run of several processes, as one of them tells the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass

EXIT_FAULT = 1


@dataclass(frozen=True)
class Fault:
    """text: the lines to print, once. status: of every process's exit. rank: whose fault it is.

    killed: ranks that do not answer, and are ended by a process on their machine.
    """

    rank: int
    text: str
    status: int = EXIT_FAULT
    killed: tuple[int, ...] = ()

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> Fault:
        """Return the fault of a message. Raises ValueError, KeyError or TypeError for anything else."""
        killed = tuple(int(rank) for rank in values["killed"])
        return cls(int(values["rank"]), str(values["text"]), int(values["status"]), killed)


class EndedByPeer(Exception):
    """Raised where a process learns that another one's fault has ended the run, which is told already."""

    def __init__(self, fault: Fault):
        super().__init__(fault.text)
        self.fault = fault


class PeerFailed(Exception):
    """Raised where a process learns that another one has failed by a bug of ours, which that one is about to tell."""
