"""Chooses the best candidate of a config that fits a card, or explains why none fits and what would."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from safelight.data.decode_memory import available_bytes
from safelight.kernels.unet.checkpointing import MODES
from safelight.trainer.adapters.trained import trained_dtype
from safelight.trainer.config.schema import Config, shard_conflict
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.communication import ONE_RANK, Ranks
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.rounding_noise import WARN_ABOVE, noise_to_displacement
from safelight.trainer.memory_plan.static_bytes import learning_rates
from safelight.trainer.models.device import PRECISIONS
from safelight.trainer.optim.optimizer import memory_mode
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS
from safelight.units import GIB

BATCH_SIZES = (1, 2, 4, 8)


def modes_for(config: Config, modes: Sequence[str]) -> tuple[str, ...]:
    """Return those of an optimizer's memory modes that make sense for what the config trains, and how."""
    allowed = config.adapter.spec.memory_modes
    chosen = (mode for mode in modes if allowed is None or mode in allowed)
    return tuple(mode for mode in chosen if not shard_conflict(config, mode))


class Combination(NamedTuple):
    """Values of optimizer.memory, train.checkpointing and optimizer.fused_backward."""

    memory: str
    checkpointing: str
    fused: bool


class Planner:
    """Chooses among the combinations of settings that a config leaves open, by their estimated memory on a card."""

    def __init__(self, config: Config, card: Card, ranks: Ranks = ONE_RANK):
        self.config, self.card, self.ranks = config, card, ranks
        self.estimator = MemoryEstimator(config, card, ranks)
        self.dtype, self.budget = self.estimator.dtype, self.estimator.budget
        self.batch_size = self.estimator.batch_size

    def memory_modes(self, setting: str | None = None) -> tuple[str, ...]:
        """Return the modes that a value of optimizer.memory allows, best first; None: the config's value."""
        optimizer, dtype = self.config.trained_optimizer, trained_dtype(self.config, self.dtype)
        setting = optimizer.memory if setting is None else setting
        modes = OPTIMIZERS[optimizer.name].planned_modes
        if setting != "auto" or dtype == torch.float32 or not modes:
            return (memory_mode(optimizer.model_copy(update={"memory": setting}), dtype),)
        has_average = self.config.train.ema_decay > 0
        modes = modes_for(self.config, modes)
        return tuple(mode for mode in modes if MEMORY_MODES[mode].allows_average or not has_average)

    def combinations(self) -> list[Combination]:
        """Return the combinations that the config allows, best first."""
        checkpointing = self.config.train.checkpointing
        checkpointings = (checkpointing,)
        if checkpointing == "auto":
            is_cut = self.config.distributed.shard == "full"
            checkpointings = tuple(mode for mode in MODES if not is_cut or mode != "offload")
        return self._ranked(self.memory_modes(), checkpointings, self.config.trained_optimizer.fused_choices())

    def all_combinations(self) -> list[Combination]:
        """Return every combination with the config's optimizer and clipping, best first.

        A fused step that the config asks for stays fused.
        """
        optimizer = self.config.trained_optimizer
        if self.config.adapter.spec.is_fp32:
            fused = (False,)
        elif optimizer.is_fused:
            fused = (True,)
        else:
            fused = optimizer.model_copy(update={"fused_backward": "auto"}).fused_choices()
        return self._ranked(self.memory_modes("auto"), MODES, fused)

    def choose(self) -> Candidate | None:
        """Return the best candidate that fits, None if none does.

        With train.cuda_graphs on: the best that can use graphs, or the best of all if none can.
        """
        fitting = filter(self.estimator.fits, self._estimates(self.combinations(), [self.batch_size]))
        best = next(fitting, None)
        if best is not None and best.no_graphs and self.config.train.cuda_graphs == "on":
            # if no candidate can use graphs, resolve_auto.why_no_cuda_graphs raises the best one's reason
            best = next((candidate for candidate in fitting if not candidate.no_graphs), best)
        self.estimator.remember()
        return best

    def what_would_fit(self, is_resumed: bool = False) -> Candidate | None:
        """Return the candidate that fits with the fewest changes: other settings first, then smaller batches; or None.

        is_resumed: change only what a resumed run may: batch size and fused step stay, and the memory mode may change
        only to exact, paged or streamed.
        """
        combinations, batch_sizes = self.all_combinations(), sorted({*BATCH_SIZES, self.batch_size}, reverse=True)
        if is_resumed:
            modes, fused = (*self.memory_modes(), "exact", "paged", "streamed"), self.config.optimizer.fused_choices()
            combinations = [c for c in combinations if c.memory in modes and c.fused in fused]
            batch_sizes = [self.batch_size]
        sizes = [size for size in batch_sizes if size <= self.batch_size]
        fitting = next(filter(self.estimator.fits, self._estimates(combinations, sizes)), None)
        self.estimator.remember()
        return fitting

    def _other_settings(self) -> tuple[str, Candidate] | None:
        """Return options that choose another optimizer or precision, and the candidate that fits with them; or None."""
        planned = next(name for name, spec in OPTIMIZERS.items() if spec.planned_modes)
        name, precision = self.config.optimizer.name, self.config.model.precision
        # one change rather than two
        for other in dict.fromkeys([(planned, precision), (name, "auto"), (planned, "auto")]):
            if other == (name, precision):
                continue
            config, options = self.config.model_copy(deep=True), []
            if other[0] != name:
                config.optimizer.name, config.optimizer.memory = planned, "auto"
                options.append(f"--optimizer.name {planned}")
            if other[1] != precision:
                config.model.precision = "auto"
                options.append("--model.precision auto")
            if fitting := Planner(config, self.card, self.ranks).what_would_fit():
                return " ".join(options), fitting
        return None

    def least_allowed(self) -> Candidate:
        """Return the candidate that needs the least memory among those that the config allows."""
        return self._least(self.combinations(), self.batch_size)

    def smallest(self) -> Candidate:
        """Return the candidate that needs the least memory of all, at batch size 1."""
        return self._least(self.all_combinations(), 1)

    def _least(self, combinations: Iterable[Combination], batch_size: int) -> Candidate:
        least = min(self._estimates(combinations, [batch_size]), key=lambda candidate: candidate.needed_bytes)
        self.estimator.remember()
        return least

    def refusal(self, is_resumed: bool = False) -> str:
        """Return why no allowed candidate fits, and what would fit. is_resumed: as for what_would_fit."""
        smallest = self.least_allowed()
        limit = f"{self.card.name} has {self.budget / GIB:.2f} GiB available"
        if self.budget < GIB * self.card.usable_gib:
            limit = f"memory.limit_gib allows {self.budget / GIB:.2f} GiB"
        fitting = self.what_would_fit(is_resumed)
        if fitting is None and is_resumed:
            fix = "no setting that a resumed run may change makes it fit; resume on a GPU with more memory"
        elif fitting is None and (other := self._other_settings()):
            options, candidate = other
            fix = f"it would need {candidate.needed_bytes / GIB:.2f} GiB with {options} {candidate.options()}"
        elif fitting is None:
            least = self.smallest()
            fix = f"the smallest plan needs {least.needed_bytes / GIB:.2f} GiB, with {least.options()}"
        else:
            fix = f"it would need {fitting.needed_bytes / GIB:.2f} GiB with {fitting.options()}"
        needed = f"{smallest.needed_bytes / GIB:.2f} GiB at batch size {smallest.batch_size}"
        return f"this run needs {needed}, but {limit}; {fix}"

    def rounding_noise(self, rates: Sequence[float]) -> dict[str, float]:
        """Return the noise-to-displacement ratio of each mode that rounds stochastically. rates: lr of each step."""
        supported = OPTIMIZERS[self.config.optimizer.name].memory_modes
        modes = [mode for mode in supported if MEMORY_MODES[mode].is_random]
        if trained_dtype(self.config, self.dtype) == torch.float32 or not modes:
            return {}
        shapes, factor = self.estimator.trained_shapes()
        self.estimator.remember()
        # of the weights that change least
        rates = [factor * rate for rate in rates]
        beta1 = self.config.optimizer.betas[0]
        return {mode: noise_to_displacement(shapes, self.dtype, mode, rates, beta1) for mode in modes}

    def summary(self, progress: Callable[[int, int], None] | None = None) -> dict:
        """Return the plan as plain values: every candidate, and the chosen one.

        progress: called with (candidates estimated, all candidates). Tracing SDXL's steps for them takes a minute.
        """
        # four columns fit a terminal
        sizes = BATCH_SIZES if self.batch_size in BATCH_SIZES else sorted({1, *BATCH_SIZES[2:], self.batch_size})
        # explicit settings are kept, except checkpointing, which does not change the result
        combinations = self._ranked(self.memory_modes(), MODES, self.config.trained_optimizer.fused_choices())
        candidates = []
        for combination, size in itertools.product(combinations, sizes):
            if progress is not None:
                progress(len(candidates), len(combinations) * len(sizes))
            candidates.append(self._estimate(combination, size))
        if progress is not None:
            progress(len(candidates), len(candidates))
        chosen = self.choose()
        rates, is_assumed = learning_rates(self.config)
        return {
            "card": self.card.name,
            "budget_bytes": self.budget,
            "precision": PRECISIONS[self.dtype],
            "latents": list(self.estimator.latents),
            "batch_size": self.batch_size,
            "rates_known": self.card.tflops is not None,
            "noise": self.rounding_noise(rates),
            "noise_steps": len(rates),
            "noise_steps_assumed": is_assumed,
            "noise_warns_above": WARN_ABOVE,
            "host_available_bytes": available_bytes() if self.card.is_here else None,
            "ways": [{**candidate.to_json(), "fits": self.estimator.fits(candidate)} for candidate in candidates],
            "chosen": None if chosen is None else chosen.to_json(),
            "refusal": self.refusal() if chosen is None else "",
        }

    def _estimate(self, combination: Combination, batch_size: int) -> Candidate:
        memory, checkpointing, fused = combination
        return self.estimator.estimate(memory, checkpointing, batch_size, fused)

    def _estimates(self, combinations: Iterable[Combination], batch_sizes: Sequence[int]) -> Iterator[Candidate]:
        """Yield the candidates of each batch size in turn, estimated when they are needed."""
        return (self._estimate(combination, size) for size in batch_sizes for combination in combinations)

    def _ranked(self, modes: Sequence[str], checkpointings: Sequence[str], fused: Sequence[bool]) -> list[Combination]:
        """Return combinations, best first: by memory mode, then by what changes training least, then by speed.

        A fused step knows the global gradient norm too late to clip by it. If the run clips, checkpointing, which
        changes no result, is therefore preferred to fusing the step, except for offload. Memory mode paged prefers a
        fused step: its pages then stream during the backward pass instead of after it.
        """
        clips = any(stage.max_grad_norm > 0 for stage in self.config.stages())

        def rank(combination: Combination) -> tuple:
            memory, checkpointing, is_fused = combination
            place, is_worse = MODES.index(checkpointing), is_fused != MEMORY_MODES[memory].pages_state
            by_step = (checkpointing == "offload", is_worse, place) if clips else (place, is_worse)
            return modes.index(memory), *by_step

        every = itertools.starmap(Combination, itertools.product(modes, checkpointings, fused))
        return sorted((c for c in every if c.fused or not MEMORY_MODES[c.memory].streams_weights), key=rank)
