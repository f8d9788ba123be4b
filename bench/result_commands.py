"""`safelight bench` commands that time nothing: counted figures and files of results; see step_commands.py."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from safelight.bench.core import arguments
from safelight.bench.core.results import COUNTS, append_all, make_record
from safelight.errors import UserError
from safelight.output.show import print_json, print_line, print_table
from safelight.text import printable


def run_count(options: arguments.Count) -> int:
    from safelight.bench.measure.count import config_of, count, profile_count, table_rows

    figures, seconds = count(options)
    record = make_record("count", config_of(options), figures, torch.device("cpu"))
    append_all(options.append, record)
    profiled = profile_count(options) if options.profile else None
    if options.json:
        print_json({**record, "seconds": round(seconds, 1)} | ({"profiler": profiled} if profiled else {}))
        return 0
    columns, rows = table_rows(figures, profiled)
    print_table(
        f"{options.base}, one step of batch {options.batch_size}, {options.precision}, {options.layout}, "
        f"traced in {seconds:.0f} s",
        columns,
        rows,
    )
    print_line(
        f"{figures['forward_gflop']:,.1f} GFLOP forward, {figures['step_gflop']:,.1f} GFLOP in the whole step; "
        f"{figures['saved_mib']:,.1f} MiB saved for backward; "
        f"{figures['host_syncs']} host-device synchronizations"
    )
    print_line(
        "Launches and bytes are estimates from the model in bench/core/operators.py."
        + ("" if profiled else " Use --profile to compare them with a profiled step.")
    )
    return 0


def run_gate(options: arguments.Gate) -> int:
    from safelight.bench.measure.gate import check, goldens

    failed = False
    for golden in goldens(options.golden or COUNTS, options.base):
        rose, fell = check(golden)
        print_line(f"{'rose' if rose else 'fell' if fell else 'same'}  {_config_text(golden['config'])}")
        for line in (*rose, *fell):
            print_line(f"      {line}")
        failed |= bool(rose)
    if failed:
        print_line(
            f"A counted figure rose. If that is intended, append the new count to {COUNTS.name} "
            "(`bench count --append`) and explain it in the commit."
        )
    return int(failed)


def _config_text(config: dict) -> str:
    """Return a counted config as text: `random:sd15, batch 1, bf16, nchw, patched, checkpointing full`."""
    parts = [config["base"], f"batch {config['batch_size']}", config["precision"], config["layout"]]
    if config["latent_size"]:
        parts.insert(1, f"{config['latent_size']}x{config['latent_size']} latents")
    if config.get("patched"):
        parts.append("patched")
    if config["checkpointing"] != "none":
        parts.append(f"{config['checkpointing']} checkpointing")
    parts.append("no optimizer" if config["optimizer"] == "none" else config["optimizer"])
    return ", ".join(parts)


def run_compare(options: arguments.Compare) -> int:
    from safelight.bench.core.results import compare, find, labels, slower_figures

    if not 0 <= options.at_most < 1:
        raise UserError(f"--at-most {options.at_most} is not between 0 and 1; use for example 0.05")
    a, b = find(options.a), find(options.b)
    rows = compare(a, b)
    if not rows:
        raise UserError(f"{options.a} and {options.b} share no benchmark with the same config")
    regressions = slower_figures(a, b, options.at_most) if options.at_most else []
    if options.json:
        names = ("bench", "config", "figure", "a", "b")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return int(bool(regressions))
    for bench in dict.fromkeys(row[0] for row in rows):
        rows_of_bench = [row[1:] for row in rows if row[0] == bench]
        configs = list(dict.fromkeys(config for config, *_ in rows_of_bench))
        label_of = dict(zip(configs, labels(list(map(json.loads, configs))), strict=True))
        print_table(
            f"{bench}: A is {options.a}, B is {options.b}",
            ("figure", "A", "B", "B / A"),
            [
                (": ".join(filter(None, (label_of[config], name))), f"{a:,g}", f"{b:,g}", f"{b / a:.3f}" if a else "")
                for config, name, a, b in rows_of_bench
            ],
        )
    for line in regressions:
        print_line(line)
    return int(bool(regressions))


def run_plot(options: arguments.Plot) -> int:
    from safelight.bench.core.plot import plot
    from safelight.bench.core.results import read

    if not options.results:
        raise UserError("no results given; name one or more .jsonl, for example bench/results/counts.jsonl")
    files, skipped = plot([line for path in options.results for line in read(path)], options.out)
    if not files:
        raise UserError(f"nothing to plot: the files have no results for {', '.join(skipped)}")
    for file in files:
        print_line(file)
    if skipped:
        print_line(f"not plotted, no results for: {', '.join(skipped)}")
    return 0


def run_report(options: arguments.Report) -> int:
    from safelight.bench.core.results import read
    from safelight.bench.measure.goals import context_gib, read_goals, timed_steps
    from safelight.bench.measure.predictions import SECTIONS, rows_of
    from safelight.bench.measure.predictions_page import COLUMNS, GOAL_COLUMNS, cells, goal_cells, render
    from safelight.data.atomic import atomic_write_text

    if not options.results:
        raise UserError("no results given; name one or more .jsonl, for example the results.jsonl of bench all")
    records = [line for path in options.results for line in read(path) if "config" in line]
    steps, context = timed_steps(records), context_gib(records)
    goals = [(goal, goal.measured(steps, context)) for goal in read_goals()]
    rows = rows_of(records)
    if options.json:
        print_json(
            {
                "goals": [{**asdict(goal), "measured": measured} for goal, measured in goals],
                "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
            }
        )
        return 0
    page = render(rows, goals, _devices(records), _versions(records), _notes(records))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.out, page)
    print_table("goals", GOAL_COLUMNS, [goal_cells(*goal) for goal in goals])
    for name in SECTIONS:
        if own := [cells(row) for row in rows if row.section == name]:
            print_table(name, COLUMNS, own)
    print_line(options.out)
    return 0


def _devices(records: list[dict]) -> list[str]:
    """Return the devices that lines were measured on; a CPU only if there is no GPU."""
    names = [str(record.get("machine", {}).get("device", "")) for record in records]
    found = dict.fromkeys(printable(name)[:80] for name in names if name)
    return [name for name in found if name != "CPU"] or list(found)


def _versions(records: list[dict]) -> str:
    """Return what the newest line was measured with: `commit abcdef12, torch 2.13.0, driver 550`."""
    newest = records[-1] if records else {}
    machine, commit = newest.get("machine", {}), str(newest.get("git_commit") or "")[:8]
    parts = [f"commit {commit}" if commit else "", *(f"{n} {machine[n]}" for n in ("torch", "driver") if n in machine)]
    return printable(", ".join(filter(None, parts)))[:200] or "results"


def _notes(records: list[dict]) -> list[tuple[str, str]]:
    """Return (part, why) of what `bench all` skipped and what failed."""
    return [
        (printable(record["bench"])[:60], printable(record["note"])[:200])
        for record in records
        if record.get("note") and (record["figures"].get("failed") or record["note"].startswith("skipped"))
    ]
