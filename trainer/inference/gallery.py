"""Saves drawn images so that they explain themselves: file names, parameters inside each PNG, and a page per folder.

The parameters are the text that A1111's web UI writes and reads back (modules/processing.py, create_infotext), which
ComfyUI and image viewers know as well.
"""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image, PngImagePlugin

import safelight
from safelight.data.atomic import atomic_write_bytes, atomic_write_text
from safelight.errors import UserError
from safelight.text import storable
from safelight.trainer.inference.sampling import Settings
from safelight.trainer.registry.samplers import SAMPLERS, schedule_type, title_of
from safelight.trainer.report.markup import Markup, join, prompt_markup, shorten, tag
from safelight.trainer.report.pictures import Picture, Work, embed_all, placeholder
from safelight.trainer.report.theme import CSS, JS, content_security_policy
from safelight.untrusted import (
    UnsafeFile,
    check_kinds,
    is_link_out,
    open_regular,
    path_in,
    read_bytes,
    read_json_object,
)

# the record of the images that `safelight sample` drew into a folder, from which its page is made
RECORD_NAME = "images.json"
PAGE_NAME = "index.html"
# in the head of every page, by which an earlier one is told from somebody else's
GENERATOR = "Safelight"
MAX_PAGE_BYTES = 2**26
MAX_SLUG_CHARS, MAX_SLUG_BYTES = 40, 80
# images on a page, the newest ones
MAX_SHOWN = 120
MAX_PROMPT_CHARS = 400
EDGES_PX = (512, 384, 256, 160)
BUDGET_BYTES = 12_000_000
# an image's key is the first text in its file, behind the signature and the chunk IHDR
KEY_NAME, KEY_CHARS = "safelight-key", 64
_PNG, _KEY_PLACE = b"\x89PNG\r\n\x1a\n", 33
_KEY_CHUNK = (len(KEY_NAME) + 1 + KEY_CHARS).to_bytes(4, "big") + b"tEXt" + KEY_NAME.encode() + b"\0"


@dataclass(frozen=True)
class Drawn:
    """An image and how it was drawn. file: name in its folder. step: of the checkpoint, -1 for the base.

    cut_after: the end of what the text encoder read of the prompt, '' if it read all. lora_scale: see Weights.
    """

    file: str
    prompt: str
    negative_prompt: str
    step: int
    seed: int
    cfg: float
    num_steps: int
    sampler: str
    width: int
    height: int
    cut_after: str = ""
    lora_scale: float = 1.0
    spacing: str = "trailing"

    @classmethod
    def of(
        cls,
        file: str,
        prompt: str,
        negative: str,
        step: int | None,
        settings: Settings,
        cut_after: str,
        lora_scale: float = 1.0,
    ) -> Drawn:
        """Return the record of an image. step: None for the base."""
        return cls(
            file,
            prompt,
            negative,
            -1 if step is None else step,
            settings.seed,
            settings.cfg,
            settings.steps,
            settings.sampler,
            settings.width,
            settings.height,
            cut_after,
            lora_scale,
            settings.spacing,
        )

    def parameters(
        self, model: str, model_hash: str = "", clip_skip: int = 0, words: Mapping[str, str] | None = None
    ) -> str:
        """Return A1111's text. model: name of the model; model_hash: 10 hex digits, '' if it has none.

        clip_skip: as Family.clip_skip_elsewhere counts it. words: name -> SHA-256 of the files of the embeddings that
        the prompts name.
        """
        # twelve digits, where a model has ten (modules/textual_inversion/textual_inversion.py)
        hashes = ", ".join(f"{name}: {sha256[:12]}" for name, sha256 in (words or {}).items())
        values = {
            "Steps": self.num_steps,
            "Sampler": SAMPLERS[self.sampler].title if self.sampler in SAMPLERS else self.sampler,
            "Schedule type": schedule_type(self.sampler, self.spacing) or None,
            "CFG scale": f"{self.cfg:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": model_hash or None,
            "Model": model,
            "Clip skip": clip_skip or None,
            "TI hashes": hashes or None,
            "LoRA scale": None if self.lora_scale == 1 else f"{self.lora_scale:g}",
            "Version": f"Safelight {safelight.__version__}",
        }
        negative = f"\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        listed = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
        return f"{self.prompt}{negative}\n{listed}".strip()


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(char in text for char in ",\n:") else text


def slug(prompt: str) -> str:
    """Return the first words of a prompt as a part of a file name: letters and digits of any script, joined by -.

    It is at most MAX_SLUG_CHARS characters and MAX_SLUG_BYTES bytes long, valid on every system, and may be empty.
    """
    text = unicodedata.normalize("NFKC", prompt[: 4 * MAX_SLUG_CHARS]).lower()
    words = "".join(char if char.isalnum() else " " for char in text).split()
    cut = ""
    for word in words:
        longer = f"{cut}-{word}" if cut else word[:MAX_SLUG_CHARS]
        if len(longer) > MAX_SLUG_CHARS or len(longer.encode()) > MAX_SLUG_BYTES:
            break
        cut = longer
    return cut or words[0].encode()[:MAX_SLUG_BYTES].decode(errors="ignore")[:MAX_SLUG_CHARS] if words else ""


def file_name(stem: str, number: int, prompt: str) -> str:
    """Return STEM-NUMBER-WORDS-OF-THE-PROMPT.png."""
    words = slug(prompt)
    return f"{stem}-{number:03d}{f'-{words}' if words else ''}.png"


def save_png(image: Image.Image, path: Path, parameters: str, key: str = "") -> None:
    """Write an image with its parameters, '' for none. A link in the file's place is replaced, never followed.

    key: 64 characters, which `read_key` returns.
    """
    texts = PngImagePlugin.PngInfo()
    if key:
        # first, where read_key finds it
        texts.add_text(KEY_NAME, key)
    if parameters:
        texts.add_text("parameters", storable(parameters))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    atomic_write_bytes(path, buffer.getvalue())


def read_key(path: Path) -> str:
    """Return the key of an image that `save_png` wrote with one, 64 characters; '' if there is no such image."""
    try:
        with open_regular(path) as file:
            head = file.read(_KEY_PLACE + len(_KEY_CHUNK) + KEY_CHARS)
    except (UnsafeFile, OSError):
        return ""
    found, key = head[_KEY_PLACE : _KEY_PLACE + len(_KEY_CHUNK)], head[_KEY_PLACE + len(_KEY_CHUNK) :]
    return key.decode("ascii", "replace") if head.startswith(_PNG) and found == _KEY_CHUNK else ""


def read_drawn(folder: Path) -> list[Drawn]:
    """Return the images that were drawn into a folder before, those that are still there.

    Raises UnsafeFile if the record is damaged. Rows that are not valid are left out: the folder may be somebody else's.
    """
    try:
        rows = read_json_object(path_in(folder, RECORD_NAME)).get("images")
    except FileNotFoundError:
        return []
    drawn = [_parse(row) for row in rows] if isinstance(rows, list) else []
    return [image for image in drawn if image is not None and _is_there(folder, image.file)]


def check_folder(folder: Path) -> None:
    """Raise UserError if `write_drawn` or `write_page` would replace a file in a folder that they did not write.

    Also if one of their files is a link that leads out: what is read there would be shown to whoever gets the folder.
    """
    check_kinds(folder, (), (RECORD_NAME, PAGE_NAME), "a folder of images")
    for name in (RECORD_NAME, PAGE_NAME):
        if is_link_out(folder / name, folder):
            raise UserError(
                f"{folder / name} is a link to {os.path.realpath(folder / name)}, outside {folder}; such links are "
                "never followed: delete it, or name another folder with -o"
            )
    record, page = (os.path.lexists(folder / name) for name in (RECORD_NAME, PAGE_NAME))
    has_own_record = record and _is_own_record(folder)
    if record and not has_own_record:
        raise UserError(f"{folder / RECORD_NAME} is not a record of Safelight's samples; name another folder with -o")
    # a page of an earlier version names no generator, but has a record
    if page and not has_own_record and not _is_own_page(folder):
        raise UserError(f"{folder / PAGE_NAME} is not a page of Safelight's; name another folder with -o")


def _is_own_record(folder: Path) -> bool:
    try:
        values = read_json_object(folder / RECORD_NAME)
    except UnsafeFile as error:
        raise UserError(f"{error}; name another folder with -o, or delete it: images stay as they are") from None
    rows = values.get("images")
    is_list = values.keys() == {"images"} and isinstance(rows, list)
    return is_list and all(isinstance(row, dict) and {"file", "prompt", "seed"} <= row.keys() for row in rows)


def _is_own_page(folder: Path) -> bool:
    try:
        page = read_bytes(folder / PAGE_NAME, MAX_PAGE_BYTES)
    except (UnsafeFile, OSError):
        return False
    return f'name="generator" content="{GENERATOR} '.encode() in page


def _parse(row: object) -> Drawn | None:
    kinds = {"int": int, "str": str, "float": (int, float)}
    names = {field.name: kinds[field.type] for field in fields(Drawn)}
    if not isinstance(row, dict):
        return None
    # older records lack these
    row = {"lora_scale": 1.0, "spacing": "trailing", **row}
    if row.keys() != names.keys():
        return None
    if any(isinstance(row[name], bool) or not isinstance(row[name], kind) for name, kind in names.items()):
        return None
    return Drawn(**row)


def _is_there(folder: Path, name: str) -> bool:
    try:
        return "/" not in name and "\\" not in name and path_in(folder, name).is_file()
    except UnsafeFile:
        return False


def write_drawn(folder: Path, drawn: Sequence[Drawn]) -> None:
    """Write the record that `read_drawn` reads."""
    rows = [{name: storable(v) if isinstance(v, str) else v for name, v in asdict(image).items()} for image in drawn]
    atomic_write_text(folder / RECORD_NAME, json.dumps({"images": rows}, indent=1, ensure_ascii=False) + "\n")


def write_page(folder: Path, title: str, drawn: Sequence[Drawn]) -> Path:
    """Write a page of the folder's images and return its path: a row per prompt, a column per step and settings.

    It contains small copies of the images, so that it can be sent alone; each links to its file.
    """
    shown = drawn[-MAX_SHOWN:]
    pictures = embed_all([folder / image.file for image in shown], EDGES_PX, BUDGET_BYTES, Work())
    cells: dict[tuple[str, tuple], list[Markup]] = {}
    cuts: dict[str, str] = {}
    for image, picture in zip(shown, pictures, strict=True):
        cells.setdefault((image.prompt, _column(image)), []).append(_figure(image, picture))
        cuts.setdefault(image.prompt, image.cut_after)
    prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
    columns = sorted(dict.fromkeys(column for _, column in cells))
    head = [tag("th", [tag("div", line) for line in _column_title(column)], scope="col") for column in columns]
    body = []
    for prompt in prompts:
        caption = tag("div", prompt_markup(prompt, cuts[prompt], MAX_PROMPT_CHARS), class_="prompt-row")
        body.append(tag("tr", tag("th", caption, colspan=len(columns), scope="rowgroup")))
        names = {column: ", ".join(_column_title(column)) for column in columns}
        found = [(cells.get((prompt, column)), names[column]) for column in columns]
        body.append(tag("tr", [tag("td", cell, data_label=name if cell else None) for cell, name in found]))
    num_left_out = len(drawn) - len(shown)
    note = "A row has the same prompt, a column the same model, seed and settings. Each picture links to its file."
    if num_left_out:
        note += f" Shown are the newest {len(shown)} of {len(drawn)} images."
    strip = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="strip")
    page = join(
        tag("header", tag("h1", title), tag("p", note, class_="note")),
        tag("main", tag("div", strip, class_="scroll", tabindex="0", role="region", aria_label="Images by prompt")),
        tag("footer", f"Written by Safelight {safelight.__version__}."),
        tag("script", Markup(JS)),
    )
    head_of_page = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=content_security_policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"{GENERATOR} {safelight.__version__}"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · Safelight"),
        tag("style", Markup(CSS)),
    )
    html = tag("html", tag("head", head_of_page), tag("body", page), lang="en")
    atomic_write_text(folder / PAGE_NAME, f"<!doctype html>\n{html}\n")
    return folder / PAGE_NAME


def _column(image: Drawn) -> tuple:
    return (image.step, image.seed, image.num_steps, image.cfg, image.sampler, image.spacing, image.negative_prompt)


def _column_title(column: tuple) -> list[str]:
    step, seed, num_steps, cfg, sampler, spacing, negative = column
    against = [f"negative: {shorten(negative, 40)}"] if negative else []
    settings = f"{title_of(sampler, spacing)}, {num_steps} steps, cfg {cfg:g}"
    return ["base model" if step < 0 else f"step {step:,}", f"seed {seed}", settings, *against]


def _figure(image: Drawn, picture: Picture | None) -> Markup:
    where = "base" if image.step < 0 else f"step {image.step:,}"
    content = placeholder("missing") if picture is None else picture.img(f"{where}: {shorten(image.prompt, 120)}")
    zoom = f"{shorten(image.prompt, MAX_PROMPT_CHARS)} — {where}, seed {image.seed}"
    link = tag("a", image.file, href=relative_url(image.file), class_="meta")
    return tag("div", tag("div", content, data_zoom=zoom if picture else None), link)


def relative_url(name: str) -> str:
    """Return the URL of a file beside the page."""
    from urllib.parse import quote

    # ./ because a name with a colon would be read as a scheme; bytes, because a name may be no valid UTF-8
    return f"./{quote(os.fsencode(name))}"
