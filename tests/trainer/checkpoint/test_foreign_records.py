"""A state.json from somebody else, whose checksum is right: positions, names and types are checked, nothing hangs."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from safelight.errors import UserError
from safelight.trainer.checkpoint import files
from safelight.trainer.checkpoint.files import (
    SEAL,
    check_files,
    folder_of,
    list_checkpoints,
    max_bytes_of,
    prune,
    read_identity,
    read_position,
)
from safelight.trainer.checkpoint.identity import identify
from tests.trainer.checkpoints import save
from tests.trainer.damaged_text import replaced

ABSURD = (
    None,
    True,
    "x",
    "\x1b]0;x\x07",
    -1,
    -(2**63),
    2**63,
    10**12,
    0.5,
    1e300,
    float("nan"),
    [],
    {},
    [[]],
    {"a": {}},
)


def forge(path: Path, change) -> None:
    """Change a state.json and seal it again, as anybody can."""
    record = json.loads(path.read_text())
    record.pop(SEAL)
    change(record)
    seal = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**record, SEAL: seal}))


def try_records(folder: Path, ours, num: int, seed: int) -> int:
    """Replace a value of a sealed state.json, num times; return how many were refused. Nothing else may happen."""
    path, rng, messages = folder / "state.json", random.Random(seed), []
    sound = path.read_text()
    for _ in range(num):
        content = replaced(sound, rng)
        path.write_bytes(content)
        try:
            if rng.random() < 0.9:
                forge(path, lambda record: None)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            # no JSON object: it stays without a seal
            path.write_bytes(content)
        try:
            check_files(folder)
            identity, stage = read_identity(folder.parent.parent, 7)
            difference = ours.difference(identity, stage)
            text = (
                " ".join(ours.changed_rates(identity, stage, True))
                if difference is None
                else difference.text + difference.value
            )
            assert len(text) < 1000
            read_position(folder.parent.parent, 7)
        except UserError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    return len(messages)


def test_absurd_values_in_a_sealed_record_are_refused_or_differ(folder, make_config):
    ours = identify(make_config(), "fp32")
    forge(folder / "state.json", lambda record: record.update(identity=vars(ours)))
    assert try_records(folder, ours, 300, 3) > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_absurd_values_in_a_sealed_record(folder, make_config, seed):
    ours = identify(make_config(), "fp32")
    forge(folder / "state.json", lambda record: record.update(identity=vars(ours)))
    assert try_records(folder, ours, 2_500, 300 + seed) > 500


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "run", 7)


@pytest.mark.parametrize("name", ["step", "epoch", "step_in_epoch", "stage", "best_step", "best_loss", "unmeasured"])
@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_a_position_of_another_type_or_range_is_one_line(folder, name, value):
    is_sound = name == "best_loss" and type(value) in (float, int, type(None))
    is_sound |= (name == "unmeasured" and value is True) or (name == "best_step" and value == -1)
    forge(folder / "state.json", lambda record: record["position"].update({name: value}))
    if is_sound:
        check_files(folder)
        return
    with pytest.raises(UserError) as refused:
        check_files(folder)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


def test_an_absurd_position_is_named(folder):
    forge(folder / "state.json", lambda record: record["position"].update(step_in_epoch=10**9))
    with pytest.raises(UserError, match="the checkpoint's position does not fit its run: step_in_epoch"):
        read_position(folder.parent.parent, 7)


@pytest.mark.parametrize(
    "name", ["../../config.toml", "/etc/passwd", "unet/../state.safetensors", "./x", "a\0b", "link", ""]
)
def test_checksums_name_only_files_inside_and_each_once(folder, name):
    (folder / "link").symlink_to("state.safetensors")
    forge(folder / "state.json", lambda record: record["sha256"].update({name: "0" * 64}))
    with pytest.raises(UserError, match=r"step-00000007 is damaged: state\.json is not readable"):
        check_files(folder)


@pytest.mark.parametrize(
    "value", [{}, [], None, 3, {f"{number}": "" for number in range(101)}], ids=lambda v: str(v)[:9]
)
def test_a_list_of_checksums_of_another_form_is_refused(folder, value):
    forge(folder / "state.json", lambda record: record.update(sha256=value))
    with pytest.raises(UserError, match="is damaged"):
        check_files(folder)


def test_a_file_that_is_a_pipe_does_not_hang(folder):
    (folder / "state.safetensors").unlink()
    os.mkfifo(folder / "state.safetensors")
    with pytest.raises(UserError, match=r"state\.safetensors is missing or its checksum differs"):
        check_files(folder)


def sparse(path: Path, size: int) -> None:
    os.truncate(path, size)


def claim(path: Path, size: int) -> None:
    """Make the file a sparse one whose header is right."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"a": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


@pytest.mark.parametrize(
    ("name", "enlarge", "said"),
    [
        (
            "state.safetensors",
            sparse,
            r"state\.safetensors is not a whole \.safetensors file \(its tensors",
        ),
        ("state.safetensors", claim, "its files have .* bytes, over the limit of 68,719,476,736"),
        ("unet/diffusion_pytorch_model.safetensors", sparse, r"unet/.* is not a whole \.safetensors file"),
        ("unet/config.json", sparse, r"unet/config\.json has .* bytes, over the limit of 1,048,576"),
    ],
)
def test_a_sparse_file_of_terabytes_is_refused_before_hashing(folder, monkeypatch, name, enlarge, said):
    (folder / "unet" / "config.json").write_text("{}")
    forge(folder / "state.json", lambda record: record["sha256"].update({"unet/config.json": "0" * 64}))
    enlarge(folder / name, 2**41)

    def refuse(*arguments):
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(UserError, match=said) as refused:
        check_files(folder)
    assert str(refused.value).isprintable()


def test_how_large_a_checkpoint_may_be_depends_on_its_model(folder, monkeypatch):
    """63 GiB of a sparse file take minutes to hash, and a tiny model's checkpoint has 30 MiB."""
    others = [save(folder.parent.parent, step) for step in (1, 2)]
    for path in (folder, *others):
        claim(path / "state.safetensors", 63 * 2**30)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed"))
    with pytest.raises(UserError, match=r"over the limit of 268,467,456 for this model; start again from step 0"):
        check_files(folder, max_bytes=max_bytes_of(1000))


def test_of_many_other_checkpoints_few_are_hashed_to_name_an_intact_one(folder, monkeypatch):
    run, hashed = folder.parent.parent, []
    for step in range(1, 7):
        path = save(run, step) / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    (folder / "state.safetensors").write_bytes(b"")
    digest = files._digest
    monkeypatch.setattr(files, "_digest", lambda path: hashed.append(path) or digest(path))
    # those of steps 6, 5 and 4 were found to be damaged; whoever resumes from step 3 checks it
    with pytest.raises(UserError, match=r"resume from step 3, the newest intact one before it"):
        check_files(folder)
    assert {path.parent.name for path in hashed if path.name == "state.safetensors"} == {
        f"step-0000000{step}" for step in (6, 5, 4)
    }
    hashed.clear()
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is not readable .*; resume from step 6"):
        read_position(run, 7)
    assert hashed == []


def test_checkpoints_outside_the_run_folder_are_neither_read_nor_deleted(tmp_path):
    thesis = tmp_path / "thesis"
    for step in (1, 2, 3):
        save(tmp_path / "other", step)
    (tmp_path / "other" / "checkpoints").rename(thesis)
    (thesis / ".step-00000009.partial").mkdir()
    (thesis / "step-00000777").mkdir()
    before = sorted(path.relative_to(thesis) for path in thesis.rglob("*"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(thesis)
    for act in (
        lambda run: prune(run, 1, -1),
        list_checkpoints,
        lambda run: folder_of(run, 1),
        lambda run: save(run, 9),
    ):
        with pytest.raises(UserError, match="leads out of this folder"):
            act(tmp_path / "run")
    assert sorted(path.relative_to(thesis) for path in thesis.rglob("*")) == before
