"""`safelight bench`: the list of benchmarks, their help, and dispatch to the module of each.

This module does not import torch, so help and mistakes are answered at once.
"""

from __future__ import annotations

import difflib
import importlib

from safelight.bench.core import arguments
from safelight.errors import UserError
from safelight.options.parsing import parse
from safelight.output.columns import listed

# name -> (its arguments, what it measures); the modules below have a function run_NAME for each
COMMANDS: dict[str, tuple[type, str]] = {
    "step": (arguments.Step, "images/s and peak memory of a training step on this machine"),
    "baseline": (arguments.Baseline, "the same for published recipes, next to ours"),
    "count": (arguments.Count, "launches, bytes, FLOPs and host syncs of a step, counted without a GPU"),
    "roofline": (arguments.Roofline, "how close a step comes to the device's compute and bandwidth limits"),
    "loader": (arguments.Loader, "data loading: our cache, one file per row, or decoding every epoch"),
    "cache": (arguments.Cache, "opening and reading a cache as it grows; filling it against the encoder alone"),
    "loop": (arguments.Loop, "seconds per epoch of the whole training loop, ours and EveryDream's"),
    "scale": (arguments.Scale, "a step over 1, 2, 4 processes, ours and DistributedDataParallel's: speed and bytes"),
    "kernels": (arguments.Kernels, "bytes moved by each kernel in real layers; on a GPU also speed"),
    "aot": (arguments.Aot, "registers and spills of kernels compiled for GPUs that are not here"),
    "optimizer": (arguments.Optimizer, "every optimizer: time per step, bytes held and moved per parameter"),
    "memory": (arguments.Memory, "memory of a step in each memory mode, and the smallest card it fits"),
    "attention": (arguments.Attention, "every attention backend at the models' shapes, and the one chosen"),
    "quick": (arguments.Quick, "our step against the diffusers recipe, in under three minutes"),
    "all": (arguments.All, "every benchmark in one call; on a CPU a rehearsal with small sizes"),
    "plot": (arguments.Plot, "draw result files as pictures"),
    "report": (arguments.Report, "a page of predicted beside measured figures, and the goals"),
    "gate": (arguments.Gate, "fail if a counted figure rose above bench/results/counts.jsonl"),
    "compare": (arguments.Compare, "compare two sets of results, figure by figure"),
}
# module -> those that it runs
MODULES = {
    "step_commands": ("step", "baseline", "roofline", "loop", "memory", "scale", "quick", "all"),
    "part_commands": ("loader", "cache", "kernels", "aot", "optimizer", "attention"),
    "result_commands": ("count", "gate", "compare", "plot", "report"),
}
# benchmarks that take time; the others only read results
MEASURING = tuple(name for name in COMMANDS if name not in ("plot", "report", "gate", "compare"))


def main(argv: list[str]) -> int:
    """Run `safelight bench ...` and return its exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        texts = listed({name: text for name, (_, text) in COMMANDS.items()})
        print(
            f"usage: safelight bench COMMAND [OPTIONS]\n\n{texts}\n\n"
            "`safelight bench COMMAND --help` lists the options."
        )
        return 0 if argv else 2
    name = argv[0]
    if name not in COMMANDS:
        matches = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"use {', '.join(COMMANDS)}"
        raise UserError(f"unknown benchmark {name!r}; {hint}")
    kind, text = COMMANDS[name]
    options = parse(kind, argv[1:], f"bench {name}", text)
    module = next(module for module, names in MODULES.items() if name in names)
    return getattr(importlib.import_module(f"safelight.bench.{module}"), f"run_{name}")(options)
