"""`safelight grid`: pictures over every combination of the values of up to three settings."""

from __future__ import annotations

import shlex

from safelight import bug_report
from safelight.errors import UserError
from safelight.output.show import print_line, say_loading, say_next
from safelight.several import launched

AXES_TEXT = (
    "Axes, each with an example of its values; numbers may be ranges as in A1111: 1-5, 1-5 (+2), 1-10 [5]; texts with "
    "commas stand in double quotes:"
)


def grid(argv: list[str], description: str) -> int:
    """Run `safelight grid` and return its exit status."""
    from safelight.options.arguments import Grid
    from safelight.options.parsing import parse
    from safelight.trainer.inference.axes import describe_axes, parse_axes

    width = max(len(example) for example, _ in describe_axes())
    listed = "\n".join(f"  {example:{width}}  {meaning}".rstrip() for example, meaning in describe_axes())
    arguments = parse(Grid, argv, "grid", f"{description}.\n\n{AXES_TEXT}\n{listed}")
    bug_report.belongs_to(arguments.run)
    # before torch is imported
    axes = parse_axes({"x": arguments.x, "y": arguments.y, "z": arguments.z})
    names = ("steps", "cfg", "seed", "width", "height", "sampler", "spacing", "negative_prompt", "clip_skip")
    changes = {name.replace("_", "-"): getattr(arguments, name) for name in names}
    changes = {name: value for name, value in changes.items() if value is not None}
    on_axis = {axis.name for axis in axes.values()}
    given = [*changes, *(["checkpoint"] if arguments.checkpoint is not None else [])]
    if twice := [name for name in given if name in on_axis]:
        raise UserError(f"--{twice[0]} and an axis give {twice[0]}; leave out one of them")
    if (status := launched("grid", argv, arguments.gpus, arguments.run)) is not None:
        return status
    say_loading()
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.grid import draw_grid
    from safelight.trainer.inference.grid_plan import GridPlan, plan_grid
    from safelight.trainer.inference.which_checkpoint import with_chosen
    from safelight.trainer.loading.processes import joined
    from safelight.trainer.report.build import build_report
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal, joined("grid", arguments.run, terminal) as world:
        run = open_run(arguments.run, arguments.embeddings, world)

        def plan() -> GridPlan:
            return plan_grid(
                run,
                axes,
                prompts=arguments.prompt,
                checkpoint=arguments.checkpoint or "last",
                changes=changes,
                max_cells=arguments.max_cells,
                say=terminal.say,
            )

        try:
            folder = with_chosen(
                plan,
                lambda planned: draw_grid(
                    run,
                    planned,
                    arguments.name,
                    progress=lambda done, total: terminal.update("sampling", done, total),
                    say=terminal.say,
                ),
                terminal.say,
            )
        except KeyboardInterrupt:
            terminal.pause()
            terminal.say("the pictures drawn so far are kept; the same command draws the rest")
            raise
    if not world.is_main:
        return 0
    print_line(f"grid in {folder} (sheet.png, and index.html to zoom); report: {build_report(arguments.run)}")
    say_next(f"open {shlex.quote(str(folder / 'index.html'))} in a browser")
    return 0
