"""Two processes train as one does: every optimizer and memory mode, uneven steps, overflows, whole runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from safelight.kernels.moment_blocks import BLOCK_SIZE, MIN_8BIT_ELEMENTS
from safelight.kernels.optim import adamw8bit
from safelight.trainer.distributed.sharded import is_cut, local, piece_of, whole_of
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.optim import kernel_adamw
from safelight.trainer.optim.cut_state import is_aligned
from safelight.trainer.optim.optimizer import UNetOptimizer
from tests.trainer.distributed.several import optimizer_in, take_steps, trained_by, world_of_all

# settings of [optimizer], precision, learning rate
MODES = {
    "fp32": ({}, "fp32", 1e-3),
    "fp32 fused": ({"fused_backward": True}, "fp32", 1e-3),
    "exact": ({"memory": "exact"}, "bf16", 1e-3),
    "near fused": ({"memory": "near", "fused_backward": True}, "bf16", 1e-3),
    "rounded": ({"memory": "rounded"}, "bf16", 1e-3),
    "master": ({"memory": "fp32"}, "bf16", 1e-3),
    "fp16": ({"memory": "exact"}, "fp16", 1e-3),
    "paged": ({"memory": "paged"}, "bf16", 1e-3),
    "paged fused per tensor": ({"memory": "paged", "fused_backward": True, "clipping": "per-tensor"}, "bf16", 1e-3),
    "streamed": ({"memory": "streamed", "fused_backward": True}, "bf16", 1e-3),
    "4bit": ({"memory": "exact", "moments": "4bit", "fused_backward": True}, "bf16", 1e-3),
    "adamw": ({"name": "adamw"}, "bf16", 1e-3),
    "bnb": ({"name": "bnb_adamw8bit"}, "fp32", 1e-3),
    "lion": ({"name": "bnb_lion8bit", "betas": (0.9, 0.99)}, "bf16", 1e-4),
    "adafactor": ({"name": "adafactor"}, "fp32", 1e-3),
    "schedule-free": ({"name": "schedulefree_adamw"}, "fp32", 1e-3),
    "prodigy": ({"name": "prodigy", "d0": 1e-4}, "fp32", 1.0),
}
# modes whose state cannot be divided
WHOLE_ONLY = ("streamed", "prodigy")


def compare_modes(names: list[str], num_steps: int, shard: str) -> dict[str, dict[str, float]]:
    """Return for each mode by how much the steps of all processes differ from those of one, which one of them takes."""
    found = {}
    with world_of_all() as world:
        for number, name in enumerate(names):
            settings, precision, lr = MODES[name]
            warms_up = world.is_main and name in ("fp32 fused", "exact", "adamw")
            together = take_steps(world, num_steps, settings, precision, lr=lr, shard=shard, warms_up=warms_up)
            if number % world.size == world.rank:
                found[name] = together.distance(take_steps(ALONE, num_steps, settings, precision, lr=lr))
            # the others have the same weights
            assert len(set(world.gather(together.digest()))) == 1, name
    return found


@pytest.mark.parametrize("num_steps", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shard", ["none", "states"])
def test_two_processes_equal_one_bit_for_bit_in_every_mode(processes, num_steps, shard):
    names = [name for name in MODES if shard == "none" or name not in WHOLE_ONLY]
    if num_steps == 2 and shard == "none":
        # the sums are those of the other shard, but for these
        names = ["fp32 fused", *WHOLE_ONLY]
    elif num_steps == 2:
        names = ["fp32 fused", "exact", "near fused", "4bit"]
    found = processes(compare_modes, names=names, num_steps=num_steps, shard=shard, timeout_s=60 * num_steps)
    distances = {name: distance for part in found for name, distance in part.items()}
    assert distances.keys() == set(names)
    assert {name: distance for name, distance in distances.items() if any(distance.values())} == {}


def compare_uneven(num_micro: int) -> dict[str, float]:
    with world_of_all() as world:
        together, alone = (take_steps(each, 4, {}, num_micro=num_micro, lr=1e-4) for each in (world, ALONE))
        half = take_steps(world, 4, {}, "bf16", num_micro, 1e-4, "fp32").distance(
            take_steps(ALONE, 4, {}, "bf16", num_micro, 1e-4, "fp32")
        )
    return together.distance(alone) | {f"bf16 {name}": value for name, value in half.items()}


@pytest.mark.parametrize(("num_micro", "num"), [(3, 2), pytest.param(5, 4, marks=pytest.mark.slow)])
@pytest.mark.long
def test_processes_without_a_micro_batch_of_their_own_change_nothing(processes, num_micro, num):
    for found in processes(compare_uneven, num=num, num_micro=num_micro):
        assert found["losses"] < 1e-4
        assert found["norms"] < 1e-3
        # a weight moves by 4e-4 in 4 steps
        assert found["weights"] < 2e-5
        assert found["bf16 losses"] < 1e-2


CUT = ("fp32", "fp32 fused", "exact", "near fused", "rounded", "master", "fp16", "paged")


@contextmanager
def moments_in_fp32() -> Iterator[None]:
    """Keep the moments of all optimizers in fp32, so that there are no blocks."""
    modules = (adamw8bit, kernel_adamw)
    before = adamw8bit.MIN_8BIT_ELEMENTS
    for module in modules:
        module.MIN_8BIT_ELEMENTS = 2**62
    try:
        yield
    finally:
        for module in modules:
            module.MIN_8BIT_ELEMENTS = before


@contextmanager
def inputs_as_they_are() -> Iterator[None]:
    """Keep FSDP2 from putting an autograd function on the inputs of its units.

    With it, autograd adds the gradients of what several units read, such as skip connections, in another order.
    """
    hook = "_register_post_backward_hook"
    with mock.patch.object(_fsdp_param_group.FSDPParamGroup, hook, lambda self, args, kwargs: (args, kwargs)):
        yield


def compare_cut(
    names: list[str], num_steps: int, keeps_order: bool, moments: str = "8-bit", max_grad_norm: float = 1.0
) -> dict[str, dict[str, float]]:
    """Return for each mode by how much the steps with cut weights differ from those with whole ones.

    keeps_order: of the addition of gradients. moments: 8-bit, fp32, or whole blocks: only those weights are trained
    whose pieces begin with a block of moments.
    """
    found = {}
    with (
        world_of_all() as world,
        moments_in_fp32() if moments == "fp32" else nullcontext(),
        inputs_as_they_are() if keeps_order else nullcontext(),
    ):

        def is_trained(p: torch.Tensor) -> bool:
            rows = -(-p.shape[0] // world.size)
            is_whole = p.numel() < MIN_8BIT_ELEMENTS or rows * (p.numel() // p.shape[0]) % BLOCK_SIZE == 0
            return is_whole or moments != "whole blocks"

        for name in names:
            settings, precision, _ = MODES[name]
            cut, whole = (
                take_steps(
                    world,
                    num_steps,
                    settings,
                    precision,
                    lr=1e-4,
                    shard=shard,
                    trains=is_trained,
                    max_grad_norm=max_grad_norm,
                )
                for shard in ("full", "none")
            )
            found[name] = cut.distance(whole)
            assert len(set(world.gather(cut.digest()))) == 1, name
    return found


@pytest.mark.parametrize("num_steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_cut_weights_train_as_whole_ones_do(processes, num_steps):
    """Up to two differences, which the next test takes away: the order of additions, and blocks of moments."""
    names = list(CUT) if num_steps > 2 else ["fp32 fused", "exact"]
    for found in processes(compare_cut, names=names, num_steps=num_steps, keeps_order=False, timeout_s=60 * num_steps):
        for name, distance in found.items():
            is_fp32 = name.startswith("fp32")
            # a moment that is quantized with another scale may move its weight by up to lr more or less in each step
            assert distance["losses"] < (5e-6 if is_fp32 else 2e-3) * num_steps, (name, distance)
            # a weight moves by 1e-4 a step; rounded to bf16, by an ulp
            bound = {"fp32": 2e-5, "fp32 fused": 2e-5, "rounded": 2**-7}.get(name, 2e-4) * num_steps
            assert distance["weights"] <= bound, (name, distance)


# modes whose rounding draws no random numbers, which are keyed by an element's place in its piece
UNDRAWN = ("fp32", "fp32 fused", "exact", "master", "paged")


@pytest.mark.long
@pytest.mark.parametrize(
    ("names", "num_steps"),
    [(("fp32 fused", "exact"), 2), pytest.param(UNDRAWN, 20, marks=pytest.mark.slow)],
)
def test_without_the_two_differences_cut_weights_train_to_the_bits_of_whole_ones(processes, names, num_steps):
    """And without clipping, for which the squares in a gradient's norm are added in another order."""
    arguments = {"names": list(names), "num_steps": num_steps, "keeps_order": True, "moments": "fp32"}
    for found in processes(compare_cut, **arguments, max_grad_norm=0.0, timeout_s=900):
        for name, distance in found.items():
            assert distance["losses"] == distance["weights"] == 0, (name, distance)
            assert distance["norms"] < 2e-6, (name, distance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "names", "num_steps"),
    [
        ("fp32", ("fp32 fused", "exact"), 2),
        ("fp32", ("fp32", "fp32 fused"), 20),
        # the last bit of a norm changes the codes of some moments, of pieces that begin with a block too
        ("whole blocks", ("fp32", "fp32 fused"), 20),
    ],
)
def test_with_clipping_cut_weights_differ_by_the_last_bits_of_the_norm(processes, moments, names, num_steps):
    arguments = {"names": list(names), "num_steps": num_steps, "keeps_order": True, "moments": moments}
    for found in processes(compare_cut, **arguments, timeout_s=900):
        for name, distance in found.items():
            assert max(distance["losses"], distance["norms"]) < 2e-6, (name, distance)
            # which move by 1e-4 a step
            assert distance["weights"] < (2e-7 if moments == "fp32" else 1e-4), (name, distance)


def carry_over(shard: str, precision: str, folder: str) -> list[str]:
    """Return the names of state that is not carried over bit for bit from one optimizer to another by a checkpoint.

    shard: of the first; the second one's is none, and a third's is `shard` again.
    """
    settings = {"betas": (0.5, 0.9)}
    with world_of_all() as world:
        _, first = trained_by(world, 3, settings, precision, shard=shard)
        saved = {name: x.cpu().clone().contiguous() for name, x in first.whole_state(world)}
        weights = {name: whole_of(p.detach()).clone() for name, p in first.parameters.items()}
        if world.is_main:
            # what others own has come here alone
            torch.save((saved, weights), Path(folder, "checkpoint.pt"))
        world.barrier()
        saved, weights = torch.load(Path(folder, "checkpoint.pt"))
        unequal = []
        for other in ("none", shard):
            _, optimizer = optimizer_in(world, settings, precision, other)
            for name, p in optimizer.parameters.items():
                local(p.detach()).copy_(piece_of(weights[name], p))
            optimizer.load_state_tensors(dict(saved))
            again = dict(optimizer.whole_state(world))
            assert not world.is_main or again.keys() == saved.keys()
            # moments of a weight that is cut inside a block are requantized
            between = {name for name, p in optimizer.parameters.items() if is_cut(p) and not is_aligned(p)}
            assert optimizer.num_requantized == len(
                between & {key.partition("/")[2] for key in saved if "absmax1" in key}
            )
            exact = [key for key in again if "/" not in key or key.partition("/")[2] not in between]
            unequal += [f"{other}: {key}" for key in exact if not torch.equal(again[key].cpu(), saved[key])]
            for name, p in optimizer.parameters.items():
                assert torch.equal(whole_of(p.detach()), weights[name]), name
        return unequal


@pytest.mark.parametrize("shard", ["states", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_checkpoint_carries_state_between_shards(processes, shard, tmp_path):
    for found in processes(carry_over, shard=shard, precision="bf16", folder=str(tmp_path)):
        assert found == []


class Overflow:
    """Makes the gradient of one parameter infinite in one micro-batch of one step, wherever it is computed."""

    def __init__(self, world: World, step: int, micro: int):
        self.step, self.micro, self.world, self.number, self.seen = step, micro, world, -1, 0

    def __call__(self, optimizer: UNetOptimizer, number: int) -> None:
        if number == 0:
            optimizer.parameters["conv_out.bias"].register_hook(self._on_gradient)
        self.number, self.seen = number, 0

    def _on_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        micro = self.seen * self.world.size + self.world.rank
        self.seen += 1
        return gradient * float("inf") if (self.number, micro) == (self.step, self.micro) else gradient


def compare_overflows(modes: list[dict]) -> list[dict]:
    found = []
    with world_of_all() as world:
        for settings in modes:
            together, alone = (
                take_steps(each, 4, settings, "fp16", disturb=Overflow(each, 2, 1)) for each in (world, ALONE)
            )
            assert together.applied == alone.applied
            found.append(
                together.distance(alone)
                | {"applied": together.applied, "scales": together.scales, "alone": alone.scales}
            )
    return found


@pytest.mark.long
def test_an_overflow_in_one_process_is_one_in_all(processes):
    modes = [{}, {"fused_backward": True}]
    for found in processes(compare_overflows, modes=modes):
        for settings, outcome in zip(modes, found, strict=True):
            assert outcome["scales"] == outcome["alone"] == [2.0**16] * 2 + [2.0**15] * 2
            # in a fused step only the tensor itself is skipped
            assert outcome["applied"] == [n != 2 or "fused_backward" in settings for n in range(4)]
            assert outcome["weights"] == outcome["losses"] == 0


def raise_in_the_last() -> Callable | None:
    with world_of_all() as world:
        assert world.rank == 0, "the last process"


def test_a_failing_process_is_told_of(processes):
    with pytest.raises(AssertionError, match=r"process 1.*\n(.*\n)*AssertionError: the last process"):
        processes(raise_in_the_last)
