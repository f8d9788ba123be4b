"""Kill -9 a run again and again, resume it, and compare it bit for bit with an undisturbed run.

The children come from killed_runs.py. A child kills itself at a chosen point, so that each point is really tested; the
points and their counts come from a seeded generator.
"""

import copy
import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer import train
from safelight.trainer.checkpoint import files as checkpoint
from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.registry.schedules import SCHEDULES
from safelight.trainer.run_log import divergence
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs, metrics
from tests.trainer.families.small_sdxl import write_small_sdxl


def settings_of(folder: Path, dataset: Path, **more) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base(), **more.pop("model", {})},
        "data": {"path": str(dataset), "resolution": 64, "variants": 2, "caption_dropout": 0.2, **more.pop("data", {})},
        "train": {"batch_size": 4, "accumulate": 2, **more.pop("train", {})},
        "optimizer": {"lr": 1e-4, "schedule": "cosine", "warmup_steps": 2, **more.pop("optimizer", {})},
        "stage": [{"epochs": 2}, {"epochs": 2, "lr": 2e-5, "batch_size": 3, "accumulate": 1}],
        "sample": {"steps": 2, "num_prompts": 2, "every_epochs": 2, "cfg": 2.0},
        "validate": {"timesteps": 2, "every_epochs": 2},
        "save": {"every_steps": 3, "every_epochs": 1, "keep": 2},
        "log": {"every_steps": 4, "tensorboard": False},
        **more,
    }


def assert_equal_to_the_last_file(one: Path, other: Path) -> None:
    assert_equal_runs(one, other)
    for step in list_checkpoints(one):
        a, b = (json.loads((checkpoint.folder_of(f, step) / "state.json").read_text()) for f in (one, other))
        assert a == b
    assert len(list(one.glob("samples/*/*"))) == 3 * 3


@pytest.mark.parametrize("optimizer", ["adamw8bit", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.long
def test_killed_and_resumed_equals_uninterrupted(run, tiny_dataset, tmp_path, optimizer):
    alone = settings_of(tmp_path / "alone", tiny_dataset, optimizer={"name": optimizer})
    assert run(alone) == 0
    killed = settings_of(tmp_path / "killed", tiny_dataset, optimizer={"name": optimizer})
    rng = random.Random(f"kills of {optimizer}")
    kills = [
        ("step", rng.randint(1, 2)),
        ("step", rng.randint(4, 5)),
        ("checkpoint file", rng.randint(2, 3)),
        ("before rename", 2),
        ("prune", 2),
        ("half a line", rng.randint(2, 3)),
        ("step", rng.randint(1, 4)),
    ]
    folder = tmp_path / "killed"
    num_killed = 0
    for point, count in kills:
        code = run(killed, resume=bool(list_checkpoints(folder)), point=point, count=count)
        assert code in (0, -signal.SIGKILL)
        num_killed += code != 0
        if code == 0:
            break
    assert num_killed >= 5
    if code != 0:
        assert run(killed, resume=bool(list_checkpoints(folder))) == 0
    assert_equal_to_the_last_file(tmp_path / "alone", folder)
    assert not list(folder.glob("checkpoints/.*")), "leftovers of killed writes are removed"


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "lr"), [("prodigy", 1.0), ("schedulefree_adamw", 1e-3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_and_averages_of_an_optimizer_survive_kills(run, tiny_dataset, tmp_path, optimizer, lr, precision):
    """Prodigy's estimate, and the average of the weights that validation and samples use."""
    pytest.importorskip(OPTIMIZERS[optimizer].package)
    more = {
        "model": {"precision": precision},
        "optimizer": {"name": optimizer, "lr": lr, "schedule": "constant"},
        "stage": [{"epochs": 2}, {"epochs": 2, "lr": 0.5 * lr, "batch_size": 3, "accumulate": 1}],
    }
    alone = settings_of(tmp_path / "alone", tiny_dataset, **copy.deepcopy(more))
    assert run(alone) == 0
    killed = settings_of(tmp_path / "killed", tiny_dataset, **copy.deepcopy(more))
    assert run(killed, point="step", count=5) == -signal.SIGKILL
    assert run(killed, resume=True, point="checkpoint file", count=2) == -signal.SIGKILL
    assert run(killed, resume=True, point="half a line", count=2) == -signal.SIGKILL
    assert run(killed, resume=True) == 0
    assert_equal_to_the_last_file(tmp_path / "alone", tmp_path / "killed")


@pytest.mark.slow
def test_bf16_with_its_master_and_its_moving_average_resumes_bit_for_bit(run, tiny_dataset, tmp_path):
    more = {"model": {"precision": "bf16"}, "train": {"ema_decay": 0.9}}
    alone = settings_of(tmp_path / "alone", tiny_dataset, **copy.deepcopy(more))
    assert run(alone) == 0
    killed = settings_of(tmp_path / "killed", tiny_dataset, **copy.deepcopy(more))
    assert run(killed, point="step", count=8) == -signal.SIGKILL
    assert run(killed, resume=True) == 0
    assert_equal_to_the_last_file(tmp_path / "alone", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sdxl_with_its_moving_average_resumes_bit_for_bit(run, tiny_dataset, tmp_path, precision):
    """Two text encoders, sizes of jittered and mirrored crops, captions dropped for zeros."""
    base = write_small_sdxl(tmp_path / "base")
    more = {
        "model": {"base": str(base), "precision": precision},
        "train": {"ema_decay": 0.9},
        "data": {"crop_jitter": 0.2, "flip_p": 0.5},
    }
    alone = settings_of(tmp_path / "alone", tiny_dataset, **copy.deepcopy(more))
    assert run(alone) == 0
    killed = settings_of(tmp_path / "killed", tiny_dataset, **copy.deepcopy(more))
    assert run(killed, point="step", count=5) == -signal.SIGKILL
    assert run(killed, resume=True, point="checkpoint file", count=2) == -signal.SIGKILL
    assert run(killed, resume=True) == 0
    assert_equal_to_the_last_file(tmp_path / "alone", tmp_path / "killed")


def test_a_run_stopped_at_any_moment_resumes_as_if_never_stopped(run, tiny_dataset, tmp_path):
    """Stops requested in steps, validation and sampling, again and again: nothing is done twice or left out."""
    short = {
        "stage": [{"epochs": 2}],
        "validate": {"timesteps": 2},
        "sample": {"steps": 2, "num_prompts": 2, "every_epochs": 1, "cfg": 2.0},
    }
    assert run(settings_of(tmp_path / "alone", tiny_dataset, **copy.deepcopy(short))) == 0
    config = parse_config(settings_of(tmp_path / "stopped", tiny_dataset, **short), "test")
    rng = random.Random("stops")
    reached, result = [], None
    while result is None or result.interrupted:
        # validation and sampling check for a stop several times: some stops interrupt them, some come later
        stops = iter([False] * rng.randint(1, 12))
        result = train.train(config, resume=True, stop_requested=lambda stops=stops: next(stops, True))
        reached.append(result.position)
    assert reached[0].step == 0, "a stop before the first step leaves nothing to save"
    assert sum(position.unmeasured for position in reached[1:]) >= 1
    assert sum(0 < position.step < reached[-1].step and not position.unmeasured for position in reached) >= 1
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "stopped")
    last = [checkpoint.folder_of(tmp_path / name, reached[-1].step) for name in ("alone", "stopped")]
    assert last[0].joinpath("state.json").read_bytes() == last[1].joinpath("state.json").read_bytes()
    drawn = sorted(path.relative_to(tmp_path / "alone") for path in tmp_path.glob("alone/samples/*/*"))
    assert all((tmp_path / "alone" / path).read_bytes() == (tmp_path / "stopped" / path).read_bytes() for path in drawn)


def test_cudnn_benchmark_is_refused_in_a_deterministic_run(tiny_dataset, tmp_path):
    settings = settings_of(tmp_path / "run", tiny_dataset, train={"cudnn_benchmark": True})
    settings["run"]["deterministic"] = True
    with pytest.raises(
        ValueError, match=r"train.cudnn_benchmark does not go with run.deterministic: .* set one of them to false"
    ):
        train.train(parse_config(settings, "test"))


def test_torch_flags_are_set_during_a_run_and_restored_after_it(tiny_dataset, tmp_path, monkeypatch):
    def fills() -> bool:
        """Return whether a deterministic run would fill what is allocated without values, a pass over each."""
        return torch.utils.deterministic.fill_uninitialized_memory

    seen = []
    original = train.train_step

    def watched(*args, **kwargs):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, fills()))
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", watched)
    for wanted in (True, False):
        settings = settings_of(tmp_path / str(wanted), tiny_dataset, sample={"every_epochs": 0}, train={"max_steps": 2})
        settings["run"]["deterministic"], settings["train"]["cudnn_benchmark"] = wanted, not wanted
        train.train(parse_config(settings, "test"))
    assert seen == [(True, False, False)] * 2 + [(False, True, True)] * 2
    after = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, fills()
    assert after == (False, False, True)
    states = [load_file(checkpoint.folder_of(tmp_path / str(w), 2) / "state.safetensors") for w in (True, False)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_saving_by_steps_alone_also_saves_at_epoch_ends(tiny_dataset, tmp_path):
    """With save.every_steps 1, the last step of an epoch is saved at the epoch's end."""
    settings = settings_of(tmp_path / "run", tiny_dataset, save={"every_steps": 1, "every_epochs": 0, "keep": 50})
    settings["stage"] = [{"epochs": 2}]
    settings["validate"] = {"every_epochs": 0}
    settings["sample"]["every_epochs"] = 0
    result = train.train(parse_config(settings, "test"))
    assert list_checkpoints(tmp_path / "run") == list(range(1, result.position.step + 1))


def test_a_run_that_learns_nothing_stops(tiny_dataset, tmp_path, monkeypatch):
    """Gradients that stay non-finite end the run with a line, instead of hours of nothing."""
    original = train.train_step

    def poisoned(context, *args, **kwargs):
        context.unet.conv_in.bias.register_hook(lambda grad: grad * float("nan"))
        return original(context, *args, **kwargs)

    monkeypatch.setattr(train, "train_step", poisoned)
    monkeypatch.setattr(divergence, "MAX_LOST_IN_A_ROW", 3)
    settings = settings_of(tmp_path / "run", tiny_dataset)
    settings["sample"]["every_epochs"] = 0
    with pytest.raises(ValueError, match=r"^step 3: the gradients have not been finite since step 1: "):
        train.train(parse_config(settings, "test"))


def test_resuming_before_the_first_checkpoint_starts(tiny_dataset, tmp_path):
    settings = settings_of(tmp_path / "run", tiny_dataset, sample={"every_epochs": 0})
    settings["stage"] = [{"epochs": 1}]
    assert train.train(parse_config(settings, "test"), resume=True).position.epoch == 1


# a rate is a function of the step alone (test_schedules.py), so resuming goes down one path for all of them
FAST_SCHEDULES = ("constant", "cosine")


@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=[] if name in FAST_SCHEDULES else pytest.mark.slow) for name in SCHEDULES]
)
def test_a_run_resumes_bit_for_bit_within_any_schedule(small_config, tmp_path, schedule):
    """Stopped in the middle of the first epoch, and again in the second: rates are a function of the step alone."""

    def config(name: str):
        return small_config(
            run={"dir": str(tmp_path / name)},
            data={"max_aspect": 1.0},
            train={"batch_size": 4},
            optimizer={"name": "adamw", "lr": 1e-3, "schedule": schedule, "warmup_steps": 1, "lr_end": 0.1},
            stage=[{"epochs": 2}],
            validate={"every_epochs": 0},
            sample={"every_epochs": 2, "num_prompts": 1, "steps": 1, "cfg": 1.0},
            save={"every_steps": 1, "keep": 20},
            log={"every_steps": 1, "tensorboard": False},
        )

    train.train(config("alone"))
    rates = [row["lr"] for row in metrics(tmp_path / "alone") if row["kind"] == "train"]
    assert len(rates) >= 6
    # the first is that of the warm-up
    assert (len(set(rates[1:])) == 1) == (schedule == "constant")
    for num_steps in (2, len(rates) - 1):

        def reached(num_steps: int = num_steps) -> bool:
            if not (tmp_path / "stopped" / "metrics.jsonl").exists():
                return False
            steps = [row["step"] for row in metrics(tmp_path / "stopped") if row["kind"] == "train"]
            return max(steps, default=0) >= num_steps

        result = train.train(config("stopped"), resume=True, stop_requested=reached)
        assert (result.interrupted, result.position.step) == (True, num_steps)
    train.train(config("stopped"), resume=True)
    assert_equal_runs(tmp_path / "alone", tmp_path / "stopped")
