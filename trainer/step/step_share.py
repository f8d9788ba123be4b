"""What of an optimizer step one process computes, and the step's result put together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from safelight.data.batches import Batch
from safelight.data.epochs import MicroBatch
from safelight.trainer.distributed.world import World
from safelight.trainer.step.step import StepResult


@dataclass(frozen=True)
class StepShare:
    """A process's part of one optimizer step.

    micro_batches: what it runs, at least one. num_padding: how many of them, at the end, only keep pace with others and
    weigh nothing: all run equally many, so that they exchange gradients in the same order. sizes: the samples in each
    micro-batch of the whole step, in order. is_uneven: whether any process has padding.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_padding: int
    sizes: tuple[int, ...]
    is_uneven: bool

    @classmethod
    def of(cls, world: World, step: Sequence[MicroBatch]) -> StepShare:
        """Return this process's share of a step's micro-batches."""
        own, num = tuple(world.share(step)), -(-len(step) // world.size)
        padding = num - len(own)
        sizes = tuple(len(micro_batch.refs) for micro_batch in step)
        return cls((*own, *[step[0]] * padding), padding, sizes, is_uneven=len(step) % world.size > 0)

    def padded(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the share's loaded micro-batches; those that only keep pace get a weight of zero."""
        num_real = len(self.micro_batches) - self.num_padding
        for number, batch in enumerate(batches):
            if number < num_real:
                yield batch
            else:
                yield replace(batch, scales_B=batch.mean_BCHW.new_zeros(len(batch.sample_ids)))


def whole_result(world: World, share: StepShare, result: StepResult) -> StepResult:
    """Return a step's result with the losses of all processes, in the order of the step's micro-batches.

    result: this process's; the losses of padding are dropped.
    """
    if world.size == 1:
        return result
    sizes = [list(world.share(share.sizes, rank)) for rank in range(world.size)]
    losses = world.gather_on_device(result.losses, max(map(sum, sizes)))
    parts = [own[: sum(of)].split(of) for own, of in zip(losses, sizes, strict=True)]
    return replace(result, losses=torch.cat(world.merged(parts)))
