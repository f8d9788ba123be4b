"""Fetching from the hub: configs and safetensors only, with a bar for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from safelight.errors import UserError

PARTS = ("unet", "vae", "text_encoder")


def late_bar() -> type:
    """Return a tqdm that is drawn after two seconds, so that what is here already goes unmentioned."""
    from tqdm import tqdm

    class LateBar(tqdm):
        def __init__(self, *args, **options):
            # the command line turns libraries' bars off; gigabytes on their way are ours to show
            interval = 0.2 if sys.stderr.isatty() else 10
            super().__init__(*args, **{**options, "disable": False, "delay": 2, "mininterval": interval})

    return LateBar


def fetch(spec: str, setting: str, fix: str, parts: Iterable[str] = PARTS) -> Path:
    """Return the local snapshot of a hub repository, fetching its configs and the safetensors of `parts` if need be.

    setting: names the value in messages; fix: ends them. Raises UserError, one line.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = tuple(parts)

    def snapshot(patterns: list[str], ignored: list[str]) -> Path:
        return Path(snapshot_download(spec, allow_patterns=patterns, ignore_patterns=ignored, tqdm_class=late_bar()))

    patterns = ["*.json", "*.txt", *(f"{part}/*.safetensors" for part in parts)]
    try:
        folder = snapshot(patterns, ["*fp16*", "*non_ema*"])
        # fp32 where there is both; some repositories hold the halves alone
        lacking = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
        return snapshot([f"{part}/*.fp16*" for part in lacking], ["*.bin", "*non_ema*"]) if lacking else folder
    except HFValidationError:
        raise UserError(f"{setting} {spec!r} is neither a folder here nor a hub id (owner/name)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{setting} {spec!r} is no folder here and could not be had from the hub ({reason[:100]}); {fix}"
        ) from None
