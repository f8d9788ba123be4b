"""Checkpoints by name: last, best, steps, epochs, stages."""

import json
import shutil

import pytest

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import Position, save_checkpoint
from safelight.trainer.config.schema import Config, Stage
from safelight.trainer.config.toml import to_toml
from safelight.trainer.inference.which_checkpoint import best_and_last, best_step, epoch_of, pick_step, pick_steps
from tests.trainer.checkpoints import IDENTITY, Little, writes

# step -> (epoch, step_in_epoch, stage); epochs have 11 steps, and the stages 3 and 2 of them
PLACES = {2: (0, 2, 0), 22: (2, 0, 0), 27: (2, 5, 0), 33: (3, 0, 0), 44: (4, 0, 1), 50: (4, 6, 1), 55: (5, 0, 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(stage=[Stage(epochs=3), Stage(epochs=2)])
    (folder / "config.toml").write_text(to_toml(config))
    stages = [{"epochs": 3, "steps_per_epoch": [11]}, {"epochs": 2, "steps_per_epoch": [11, 12]}]
    (folder / "data.json").write_text(json.dumps({"stages": stages}))
    layer = Little()
    for step, (epoch, step_in_epoch, stage) in PLACES.items():
        position = Position(step, epoch, step_in_epoch, stage, best_step=33, best_loss=0.1)
        save_checkpoint(folder, writes(layer), {}, position, IDENTITY)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        ("last", [55]),
        ("best", [33]),
        ("last,best", [33, 55]),
        ("base", []),
        ("base, best", [33]),
        ("all", list(PLACES)),
        ("22,27", [22, 27]),
        # a step where there is such a checkpoint, else an epoch
        ("2", [2]),
        ("3,4", [33, 44]),
        ("epoch-2,step-2", [2, 22]),
        ("3+1,3+2", [44, 55]),
        ("00000000000000003", [33]),
    ],
)
def test_names_of_checkpoints(whole, names, steps):
    assert pick_steps(whole, names) == steps


WRONG = ("6", "epoch-1", "step-3", "1+", "+1", "-3", "2.5", "²", "9" * 5000, "3++1", "newest", "")


@pytest.mark.parametrize("name", WRONG)
def test_what_names_no_checkpoint_is_refused_with_those_that_there_are(whole, name):
    with pytest.raises(UserError, match=r"is not in .*; use last, best, base or one of 2, 22, .* epoch: 2, 3, 4, 5$"):
        pick_steps(whole, name)


@pytest.mark.parametrize("name", ["2+1", "30+4", "3+2+1+1"])
def test_epochs_of_stages_that_the_run_does_not_have_are_refused(whole, name):
    with pytest.raises(UserError, match=r"the stages of .* have 3, 2 epochs and end after 3, 5; .*, as in 3\+2"):
        pick_step(whole, name)


def test_best_is_named_only_where_it_is_kept(run, tmp_path):
    assert best_and_last(run) == [33, 55]
    for step in (33, 55):
        (run / f"checkpoints/step-{step:08d}/state.json").unlink()
    assert best_step(run) is None
    assert best_and_last(run) == [50]
    with pytest.raises(UserError, match="has no best checkpoint"):
        pick_steps(run, "best,last")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        pick_steps(tmp_path / "new", "all")


def test_the_epoch_of_a_checkpoint_counts_its_steps(run):
    assert [epoch_of(run, step) for step in (22, 27, 50)] == [2, round(2 + 5 / 11, 6), 4.5]
    assert epoch_of(run, 2) == round(2 / 11, 6)
    for stages in ("3", '[{"epochs": "3"}]', "[]", "[[1], [2]]", '[{"epochs": 3}, {"steps_per_epoch": []}]', ""):
        (run / "data.json").write_text(f'{{"stages": {stages}}}')
        assert epoch_of(run, 50) == 4
    (run / "data.json").write_text(json.dumps({"stages": [{"epochs": 9, "steps_per_epoch": [0]}]}))
    assert epoch_of(run, 27) == 2


def test_a_damaged_record_is_named(run):
    (run / "checkpoints" / "step-00000027" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000027 is damaged: state\.json is not readable"):
        pick_steps(run, "3")
