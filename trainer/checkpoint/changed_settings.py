"""What of a run's stages may change on a resume: at the end of an epoch, every setting that a stage may override.

A stage with a constant learning rate is cut in two where the run stands: the first part is what was trained, the second
begins a stage of its own with the changed values. So the epochs behind stay what they were, those to come are planned
by the new values alone, and the result is that of a run whose settings had these stages from its start.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.checkpoint.identity import STAGE_RATE, STAGED, Identity, identify
from safelight.trainer.config.schema import FLAT_TABLES, NESTED_TABLES, Config, Section, Stage
from safelight.trainer.config.stage_settings import attribute_of, overridable
from safelight.trainer.config.toml import toml_value
from safelight.trainer.distributed.started import world_size
from safelight.trainer.registry.schedules import SCHEDULES
from safelight.untrusted import path_in, read_json_object

# of a stage, and judged where a checkpoint's stages are compared
OWN = ("epochs", "start_from", "lr", "accumulate_dtype")
# of a stage, what the number of its epochs' steps depends on
SPANNING = ("batch_size", "accumulate")


def epochs_before(checkpoint: Identity, position: Position, stage: int) -> int:
    """Return the epochs of the stages before one, as a checkpoint's run trained them."""
    ended = dict(position.ended)
    lengths = [ended.get(index, values.get("epochs", 0)) for index, values in enumerate(checkpoint.stages)]
    return sum(int(length) for length in lengths[:stage])


def with_changes(config: Config, checkpoint: Identity, position: Position, run_dir: Path) -> tuple[Config, list[str]]:
    """Return the settings a run goes on with, and how a stage was cut for them, in words; [] if none was.

    Raises UserError for a change that this point of the run does not allow, with the command that does. Changes outside
    of stages, and those of a run whose stages are all over, are left to `Identity.difference`, which refuses them.
    """
    config, cuts = _with_stages(config, checkpoint, position, run_dir)
    _check_text_schedule(config, checkpoint, position, run_dir)
    return config, cuts


def _with_stages(config: Config, checkpoint: Identity, position: Position, run_dir: Path) -> tuple[Config, list[str]]:
    """Do what `with_changes` does, whatever the text encoder's schedule."""
    now = identify(config, str(checkpoint.settings.get("model.precision", "fp32")))
    reached = position.stage
    if reached >= min(len(now.stages), len(checkpoint.stages)):
        return config, []
    differing = [_differing(now, checkpoint, index) for index in range(reached + 1)]
    behind = {index: checkpoint.stages[index].get(STAGE_RATE) for index in range(reached)}
    if not any(differing):
        # the rates of stages behind are what they were, whatever those of the run are now
        moved = {index: rate for index, rate in behind.items() if rate not in (None, now.stages[index][STAGE_RATE])}
        stages = [_set(stage, {STAGE_RATE: moved.get(index)}) for index, stage in enumerate(config.stage)]
        return config.model_copy(update={"stage": stages}) if moved else config, []
    done = position.epoch - epochs_before(checkpoint, position, reached)
    ended = dict(position.ended)
    planned = ended.get(reached, int(checkpoint.stages[reached]["epochs"]))
    given = config.stage[reached].epochs if config.stage else config.train.epochs
    # a stage that has trained all its epochs goes on if it is given more
    is_over = done >= planned and not position.step_in_epoch and (reached in ended or given <= done)
    if is_over and reached == len(now.stages) - 1:
        # nothing is left that the change could have an effect on
        return config, []
    if differing[reached] and not is_over:
        _check_cut(config, checkpoint, position, run_dir, differing[reached])
    return _rebuilt(config, now, checkpoint, differing, reached, None if is_over else done)


def _differing(now: Identity, checkpoint: Identity, stage: int) -> list[str]:
    """Return the names of a stage's settings, as identities have them, in which a run differs from a checkpoint."""
    names = dict.fromkeys((*checkpoint.stages[stage], *now.stages[stage]))
    for table, section in NESTED_TABLES.items():
        dotted = [f"{table}.{name}" for name in overridable(section)]
        names |= dict.fromkeys(name for name in dotted if name in now.settings or name in checkpoint.settings)
    known = {name for names in STAGED.values() for name in names}
    return [
        name
        for name in names
        if name not in OWN
        and (name in known or "." in name)
        and _value(now, stage, name) != _value(checkpoint, stage, name)
    ]


def _value(identity: Identity, stage: int, name: str) -> object:
    return identity.in_stage(stage, name)


def _check_cut(config: Config, checkpoint: Identity, position: Position, run_dir: Path, names: list[str]) -> None:
    """Raise UserError if the present stage cannot be cut where the run stands."""
    stage = position.stage
    values = checkpoint.stages[stage]
    shown = _shown(names) + _of_processes(names, values.get("accumulate"))
    if values.get("schedule") != "constant":
        raise UserError(
            f"{shown} cannot change within stage {stage + 1}: its learning rate follows a {values.get('schedule')} "
            "schedule over all of the stage's steps, whose number would change; "
            + from_weights(config, run_dir, position.step)
        )
    first_step, epoch_end = _bounds(checkpoint, position, run_dir)
    if int(values.get("warmup_steps", 0)) > position.step - first_step:
        raise UserError(
            f"{shown} cannot change before the warm-up of stage {stage + 1} has ended, after "
            f"{values['warmup_steps']} steps; {from_weights(config, run_dir, position.step)}"
        )
    if position.step_in_epoch:
        resume = f"safelight train {shlex.quote(str(run_dir / 'config.toml'))} --resume"
        how = "resume without the change until an epoch ends"
        if epoch_end is not None:
            how = (
                f"train to the epoch's end first: {resume} --train.max-steps {epoch_end}; then resume with the "
                "change and --train.max-steps 0"
            )
        raise UserError(
            f"{shown} cannot change in the middle of an epoch, because its batches are planned as a whole (step "
            f"{position.step} is step {position.step_in_epoch} of epoch {position.epoch + 1}); {how}"
        )


def _check_text_schedule(config: Config, checkpoint: Identity, position: Position, run_dir: Path) -> None:
    """Raise UserError if the steps that the text encoder's schedule spans are others than in the checkpoint's run."""
    text = config.text_encoder
    schedule, num_epochs = checkpoint.settings.get("text_encoder.schedule"), sum(s.epochs for s in config.stages())
    before, after = checkpoint.settings.get("text_encoder.epochs"), text.trained_epochs(num_epochs)
    is_spanning = text.train and text.schedule == schedule and SCHEDULES[text.schedule].depends_on_length
    if not is_spanning or type(before) is not int:
        return
    if before != after and text.epochs == 0:
        whose = f"the text encoder's learning rate follows a {schedule} schedule over {counted(before, 'epoch')}"
        way = from_weights(config, run_dir, position.step)
        if after > before:
            way = f"--text-encoder.epochs {before} ends its training there as before, or {way}"
        raise UserError(f"the run's epochs cannot change to {after}: {whose}, whose steps would change; {way}")
    now = [stage.flat() for stage in config.stages()]
    if before == after and position.epoch < before and _spans(checkpoint.stages, before) != _spans(now, before):
        changed = [
            name
            for name in SPANNING
            if {str(stage.get(name)) for stage in checkpoint.stages} != {str(stage[name]) for stage in now}
        ]
        raise UserError(
            f"{_shown(changed or ['epochs'])} cannot change while the text encoder is trained: its learning rate "
            f"follows a {schedule} schedule over all steps of the first {counted(before, 'epoch')}, whose number would "
            "change; " + from_weights(config, run_dir, position.step)
        )


def _spans(stages: Sequence[dict], num_epochs: int) -> list[tuple[object, ...]]:
    """Return what the number of steps of a run's first epochs depends on: spans of equal epochs, each with its values
    of SPANNING and its length."""
    spans: list[tuple[object, ...]] = []
    for stage in stages:
        epochs = stage.get("epochs")
        num = min(epochs if type(epochs) is int else 0, num_epochs)
        num_epochs -= num
        values = tuple(stage.get(name) for name in SPANNING)
        if num and spans and spans[-1][:-1] == values:
            spans[-1] = (*values, spans[-1][-1] + num)
        elif num:
            spans.append((*values, num))
    return spans


def _bounds(checkpoint: Identity, position: Position, run_dir: Path) -> tuple[int, int | None]:
    """Return the steps before the present stage, and the step at which the present epoch ends, None if it is unknown.

    As data.json has them; if it does not tell, the stage is taken to have begun only now, so that nothing is allowed
    that its warm-up forbids.
    """
    done = position.epoch - epochs_before(checkpoint, position, position.stage)
    try:
        rows = read_json_object(path_in(run_dir, "data.json"))["stages"]
        totals = [_total(row) for row in rows[: position.stage]]
        numbers = rows[position.stage]["steps_per_epoch"]
        in_epoch = int(numbers[0 if len(numbers) == 1 else done])
    except (OSError, ValueError, LookupError, TypeError):
        return position.step, None
    return sum(totals), position.step - position.step_in_epoch + in_epoch


def _total(row: dict) -> int:
    numbers = row["steps_per_epoch"]
    return int(row["epochs"]) * int(numbers[0]) if len(numbers) == 1 else sum(map(int, numbers))


def from_weights(config: Config, run_dir: Path, step: int) -> str:
    """Return how a new run goes on from a checkpoint's weights, as a command.

    One that trains no weights of the base itself has none to go on from: it begins anew.
    """
    if config.adapter.spec.needs_base or not config.adapter.spec.changes_unet:
        return "start a new run with --run.dir"
    quoted, base = shlex.quote(str(run_dir)), shlex.quote(f"{run_dir}-step{step}")
    config, new = shlex.quote(str(run_dir / "config.toml")), shlex.quote(f"{run_dir}-2")
    return (
        f"a new run can go on from its weights: safelight export {quoted} --checkpoint {step} --dtype fp32 -o {base} "
        f"&& safelight train {config} --model.base {base} --run.dir {new}, with the change"
    )


def _shown(names: list[str]) -> str:
    dotted = [next((f"{table}.{name}" for table, own in STAGED.items() if name in own), name) for name in names]
    return ", ".join(dotted)


def _of_processes(names: list[str], accumulate: object) -> str:
    """Return ' (why)' if train.accumulate differs because it was raised to the number of processes; else ''."""
    num = world_size()
    if "accumulate" not in names or type(accumulate) is not int or num <= accumulate:
        return ""
    return (
        f" (train.accumulate is {accumulate} in the checkpoint, but {num} processes need at least {num}: use at most "
        f"{counted(accumulate, 'process')})"
    )


def _rebuilt(
    config: Config, now: Identity, checkpoint: Identity, differing: list[list[str]], reached: int, done: int | None
) -> tuple[Config, list[str]]:
    """Return the settings with every stage behind as it was trained, and the present one cut after `done` epochs.

    done: None if the present stage is over, so that it is behind as well.
    """
    given = config.stage or [Stage(epochs=config.train.epochs)]
    changes, stages = [], []
    # settings outside of stages are what they were: stages to come get the new values by themselves
    base, moved = _base(config, now, checkpoint)
    for index, stage in enumerate(given):
        own = _as_given(stage, moved)
        if index > reached:
            stages.append(own)
            continue
        before = {name: _value(checkpoint, index, name) for name in differing[index]}
        trained = _set(own, {**before, "lr": checkpoint.stages[index].get("lr")})
        if index < reached or done is None:
            stages.append(trained)
        elif not differing[index]:
            stages.append(_set(own, {}))
        else:
            stages.append(_set(trained, {"epochs": done}))
            # it goes on at the peak
            no_warmup = 0 if now.stages[index].get("warmup_steps") else None
            rest = {"epochs": max(1, stage.epochs - done), "warmup_steps": no_warmup, "start_from": "last"}
            stages.append(_set(own, rest))
            changes = [f"{_shown([n])} {_text(_value(now, index, n))} instead of {_text(before[n])}" for n in before]
            left = stage.epochs - done
            if left < 1:
                raise UserError(
                    f"stage {index + 1} has trained {done} epochs already, and its settings have {stage.epochs}; give "
                    f"it more: --{'stage.' + str(index) if config.stage else 'train'}.epochs"
                )
            rest = f"the rest of it, {counted(left, 'epoch')}, is stage {index + 2}"
            changes.append(f"stage {index + 1} is cut after {counted(done, 'epoch')}; {rest}")
    return base.model_copy(update={"stage": stages}), changes


def _base(config: Config, now: Identity, checkpoint: Identity) -> tuple[Config, dict[str, object]]:
    """Return the config with the tables that stages have, too, as in the checkpoint; and the new values by name."""
    moved: dict[str, object] = {}
    updates: dict[str, Section] = {}
    for table, section in NESTED_TABLES.items():
        attribute = attribute_of(table)
        values = {}
        for name in overridable(section):
            dotted = f"{table}.{name}"
            before = checkpoint.settings.get(dotted)
            if dotted in checkpoint.settings and now.settings.get(dotted) != before:
                values[name], moved[dotted] = before, getattr(getattr(config, attribute), name)
        if values:
            updates[attribute] = getattr(config, attribute).model_copy(update=values)
    return config.model_copy(update=updates), moved


def _as_given(stage: Stage, moved: dict[str, object]) -> Stage:
    """Return a stage with the values that it inherited from tables which are set back to what they were."""
    inherited = {}
    for dotted, value in moved.items():
        table, _, name = dotted.partition(".")
        own = getattr(stage, attribute_of(table))
        if own is None or getattr(own, name) is None:
            inherited[dotted] = value
    return _set(stage, inherited)


def _set(stage: Stage, values: dict[str, object]) -> Stage:
    """Return a copy of a stage with these values, by their names or dotted ones. None leaves one as it is."""
    tables = stage.model_dump(by_alias=True)
    flat = {name for section in FLAT_TABLES.values() for name in overridable(section)} | {"epochs", "start_from"}
    for name, value in values.items():
        table, dot, key = name.partition(".")
        if value is None:
            continue
        if dot:
            tables[table] = {**(tables.get(table) or {}), key: value}
        elif name in flat:
            tables[name] = value
    return Stage.model_validate(tables)


def _text(value: object) -> str:
    return toml_value(value) if isinstance(value, str | int | float | list | tuple) else repr(value)


# of [run]: what says nothing of how a run is trained
NAMES = ("run.dir", "run.title", "run.notes")


def flattened(config: Config) -> dict[str, object]:
    """Return all settings by their dotted names, a stage's by its number: stage.0.lr. Unset ones are left out."""
    found: dict[str, object] = {}

    def add(prefix: str, values: object) -> None:
        if isinstance(values, dict):
            for name, value in values.items():
                add(f"{prefix}.{name}" if prefix else name, value)
        elif prefix == "stage" and isinstance(values, list):
            for number, stage in enumerate(values):
                add(f"stage.{number}", stage)
        elif values is not None and prefix not in NAMES:
            found[prefix] = values

    add("", config.model_dump(by_alias=True, mode="json"))
    return found


def _is_inherited(name: str, value: object, before: dict[str, object]) -> bool:
    """Return whether a stage's setting that settings before lacked is the one that the stage had anyway."""
    _, number, own = name.split(".", 2)
    if own == "start_from":
        return value == "last"
    # a run without stages is a single one
    is_new = f"stage.{number}.epochs" not in before and number != "0"
    table = next((table for table, names in STAGED.items() if own in names), "")
    dotted = f"{table}.{own}" if table else own
    return not is_new and own != "epochs" and value == before.get(dotted)


def changes_between(before: dict[str, object], now: dict[str, object]) -> list[str]:
    """Return in words how settings differ, those of `flattened`. A record may be an older version's or somebody's."""
    changes = []
    for name in dict.fromkeys((*before, *now)):
        one, other = before.get(name), now.get(name)
        if one == other or (
            name not in before and (not name.startswith("stage.") or _is_inherited(name, other, before))
        ):
            # an older version did not have it, or the stage had it by default
            continue
        changes.append(
            f"{name} {_text(other) if name in now else 'unset'} instead of {_text(one)[:200]}"
            if name in before
            else f"{name} {_text(other)}"
        )
    return changes
