"""The settings that determine a run's weights, and whether a checkpoint and a config agree on them.

Paths, logging, speed and memory settings may change before `--resume`, that of the base if it is the same model, and so
may the learning rates, which the run then records, and stages that have not begun. A stage with a constant rate may
become longer, because its steps do not depend on its length. The dtype in which gradients are accumulated is compared
for the stages that accumulate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from safelight.data.cache import Sample
from safelight.data.photo import USUAL_SETTINGS
from safelight.data.placement import MAX_ENLARGEMENT
from safelight.trainer.config.schema import FLAT_TABLES, VAE_PRECISIONS, Config
from safelight.trainer.config.stage_settings import overridable
from safelight.trainer.config.toml import toml_value
from safelight.trainer.registry.schedules import SCHEDULES, unused_settings

FREE_TABLES = ("stage", "memory", "distributed", "validate", "sample", "save", "log")
FREE = {
    "run": ("dir", "device", "deterministic", "title", "notes"),
    "model": ("attention",),
    "data": ("path",),
    # a run keeps the epoch order that cuda_graphs chose at its start (environment.json)
    "train": ("max_steps", "checkpointing", "kernels", "cuda_graphs", "cudnn_benchmark"),
    # trainer/optim/optimizer.py converts the state, or refuses where precision would be lost
    "optimizer": ("memory",),
    # where samples have the word
    "embedding": ("negative",),
}
# where the parts of the base are; they may be moved if the base is known to be the same
PLACES = ("model.base", "model.config", "model.vae", "model.tokenizer")
# learning rates, which may change and are recorded: the name of a stage's, and those of parts trained besides the UNet,
# with what the parts are called
STAGE_RATE = "lr"
PART_RATES = {"text_encoder.lr": "text encoder"}
# these take effect through the stages, which are compared one by one
STAGED = {table: tuple(overridable(section)) for table, section in FLAT_TABLES.items()}
STAGED["train"] += ("epochs", "accumulate_dtype")
# the values of a setting that a checkpoint lacks, because it was written before there was that setting
DEFAULTS = {
    f"{table}.{name}": value
    for table, values in Config().model_dump(by_alias=True, mode="json").items()
    if table != "stage"
    for name, value in values.items()
}


@dataclass(frozen=True)
class Difference:
    """A setting in which a run differs from a checkpoint. text: in words.

    name: of the setting, dotted, or of a stage's value. stage: its index, None for a setting of the whole run.
    value: the checkpoint's, as TOML; '' if nothing can be set to it.
    """

    text: str
    name: str
    stage: int | None = None
    value: str = ""


@dataclass(frozen=True)
class Identity:
    """settings: dotted name -> value. stages: the values of each, in order. data: hash of the training rows' keys.

    A stage has its values of [train] and [optimizer] by their names, and of other tables those that differ from the
    run's, by their dotted names.
    """

    settings: dict
    stages: list[dict]
    data: str

    @classmethod
    def from_record(cls, values: object) -> Identity:
        """Return the identity that a state.json holds. Raises ValueError for values of another form."""
        if not isinstance(values, dict) or values.keys() != {"settings", "stages", "data"}:
            raise ValueError("its identity has other fields than settings, stages and data")
        settings, stages, data = values["settings"], values["stages"], values["data"]
        is_sound = isinstance(settings, dict) and isinstance(data, str) and isinstance(stages, list)
        if not is_sound or not all(isinstance(stage, dict) for stage in stages):
            raise ValueError("its identity's settings, stages or data are malformed")
        numbers = {f"stage {number}'s lr": stage.get(STAGE_RATE, 0) for number, stage in enumerate(stages, 1)}
        numbers |= {name: settings.get(name, 0) for name in ("loss.min_snr_gamma", *PART_RATES)}
        for name, value in numbers.items():
            if type(value) not in (int, float):
                raise ValueError(f"its identity's {name} is not a number")
        if settings.get("data.upscale", "always") not in tuple(MAX_ENLARGEMENT):
            raise ValueError(f"its identity's data.upscale is none of {', '.join(MAX_ENLARGEMENT)}")
        if settings.get("model.vae_precision", "fp32") not in VAE_PRECISIONS:
            raise ValueError(f"its identity's model.vae_precision is none of {', '.join(VAE_PRECISIONS)}")
        return cls(settings, stages, data)

    @property
    def is_fused(self) -> bool:
        """Whether the optimizer steps inside backward."""
        return self.settings.get("optimizer.fused_backward") is True

    def value_of(self, difference: Difference) -> object:
        """Return this run's value of a setting in which another differs, None if it has none."""
        if difference.stage is None:
            return self.settings.get(difference.name)
        return self.in_stage(difference.stage, difference.name) if difference.stage < len(self.stages) else None

    def in_stage(self, stage: int, name: str) -> object:
        """Return a setting's value in a stage, None if that is unknown. name: as in `stages`."""
        if name == "start_from":
            return self.stages[stage].get(name, "last")
        if name in self.stages[stage] or "." not in name:
            dotted = next((f"{table}.{name}" for table, names in STAGED.items() if name in names), name)
            return self.stages[stage].get(name, DEFAULTS.get(dotted))
        known = self.settings | _implied(self.settings)
        return known.get(name, DEFAULTS.get(name))

    def difference(
        self, checkpoint: Identity, stage: int, ignored: Collection[str] = (), num_epochs: int | None = None
    ) -> Difference | None:
        """Return the first difference from a checkpoint of `stage`, None if it is the same run. Ignores data.

        ignored: settings that may differ. num_epochs: of that stage that have begun, None if that is unknown.
        """
        for name, value in (checkpoint.settings | _implied(checkpoint.settings)).items():
            # older checkpoints recorded settings that are free now
            may_differ = _is_free(name) or name in PART_RATES or name in ignored
            if not may_differ and self.settings.get(name) != value:
                text = f"{name} is {self.settings.get(name)!r}, but {_quoted(value)} in the checkpoint"
                return Difference(text, name, None, _as_toml(value) if name in self.settings else "")
        for index in range(stage + 1):
            reached = f"stage {index + 1}, which the checkpoint has reached, is missing"
            if index >= len(self.stages):
                return Difference(reached, "", index)
            if index >= len(checkpoint.stages):
                return Difference(f"{reached} in its record", "", index)
            ours = self.stages[index]
            # older checkpoints lack accumulate_dtype and accumulated in the dtype of the weights
            default = _accumulate_dtype(checkpoint.stages[index], "auto", self.settings["model.precision"])
            theirs = default | checkpoint.stages[index]
            for name in (*theirs, *(name for name in ours if name not in theirs and name != "accumulate_dtype")):
                value = theirs[name] if name in theirs else checkpoint.in_stage(index, name)
                own = ours.get(name) if name == "accumulate_dtype" else self.in_stage(index, name)
                if name == STAGE_RATE or own == value:
                    continue
                hint = ""
                if name == "epochs":
                    if index == stage and _may_end_there(ours, checkpoint.stages[index], num_epochs):
                        continue
                    hint = (
                        "; to train longer, add a stage after it: "
                        f"--stage.{index}.epochs {_quoted(value)} --stage.{index + 1}.epochs N"
                    )
                text = f"stage {index + 1}'s {name} is {own!r}, but {_quoted(value)} in the checkpoint{hint}"
                return Difference(text, name, index, _as_toml(value) if name in ours or "." in name else "")
        return None

    def changed_rates(self, checkpoint: Identity, stage: int, trains_text: bool) -> list[str]:
        """Return in words how the learning rates that count from now on differ from the checkpoint's.

        stage: the checkpoint's. trains_text: whether the text encoder is still trained.
        """
        rates = {f"stage {stage + 1}": [identity.stages[stage].get(STAGE_RATE) for identity in (checkpoint, self)]}
        if trains_text:
            for name, part in PART_RATES.items():
                rates[part] = [identity.settings.get(name) for identity in (checkpoint, self)]
        return [
            f"{what}: peak learning rate {now:g} instead of {before:g}"
            for what, (before, now) in rates.items()
            if before is not None and before != now
        ]


def _may_end_there(stage: dict, before: dict, num_epochs: int | None) -> bool:
    """Return whether a stage may have other epochs than before: its learning rate does not depend on their number, and
    there are more of them, or at least those that have begun. num_epochs: how many have, None if that is unknown."""
    is_free = stage["schedule"] == before.get("schedule") and not SCHEDULES[stage["schedule"]].depends_on_length
    if not is_free or type(before.get("epochs")) is not int:
        return False
    return stage["epochs"] >= (before["epochs"] if num_epochs is None else num_epochs)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _as_toml(value: object) -> str:
    """Return a recorded value as a setting is written, '' for one that is no setting's."""
    items = value if isinstance(value, list) else [value]
    text = toml_value(value) if all(isinstance(item, str | int | float) for item in items) else ""
    return text if len(text) <= 200 else ""


def _is_free(name: str) -> bool:
    """Return whether a setting, by its dotted name, may change before a resume."""
    table, _, setting = name.partition(".")
    return table in FREE_TABLES or setting in FREE.get(table, ())


def _implied(settings: dict) -> dict:
    """Return the settings that older checkpoints did not record, with the values they were trained with."""
    weighting = "min_snr" if settings.get("loss.min_snr_gamma", 0) > 0 else "none"
    defaults = {"loss.kind": "mse", "loss.weighting": weighting}
    defaults |= {"data.short_batches": "keep", "data.upscale": "always", "text_encoder.train": False}
    defaults["model.vae_precision"] = "fp32"
    defaults |= {"adapter.kind": "none", "train.layers": []}
    defaults |= _schedule_defaults(settings.get("text_encoder.schedule"))
    defaults |= {"loss.timesteps": "uniform", "loss.min_timestep": 0, "loss.max_timestep": 0}
    defaults |= {"loss.pyramid_noise": 0.0, "loss.input_perturbation": 0.0}
    defaults |= {"prior.prompt": "", "prior.weight": 1.0}
    defaults["optimizer.moments"] = "8bit"
    if "loss.huber_delta" in settings:
        defaults["loss.huber_schedule"] = "constant"
    return {name: value for name, value in defaults.items() if name not in settings}


def _schedule_defaults(schedule: object) -> dict:
    """Return the settings of the text encoder's schedule with the values that they stood for before they existed."""
    spec = SCHEDULES.get(schedule) if isinstance(schedule, str) else None
    return {f"text_encoder.{name}": DEFAULTS[f"text_encoder.{name}"] for name in spec.settings} if spec else {}


def _accumulate_dtype(stage: dict, setting: str, precision: str) -> dict:
    """Return {"accumulate_dtype": fp32 | bf16 | fp16} for a stage, {} if it does not accumulate.

    setting: train.accumulate_dtype. precision: the dtype that its `auto` stands for.
    """
    if stage.get("accumulate") == 1:
        return {}
    return {"accumulate_dtype": "fp32" if setting == "fp32" else precision}


def _rows(sample: Sample) -> tuple:
    """Return what a sample is trained on: cache keys, and its mask and its own settings if it has any.

    Records from before there were any stay equal.
    """
    changed = {}
    if sample.photo.settings != USUAL_SETTINGS:
        settings = asdict(sample.photo.settings)
        changed = {name: value for name, value in settings.items() if value != getattr(USUAL_SETTINGS, name)}
    masks, own = (sample.mask_keys,) if sample.mask_keys else (), (changed,) if changed else ()
    return sample.latent_keys, sample.caption_keys, *masks, *own


def _digest_of_rows(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 of the list of all rows as JSON, which is never held as a whole."""
    digest, separator = hashlib.sha256(b"["), b""
    for sample in samples:
        digest.update(separator + json.dumps(_rows(sample)).encode())
        separator = b", "
    digest.update(b"]")
    return digest.hexdigest()


def as_begun(config: Config, checkpoint: Identity, auto_vae: str) -> Config:
    """Return the config with which a run goes on with the photographs, and the latents, that it began with.

    data.upscale is the checkpoint's; runs from before there was that setting left no photograph out. So is the
    precision of latents, if model.vae_precision is auto and stands for another one here: all runs once encoded in fp32,
    and a run may be resumed on another device. auto_vae: fp32 | fp16, what auto stands for.
    """
    upscale = checkpoint.settings.get("data.upscale", "always")
    changed = {"data": config.data.model_copy(update={"upscale": upscale})}
    begun = checkpoint.settings.get("model.vae_precision", "fp32")
    if config.model.vae_precision == "auto" and begun != auto_vae:
        changed["model"] = config.model.model_copy(update={"vae_precision": begun})
    return config.model_copy(update=changed)


def _used(stage: dict) -> dict:
    """Return a stage's values without the settings of other schedules than its own, which may change."""
    unused = unused_settings(stage["schedule"])
    return {name: value for name, value in stage.items() if name not in unused}


def identify(config: Config, precision: str, samples: Sequence[Sample] = ()) -> Identity:
    """Return a run's identity. samples: the training samples.

    precision: fp32 | bf16 | fp16. optimizer.fused_backward must be resolved as well.
    """
    num_epochs = sum(stage.epochs for stage in config.stages())
    settings = _settings(config, precision, num_epochs)
    stages = []
    for stage in config.stages():
        other = _settings(stage.config, precision, num_epochs)
        own = {name: value for name, value in other.items() if name not in settings or settings[name] != value}
        kind = _accumulate_dtype({"accumulate": stage.accumulate}, config.train.accumulate_dtype, precision)
        stages.append({**_used(stage.flat()), **kind, **own})
    return Identity(settings, stages, _digest_of_rows(samples))


def _settings(config: Config, precision: str, num_epochs: int) -> dict:
    """Return the settings that determine weights, by their dotted names, without those that stages have of their own.

    num_epochs: of the whole run.
    """
    tables = config.model_dump(by_alias=True, mode="json")
    for table in FREE_TABLES:
        tables.pop(table)
    for group in (FREE, STAGED):
        for table, names in group.items():
            for name in names:
                tables[table].pop(name)
    tables["model"]["precision"] = precision
    tables["optimizer"]["fused_backward"] = config.optimizer.is_fused
    # parameters that the chosen loss does not use may change, except min_snr_gamma, which older checkpoints recorded
    for name in config.loss.unused_parameters() - {"min_snr_gamma"}:
        tables["loss"].pop(name)
    for name in config.prior.unused_parameters():
        tables["prior"].pop(name)
    # settings of other adapters than the run's have no effect
    tables["adapter"] = {name: tables["adapter"][name] for name in ("kind", *config.adapter.spec.settings)}
    if not config.trains_word:
        # so that older checkpoints, which have no such table, are the same run
        tables.pop("embedding")
    text = config.text_encoder
    if not text.train:
        tables["text_encoder"] = {"train": False}
    else:
        # a run that is lengthened trains it longer if epochs is 0 and the rate constant; a schedule has a fixed span
        spans_the_run = SCHEDULES[text.schedule].depends_on_length
        tables["text_encoder"]["epochs"] = text.trained_epochs(num_epochs) if spans_the_run else text.epochs
        for name in unused_settings(text.schedule):
            tables["text_encoder"].pop(name)
    # last, so that min_snr_gamma is the difference that is reported
    tables["loss"].pop("weighting")
    tables["loss"]["weighting"] = config.loss.chosen_weighting
    return {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}
