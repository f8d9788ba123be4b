"""Uploads an export to the Hugging Face hub: `safelight export ... --push USER/REPO`.

Nothing is uploaded that the user has not been shown. What can be known before the export, such as a refused token or a
name that exists, is found out before it; what fails after it leaves the export where it is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import UserError, first_line
from safelight.text import counted, printable, size
from safelight.units import MIB

_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
MAX_LISTED = 12


@dataclass(frozen=True)
class Target:
    """Where to upload to. user: whom the token belongs to. exists: whether the repository is there already."""

    repo_id: str
    is_private: bool
    user: str
    exists: bool


def check_upload(repo_id: str) -> None:
    """Raise UserError for what keeps an upload from working and can be told from here alone.

    A name that is not valid, no library for the hub, no token: before the run is read, and before the hub is asked.
    """
    if not _NAME.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        raise UserError(f"--push {printable(repo_id)[:100]} is not USER/REPO of letters, digits, -, _ and .")
    try:
        from huggingface_hub import get_token
        from huggingface_hub.utils import httpx  # noqa: F401  older versions have none
    except ImportError as error:
        raise UserError(
            f"--push needs a newer huggingface_hub, or one that can be imported ({first_line(error)}): "
            "pip install -U huggingface_hub"
        ) from None
    if not get_token():
        raise UserError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN to one that may write")


def check_target(repo_id: str, is_private: bool, may_exist: bool) -> Target:
    """Return where an export is uploaded to, after asking the hub who the user is and whether the name is free.

    repo_id: that `check_upload` let pass. may_exist: whether to add to a repository that is there. Raises UserError: a
    refused token, a name that exists, or a hub that cannot be reached.
    """
    from huggingface_hub import HfApi

    with _explaining("nothing was exported or uploaded"):
        api = HfApi()
        user = str(api.whoami().get("name", ""))
        exists = api.repo_exists(repo_id)
    if exists and not may_exist:
        raise UserError(f"{repo_id} exists already; name another, or add --push-existing to upload into it")
    return Target(repo_id, is_private, user, exists)


def describe_upload(path: Path, target: Target, card_files: list[Path]) -> list[str]:
    """Return lines on what will be uploaded and where. card_files: the card and samples beside a single file."""
    files = _files(path, card_files)
    num_bytes = sum(file.stat().st_size for file in files.values())
    pictures = [name for name in files if name.endswith(".png")]
    visible = "whoever may see it now" if target.exists else "you alone" if target.is_private else "everybody"
    lines = [
        f"upload to {target.repo_id}, as {target.user or 'the owner of the token'}, visible to {visible}: "
        f"{counted(len(files), 'file')}, {_size(num_bytes)}",
        *(f"  {printable(name)}  {_size(file.stat().st_size)}" for name, file in list(files.items())[:MAX_LISTED]),
    ]
    if len(files) > MAX_LISTED:
        lines.append(f"  and {len(files) - MAX_LISTED} more")
    drawn = f"{counted(len(pictures), 'picture')} that the model drew, with their prompts" if pictures else "no picture"
    lines.append(f"  no photograph of the dataset; {drawn}, and the settings, counts and credits of the card")
    return lines


def push(path: Path, target: Target, card_files: list[Path], message: str) -> str:
    """Upload an export and return its address. path: the folder, or the file. message: of the commit.

    Raises UserError if the hub or the network fails; the export stays as it is, and the same upload can be tried again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    again = f"{path} is complete and stays; try the upload again with --push-existing --force"
    with _explaining(again):
        api = HfApi()
        if not target.exists:
            url = str(api.create_repo(target.repo_id, private=target.is_private, exist_ok=False))
        else:
            url = f"{api.endpoint}/{target.repo_id}"
        if path.is_dir():
            api.upload_folder(repo_id=target.repo_id, folder_path=path, commit_message=message)
        else:
            operations = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file))
                for name, file in _files(path, card_files).items()
            ]
            api.create_commit(target.repo_id, operations=operations, commit_message=message)
    return url


def _size(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes >= MIB else f"{num_bytes:,} bytes"


def _files(path: Path, card_files: list[Path]) -> dict[str, Path]:
    """Return name in the repository -> file of what is uploaded."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): file for file in found}
    names = {path.name: path}
    for file in card_files:
        is_sample = file.suffix == ".png"
        names[f"{file.parent.name}/{file.name}" if is_sample else "README.md"] = file
    return names


@contextlib.contextmanager
def _explaining(outcome: str) -> Iterator[None]:
    """Turn errors of the hub and the network into a UserError. outcome: what is left, at the end of the message."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import httpx

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the hub refuses the token: make one that may write at huggingface.co/settings/tokens",
            403: "the token may not do this: make one that may write at huggingface.co/settings/tokens",
            409: "the repository exists already; name another, or add --push-existing",
        }
        raise UserError(f"{reasons.get(status) or f'the hub answers: {first_line(error)}'}; {outcome}") from None
    except (HFValidationError, httpx.HTTPError, OSError, RuntimeError) as error:
        raise UserError(f"the upload failed: {first_line(error)}; {outcome}") from None
