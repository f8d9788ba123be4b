"""Metadata of a model file, which other tools show: Stability AI's ModelSpec 1.0.0.

The header contains a hash of everything after the header, so it is filled in once the file is written.
Source: github.com/Stability-AI/ModelSpec.
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


def modelspec(
    unet_config, prediction_type: str, resolution: int, title: str, description: str, usage_hint: str = ""
) -> dict[str, str]:
    """Return a file's metadata, with NO_HASH as the hash.

    prediction_type: epsilon | v_prediction. resolution: px. The key `format` is safetensors' own convention.
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
        **({"modelspec.usage_hint": usage_hint} if usage_hint else {}),
    }


def sign(path: Path) -> None:
    """Replace NO_HASH in the file's header by the SHA-256 of everything after the header, and sync the file."""
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
