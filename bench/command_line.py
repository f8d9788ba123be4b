"""`safelight bench`: its commands by name; torch is imported when a measurement runs."""

from __future__ import annotations

import difflib

from safelight.bench.core.arguments import (
    All,
    Aot,
    Attention,
    Baseline,
    Compare,
    Count,
    Gate,
    Kernels,
    Loader,
    Loop,
    Memory,
    Optimizer,
    Plot,
    Quick,
    Roofline,
    Step,
)
from safelight.errors import UserError
from safelight.options.arguments import parse
from safelight.output.columns import listed

# name -> (arguments, what it measures); the function of that name runs it
COMMANDS: dict[str, tuple[type, str]] = {
    "step": (Step, "images/s and peak memory of the training step, on this machine"),
    "baseline": (Baseline, "the same of published recipes, ours beside them"),
    "count": (
        Count,
        "launches, bytes, FLOPs and host syncs of a step, traced without a GPU",
    ),
    "roofline": (Roofline, "a step's FLOPs and bytes against what the device can do"),
    "loader": (Loader, "cache reads against a file a row and decoding every epoch"),
    "loop": (Loop, "seconds an epoch, everything included, ours and EveryDream's"),
    "kernels": (Kernels, "bytes of every kernel at real layers; on a GPU their speed too"),
    "aot": (Aot, "kernels compiled for cards that are not here: registers, spills"),
    "optimizer": (Optimizer, "every optimizer: time a step, bytes held and moved a parameter"),
    "memory": (Memory, "what a step needs in each memory mode; which cards it fits"),
    "attention": (Attention, "attention's backends by head dim and length, and which is chosen"),
    "quick": (Quick, "ours against the diffusers recipe here, in under three minutes"),
    "all": (All, "all that is worth knowing of a GPU; on a CPU a rehearsal"),
    "plot": (Plot, "pictures of results"),
    "gate": (Gate, "fail if a counted figure rose above bench/results/counts.jsonl"),
    "compare": (Compare, "two sets of results, figure by figure"),
}
# those that read what others wrote answer at once
MEASURING = tuple(name for name in COMMANDS if name not in ("plot", "gate", "compare"))


def main(argv: list[str]) -> int:
    """Run `safelight bench ...` and return its exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        texts = listed({name: text for name, (_, text) in COMMANDS.items()})
        print(
            f"usage: safelight bench COMMAND [OPTIONS]\n\n{texts}\n\n`safelight bench COMMAND --help` lists the options."
        )
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
        raise UserError(f"{argv[0]!r} is no benchmark; {hint}")
    shape, text = COMMANDS[argv[0]]
    options = parse(shape, argv[1:], f"bench {argv[0]}", text)
    # `all` is a function of Python's
    name = "everything" if argv[0] == "all" else argv[0]
    from safelight.bench import commands

    return getattr(commands, name)(options)
