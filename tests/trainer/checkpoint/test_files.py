"""Checkpoints are complete or absent, the right ones are kept, and damage is named."""

import json
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint import files as checkpoint
from safelight.trainer.checkpoint.files import (
    Position,
    check_files,
    folder_of,
    list_checkpoints,
    load_checkpoint,
    prune,
    read_identity,
    save_checkpoint,
)
from tests.trainer.checkpoints import IDENTITY, POSITION, Little, make_unet, save, writes

# round trip


def test_a_checkpoint_comes_back(tmp_path):
    unet, other = make_unet(1), make_unet(2)
    state = {"master/x": torch.randn(3), "step/x": torch.tensor(5.0)}
    folder = save_checkpoint(tmp_path, writes(unet), state, POSITION, IDENTITY)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    found, position = load_checkpoint(tmp_path, 7, FullFineTune(other))
    assert position == POSITION
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    weights = unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())
    assert read_identity(tmp_path, 7) == (IDENTITY, 0)


def test_its_files_are_diffusers_own_and_hold_nothing_that_can_run(tmp_path):
    unet = make_unet(1)
    folder = save_checkpoint(tmp_path, writes(unet), {"x/y": torch.ones(1)}, POSITION, IDENTITY)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"state.json", "state.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    loaded = UNet2DConditionModel.from_pretrained(folder / "unet")
    weights = unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


def test_no_best_so_far_comes_back(tmp_path):
    save_checkpoint(tmp_path, writes(Little()), {}, Position(step=1), IDENTITY)
    text = (folder_of(tmp_path, 1) / "state.json").read_text()
    # JSON proper has no Infinity
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert load_checkpoint(tmp_path, 1, FullFineTune(Little()))[1] == Position(step=1)


# complete or absent


class Killed(BaseException):
    """Stands for kill -9: no exception handler cleans up after it."""


@pytest.mark.parametrize("how", [Killed, OSError])
@pytest.mark.parametrize("where", ["save_file", "_sync_file", "_digest", "atomic_write_text", "sync_folder"])
def test_what_was_broken_off_does_not_count_and_is_cleared_away(tmp_path, monkeypatch, where, how):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:

        def fail(*args, **kwargs):
            raise how

        patch.setattr(checkpoint, where, fail)
        with pytest.raises(how):
            save(tmp_path, 2)
    assert list_checkpoints(tmp_path) == [1]
    # after an error, the partial folder is removed at once to free the disk
    assert len(list((tmp_path / "checkpoints").glob(".step-00000002.partial"))) == (how is Killed)
    save(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]
    check_files(folder_of(tmp_path, 3))


def test_a_folder_without_its_record_is_none_and_its_step_can_be_saved_again(tmp_path):
    """A kill in the middle of deleting leaves such a folder."""
    save(tmp_path, 5)
    (folder_of(tmp_path, 5) / "state.json").unlink()
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 5)
    assert list_checkpoints(tmp_path) == [5]
    check_files(folder_of(tmp_path, 5))


def test_folders_of_other_names_are_left_alone(tmp_path):
    save(tmp_path, 5)
    for name in ("step-5", "step-00000005-backup", "step-abcdefgh", "mine"):
        shutil.copytree(folder_of(tmp_path, 5), tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "mine" / "state.json").unlink()
    assert list_checkpoints(tmp_path) == [5]
    save(tmp_path, 6)
    prune(tmp_path, 1, -1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["mine", "step-00000005-backup", "step-00000006", "step-5", "step-abcdefgh"]


@pytest.mark.parametrize("name", [".step-00000099.partial", ".step-x\n.partial", "step-00000099"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_somebody_planted_under_an_unfinished_name_stops_no_save(tmp_path, name, kind):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.png").touch()
    planted = save(tmp_path, 5).with_name(name)
    if kind == "file":
        planted.touch()
    else:
        planted.symlink_to("../samples" if kind == "link" else "nothing")
    save(tmp_path, 6)
    assert sorted(path.name for path in planted.parent.iterdir()) == ["step-00000005", "step-00000006"]
    assert (tmp_path / "samples" / "mine.png").exists()


# which are kept


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(2, -1, [8, 10]), (1, 4, [4, 10]), (1, 10, [10]), (2, 8, [8, 10]), (3, 0, [6, 8, 10]), (9, -1, [2, 4, 6, 8, 10])],
)
def test_the_last_ones_and_the_best_are_kept(tmp_path, keep, best, expected):
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    prune(tmp_path, keep, best)
    assert list_checkpoints(tmp_path) == expected
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in expected]


def test_a_link_is_deleted_and_not_the_checkpoint_that_it_leads_to(tmp_path):
    save(tmp_path, 7)
    folder_of(tmp_path, 1).symlink_to("step-00000007")
    save(tmp_path, 8)
    prune(tmp_path, 2, -1)
    assert list_checkpoints(tmp_path) == [7, 8]
    check_files(folder_of(tmp_path, 7))


def test_what_is_deleted_first_stops_counting(tmp_path, monkeypatch):
    """A kill between deleting state.json and the folder leaves no checkpoint rather than half of one."""
    for step in (1, 2):
        save(tmp_path, step)

    def fail(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", fail)
        with pytest.raises(Killed):
            prune(tmp_path, 1, -1)
    assert list_checkpoints(tmp_path) == [2]
    prune(tmp_path, 1, -1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


# damage


@pytest.mark.parametrize("name", ["state.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
@pytest.mark.parametrize("how", ["one bit", "cut", "gone"])
def test_damage_is_found_and_named(tmp_path, name, how):
    folder = save_checkpoint(tmp_path, writes(make_unet()), {"x/y": torch.ones(5)}, POSITION, IDENTITY)
    path = folder / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    flaw = r"(missing or its checksum differs|not a whole \.safetensors file \(.*\))"
    with pytest.raises(ValueError, match=rf"step-00000007 is damaged: {name} is {flaw}; "):
        check_files(folder)


def test_the_newest_sound_one_before_is_offered_with_the_commands(tmp_path):
    """The last two of four checkpoints are damaged; the suggested commands are run as printed."""
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    for step in (6, 8):
        path = folder_of(tmp_path, step) / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="resume from step 4, the newest intact one before it: ") as caught:
        check_files(folder_of(tmp_path, 8))
    assert "\n" not in str(caught.value)
    *moves, train_command = str(caught.value).split("before it: ")[1].split(" && ")
    assert train_command == f"safelight train {tmp_path / 'config.toml'} --resume"
    for move in moves:
        subprocess.run(shlex.split(move), check=True)
    assert list_checkpoints(tmp_path) == [2, 4]
    check_files(folder_of(tmp_path, 4))
    assert len(list((tmp_path / "checkpoints").glob("*.damaged"))) == 2


def test_without_a_sound_one_before_the_start_is_offered(tmp_path):
    path = save(tmp_path, 3) / "state.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="start again from step 0: mv "):
        check_files(folder_of(tmp_path, 3))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_to_read_a_damaged_checkpoint_the_newest_intact_one_of_any_step_is_offered(tmp_path, name):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damaged, newest = (folder_of(tmp_path, step) for step in (1, 3))
    (damaged / name).write_bytes(b"{")
    for function in (check_files, checkpoint.read_record)[: 1 + (name == "state.json")]:
        with pytest.raises(
            ValueError, match=r"step-00000001 is damaged: .*; use --checkpoint 3, the newest intact one"
        ):
            function(damaged, to_resume=False)
    (newest / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"use --checkpoint 2, the newest intact one$"):
        check_files(damaged, to_resume=False)
    (folder_of(tmp_path, 2) / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"start again from step 0: mv .* && mv .* && mv "):
        check_files(damaged, to_resume=False)


def test_any_flipped_bit_of_the_record_is_found_or_harmless(tmp_path):
    path = save(tmp_path, 7) / "state.json"
    content, record = path.read_bytes(), checkpoint.read_record(path.parent)
    rng = np.random.default_rng(3)
    num_found = 0
    for position in rng.permutation(8 * len(content))[:400]:
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            again = checkpoint.read_record(path.parent)
        except ValueError:
            num_found += 1
        else:
            assert {name: again[name] for name in record} == record
    assert num_found > 300


def test_a_checkpoint_of_another_unet_is_one_line(tmp_path):
    torch.manual_seed(1)
    save(tmp_path, 1, unet=make_unet())
    with pytest.raises(ValueError, match=r"step-00000001 does not fit the UNet of .*; set model\.base") as caught:
        load_checkpoint(tmp_path, 1, FullFineTune(Little()))
    assert "\n" not in str(caught.value)


def test_a_record_that_is_damaged_or_of_another_version_is_named(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1; use the version that wrote it"):
        load_checkpoint(tmp_path, 1, FullFineTune(Little()))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"step-00000001 is damaged: state\.json is not readable .*; start again"):
        load_checkpoint(tmp_path, 1, FullFineTune(Little()))
