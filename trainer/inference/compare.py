"""RUN/compare: the same prompts drawn from the same noise with the base and with checkpoints of a run.

Beside the pictures lie the real photographs that have the prompts as their captions, the record that the report and
evaluation read (trainer/report/comparison.py), contact sheets and a page.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from PIL import Image

from safelight.data.atomic import atomic_write_text
from safelight.data.buckets import Bucket, crop_box
from safelight.data.cache import decode_photo
from safelight.data.images import RejectedImage, decode
from safelight.data.samples import PIXELS_VERSION
from safelight.errors import UserError
from safelight.text import storable
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.distributed.together import together
from safelight.trainer.inference.compare_page import write_comparison_page
from safelight.trainer.inference.compared_prompts import Prompt
from safelight.trainer.inference.contact_sheet import SheetRow, write_sheets
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.gallery import PAGE_NAME, file_name, read_key, save_png
from safelight.trainer.inference.pictures import (
    Progress,
    Request,
    Say,
    Weights,
    draw_missing,
    hash_of,
    keys_of,
    sample_key,
    save_picture,
)
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.inference.which_checkpoint import best_step, epoch_of
from safelight.trainer.report.comparison import (
    MAX_MODELS,
    MAX_ROWS,
    MAX_TEXT,
    ComparedModel,
    ComparedRow,
    Comparison,
)
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.run_log.doubts import doubt_about
from safelight.untrusted import UnsafeFile, check_kinds, read_bytes

FOLDER, RECORD_NAME, SHEET = "compare", "index.json", "contact-sheet"
BASE = "base"
MAX_FILE_BYTES = 2**26
# what a comparison's files are called, also by earlier versions
_PICTURE_NAME = re.compile(r"(?:base|trained|photo|step[0-9]+)(?:-seed[0-9]+)?-([0-9]{3,})(?:-.*)?\.png")
_SHEET_NAME = re.compile(rf"{SHEET}(-[0-9]+)?\.png")


def compare(
    run: OpenRun,
    steps: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    num_seeds: int = 1,
    sampled: Collection[int] = (),
    progress: Progress | None = None,
    say: Say | None = None,
) -> Comparison:
    """Draw the prompts with the base and with the checkpoints of these steps into RUN/compare and return the record.

    All pictures of a row start from the same noise, keyed by its seed and the prompt's place; the seeds are the run's
    and those that follow. Pictures that are there with the same weights, prompt, noise and settings are kept. Several
    processes draw together, and the main one writes the rest.

    sampled: the steps, 0 for the base, whose pictures in RUN/samples are of these weights; what is among them is not
    drawn again. progress, say: as for `draw_missing`. Raises UserError as `draw_missing`, for a damaged checkpoint and
    for more rows or columns than a comparison has.
    """
    if len(prompts) * num_seeds > MAX_ROWS or num_seeds < 1:
        most = max(1, MAX_ROWS // len(prompts))
        raise UserError(f"--seeds {num_seeds} is not from 1 to {most}, with {len(prompts)} prompts; use 1")
    if len(steps) >= MAX_MODELS:
        raise UserError(f"{len(steps)} checkpoints are more than the {MAX_MODELS - 1} that fit; name some of them")
    run.check_writable(FOLDER)
    for step in steps if say is not None else ():
        if doubt := doubt_about(run.run_dir, step):
            say(f"note: {doubt}")
    if say is not None and run.base_doubt:
        say(f"note: {run.base_doubt}")
    settings, negative = settings_of(run.config), run.config.sample.negative_prompt
    run.say_unnamed([*(prompt.text for prompt in prompts), negative], say)
    cuts = run.say_cuts([prompt.text for prompt in prompts], negative, say)
    folder = run.run_dir / FOLDER
    check_kinds(run.run_dir, (), ("report.html",), "the run")
    check_kinds(folder, (), [RECORD_NAME, PAGE_NAME, *(path.name for path in folder.glob("*.png"))], "the run")
    models = _models(run, steps)
    labels = _labels(run.run_dir, models)
    seeds = [(settings.seed + number) % 2**64 for number in range(num_seeds)]
    rows = [
        _row(place, prompt, seed, "" if seed == settings.seed else f"-seed{seed}", models, cuts)
        for place, prompt in enumerate(prompts)
        for seed in seeds
    ]
    weights, clip_skip = {model.id: Weights(model.step or None) for model in models}, run.config.model.clip_skip
    requests = {
        file: Request(
            weights[model], prompts[row.place].text, row.place, settings.with_seed(row.seed), negative, clip_skip
        )
        for row in rows
        for model, file in row.images.items()
    }
    photos: dict[int, str] = {}
    with together(run.world):
        if run.world.is_main:
            photos = _write_photos(run, prompts, folder, settings.width, settings.height, say)
            _take_samples(run, requests, folder, sampled)
    photos = dict(run.world.from_main(list(photos.items())))
    rows = [row.model_copy(update={"photo": photos.get(row.place, "")}) for row in rows]
    draw_missing(run, requests, folder, progress=progress, say=say)
    comparison = Comparison(
        models=tuple(models),
        rows=tuple(rows),
        width=settings.width,
        height=settings.height,
        num_steps=settings.steps,
        cfg=settings.cfg,
        sampler=settings.sampler,
        negative_prompt=storable(negative)[:MAX_TEXT],
    )
    with together(run.world):
        if run.world.is_main:
            _write_record(run, comparison, labels, prompts, {*requests, *photos.values()})
    return comparison


def _write_record(
    run: OpenRun,
    comparison: Comparison,
    labels: Mapping[str, str],
    prompts: Sequence[Prompt],
    pictures: Collection[str],
) -> None:
    """Write a comparison's record, contact sheets and page, and delete pictures that it replaces.

    pictures: the names of its own.
    """
    folder = run.run_dir / FOLDER
    atomic_write_text(folder / RECORD_NAME, comparison.model_dump_json(indent=1))
    sheets = _write_sheets(folder, comparison, labels)
    _remove_stale(folder, prompts, {*pictures, *sheets})
    write_comparison_page(folder, f"{run.name}: base and trained", comparison, labels, sheets)


def _models(run: OpenRun, steps: Sequence[int]) -> list[ComparedModel]:
    """Return the records of the base and of checkpoints, ascending."""
    models = [ComparedModel(id=BASE, step=0, epoch=0.0)]
    for step in sorted(set(steps)):
        hashes = run.recorded_hashes(step)
        epoch = epoch_of(run.run_dir, step)
        models.append(
            ComparedModel(id=f"step-{step}", step=step, epoch=epoch, weights=str(hashes.get(run.weights_file, ""))[:64])
        )
    return models


def _row(
    place: int, prompt: Prompt, seed: int, seed_name: str, models: Sequence[ComparedModel], cuts: Mapping[str, str]
) -> ComparedRow:
    """Return the record of a row, without its photograph. seed_name: the seed in file names, '' for the run's.

    cuts: as of `OpenRun.say_cuts`.
    """
    stems = {model.id: BASE if model.id == BASE else f"step{model.step}" for model in models}
    return ComparedRow(
        prompt=prompt.text[:MAX_TEXT],
        place=place,
        seed=seed,
        held_out=prompt.held_out,
        cut_after=cuts.get(prompt.text, ""),
        images={model: file_name(f"{stem}{seed_name}", place, prompt.text) for model, stem in stems.items()},
    )


def _write_photos(
    run: OpenRun, prompts: Sequence[Prompt], folder: Path, width: int, height: int, say: Say | None
) -> dict[int, str]:
    """Write the prompts' photographs, cropped and resized as in training, and return their names by the prompt's place.

    say: called with a line about photographs that cannot be read.
    """
    names, errors = {}, []
    for place, prompt in enumerate(prompts):
        if prompt.photo is None:
            continue
        photo, name = prompt.photo, file_name("photo", place, prompt.text)
        key = hash_of({"version": PIXELS_VERSION, "photo": photo.sha256, "size": [width, height]})
        if read_key(folder / name) != key:
            try:
                image = decode_photo(Path(run.config.data.path), photo)
            except (UserError, OSError) as error:
                errors.append(str(error))
                continue
            box = crop_box(*image.size, Bucket(width, height), None, 0)
            save_png(image.resize((width, height), Image.Resampling.LANCZOS, box=box), folder / name, "", key)
        names[place] = name
    if errors and say is not None:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        say(f"note: no photograph beside a picture: {errors[0]}{more}")
    return names


def _take_samples(run: OpenRun, requests: Mapping[str, Request], folder: Path, sampled: Collection[int]) -> None:
    """Copy the requested pictures that training sampled with the same settings and noise. sampled: as for `compare`."""
    wanted = {name: request for name, request in requests.items() if (request.weights.step or 0) in sampled}
    for (name, request), key in zip(wanted.items(), keys_of(run, list(wanted.values())), strict=True):
        step = request.weights.step or 0
        sample = run.run_dir / "samples" / f"step-{step:08d}" / file_name(f"step{step}", request.place, request.prompt)
        # of a word that the run trains the vectors are the checkpoint's
        files = {own.name for own in run.embeddings}
        named = run.named_embeddings(request.weights.step, request.prompt, request.negative)
        named = {name: found for name, found in named.items() if name in files}
        if read_key(folder / name) == key or read_key(sample) != sample_key(request, named):
            continue
        try:
            image = decode(read_bytes(sample, MAX_FILE_BYTES)).image
        except (RejectedImage, UnsafeFile, OSError):
            continue
        save_picture(run, image, folder / name, request, key)


def _labels(run_dir: Path, models: Sequence[ComparedModel]) -> dict[str, str]:
    """Return the label of each model, in two lines: its epoch, and its step."""
    best = best_step(run_dir) if list_checkpoints(run_dir) else None
    labels = {BASE: "base"}
    for model in models:
        if model.id != BASE:
            mark = ", best" if model.step == best else ""
            labels[model.id] = f"epoch {format_epoch(model.epoch)}{mark}\nstep {model.step:,}"
    return labels


def _write_sheets(folder: Path, comparison: Comparison, labels: Mapping[str, str]) -> list[str]:
    """Write the contact sheets of all rows and return their names."""
    has_photos, has_seeds = (any(row.photo for row in comparison.rows), len({row.seed for row in comparison.rows}) > 1)
    rows = []
    for row in comparison.rows:
        files = [row.images[model.id] for model in comparison.models] + [row.photo] * has_photos
        label = f"{row.place + 1}. {row.prompt}" + f" (seed {row.seed})" * has_seeds
        rows.append(SheetRow(label, tuple(folder / file if file else None for file in files)))
    columns = [labels[model.id] for model in comparison.models] + ["photograph"] * has_photos
    return write_sheets(folder, SHEET, columns, rows, (comparison.width, comparison.height))


def _remove_stale(folder: Path, prompts: Sequence[Prompt], kept: Collection[str]) -> None:
    """Delete pictures of earlier versions and of prompts that others have replaced, and earlier contact sheets.

    Pictures of further prompts, seeds and checkpoints stay: evaluation may have drawn them, and needs them again.
    """
    for path in folder.glob("*.png"):
        if path.name in kept:
            continue
        if match := _PICTURE_NAME.fullmatch(path.name):
            # not int(), which refuses very long numbers
            place = next((place for place in range(len(prompts)) if f"{place:03d}" == match[1]), None)
            end = None if place is None else file_name("", place, prompts[place].text)
            if not read_key(path) or (end is not None and not path.name.endswith(end)):
                path.unlink()
        elif _SHEET_NAME.fullmatch(path.name):
            path.unlink()
