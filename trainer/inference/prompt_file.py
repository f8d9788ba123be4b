"""The prompts that a run samples, each with settings of its own, as files write them: .txt, .json and .toml.

Besides a form of ours, EveryDream2's and kohya's sd-scripts' prompt files are read as their users have them. A file may
come from anybody, so its size, the number of pictures and every value are bounded, and unknown names are refused.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from safelight.errors import UserError
from safelight.text import storable
from safelight.trainer.config.schema import Config, SamplerName, SampleSteps, Section, Side, check_cfg
from safelight.trainer.inference.pictures import Request, Weights
from safelight.trainer.inference.prompt_words import tag_note
from safelight.trainer.inference.sampling import check_size, check_spacing, settings_of
from safelight.trainer.registry.samplers import sampler_named
from safelight.untrusted import UnsafeFile, kind_of, parse_json, parse_toml, path_in, read_bytes, read_json_object

MAX_BYTES = 2**20
# of one sampling, over all prompts and guidance scales
MAX_PICTURES = 512
MAX_PROMPT_CHARS = 20_000
# bad lines or prompts of a file that a message names
MAX_SHOWN = 5
# in the run folder: the prompts that were read last without an error
RECORD_NAME = "prompts.json"


class SamplePrompt(Section):
    """A prompt to sample. What is None is as the run's [sample] table says.

    seed: of its own, which then alone keys its noise, wherever the prompt stands. caption: whether the prompt is a
    caption of the dataset, the next one of those that runs without prompts sample.
    """

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    negative_prompt: Annotated[str | None, Field(max_length=MAX_PROMPT_CHARS)] = None
    seed: Annotated[int | None, Field(ge=0, lt=1 << 64)] = None
    cfg: Annotated[float | list[float] | None, BeforeValidator(lambda v: v if v is None else check_cfg(v))] = None
    steps: SampleSteps | None = None
    width: Side | None = None
    height: Side | None = None
    sampler: SamplerName | None = None
    caption: bool = False

    @property
    def cfgs(self) -> tuple[float, ...] | None:
        return None if self.cfg is None else tuple(self.cfg) if isinstance(self.cfg, list) else (self.cfg,)


@dataclass(frozen=True)
class PromptFile:
    """What a file says. sha256: of its bytes. notes: a line for each thing in it that has no effect."""

    prompts: tuple[SamplePrompt, ...]
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampledPicture:
    """A picture that a run samples. number: of its prompt. is_first: whether it is the first of its prompt."""

    number: int
    request: Request
    is_first: bool = True

    @property
    def stem(self) -> str:
        """The end of the first part of its file's name: '' or -cfg9, which tells it from others of its prompt."""
        return "" if self.is_first else f"-cfg{self.request.settings.cfg:g}"


def read_prompt_file(path: Path, side: int) -> PromptFile:
    """Return the prompts of a file. side: data.resolution, which aspect ratios refer to, px.

    Raises UserError, naming the file and the place in it.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"sample.prompts_file {path} is not a .txt, .json or .toml file; name one that is")
    try:
        content = read_bytes(path, MAX_BYTES)
        rows = _READERS[suffix](content, side)
        prompts = _all_checked(rows.rows)
    except OSError as error:
        raise UserError(f"sample.prompts_file {path}: {error.strerror}; check the path") from None
    except UnsafeFile as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not prompts:
        raise UserError(f"{path} has no prompt; write one a line")
    notes = [f"{path}: {note}" for note in rows.notes]
    texts = (text for one in prompts for text in (one.prompt, one.negative_prompt) if text)
    notes += [note for note in [tag_note(texts, str(path))] if note]
    return PromptFile(tuple(prompts), hashlib.sha256(content).hexdigest(), tuple(notes))


def _all_checked(rows: Sequence[tuple[str, dict[str, Any] | UserError]]) -> list[SamplePrompt]:
    """Return the prompts of rows. Raises UserError, a single line, with what is wrong in the first MAX_SHOWN bad ones.

    Whoever mends a file wants to mend it once.
    """
    prompts, problems = [], []
    for place, row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            prompts.append(_checked(place, row))
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - MAX_SHOWN
        raise UserError("; ".join([*problems[:MAX_SHOWN], *([f"and {more} more such mistakes"] * (more > 0))]))
    return prompts


def _checked(place: str, row: Mapping[str, Any]) -> SamplePrompt:
    try:
        prompt = SamplePrompt(**row)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        value = repr(first.get("input"))[:80]
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {name} = {value}: {message[:1].lower()}{message[1:]}") from None
    if "\n" in prompt.prompt.strip():
        prompt.prompt = " ".join(prompt.prompt.split())
    prompt.prompt = storable(prompt.prompt)
    return prompt


@dataclass
class _Rows:
    """Prompts as read: (place in the file for messages, values, or what is wrong). notes: what is not heeded."""

    rows: list[tuple[str, dict[str, Any] | UserError]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, place: str, read: Callable[[], dict[str, Any]]) -> None:
        """Add a prompt that `read` returns, or what it raises."""
        try:
            self.rows.append((place, read()))
        except UserError as error:
            self.rows.append((place, error))


# text: a prompt a line, as EveryDream2 and kohya write it

# kohya's options after a prompt; others of its models are refused
_OPTIONS = {"n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "l": "cfg", "s": "steps", "ss": "sampler"}
_OPTION = re.compile(r"\s--([A-Za-z]{1,4})(?=\s)")


def _read_txt(content: bytes, side: int) -> _Rows:
    found = _Rows()
    for number, line in enumerate(_text(content).splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            place = f"line {number}"
            found.add(place, partial(_line, place, line))
    return found


def _line(place: str, line: str) -> dict[str, Any]:
    """Return the values of a line such as: a barn --n blurry --w 512 --h 768 --d 1 --l 7.5 --s 30."""
    prompt, *parts = _OPTION.split(f" {line}")
    row: dict[str, Any] = {"prompt": prompt.strip()}
    for option, value in zip(parts[::2], parts[1::2], strict=True):
        name = _OPTIONS.get(option.lower())
        if name is None:
            known = ", ".join(f"--{known}" for known in _OPTIONS)
            raise UserError(f"{place}: --{option} is not an option; use {known}")
        row[name] = _value_of(place, name, value.strip())
    return row


def _value_of(place: str, name: str, text: str) -> Any:
    if name == "negative_prompt":
        return text
    if name == "sampler":
        return _sampler(place, text)
    numbers = [number for number in re.split(r"[\s,]+", text) if number] if name == "cfg" else [text]
    if not numbers or not all(re.fullmatch(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?", number) for number in numbers):
        raise UserError(f"{place}: {name} {text[:60]!r} is not a number")
    if name == "cfg":
        return [float(number) for number in numbers]
    return _seed(int(text)) if name == "seed" and "." not in text else text


def _seed(value: Any) -> Any:
    """Return a seed. For -1, which means a random one in EveryDream, the run's, so that pictures can be compared."""
    return None if type(value) is int and value == -1 else value


def _sampler(place: str, value: Any) -> str:
    try:
        return sampler_named(str(value))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


# JSON and TOML

# our names, and what others call them
_NAMES = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "negative": "negative_prompt",
    "seed": "seed",
    "cfg": "cfg",
    "cfgs": "cfg",
    "scale": "cfg",
    "steps": "steps",
    "sample_steps": "steps",
    "num_inference_steps": "steps",
    "width": "width",
    "height": "height",
    "sampler": "sampler",
    "sample_sampler": "sampler",
    "scheduler": "sampler",
    "caption": "caption",
    "random_caption": "caption",
}
_SIZES = ("size", "aspect_ratio", "resolution")
# settings of EveryDream2 that a run has elsewhere
_ELSEWHERE = {
    "batch_size": "the plan decides how many are drawn at a time",
    "show_progress_bars": "the terminal always shows one",
    "generate_pretrain_samples": "a run always samples its base",
    "generate_samples_every_n_steps": "sample.every_epochs says how often",
}


def _read_json(content: bytes, side: int) -> _Rows:
    try:
        value = parse_json(content)
    except UnsafeFile as error:
        raise UnsafeFile(f"it is not valid JSON: {error}") from None
    return _read_tree(value, side)


def _read_toml(content: bytes, side: int) -> _Rows:
    try:
        value = parse_toml(_text(content))
    except UnsafeFile as error:
        raise UnsafeFile(f"it is not valid TOML: {error}") from None
    return _read_tree(value, side)


def _read_tree(value: Any, side: int) -> _Rows:
    """Return the prompts of a list of prompts, or of a table with a list of them and what they have in common."""
    found, common = _Rows(), {}
    if isinstance(value, dict):
        value = dict(value)
        lists = [name for name in ("prompts", "samples", "prompt") if name in value]
        if len(lists) != 1:
            raise UserError("it has no list of prompts; name it prompts (or samples, as EveryDream does)")
        prompts = value.pop(lists[0])
        if isinstance(prompts, dict):
            # kohya's [prompt] with [[prompt.subset]]
            common, prompts = dict(prompts), prompts.get("subset")
            common.pop("subset", None)
        for name, reason in _ELSEWHERE.items():
            if value.pop(name, None) is not None:
                found.notes.append(f"{name} has no effect: {reason}")
        common |= value
    else:
        prompts = value
    if not isinstance(prompts, list):
        raise UserError(f"its prompts are {kind_of(prompts)}, not a list")
    if len(prompts) > MAX_PICTURES:
        raise UserError(f"it has {len(prompts):,} prompts, more than {MAX_PICTURES}; give fewer")
    # checked by itself, so that an error in it is not said of the first prompt
    shared = _named("what its prompts have in common", common, side, is_common=True)
    for number, row in enumerate(prompts, 1):
        place = f"prompt {number}"
        found.add(place, partial(_entry, place, row, common, shared, side))
    return found


def _entry(place: str, row: Any, common: Mapping[str, Any], shared: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Return the values of a prompt in a list. common, shared: what all have in common, as given and by our names."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise UserError(f"{place} is {kind_of(row)}, not a text or a table")
    own = _named(place, {**{key: common[key] for key in ("resolution",) if key in common}, **row}, side)
    return {**shared, **own}


def _named(place: str, row: Mapping[str, Any], side: int, is_common: bool = False) -> dict[str, Any]:
    """Return a prompt's values under our names."""
    values: dict[str, Any] = {}
    for key, value in row.items():
        if key in _SIZES:
            continue
        name = _NAMES.get(key)
        if name is None or (is_common and name in ("prompt", "caption")):
            known = ", ".join(dict.fromkeys(_NAMES.values()))
            raise UserError(f"{place}: {shlex.quote(str(key)[:60])} is not a setting of a prompt; use {known}, size")
        values[name] = value
    if "seed" in values:
        values["seed"] = _seed(values["seed"])
    if "sampler" in values:
        values["sampler"] = _sampler(place, values["sampler"])
    return values | _size(place, row, side, is_common)


def _size(place: str, row: Mapping[str, Any], side: int, is_common: bool) -> dict[str, int]:
    """Return width and height of EveryDream's size, or aspect ratio at a resolution; {} if there is neither."""
    resolution = row.get("resolution", side)
    if type(resolution) is not int or not 16 <= resolution <= 4096:
        raise UserError(f"{place}: resolution {str(resolution)[:40]} is not a whole number from 16 to 4096")
    if "size" in row:
        size = row["size"]
        if not isinstance(size, list) or len(size) != 2 or not all(type(number) is int for number in size):
            raise UserError(f"{place}: size {str(size)[:40]} is not [width, height]")
        return {"width": size[0], "height": size[1]}
    ratio = row.get("aspect_ratio")
    if ratio is None:
        return {"width": resolution, "height": resolution} if "resolution" in row and not is_common else {}
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.1 <= ratio <= 10:
        raise UserError(f"{place}: aspect_ratio {str(ratio)[:40]} is not a number from 0.1 to 10")
    # as many pixels as the resolution's square; as EveryDream, in multiples of 64 px where that is not too coarse
    unit = 64 if resolution >= 512 else 8
    return {
        "width": max(unit, round(resolution * math.sqrt(ratio) / unit) * unit),
        "height": max(unit, round(resolution / math.sqrt(ratio) / unit) * unit),
    }


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnsafeFile(f"it is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


_READERS = {".txt": _read_txt, ".json": _read_json, ".toml": _read_toml}


# what a run samples


def prompts_of(config: Config) -> tuple[SamplePrompt, ...] | None:
    """Return the prompts that a run's settings name, None if they are captions of its dataset.

    A file that cannot be read is replaced by what the run recorded of it. Raises UserError if there is no such record.
    """
    sample = config.sample
    if not sample.prompts_file:
        return tuple(SamplePrompt(prompt=storable(text)) for text in sample.prompts) or None
    path = Path(sample.prompts_file)
    try:
        return read_prompt_file(path, config.data.max_resolution).prompts
    except UserError:
        before = recorded_prompts(Path(config.run.dir), sample.prompts_file)
        if before is None:
            raise
        return before.prompts


def record_of(prompts_file: str, found: PromptFile) -> dict:
    """Return the record of the prompts that were read, for RUN/prompts.json."""
    rows = [prompt.model_dump(exclude_defaults=True) for prompt in found.prompts]
    return {"file": prompts_file, "sha256": found.sha256, "prompts": rows}


def recorded_prompts(run_dir: Path, prompts_file: str) -> PromptFile | None:
    """Return the prompts that a run recorded of a file; None if there are none, or of another file."""
    if not prompts_file or not os.path.lexists(run_dir / RECORD_NAME):
        return None
    try:
        values = read_json_object(path_in(run_dir, RECORD_NAME), 4 * MAX_BYTES)
        rows, sha256 = values["prompts"], values["sha256"]
        if values["file"] != prompts_file or not isinstance(sha256, str) or len(rows) > MAX_PICTURES:
            return None
        return PromptFile(tuple(SamplePrompt(**row) for row in rows), sha256) if rows else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pictures_of(
    config: Config, prompts: Sequence[SamplePrompt], captions: Sequence[str], factor: int, step: int | None = None
) -> list[SampledPicture]:
    """Return the pictures that a run samples: each prompt with each of its guidance scales, all from its one noise.

    captions: for prompts that are captions. factor: pixels per latent. step: of the weights, None for the base's.
    Raises UserError for a size that is not a multiple of factor, or too many pictures.
    """
    own, sample = settings_of(config), config.sample
    pictures, num_captions = [], 0
    for number, prompt in enumerate(prompts):
        text = prompt.prompt
        if prompt.caption:
            if not captions:
                continue
            text = captions[num_captions % len(captions)]
            num_captions += 1
        negative = config.negative_text if prompt.negative_prompt is None else prompt.negative_prompt
        for place, cfg in enumerate(prompt.cfgs or sample.cfgs):
            settings = type(own)(
                prompt.width or own.width,
                prompt.height or own.height,
                prompt.steps or own.steps,
                cfg,
                own.seed if prompt.seed is None else prompt.seed,
                prompt.sampler or own.sampler,
                own.spacing,
            )
            check_size(settings, factor)
            # a seed of its own names the noise alone, so that a prompt may stand anywhere
            noise_place = number if prompt.seed is None else 0
            request = Request(Weights(step), text, noise_place, settings, storable(negative), config.model.clip_skip)
            pictures.append(SampledPicture(number, request, is_first=place == 0))
    if len(pictures) > MAX_PICTURES:
        raise UserError(
            f"{len(pictures):,} pictures at a time are more than {MAX_PICTURES}; give fewer prompts or cfgs"
        )
    return pictures


def largest_size(config: Config) -> tuple[int, int]:
    """Return (width, height) in px of the largest picture that a run samples, by its pixels."""
    own = settings_of(config)
    sizes = [(prompt.width or own.width, prompt.height or own.height) for prompt in prompts_of(config) or ()]
    return max(sizes or [(own.width, own.height)], key=lambda size: size[0] * size[1])


def is_guided(config: Config) -> bool:
    """Return whether any picture that a run samples is drawn with guidance."""
    scales = [prompt.cfgs or config.sample.cfgs for prompt in prompts_of(config) or [SamplePrompt()]]
    return any(cfg != 1 for own in scales for cfg in own)


def check_prompts(config: Config, factor: int, zero_terminal_snr: bool) -> None:
    """Raise UserError if what a run samples cannot be drawn. factor: pixels per latent."""
    check_size(settings_of(config), factor)
    check_spacing(config.sample.spacing, zero_terminal_snr)
    # whatever the captions are
    pictures_of(config, prompts_of(config) or (), ["a caption"], factor)
