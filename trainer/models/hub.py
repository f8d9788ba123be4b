"""Downloads from the Hugging Face hub: configs and safetensors only, with a progress bar if it takes long."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

from safelight.errors import UserError, first_line
from safelight.text import printable

# the account and the title with which the hub proposes a repository's weights as .safetensors
CONVERTER, CONVERTED = "SFconvertbot", "Adding `safetensors` variant of this model"


def delayed_bar() -> type:
    """Return a tqdm class whose bar appears after two seconds, so that there is none for cached files."""
    from tqdm import tqdm

    class DelayedBar(tqdm):
        def __init__(self, *args, **options):
            # not disabled: the command line silences libraries' bars, but gigabytes need one
            interval = 0.2 if sys.stderr.isatty() else 10
            if options.get("desc"):
                # the name of a file in the repository
                options["desc"] = printable(options["desc"])
            super().__init__(*args, **{**options, "disable": False, "delay": 2, "mininterval": interval})

    return DelayedBar


def fetch(spec: str, setting: str, fix: str, parts: Iterable[str]) -> Path:
    """Return the local snapshot of a hub repository, after downloading missing configs and safetensors of `parts`.

    setting: the setting that named the repository, fix: what to do instead, both for messages. Raises UserError.
    """
    parts = tuple(parts)

    def snapshot(patterns: list[str], ignored: list[str]) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(spec, allow_patterns=patterns, ignore_patterns=ignored, tqdm_class=delayed_bar()))

    patterns = ["*.json", "*.txt", *(f"{part}/*.safetensors" for part in parts)]
    with _explaining(spec, setting, fix):
        folder = snapshot(patterns, ["*fp16*", "*non_ema*"])
        # fp32 is preferred, but some repositories only have fp16
        missing = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
        if not missing:
            return folder
        patterns = [f"{part}/*.fp16*.{suffix}" for part in missing for suffix in ("safetensors", "json")]
        return snapshot(patterns, ["*non_ema*"])


def fetch_transformers(spec: str, setting: str, fix: str) -> Path:
    """Return the local snapshot of a hub repository of transformers' layout, after downloading what is missing.

    The first BLIP repositories have no .safetensors on their main branch. The hub's own bot converted them and proposed
    the result as a pull request, from which transformers takes it, and so does this. setting, fix: as for `fetch`.
    Raises UserError.
    """
    from huggingface_hub import get_repo_discussions, snapshot_download

    def snapshot(patterns: list[str], revision: str | None = None) -> Path:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns, tqdm_class=delayed_bar()))

    patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    with _explaining(spec, setting, fix):
        # configs first, so that a folder of another kind is refused before gigabytes are downloaded
        folder = snapshot(patterns[:-1])
        if not (folder / "config.json").exists():
            raise UserError(f"{setting} {spec!r} has no config.json, so it is not a model of transformers; {fix}")
        folder = snapshot(patterns)
        # an earlier call may have downloaded the proposal
        for known in (folder, *sorted(folder.parent.iterdir())):
            if any(known.glob("*.safetensors")):
                return known
        for proposal in get_repo_discussions(spec, author=CONVERTER, discussion_type="pull_request"):
            if proposal.author == CONVERTER and proposal.title == CONVERTED and proposal.status == "open":
                return snapshot(patterns, proposal.git_reference)
    return folder


@contextlib.contextmanager
def _explaining(spec: str, setting: str, fix: str):
    """Turn the hub's errors into a UserError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        yield
    except HFValidationError:
        raise UserError(
            f"{setting} {spec!r} is neither a folder on this machine nor a Hugging Face id (owner/name)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = first_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            # its message tells of revisions and snapshots
            reason = "it is not in the local cache, and the hub cannot be reached"
        raise UserError(
            f"{setting} {spec!r} is not a folder on this machine and could not be downloaded from Hugging Face: "
            f"{reason}; {fix}"
        ) from None
