"""The settings that determine a run's weights, and whether a checkpoint and a config agree on them.

Paths, logging and memory saving may change before `--resume`, and so may stages that have not begun. The dtype in which
gradients are accumulated belongs to the stages that accumulate any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.data.cache import Sample
from safelight.trainer.config.schema import Config

FREE_TABLES = ("stage", "memory", "validate", "sample", "save", "log")
FREE = {
    "run": ("dir", "device", "deterministic"),
    "model": ("attention",),
    "data": ("path",),
    "train": ("max_steps", "checkpointing", "kernels"),
    # trainer/optim/optimizer.py converts the state, or refuses where precision would be lost
    "optimizer": ("memory",),
}
# these take effect through the stages, which are compared separately
STAGED = {
    "train": ("epochs", "batch_size", "accumulate", "accumulate_dtype", "max_grad_norm"),
    "optimizer": ("lr", "schedule", "warmup_steps", "weight_decay"),
}


@dataclass(frozen=True)
class Identity:
    """settings: dotted name -> value. stages: their values, in order. data: hash of the training rows' keys."""

    settings: dict
    stages: list[dict]
    data: str

    @property
    def is_fused(self) -> bool:
        """Whether steps were taken inside backward."""
        return self.settings.get("optimizer.fused_backward") is True

    def difference(self, reached: Identity, stage: int) -> str:
        """Return how `reached`, a checkpoint in `stage`, differs from this; '' if it is the same run. Ignores the data."""
        for name, value in (reached.settings | _implied(reached.settings)).items():
            if self.settings.get(name) != value:
                return f"{name} is {self.settings.get(name)!r} here and {value!r} there"
        for index in range(stage + 1):
            if index >= len(self.stages) or self.stages[index] != reached.stages[index]:
                if index >= len(self.stages):
                    return f"stage {index + 1}, which it has reached, is missing here"
                here = self.stages[index]
                # older checkpoints lack accumulate_dtype and accumulated in the dtype of the weights
                before = _accumulate_dtype(reached.stages[index], "auto", self.settings["model.precision"])
                there = {**reached.stages[index], **before} | reached.stages[index]
                for name, value in there.items():
                    if here.get(name) != value:
                        longer = ", and a stage that has begun keeps its length: add a [[stage]] to train longer"
                        hint = longer if name == "epochs" else ""
                        return f"stage {index + 1}'s {name} is {here.get(name)!r} here and {value!r} there{hint}"
        return ""


def _implied(settings: dict) -> dict:
    """Return the settings of [loss] that older checkpoints lack, with the values they were trained with."""
    weighting = "min_snr" if settings.get("loss.min_snr_gamma", 0) > 0 else "none"
    before = {"loss.kind": "mse", "loss.weighting": weighting}
    return {name: value for name, value in before.items() if name not in settings}


def _accumulate_dtype(stage: dict, setting: str, precision: str) -> dict:
    """Return a stage's accumulate_dtype as a setting, resolved from train.accumulate_dtype; {} if it does not accumulate."""
    if stage["accumulate"] == 1:
        return {}
    return {"accumulate_dtype": "fp32" if setting == "fp32" else precision}


def identify(config: Config, precision: str, samples: Sequence[Sample] = ()) -> Identity:
    """Return a run's identity. precision: fp32 | bf16 | fp16, with `auto` resolved, as optimizer.fused_backward must be."""
    tables = config.model_dump(by_alias=True, mode="json")
    for table in FREE_TABLES:
        tables.pop(table)
    for group in (FREE, STAGED):
        for table, names in group.items():
            for name in names:
                tables[table].pop(name)
    tables["model"]["precision"] = precision
    tables["optimizer"]["fused_backward"] = config.optimizer.is_fused
    # a setting that the chosen loss does not use may change; min_snr_gamma is compared because older checkpoints have it
    for name in config.loss.unused_parameters() - {"min_snr_gamma"}:
        tables["loss"].pop(name)
    # at the end, so that a difference names min_snr_gamma first
    tables["loss"].pop("weighting")
    tables["loss"]["weighting"] = config.loss.chosen_weighting
    settings = {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}
    rows = json.dumps([(s.latent_keys, s.text_keys) for s in samples])
    stages = [vars(stage) for stage in config.stages()]
    stages = [{**stage, **_accumulate_dtype(stage, config.train.accumulate_dtype, precision)} for stage in stages]
    return Identity(settings, stages, hashlib.sha256(rows.encode()).hexdigest())
