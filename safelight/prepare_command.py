"""`safelight prepare`: makes a dataset of photographs and captions."""

from __future__ import annotations

from functools import partial

from safelight.errors import UserError
from safelight.output.show import print_json


def prepare(argv: list[str], description: str) -> int:
    """Run `safelight prepare` and return its exit status."""
    from safelight.options.arguments import Prepare
    from safelight.options.parsing import parse

    arguments = parse(Prepare, argv, "prepare", description)
    if not arguments.sources:
        raise UserError("no photos given; give one or more folders of photos, or files")
    from safelight.data.prepare.ingest import ingest
    from safelight.data.sources import unsplash
    from safelight.output.dataset_table import dataset_json, print_dataset
    from safelight.trainer.run_log.terminal import Terminal

    folders, request = _sources(arguments)
    with Terminal() as terminal:
        show = partial(terminal.update, "download")
        summary = ingest(
            folders,
            arguments.out,
            max_megapixels=arguments.max_megapixels,
            quality=arguments.quality,
            image_format=arguments.image_format,
            alpha=arguments.alpha,
            kohya=arguments.kohya,
            comma_tags=arguments.comma_tags,
            drop_near_copies=arguments.drop_near_duplicates,
            prune=arguments.prune,
            progress=lambda done, total: terminal.update("photos", done, total),
            fetch=partial(unsplash.fetch, request, prune=arguments.prune, progress=show) if request else None,
        )
    if arguments.json:
        print_json(dataset_json(summary, arguments.out))
    else:
        print_dataset(summary, arguments.out, terminal, arguments.alpha)
    return 0


def _sources(arguments):
    """Return (folders and files, what to draw from Unsplash tables or None) of the arguments of `prepare`."""
    from safelight.data.sources.unsplash import PREFIX, Request, tables_of

    names = ("limit", "width", "seed", "where", "captions")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    folders = [source for source in arguments.sources if not str(source).startswith(PREFIX)]
    tables = [table for source in arguments.sources if source not in folders for table in tables_of(str(source))]
    if given and not tables:
        raise UserError(f"--{next(iter(given))} is for an Unsplash table; give one as {PREFIX}photos.tsv000")
    return folders, Request(tuple(dict.fromkeys(tables)), **given) if tables else None
