"""A candidate: one combination of memory mode, checkpointing, fused backward and batch size, with its predicted memory.

Also how a run validates and samples between steps with the memory that is left: how many images or prompts at a time,
and whether samples are decoded on the GPU or the CPU. A run fits if it can do the minimum: one image, one prompt (two
rows with guidance), decoded on the CPU. Larger batches give the same values up to float rounding, and decoding on the
CPU is slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Self

from safelight.kernels.unet.checkpointing import MODES
from safelight.text import counted
from safelight.trainer.config.schema import Config
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE
from safelight.trainer.memory_plan.allocation_trace import KINDS
from safelight.trainer.memory_plan.plan_cache import checked_int, checked_table, checked_text
from safelight.trainer.memory_plan.static_bytes import HostBytes
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS
from safelight.units import GIB

# maps a number of images or prompts at a time to the bytes that their forward pass adds
ForwardBytes = Callable[[int], int]

# resumed runs and `safelight plan --json` read these names
_BATCHING_JSON = {
    "validated": "validation_images",
    "prompts": "prompts",
    "decode_on": "decode_on",
    "most": "peak_bytes",
    "validate_wanted": "wanted_validation_images",
}
_CANDIDATE_JSON = {
    "memory": "memory",
    "checkpointing": "checkpointing",
    "fused_backward": "fused_backward",
    "batch_size": "batch_size",
    "needed": "needed_bytes",
    "held": "held_bytes",
    "step": "step_bytes",
    "others": "outside_step_bytes",
    "during": "peak_phase",
    "kinds": "bytes_by_kind",
    "images_per_s": "images_per_s",
    "between": "eval_batching",
    "host": "host",
    "graphs": "graph_bytes",
    "bus_in": "bytes_inward",
    "bus_out": "bytes_outward",
    "no_graphs": "no_graphs",
}


@dataclass(frozen=True)
class EvalBatching:
    """How a run validates and samples between steps.

    validation_images, prompts: how many at a time, 0 if the run does not validate or sample; wanted_validation_images:
    validate.batch_size; decode_on: gpu, cpu or '' without samples; peak_bytes: GPU memory of the whole run meanwhile.
    """

    validation_images: int = 0
    prompts: int = 0
    decode_on: str = ""
    peak_bytes: int = 0
    wanted_validation_images: int = 0

    def describe(self) -> str:
        """Return what is done differently for lack of memory, '' if nothing is."""
        parts = []
        if 0 < self.validation_images < self.wanted_validation_images:
            images = counted(self.validation_images, "image")
            parts.append(f"validates {images} at a time instead of {self.wanted_validation_images}")
        if 0 < self.prompts < SAMPLE_BATCH_SIZE:
            parts.append(f"samples {counted(self.prompts, 'prompt')} at a time instead of {SAMPLE_BATCH_SIZE}")
        if self.decode_on == "cpu":
            parts.append("decodes samples on the CPU, which is slower")
        return ", ".join(parts)

    def to_json(self) -> dict:
        return {key: getattr(self, name) for key, name in _BATCHING_JSON.items()}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return the batching that `to_json` wrote. Raises ValueError for anything else."""
        if not isinstance(values, dict) or not values.keys() <= _BATCHING_JSON.keys():
            raise ValueError("not a description of validation and sampling")
        batching = cls(**{_BATCHING_JSON[key]: value for key, value in values.items()})
        counts = (batching.validation_images, batching.prompts, batching.peak_bytes, batching.wanted_validation_images)
        if batching.decode_on not in ("", "gpu", "cpu") or not all(type(x) is int and x >= 0 for x in counts):
            raise ValueError("not a description of validation and sampling")
        return batching


def halvings(largest: int) -> list[int]:
    """Return a batch size followed by its halves, down to 1."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def smallest_eval_bytes(validate: ForwardBytes | None, sample: ForwardBytes | None) -> int:
    """Return the bytes that validation and sampling add at one image or prompt at a time."""
    return max((forward(1) for forward in (validate, sample) if forward is not None), default=0)


def eval_bytes(
    batching: EvalBatching, validate: ForwardBytes | None, sample: ForwardBytes | None, decode_bytes: int
) -> int:
    """Return the bytes that validation and sampling add to those held.

    validate, sample: None if the run does not do it. Raises ValueError if the batching does not match the run.
    """
    added = [0]
    for num, forward in ((batching.validation_images, validate), (batching.prompts, sample)):
        if (num > 0) != (forward is not None):
            raise ValueError(f"{batching} belongs to a run with other validation or sampling")
        added.append(0 if forward is None else forward(num))
    if batching.decode_on not in ("", "cpu", "gpu") or (batching.decode_on == "") != (sample is None):
        raise ValueError(f"{batching} must decode on cpu or gpu if the run samples, and on neither otherwise")
    return max(*added, decode_bytes if batching.decode_on == "gpu" else 0)


def choose_eval_batching(
    budget: int,
    total_bytes: Callable[[int], int],
    validate_batch_size: int,
    validate: ForwardBytes | None,
    sample: ForwardBytes | None,
    decode_bytes: int,
) -> EvalBatching:
    """Return the largest batches that fit, and whether the GPU can decode; one at a time on the CPU if nothing fits.

    total_bytes: maps bytes added to those held to GPU memory of the whole run. validate, sample: None if the run does
    not do it. decode_bytes: what decoding on the GPU adds.
    """

    def largest_fitting(largest: int, forward: ForwardBytes) -> int:
        return next((n for n in halvings(largest) if total_bytes(forward(n)) <= budget), 1)

    batching = EvalBatching(
        0 if validate is None else largest_fitting(validate_batch_size, validate),
        0 if sample is None else largest_fitting(SAMPLE_BATCH_SIZE, sample),
        "" if sample is None else "gpu" if total_bytes(decode_bytes) <= budget else "cpu",
        wanted_validation_images=0 if validate is None else validate_batch_size,
    )
    return replace(batching, peak_bytes=total_bytes(eval_bytes(batching, validate, sample, decode_bytes)))


@dataclass(frozen=True)
class Candidate:
    """Predicted GPU memory of one training configuration, and why it cannot use CUDA graphs.

    needed_bytes: GPU memory of the whole run; held_bytes: allocated between steps; step_bytes: what a step adds at
    its peak; outside_step_bytes: peak allocation outside training steps: loading, or validation and sampling one
    image at a time. peak_phase: when in the step the peak occurs; bytes_by_kind: what is alive then. images_per_s: an
    estimate, None if the card's rates are unknown. graph_bytes: upper bound of what CUDA graphs take in addition to a
    step's peak, 0 if they cannot be used. no_graphs: why steps are not replayed as CUDA graphs, '' if they are.
    bytes_inward, bytes_outward: copied in a step from host memory to the GPU and back, batches excepted.
    """

    memory: str
    checkpointing: str
    fused_backward: bool
    batch_size: int
    needed_bytes: int
    held_bytes: int
    step_bytes: int
    outside_step_bytes: int
    peak_phase: str
    bytes_by_kind: dict[str, int]
    images_per_s: float | None
    eval_batching: EvalBatching = field(default_factory=EvalBatching)
    host: HostBytes | None = None
    graph_bytes: int = 0
    no_graphs: str = ""
    bytes_inward: int = 0
    bytes_outward: int = 0

    def options(self) -> str:
        """Return the command-line options that select this candidate."""
        return (
            f"--optimizer.memory {self.memory} --train.checkpointing {self.checkpointing} "
            f"--optimizer.fused-backward {str(self.fused_backward).lower()} --train.batch-size {self.batch_size}"
        )

    def to_json(self) -> dict:
        """Return plain values, as recorded in environment.json, where a resumed run finds them."""
        values = {key: getattr(self, name) for key, name in _CANDIDATE_JSON.items()}
        host = None if self.host is None else asdict(self.host)
        return {**values, "kinds": dict(self.bytes_by_kind), "between": self.eval_batching.to_json(), "host": host}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return the candidate that `to_json` wrote. Raises ValueError for anything else."""
        table = checked_table(values, set(_CANDIDATE_JSON))
        if type(table["fused_backward"]) is not bool:
            raise ValueError("fused_backward is neither true nor false")
        speed, host = table["images_per_s"], table["host"]
        if speed is not None and (type(speed) is not float or speed <= 0):
            raise ValueError("images_per_s is not a speed")
        if host is not None:
            names = {field.name for field in fields(HostBytes)}
            host = HostBytes(**{name: checked_int(x) for name, x in checked_table(host, names).items()})
        kinds = checked_table(table["kinds"], set(KINDS))
        other = {
            "memory": checked_text(table["memory"], tuple(MEMORY_MODES)),
            "checkpointing": checked_text(table["checkpointing"], MODES),
            "during": checked_text(table["during"]),
            "no_graphs": checked_text(table["no_graphs"]),
            "fused_backward": table["fused_backward"],
            "images_per_s": speed,
            "host": host,
            "kinds": {name: checked_int(x) for name, x in kinds.items()},
            "between": EvalBatching.from_json(table["between"]),
        }
        return cls(
            **{name: other[key] if key in other else checked_int(table[key]) for key, name in _CANDIDATE_JSON.items()}
        )


def streams_from_host(memory: str, checkpointing: str) -> str:
    """Return which setting makes a step wait for copies to and from host memory, '' if none does."""
    mode = MEMORY_MODES[memory]
    if mode.pages_state:
        what = "weights and optimizer state" if mode.streams_weights else "optimizer state"
        return f"optimizer.memory {memory} streams {what} from host memory"
    return "train.checkpointing offload streams activations from host memory" if checkpointing == "offload" else ""


def why_no_graphs(config: Config, candidate: Candidate, budget: int) -> str:
    """Return why a candidate's steps are not replayed as CUDA graphs, '' if they are. budget: bytes the run may use."""
    if config.train.cuda_graphs == "off":
        return "train.cuda_graphs is off"
    if config.distributed.shard != "none":
        return f"distributed.shard {config.distributed.shard} exchanges weights in each step, which is not captured"
    if config.text_encoder.train:
        return "the text encoder is trained, whose steps are not captured"
    if "dropout" in config.adapter.spec.settings and config.adapter.dropout > 0:
        return "adapter.dropout draws its masks by keys that the host sets before each step"
    if config.reads_captions_in_step:
        return "captions are read inside the step, whose text encoders are not captured"
    if not OPTIMIZERS[config.optimizer.name].is_capturable:
        return f"{config.optimizer.name} reads values back from the GPU at every step"
    if reason := streams_from_host(candidate.memory, candidate.checkpointing):
        return reason
    # the memory pool of graphs stays allocated between steps
    outside_step = candidate.needed_bytes + candidate.outside_step_bytes - candidate.held_bytes
    needed = max(outside_step, candidate.eval_batching.peak_bytes + candidate.step_bytes) + candidate.graph_bytes
    if needed <= budget:
        return ""
    return f"with graphs the run would need {needed / GIB:.2f} GiB of the {budget / GIB:.2f} GiB available"
