"""`safelight bench` commands that time nothing: counted figures and files of results; see step_commands.py."""

from __future__ import annotations

import json

import torch

from safelight.bench.core import arguments
from safelight.bench.core.results import COUNTS, append_all, make_record
from safelight.errors import UserError
from safelight.output.show import print_json, print_line, print_table


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
