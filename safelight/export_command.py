"""`safelight export`: writes a run's model, LoRA or word, and uploads it on request."""

from __future__ import annotations

import sys

from safelight import bug_report
from safelight.errors import UserError
from safelight.output.show import print_line, say_loading, say_next
from safelight.text import counted


def export(argv: list[str], description: str) -> int:
    """Run `safelight export` and return its exit status."""
    from safelight.options.arguments import Export
    from safelight.options.parsing import parse

    arguments = parse(Export, argv, "export", description)
    bug_report.belongs_to(arguments.run)
    for name in ("push_existing", "public", "yes"):
        if getattr(arguments, name) and not arguments.push:
            raise UserError(f"--{name.replace('_', '-')} is for --push USER/REPO; give both, or leave it out")
    if arguments.push:
        # what costs least first: this computer, then the run, then the hub, all before gigabytes are written
        from safelight.trainer.inference.push import check_upload

        if not arguments.yes and not (sys.stdin and sys.stdin.isatty()):
            raise UserError("--push asks before it uploads, and there is no terminal to answer on; add --yes")
        check_upload(arguments.push)
    say_loading()
    from safelight.trainer.inference.export import export as export_run
    from safelight.trainer.inference.push import check_target, describe_upload, push
    from safelight.trainer.run_log.terminal import Terminal

    targets = []

    def ask_hub() -> None:
        if arguments.push:
            targets.append(check_target(arguments.push, not arguments.public, arguments.push_existing))

    done = export_run(
        arguments.run,
        arguments.out,
        arguments.checkpoint,
        arguments.dtype or "",
        arguments.title,
        arguments.force,
        arguments.weights,
        arguments.merge,
        arguments.layout,
        arguments.lora_scale,
        # who uploads a file uploads its card with it
        arguments.card or bool(arguments.push),
        ask_hub,
    )
    for note in done.notes:
        Terminal().say(f"note: {note}")
    is_small = done.num_bytes < 2**20
    num_bytes = f"{done.num_bytes / 2**10:,.1f} KiB" if is_small else f"{done.num_bytes / 2**20:,.1f} MiB"
    print_line(f"wrote {done.path}: step {done.step}, {done.dtype}, {num_bytes}")
    if done.card_files:
        print_line(f"wrote {done.card_files[0]}: its model card, with {counted(len(done.card_files) - 1, 'sample')}")
    for target in targets:
        for line in describe_upload(done.path, target, done.card_files):
            print_line(line)
        if not arguments.yes and input("upload? [y/N] ").strip().lower() not in ("y", "yes"):
            print_line(f"nothing was uploaded; {done.path} stays")
            return 0
        print_line(f"uploaded: {push(done.path, target, done.card_files, f'Step {done.step}, by Safelight')}")
        return 0
    if done.next_step:
        say_next(done.next_step)
    return 0
