"""The plan's line on learning rates: the run's own, and what --find-lr proposed in its folder."""

import pytest

from safelight.trainer.config.toml import parse_config
from safelight.trainer.loading.rate_advice import rates_line, rates_of
from safelight.trainer.report.rate_test_record import ProposedRate
from tests.trainer.report.evaluated_run import add_rate_test

NONE = ProposedRate(rate=None, low=None, high=None, sureness="none", reason="nothing")
SAME = {"optimizer": {"lr": 1e-6}, "train": {"batch_size": 8}}


@pytest.mark.parametrize(
    ("tables", "changes", "line"),
    [
        (SAME, None, "Learning rate 1e-06 constant; --find-lr of safelight train proposes one."),
        (
            SAME,
            {},
            "Learning rate 1e-06 constant; --find-lr proposed 4.4e-06 (clear), which is 4.4 times higher: "
            "--optimizer.lr 4.4e-06.",
        ),
        (
            {**SAME, "optimizer": {"lr": 5e-6, "schedule": "cosine"}},
            {},
            "Learning rate 5e-06 cosine; --find-lr proposed 4.4e-06 (clear), which is about as good.",
        ),
        (
            {"optimizer": {"lr": 1e-6, "name": "adamw"}, "stage": [{"epochs": 1, "lr": 1e-4}, {"epochs": 1}]},
            {},
            "Learning rate 0.0001 constant, then 1e-06 constant; --find-lr proposed 4.4e-06 (clear, for another "
            "optimizer or batch size), which is 23 times lower: --optimizer.lr 4.4e-06.",
        ),
        (SAME, {"proposal": NONE}, "Learning rate 1e-06 constant; --find-lr proposed none."),
        (
            {"optimizer": {"name": "prodigy"}},
            {},
            "Factor on the learning rate 1 constant; prodigy estimates the rate itself.",
        ),
    ],
)
def test_the_line(tmp_path, tables, changes, line):
    if changes is not None:
        add_rate_test(tmp_path / "run", **changes)
    config = parse_config({"run": {"dir": str(tmp_path / "run")}, **tables}, "here")
    assert rates_line(config, rates_of(config)) == line


def test_a_damaged_test_is_named(tmp_path):
    (tmp_path / "find_lr").mkdir()
    (tmp_path / "find_lr" / "result.json").write_text("{")
    config = parse_config({"run": {"dir": str(tmp_path)}}, "here")
    assert "; find_lr/result.json could not be read: Invalid JSON" in rates_line(config, rates_of(config))
