"""Counts what real steps of two processes exchange, for test_communication.py; runs in each of them."""

from __future__ import annotations

import copy

import safelight.trainer.train as train_module
from safelight.bench.counting.collectives import CountCollectives
from safelight.trainer.config.toml import parse_config


def train_counted(settings: dict) -> list[dict[str, int]]:
    """Train a run in all processes; return the payloads of each of its steps, its vote included."""
    steps: list[CountCollectives] = []
    step, answer = train_module.train_step, train_module.answer_live

    def counted_step(*arguments, **options):
        steps.append(CountCollectives())
        steps[-1].__enter__()
        return step(*arguments, **options)

    def counted_answer(*arguments) -> None:
        answer(*arguments)
        steps[-1].__exit__(None, None, None)

    train_module.train_step, train_module.answer_live = counted_step, counted_answer
    train_module.train(parse_config(copy.deepcopy(settings), "test"))
    return [counter.payloads() for counter in steps]
