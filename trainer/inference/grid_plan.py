"""Which pictures a grid has: every combination of its axes' values, each as a request to the drawing engine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from pydantic import ValidationError

from safelight.errors import UserError
from safelight.text import shortened, storable
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import COMMAND_LINE, explain
from safelight.trainer.inference.axes import Axis, Value
from safelight.trainer.inference.compared_prompts import sampled_prompts
from safelight.trainer.inference.draw import OpenRun, check_lora_scale
from safelight.trainer.inference.pictures import Request, Say, Weights
from safelight.trainer.inference.sampling import check_spacing, settings_of
from safelight.trainer.inference.which_checkpoint import best_step, epoch_of, pick_step
from safelight.trainer.models.embeddings import pattern_of
from safelight.trainer.registry.samplers import title_of
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.report.grid_record import MAX_CELLS, GridAxis

MAX_LABEL_CHARS, MAX_PROMPT_CHARS = 300, 10_000
# (table, setting) of the config, by the name of an axis or of an option
SETTINGS = {
    "cfg": ("sample", "cfg"),
    "steps": ("sample", "steps"),
    "sampler": ("sample", "sampler"),
    "spacing": ("sample", "spacing"),
    "negative-prompt": ("sample", "negative_prompt"),
    "width": ("sample", "width"),
    "height": ("sample", "height"),
    "seed": ("run", "seed"),
    "clip-skip": ("model", "clip_skip"),
}
# axes of embeddings, with the prompt that each changes; and the value that stands for no embedding
EMBEDDING_AXES = {"embedding": "prompt", "negative-embedding": "negative-prompt"}
NONE = "none"
# axes that change the prompt
PROMPT_AXES = {"prompt", "replace", "embedding"}
# the step of a checkpoint, None for the base
Point = dict[str, Value | None]


@dataclass(frozen=True)
class Cell:
    """A picture of a grid. place: of its values on x, y and z, 0 on an axis that the grid lacks."""

    place: tuple[int, int, int]
    request: Request


@dataclass(frozen=True)
class GridPlan:
    """What to draw. axes: x, y and z, those that there are. cells: by z, then y, then x.

    prompt: of every picture, '' if it differs. fixed: the other settings (name, value), of every picture.
    """

    axes: tuple[GridAxis, ...]
    cells: tuple[Cell, ...]
    prompt: str
    fixed: tuple[tuple[str, str], ...]


def plan_grid(
    run: OpenRun,
    axes: Mapping[str, Axis],
    *,
    prompts: Sequence[str] = (),
    checkpoint: str = "last",
    changes: Mapping[str, Value] | None = None,
    max_cells: int = MAX_CELLS,
    say: Say | None = None,
) -> GridPlan:
    """Return the plan of a grid whose pictures differ in nothing but the settings on its axes.

    axes: as `parse_axes` returns them. prompts: the prompt, or the values of the axis `prompt` if it has none; by
    default what the run samples. checkpoint, changes: settings that are on no axis, in place of the run's.
    Raises UserError for a checkpoint that does not exist, a value out of bounds, or more cells than max_cells.
    """
    config = _changed(run.config, changes or {}, COMMAND_LINE)
    found = {f"--{option}": _resolved(run, axis, prompts, f"--{option}", say) for option, axis in axes.items()}
    names = [axis.name for axis in found.values()]
    _check_number(found, max_cells)
    for option, axis in found.items():
        for value in axis.values if axis.name in SETTINGS else ():
            _changed(config, {axis.name: value}, f"{option} {axis.name}")
    start: Point = {name: getattr(getattr(config, table), key) for name, (table, key) in SETTINGS.items()}
    # a run may sample with several, of which its comparisons take the first
    start["cfg"] = config.sample.cfgs[0]
    start["checkpoint"] = None if "checkpoint" in names else pick_step(run.run_dir, checkpoint)
    start["prompt"] = "" if "prompt" in names else _only_prompt(run, prompts, say)
    start["ema"], start["lora-scale"] = True, 1.0
    cells = []
    for backwards in product(*(range(len(axis.values)) for axis in reversed(found.values()))):
        place = backwards[::-1]
        chosen = [(axis, axis.values[number]) for axis, number in zip(found.values(), place, strict=True)]
        cells.append(Cell((*place, 0, 0)[:3], _request(config, start, chosen)))
    _check_values(run, found, [cell.request for cell in cells])
    run.say_unnamed([text for cell in cells for text in (cell.request.prompt, cell.request.negative)], say)
    return GridPlan(
        axes=tuple(
            GridAxis(name=axis.name, labels=tuple(_label(run, axis.name, value) for value in axis.values))
            for axis in found.values()
        ),
        cells=tuple(cells),
        prompt=""
        if {"prompt", "replace", "embedding"} & set(names)
        else shortened(str(start["prompt"]), MAX_PROMPT_CHARS),
        fixed=_fixed(run, config, start, names),
    )


def _changed(config: Config, values: Mapping[str, Value], source: str) -> Config:
    """Return a config with other settings, by their names in SETTINGS. source: where they come from, in messages."""
    changed = config.model_copy(deep=True)
    for name, value in values.items():
        table, key = SETTINGS[name]
        try:
            setattr(getattr(changed, table), key, storable(value) if isinstance(value, str) else value)
        except ValidationError as error:
            raise UserError(*explain(error, source)) from None
    return changed


def _resolved(run: OpenRun, axis: Axis, prompts: Sequence[str], option: str, say: Say | None) -> Axis:
    """Return an axis whose checkpoints are steps, and whose prompts are there."""
    if axis.name == "checkpoint":
        words: dict[int | None, list[str]] = {}
        for word in map(str, axis.values):
            for step in _steps_of(run, word):
                words.setdefault(step, []).append(word)
        for step, same in words.items():
            if len(same) > 1 and "all" not in same and say is not None:
                say(f"note: {' and '.join(same)} are one checkpoint, of step {step:,}")
        return Axis(axis.name, tuple(words))
    if axis.name in EMBEDDING_AXES:
        known = {own.name.lower(): own.name for own in run.encoder.embeddings}
        if unknown := [value for value in axis.values if str(value).lower() not in (*known, NONE)]:
            have = f"it has {', '.join(known.values())}" if known else "it has none"
            raise UserError(
                f"{option} {axis.name}: {unknown[0]!r} is no embedding of this run: {have}; give its file with "
                f"--embedding FILE, or {NONE}"
            )
        return Axis(axis.name, tuple(known.get(str(value).lower(), NONE) for value in axis.values))
    if axis.name != "prompt":
        return axis
    if axis.values and prompts:
        raise UserError(f"{option} prompt has values, and --prompt has others; give one of them")
    values = axis.values or tuple(map(storable, prompts)) or tuple(prompt.text for prompt in sampled_prompts(run))
    if not values:
        raise UserError(f'{option} prompt has no values; give --prompt "..." "..."')
    return Axis(axis.name, tuple(dict.fromkeys(values)))


def _steps_of(run: OpenRun, word: str) -> list[int | None]:
    """Return the steps of the checkpoints that a word names, None for the base."""
    if word != "all":
        return [pick_step(run.run_dir, word)]
    # which raises UserError where there are none
    pick_step(run.run_dir, "last")
    return [*list_checkpoints(run.run_dir)]


def _check_number(axes: Mapping[str, Axis], max_cells: int) -> None:
    num, limit = math.prod(len(axis.values) for axis in axes.values()), min(max_cells, MAX_CELLS)
    if num > limit:
        sizes = " x ".join(str(len(axis.values)) for axis in axes.values())
        more = f", or --max-cells {num}" if num <= MAX_CELLS else ""
        raise UserError(f"{sizes} = {num:,} cells are more than {limit:,}; give fewer values{more}")


def _only_prompt(run: OpenRun, prompts: Sequence[str], say: Say | None) -> str:
    if len(prompts) > 1:
        raise UserError(f"--prompt has {len(prompts)} prompts and no axis is for them; add --y prompt, or give one")
    if prompts:
        return storable(prompts[0])
    found = sampled_prompts(run)
    if not found:
        raise UserError('the run samples no prompt; give --prompt "..."')
    if say is not None:
        say(f"prompt: {found[0].text} (the first that the run samples; --prompt gives another)")
    return found[0].text


def _request(config: Config, start: Point, chosen: Sequence[tuple[Axis, Value]]) -> Request:
    """Return the picture of a combination of values."""
    point = start | {axis.name: value for axis, value in chosen}
    prompt, negative = str(point["prompt"]), str(point["negative-prompt"])
    for axis, value in chosen:
        if EMBEDDING_AXES.get(axis.name) == "prompt":
            prompt = _with_embedding(prompt, axis, str(value))
        elif axis.name in EMBEDDING_AXES:
            negative = _with_embedding(negative, axis, str(value))
        elif axis.name == "replace":
            prompt, negative = (text.replace(str(axis.values[0]), str(value)) for text in (prompt, negative))
    settings = replace(
        settings_of(config), **{name: point[name] for name in ("steps", "cfg", "seed", "sampler", "spacing")}
    )
    return Request(
        Weights(point["checkpoint"], bool(point["ema"]), float(point["lora-scale"])),
        prompt,
        # one place for all, and so the same noise for the same seed
        place=0,
        settings=settings,
        # which is not read without guidance: such pictures are equal, and drawn once
        negative="" if settings.cfg == 1 else negative,
        clip_skip=point["clip-skip"],
    )


def _with_embedding(text: str, axis: Axis, value: str) -> str:
    """Return a prompt with the embedding of an axis' value: in the place of those of the axis that the prompt names,
    or else at its end."""
    names = [str(name) for name in axis.values if name != NONE]
    pattern = pattern_of(names) if names else None
    if pattern is not None and pattern.search(text):
        replaced = pattern.sub(lambda _: "" if value == NONE else value, text)
        # a comma that stood behind the word, or before it at the end
        return re.sub(r"^[\s,]+|[\s,]+$|,\s*(?=,)", "", replaced) if value == NONE else replaced
    return text if value == NONE else f"{text}, {value}" if text else value


def _check_values(run: OpenRun, axes: Mapping[str, Axis], requests: Sequence[Request]) -> None:
    """Raise UserError for values that make no picture, or change none."""
    for option, axis in axes.items():
        if axis.name == "replace":
            # where the first value stays, it is found if the prompt had it
            texts = dict.fromkeys(text for one in requests for text in (one.prompt, one.negative))
            if not any(str(axis.values[0]) in text for text in texts):
                raise UserError(
                    f"{option} replace: {axis.values[0]!r} is not in the prompt {requests[0].prompt!r}; "
                    "give a text that is, or another --prompt"
                )
        elif axis.name == "spacing":
            for value in axis.values:
                check_spacing(str(value), run.schedule.zero_terminal_snr)
        elif axis.name == "lora-scale":
            for scale in axis.values:
                check_lora_scale(run.config, float(scale), f"{option} lora-scale")
        elif axis.name == "ema":
            steps = sorted({one.weights.step for one in requests} - {None})
            lacking = [step for step in steps if not run.has_averages(step)]
            if lacking or not steps:
                which = f"the checkpoint of step {lacking[0]}" if lacking else "the base"
                raise UserError(
                    f"{option} ema: {which} has no moving average of its weights (train.ema_decay makes one); leave "
                    "this axis out"
                )
    possible = run.encoder.most_clip_skip
    if (most := max(one.clip_skip for one in requests)) > possible:
        raise UserError(f"clip-skip {most} leaves none of the layers of the text encoder; use {possible} or less")


def _label(run: OpenRun, name: str, value: Value | None) -> str:
    if name == "checkpoint":
        return _checkpoint_label(run, value)
    if name == "sampler":
        return title_of(str(value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return shortened(str(value), MAX_LABEL_CHARS) or "(empty)"


def _checkpoint_label(run: OpenRun, step: int | None) -> str:
    if step is None:
        return "base"
    best = ", best" if step == best_step(run.run_dir) else ""
    return f"epoch {format_epoch(epoch_of(run.run_dir, step))} (step {step:,}{best})"


def _fixed(run: OpenRun, config: Config, start: Point, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the settings that all pictures share, those worth telling, in the order in which they are told."""
    size = settings_of(config)
    left_out = [*names, "ema", "lora-scale", "width", "height", "prompt"]
    left_out += [name for name in ("negative-prompt", "clip-skip") if not start[name]]
    left_out += ["spacing"] * (start["spacing"] == "trailing")
    order = ("checkpoint", "sampler", "spacing", "steps", "cfg", "seed", "clip-skip", "negative-prompt")
    told = tuple((name, _label(run, name, start[name])) for name in order if name not in left_out)
    told = (*told, ("size", f"{size.width} x {size.height} px"))
    if PROMPT_AXES & set(names) and "prompt" not in names:
        return (("prompt", f"“{shortened(str(start['prompt']), MAX_LABEL_CHARS)}”"), *told)
    return told
