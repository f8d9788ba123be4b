"""Settings that cannot take effect, said by `plan` and `train` before the run.

A warm-up that outlasts its stage, a batch larger than every bucket, validation of nothing: each of these is allowed,
and none is what its author meant. A setting that still has its default is passed over, except where it changes what is
learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from safelight.data.decode_memory import available_bytes
from safelight.data.epochs import Group, Span, left_over, uses_by_group
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.config.schema import FLAT_TABLES, NESTED_TABLES, Config, Section
from safelight.trainer.config.stage_settings import attribute_of, overridable
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.inference.prompt_file import is_guided, prompts_of, read_prompt_file
from safelight.trainer.inference.prompt_words import tag_note
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.static_bytes import placed_photos, static_bytes
from safelight.trainer.models.base import Base
from safelight.trainer.models.class_photos import is_class_image
from safelight.trainer.models.placing import Placed, once_each, size_notes
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.registry.schedules import SCHEDULE_SETTINGS, SCHEDULES, learning_rate, unused_settings
from safelight.units import GIB

# AdamW changes a value by about so much in a step: less, as a LoRA has, hardly moves an embedding in hundreds of steps
LEAST_WORD_LR = 5e-4
EVERY = {
    ("validate_", "every_epochs"): "the run validates only before its first step and at its end",
    ("sample", "every_epochs"): "the run samples only before its first step and at its end",
    ("save", "every_epochs"): "it saves nothing before the end",
    ("save", "every_steps"): "it saves nothing before the end",
    ("log", "every_steps"): "it logs a single line, at the end",
}


@dataclass(frozen=True)
class Contents:
    """What a run's dataset holds.

    counts: photographs to train on, by bucket; one that repeats counts as often. num_masks: photographs with a mask.
    num_waiting: uses of photographs that are carried over at the end of the run, and so not trained; num_never: of
    buckets that never fill a batch. num_flipped: photographs with a flip_p of their own. num_class_images: of
    the dataset's own, to train on.
    """

    timeline: Timeline
    counts: Mapping[Group, int]
    num_validation: int
    has_captions: bool
    num_masks: int = 0
    num_waiting: int = 0
    num_never: int = 0
    has_tags: bool = True
    num_flipped: int = 0
    num_class_images: int = 0

    @classmethod
    def of(cls, config: Config, placed: Placed) -> Contents:
        has_captions = any(one.photo.captions[0] or one.photo.tags for one in placed.validation or placed.train)
        timeline, seed = Timeline.of(config, placed.train), config.run.seed
        counts = {group: num for group, num in uses_by_group(placed.train, seed=seed, num_epochs=1).items() if num}
        waiting = never = 0
        if config.data.carries:
            epochs = timeline.num_epochs
            spans = [Span(stage.epochs, stage.batch_size) for stage in timeline.stages]
            left = left_over(placed.train, spans, seed=seed, epoch=epochs)
            due = uses_by_group(placed.train, seed=seed, num_epochs=epochs)
            waiting, never = sum(left.values()), sum(num for group, num in left.items() if num == due[group])
        photos = [one.photo for one in once_each(placed.train)]
        masks, flips = sum(bool(photo.mask) for photo in photos), sum(bool(photo.settings.flip_p) for photo in photos)
        has_tags = any(photo.tags for photo in photos)
        num_validation, num_class = len(placed.validation), sum(is_class_image(photo) for photo in photos)
        return cls(timeline, counts, num_validation, has_captions, masks, waiting, never, has_tags, flips, num_class)


def notes_of(config: Config, device_type: str) -> list[str]:
    """Return a line for each setting of a run without effect. device_type: cpu, cuda, or auto if unknown.

    Without a dataset, only those that can be told from the settings.
    """
    placed = placed_photos(config)
    contents = Contents.of(config, placed) if placed and placed.train else None
    sizes = size_notes(placed, config.data.upscale) if placed else []
    return [*notes(config, contents, device_type), *sizes]


def notes(config: Config, contents: Contents | None, device_type: str) -> list[str]:
    """Return a line for each setting without effect. contents: None if there is no dataset yet."""
    found = [*_unused(config, device_type), *_overridden(config)]
    if contents is not None:
        for part in (_photos, _intervals, _batches, _validation):
            found += part(config, contents)
        if config.sample.every_epochs and not contents.has_captions and prompts_of(config) is None:
            found.append(
                "sample.every_epochs samples nothing: no photograph has a caption; set sample.prompts, or "
                "sample.every_epochs 0"
            )
        found += _lengths(config, contents)
        if not contents.num_class_images and not config.prior.prompt and _is_changed(config.prior, "weight"):
            found.append(f"prior.weight {config.prior.weight:g} has no effect: there are no class images")
        if not contents.num_masks and _is_changed(config.loss, "mask_weight"):
            found.append(f"loss.mask_weight {config.loss.mask_weight:g} has no effect: no photograph has a mask")
        if contents.num_masks and config.loss.mask_weight == 1:
            found.append(f"{counted(contents.num_masks, 'mask')} without effect: loss.mask_weight is 1")
    return found


def memory_note(config: Config, device_type: str, plan: Candidate | None) -> str:
    """Return a line if the host has less memory available than the run takes, else ''. plan: None on a CPU."""
    available = available_bytes()
    if plan is not None and plan.host is not None:
        host = plan.host
        needed = max(host.loading, host.states + host.activations + host.snapshot + host.autoencoder)
    else:
        needed = static_bytes(config).total if device_type == "cpu" else 0
    if available is None or needed <= available:
        return ""
    return (
        f"the run takes at least {needed / GIB:.1f} GiB of host memory, and {available / GIB:.1f} GiB are available: "
        "the system may kill it; close other programs, or raise the container's limit"
    )


def _prompt_notes(config: Config) -> tuple[str, ...]:
    """Return a line for each thing in the prompt file that has no effect; () if it cannot be read."""
    try:
        return read_prompt_file(Path(config.sample.prompts_file), config.data.max_resolution).notes
    except UserError:
        return ()


def _is_changed(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


def _unused(config: Config, device_type: str) -> Iterator[str]:
    """Yield settings that other settings switch off."""
    data, train, sample, loss = config.data, config.train, config.sample, config.loss
    stages = config.stages()
    num_epochs = sum(stage.epochs for stage in stages)
    if data.variants == 1 and _is_changed(data, "crop_jitter"):
        yield f"data.crop_jitter {data.crop_jitter:g} has no effect with data.variants 1"
    if data.variants > num_epochs:
        yield (
            f"data.variants {data.variants} is more than the run's {counted(num_epochs, 'epoch')}: an epoch uses one "
            "crop of each photograph, and the cache encodes them all"
        )
    for name in sorted(
        set.intersection(loss.unused_parameters(), *(s.config.loss.unused_parameters() for s in stages))
    ):
        if _is_changed(loss, name):
            value = getattr(loss, name)
            shown = value if isinstance(value, str) else f"{value:g}"
            yield f"loss.{name} {shown} has no effect with {loss.chosen_instead_of(name)}"
    for name in sorted(config.prior.unused_parameters()):
        if _is_changed(config.prior, name):
            yield f"prior.{name} {getattr(config.prior, name)} has no effect without prior.prompt"
    yield from _of_stage_losses(config)
    yield from _of_what_is_off(config)
    if config.optimizer.clipping != "auto" and all(stage.max_grad_norm == 0 for stage in stages):
        yield f"optimizer.clipping {config.optimizer.clipping} has no effect with train.max_grad_norm 0"
    if train.accumulate_dtype != "auto" and all(stage.accumulate == 1 for stage in stages):
        yield f"train.accumulate_dtype {train.accumulate_dtype} has no effect with train.accumulate 1"
    if sample.prompts and sample.prompts_file:
        yield "sample.prompts has no effect: sample.prompts_file names a file with the prompts"
    for name, texts in (("prompts", sample.prompts), ("negative_prompt", [sample.negative_prompt])):
        if note := tag_note(texts, f"sample.{name}"):
            yield note
    if (sample.prompts or sample.prompts_file) and _is_changed(sample, "num_prompts"):
        lists = "sample.prompts_file" if sample.prompts_file else "sample.prompts"
        yield f"sample.num_prompts {sample.num_prompts} has no effect: {lists} lists the prompts"
    if sample.negative_prompt and not is_guided(config):
        yield "sample.negative_prompt has no effect with sample.cfg 1"
    yield from _of_schedules(config)
    if sample.sampler == "dpm++-karras" and _is_changed(sample, "spacing"):
        yield f"sample.spacing {sample.spacing} has no effect: dpm++-karras spaces the steps by noise level"
    if sample.prompts_file:
        yield from _prompt_notes(config)
    yield from _of_adapter(config)
    yield from _of_text_encoder(config, num_epochs)
    yield from _of_word(config)
    if device_type == "cpu" and config.memory.limit_gib:
        yield f"memory.limit_gib {config.memory.limit_gib:g} has no effect on a CPU"
    if device_type == "cpu" and train.cudnn_benchmark:
        yield "train.cudnn_benchmark has no effect on a CPU"


def _of_stage_losses(config: Config) -> Iterator[str]:
    """Yield a stage's own settings of [loss] that belong to another choice than the stage's."""
    for number, (own, stage) in enumerate(zip(config.stage, config.stages(), strict=False), start=1):
        loss = stage.config.loss
        for name in sorted(loss.unused_parameters()):
            value = None if own.loss is None else getattr(own.loss, name, None)
            if value is not None:
                shown = value if isinstance(value, str) else f"{value:g}"
                yield f"stage {number}'s loss.{name} {shown} has no effect with its {loss.chosen_instead_of(name)}"


def _of_what_is_off(config: Config) -> Iterator[str]:
    """Yield settings of patience, W&B and samples in a run that has none."""
    stages, validate, sample = config.stages(), config.validate_, config.sample
    # without held-out photographs that is said of all settings of [validate]
    if config.data.validation_fraction and not any(stage.config.validate_.patience for stage in stages):
        for name in ("min_gain", "patience_ends"):
            if _is_changed(validate, name):
                yield f"validate.{name} {getattr(validate, name)} has no effect without validate.patience"
    if config.log.wandb is False:
        for name in ("wandb_project", "wandb_entity", "wandb_name"):
            if _is_changed(config.log, name):
                yield f"log.{name} {getattr(config.log, name)} has no effect with log.wandb false"
    if not any(stage.config.sample.every_epochs for stage in stages):
        names = [f"sample.{name}" for name in type(sample).model_fields if _is_changed(sample, name)]
        if names := [name for name in names if name != "sample.every_epochs"]:
            yield (
                f"sample.every_epochs 0: the run draws nothing; {', '.join(names)} only matter to `safelight sample`, "
                "compare, grid and evaluate"
            )


def prediction_note(config: Config, base: Base) -> str:
    """Return a line if a run trains another prediction than the base's, else ''."""
    chosen, usual = config.loss.prediction, base.noise_schedule().prediction_type
    if chosen in ("auto", usual):
        return ""
    return (
        f"loss.prediction {chosen} is not what the base predicts ({usual}): its UNet has to learn the other first, "
        "which takes long; use auto unless the base's settings are wrong"
    )


def _of_schedules(config: Config) -> Iterator[str]:
    """Yield settings of [optimizer] and [[stage]] that belong to schedules which are not used."""
    stages, own = config.stages(), config.stage
    for name in SCHEDULE_SETTINGS:
        value = getattr(config.optimizer, name)
        heirs = [s for number, s in enumerate(stages) if not own or getattr(own[number], name) is None]
        # without heirs every stage has a value of its own, which is said elsewhere
        if _is_changed(config.optimizer, name) and heirs and all(name in unused_settings(s.schedule) for s in heirs):
            schedules = ", ".join(dict.fromkeys(stage.schedule for stage in heirs))
            yield f"optimizer.{name} {value:g} has no effect with schedule {schedules}"
        for number, stage in enumerate(own):
            value, schedule = getattr(stage, name), stages[number].schedule
            if value is not None and name in unused_settings(schedule):
                yield f"stage {number + 1}'s {name} {value:g} has no effect with its schedule {schedule}"


def _of_adapter(config: Config) -> Iterator[str]:
    """Yield settings of [adapter] without effect, and learning rates that are those of whole weights."""
    adapter, spec = config.adapter, config.adapter.spec
    for name in type(adapter).model_fields:
        if name not in ("kind", *spec.settings) and _is_changed(adapter, name):
            yield f"adapter.{name} {getattr(adapter, name)} has no effect with adapter.kind {spec.name}"
    peak = max(stage.lr for stage in config.stages())
    if peak < spec.min_usual_lr:
        yield (
            f"optimizer.lr {peak:g} hardly trains an adapter of kind {spec.name}, whose matrices begin at zero: 1e-4 "
            "is usual"
        )


def _of_text_encoder(config: Config, num_epochs: int) -> Iterator[str]:
    """Yield settings of [text_encoder] without effect, and what other settings do not do for it."""
    text = config.text_encoder
    if not text.train:
        for name in type(text).model_fields:
            if _is_changed(text, name):
                yield f"text_encoder.{name} {getattr(text, name)} has no effect with text_encoder.train false"
        return
    for name in SCHEDULE_SETTINGS:
        if name in unused_settings(text.schedule) and _is_changed(text, name):
            value = getattr(text, name)
            yield f"text_encoder.{name} {value:g} has no effect with text_encoder.schedule {text.schedule}"
    if text.epochs >= num_epochs:
        yield f"text_encoder.epochs {text.epochs} has no effect: the run has {counted(num_epochs, 'epoch')}"
    if config.train.ema_decay:
        yield (
            f"train.ema_decay {config.train.ema_decay:g} averages the UNet's weights only: pictures and exports have "
            "the text encoder of the last step"
        )
    if config.optimizer.fused_backward is True:
        yield "optimizer.fused_backward true is for the UNet only: the text encoder is updated after backward"


def _of_word(config: Config) -> Iterator[str]:
    """Yield settings of [embedding] without effect, and what would keep a word from being learned or seen."""
    own, sample = config.embedding, config.sample
    if not config.trains_word:
        for name in type(own).model_fields:
            if _is_changed(own, name):
                yield f"embedding.{name} {getattr(own, name)} has no effect with adapter.kind {config.adapter.kind}"
        return
    peak = max(stage.lr for stage in config.stages())
    if peak < LEAST_WORD_LR and not OPTIMIZERS[config.optimizer.name].estimates_rate:
        yield (
            f"optimizer.lr {peak:g} hardly moves an embedding: a step changes a value by about lr, and vectors have "
            "values of 0.01 to 1; 5e-4 to 1e-2 is usual"
        )
    if own.negative and sample.cfg == 1:
        yield "embedding.negative true shows in no sample: with sample.cfg 1 negative prompts are not read"
    named = [prompt for prompt in sample.prompts if own.word.lower() in prompt.lower()]
    if sample.prompts and not named and not own.negative:
        yield f"sample.prompts name the word {own.word} nowhere, so that no sample shows what it has learned"


def _overridden(config: Config) -> Iterator[str]:
    """Yield settings of [train] and [optimizer] that every stage sets itself."""
    if not config.stage:
        return
    # equal to their sum where a resume has cut a run in stages
    if _is_changed(config.train, "epochs") and config.train.epochs != sum(stage.epochs for stage in config.stage):
        yield f"train.epochs {config.train.epochs} has no effect: each [[stage]] sets its own (--stage.0.epochs)"
    for table, kind in (*FLAT_TABLES.items(), *NESTED_TABLES.items()):
        attribute = attribute_of(table)
        section = getattr(config, attribute)
        owns = [stage if table in FLAT_TABLES else getattr(stage, attribute) for stage in config.stage]
        for name in overridable(kind):
            if _is_changed(section, name) and all(own is not None and getattr(own, name) is not None for own in owns):
                yield f"{table}.{name} {getattr(section, name)} has no effect: every [[stage]] sets its own"


def kept_by_stages(config: Config, given: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each setting of the command line that stages have a value of their own for.

    given: the settings' paths, as optimizer, lr. In a file both stand below each other; on the command line the
    stage's is out of sight. One that is without any effect, and not a default, is said by `notes`.
    """
    found = []
    for table, name in (path for path in given if len(path) == 2 and path[0] in (*FLAT_TABLES, *NESTED_TABLES)):
        section, attribute = getattr(config, attribute_of(table)), attribute_of(table)
        if name not in overridable(type(section)):
            continue
        owns = [stage if table in FLAT_TABLES else getattr(stage, attribute) for stage in config.stage]
        values = {number: getattr(own, name) for number, own in enumerate(owns) if getattr(own, name, None) is not None}
        if not values or (len(values) == len(owns) and _is_changed(section, name)):
            continue
        others = [str(number + 1) for number in range(len(owns)) if number not in values]
        named = [str(number + 1) for number in values]
        path = name if table in FLAT_TABLES else f"{table}.{name}"
        options = [f"--stage.{number}.{path}".replace("_", "-") for number in values]
        found.append(
            f"--{table}.{name}".replace("_", "-") + f" {_shown(getattr(section, name))} is for "
            f"{_stages(others) if others else 'no stage'}: {_stages(named)} "
            f"{'keeps its' if len(named) == 1 else 'keep their'} own "
            f"({', '.join(_shown(value) for value in values.values())}), which {_and(options)} "
            f"{'sets' if len(options) == 1 else 'set'}"
        )
    return found


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _stages(numbers: Sequence[str]) -> str:
    return f"stage{'s' * (len(numbers) > 1)} {_and(numbers)}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _lengths(config: Config, contents: Contents) -> Iterator[str]:
    """Yield what the run's steps are too few for: warm-up, schedule, stages, max_steps, the moving average."""
    timeline, max_steps = contents.timeline, config.train.max_steps
    num_steps, lengths = timeline.num_steps, _stage_lengths(timeline)
    total = sum(lengths)
    if max_steps > total:
        yield (
            f"train.max_steps {max_steps} is not reached: the run ends after {counted(total, 'step')}; "
            "raise epochs to train longer"
        )
    for index, (stage, whole, end) in enumerate(zip(timeline.stages, lengths, accumulate(lengths), strict=True)):
        name = f"stage {index + 1}" if config.stage else "the run"
        length = max(0, whole - max(0, end - num_steps))
        if length == 0:
            yield f"{name} is never reached: train.max_steps {max_steps} ends the run before it"
        elif stage.warmup_steps >= length:
            reached = learning_rate(stage, length - 1, whole)
            yield (
                f"{name} ends after {counted(length, 'step')}, before its warm-up of {stage.warmup_steps} does: the "
                f"learning rate reaches {reached:.2g}, not its peak of {stage.lr:g}; lower warmup_steps or raise epochs"
            )
        elif length < whole and SCHEDULES[stage.schedule].depends_on_length:
            yield (
                f"train.max_steps {max_steps} ends the run before the {stage.schedule} schedule of {whole} steps does: "
                f"the learning rate does not fall to {stage.lr * stage.lr_end:.2g}"
            )
    text = config.text_encoder
    trained = min(num_steps, timeline.steps_before(text.trained_epochs(timeline.num_epochs)))
    if text.train and text.warmup_steps >= trained:
        yield (
            f"the text encoder is trained for {counted(trained, 'step')}, and its warm-up of {text.warmup_steps} does "
            "not end before: its learning rate does not reach its peak; lower text_encoder.warmup_steps"
        )
    decay, reached = config.train.ema_decay, (1 + num_steps) / (10 + num_steps)
    if decay > reached:
        yield (
            f"train.ema_decay {decay:g} is not reached in {counted(num_steps, 'step')}: the average's decay rises to "
            f"{reached:.3g}"
        )


def _stage_lengths(timeline: Timeline) -> list[int]:
    """Return the steps of each stage, without max_steps."""
    return [steps.total for steps in timeline.stage_steps]


def _photos(config: Config, contents: Contents) -> Iterator[str]:
    """Yield settings of tags and flips that no photograph can follow."""
    for name in ("max_tags", "keep_tags", "shuffle_tags"):
        if _is_changed(config.data, name) and not contents.has_tags:
            yield f"data.{name} {str(getattr(config.data, name)).lower()} has no effect: no photograph has tags"
    if contents.num_flipped and config.data.variants == 1:
        yield (
            f"the flip_p of {counted(contents.num_flipped, 'photograph')} has no effect with data.variants 1: only "
            "further variants are mirrored"
        )


def _intervals(config: Config, contents: Contents) -> Iterator[str]:
    """Yield intervals that are longer than the run."""
    timeline = contents.timeline
    epochs = timeline.epochs_begun
    for (table, name), effect in EVERY.items():
        section, unit = getattr(config, table), name.removeprefix("every_")
        every, length = getattr(section, name), epochs if unit == "epochs" else timeline.num_steps
        if every > length and _is_changed(section, name):
            shown = table.removesuffix("_")
            yield f"{shown}.{name} {every} is beyond the run's {counted(length, unit.removesuffix('s'))}: {effect}"


def _batches(config: Config, contents: Contents) -> Iterator[str]:
    """Yield batch sizes that buckets cannot fill, and accumulation over more batches than an epoch has."""
    counts = contents.counts.values()
    if contents.num_waiting and not contents.num_never:
        yield (
            f"{counted(contents.num_waiting, 'use')} of photographs of the last epochs wait for a batch when the run "
            "ends, and are not trained (data.short_batches carry)"
        )
    if contents.num_never:
        yield (
            f"some buckets never fill a batch: data.short_batches carry does not train their photographs, "
            f"{counted(contents.num_never, 'use')} in all; use merge or keep, or a smaller batch_size"
        )
    for batch_size in () if config.data.carries else dict.fromkeys(s.batch_size for s in contents.timeline.stages):
        small = sum(count < batch_size for count in counts)
        if small == len(counts):
            largest = counted(max(counts), "photograph")
            yield (
                f"batch_size {batch_size} is never filled, the largest bucket has {largest}; "
                "batches are smaller, and no photograph is dropped or repeated"
            )
        elif small:
            # most of the steps would be taken on few photographs
            advice = "; data.short_batches carry or merge fills them" if 2 * small > len(counts) else ""
            yield (
                f"{small} of {len(counts)} buckets have fewer photographs than batch_size {batch_size}: their batches "
                f"are smaller, and no photograph is dropped or repeated{advice}"
            )
    for batch_size, num in dict.fromkeys((s.batch_size, s.accumulate) for s in contents.timeline.stages):
        num_batches = sum(-(-count // batch_size) for count in counts)
        if num > num_batches:
            batches = f"{num_batches} batch{'es' * (num_batches != 1)}"
            yield f"accumulate {num} is never filled: an epoch has {batches}, and no step reaches into the next epoch"


def _validation(config: Config, contents: Contents) -> Iterator[str]:
    """Yield validation of nothing, and photographs that are held out for nothing."""
    fraction, validate = config.data.validation_fraction, config.validate_
    if contents.num_validation and not validate.every_epochs:
        yield (
            f"{counted(contents.num_validation, 'photograph')} held out by data.validation_fraction {fraction:g} and "
            "never validated, since validate.every_epochs is 0; set data.validation_fraction 0 to train on them"
        )
    if validate.every_epochs and min(contents.num_validation, validate.max_images) == 1:
        what = "one photograph is held out" if contents.num_validation == 1 else "validate.max_images 1"
        patience = any(stage.config.validate_.patience for stage in config.stages())
        yield (
            f"{what}: the warning of over-fitting{' and validate.patience go' if patience else ' goes'} by the loss of "
            f"one photograph, which says little of others; raise "
            f"{'data.validation_fraction' if contents.num_validation == 1 else 'it'}"
        )
    if not contents.num_validation and validate.every_epochs:
        if fraction > 0:
            yield f"data.validation_fraction {fraction:g} holds out no photograph: nothing is validated"
        else:
            for name in type(validate).model_fields:
                if _is_changed(validate, name):
                    yield f"validate.{name} {getattr(validate, name)} has no effect with data.validation_fraction 0"
