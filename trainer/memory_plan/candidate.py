"""What one way of training takes of a card, as a plan tells it; what stands against its steps as CUDA graphs.

What a run does between steps on a GPU, in the room that is left: how many images are validated and prompts drawn at a time,
and whether the GPU decodes what was drawn.

None of it decides whether a run fits but at its least: one image, one prompt (two rows with guidance), decoded on the CPU.
The values are the same but for float rounding; a decoder in fp32 on a CPU takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from safelight.data.text import counted
from safelight.trainer.config.schema import Config
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE
from safelight.trainer.memory_plan.static_bytes import HostBytes
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.units import GIB

Forward = Callable[[int], int]


@dataclass(frozen=True)
class Between:
    """How validation and drawing are done. validated: images at a time, of validate_wanted; prompts: at a time; decode_on: gpu
    or cpu; 0 and '' where a run does no such thing. most: bytes of the card at their peak, all that a run takes included."""

    validated: int = 0
    prompts: int = 0
    decode_on: str = ""
    most: int = 0
    validate_wanted: int = 0

    def describe(self) -> str:
        """Return the words for the terminal; empty where nothing is done in another way than with room to spare."""
        told = []
        if 0 < self.validated < self.validate_wanted:
            told.append(f"validates {counted(self.validated, 'image')} at a time, not {self.validate_wanted}")
        if 0 < self.prompts < SAMPLE_BATCH_SIZE:
            told.append(f"draws {counted(self.prompts, 'prompt')} at a time, not {SAMPLE_BATCH_SIZE}")
        if self.decode_on == "cpu":
            told.append("decodes samples on the CPU, which takes longer")
        return ", ".join(told)


def halves(most: int) -> list[int]:
    """Return a batch size and its halves, down to 1."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def least_of(validated: Forward | None, drawn: Forward | None) -> int:
    """Return the bytes that validation and drawing add at the least."""
    return max((forward(1) for forward in (validated, drawn) if forward is not None), default=0)


def added_by(between: Between, validated: Forward | None, drawn: Forward | None, decode: int) -> int:
    """Return the bytes that a way adds to what is held. Raises ValueError for one that is none."""
    added = [0]
    for num, forward in ((between.validated, validated), (between.prompts, drawn)):
        if (num > 0) != (forward is not None):
            raise ValueError(f"{between} is of a run with other validation or samples")
        added.append(0 if forward is None else forward(num))
    if between.decode_on not in ("", "cpu", "gpu") or (between.decode_on == "") != (drawn is None):
        raise ValueError(f"{between} decodes on neither cpu nor gpu")
    return max(*added, decode if between.decode_on == "gpu" else 0)


def fill(
    budget: int,
    total: Callable[[int], int],
    validate_size: int,
    validated: Forward | None,
    drawn: Forward | None,
    decode: int,
) -> Between:
    """Return the most at a time that fits, and where to decode.

    total: bytes of the card for so many beside what is held. validated, drawn: bytes that so many at a time add; None where
    there is no such thing. decode: bytes that decoding adds on the GPU.
    """

    def largest(most: int, forward: Forward) -> int:
        return next((n for n in halves(most) if total(forward(n)) <= budget), 1)

    found = Between(
        0 if validated is None else largest(validate_size, validated),
        0 if drawn is None else largest(SAMPLE_BATCH_SIZE, drawn),
        "" if drawn is None else "gpu" if total(decode) <= budget else "cpu",
        validate_wanted=0 if validated is None else validate_size,
    )
    return replace(found, most=total(added_by(found, validated, drawn, decode)))


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
    if not OPTIMIZERS[config.optimizer.name].is_capturable:
        return f"{config.optimizer.name} reads from the device at every step"
    if reason := streams_from_host(need.memory, need.checkpointing):
        return reason
    # what a graph's step takes is not given back to what runs between steps
    needed = max(need.needed + need.others - need.held, need.between.most + need.step) + need.graphs
    return f"they would take {needed / GIB:.2f} GiB of {budget / GIB:.2f}" if needed > budget else ""
