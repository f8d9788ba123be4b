"""`safelight sample`: draws pictures with a checkpoint, or asks a run that is going on for them."""

from __future__ import annotations

import shlex

from safelight import bug_report
from safelight.errors import UserError
from safelight.output.show import print_line, say_loading, say_next
from safelight.several import launched


def sample(argv: list[str], description: str) -> int:
    """Run `safelight sample` and return its exit status."""
    from safelight.options.arguments import Sample
    from safelight.options.parsing import parse

    arguments = parse(Sample, argv, "sample", description)
    bug_report.belongs_to(arguments.run)
    names = ("steps", "seed", "width", "height", "sampler", "spacing", "negative_prompt")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.cfg:
        changes["cfg"] = list(arguments.cfg)
    if arguments.live:
        return _sample_live(arguments, changes)
    if not arguments.prompt:
        raise UserError('give --prompt "..."; a run that is going on draws its own with --live')
    if (status := launched("sample", argv, arguments.gpus, arguments.run)) is not None:
        return status
    say_loading()
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.draw import sample as draw_sample
    from safelight.trainer.loading.processes import joined
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal, joined("sample", arguments.run, terminal) as world:
        files = draw_sample(
            open_run(arguments.run, arguments.embeddings, world),
            list(arguments.prompt),
            arguments.checkpoint,
            arguments.out or arguments.run / "images",
            changes,
            lambda done, total: terminal.update("sampling", done, total),
            terminal.say,
            arguments.lora_scale,
        )
    if not world.is_main:
        return 0
    for file in files:
        print_line(file)
    if (files[0].parent / "index.html").is_file() and arguments.out not in files:
        say_next(f"open {shlex.quote(str(files[0].parent / 'index.html'))} in a browser")
    return 0


def _sample_live(arguments, changes: dict) -> int:
    """Have a run that is going on draw, and print what it drew. changes: settings in place of the run's."""
    if arguments.out is not None:
        raise UserError(f"--live draws into {arguments.run / 'samples' / 'live'}; leave out -o")
    if arguments.gpus is not None:
        raise UserError("--live draws with the processes of the run; leave out --gpus")
    if arguments.checkpoint != "last":
        raise UserError("--live draws with the weights in memory; leave out --checkpoint")
    if arguments.embeddings:
        raise UserError(
            "--live draws with the words that the run began with (sample.embeddings); leave out --embedding"
        )
    if arguments.lora_scale != 1:
        raise UserError("--live draws with the weights in memory, as trained; leave out --lora-scale")
    if not arguments.timeout > 0:
        raise UserError(f"--timeout {arguments.timeout:g} is not above 0; use 600")
    say_loading()
    from safelight.trainer.inference.live_request import ask
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal:
        answer = ask(arguments.run, list(arguments.prompt), changes, arguments.timeout, terminal.say)
    for file in answer.files:
        print_line(file)
    print_line(f"drawn by the weights after step {answer.step}")
    say_next(f"open {shlex.quote(str(arguments.run / 'samples' / 'live' / 'index.html'))} in a browser")
    return 0
