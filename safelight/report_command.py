"""`safelight report`: one page about a run, a page of several side by side, or a page that follows a run."""

from __future__ import annotations

from pathlib import Path

from safelight import bug_report
from safelight.data.atomic import check_writable
from safelight.errors import UserError
from safelight.output.show import print_line, say_loading, say_next


def report(argv: list[str], description: str) -> int:
    """Run `safelight report` and return its exit status."""
    from safelight.options.arguments import Report
    from safelight.options.parsing import parse, run_folder

    arguments = parse(Report, argv, "report", description)
    if not arguments.runs:
        raise UserError("missing: RUN; see safelight report --help")
    _check_options(arguments)
    if arguments.serve:
        return _serve(arguments)
    runs = [run_folder(path) for path in arguments.runs]
    if len(runs) == 1:
        check_writable(runs[0], "a run's page is written into its folder: copy the folder, or use --serve")
    say_loading("reading the run and embedding its pictures")
    if len(runs) == 1:
        from safelight.trainer.report.build import build_report

        bug_report.belongs_to(runs[0])
        print_line(build_report(runs[0]))
    else:
        from safelight.trainer.report.side_by_side import build_side_by_side

        print_line(build_side_by_side(runs, arguments.out, arguments.force))
    say_next("open it in a browser; it is one file, which you can send to others")
    return 0


def _check_options(arguments) -> None:
    """Raise UserError for an option that would have no effect."""
    several = len(arguments.runs) > 1 and not arguments.serve
    for flag, is_given in (("-o", arguments.out is not None), ("--force", arguments.force)):
        if is_given and not several:
            raise UserError(f"{flag} is for the page about several runs; the report of one run is RUN/report.html")
    if arguments.port is not None and not arguments.serve:
        raise UserError("--port is for --serve")
    if arguments.serve and len(arguments.runs) > 1:
        raise UserError("--serve takes one folder: a run, or a folder that holds runs")


def _serve(arguments) -> int:
    from safelight.options.parsing import run_folder
    from safelight.trainer.live.serve import open_server

    folder: Path = arguments.runs[0]
    # a settings file names a run; a folder may hold runs instead
    folder = folder if folder.is_dir() else run_folder(folder)
    with open_server(folder, arguments.port) as server:
        print_line(server.address)
        port = server.server_port
        say_next(
            "open it in a browser on this computer; Ctrl-C ends it. From another one, first: "
            f"ssh -L {port}:127.0.0.1:{port} THIS_COMPUTER"
        )
        server.serve_until_interrupted()
    return 0
