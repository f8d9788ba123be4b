"""The versions in constraints.txt."""

from __future__ import annotations

from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"


def pins() -> dict[str, str]:
    """Return package -> version, by canonical name. Raises ValueError for a line that is neither a pin nor a comment,
    and for a package that is pinned twice."""
    found: dict[str, str] = {}
    for number, line in enumerate(FILE.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, is_pin, version = text.partition("==")
        key = canonicalize_name(name)
        if not is_pin or not version or key in found:
            raise ValueError(f"{FILE.name}, line {number}: {line!r} is no new name==version")
        found[key] = version
    return found
