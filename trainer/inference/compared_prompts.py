"""The prompts that a comparison draws, with the photographs that have them as their captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safelight.data.manifest import read_manifest
from safelight.data.photo import Photo
from safelight.data.samples import photo_captions
from safelight.errors import UserError
from safelight.text import counted, storable
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.prompt_file import recorded_prompts
from safelight.trainer.models.encoders import prompt_of_caption
from safelight.untrusted import path_in, read_json_object

MAX_PROMPTS = 1000


@dataclass(frozen=True)
class Prompt:
    """A prompt. photo: the photograph of which it is the first caption, None if it is nobody's.

    held_out: whether that photograph was held out of training.
    """

    text: str
    photo: Photo | None = None
    held_out: bool = False


def compared_prompts(run: OpenRun, num: int, say: Callable[[str], None] | None = None) -> list[Prompt]:
    """Return up to `num` prompts: those of the run, then the captions of held-out photographs.

    say: called with a line if there are fewer, or the dataset is not at hand. Raises UserError if there are none.
    """
    if not 1 <= num <= MAX_PROMPTS:
        raise UserError(f"--num {num} is not from 1 to {MAX_PROMPTS}; use 8")
    own = own_prompts(run)
    prompts = _with_photos(run, own, may_lack_dataset=len(own) >= num, say=say)[:num]
    if say is not None and 0 < len(prompts) < num:
        say(
            f"comparing {counted(len(prompts), 'prompt')} instead of {num}: there are no more prompts and held-out "
            "captions"
        )
    if not prompts:
        raise UserError(
            f"there are no prompts to draw, and no captions of photographs; set sample.prompts in "
            f"{run.run_dir / 'config.toml'}"
        )
    return prompts


def sampled_prompts(run: OpenRun, say: Callable[[str], None] | None = None) -> list[Prompt]:
    """Return the prompts that a run samples while it trains, none if it has no prompts and no captions."""
    own = own_prompts(run)
    num = len(own) or run.config.sample.num_prompts
    return _with_photos(run, own, may_lack_dataset=bool(own), say=say)[:num]


def own_prompts(run: OpenRun) -> list[str]:
    """Return the prompts that a run's settings name, each once; of a prompt file those that the run read last."""
    sample = run.config.sample
    if not sample.prompts_file:
        return list(dict.fromkeys(map(storable, sample.prompts)))
    found = recorded_prompts(run.run_dir, sample.prompts_file)
    return list(dict.fromkeys(prompt.prompt for prompt in found.prompts if not prompt.caption)) if found else []


def held_out_prompts(run: OpenRun) -> list[Prompt]:
    """Return the first caption of every held-out photograph; of training ones if none is held out.

    Raises UserError if the run's list of them is damaged, or its dataset is gone.
    """
    held_out, trained = _captioned(run)
    return held_out or trained


def dataset_of(run: OpenRun, what: str, instead: str = "") -> Path:
    """Return the folder of a run's dataset. Raises UserError if there is none, so that there are no `what`.

    instead: what else helps, behind the advice to set data.path.
    """
    dataset = Path(run.config.data.path)
    if not dataset.is_dir():
        here = "" if dataset.is_absolute() else "run this in the folder where the run was started, or "
        raise UserError(
            f"data.path {str(dataset)!r}, the run's dataset, does not exist, so there are no {what}; {here}set "
            f"data.path in {run.run_dir / 'config.toml'} to where the dataset is now{instead}"
        )
    return dataset


def _with_photos(
    run: OpenRun, own: list[str], may_lack_dataset: bool, say: Callable[[str], None] | None
) -> list[Prompt]:
    """Return the run's own prompts, then the held-out ones, each once and with its photograph if there is one."""
    try:
        held_out, trained = _captioned(run)
    except UserError as error:
        if not may_lack_dataset:
            raise
        held_out, trained = [], []
        if say is not None:
            say(f"note: no photographs beside the pictures: {error}")
    known = {prompt.text: prompt for prompt in (*reversed(trained), *reversed(held_out))}
    prompts = {text: known.get(text, Prompt(text)) for text in own}
    for prompt in held_out or trained:
        prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def _captioned(run: OpenRun) -> tuple[list[Prompt], list[Prompt]]:
    """Return the first captions of the held-out photographs and of those trained on, in the order of split.json."""
    path = run.run_dir / "split.json"
    if not path.is_file():
        return [], []
    try:
        split = read_json_object(path_in(run.run_dir, "split.json"))
        halves = split["validation"], split["train"]
        if not all(isinstance(half, list) and all(isinstance(file, str) for file in half) for half in halves):
            raise ValueError("it lists no names")
    except (ValueError, KeyError) as error:
        config = run.run_dir / "config.toml"
        raise UserError(
            f"{path} is damaged ({error}), so the held-out captions are unknown; set sample.prompts in {config}"
        ) from None
    dataset = dataset_of(run, "captions", ", or set sample.prompts there")
    data, seed = run.config.data, run.config.run.seed
    photos = [photo for photo in read_manifest(dataset) if photo.captions[0] or photo.tags]
    texts = photo_captions(photos, data.tags, seed, suffix=data.caption_suffix, templates=run.config.prompt_templates)
    captions = {photo.file: (photo, own[0]) for photo, own in zip(photos, texts, strict=True)}
    held_out, trained = (
        [
            Prompt(storable(prompt_of_caption(run.config, captions[file][1])), captions[file][0], is_held_out)
            for file in half
            if file in captions
        ]
        for half, is_held_out in zip(halves, (True, False), strict=True)
    )
    return held_out, trained
