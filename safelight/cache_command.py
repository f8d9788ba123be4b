"""`safelight cache`: encodes what a dataset's cache lacks; checks it, describes it, or frees what nothing needs."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from safelight.errors import UserError
from safelight.output.show import command_to_train, print_json, print_table, say_loading, say_next
from safelight.several import launched
from safelight.text import counted


def cache(argv: list[str], description: str) -> int:
    """Run `safelight cache` and return its exit status."""
    from safelight.options.parsing import parse_with_config

    arguments, config = parse_with_config(argv, "cache", description)
    action = _cache_action(arguments, argv)
    if action is not None and arguments.gpus is not None:
        raise UserError("--gpus shares the encoding of what the cache lacks; leave it out")
    if (status := launched("cache", argv, arguments.gpus, config)) is not None:
        return status
    say_loading()
    if action is not None:
        return action(arguments, config)
    from safelight.output.columns import fill
    from safelight.trainer.loading.dataset import open_dataset
    from safelight.trainer.loading.processes import joined
    from safelight.trainer.models import placing
    from safelight.trainer.models.base import base_of
    from safelight.trainer.models.device import pick_device
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal, joined("cache", config, terminal) as world:
        device = pick_device(config.run.device)
        dataset = open_dataset(config, base_of(config.model), device, terminal.update, world=world)
    if not world.is_main:
        dataset.cache.close()
        return 0
    if dataset.num_damaged:
        rows = counted(dataset.num_damaged, "damaged row")
        terminal.say(f"{rows} in the cache re-encoded")
    for note in dataset.cut_notes:
        terminal.say(note)
    with dataset.cache:
        rows = dataset.counts()
        if arguments.json:
            captions = {"num_captions": dataset.num_captions, "num_tagged": dataset.num_tagged}
            result = {"made": dataset.num_encoded, "rows": len(dataset.cache), **captions, "buckets": rows}
            print_json({**result, **placing.to_json(dataset.placed)})
            return 0
        print_table(
            f"{dataset.path}: {counted(dataset.num_encoded, 'row')} encoded, {len(dataset.cache)} in the cache",
            ("bucket", "train", "held out", "cropped away"),
            [
                (f"{r['width']} x {r['height']}", r["num_train"], r["num_validation"], f"{100 * r['crop_loss']:.1f} %")
                for r in rows
            ],
        )
    for line in filter(
        None, (placing.crop_note(dataset.placed.train), dataset.tag_note, dataset.length_note, dataset.vae_note)
    ):
        print(fill(line))
    for note in placing.size_notes(dataset.placed, config.data.upscale):
        print(fill(f"note: {note}"))
    say_next(f"{command_to_train(arguments.config)}, with the same settings")
    return 0


def _cache_action(arguments, argv: list[str]):
    """Return what `safelight cache` does instead of filling the cache, None if it fills it."""
    actions = {"verify": partial(_verify_cache, argv), "stats": _cache_stats, "gc": _collect_cache}
    chosen = [name for name in actions if getattr(arguments, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} are separate commands; give one, then the other")
    for option, owner in (("sample", "verify"), ("keep", "gc"), ("dry_run", "gc")):
        if getattr(arguments, option) not in (None, (), False) and [owner] != chosen:
            raise UserError(f"--{option.replace('_', '-')} goes with --{owner}; add it, or leave this out")
    if arguments.sample is not None and arguments.sample < 0:
        raise UserError(f"--sample {arguments.sample} is below 0; use 0 for checksums alone, or 32")
    return actions[chosen[0]] if chosen else None


def _planned(config, exclusive: bool = False):
    from safelight.trainer.loading.dataset import plan_dataset
    from safelight.trainer.models.base import base_of
    from safelight.trainer.models.device import pick_device

    return plan_dataset(config, base_of(config.model), pick_device(config.run.device), exclusive)


def _verify_cache(argv: list[str], arguments, config) -> int:
    from safelight.data.verify import verify
    from safelight.options.parsing import without_options
    from safelight.output.cache_table import print_verified, verified_json
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal:
        plan = _planned(config)
        with plan.dataset.cache as cache:
            num = 32 if arguments.sample is None else arguments.sample
            found = verify(cache, plan.rows(), num, config.run.seed, terminal.update)
    if arguments.json:
        print_json(verified_json(found))
    else:
        fill = without_options(argv, ("--verify",), ("--sample",))
        print_verified(found, plan.dataset.path, shlex.join(["safelight", "cache", *fill]))
    return 0 if found.is_sound else 1


def _cache_stats(arguments, config) -> int:
    from safelight.data.cache_stats import cache_stats
    from safelight.output.cache_table import print_stats, stats_json
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal:
        plan = _planned(config)
        with plan.dataset.cache as cache:
            stats = cache_stats(cache, plan.rows(), partial(terminal.update, "rows"))
    if arguments.json:
        print_json(stats_json(stats, plan.dataset.scaling_factor))
    else:
        print_stats(stats, plan.dataset.path, plan.dataset.scaling_factor)
    return 0


def _collect_cache(arguments, config) -> int:
    from safelight.data.garbage import collect_garbage
    from safelight.options.parsing import load_run_config
    from safelight.output.cache_table import freed_json, print_freed
    from safelight.trainer.run_log.terminal import Terminal

    needed: set[str] = set()
    with Terminal():
        for file in arguments.keep:
            other = load_run_config(file)
            if Path(other.data.path).resolve() != Path(config.data.path).resolve():
                raise UserError(
                    f"--keep {file}: its data.path is {other.data.path}, not {config.data.path}, and so its cache is "
                    "another; leave it out"
                )
            plan = _planned(other)
            plan.dataset.cache.close()
            needed |= plan.rows().keys()
        plan = _planned(config, exclusive=not arguments.dry_run)
        with plan.dataset.cache as cache:
            freed = collect_garbage(cache, needed | plan.rows().keys(), plan.files, arguments.dry_run)
    if arguments.json:
        print_json(freed_json(freed, arguments.dry_run))
    else:
        print_freed(freed, plan.dataset.path, arguments.dry_run)
    return 0
