"""Counts what real steps of two processes exchange, for test_communication.py; runs in each of them."""

from __future__ import annotations

import copy

import torch
from torch.distributed.fsdp import fully_shard

import safelight.trainer.train as train_module
from safelight.bench.counting.collectives import CountCollectives
from safelight.trainer.config.toml import parse_config
from safelight.trainer.loading.job import Job
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.base import part_of
from tests.trainer.distributed.several import world_of_all


def train_counted(settings: dict) -> list[dict[str, int]]:
    """Train a run in all processes; return the payloads of each of its steps, from loading a batch to the vote."""
    steps: list[CountCollectives] = []
    step, vote = train_module.train_step, Job.vote_to_stop

    def counted_step(*arguments, **options):
        steps.append(CountCollectives())
        steps[-1].__enter__()
        return step(*arguments, **options)

    def counted_vote(job: Job) -> None:
        vote(job)
        steps[-1].__exit__(None, None, None)

    train_module.train_step, Job.vote_to_stop = counted_step, counted_vote
    train_module.train(parse_config(copy.deepcopy(settings), "test"))
    return [counter.payloads() for counter in steps]


def step_fully_sharded(base: str, precision: str) -> dict[str, int]:
    """Return the payloads of one forward and backward pass with FSDP2 over the parts of a base's UNet."""
    with world_of_all() as world:
        unet = load_unet(resolve_base(base), 0, getattr(torch, precision))
        parts = dict.fromkeys(part_of(name) for name, _ in unet.named_parameters())
        for name in parts:
            fully_shard(unet.get_submodule(name))
        fully_shard(unet)
        dtype = getattr(torch, precision)
        latents = torch.randn(1, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(world.rank))
        text = torch.randn(1, 77, unet.config.cross_attention_dim, dtype=dtype)
        with CountCollectives() as counter:
            unet(latents, torch.tensor([7]), text).sample.square().mean().backward()
        return counter.payloads()
