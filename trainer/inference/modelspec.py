"""A model file's metadata, as tools that list models read it: Stability AI's ModelSpec 1.0.0.

Source: github.com/Stability-AI/ModelSpec. The hash is of all that follows the header, and stands in the header: it is
put into its place once the file is written.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from safelight.trainer.families.registry import family_of

SPEC_VERSION = "1.0.0"
NO_HASH = "0x" + "0" * 64
CUSTOM = "stable-diffusion-custom"


def modelspec(unet_config, prediction_type: str, resolution: int, title: str, description: str) -> dict[str, str]:
    """Return a file's metadata, NO_HASH in the hash's place. Source: Stability-AI/ModelSpec 1.0.0.

    `format` is safetensors' own convention.
    """
    family = family_of(unet_config)
    is_known = family.has_published_size(unet_config)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": SPEC_VERSION,
        "modelspec.architecture": family.architecture(prediction_type) if is_known else CUSTOM,
        "modelspec.implementation": family.implementation,
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.hash_sha256": NO_HASH,
    }


def sign(path: Path) -> None:
    """Put the SHA-256 of all that follows the header in NO_HASH's place, and sync the file."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        field = b'"modelspec.hash_sha256":"'
        file.seek(8 + header.index(field + NO_HASH.encode()) + len(field))
        file.write(f"0x{digest.hexdigest()}".encode())
        file.flush()
        os.fsync(file.fileno())
