"""model.attention in a run: recorded, kept on resume, and refused in one line where it cannot be had."""

import json
from typing import get_args

import pytest
import torch

from safelight.kernels.unet.attention import Case, choose_attention
from safelight.kernels.unet.attention_backends import GROUPS
from safelight.trainer.checkpoint.identity import identify
from safelight.trainer.config.schema import Model
from safelight.trainer.config.toml import parse_config
from safelight.trainer.loading import job
from safelight.trainer.run_log.environment import ATTENTION, recorded_attention
from safelight.trainer.train import train


def test_the_setting_knows_the_groups_of_backends():
    assert get_args(Model.model_fields["attention"].annotation) == tuple(GROUPS)
    with pytest.raises(ValueError, match=r"model\.attention = 'flashy'"):
        parse_config({"model": {"attention": "flashy"}}, "here")


def test_another_backend_is_the_same_run():
    """A run may go on with other kernels, as on another device."""
    one, other = (identify(parse_config({"model": {"attention": name}}, "here"), "fp32") for name in ("auto", "math"))
    assert one.difference(other, 0) is None


def test_what_was_recorded_is_read(tmp_path):
    assert recorded_attention(tmp_path) is None
    path = tmp_path / "environment.json"
    choice = choose_attention(torch.device("cpu"), torch.float32, {Case(8), Case(16)})
    path.write_text(json.dumps({"attention": str(choice), ATTENTION: choice.to_dict()}))
    again = choose_attention(
        torch.device("cpu"), torch.float32, {Case(8), Case(16)}, previous=recorded_attention(tmp_path)
    )
    assert again == choice
    # a run of before this was recorded
    path.write_text(json.dumps({"attention": "sdpa"}))
    assert recorded_attention(tmp_path) is None
    for damaged in ("{", "[]", "\0"):
        path.write_text(damaged)
        again = choose_attention(torch.device("cpu"), torch.float32, {Case(8)}, previous=recorded_attention(tmp_path))
        assert "does not say which attention it used" in str(again)


def test_a_run_records_its_attention_and_goes_on_with_it(make_config, tmp_path, capsys):
    quiet = {"validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}, "run": {"device": "cpu"}}
    run_dir = tmp_path / "run"
    train(make_config(train={"max_steps": 1}, **quiet))
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["attention"].startswith(
        "attention on cpu, float32: matmuls in blocks for head dim 8; sdpa for head dim 16, 32"
    )
    record = environment[ATTENTION]
    assert {row["backend"] for row in record["cases"]} == {"cpu-narrow", "cpu-flash"}
    # at 16 x 16 latents, with 77 tokens of text
    assert {(row["queries"], row["keys"]) for row in record["cases"]} >= {(256, 256), (256, 77)}
    # as if the run had begun with another backend, which it keeps
    for row in record["cases"]:
        row["backend"] = "math"
    (run_dir / "environment.json").write_text(json.dumps(environment))
    before = capsys.readouterr().err
    assert "sdpa for head dim" in before
    train(make_config(train={"max_steps": 2}, **quiet), resume=True)
    assert json.loads((run_dir / "environment.json").read_text())[ATTENTION]["cases"] == record["cases"]
    assert "sdpa math for head dim 8, 16, 32" in capsys.readouterr().err


def test_what_cannot_be_had_is_refused_before_anything_is_cached(make_config, monkeypatch):
    monkeypatch.setattr(job, "open_dataset", lambda *args: pytest.fail("the dataset was opened"))
    with pytest.raises(ValueError, match=r"model\.attention = 'xformers' is not available on cpu") as error:
        train(make_config(model={"attention": "xformers"}, run={"device": "cpu"}))
    assert "\n" not in str(error.value)
