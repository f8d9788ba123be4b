"""Captioners from the hub: which files are downloaded, and where .safetensors come from if the main branch has none."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx

from safelight.errors import UserError
from safelight.trainer.captioning.models import load_captioner
from safelight.trainer.models.hub import CONVERTED, CONVERTER, fetch_transformers
from tests.trainer.captioning.conftest import CPU


class Hub:
    """A hub with one repository, of which snapshots are copied into a cache as huggingface_hub does."""

    def __init__(self, cache: Path, monkeypatch):
        self.cache = cache / "models--owner--name" / "snapshots"
        self.revisions: dict[str, Path] = {}
        self.proposals: list = []
        self.downloaded: list[tuple[str, list[str]]] = []
        self.is_reachable = True
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "get_repo_discussions", self.discussions)

    def snapshot(self, spec, revision=None, allow_patterns=(), tqdm_class=None) -> str:
        assert spec == "owner/name"
        name = (revision or "main").replace("/", "-")
        place = self.cache / name
        if self.is_reachable:
            self.downloaded.append((name, list(allow_patterns)))
            place.mkdir(parents=True, exist_ok=True)
            for pattern in allow_patterns:
                for file in self.revisions[name].glob(pattern):
                    shutil.copy(file, place)
        elif not place.exists():
            raise LocalEntryNotFoundError("no snapshot")
        return str(place)

    def discussions(self, spec, author, discussion_type):
        if not self.is_reachable:
            raise httpx.ConnectError("no route")
        assert (author, discussion_type) == (CONVERTER, "pull_request")
        return iter(self.proposals)


@pytest.fixture
def hub(tmp_path, monkeypatch, captioner_folder) -> Hub:
    """The hub's repository as the first BLIP has it: pickled weights on main, .safetensors in the bot's proposal."""
    hub = Hub(tmp_path / "cache", monkeypatch)
    main = shutil.copytree(captioner_folder("blip"), tmp_path / "main")
    proposed = shutil.copytree(main, tmp_path / "proposed")
    (main / "model.safetensors").rename(main / "pytorch_model.bin")
    (main / "model.py").write_text("raise SystemExit")
    hub.revisions = {"main": main, "refs-pr-7": proposed}
    proposal = {"title": CONVERTED, "status": "open", "git_reference": "refs/pr/7"}
    hub.proposals = [
        SimpleNamespace(author="stranger", **{**proposal, "git_reference": "refs/pr/3"}),
        SimpleNamespace(author=CONVERTER, **{**proposal, "status": "closed", "git_reference": "refs/pr/4"}),
        SimpleNamespace(author=CONVERTER, **{**proposal, "title": "Another", "git_reference": "refs/pr/5"}),
        SimpleNamespace(author=CONVERTER, **proposal),
    ]
    return hub


def test_the_bots_proposal_is_used_if_main_has_only_pickles(hub):
    assert load_captioner("owner/name", CPU).kind == "blip"
    assert [name for name, _ in hub.downloaded] == ["main", "main", "refs-pr-7"]
    patterns = {pattern for _, patterns in hub.downloaded for pattern in patterns}
    assert patterns == {"*.json", "*.txt", "*.jinja", "*.safetensors"}
    assert not list(hub.cache.rglob("*.bin"))
    assert not list(hub.cache.rglob("*.py"))
    # from the cache alone, later
    hub.is_reachable = False
    assert load_captioner("owner/name", CPU).kind == "blip"


def test_safetensors_on_main_need_no_proposal(hub):
    hub.revisions["main"] = hub.revisions["refs-pr-7"]
    hub.proposals = []
    assert load_captioner("owner/name", CPU).kind == "blip"


def test_without_safetensors_anywhere_it_says_so(hub):
    hub.proposals = []
    with pytest.raises(UserError, match=r"no .safetensors file .*other formats are never loaded"):
        load_captioner("owner/name", CPU)


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    hub.is_reachable = False
    with pytest.raises(UserError, match="it is not in the local cache, and the hub cannot be reached; give the folder"):
        load_captioner("owner/name", CPU)
    # the configs are in the cache, and the proposal is not
    hub.is_reachable = True
    proposals, hub.proposals = hub.proposals, []
    fetch_transformers("owner/name", "--model", "give a folder")
    hub.proposals, hub.is_reachable = proposals, False
    with pytest.raises(UserError, match="no route; give a folder"):
        fetch_transformers("owner/name", "--model", "give a folder")


def test_a_repository_of_another_layout_is_refused_before_weights_are_downloaded(hub):
    (hub.revisions["main"] / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json, so it is not a model of transformers"):
        load_captioner("owner/name", CPU)
    assert [name for name, _ in hub.downloaded] == ["main"]
