"""Which way of training to take on a card: every one the config leaves, the best that fits, or why none does and what would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict

import torch

from safelight.kernels.unet.checkpointing import MODES
from safelight.trainer.checkpoint.snapshot import available_bytes
from safelight.trainer.memory_plan.candidate import Need
from safelight.trainer.memory_plan.estimator import Needs
from safelight.trainer.memory_plan.rounding_noise import WARN_ABOVE, noise_to_displacement
from safelight.trainer.memory_plan.static_bytes import learning_rates
from safelight.trainer.models.device import PRECISIONS
from safelight.trainer.optim.optimizer import memory_mode
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS
from safelight.units import GIB

BATCH_SIZES = (1, 2, 4, 8)


class Planner(Needs):
    """Chooses among a run's ways on one card."""

    def memory_modes(self, wanted: str | None = None) -> tuple[str, ...]:
        """Return the modes that a value of optimizer.memory leaves, best first; the config's value if None."""
        optimizer = self.config.optimizer
        wanted = optimizer.memory if wanted is None else wanted
        modes = OPTIMIZERS[optimizer.name].planned_modes
        if wanted != "auto" or self.dtype == torch.float32 or not modes:
            return (memory_mode(optimizer.model_copy(update={"memory": wanted}), self.dtype),)
        has_average = self.config.train.ema_decay > 0
        return tuple(mode for mode in modes if MEMORY_MODES[mode].allows_average or not has_average)

    def checkpointings(self) -> tuple[str, ...]:
        wanted = self.config.train.checkpointing
        return MODES if wanted == "auto" else (wanted,)

    def _sorted(
        self, modes: Sequence[str], checkpointings: Sequence[str], fused: Sequence[bool]
    ) -> list[tuple[str, str, bool]]:
        """Return ways as (memory, checkpointing, fused), best first: what is kept of the weights, what is trained, then time.

        Inside backward the gradients' global norm comes too late to clip by: where the run clips, checkpointing, which changes
        no result, is done before the step is moved there, offload excepted. Pages are for it: they stream beside backward, and
        after it would hold up the step.
        """
        clips = any(stage.max_grad_norm > 0 for stage in self.config.stages())

        def order(way: tuple[str, str, bool]) -> tuple:
            memory, how, is_fused = way
            place, is_worse = MODES.index(how), is_fused != (memory == "paged")
            return modes.index(memory), *((how == "offload", is_worse, place) if clips else (place, is_worse))

        return sorted(itertools.product(modes, checkpointings, fused), key=order)

    def ways(self) -> list[tuple[str, str, bool]]:
        """Return the ways that the config leaves, best first: (memory, checkpointing, fused)."""
        return self._sorted(self.memory_modes(), self.checkpointings(), self.config.optimizer.fused_choices())

    def all_ways(self) -> list[tuple[str, str, bool]]:
        """Return the ways that there are with the config's optimizer and clipping; what is asked to be fused stays so."""
        optimizer = self.config.optimizer
        fused = (
            (True,) if optimizer.is_fused else optimizer.model_copy(update={"fused_backward": "auto"}).fused_choices()
        )
        return self._sorted(self.memory_modes("auto"), MODES, fused)

    def choose(self) -> Need | None:
        """Return the best way that fits of those the config leaves, or None; where CUDA graphs are asked for, the best with them."""
        needs = (self.need(memory, how, self.batch_size, fused) for memory, how, fused in self.ways())
        fitting = (need for need in needs if self.fits(need))
        best = next(fitting, None)
        if best is None or not best.no_graphs or self.config.train.cuda_graphs != "on":
            return best
        # without any, the run says why (trainer/step/cuda_graphs.py)
        return next((need for need in fitting if not need.no_graphs), best)

    def what_would_fit(self, is_resumed: bool = False) -> Need | None:
        """Return the way that fits with the fewest changes: any of all, then smaller batches.

        is_resumed: of those that a run may go on with: of the config's batch size, stepped as it was, in a memory mode that
        takes the config's over (trainer/optim/optimizer.py).
        """
        ways, sizes = self.all_ways(), sorted({1, 2, 4, 8, self.batch_size}, reverse=True)
        if is_resumed:
            kept, sizes = (*self.memory_modes(), "exact", "paged"), [self.batch_size]
            ways = [way for way in ways if way[0] in kept and way[2] in self.config.optimizer.fused_choices()]
        needs = (self.need(memory, how, n, fused) for n in sizes if n <= self.batch_size for memory, how, fused in ways)
        return next((need for need in needs if self.fits(need)), None)

    def least(self) -> Need:
        """Return the way that takes the least of all."""
        return min((self.need(memory, how, 1, fused) for memory, how, fused in self.all_ways()), key=lambda n: n.needed)

    def refusal(self, is_resumed: bool = False) -> str:
        """Return why the config fits in no way it leaves, and what would. is_resumed: as of what_would_fit."""
        smallest = min(
            (self.need(memory, how, self.batch_size, fused) for memory, how, fused in self.ways()),
            key=lambda need: need.needed,
        )
        where = f"{self.card.name} has {self.budget / GIB:.2f} GiB for it"
        if self.budget < GIB * self.card.usable_gib:
            where = f"memory.limit_gib allows {self.budget / GIB:.2f} GiB"
        found = self.what_would_fit(is_resumed)
        if found is None and is_resumed:
            fix = "what a run may change when it goes on is not enough: go on where there is more"
        elif found is None:
            least = self.least()
            fix = f"the least that any plan needs is {least.needed / GIB:.2f} GiB, with {least.settings()}"
        else:
            fix = f"{found.needed / GIB:.2f} GiB would do with {found.settings()}"
        return f"this run needs {smallest.needed / GIB:.2f} GiB at batch size {smallest.batch_size}, and {where}; {fix}"

    def noise(self, rates: list[float]) -> dict[str, float]:
        """Return the noise of stochastic rounding against the way the weights go, by the memory modes that have any."""
        supported = OPTIMIZERS[self.config.optimizer.name].memory_modes
        modes = [mode for mode in supported if MEMORY_MODES[mode].is_random]
        if self.dtype == torch.float32 or not modes:
            return {}
        shapes = [tuple(p.shape) for p in self._run(self.config.optimizer.is_fused).unet.parameters()]
        beta1 = self.config.optimizer.betas[0]
        return {mode: noise_to_displacement(shapes, self.dtype, mode, rates, beta1) for mode in modes}

    def table(self) -> dict:
        """Return the plan as plain values: every way, and the chosen one."""
        # four columns fit a terminal
        sizes = BATCH_SIZES if self.batch_size in BATCH_SIZES else sorted({1, *BATCH_SIZES[2:], self.batch_size})
        # of what is set, that alone; but checkpointing, which a resume may change
        ways = self._sorted(self.memory_modes(), MODES, self.config.optimizer.fused_choices())
        needs = [self.need(memory, how, size, fused) for memory, how, fused in ways for size in sizes]
        chosen = self.choose()
        rates, is_assumed = learning_rates(self.config)
        return {
            "card": self.card.name,
            "budget_bytes": self.budget,
            "precision": PRECISIONS[self.dtype],
            "latents": list(self.latents),
            "batch_size": self.batch_size,
            "rates_known": self.card.tflops is not None,
            "noise": self.noise(rates),
            "noise_steps": len(rates),
            "noise_steps_assumed": is_assumed,
            "noise_warns_above": WARN_ABOVE,
            "host_available_bytes": available_bytes() if self.card.is_here else None,
            "ways": [{**asdict(need), "fits": self.fits(need)} for need in needs],
            "chosen": None if chosen is None else asdict(chosen),
            "refusal": self.refusal() if chosen is None else "",
        }
