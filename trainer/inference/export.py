"""`safelight export`: writes a run's model, its LoRA or its word, as one file or as a folder.

The UNet's weights come from the checkpoint: the moving average if there is one, else the fp32 master if there is one.
So does the text encoder if the run trains it. The frozen parts are the run's. What is written is chosen by the row of
adapter.kind (trainer/registry/adapters.py); here is what all kinds have in common.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safelight.errors import UserError
from safelight.text import storable
from safelight.trainer.adapters.counting import num_saved_values
from safelight.trainer.checkpoint.files import check_files, folder_of, max_bytes_of, noticing_replacement
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import load_config, require_run
from safelight.trainer.families.family import Family
from safelight.trainer.inference.draw import check_lora_scale
from safelight.trainer.inference.export_place import check_not_needed, check_output, locked
from safelight.trainer.inference.export_source import Export, Source
from safelight.trainer.inference.model_card import CARD_NAME, SAMPLES_NAME, CardFacts, write_card
from safelight.trainer.inference.model_export import ModelExport
from safelight.trainer.inference.which_checkpoint import pick_step, with_chosen
from safelight.trainer.models.base import base_of
from safelight.trainer.models.device import DTYPES
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.run_log.doubts import doubt_about
from safelight.untrusted import check_links


@dataclass
class Exported:
    """What was written. notes: what the user of the export should know, a line each. dtype: of the weights.

    next_step: what to do with it, '' if the notes say it. card_files: the model card and its samples, if they are
    beside a single file.
    """

    path: Path
    step: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)
    dtype: str = "fp16"
    next_step: str = ""
    card_files: list[Path] = field(default_factory=list)


def export(
    run_dir: Path,
    out: Path,
    checkpoint: str = "last",
    dtype: str = "",
    title: str = "",
    force: bool = False,
    weights: str = "auto",
    merge: bool = False,
    layout: str = "diffusers",
    lora_scale: float = 1.0,
    card: bool = False,
    before_writing: Callable[[], None] = lambda: None,
) -> Exported:
    """Write a run's model to `out`: one file if the name ends in .safetensors, a diffusers folder otherwise.

    Of a run that trained a word, its vectors alone: a file that A1111, Forge, ComfyUI and diffusers read, or a folder
    with those that diffusers' load_textual_inversion does. Of a run that trained a LoRA, the LoRA's own file, or with
    merge the whole model with it merged.

    checkpoint: last, best or a step. dtype: fp32 | fp16 | bf16, '' for fp16, or fp32 for a word. title: '' for the
    run's name and step.
    force: replace an earlier export. weights: auto (the moving average if there is one), ema or trained. layout: names
    in a LoRA's file, diffusers or kohya. lora_scale: what a LoRA is multiplied by before it is merged. card: write a
    model card beside a single file, too; a folder always has one. before_writing: called when all checks have passed;
    what it raises ends the export.
    Raises UserError if the run cannot be exported or `out` may not be written.
    """
    require_run(run_dir)
    check_links(run_dir)
    config = load_config(run_dir / "config.toml")
    _check_options(config, merge, layout, lora_scale)
    kind = export_of(config, merge)
    is_file = check_output(out, force, kind.folder)
    dtype = dtype or kind.default_dtype
    check_not_needed(out, run_dir, config)
    base = base_of(config.model)
    card_places = _card_places(out) if card and is_file else None
    if card_places is not None and not force:
        for place in card_places:
            if os.path.lexists(place):
                raise UserError(f"{place}, where the model card goes, already exists; add --force")
    max_bytes = max_bytes_of(num_saved_values(config, base))
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)

    def write(step: int) -> tuple[Source, list[str], int]:
        """Write the export of a step's checkpoint; return its source, notes, and the bytes that were written."""
        folder = folder_of(run_dir, step)
        with noticing_replacement(folder):
            check_files(folder, to_resume=False, max_bytes=max_bytes)
            source = Source(config, base, folder, step, schedule, DTYPES[dtype], weights, lora_scale)
            name = storable(title or f"{run_dir.resolve().name} step {step}")
            if is_file:
                notes = kind.write_file(source, out, name, layout)
            else:
                notes = kind.write_folder(source, out, name, partial(_write_card, kind, source, run_dir, out, name, []))
        files = [out] if is_file else [path for path in out.rglob("*") if path.is_file()]
        return source, notes, sum(path.stat().st_size for path in files)

    # before anything is written
    pick_step(run_dir, checkpoint, allow_base=False)
    before_writing()
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out):
        source, notes, num_bytes = with_chosen(lambda: pick_step(run_dir, checkpoint, allow_base=False), write)
    step = source.step
    if doubt := doubt_about(run_dir, step):
        notes.append(doubt)
    if config.train.ema_decay > 0 or OPTIMIZERS[config.optimizer.name].averages_weights:
        averages = "the moving average" if config.train.ema_decay > 0 else f"{config.optimizer.name}'s average"
        which = "the weights of the last step" if weights == "trained" else f"{averages} of the weights"
        notes.append(f"exported {which}")
    if config.text_encoder.train:
        notes.append(f"exported the text encoder as trained{_averaged_or_not(config, weights)}")
    if skip := config.model.clip_skip:
        notes.append(_clip_skip_note(base.family, skip))
    done = Exported(out, step, num_bytes, notes, dtype, kind.next_step(out, layout, notes))
    if card_places is not None:
        name = storable(title or f"{run_dir.resolve().name} step {step}")
        done.card_files = _write_card(kind, source, run_dir, out, name, notes, *card_places)
    return done


def export_of(config: Config, merge: bool) -> Export:
    """Return what is exported of a run. merge: the whole model, also of a run that trained a LoRA."""
    if merge or not config.adapter.spec.exporter:
        return ModelExport()
    module, _, name = config.adapter.spec.exporter.partition(":")
    return getattr(importlib.import_module(module), name)()


def _check_options(config: Config, merge: bool, layout: str, lora_scale: float) -> None:
    """Raise UserError for options of adapters that have no effect on what is exported."""
    if not config.adapter.spec.needs_base and (merge or layout != "diffusers"):
        given = "--merge" if merge else f"--layout {layout}"
        raise UserError(f"this run trained no LoRA, so there is no file of it: leave out {given}")
    if merge and layout != "diffusers":
        raise UserError(f"--layout {layout} is for the LoRA's own file, which --merge does not write; leave one out")
    check_lora_scale(config, lora_scale)
    if lora_scale != 1 and not merge:
        raise UserError(
            f"--lora-scale {lora_scale:g} is for --merge: of the LoRA's own file, the program that draws sets it"
        )


def _card_places(out: Path) -> tuple[Path, Path]:
    """Return (model card, folder of its samples) beside a single file."""
    return out.with_suffix(".md"), out.with_name(f"{out.stem}-samples")


def _write_card(
    kind: Export,
    source: Source,
    run_dir: Path,
    out: Path,
    title: str,
    notes: list[str],
    card: Path,
    samples: Path | None = None,
) -> list[Path]:
    """Write the model card and its samples, and return the files. card: the card, or the folder that it goes into."""
    if samples is None:
        card, samples = card / CARD_NAME, card / SAMPLES_NAME
    elif samples.is_dir():
        # of an earlier export
        for path in samples.glob("[0-9][0-9].png"):
            path.unlink()
    config, is_file = source.config, card.name != CARD_NAME
    dtype = next(name for name, dtype in DTYPES.items() if dtype == source.dtype)
    facts = CardFacts(
        run_dir,
        config,
        source.base,
        source.step,
        title,
        trained=kind.trained(config),
        usage=kind.usage(config, out.name.replace("`", ""), is_file, dtype),
        relation=kind.relation,
        tag=kind.tag,
        notes=tuple(notes),
    )
    names = write_card(facts, card, samples)
    return [card, *(samples.parent / name for name in names)]


def _clip_skip_note(family: Family, clip_skip: int) -> str:
    """Return what to set in other programs. Source: sd_hijack_clip.py and sd_hijack_open_clip.py of A1111."""
    counted = f"Clip skip {family.clip_skip_elsewhere(clip_skip)}"
    webui = f"{counted} in A1111" if family.heeds_clip_skip else f"{counted} in Forge"
    ignored = "" if family.heeds_clip_skip else f"; A1111 ignores it for {family.title} and draws as without"
    return f"trained with clip_skip {clip_skip}: use clip_skip={clip_skip} in diffusers, {webui}{ignored}"


def _averaged_or_not(config: Config, weights: str) -> str:
    is_averaged = config.train.ema_decay > 0 and weights != "trained"
    return "; of its weights there is no moving average" if is_averaged else ""
