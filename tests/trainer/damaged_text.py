"""JSON and TOML texts in which one value is replaced by something absurd, for the readers of records and settings."""

import json
import random

# as JSON text: Python does not write all of them
VALUES = (
    *(
        "null",
        "true",
        '"x"',
        '""',
        "-1",
        "0",
        "0.5",
        "1e308",
        "-1e308",
        "5e-324",
        "1e999",
        "9" * 400,
        "NaN",
        "-Infinity",
    ),
    *(str(2**63), str(2**64), "[]", "{}", "[[]]", "[null]", '[1, "a", null, {}]', '{"a": {"b": [1]}}', '{"": ""}'),
    *("[" * 60 + "]" * 60, "[" * 100_000, "[1e999]", '{"a": ' * 200 + "1" + "}" * 200),
    *(json.dumps(text) for text in ("\x1b]0;x\x07", "y" * 50_000, "\ud800", "../../../etc/passwd", "a\0b", "\u202e")),
)
CONTENTS = (b"", b"[", b"[]", b"null", b"{}", b"\xff\xfe" * 50, b'{"a": 1', b"[" * 100_000, b"7" * 5000, b"\0" * 99)
TOML_VALUES = (
    *('"x"', "[]", "{}", "nan", "-inf", "0x" + "f" * 9000, "-1", "0", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z"),
    *("[[1], [2]]", "true", "[" * 3000, '"\\u001b[31m"', "1e400", "9" * 30, "[{a = 1}, {}]", "{a.b.c = 1}"),
    "a" + ".a" * 50_000 + " = 1",
)
TOKEN = '"@replaced@"'


def places(value: object, place: tuple = ()) -> list[tuple]:
    """Return the place of a value and of every value in it, as the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in items for found in places(item, (*place, key)))]


def replaced(text: str, rng: random.Random) -> bytes:
    """Return a JSON text with one value replaced or left out, or something else altogether."""
    if rng.random() < 0.05:
        return rng.choice(CONTENTS)
    value = json.loads(text)
    place = rng.choice(places(value))
    if not place:
        return rng.choice(VALUES).encode()
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if rng.random() < 0.1:
        del parent[place[-1]]
    else:
        parent[place[-1]] = json.loads(TOKEN)
    return json.dumps(value).replace(TOKEN, rng.choice(VALUES)).encode()


def replaced_setting(text: str, rng: random.Random) -> bytes:
    """Return a TOML text with one value replaced, or cut, or with a changed byte."""
    if rng.random() < 0.2:
        content = bytearray(text.encode())
        content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content)
    lines = text.split("\n")
    line = rng.choice([number for number, line in enumerate(lines) if " = " in line])
    lines[line] = f"{lines[line].split(' = ')[0]} = {rng.choice(TOML_VALUES)}"
    return "\n".join(lines).encode()
