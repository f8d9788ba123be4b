"""The plan of a run on several GPUs: memory of each, what they send each other, and the predicted speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor

from safelight.trainer.config.schema import Config, shard_conflict
from safelight.trainer.distributed.spread import num_micro_steps, spread
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.communication import (
    SHARDS,
    Exchange,
    Link,
    Ranks,
    Shard,
    aligned_bytes,
    idle_note,
    num_buckets,
    predict_speed,
    sharded_bytes,
)
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.optim.reduction import BUCKET_BYTES
from safelight.trainer.registry.optimizers import MEMORY_MODES

# what Job.vote sends: 64-bit numbers, whether to stop and whether to draw pictures
_VOTE_BYTES = 16
# a loss, and a parameter's norm, in fp32
_LOSS_BYTES = _NORM_BYTES = 4


def shard_of(config: Config) -> Shard:
    """Return distributed.shard."""
    return config.distributed.shard


def ranks_of(config: Config, num: int, link: Link) -> Ranks:
    """Return the processes of a run on `num` GPUs."""
    return Ranks(num, shard_of(config), link)


def exchanges_of(optimizer: UNetOptimizer, config: Config, ranks: Ranks, is_streamed: bool = False) -> list[Exchange]:
    """Return what the processes exchange in a step of the first stage, for one optimizer; `small_exchanges` are those
    of the run.

    none: gradients are summed for all. states: a part's are summed for its owner, and the new weights of all parts are
    sent when the step is done.
    full: FSDP2 gathers the weights for each forward and each backward pass, and scatters the sums of gradients.
    is_streamed: whether each part is exchanged alone.
    """
    parts = [[optimizer.parameters[name] for name in names] for names in optimizer.parts.values()]
    itemsize = 4 if config.train.accumulate_dtype == "fp32" else None
    sizes = [aligned_bytes(part, itemsize) for part in parts]
    # parts arrive from the last to the first; a bucket is closed by the bytes of gradients, without their alignment
    calls = num_buckets([_plain_bytes(part) for part in reversed(parts)], 0 if is_streamed else BUCKET_BYTES)
    if ranks.shard == "none":
        return [Exchange("gradients", "all_reduce", sum(sizes), calls, "backward")]
    norms = Exchange("gradient norms", "all_reduce", _NORM_BYTES * len(optimizer.parameters))
    if ranks.shard == "states":
        # buckets are of one owner each, so that the last of every owner is sent at the end
        calls += ranks.num - 1
        return [
            Exchange("gradients", "reduce", sum(sizes), calls, "backward"),
            Exchange("weights", "broadcast", sum(map(aligned_bytes, parts)), calls),
            norms,
        ]
    num_micro = num_micro_steps(config.stages()[0].accumulate, ranks.num)
    payload, calls = sum(sharded_bytes(part, ranks.num) for part in parts), num_micro * len(parts)
    summed = sum(sharded_bytes(part, ranks.num, itemsize) for part in parts)
    return [
        Exchange("weights, forward", "all_gather", num_micro * payload, calls, "forward"),
        Exchange("weights, backward", "all_gather", num_micro * payload, calls, "forward"),
        Exchange("gradients", "reduce_scatter", num_micro * summed, calls, "backward"),
        norms,
    ]


def _plain_bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def small_exchanges(config: Config, ranks: Ranks) -> list[Exchange]:
    """Return what a step of the first stage exchanges besides gradients and weights: losses and the vote."""
    stage = config.stages()[0]
    num_losses = num_micro_steps(stage.accumulate, ranks.num) * stage.batch_size
    return [
        Exchange("losses", "all_gather", ranks.num * num_losses * _LOSS_BYTES),
        Exchange("vote", "all_reduce", _VOTE_BYTES),
    ]


def all_exchanges(run: MetaRun, config: Config, ranks: Ranks, is_streamed: bool = False) -> list[Exchange]:
    """Return what a step of a run exchanges. run: on meta tensors, with the run's settings."""
    found = exchanges_of(run.optimizer, config, ranks, is_streamed)
    if run.context.text_optimizer is not None:
        # FSDP2 cuts the UNet only
        shard = "none" if ranks.shard == "none" else "states"
        text = exchanges_of(run.context.text_optimizer, config, replace(ranks, shard=shard))
        found += [replace(one, what=f"text encoder: {one.what}") for one in text]
    return found + small_exchanges(config, ranks)


def planned_exchanges(estimator: MemoryEstimator, candidate: Candidate) -> list[Exchange]:
    """Return what a step of a candidate exchanges, remembered with its estimate (plan_cache.py)."""
    is_fused, is_streamed = candidate.fused_backward, MEMORY_MODES[candidate.memory].streams_weights

    def make() -> list[Exchange]:
        return all_exchanges(estimator.meta_run(is_fused), estimator.config, estimator.ranks, is_streamed)

    def read(values: object) -> list[Exchange]:
        if not isinstance(values, list):
            raise ValueError("not a list of exchanges")
        return [Exchange.from_json(one) for one in values]

    key = f"exchanges {is_fused} {is_streamed}"
    exchanges = estimator.cache.remembered(key, make, lambda found: [asdict(one) for one in found], read)
    estimator.remember()
    return exchanges


def ranks_summary(
    config: Config, card: Card, num: int, link: Link, progress: Callable[[int, int], None] | None = None
) -> dict:
    """Return the plan of a run on `num` GPUs as plain values: a row for each value of distributed.shard.

    Each row has the best candidate that fits, or the one that needs least with fits false and how much it lacks.
    """
    config, raised = spread(config, num)
    stage = config.stages()[0]
    num_micro = num_micro_steps(stage.accumulate, num)
    notes = [note for note in (raised, idle_note(stage.accumulate, num)) if note]
    chosen_shard, rows = shard_of(config), {}
    for place, shard in enumerate(SHARDS):
        if progress is not None:
            progress(place, len(SHARDS))
        distributed = config.distributed.model_copy(update={"shard": shard})
        config = config.model_copy(update={"distributed": distributed})
        if conflict := shard_conflict(config):
            notes.append(conflict)
            continue
        ranks = Ranks(num, shard, link)
        planner = Planner(config, card, ranks)
        chosen = planner.choose()
        candidate = chosen or planner.least_allowed()
        exchanges = planned_exchanges(planner.estimator, candidate)
        rows[shard] = {
            "candidate": candidate.to_json(),
            "fits": chosen is not None,
            "lacking_bytes": max(0, candidate.needed_bytes - planner.budget),
            "sent_bytes": sum(exchange.sent(num) for exchange in exchanges),
            "overlapped_bytes": sum(exchange.sent(num) for exchange in exchanges if exchange.when != "after"),
            "exchanges": [{**asdict(exchange), "sent_bytes": exchange.sent(num)} for exchange in exchanges],
            "predicted": _speed(config, card, candidate, exchanges, ranks, num_micro),
        }
    return {
        "gpus": num,
        "shard": chosen_shard,
        "link": link.name,
        "link_gb_s": link.gb_s,
        "accumulate": stage.accumulate,
        "micro_batches": num_micro,
        "images": stage.accumulate * stage.batch_size,
        "shards": rows,
        "notes": notes,
    }


def _speed(
    config: Config, card: Card, candidate: Candidate, exchanges: list[Exchange], ranks: Ranks, num_micro: int
) -> dict | None:
    """Return the predicted speed as plain values, None if a rate is unknown."""
    stage = config.stages()[0]
    if candidate.images_per_s is None or ranks.link.gb_s is None:
        return None
    settings = (candidate.memory, candidate.checkpointing, candidate.batch_size, candidate.fused_backward)
    estimator = MemoryEstimator(config, card)
    single = estimator.estimate(*settings).images_per_s
    estimator.remember()
    rank_seconds = num_micro * stage.batch_size / candidate.images_per_s
    speed = predict_speed(exchanges, ranks, rank_seconds, num_micro, stage.accumulate * stage.batch_size, single)
    return {
        "step_s": speed.seconds,
        "exposed_s": speed.exposed,
        "images_per_s": speed.images_per_s,
        "single_images_per_s": single,
        "efficiency": speed.efficiency,
    }
