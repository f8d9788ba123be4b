"""Checkpoints: whole or not there, the right ones kept, damage named, another run's refused, the state complete."""

import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from safelight.__main__ import main
from safelight.data.ingest import ingest
from safelight.trainer import checkpoint
from safelight.trainer.checkpoint import (
    Position,
    check_files,
    folder_of,
    list_checkpoints,
    load_checkpoint,
    prune,
    read_identity,
    save_checkpoint,
)
from safelight.trainer.config import Optimizer, parse_config, to_toml
from safelight.trainer.draw import pick_step
from safelight.trainer.identity import Identity, identify
from safelight.trainer.optim import UNetOptimizer
from safelight.trainer.train import train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IDENTITY = Identity({"run.seed": 1}, [{"epochs": 2, "lr": 1e-4}], "rows")
POSITION = Position(step=7, epoch=1, step_in_epoch=2, stage=0, best_step=3, best_loss=0.125)


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    ).train()  # fmt: skip


def save(run_dir: Path, step: int, unet=None, state=None) -> Path:
    state = {"a/b": torch.arange(4.0)} if state is None else state
    return save_checkpoint(run_dir, unet or Little(), state, replace(POSITION, step=step), IDENTITY)


class Little(torch.nn.Linear):
    """The least that can be saved like a UNet."""

    def __init__(self):
        super().__init__(2, 2)

    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        assert safe_serialization
        folder.mkdir()
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")


# there and back


def test_a_checkpoint_comes_back(tmp_path):
    unet, other = make_unet(1), make_unet(2)
    state = {"master/x": torch.randn(3), "step/x": torch.tensor(5.0)}
    folder = save_checkpoint(tmp_path, unet, state, POSITION, IDENTITY)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    found, position = load_checkpoint(tmp_path, 7, other)
    assert position == POSITION
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    weights = unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())
    assert read_identity(tmp_path, 7) == (IDENTITY, 0)


def test_its_files_are_diffusers_own_and_hold_nothing_that_can_run(tmp_path):
    unet = make_unet(1)
    folder = save_checkpoint(tmp_path, unet, {"x/y": torch.ones(1)}, POSITION, IDENTITY)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "state.json", "state.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    loaded = UNet2DConditionModel.from_pretrained(folder / "unet")
    weights = unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


def test_no_best_so_far_comes_back(tmp_path):
    save_checkpoint(tmp_path, Little(), {}, Position(step=1), IDENTITY)
    text = (folder_of(tmp_path, 1) / "state.json").read_text()
    # JSON proper has no Infinity
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert load_checkpoint(tmp_path, 1, Little())[1] == Position(step=1)


# whole or not there


class Killed(BaseException):
    """Nothing is cleared away after it."""


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
    # a full disk gets its room back at once
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


def test_what_is_deleted_first_stops_counting(tmp_path, monkeypatch):
    """Killed between record and folder, the checkpoint is gone rather than half there."""
    for step in (1, 2):
        save(tmp_path, step)

    def fail(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", fail)
        with pytest.raises(Killed):
            prune(tmp_path, 1, -1)
    assert list_checkpoints(tmp_path) == [2]
    prune(tmp_path, 1, -1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


# damage


@pytest.mark.parametrize("name", ["state.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
@pytest.mark.parametrize("how", ["one bit", "cut", "gone"])
def test_damage_is_found_and_named(tmp_path, name, how):
    folder = save_checkpoint(tmp_path, make_unet(), {"x/y": torch.ones(5)}, POSITION, IDENTITY)
    path = folder / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"step-00000007 is damaged: {name} is missing or its checksum differs; "):
        check_files(folder)


def test_the_newest_sound_one_before_is_offered_with_the_commands(tmp_path):
    """Of four checkpoints the last and the one before it are damaged; the commands are run as they are told."""
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    for step in (6, 8):
        path = folder_of(tmp_path, step) / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="go on from step 4, the sound one before it: ") as caught:
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
    with pytest.raises(ValueError, match=r"step-00000001 is of another UNet than .*; give model\.base") as caught:
        load_checkpoint(tmp_path, 1, Little())
    assert "\n" not in str(caught.value)


def test_a_record_that_is_damaged_or_of_another_version_is_named(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1; use the version that wrote it"):
        load_checkpoint(tmp_path, 1, Little())
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"step-00000001 is damaged: state\.json is not readable .*; start again"):
        load_checkpoint(tmp_path, 1, Little())


# the optimizer's state


def steps(unet, optimizer: UNetOptimizer, first: int, last: int) -> list[torch.Tensor]:
    """Take steps with gradients that depend on the step alone, of which step 1 has an infinite one; return the norms."""
    norms = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if number == 1:
            unet.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        norms.append(optimizer.step(1e-3 / (number + 1), 0.01, 0.5)[0])
    return norms


@pytest.mark.parametrize("name", ["adamw", "bnb_adamw8bit", "adamw8bit"])
@pytest.mark.parametrize("precision", DTYPES)
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path, name, precision):
    config = Optimizer(name=name, lr=1e-3)
    unet = make_unet(1)
    optimizer = UNetOptimizer(unet, config, DTYPES[precision])
    steps(unet, optimizer, 0, 3)
    save_checkpoint(tmp_path, unet, optimizer.state_tensors(), POSITION, IDENTITY)

    resumed_unet = make_unet(2)
    resumed = UNetOptimizer(resumed_unet, config, DTYPES[precision])
    resumed.load_state_tensors(load_checkpoint(tmp_path, 7, resumed_unet)[0])
    scale = resumed.loss_scale.scale.item()
    assert scale == (2.0**15 if precision == "fp16" else 1.0), "the infinite gradient halved it"

    for norm, resumed_norm in zip(steps(unet, optimizer, 3, 6), steps(resumed_unet, resumed, 3, 6), strict=True):
        assert torch.equal(norm, resumed_norm)
    weights = unet.state_dict()
    assert {value.dtype for value in weights.values()} == {DTYPES[precision]}
    for key, value in resumed_unet.state_dict().items():
        assert torch.equal(value, weights[key]), key
    state, resumed_state = optimizer.state_tensors(), resumed.state_tensors()
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(state[key], resumed_state[key]) for key in state)
    beside = "remainder/" if name == "adamw8bit" else "master/"
    assert any(key.startswith(beside) for key in state) == (precision != "fp32")
    if name != "adamw":
        assert {value.dtype for key, value in state.items() if key.startswith("state1/")} == {
            torch.uint8,
            torch.float32,
        }


def test_the_state_is_a_copy(tmp_path):
    unet = make_unet()
    optimizer = UNetOptimizer(unet, Optimizer(name="adamw"), torch.bfloat16)
    steps(unet, optimizer, 0, 1)
    state = optimizer.state_tensors()
    before = {key: value.clone() for key, value in state.items()}
    steps(unet, optimizer, 2, 3)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_state_of_another_optimizer_precision_or_unet_is_refused():
    unet = make_unet()
    optimizer = UNetOptimizer(unet, Optimizer(name="adamw"))
    steps(unet, optimizer, 0, 1)
    state = optimizer.state_tensors()
    with pytest.raises(ValueError, match="are not of optimizer adamw8bit"):
        UNetOptimizer(make_unet(), Optimizer(name="adamw8bit")).load_state_tensors(state)
    with pytest.raises(ValueError, match=r"no fp32 master of conv_in.* it was saved at another precision"):
        UNetOptimizer(make_unet(), Optimizer(name="adamw"), torch.bfloat16).load_state_tensors(state)
    with pytest.raises(ValueError, match="names elsewhere, which this UNet does not train"):
        optimizer.load_state_tensors({**state, "exp_avg/elsewhere": torch.ones(1)})
    with pytest.raises(ValueError, match=r"moments of conv_in\.weight have shape \(3,\), not"):
        optimizer.load_state_tensors({**state, "exp_avg/conv_in.weight": torch.ones(3)})


# another run's checkpoint

RUN = {
    "optimizer": {"lr": 1e-3, "name": "adamw"},
    "train": {"batch_size": 4},
    "stage": [{"epochs": 2}, {"epochs": 1, "lr": 1e-4}],
}


def difference(stage: int, /, **changes: dict | list) -> str:
    """Return what a config with tables changed is told by a checkpoint of RUN that stands in a stage."""
    changed = {**RUN}
    for table, values in changes.items():
        changed[table] = {**RUN.get(table, {}), **values} if isinstance(values, dict) else values
    reached = identify(parse_config(RUN, "here"), "fp32")
    here = identify(parse_config(changed, "here"), "fp32")
    return here.difference(Identity(**json.loads(json.dumps(vars(reached)))), stage)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": {"seed": 5}}, "run.seed is 5 here and 20230801 there"),
        ({"model": {"base": "random:small"}}, "model.base is 'random:small' here and 'tiny' there"),
        ({"optimizer": {"name": "adamw8bit"}}, "optimizer.name is 'adamw8bit' here and 'adamw' there"),
        ({"optimizer": {"betas": [0.8, 0.999]}}, "optimizer.betas is [0.8, 0.999] here and [0.9, 0.999] there"),
        ({"data": {"caption_dropout": 0.5}}, "data.caption_dropout is 0.5 here and 0.04 there"),
        ({"loss": {"min_snr_gamma": 5}}, "loss.min_snr_gamma is 5.0 here and 0.0 there"),
        ({"optimizer": {"lr": 2e-3}}, "stage 1's lr is 0.002 here and 0.001 there"),
        ({"train": {"batch_size": 2}}, "stage 1's batch_size is 2 here and 4 there"),
        (
            {"stage": [{"epochs": 3}]},
            "stage 1's epochs is 3 here and 2 there, and a stage that has begun keeps its length: add a [[stage]] to train longer",
        ),
    ],
)
def test_a_change_of_what_was_trained_is_named(changes, expected):
    assert difference(0, **changes) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run": {"dir": "elsewhere", "device": "cuda"}},
        {"data": {"path": "elsewhere"}},
        {"train": {"max_steps": 9, "checkpointing": "full", "epochs": 7}},
        {"sample": {"prompts": ["a cat"], "steps": 9}},
        {"validate": {"every_epochs": 5}},
        {"save": {"keep": 9}},
        {"log": {"every_steps": 1, "tensorboard": False}},
        {"stage": [{"epochs": 2, "lr": 1e-3}, {"epochs": 9, "lr": 1e-5, "batch_size": 1}]},
        {"stage": [{"epochs": 2}]},
        {"stage": [*RUN["stage"], {"epochs": 9}]},
    ],
)
def test_what_is_still_to_come_and_what_is_only_shown_may_change(changes):
    assert difference(0, **changes) == ""


def test_a_stage_that_was_reached_is_fixed():
    later = {"stage": [{"epochs": 2}, {"epochs": 1, "lr": 1e-5}]}
    assert difference(0, **later) == ""
    assert difference(1, **later) == "stage 2's lr is 1e-05 here and 0.0001 there"
    assert difference(1, stage=[{"epochs": 2}]) == "stage 2, which it has reached, is missing here"


def test_auto_precision_is_compared_by_what_it_came_to():
    auto, explicit = (parse_config({"model": {"precision": name}}, "here") for name in ("auto", "bf16"))
    assert identify(explicit, "bf16").difference(identify(auto, "bf16"), 0) == ""
    assert (
        identify(auto, "fp32").difference(identify(auto, "bf16"), 0)
        == "model.precision is 'fp32' here and 'bf16' there"
    )


# a whole run


@pytest.fixture
def quick(make_config):
    """A function that returns the config of a run of one short epoch, with tables changed."""

    def make(**changes):
        values = {
            "train": {"batch_size": 100}, "optimizer": {"name": "adamw"}, "sample": {"every_epochs": 0},
            "validate": {"max_images": 2, "timesteps": 1}, "stage": [{"epochs": 1}], "log": {"every_steps": 1},
        }  # fmt: skip
        for table, change in changes.items():
            values[table] = {**values.get(table, {}), **change} if isinstance(change, dict) else change
        return make_config(**values)

    return make


def test_a_later_stage_may_be_added_and_a_finished_one_not_changed(quick):
    first = train(quick())
    run_dir = first.run_dir
    assert not first.interrupted
    with pytest.raises(ValueError, match=f"already holds a run .at step {first.position.step}.; add --resume, or name"):
        train(quick())
    with pytest.raises(ValueError, match=r"belongs to other settings: stage 1's lr is 0\.001 here and 0\.0001 there"):
        train(quick(optimizer={"lr": 1e-3}), resume=True)
    assert list_checkpoints(run_dir) == [first.position.step]
    more = train(quick(stage=[{"epochs": 1}, {"epochs": 1, "lr": 5e-5}]), resume=True)
    assert (more.position.step, more.position.stage) == (2 * first.position.step, 1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates == [1e-4] * first.position.step + [5e-5] * first.position.step


def test_other_photographs_are_refused(quick, tiny_dataset, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    config = quick(data={"path": str(dataset)}, train={"max_steps": 1})
    train(config)
    photo = shutil.copy(tiny_dataset.parent / "photos" / "000.png", tmp_path / "one more.png")
    Image.open(photo).rotate(180).save(photo)
    ingest([photo], dataset)
    with pytest.raises(ValueError, match=r"trained on other photographs, captions or crops than .*dataset has now"):
        train(config, resume=True)


def test_a_run_keeps_its_last_checkpoints_and_its_best(quick):
    config = quick(stage=[{"epochs": 3}], train={"batch_size": 8}, save={"every_steps": 1, "keep": 2})
    outcome = train(config)
    steps, best = list_checkpoints(outcome.run_dir), outcome.position.best_step
    last = outcome.position.step
    assert steps == sorted({last - 1, last} | ({best} if best > 0 else set()))
    rows = [json.loads(line) for line in (outcome.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row.get("split") == "held_out"}
    assert best == min(losses, key=losses.get)
    if best > 0:
        assert pick_step(outcome.run_dir, "best") == best
    assert pick_step(outcome.run_dir, "last") == last


def test_a_damaged_checkpoint_can_be_deleted_and_the_run_goes_on(quick, tmp_path, capsys):
    config = quick(stage=[{"epochs": 1}], train={"batch_size": 8}, save={"every_steps": 1, "keep": 2})
    last = train(config).position.step
    whole = load_file(folder_of(tmp_path / "run", last) / "unet" / "diffusion_pytorch_model.safetensors")
    path = folder_of(tmp_path / "run", last) / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(config))
    capsys.readouterr()
    assert main(["train", str(toml), "--resume"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"safelight train: checkpoint {path.parent} is damaged: state.safetensors")
    shutil.rmtree(path.parent)
    assert train(config, resume=True).position.step == last
    again = load_file(folder_of(tmp_path / "run", last) / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
