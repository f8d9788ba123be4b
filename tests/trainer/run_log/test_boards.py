"""TensorBoard and W&B: the same names, steps, pictures and settings, read back from their files; failures of W&B."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from safelight.errors import UserError
from safelight.trainer import train as loop
from safelight.trainer.config.schema import Config
from safelight.trainer.run_log import names, wandb_board
from safelight.trainer.run_log.names import METRICS, hparams_of, sample_tag, scalars_of
from safelight.trainer.run_log.wandb_board import WandbBoard, check_wandb

PROMPTS = ["a red circle", "a blue | star"]
TAGS = {sample_tag(0, "", PROMPTS[0]), sample_tag(1, "", PROMPTS[1])}


@pytest.fixture
def logged(small_config, tmp_path):
    """A function that trains a few steps, logged on both boards, and returns the run's folder."""
    pytest.importorskip("wandb")

    def train(steps: int, resume: bool = False, wandb: object = "offline", **log) -> Path:
        config = small_config(
            train={"batch_size": 8, "max_steps": steps},
            stage=[{"epochs": 2}],
            validate={"timesteps": 2},
            sample={"prompts": PROMPTS, "every_epochs": 1, "steps": 2, "cfg": 2.0, "compare_at_end": False},
            log={"every_steps": 1, "tensorboard": True, "wandb": wandb, "wandb_project": "tests", **log},
        )
        config.run.dir = str(tmp_path / "run")
        loop.train(config, resume=resume)
        return tmp_path / "run"

    return train


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected_scalars(run: Path) -> dict[str, dict[int, float]]:
    """Return name -> step -> value of what the boards must show, from metrics.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for row in rows_of(run):
        for name, value in scalars_of(row).items():
            found.setdefault(name, {})[row["step"]] = value
    return found


def records_of(file: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: after a header of 7 bytes LevelDB's log format, in blocks of 32 KiB."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        # a whole record, or the last part of one
        if kind in (1, 4):
            yield parts
            parts = b""


def complete_records(file: Path) -> list:
    """Return the records of a .wandb file, the last of which says that its run has ended.

    A process of wandb's own writes the file. Under load it may still be at it when the run has ended, so that the last
    record is missing or cut short.
    """
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 60
    while True:
        kinds: list[str] = []
        with contextlib.suppress(DecodeError, struct.error):
            records = [wandb_internal_pb2.Record.FromString(data) for data in records_of(file)]
            kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds:
            return records
        assert time.monotonic() < deadline, f"{file} does not end: {kinds[-3:]}"
        time.sleep(0.05)


def read_wandb(run: Path) -> list[tuple[str, list[dict], dict]]:
    """Return (run id, history rows, config) of each offline session, oldest first."""
    sessions = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        run_id, history, config = "", [], {}
        for record in complete_records(file):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                row: dict = {}
                for item in record.history.item:
                    # a picture is a table, whose values come one by one
                    name, *inner = item.nested_key or [item.key]
                    if inner:
                        row.setdefault(name, {})[inner[0]] = json.loads(item.value_json)
                    else:
                        row[name] = json.loads(item.value_json)
                history.append(row)
        sessions.append((run_id, history, config))
    return sessions


@pytest.mark.long
def test_both_boards_show_what_the_log_has(logged):
    run = logged(4)
    expected = expected_scalars(run)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    shown = {name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]}
    assert shown.keys() == expected.keys()
    for name, values in expected.items():
        assert shown[name] == pytest.approx(values, rel=1e-6), name
    assert {"train/loss", "train/memory_gib", "validation/loss/held_out"} <= expected.keys()
    assert "validation/loss_by_timestep_2_of_2/train_subset" in expected
    # a set of pictures before the first step and at each sampling
    steps = sorted(int(path.name[5:]) for path in (run / "samples").iterdir())
    assert set(board.Tags()["images"]) == TAGS
    for number, tag in enumerate(sorted(TAGS)):
        events = board.Images(tag)
        assert [event.step for event in events] == steps
        (file,) = (run / "samples" / f"step-{steps[-1]:08d}").glob(f"*-{number:03d}-*.png")
        picture = Image.open(file)
        assert (events[-1].width, events[-1].height) == picture.size
        assert events[-1].encoded_image_string[:4] == b"\x89PNG"
    texts = {name for name in board.Tags()["tensors"] if name.startswith("settings")}
    assert texts == {"settings/text_summary"}
    text = board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    [optimizer]" in text
    assert "_hparams_/session_start_info" in board.summary_metadata

    # W&B has the same
    ((run_id, history, config),) = read_wandb(run)
    assert run_id == json.loads((run / "wandb.json").read_text())["id"]
    of_wandb: dict[str, dict[int, float]] = {}
    pictures: dict[str, list[int]] = {}
    for row in history:
        for name, value in row.items():
            if isinstance(value, dict):
                pictures.setdefault(name, []).append(row["step"])
                assert value["caption"] in PROMPTS
            elif not name.startswith("_") and name != "step":
                of_wandb.setdefault(name, {})[row["step"]] = value
    assert of_wandb.keys() == expected.keys()
    for name, values in expected.items():
        assert of_wandb[name] == pytest.approx(values), name
    assert pictures == dict.fromkeys(sorted(TAGS), steps)
    assert config["optimizer"]["lr"] == 1e-4
    # nothing of this computer
    everything = json.dumps(config)
    assert str(run) not in everything
    assert str(run.parent) not in everything
    uploaded = {path.name for path in run.glob("wandb/offline-run-*/files/*")}
    assert uploaded <= {"media", "config.yaml", "wandb-summary.json"}


def test_project_team_and_name_are_those_of_the_settings(logged):
    run = logged(1, wandb_entity="darkroom", wandb_name="first light")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    begun = [record.run for record in complete_records(file) if record.WhichOneof("record_type") == "run"]
    assert (begun[0].project, begun[0].entity, begun[0].display_name) == ("tests", "darkroom", "first light")


def test_a_resumed_run_goes_on_with_the_same_wandb_run(logged):
    run = logged(2)
    logged(4, resume=True)
    first, second = read_wandb(run)
    assert first[0] == second[0]
    assert max(row["step"] for row in first[1]) == 2
    assert {row["step"] for row in second[1] if "train/loss" in row} == {3, 4}
    # another project is another run
    logged(5, resume=True, wandb_project="others")
    # sessions of the same second are not in order
    ids = [run_id for run_id, *_ in read_wandb(run)]
    assert (len(ids), ids.count(first[0])) == (3, 2)


def test_without_an_api_key_training_goes_on_and_says_so_once(logged, monkeypatch, capsys, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = logged(4, wandb=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert len(said) == 1
    assert re.fullmatch(r"W&B is off for the rest of this run: .*no API key.*; training goes on", said[0])
    assert rows_of(run)[-1]["step"] == 4


class FakeRun:
    def __init__(self, log):
        self.log, self.finished = log, False

    def define_metric(self, *arguments, **options):
        pass

    def finish(self):
        self.finished = True


def board_with(monkeypatch, tmp_path, begin, said: list[str]) -> WandbBoard:
    monkeypatch.setattr(WandbBoard, "_begin", lambda self: begin())
    config = Config()
    config.log.wandb = "offline"
    return WandbBoard(tmp_path, config, said.append)


def test_a_service_that_fails_is_told_once_and_asked_no_more(monkeypatch, tmp_path):
    calls, said = [], []

    def log(values):
        calls.append(values)
        raise ConnectionError("the network is gone\nand more")

    board = board_with(monkeypatch, tmp_path, lambda: FakeRun(log), said)
    for step in range(50):
        board.write(step, {"train/loss": 0.5})
        time.sleep(0.002)
    board.write_images(50, [("samples/x", "x", Image.new("RGB", (8, 8)))])
    board.close()
    assert len(calls) == 1
    assert said == [
        "W&B is off for the rest of this run: ConnectionError: the network is gone; training goes on",
    ]


def test_a_service_that_hangs_holds_up_neither_steps_nor_the_end(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(wandb_board, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(wandb_board, "MAX_WAITING", 20)
    board = board_with(monkeypatch, tmp_path, lambda: time.sleep(30), said)
    began = time.monotonic()
    for step in range(10):
        board.write(step, {"train/loss": 0.5})
    board.close()
    assert time.monotonic() - began < 5
    assert said == [f"W&B has not taken everything yet; `wandb sync {tmp_path / 'wandb'}/*run-*` sends it"]
    said.clear()
    board = board_with(monkeypatch, tmp_path, lambda: time.sleep(30), said)
    for step in range(30):
        board.write(step, {"train/loss": 0.5})
    board.close()
    assert said == ["W&B is off for the rest of this run: it takes nothing; training goes on"]


def test_a_package_that_is_missing_is_said_before_anything_is_encoded(monkeypatch):
    config = Config()
    check_wandb(config)
    config.log.wandb = "offline"
    monkeypatch.setitem(sys.modules, "wandb", None)
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log.wandb needs the wandb package: pip install wandb"):
        check_wandb(config)


def test_wandb_is_off_unless_asked(small_config, tmp_path, monkeypatch):
    broken = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    config = small_config(train={"max_steps": 1}, sample={"every_epochs": 0}, validate={"every_epochs": 0})
    config.run.dir = str(tmp_path / "run")
    loop.train(config)
    assert not (tmp_path / "run" / "wandb").exists()
    assert not (tmp_path / "run" / "wandb.json").exists()


# the one list of names


def test_every_value_that_a_run_logs_is_in_the_list(logged):
    run = logged(2, wandb=False)
    known = {(metric.kind, metric.name) for metric in METRICS}
    logged_names = {
        (row["kind"], name) for row in rows_of(run) for name, value in row.items() if isinstance(value, float)
    } - {(row["kind"], "time") for row in rows_of(run)}
    assert logged_names <= known
    # the other way round: what this run does not have is of runs that train the text encoder
    assert known - logged_names == {("train", "text_lr")}


def test_the_documentation_lists_the_names():
    text = (Path(__file__).resolve().parents[3] / "docs" / "samples.md").read_text()
    for metric in METRICS:
        unit = f"{metric.unit}" or ""
        assert f"| `{metric.kind}/{metric.name}` | {unit} | {metric.meaning} |".replace("|  |", "| |") in text, metric


def test_names_are_for_boards(tmp_path):
    assert sample_tag(3, "-cfg9", "a / b | c\n" + "x" * 200).startswith("samples/03 a b c")
    assert sample_tag(3, "-cfg9", "").endswith("-cfg9")
    assert len(sample_tag(3, "", "x" * 999)) < 100
    assert scalars_of({"kind": "event", "step": 3, "event": "x", "detail": "y", "time": 3.0}) == {}
    tables = {"run": {"seed": 3, "title": ""}, "optimizer": {"betas": [0.9, 0.99]}, "stage": [{"epochs": 1}]}
    assert hparams_of(tables) == {
        "run.seed": 3,
        "run.title": "",
        "optimizer.betas": "[0.9, 0.99]",
        "stage": "[{'epochs': 1}]",
    }
    assert names.SAMPLES == "samples"
    shutil.rmtree(tmp_path)
