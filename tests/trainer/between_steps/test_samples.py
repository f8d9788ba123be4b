"""Samples while training: prompt files that change, several cfgs, pictures on request."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from safelight.errors import UserError
from safelight.trainer import train as loop
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.inference import live_request
from safelight.trainer.inference.live_request import LiveInbox, ask
from tests.trainer.equal_runs import assert_equal_runs, metrics
from tests.trainer.inference.a1111 import parse_parameters


def few_steps(small_config, folder: Path, **more):
    """Return the config of a run of six steps in three epochs, which samples after each."""
    settings = {
        "train": {"batch_size": 8, "max_steps": 6, **more.pop("train", {})},
        "stage": [{"epochs": 3}],
        "log": {"every_steps": 1, "tensorboard": False},
        "validate": {"every_epochs": 0},
        "save": {"every_epochs": 1, "keep": 9},
        "sample": {"every_epochs": 1, "steps": 2, "cfg": 2.0, "num_prompts": 1, "compare_at_end": False},
    }
    settings["sample"] |= more.pop("sample", {})
    config = small_config(**settings | more)
    config.run.dir = str(folder)
    return config


def index_of(run: Path, step: int) -> dict:
    return json.loads((run / "samples" / f"step-{step:08d}" / "index.json").read_text())


def assert_equal_weights(one: Path, other: Path) -> None:
    assert list_checkpoints(one) == list_checkpoints(other) != []
    for step in list_checkpoints(one):
        for name in ("unet/diffusion_pytorch_model.safetensors", "state.safetensors"):
            a, b = (load_file(folder_of(folder, step) / name) for folder in (one, other))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key].view(-1).view(torch.uint8), b[key].view(-1).view(torch.uint8)) for key in a)


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` after a step of the run that is trained next."""
    original, taken = loop.train_step, [0]

    def counted(*args, **options):
        result = original(*args, **options)
        taken[0] += 1
        if taken[0] == step:
            act()
        return result

    monkeypatch.setattr(loop, "train_step", counted)


def test_each_cfg_and_prompt_is_drawn_and_recorded(small_config, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue star --d 4 --l 3 --n grey --s 3 --w 32 --h 48 --ss euler_a\n")
    config = few_steps(small_config, tmp_path / "run", sample={"prompts_file": str(file), "cfg": [2, 5]})
    config.train.max_steps = 1
    loop.train(config)
    index = index_of(tmp_path / "run", 1)
    assert index["prompts_file"] == str(file)
    assert [(row["file"], row["cfg"], row["seed"]) for row in index["images"]] == [
        ("step1-000-a-red-circle.png", 2, config.run.seed),
        ("step1-cfg5-000-a-red-circle.png", 5, config.run.seed),
        ("step1-001-a-blue-star.png", 3, 4),
    ]
    own = index["images"][2]
    assert (own["negative_prompt"], own["num_steps"], own["sampler"], own["width"], own["height"]) == (
        *("grey", 3, "euler-a", 32, 48),
    )
    folder = tmp_path / "run" / "samples" / "step-00000001"
    pictures = [Image.open(folder / row["file"]) for row in index["images"]]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert pictures[2].size == (32, 48)
    told = parse_parameters(pictures[2].text["parameters"])
    assert told["Prompt"] == "a blue star"
    assert told["Negative prompt"] == "grey"
    assert {name: told[name] for name in ("Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2")} == {
        **{"Steps": "3", "Sampler": "Euler a", "CFG scale": "3", "Seed": "4", "Size-1": "32", "Size-2": "48"},
    }
    recorded = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert [row["prompt"] for row in recorded["prompts"]] == ["a red circle", "a blue star"]


def test_a_prompt_file_is_read_again_and_an_error_in_it_leaves_the_last_good_one(small_config, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n")
    config = few_steps(small_config, tmp_path / "run", sample={"prompts_file": str(file)})
    config.train.max_steps = 0
    contents = iter(["a red circle\n", "a red circle\na green ring --d 4\n", "a --q 1\n", "a --q 1\n"])
    original = loop.evaluate

    def evaluate(job, position):
        # as an editor would, while the run goes on
        file.write_text(next(contents))
        return original(job, position)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    loop.train(config)
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "samples").glob("step-*"))
    drawn = [[row["prompt"] for row in index_of(tmp_path / "run", step)["images"]] for step in steps]
    both = ["a red circle", "a green ring"]
    assert drawn == [both[:1], both, both, both]
    events = [row for row in metrics(tmp_path / "run") if row["kind"] == "event"]
    said = [row for row in events if row["event"].startswith("prompts")]
    # an error is said once
    assert [row["event"] for row in said] == ["prompts changed", "prompts not read"]
    assert said[1]["detail"].endswith("use --n, --w, --h, --d, --l, --s, --ss; the prompts stay as they were")
    recorded = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert [row["prompt"] for row in recorded["prompts"]] == both


@pytest.mark.slow
def test_a_run_with_a_prompt_file_resumes_as_if_never_stopped_also_with_a_broken_file(run, small_config, tmp_path):
    file = tmp_path / "prompts.toml"
    file.write_text('cfg = [2, 4]\n[[prompts]]\nprompt = "a red circle"\nseed = 3\n[[prompts]]\nprompt = "a ring"\n')
    alone, stopped = (
        few_steps(small_config, tmp_path / name, sample={"prompts_file": str(file), "sampler": "euler-a"})
        for name in ("alone", "stopped")
    )
    assert run(alone.model_dump(by_alias=True)) == 0
    assert run(stopped.model_dump(by_alias=True), point="step", count=4) == -9
    # what it read last stands for it; the pictures are the same
    file.write_text("[[prompts")
    assert run(stopped.model_dump(by_alias=True), resume=True) == 0
    rows = [row for row in metrics(tmp_path / "stopped") if row.get("event") == "prompts not read"]
    assert len(rows) == 1
    for name in ("alone", "stopped"):
        path = tmp_path / name / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if "prompts not read" not in line]
        path.write_text("\n".join(lines) + "\n")
    assert_equal_runs(tmp_path / "alone", tmp_path / "stopped")
    assert len(list((tmp_path / "alone" / "samples" / "step-00000006").glob("*.png"))) == 4


# pictures on request


def test_a_run_draws_on_request_and_ends_with_the_same_bits(small_config, tmp_path, monkeypatch):
    plain = few_steps(small_config, tmp_path / "plain", train={"ema_decay": 0.9})
    loop.train(plain)
    answers: list = []
    asked = few_steps(small_config, tmp_path / "asked", train={"ema_decay": 0.9})

    def request() -> None:
        changes = {"cfg": [2.0, 6.0], "sampler": "euler-a", "seed": 8, "width": 32}
        thread = threading.Thread(
            target=lambda: answers.append(ask(tmp_path / "asked", ["a red circle"], changes, 60, None))
        )
        thread.start()
        wait_for(lambda: list((tmp_path / "asked" / "live").glob("request-*.json")))
        threads.append(thread)

    threads: list[threading.Thread] = []
    # the run looks for requests after every step, not five times a second
    monkeypatch.setattr(live_request, "POLL_S", 0.0)
    at_step(monkeypatch, 3, request)
    loop.train(asked)
    threads[0].join(60)
    (answer,) = answers
    assert answer.step == 3
    assert [path.name for path in answer.files] == [
        "step3-seed8-000-a-red-circle.png",
        "step3-seed8-001-a-red-circle.png",
    ]
    pictures = [Image.open(path) for path in answer.files]
    assert [picture.size for picture in pictures] == [(32, 64)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
    told = parse_parameters(pictures[1].text["parameters"])
    assert (told["Sampler"], told["CFG scale"], told["Seed"], told["Model"]) == ("Euler a", "6", "8", "small step 3")
    assert (tmp_path / "asked" / "samples" / "live" / "index.html").is_file()
    assert_equal_weights(tmp_path / "plain", tmp_path / "asked")
    events = [row["event"] for row in metrics(tmp_path / "asked") if row["kind"] == "event"]
    assert events.count("drew on request") == 1
    assert [row for row in metrics(tmp_path / "asked") if row.get("event") != "drew on request"] == metrics(
        tmp_path / "plain"
    )
    assert os.listdir(tmp_path / "asked" / "live") == []
    # the same weights, seed and settings give the same picture as training's own samples do
    with pytest.raises(UserError, match=r"no training is going on in .*asked; leave out --live"):
        ask(tmp_path / "asked", [], {}, 1, None)


def wait_for(condition, seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_request_without_prompts_draws_the_runs_own_and_a_bad_one_is_refused(small_config, tmp_path, monkeypatch):
    config = few_steps(small_config, tmp_path / "run", sample={"prompts": ["a ring", "a star"], "every_epochs": 3})
    folder = tmp_path / "run" / "live"
    bad = {
        "0" * 15 + "1": b"{",
        "0" * 15 + "2": b'{"prompts": [3]}',
        "0" * 15 + "3": b'{"prompts": ["a"], "changes": {"steps": 0}}',
        "0" * 15 + "4": b'{"prompts": ["a"], "changes": {"every_epochs": 1}}',
        "0" * 15 + "5": json.dumps({"prompts": ["a"] * 65}).encode(),
        "0" * 15 + "6": b'{"prompts": ["a"], "changes": {"width": 33}}',
        "0" * 15 + "7": b'{"prompts": ["a"], "file": "/etc/passwd"}',
        "0" * 15 + "8": b" " * 2**19,
    }

    def request() -> None:
        folder.mkdir()
        (tmp_path / "secret").write_text('{"prompts": ["a"]}')
        (folder / f"request-{'a' * 16}.json").symlink_to(tmp_path / "secret")
        os.mkfifo(folder / f"request-{'b' * 16}.json")
        (folder / f"request-{'c' * 16}.json").write_text("{}")
        (folder / "request-other.json").write_text("{}")

    def more() -> None:
        for number, content in bad.items():
            (folder / f"request-{number}.json").write_bytes(content)

    monkeypatch.setattr(live_request, "POLL_S", 0.0)
    at_step(monkeypatch, 2, request)
    at_step(monkeypatch, 4, more)
    loop.train(config)
    answers = {path.name[7:23]: json.loads(path.read_text()) for path in folder.glob("answer-*.json")}
    assert answers["c" * 16]["step"] == 2
    assert [name.partition("-00")[2] for name in answers["c" * 16]["files"]] == ["0-a-ring.png", "1-a-star.png"]
    errors = {number: answer["error"] for number, answer in answers.items() if "error" in answer}
    assert errors.keys() == {"a" * 16, "b" * 16, *bad}
    for number, words in (
        ("a" * 16, "is a link"),
        ("b" * 16, "not a regular file"),
        ("0" * 15 + "3", "steps = 0: expected 1 or more"),
        ("0" * 15 + "5", "up to 64 texts"),
        ("0" * 15 + "6", "width 33 is not a multiple of"),
        ("0" * 15 + "8", "over the limit"),
    ):
        assert words in errors[number], (number, errors[number])
    # what nobody asked for in the right form stays
    assert (folder / "request-other.json").is_file()


def test_requests_of_an_earlier_run_are_not_answered(small_config, tmp_path):
    config = few_steps(small_config, tmp_path / "run", sample={"every_epochs": 0})
    config.train.max_steps = 1
    (tmp_path / "run" / "live").mkdir(parents=True)
    (tmp_path / "run" / "live" / f"request-{'c' * 16}.json").write_text("{}")
    loop.train(config)
    assert list((tmp_path / "run" / "live").iterdir()) == []


def test_a_run_that_does_not_look_is_not_waited_for_without_end(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(live_request, "is_held", lambda run_dir: True)
    with pytest.raises(UserError, match=r"no answer within 0\.3 s: the run has not looked .*longer with --timeout"):
        ask(tmp_path / "run", ["a"], {}, 0.3, None)
    assert list((tmp_path / "run" / "live").iterdir()) == []
    # taken, and not answered yet
    said = []

    def take(line: str) -> None:
        said.append(line)
        LiveInbox(tmp_path / "run").clear()

    with pytest.raises(UserError, match=r"is drawing, but has not finished; its pictures will be in .*samples/live"):
        ask(tmp_path / "run", ["a"], {}, 0.3, take)
    assert said == ["asked the run; it draws between two steps"]
    # it ends meanwhile
    held = iter([True, True, False])
    monkeypatch.setattr(live_request, "is_held", lambda run_dir: next(held, False))
    with pytest.raises(UserError, match="has ended before it drew anything"):
        ask(tmp_path / "run", ["a"], {}, 30, None)


def test_the_command_says_what_cannot_be_combined(tmp_path, small_config, capsys):
    from safelight.__main__ import main

    config = few_steps(small_config, tmp_path / "run", sample={"every_epochs": 0})
    config.train.max_steps = 1
    loop.train(config)
    run = str(tmp_path / "run")
    for words, message in (
        (["--live"], "no training is going on"),
        (["--live", "-o", "x"], "leave out -o"),
        (["--live", "--embedding", "x.safetensors"], "leave out --embedding"),
        (["--live", "--lora-scale", "0.5"], "leave out --lora-scale"),
        (["--live", "--checkpoint", "best"], "leave out --checkpoint"),
        (["--live", "--timeout", "0"], "--timeout 0 is not above 0"),
        ([], 'give --prompt "..."'),
    ):
        assert main(["sample", run, *words]) == 2
        assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert main(["sample", run, "--prompt", "a ring", "--cfg", "1", "3", "--sampler", "unipc", "--steps", "2"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    told = [parse_parameters(Image.open(file).text["parameters"]) for file in files]
    assert [(one["CFG scale"], one["Sampler"]) for one in told] == [("1", "UniPC"), ("3", "UniPC")]
