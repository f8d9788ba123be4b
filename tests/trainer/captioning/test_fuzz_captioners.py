"""Damaged and hostile JSON files of a captioner end in a captioner or in one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from safelight.errors import UserError
from safelight.trainer.captioning.models import load_captioner
from tests.trainer.captioning.conftest import CPU

NUM = 1000
VALUES = (None, True, -1, 0, 1, 3, 2**16, 2**40, 1.5, 1e30, "", "x", "../../x", "a" * 5000, [], [1], {}, {"a": 1})
FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values in a JSON value; of long lists and tables only the first."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [path, *(place for key, child in items[:40] for place in places(child, (*path, key)))]


def changed(value: object, rng: random.Random) -> object:
    """Return a JSON value with one value in it replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    *above, last = rng.choice(places(value)[1:])
    parent = value
    for key in above:
        parent = parent[key]
    if rng.random() < 0.3 and isinstance(parent, dict):
        child = parent.pop(last)
        if rng.random() < 0.5:
            parent[f"{last}_"] = child
    else:
        parent[last] = rng.choice(VALUES)
    return value


@pytest.mark.slow
def test_changed_files_of_a_captioner_end_in_one_line(captioner_folder, tmp_path):
    folder = Path(shutil.copytree(captioner_folder("blip"), tmp_path / "model"))
    originals = {name: (folder / name).read_text() for name in FILES}
    rng, messages = random.Random(1), []
    for _ in range(NUM):
        name = rng.choice(FILES)
        text = json.dumps(changed(json.loads(originals[name]), rng))
        if rng.random() < 0.2:
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(("", "\0", '"', "]", "9" * 30)) + text[start + rng.randrange(4) :]
        (folder / name).write_text(text)
        try:
            load_captioner(str(folder), CPU)
        except UserError as error:
            messages.append(str(error))
        (folder / name).write_text(originals[name])
    assert 0.2 * NUM < len(messages) < 0.9 * NUM
    assert not any("\n" in message for message in messages)
