"""Caching, validation, drawing and evaluating in several processes: the same files as one process makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safelight.data.shards import Cache
from safelight.trainer.checkpoint.files import list_checkpoints
from tests.small_base import small_base
from tests.trainer.distributed import spread_work
from tests.trainer.equal_runs import assert_equal_runs, metrics

# enough for four processes on a busy machine
SLOW_S = 600.0
PROMPTS = ["a red circle", "a blue square", "a green ring"]


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    """A function that copies the dataset, without its cache, to a new place."""

    def copy(name: str) -> Path:
        return shutil.copytree(tiny_dataset, tmp_path / name / "dataset", ignore=shutil.ignore_patterns("cache"))

    return copy


def settings_for(folder: Path, dataset: Path, **tables) -> dict:
    settings = {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base(), "precision": "bf16"},
        "data": {"path": str(dataset), "resolution": 64},
        "train": {"batch_size": 8, "accumulate": 2},
        "optimizer": {"lr": 1e-3},
        "stage": [{"epochs": 1}],
        "sample": {"steps": 2, "prompts": PROMPTS, "every_epochs": 1, "compare_at_end": False},
        "validate": {"timesteps": 2, "every_epochs": 1, "batch_size": 1},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, values in tables.items():
        settings[name] = {**settings[name], **values} if isinstance(settings.get(name), dict) else values
    return settings


def rows_of(dataset: Path) -> dict[str, bytes]:
    """Return the bytes of every row of a cache by its key."""
    with Cache(dataset / "cache") as cache:
        return {address.key: cache.read_at(address).tobytes() for address in cache.addresses()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# phases


def test_what_fails_in_one_process_fails_in_all(processes):
    first, second = processes(spread_work.phases)
    expected = [
        ["Stopped", ""],
        ["UserError", "a photograph has changed"],
        ["Gone", "step-3 is gone"],
        ["OSError", "[Errno 28] No space left on device: 'index.json'"],
        ["OutOfMemoryError", "CUDA out of memory"],
    ]
    assert first[:5] == second[:5] == expected
    # a bug is reported by the process that has it
    assert first[5:] == [["PeerFailed", "rank 1 has failed: KeyError: 'name'"]]
    assert second[5:] == [["KeyError", "'name'"]]


@pytest.mark.long
def test_a_process_that_works_for_longer_than_the_timeout_is_waited_for(processes):
    assert processes(spread_work.wait_for_the_slow, limit_s=1.5, work_s=4.0) == [[5], [6]]


@pytest.mark.long
def test_a_process_stops_as_soon_as_another_has(processes):
    worked, _ = processes(spread_work.stop_early, work_s=20.0)
    assert worked < 5


# caches


def test_processes_fill_a_cache_together_and_draw_class_images_together(processes, dataset, tmp_path):
    prior = {"prompt": "a drawing", "num_images": 5, "steps": 2}
    alone, shared = dataset("alone"), dataset("shared")
    settings = settings_for(tmp_path / "run", alone, data={"variants": 2}, prior=prior)
    (one,) = processes(spread_work.fill_cache, num=1, settings=settings)
    settings["data"]["path"] = str(shared)
    both = processes(spread_work.fill_cache, settings=settings)
    assert rows_of(alone) == rows_of(shared)
    assert files_of(alone / "class_images") == files_of(shared / "class_images")
    assert sum(each["own"] for each in both) == one["own"]
    assert sum(each["drawn"] for each in both) == one["drawn"] == 5
    assert min(each["own"] for each in both) > 0
    for each in both:
        assert each["missing"] == 0
        assert (each["rows"], each["num_encoded"]) == (one["rows"], one["num_encoded"])
        assert all(done == total for done, total in each["last"].values())
    # nothing is encoded again
    again = processes(spread_work.fill_cache, settings=settings)
    assert [each["own"] + each["drawn"] + each["num_encoded"] for each in again] == [0, 0]


@pytest.mark.long
def test_processes_of_a_machine_share_the_check_for_damage(processes, dataset, tmp_path):
    """Each reads its rows once; what is damaged is encoded again, whoever has found it."""
    path = dataset("damaged")
    settings = settings_for(tmp_path / "run", path)
    processes(spread_work.fill_cache, num=1, settings=settings)
    sound = rows_of(path)
    (shard,) = (path / "cache" / "shards").glob("text-*")
    content = bytearray(shard.read_bytes())
    # in the first row and in the second
    num_bytes = len(next(row for key, row in sound.items() if row in bytes(content)))
    for place in (0, num_bytes):
        content[place] ^= 1
    shard.write_bytes(content)
    both = processes(spread_work.fill_cache, settings=settings)
    assert [each["num_damaged"] for each in both] == [2, 2]
    assert [each["num_encoded"] for each in both] == [2, 2]
    assert rows_of(path) == sound
    both = processes(spread_work.fill_cache, settings=settings)
    assert sum(each["num_checked"] for each in both) == len(sound)
    assert min(each["num_checked"] for each in both) > len(sound) // 3


@pytest.mark.slow
def test_a_cache_whose_process_is_killed_is_filled_by_the_others_which_then_end(processes, dataset, tmp_path):
    path = dataset("killed")
    settings = settings_for(tmp_path / "run", path)
    with pytest.raises(AssertionError, match=r"process 0: [\s\S]*Connection closed by peer"):
        processes(spread_work.fill_cache, settings=settings, kill_rank=1, timeout_s=60.0)
    (after,) = processes(spread_work.fill_cache, num=1, settings=settings)
    assert after["missing"] == 0
    alone = dataset("alone")
    settings["data"]["path"] = str(alone)
    processes(spread_work.fill_cache, num=1, settings=settings)
    assert rows_of(path) == rows_of(alone)


# weights that are about to be saved


def test_processes_agree_on_whether_weights_are_ruined(processes):
    """Ruined if one process finds so; not finite if one finds no finite loss; neither if one cannot probe them."""
    nan = float("nan")
    losses = [[0.5, 0.5], [0.5, 99.0], [99.0, 99.0], [0.5, nan], [None, 99.0], [nan, None]]
    expected = [False, True, True, "not finite", False, False]
    assert processes(spread_work.probe_weights, losses=losses) == [expected, expected]


# pictures


def test_pictures_are_drawn_in_the_batches_of_one_process_and_gathered(processes):
    first, second = processes(spread_work.draw_requests, num=2, count=7, batch_size=2, broken=[])
    assert (first["own"], second["own"]) == ([0, 1, 4, 5], [2, 3, 6])
    assert first["pixels"] == second["pixels"] == list(range(7))
    assert first["shown"][0] == [2, 21]


@pytest.mark.long
def test_the_picture_that_one_process_would_meet_first_is_the_one_that_is_not_finite(processes):
    (alone,) = processes(spread_work.draw_requests, num=1, count=7, batch_size=2, broken=[3, 4])
    both = processes(spread_work.draw_requests, num=2, count=7, batch_size=2, broken=[3, 4])
    assert [each["broken"] for each in (alone, *both)] == [3, 3, 3]


# whole runs


@pytest.mark.long
def test_a_run_samples_and_answers_the_same_in_two_processes(processes, tiny_dataset, tmp_path):
    """Its prompt file changes meanwhile, and somebody asks for pictures."""
    folders = [tmp_path / name / "run" for name in ("one", "two")]
    num_drawn = []
    for num, folder in enumerate(folders, 1):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        settings = settings_for(folder, tiny_dataset, sample={"prompts": [], "prompts_file": str(prompts)})
        settings["stage"] = [{"epochs": 2}]
        ended = processes(
            spread_work.disturbed_run,
            num=num,
            settings=settings,
            prompts=["a new prompt", *PROMPTS, "and another"],
            request={"prompts": ["on request", "as well"], "changes": {"steps": 1}},
        )
        num_drawn.append([each["drawn"] for each in ended])
    one, two = folders
    # before, 3 pictures; after each epoch 5; on request 2
    assert num_drawn == [[15], [9, 6]]
    assert_equal_runs(one, two)
    assert len(list(two.glob("samples/live/*.png"))) == 2
    files = [files_of(folder / "samples" / "live") for folder in folders]
    assert files[0] == files[1]
    assert list(two.glob("live/answer-*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["validation", "sampling"])
def test_a_stop_in_one_process_ends_all_and_a_resume_gives_the_whole_run(processes, tiny_dataset, tmp_path, part):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    processes(spread_work.disturbed_run, settings=settings_for(whole, tiny_dataset))
    settings = settings_for(stopped, tiny_dataset)
    ended = processes(spread_work.disturbed_run, settings=settings, stop_in=part)
    assert [each["interrupted"] for each in ended] == [True, True]
    ended = processes(spread_work.disturbed_run, settings=settings, resume=True)
    assert [each["interrupted"] for each in ended] == [False, False]
    assert_equal_runs(whole, stopped)


# commands


@pytest.fixture(scope="module")
def trained(processes, tiny_dataset, tmp_path_factory):
    """A run that was trained in one process."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    processes(spread_work.disturbed_run, num=1, settings=settings_for(folder, tiny_dataset))
    return folder


COMMANDS = {
    "compare": ["compare", "{run}", "--num", "3"],
    "grid": ["grid", "{run}", "--x", "cfg=1,3", "--y", "steps=1,2", "--prompt", "a red circle"],
    "sample": ["sample", "{run}", "--prompt", "a red circle", "--steps", "2", "--cfg", "1", "3"],
    "evaluate": ["evaluate", "{run}", "--num", "3", "--features", "tiny", "--guidance", "5"],
}
# files that say when or where they were made
OTHERWISE = ("report.html", "index.html")


@pytest.mark.parametrize(
    "command", ["compare", *(pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "grid", "sample"))]
)
@pytest.mark.long
def test_commands_make_the_same_files_in_two_processes(processes, trained, tmp_path, command):
    made = []
    for num in (1, 2):
        run = shutil.copytree(trained, tmp_path / str(num) / "run")
        before = files_of(run)
        words = [word.format(run=run) for word in COMMANDS[command]]
        out = tmp_path / f"out{num}"
        assert processes(spread_work.run_command, num=num, words=words, out=str(out)) == [0] * num
        # the main process alone prints
        assert [bool((tmp_path / f"out{num}-{rank}").read_text()) for rank in range(num)] == [True, False][:num]
        found = {name: content for name, content in files_of(run).items() if before.get(name) != content}
        made.append({name: content for name, content in found.items() if not name.endswith(OTHERWISE)})
    one, two = made
    assert one.keys() == two.keys()
    # rows of features are kept in the order in which they were computed
    assert {n: c for n, c in one.items() if n[-4:] != ".bin"} == {n: c for n, c in two.items() if n[-4:] != ".bin"}
    assert {n: len(c) for n, c in one.items()} == {n: len(c) for n, c in two.items()}


# slow


def run_with_patience(processes, num: int, folder: Path, dataset: Path, lr: float, adds_in_order: bool, **more) -> list:
    """Train two stages, the first of which patience may end, and return the steps and events of the run."""
    settings = settings_for(
        folder,
        dataset,
        train={"ema_decay": 0.5, "batch_size": 4, "accumulate": 4},
        stage=[{"epochs": 6, "lr": lr}, {"epochs": 1, "lr": lr, "start_from": "best"}],
        text_encoder={"train": True, "lr": 1e-3, "epochs": 2},
        validate={"patience": 1, "patience_ends": "stage", **more},
    )
    processes(spread_work.disturbed_run, num=num, settings=settings, adds_in_order=adds_in_order, timeout_s=SLOW_S)
    return [(row["step"], row["event"]) for row in metrics(folder) if row["kind"] == "event"]


@pytest.mark.slow
def test_four_processes_that_add_in_the_order_of_one_equal_it_at_any_rate(processes, tiny_dataset, tmp_path):
    """At this rate a last bit grows to a tenth of the loss in three epochs; patience ends the stage of six epochs."""
    for name, num in (("one", 1), ("four", 4)):
        events = run_with_patience(processes, num, tmp_path / name, tiny_dataset, 1e-2, adds_in_order=num == 4)
        # three steps an epoch
        assert {(12, "stage ended early"), (13, "stage began"), (13, "stage begins from the best")} <= {*events}
    assert_equal_runs(tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
def test_patience_ends_a_stage_after_the_same_step_in_four_processes(processes, tiny_dataset, tmp_path):
    """gloo adds four numbers in an order of its own."""
    folders = [tmp_path / name for name in ("one", "four")]
    one, four = (
        run_with_patience(processes, num, folder, tiny_dataset, 1e-3, adds_in_order=False, min_gain=100.0)
        for num, folder in zip((1, 4), folders, strict=True)
    )
    assert one == four
    assert "stage ended early" in [event for _, event in one]
    assert [step for step, event in one if event == "stage began"][-1] < 16
    assert list_checkpoints(folders[0]) == list_checkpoints(folders[1])
    losses = [[row["loss"] for row in metrics(folder) if row["kind"] in ("train", "validation")] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
