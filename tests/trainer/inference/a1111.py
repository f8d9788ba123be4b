"""Reads the text in a PNG as A1111's web UI does (parse_generation_parameters in modules/infotext_utils.py)."""

from __future__ import annotations

import json
import re

# its regular expressions for a parameter and for a size
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"^(\d+)x(\d+)$")
MIN_PARAMETERS = 3
# values of its menus that Safelight may name (modules/sd_samplers_*.py, sd_schedulers.py)
SAMPLERS = {"DDIM", "DPM++ 2M", "Euler", "Euler a", "UniPC"}
SCHEDULE_TYPES = {"Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform"}


def parse_parameters(text: str) -> dict[str, str]:
    """Return name -> value: Prompt, Negative prompt, and what the last line holds; a size as Size-1 and Size-2.

    The last line belongs to the prompt unless it has three parameters; lines after "Negative prompt:" are negative.
    """
    *lines, last = text.strip().split("\n")
    if len(PARAMETER.findall(last)) < MIN_PARAMETERS:
        lines, last = [*lines, last], ""
    parts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    part = "Prompt"
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            part, line = "Negative prompt", line.strip().removeprefix("Negative prompt:").strip()
        parts[part].append(line.strip())
    found = {name: "\n".join(its) for name, its in parts.items()}
    for name, value in PARAMETER.findall(last):
        if value.startswith('"') and value.endswith('"'):
            value = json.loads(value)
        if size := SIZE.fullmatch(value):
            found[f"{name}-1"], found[f"{name}-2"] = size.groups()
        else:
            found[name] = value
    return found
