"""What one way of training takes of a card, as a plan tells it; what stands against its steps as CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass, field

from safelight.trainer.between import Between
from safelight.trainer.cards import GIB
from safelight.trainer.config import Config
from safelight.trainer.host_memory import HostBytes


@dataclass(frozen=True)
class Need:
    """What one way of training takes. needed: bytes of the card; held: between steps; step: what a step adds at its peak.

    others: the most of loading, and of validation and drawing at the least, in all. images_per_s: an estimate, None where
    the card's rates are not known. during: where the step's peak is; kinds: what is alive there, by kind. between: how
    validation and drawing are done in the room that is left. graphs: bytes that CUDA graphs take beside a step's own peak, if
    a run has them, at the most. no_graphs: why steps are not replayed as such, '' where they are.
    """

    memory: str
    checkpointing: str
    fused_backward: bool
    batch_size: int
    needed: int
    held: int
    step: int
    others: int
    during: str
    kinds: dict[str, int]
    images_per_s: float | None
    between: Between = field(default_factory=Between)
    host: HostBytes | None = None
    graphs: int = 0
    no_graphs: str = ""

    def settings(self) -> str:
        """Return the settings of it, as they are written on the command line."""
        return (
            f"--optimizer.memory {self.memory} --train.checkpointing {self.checkpointing} "
            f"--optimizer.fused-backward {str(self.fused_backward).lower()} --train.batch-size {self.batch_size}"
        )


def streams_from_host(memory: str, checkpointing: str) -> str:
    """Return which setting of a step waits for copies to and from the host, '' for none."""
    if memory == "paged":
        return "optimizer.memory paged streams from the host"
    return "train.checkpointing offload streams from the host" if checkpointing == "offload" else ""


def graphs_against(config: Config, need: Need, budget: int) -> str:
    """Return why a way's steps are not replayed as CUDA graphs on a card, '' where they are. budget: bytes that a run may take."""
    if config.train.cuda_graphs == "off":
        return "train.cuda_graphs is off"
    if config.optimizer.name != "adamw8bit":
        return f"{config.optimizer.name} reads from the device at every step"
    if reason := streams_from_host(need.memory, need.checkpointing):
        return reason
    # what a graph's step takes is not given back to what runs between steps
    needed = max(need.needed + need.others - need.held, need.between.most + need.step) + need.graphs
    return f"they would take {needed / GIB:.2f} GiB of {budget / GIB:.2f}" if needed > budget else ""
