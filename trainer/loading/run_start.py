"""Writes the files that describe a run when it starts: settings, environment, model, data and a few examples."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from safelight.data.atomic import atomic_write_bytes, atomic_write_text
from safelight.data.cache import Sample, decode_photo
from safelight.data.manifest import has_manifest, holds_photos
from safelight.data.photo import NO_CREDIT
from safelight.errors import UserError
from safelight.kernels.unet.attention import AttentionChoice
from safelight.text import counted, storable
from safelight.trainer.adapters.trained import Trained
from safelight.trainer.config.schema import Config
from safelight.trainer.config.timeline import Timeline, stage_records
from safelight.trainer.config.toml import to_toml
from safelight.trainer.loading.dataset import NUM_EXAMPLES, Dataset
from safelight.trainer.loading.resolve import ResolvedRun
from safelight.trainer.models.class_photos import SOURCE, has_own_scale
from safelight.trainer.models.placing import once_each
from safelight.trainer.run_log.environment import ATTENTION, describe
from safelight.untrusted import MAX_JSON_BYTES, UnsafeFile, parse_json, read_bytes

EXAMPLE_SIDE_PX = 320
# lines of a rejected.jsonl that are read; the report reads records of 16 MiB
MAX_REJECTED = 100_000
MAX_CREDITS = 10_000
MAX_CAPTION_SOURCES = 100
# of an example
MAX_EXAMPLE_TAGS = 40
NUM_CLASS_EXAMPLES = 4


def check_place(run_dir: Path, dataset: Path) -> None:
    """Raise UserError if a new run would mix its files with a dataset's or with photographs."""
    if (run_dir / "config.toml").is_file():
        return
    what = ""
    if has_manifest(run_dir) or run_dir.resolve().is_relative_to(dataset.resolve()):
        what = "lies in a dataset"
    elif holds_photos(run_dir):
        what = "holds photographs, which `safelight prepare` could not tell from the run's pictures"
    if what:
        raise UserError(f"run.dir {run_dir} {what}; name another --run.dir, for example runs/{run_dir.resolve().name}")


def _write_json(path: Path, value) -> None:
    atomic_write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_start(
    run: ResolvedRun,
    dataset: Dataset,
    timeline: Timeline,
    trained: Trained,
    attention: AttentionChoice,
    notes: list[str],
    records: dict,
) -> str:
    """Write config.toml, environment.json, model.json, data.json, split.json and data_examples/.

    notes: lines for model.json about what was chosen. records: further keys of environment.json. Returns a note about
    what could not be written there, '' if there is none.
    """
    rejected, rejected_note = _read_rejected(dataset.path / "rejected.jsonl")
    run_dir, config, base = run.run_dir, run.user_config, run.base
    atomic_write_text(run_dir / "config.toml", to_toml(config))
    _write_json(
        run_dir / "environment.json",
        {**describe(run.device), "attention": str(attention), ATTENTION: attention.to_dict(), **records},
    )
    own_text = f"CLIP tokenizer {Path(config.model.tokenizer).name}" if config.model.tokenizer else "the base's"
    untrained = "untrained (random weights), " if base.from_scratch else ""
    _write_json(
        run_dir / "model.json",
        {
            "base": config.model.base,
            "family": base.family.title,
            "from_scratch": base.from_scratch,
            "unet_parameters": sum(p.numel() for name, p in trained.unet.named_parameters() if ".adapter." not in name),
            "trained_parameters": sum(p.numel() for p in trained.module.parameters() if p.requires_grad),
            "vae": Path(config.model.vae).name if config.model.vae else "the base's",
            "text_encoder": f"{own_text}, {untrained}{_text_training(config)}",
            "prediction_type": run.schedule.prediction_type,
            "precision": run.precision,
            "notes": [*notes, *filter(None, [dataset.vae_note])],
        },
    )
    split = {
        half: list(dict.fromkeys(s.photo.file for s in samples))
        for half, samples in (("train", dataset.trained_photos), ("validation", dataset.validation))
    }
    _write_json(run_dir / "split.json", {"seed": config.run.seed, "fraction": config.data.validation_fraction, **split})
    _write_json(
        run_dir / "data.json",
        {
            "dataset": dataset.path.name,
            "num_photos": len(dataset.trained_photos) + len(dataset.validation),
            "num_train": len(dataset.trained_photos),
            "num_validation": len(dataset.validation),
            "num_captions": dataset.num_captions,
            "num_tagged": dataset.num_tagged,
            "num_cut_captions": dataset.num_cut_captions,
            "length_note": dataset.length_note,
            "caption_sources": _caption_sources(dataset),
            "num_masks": sum(bool(s.mask_keys) for s in once_each(dataset.train)),
            "num_loss_scales": sum(has_own_scale(s.photo) for s in dataset.trained_photos),
            "num_class_images": len(dataset.class_images),
            "num_drawn_class_images": sum(s.photo.source == SOURCE for s in dataset.class_images),
            "variants": config.data.variants,
            "buckets": dataset.counts(),
            "stages": stage_records(timeline),
            "examples": _write_examples(run_dir, dataset.path, dataset.trained_photos, NUM_EXAMPLES),
            "class_examples": _write_examples(
                run_dir, dataset.path, dataset.class_images, NUM_CLASS_EXAMPLES, "class_"
            ),
            "credits": credits_of(dataset),
            "rejected": [*rejected, *_left_out(dataset, config)],
        },
    )
    return rejected_note


def _text_training(config: Config) -> str:
    """Return what becomes of the text encoder in a run."""
    text, num_epochs = config.text_encoder, sum(stage.epochs for stage in config.stages())
    if not text.train:
        return "frozen"
    layers = "trained"
    if text.last_layers:
        layers = f"trained, its last {counted(text.last_layers, 'layer')} and its final norm"
    last = text.trained_epochs(num_epochs)
    return f"{layers}, stopped after epoch {last}" if last < num_epochs else layers


def _caption_sources(dataset: Dataset) -> list[dict]:
    """Return what the captions were read from, or who wrote them, and of how many photographs: the most first."""
    photos = [sample.photo for sample in once_each(dataset.samples)]
    counts = Counter((photo.captioner, photo.caption_source) for photo in photos)
    return [
        {"source": source, "captioner": captioner, "num": num}
        for (captioner, source), num in counts.most_common(MAX_CAPTION_SOURCES)
    ]


def _left_out(dataset: Dataset, config: Config) -> list[dict]:
    """Return the photographs that are too small, as rows like those of a rejected.jsonl."""
    return [
        {
            "path": photo.source,
            "reason": f"{photo.width} x {photo.height} px is too small for data.resolution "
            f"{min(config.data.resolutions)} with data.upscale {config.data.upscale}",
        }
        for photo in dataset.placed.too_small
    ]


def credits_of(dataset: Dataset) -> list[dict]:
    """Return who took the photos that say so, in the order of the files; the manifest has those beyond MAX_CREDITS."""
    photos = [sample.photo for sample in once_each(dataset.samples)]
    credited = sorted((photo for photo in photos if photo.credit != NO_CREDIT), key=lambda photo: photo.file)
    return [asdict(photo.credit) for photo in credited[:MAX_CREDITS]]


def _read_rejected(path: Path) -> tuple[list[dict], str]:
    """Return the valid rows of a rejected.jsonl, and a note if some or all of it is not shown, '' otherwise.

    Damaged lines are dropped, and no file of whatever kind ends the run, because the rows are only displayed.
    """
    if not os.path.lexists(path):
        return [], ""
    try:
        content = read_bytes(path, MAX_JSON_BYTES)
    except (OSError, UnsafeFile) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        return [], f"the report lists no rejected files: {path} cannot be read ({what}); `safelight prepare` writes it"
    rows = []
    for number, line in enumerate(re.finditer(rb"[^\n]+", content)):
        if number == MAX_REJECTED:
            return rows, f"the report lists the rejected files of the first {MAX_REJECTED:,} lines of {path}"
        try:
            row = parse_json(line[0])
            rows.append({name: storable(str(row[name])) for name in ("path", "reason")})
        except (ValueError, KeyError, TypeError):
            continue
    return rows, ""


def _write_examples(run_dir: Path, dataset: Path, samples: Sequence[Sample], num: int, before: str = "") -> list[dict]:
    """Write small pictures of some samples and return their rows. before: what their files' names begin with."""
    folder = run_dir / "data_examples"
    folder.mkdir(parents=True, exist_ok=True)
    every = max(1, len(samples) // num)
    rows = []
    for index, sample in enumerate(samples[::every][:num]):
        name = f"{before}{index:03d}.jpg"
        small, content = decode_photo(dataset, sample.photo), io.BytesIO()
        small.thumbnail((EXAMPLE_SIDE_PX, EXAMPLE_SIDE_PX), Image.Resampling.LANCZOS)
        small.save(content, "JPEG", quality=88)
        atomic_write_bytes(folder / name, content.getvalue(), sync=False)
        rows.append(
            {
                "file": f"data_examples/{name}",
                "caption": sample.captions[0],
                "tags": [{"name": tag.name, "weight": tag.weight} for tag in sample.photo.tags[:MAX_EXAMPLE_TAGS]],
                "width": sample.photo.width,
                "height": sample.photo.height,
            }
        )
    return rows
