"""The registry of optimizers: every value of `optimizer.name`, and what each one supports. Does not import torch.

The config's checks and help, the training step, the planner and the benchmarks read this registry instead of comparing
names. A new optimizer is a row here and, if no class in trainer/optim fits it, a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from safelight.kernels.moment_blocks import CODE_BYTES, MIN_8BIT_ELEMENTS, num_blocks

Shape = Sequence[int]


@dataclass(frozen=True)
class MemoryMode:
    """A value of optimizer.memory: what is kept of a 16-bit weight's fp32 value.

    bytes_per_weight: kept in addition to the weight. allows_average: whether train.ema_decay can be used with it.
    is_random: whether updates are rounded stochastically. pages_state: whether remainders and moments are in host
    memory. streams_weights: whether the weights of blocks are as well, which needs optimizer.fused_backward.
    """

    bytes_per_weight: int
    description: str
    allows_average: bool = True
    is_random: bool = False
    pages_state: bool = False
    streams_weights: bool = False


MEMORY_MODES = {
    "exact": MemoryMode(2, "16-bit remainders"),
    "near": MemoryMode(1, "8-bit remainders", is_random=True),
    "rounded": MemoryMode(0, "stochastic rounding", is_random=True),
    "paged": MemoryMode(2, "16-bit remainders and moments in host memory", allows_average=False, pages_state=True),
    "streamed": MemoryMode(
        2,
        "blocks' weights, 16-bit remainders and moments in host memory",
        allows_average=False,
        pages_state=True,
        streams_weights=True,
    ),
    "fp32": MemoryMode(4, "fp32 master"),
}


class MomentBuffer(NamedTuple):
    """One tensor of an optimizer's state: its number of elements and the bytes of each."""

    num_elements: int
    itemsize: int


Moments = Callable[..., list[MomentBuffer]]


def fp32_moments(number: int) -> Moments:
    """Return the layout of `number` fp32 moments in the weight's shape."""
    return lambda shape: [MomentBuffer(math.prod(shape), 4)] * number


def blockwise_moments(number: int) -> Moments:
    """Return the layout of `number` 8-bit moments with a scale per block; small tensors have fp32 moments."""

    def layout(shape: Shape) -> list[MomentBuffer]:
        num_elements = math.prod(shape)
        if num_elements < MIN_8BIT_ELEMENTS:
            return [MomentBuffer(num_elements, 4)] * number
        return [MomentBuffer(num_elements, 1), MomentBuffer(num_blocks(num_elements), 4)] * number

    return layout


def chosen_moments(shape: Shape, moments: str = "8bit") -> list[MomentBuffer]:
    """Return our AdamW's layout: codes of both moments, 2 bytes or 1 an element, and both scales of each block."""
    num_elements = math.prod(shape)
    if num_elements < MIN_8BIT_ELEMENTS:
        return fp32_moments(2)(shape)
    scales = MomentBuffer(num_blocks(num_elements), 4)
    return [MomentBuffer(num_elements, 1)] * CODE_BYTES[moments] + [scales] * 2


def factored_moments(shape: Shape) -> list[MomentBuffer]:
    """Return Adafactor's layout: row and column factors over the last two dimensions; a vector has one fp32 moment."""
    if len(shape) < 2:
        return [MomentBuffer(math.prod(shape), 4)]
    *outer, rows, columns = shape
    return [MomentBuffer(math.prod((*outer, rows)), 4), MomentBuffer(math.prod((*outer, columns)), 4)]


def sliced_moments(shape: Shape, slice_p: int = 1) -> list[MomentBuffer]:
    """Return Prodigy's layout: two fp32 moments, and every slice_p-th value of the first weight and of a sum."""
    num_elements = math.prod(shape)
    return [MomentBuffer(num_elements, 4)] * 2 + [MomentBuffer(-(-num_elements // slice_p), 4)] * 2


@dataclass(frozen=True)
class OptimizerSpec:
    """What an optimizer is and what it supports.

    name: as in optimizer.name. help: its line in the config's help.
    implementation: the UNetOptimizer, "module:class". library: the optimizer that it wraps, "module:class", "" if none.
    moments: returns the buffers that it keeps for a weight of a shape. moment_settings: those of [optimizer] that they
    depend on, which it takes as keyword arguments.
    memory_modes: values of optimizer.memory that it supports for 16-bit weights. `auto` is the first of them, unless a
    plan for a GPU chooses from planned_modes, which are in order of preference.
    settings: those of [optimizer] that it reads in addition to lr, weight_decay and those of the training loop.
    steps_inside_backward: whether optimizer.fused_backward can be true.
    is_capturable: whether its step can be captured as a CUDA graph.
    reads_16bit_gradients: false if each 16-bit gradient is first copied to fp32 for the master.
    converts_in_pieces: whether fp32 weights are converted to 16 bits on the device in pieces instead of all at once.
    needs_contiguous_weights: whether it copies weights in another memory order to new memory.
    default_lr: optimizer.lr where the config gives none, 0 for the usual one. min_lr: the lowest lr that makes sense.
    estimates_rate: whether it finds its learning rate itself, so that lr is a factor on that.
    averages_weights: whether it keeps an average of the weights, which validation, samples and exports use; it then
    takes the place of a schedule and of train.ema_decay.
    package: has to be installed. devices: where it runs. device_limit: why it runs on no others, and what to use there.
    """

    name: str
    help: str
    implementation: str
    moments: Moments
    library: str = ""
    memory_modes: tuple[str, ...] = ("fp32",)
    planned_modes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    steps_inside_backward: bool = False
    is_capturable: bool = False
    reads_16bit_gradients: bool = False
    converts_in_pieces: bool = False
    needs_contiguous_weights: bool = False
    moment_settings: tuple[str, ...] = ()
    default_lr: float = 0.0
    min_lr: float = 0.0
    estimates_rate: bool = False
    averages_weights: bool = False
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    device_limit: str = ""

    def moment_bytes(self, shape: Shape, config: object = None) -> int:
        """Return the bytes of the moments of a weight, including scales. config: [optimizer], None for its defaults."""
        settings = {} if config is None else {name: getattr(config, name) for name in self.moment_settings}
        return sum(buffer.num_elements * buffer.itemsize for buffer in self.moments(shape, **settings))


_LIBRARY = "safelight.trainer.optim.library_optimizer"

_SCHEDULE_FREE_HELP = (
    "schedule-free {name}, which averages the weights instead of lowering the rate: trains at one\n"
    "weight, and validates, samples and exports another, the average; 8 bytes per parameter; needs schedulefree"
)

_SPECS = (
    OptimizerSpec(
        name="adamw8bit",
        help=("AdamW with 8-bit moments in our own kernel, 2 bytes of moments per parameter, 1 with moments 4bit"),
        implementation="safelight.trainer.optim.kernel_adamw:KernelAdamW",
        moments=chosen_moments,
        moment_settings=("moments",),
        memory_modes=("exact", "near", "paged", "streamed", "rounded", "fp32"),
        planned_modes=("exact", "near", "paged", "streamed", "rounded"),
        settings=("betas", "eps", "moments"),
        steps_inside_backward=True,
        is_capturable=True,
        reads_16bit_gradients=True,
        converts_in_pieces=True,
    ),
    OptimizerSpec(
        name="bnb_adamw8bit",
        help="bitsandbytes' 8-bit AdamW",
        implementation=f"{_LIBRARY}:BitsandbytesOptimizer",
        library="bitsandbytes.optim:AdamW8bit",
        moments=blockwise_moments(2),
        settings=("betas", "eps"),
        needs_contiguous_weights=True,
        package="bitsandbytes",
    ),
    OptimizerSpec(
        name="bnb_paged_adamw8bit",
        help="bitsandbytes' paged 8-bit AdamW, whose moments are in CUDA's unified memory; only on a GPU",
        implementation=f"{_LIBRARY}:BitsandbytesOptimizer",
        library="bitsandbytes.optim:PagedAdamW8bit",
        moments=blockwise_moments(2),
        settings=("betas", "eps"),
        needs_contiguous_weights=True,
        package="bitsandbytes",
        devices=("cuda",),
        device_limit="keeps its moments in CUDA's unified memory, and this run is on a CPU; use bnb_adamw8bit",
    ),
    OptimizerSpec(
        name="bnb_lion8bit",
        help=(
            "bitsandbytes' Lion with one 8-bit moment, 1 byte per parameter; each step moves every weight by lr, so\n"
            "use an lr 3 to 10 times lower than AdamW's, a weight_decay higher by as much, and betas = [0.9, 0.99]"
        ),
        implementation=f"{_LIBRARY}:BitsandbytesOptimizer",
        library="bitsandbytes.optim:Lion8bit",
        moments=blockwise_moments(1),
        settings=("betas",),
        needs_contiguous_weights=True,
        package="bitsandbytes",
    ),
    OptimizerSpec(
        name="adamw",
        help="torch's AdamW, 8 bytes of fp32 moments per parameter",
        implementation=f"{_LIBRARY}:TorchAdamW",
        library="torch.optim:AdamW",
        moments=fp32_moments(2),
        settings=("betas", "eps"),
    ),
    OptimizerSpec(
        name="adafactor",
        help=(
            "torch's Adafactor, moments factored over the last two dimensions: almost no memory for linear layers,\n"
            "8/3 bytes per parameter for 3 x 3 convolutions; its lr is relative to each tensor's root mean square, so\n"
            "it has to be higher than AdamW's"
        ),
        implementation=f"{_LIBRARY}:TorchAdafactor",
        library="torch.optim:Adafactor",
        moments=factored_moments,
    ),
    OptimizerSpec(
        name="prodigy",
        help=(
            "Prodigy, AdamW that estimates its learning rate: lr is a factor on the estimate, 1 as a rule, and the\n"
            "estimate is logged as effective_lr; 16 bytes per parameter, 8 + 8 / slice_p in general; needs prodigyopt"
        ),
        implementation="safelight.trainer.optim.prodigy:ProdigyOptimizer",
        library="prodigyopt:Prodigy",
        moments=sliced_moments,
        moment_settings=("slice_p",),
        settings=("betas", "eps", "d0", "d_coef", "safeguard_warmup", "use_bias_correction", "slice_p"),
        default_lr=1.0,
        min_lr=0.01,
        estimates_rate=True,
        package="prodigyopt",
    ),
    OptimizerSpec(
        name="schedulefree_adamw",
        help=_SCHEDULE_FREE_HELP.format(name="AdamW"),
        implementation="safelight.trainer.optim.schedule_free:ScheduleFreeOptimizer",
        library="schedulefree:AdamWScheduleFree",
        moments=fp32_moments(2),
        settings=("betas", "eps", "average_power", "average_lr_power"),
        averages_weights=True,
        package="schedulefree",
    ),
    OptimizerSpec(
        name="schedulefree_radam",
        help="the same with RAdam, whose rate rises by itself: it needs no warmup_steps",
        implementation="safelight.trainer.optim.schedule_free:ScheduleFreeOptimizer",
        library="schedulefree:RAdamScheduleFree",
        moments=fp32_moments(2),
        settings=("betas", "eps", "average_power", "average_lr_power"),
        averages_weights=True,
        package="schedulefree",
    ),
)

OPTIMIZERS: dict[str, OptimizerSpec] = {spec.name: spec for spec in _SPECS}


def names_with(has: Callable[[OptimizerSpec], bool]) -> str:
    """Return the names of the optimizers for which `has` is true, for messages: `a`, `a or b`."""
    return " or ".join(spec.name for spec in _SPECS if has(spec))


def help_text() -> str:
    """Return the help of optimizer.name, which describes each optimizer."""
    return ";\n".join(f"{spec.name}: {spec.help}" for spec in _SPECS) + "."
