"""Names of a plan's values in `safelight plan --json`: lower case, with units."""

from __future__ import annotations

import re

_NAMES = {
    "fp32 gradients, replacing those": "fp32_gradients",
    "of these in host memory": "in_host_memory",
    "peak of these": "peak",
    "checkpoints at most": "most_checkpoints",
    "images_per_s": "predicted_images_per_s",
    "needed": "needed_bytes",
    "held": "held_bytes",
    "step": "step_bytes",
    "others": "others_bytes",
    "kinds": "peak_bytes",
    "host": "host_bytes",
    "graphs": "graphs_bytes",
    "bus_in": "inward_bytes",
    "bus_out": "outward_bytes",
    "most": "most_bytes",
}


def with_json_names(value: object) -> object:
    """Return plain values with their keys renamed: by _NAMES, else to lower case with other characters as _."""
    if isinstance(value, dict):
        names = {key: _NAMES.get(key, re.sub("[^a-z0-9]+", "_", key.lower())) for key in value}
        if len(set(names.values())) < len(names):
            raise AssertionError(f"{sorted(value)}: two of these get the same name in JSON")
        return {names[key]: with_json_names(item) for key, item in value.items()}
    return [with_json_names(item) for item in value] if isinstance(value, list | tuple) else value
