"""`safelight caption`: captions, their preview, and tags. Heavy imports are deferred until they are needed."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING

from safelight.errors import EXIT_INTERRUPTED, UserError
from safelight.output.show import print_json, print_line, say_loading, say_next

if TYPE_CHECKING:
    from safelight.options.arguments import Caption
    from safelight.trainer.run_log.terminal import Terminal


def caption(argv: list[str], description: str) -> int:
    """Run `safelight caption` and return its exit status."""
    from safelight.options.arguments import Caption
    from safelight.options.parsing import parse, without_options

    arguments = parse(Caption, argv, "caption", description)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size} is below 1; leave it out, or give 8")
    if arguments.model is not None and not arguments.model.strip():
        raise UserError("--model is empty; give a model of the hub or a folder, or leave it out for the usual one")
    if arguments.tags is not None or arguments.tags_from_detector is not None:
        return _tag(arguments, argv)
    if arguments.min_confidence is not None:
        raise UserError("--min-confidence is of tags; add --tags categories.txt, or leave it out")
    from safelight.data.manifest import read_manifest
    from safelight.trainer.captioning.options import (
        DEFAULT_MODEL,
        MAX_PREVIEW_PHOTOS,
        Wording,
        asked_for,
        replacement,
    )

    model = arguments.model or DEFAULT_MODEL

    names = ("prompt", "num_beams", "min_new_tokens", "max_new_tokens", "repetition_penalty", "top_p")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    generation = asked_for(arguments.preset, given, arguments.seed)
    wording = Wording(arguments.prefix, arguments.suffix, tuple(map(replacement, arguments.replace)))
    if arguments.preview is not None and not 1 <= arguments.preview <= MAX_PREVIEW_PHOTOS:
        raise UserError(
            f"--preview {arguments.preview} is outside 1 to {MAX_PREVIEW_PHOTOS}; five are enough to choose"
        )
    # before torch is imported
    read_manifest(arguments.dataset)
    say_loading()
    from safelight.output.caption_table import caption_json, print_captions
    from safelight.trainer.between_steps.stop import Stop
    from safelight.trainer.captioning.caption_dataset import caption_dataset
    from safelight.trainer.models.device import pick_device
    from safelight.trainer.run_log.terminal import Terminal

    device, stop = pick_device(arguments.device), Stop("this batch")
    if arguments.preview:
        from safelight.trainer.captioning.preview import write_preview

        with Terminal() as terminal:
            page = write_preview(
                arguments.dataset,
                arguments.preview,
                model,
                generation,
                wording,
                device,
                ["safelight", "caption", *without_options(argv, ("--json",), _VARIED)],
                arguments.batch_size,
                lambda done, total, note: terminal.update("captions", done, total, note),
                terminal.say,
            )
        print_json({"page": str(page)}) if arguments.json else print_line(page)
        if not arguments.json:
            say_next(f"open {shlex.quote(str(page))} in a browser, and run the command of the captions that you like")
        return 0
    with Terminal() as terminal:
        summary = caption_dataset(
            arguments.dataset,
            model,
            generation,
            wording,
            device,
            arguments.batch_size,
            arguments.overwrite,
            lambda done, total, note: terminal.update("captions", done, total, note),
            terminal.say,
            stop_requested=stop,
            guard=stop,
        )
    if arguments.json:
        print_json(caption_json(summary, arguments.dataset))
    else:
        print_captions(summary, arguments.dataset, terminal)
    return _ended(arguments, argv, summary.left, terminal)


# what `safelight caption --preview` varies, and itself
_VARIED = ("--preview", "--repetition-penalty", "--q-factor", "--min-new-tokens", "--min-words")
# arguments of `safelight caption` that have a meaning for tags
_OF_TAGS = (
    "dataset",
    "model",
    "overwrite",
    "tags",
    "tags_from_detector",
    "min_confidence",
    "batch_size",
    "device",
    "json",
)


def _tag(arguments: Caption, argv: list[str]) -> int:
    """Run `safelight caption` with --tags or --tags-from-detector."""
    for field in fields(arguments):
        if field.name not in _OF_TAGS and getattr(arguments, field.name) != field.default:
            option = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{option} is of captions and has no effect on tags; leave it out, and caption separately")
    if arguments.model is not None and arguments.tags_from_detector is not None:
        raise UserError("--model is of --tags without a detector; give either it or --tags-from-detector")
    from safelight.data.manifest import read_manifest
    from safelight.trainer.captioning.options import DEFAULT_CLIP, LEAST_CONFIDENCE, MIN_CONFIDENCE
    from safelight.trainer.tagging.categories import DEFAULT_CATEGORIES, read_categories

    min_confidence = MIN_CONFIDENCE if arguments.min_confidence is None else arguments.min_confidence
    if not LEAST_CONFIDENCE <= min_confidence <= 1:
        raise UserError(f"--min-confidence {min_confidence:g} is outside {LEAST_CONFIDENCE} to 1")
    read_manifest(arguments.dataset)
    is_new, categories = False, DEFAULT_CATEGORIES
    if arguments.tags is not None:
        categories, is_new = read_categories(arguments.tags)
    say_loading()
    from safelight.output.tag_table import print_tags, tags_json
    from safelight.trainer.between_steps.stop import Stop
    from safelight.trainer.models.device import pick_device
    from safelight.trainer.run_log.terminal import Terminal
    from safelight.trainer.tagging.tag_dataset import tag_dataset
    from safelight.trainer.tagging.taggers import open_clip, open_detector

    device, stop = pick_device(arguments.device), Stop("this batch")
    detector = arguments.tags_from_detector
    with Terminal() as terminal:
        if is_new:
            terminal.say(f"wrote {arguments.tags} with the usual categories; edit it, and run this command again")
        summary = tag_dataset(
            arguments.dataset,
            open_clip(arguments.model or DEFAULT_CLIP) if detector is None else open_detector(detector),
            categories,
            min_confidence,
            device,
            arguments.batch_size,
            arguments.overwrite,
            lambda done, total, note: terminal.update("tags", done, total, note),
            terminal.say,
            stop_requested=stop,
            guard=stop,
        )
    if arguments.json:
        print_json(tags_json(summary, arguments.dataset))
    else:
        print_tags(summary, arguments.dataset, terminal)
    return _ended(arguments, argv, summary.left, terminal)


def _ended(arguments: Caption, argv: list[str], num_left: int, terminal: Terminal) -> int:
    """Say what comes next and return the exit status. num_left: photos that a stop left undone."""
    if num_left:
        command = shlex.join(["safelight", "caption", *argv])
        terminal.say(f"stopped; what is done is in the dataset. Go on with: {command}")
        return EXIT_INTERRUPTED
    if not arguments.json:
        say_next(f"safelight train run.toml --data.path {shlex.quote(str(arguments.dataset))}")
    return 0
