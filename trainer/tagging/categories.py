"""Categories and the things that belong to them: the words of weighted tags, in a file that the user edits.

A line is a category, or a category and its things: `animal: bird, cat, dog`. `#` begins a comment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.text import collapse, shortened
from safelight.untrusted import UnsafeFile, read_bytes

MAX_BYTES = 2**18
MAX_NAMES = 1000
MAX_NAME_CHARACTERS = 60

DEFAULT_TEXT = """\
# The words of tags: a category on each line, behind the colon the things that belong to it.
# Edit it as you like, and run the command again. With CLIP, every word is compared with each photograph.
# With a detector, a class that it finds is a tag; this file says which category stands above it.
animal: bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, fish, insect
human: person, man, woman, child, crowd
landscape: mountain, sea, beach, forest, desert, lake, river, waterfall, field, sky
plant: potted plant, flower, tree
city: building, street, bridge, traffic light, fire hydrant, stop sign, parking meter, bench
vehicle: bicycle, car, motorcycle, airplane, bus, train, truck, boat
food: banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake
tableware: bottle, wine glass, cup, fork, knife, spoon, bowl
furniture: chair, couch, bed, dining table, toilet, sink
device: tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, refrigerator, hair drier
sport: frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket
object: backpack, umbrella, handbag, tie, suitcase, book, clock, vase, scissors, teddy bear, toothbrush
"""


@dataclass(frozen=True)
class Categories:
    """things: of each category, in the order of the file; a category may have none."""

    things: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Every word: each category, followed by its things."""
        return tuple(name for category, things in self.things.items() for name in (category, *things))

    @cached_property
    def _category_of(self) -> dict[str, str]:
        return {thing.casefold(): category for category, things in self.things.items() for thing in things}

    def category_of(self, name: str) -> str:
        """Return the category of a thing, in any letter case, or "" if it has none."""
        return self._category_of.get(name.casefold(), "")

    def record(self) -> dict[str, list[str]]:
        return {category: list(things) for category, things in self.things.items()}


def parse_categories(text: str) -> Categories:
    """Return the categories of a file's text. Raises UserError with what is wrong, in words that follow the path."""
    things: dict[str, tuple[str, ...]] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = collapse(line.partition("#")[0])
        if not line:
            continue
        category, _, rest = line.partition(":")
        names = [collapse(category), *(name for piece in rest.split(",") if (name := collapse(piece)))]
        for name in names:
            _check_name(name, number)
            if (other := line_of.setdefault(name.casefold(), number)) != number or names.count(name) > 1:
                raise UserError(f"line {number}: {name!r} is already in line {other}; keep one of them")
        things[names[0]] = tuple(names[1:])
        if len(line_of) > MAX_NAMES:
            raise UserError(f"line {number}: it has more than {MAX_NAMES:,} words; use fewer")
    if not things:
        raise UserError("has no category; write lines such as `animal: cat, dog`")
    return Categories(things)


def _check_name(name: str, number: int) -> None:
    if len(name) > MAX_NAME_CHARACTERS:
        raise UserError(f"line {number}: {shortened(name, 40)!r} is longer than {MAX_NAME_CHARACTERS} characters")
    if not any(char.isalpha() for char in name) or {":", "|"} & set(name):
        raise UserError(f"line {number}: {name!r} is no word; write lines such as `animal: cat, dog`")


DEFAULT_CATEGORIES = parse_categories(DEFAULT_TEXT)


def read_categories(path: Path) -> tuple[Categories, bool]:
    """Return (the categories in a file, whether it was written just now, with the usual ones, as there was none).

    Raises UserError.
    """
    is_new = not os.path.lexists(path)
    if is_new and Path(path).suffix.lower() not in ("", ".txt"):
        raise UserError(
            f"--tags {str(path)!r} does not exist, and a new file of categories would be text; give a file of "
            "categories, or a name such as --tags categories.txt, which is written with the usual ones"
        )
    if is_new and not Path(path).parent.is_dir():
        raise UserError(
            f"--tags {str(path)!r} cannot be written: its folder does not exist; create it, or check the path"
        )
    try:
        if is_new:
            atomic_write_text(path, DEFAULT_TEXT)
        content = read_bytes(path, MAX_BYTES)
    except UnsafeFile:
        raise
    except OSError as error:
        what = "written" if is_new else "read"
        raise UserError(f"--tags {str(path)!r} cannot be {what}: {error.strerror}") from None
    try:
        return parse_categories(content.decode("utf-8-sig")), is_new
    except UnicodeDecodeError:
        raise UserError(f"--tags {str(path)!r} is not UTF-8 text; save it as UTF-8") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None
