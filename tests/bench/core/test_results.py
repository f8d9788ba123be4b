"""Result lines, their comparison and their plots; help and dispatch of the benchmarks."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from safelight.__main__ import main
from safelight.bench.command_line import COMMANDS, MODULES
from safelight.bench.core import plot, results
from safelight.bench.core.results import append, make_record, read
from safelight.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def line(bench="step", config=None, **figures) -> dict:
    config = {"recipe": "safelight", "batch_size": 1, "base": "tiny", "latent_size": 16} | (config or {})
    return {
        "bench": bench,
        "config": config,
        "figures": figures,
        "machine": {"device": "CPU"},
        "git_commit": "abcdef123",
    }


def test_a_record_names_versions_and_commit_but_no_paths(tmp_path):
    record = make_record("step", {"batch_size": 2}, {"step_ms": 1.5}, torch.device("cpu"), "a note")
    append(tmp_path / "deep" / "r.jsonl", record)
    append(tmp_path / "deep" / "r.jsonl", record)
    assert read(tmp_path / "deep" / "r.jsonl") == [record, record]
    assert record["machine"]["torch"] == torch.__version__
    assert len(record["git_commit"]) == 40
    assert isinstance(record["git_dirty"], bool)
    # neither in the command's arguments nor elsewhere
    assert str(ROOT) not in json.dumps(record)


def test_clocks_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '1590, 5000, 70.00, 41, 550.54'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert results.clocks(torch.device("cuda", 0)) == {
        "sm_clock_mhz": "1590",
        "memory_clock_mhz": "5000",
        "power_limit_w": "70.00",
        "temperature_c": "41",
        "driver": "550.54",
    }
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert results.clocks(torch.device("cuda", 0)) == {}
    assert results.clocks(torch.device("cpu")) == {}


def test_the_error_for_a_damaged_or_missing_file_names_it(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"bench": "a"}\n{"ben')
    with pytest.raises(ValueError, match=r"r\.jsonl line 2 is not JSON"):
        read(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="neither a results file nor a commit"):
        results.find("nowhere")


def changed(record: dict, path: str, value: object) -> dict:
    """Return a copy of a result line with one value replaced, or removed if it is ...: `config.base`."""
    copy = json.loads(json.dumps(record))
    *parents, last = path.split(".")
    place = copy
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


SPREAD = [1.0, 2.0, 3.0]
TIMED = line(images_per_s=SPREAD)
COUNTED = line(
    "count",
    {"base": "random:sd15", "precision": "bf16", "layout": "nchw", "checkpointing": "none"},
    launches=9,
    memory_bound_gb=1.0,
)
ROOFLINE = line(
    "roofline",
    {"precision": "fp32"},
    classes={"conv": {"least_ms": 3.0, "ms": 5.0}},
    least_ms=3.0,
    step_ms=7.0,
    model_flop_use={"share_of_limit": 0.3},
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000, "is not JSON: it has more than 65,536 values"),
        (b"[" * 20_000, "is not JSON: it is nested too deeply"),
        (b"\xff\xfe", "is not JSON: "),
        (b"1" * 2**21, "is not JSON: it is too long"),
        (b"[]", "it is no JSON object"),
        ({"bench": [], "config": []}, "bench is no text"),
        (changed(line(), "figures", []), "figures is no object"),
        (changed(line(), "figures", ...), "figures is missing"),
        ({"bench": "x", "config": [1], "figures": {}, "machine": 3}, "config is no object"),
        (changed(line(), "machine", 3), "machine is no object"),
        (changed(TIMED, "machine", ...), "machine.device is no text"),
        (changed(line(), "date", 3), "date is no text"),
        (changed(line(), "git_commit", 3), "git_commit is no text"),
        (changed(TIMED, "config.batch_size", "1"), "config.batch_size is no whole number"),
        (line(images_per_s=5), "figures.images_per_s is no list of three numbers"),
        (line(images_per_s=[1, 2, 1e200]), "figures.images_per_s is no list of three numbers"),
        (changed(TIMED, "config.base", "\ud800"), "config.base is no text of at most 200 printable characters"),
        (line(images_per_s=SPREAD, peak_gib=[]), "figures.peak_gib is no number"),
        (changed(COUNTED, "config.base", ...), "config.base is no text"),
        (changed(COUNTED, "figures.launches", {}), "figures.launches is no number"),
        (line("rounding", {"weights": "x", "num_steps": 1, "lr": 1.0}), "figures.plain bf16.noise_to_displacement is"),
        (changed(ROOFLINE, "figures.classes", 1), "figures.classes is no object"),
        (changed(ROOFLINE, "figures.classes.conv", 1), "figures.classes.conv is no class of operators"),
        (changed(ROOFLINE, "figures.classes.conv.ms", ...), "figures.classes.conv is no class of operators"),
        (changed(ROOFLINE, "figures.model_flop_use", 1), "figures.model_flop_use.share_of_limit is no number"),
    ],
)
def test_a_line_that_is_no_result_is_named_in_one_line(tmp_path, capsys, content, reason):
    file = tmp_path / "r.jsonl"
    bad = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(b'{"bench": "a"}\n' + bad + b"\n")
    for words in (["compare", str(file), str(file)], ["plot", str(file), "-o", str(tmp_path / "out")]):
        assert main(["bench", *words]) == 2
        error = capsys.readouterr().err
        assert f"{file} line 2 is " in error
        assert reason in error
        assert error.count("\n") == 1


def test_names_in_results_are_shown_as_they_are(tmp_path, capsys):
    file, out = tmp_path / "r.jsonl", tmp_path / "out"
    names = ("$\\frac$", "b" * 200)
    records = [
        line(config={"base": name, "odd": f"{name} \ud800 \x1b[2J"}, images_per_s=SPREAD, peak_gib=1) for name in names
    ]
    records += [line(config={"recipe": "unheard of"}, images_per_s=SPREAD), ROOFLINE]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["bench", "compare", str(file), str(file)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["bench", "plot", str(file), "-o", str(out)]) == 0
    assert {path.name for path in out.glob("*.png")} == {"throughput.png", "memory.png", "roofline.png"}


def test_more_results_than_a_picture_has_room_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "MAX_SIDE", 10)
    records = [line(config={"batch_size": size}, images_per_s=SPREAD) for size in range(1, 20)]
    with pytest.raises(UserError, match="throughput: too many results for one picture"):
        plot.plot(records, tmp_path / "out")


def test_compare_takes_the_newest_line_of_the_same_config(tmp_path, capsys):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, rates in ((a, (1.0, 2.0)), (b, (3.0,))):
        for rate in rates:
            append(path, line(images_per_s=[rate - 0.5, rate, rate + 0.5], peak_gib=None))
    append(b, line(config={"batch_size": 4}, images_per_s=[1, 2, 3]))
    assert main(["bench", "compare", str(a), str(b), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["figure"], row["a"], row["b"]) == ("images_per_s", 2.0, 3.0)
    assert main(["bench", "compare", str(a), str(b)]) == 0
    assert "1.500" in capsys.readouterr().out
    append(tmp_path / "c.jsonl", line(bench="loader"))
    assert main(["bench", "compare", str(a), str(tmp_path / "c.jsonl")]) == 2
    assert "share no benchmark" in capsys.readouterr().err


def test_labels_are_the_settings_that_differ():
    same = {"base": "tiny", "repeats": 3}
    configs = [
        same | {"optimizer": "adamw", "batch_size": 1, "loader": True},
        same | {"optimizer": "adamw8bit", "batch_size": 4},
    ]
    assert results.labels(configs) == ["adamw, batch size 1, loader", "adamw8bit, batch size 4"]
    assert results.labels(configs[:1]) == [""]


def test_compare_fails_where_b_is_slower_than_allowed(tmp_path, capsys):
    a, same, slow = (tmp_path / f"{name}.jsonl" for name in ("a", "same", "slow"))
    append(a, line(images_per_s=[9, 10.0, 11.0], step_ms=[100.0, 110, 120], peak_gib=1.0))
    # other load makes a machine slower in the median, not at its best
    append(same, line(images_per_s=[4, 5.0, 10.8], step_ms=[102.0, 220, 330], peak_gib=9.0))
    append(slow, line(images_per_s=[8, 9.09, 10.0], step_ms=[110.0, 121, 132], peak_gib=1.0))
    assert main(["bench", "compare", str(a), str(same), "--at-most", "0.05"]) == 0
    assert "slower" not in capsys.readouterr().out
    assert main(["bench", "compare", str(a), str(slow), "--at-most", "0.05"]) == 1
    out = capsys.readouterr().out
    assert "slower by 10.0 %: step images_per_s" in out
    assert "slower by 10.0 %: step step_ms 100 -> 110" in out
    # being faster does not fail, nor does a comparison without --at-most
    assert main(["bench", "compare", str(slow), str(a), "--at-most", "0.05"]) == 0
    assert main(["bench", "compare", str(a), str(slow)]) == 0
    assert main(["bench", "compare", str(a), str(slow), "--at-most", "5"]) == 2


def test_plots_are_drawn_for_what_was_measured_and_the_rest_is_named(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    for recipe in ("safelight", "diffusers"):
        for size in (1, 4):
            rate = 3.0 * size if recipe == "safelight" else 2.0 * size
            append(
                file,
                line(
                    config={"recipe": recipe, "batch_size": size},
                    images_per_s=[rate - 1, rate, rate + 1],
                    peak_gib=2.0 * size,
                ),
            )
    append(file, line(config={"batch_size": 32}, fits=False))
    assert main(["bench", "plot", str(file), "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"throughput.png", "memory.png", "scaling.png"}
    assert "not plotted, no results for: ablation" in out
    for name in names:
        with Image.open(tmp_path / "out" / name) as image:
            # something was drawn in our colour
            assert (0xC2, 0x41, 0x0C) in {colour for _, colour in image.convert("RGB").getcolors(10**6)}
    assert main(["bench", "plot", str(results.COUNTS), "-o", str(tmp_path / "counts")]) == 0
    assert [p.name for p in (tmp_path / "counts").glob("*.png")] == ["ablation.png"]
    capsys.readouterr()
    empty = tmp_path / "empty.jsonl"
    append(empty, line(bench="optimizer"))
    assert main(["bench", "plot", str(empty), "-o", str(tmp_path / "none")]) == 2
    assert "safelight bench: nothing to plot: " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def drawn(draw, records):
    axes = Figure().subplots()
    assert draw(axes, records)
    return axes


def test_steps_with_other_settings_are_drawn_separately_and_only_the_newest_of_each():
    """Two commands timed the same step, and one step was timed with two optimizers."""
    same = {"optimizer": "adamw", "loader": False, "repeats": 3}
    records = [
        {**line(config=same, images_per_s=[1.0, 2.0, 3.0]), "date": "2026-11-02"},
        {**line("quick", config=same | {"repeats": 10}, images_per_s=[8.0, 9.0, 10.0]), "date": "2026-11-01"},
        {**line(config=same | {"optimizer": "adamw8bit"}, images_per_s=[3.0, 4.0, 5.0]), "date": "2026-11-02"},
    ]
    axes = drawn(plot.throughput, records)
    assert {bar.get_height() for bar in axes.patches} == {2.0, 4.0}
    assert len({bar.get_x() for bar in axes.patches}) == 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["batch 1\nadamw", "batch 1\nadamw8bit"]
    larger = [{**r, "config": r["config"] | {"batch_size": 4}} for r in records]
    lines = drawn(plot.scaling, records + larger).get_lines()
    assert [list(one.get_xdata()) for one in lines] == [[1, 4], [1, 4]]
    assert [tick.get_text() for tick in drawn(plot.throughput, records[:1]).get_xticklabels()] == ["batch 1"]


def test_the_roofline_of_a_counted_step_is_labelled_as_not_measured():
    classes = {"conv": {"least_ms": 3.0}, "norm": {"least_ms": 1.0}}
    config = {"precision": "fp16", "ceilings": "t4's data sheet"}
    counted = line("roofline", config, classes=classes, least_ms=4.0)
    axes = drawn(plot.roofline, [counted])
    assert "at the roofline (not measured)" in axes.get_title()
    measured = line(
        "roofline",
        {"precision": "fp32"},
        classes={"conv": {"least_ms": 3.0, "ms": 5.0, "share_of_limit": 0.6}, "idle": {"ms": 2.0}},
        least_ms=3.0,
        step_ms=7.0,
        model_flop_use={"share_of_limit": 0.3},
    )
    axes = drawn(plot.roofline, [measured, counted])
    assert "model FLOP utilization 30 %" in axes.get_title()
    assert sorted(bar.get_width() for bar in axes.patches) == [0.0, 2.0, 3.0, 5.0]


PRINT_ALL_HELP = """
import contextlib, io, sys
from safelight.__main__ import main
from safelight.bench.command_line import COMMANDS
for name in COMMANDS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            status = main(["bench", name, "--help"])
        except SystemExit as end:
            status = end.code
    has_usage = out.getvalue().startswith(f"usage: safelight bench {name}")
    print(name, status, has_usage, "torch" in sys.modules)
"""


def test_the_help_of_every_benchmark_does_not_import_torch():
    command = [sys.executable, "-c", PRINT_ALL_HELP]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [*COMMANDS]
    assert all(line[1:] == ["0", "True", "False"] for line in lines), result.stdout


def test_every_benchmark_has_a_function_that_runs_it():
    for module, names in MODULES.items():
        found = vars(importlib.import_module(f"safelight.bench.{module}"))
        functions = {name for name, value in found.items() if name.startswith("run_") and callable(value)}
        assert functions == {f"run_{name}" for name in names}
    assert sorted(name for names in MODULES.values() for name in names) == sorted(COMMANDS)


def test_result_lines_contain_no_absolute_paths():
    absolute = re.compile(r'(?<![\w.])/(?:tmp|home|root|work|Users|mnt|content)/[^\s"]*')
    for path in sorted(results.RESULTS.glob("*.jsonl")):
        assert absolute.findall(path.read_text(encoding="utf-8")) == [], path.name


def test_a_class_of_which_no_operator_ran_can_be_read_and_drawn(tmp_path):
    classes = {"conv": {"least_ms": 3.0, "ms": 5.0}, "attention": {"least_ms": 0, "ms": 0.0, "share_of_limit": None}}
    record = changed(ROOFLINE, "figures.classes", classes)
    append(tmp_path / "r.jsonl", record)
    assert read(tmp_path / "r.jsonl") == [record]
    assert [file.name for file in plot.plot([record], tmp_path)[0]] == ["roofline.png"]
