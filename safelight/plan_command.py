"""`safelight plan`: predicts memory, duration and disk space of a run."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from safelight.errors import UserError
from safelight.output.show import command_to_train, print_json, print_line, print_table, say_loading, say_next
from safelight.text import counted

# far above what one run gains from (docs/scale.md)
MAX_GPUS = 10_000


def plan(argv: list[str], description: str) -> int:
    """Run `safelight plan` and return its exit status."""
    from safelight.options.parsing import parse_with_config, settings_given

    arguments, config = parse_with_config(argv, "plan", description)
    _check_gpus(arguments.gpus, arguments.link)
    say_loading("loading libraries, then tracing a training step without a GPU")
    from safelight.trainer.loading.disk_space import space_note
    from safelight.trainer.loading.notes import kept_by_stages, notes_of, prediction_note
    from safelight.trainer.loading.rate_advice import rates_line, rates_of
    from safelight.trainer.memory_plan.static_bytes import summary
    from safelight.trainer.models.architectures import known_shapes
    from safelight.trainer.models.base import base_of

    base, shapes = config.model.base, known_shapes(config.model.base)
    if shapes:
        # so that a plan needs neither a download nor the hub
        config.model.base = f"random:{shapes}"
    card = _card(arguments.gpu, config)
    ranks = None
    if card is None:
        if arguments.gpus is not None:
            raise UserError(f"--gpus {arguments.gpus}: there is no GPU here; name one: --gpu t4, or its memory: 8GiB")
        result = summary(config)
    else:
        from safelight.trainer.memory_plan.meta_run import CUDA
        from safelight.trainer.memory_plan.planner import Planner
        from safelight.trainer.memory_plan.resolve_auto import filled_in
        from safelight.trainer.run_log.terminal import Terminal

        if arguments.gpus is not None:
            from safelight.trainer.distributed.spread import spread
            from safelight.trainer.memory_plan.communication import find_link
            from safelight.trainer.memory_plan.ranks_plan import ranks_of, ranks_summary

            link, given = find_link(arguments.link, card), config
            # its steps, too, are those that several processes train
            config = spread(given, arguments.gpus)[0]
            planner = Planner(config, card, ranks_of(config, arguments.gpus, link))
        else:
            planner = Planner(config, card)
        with Terminal() as terminal:
            gpu_plan = planner.summary(partial(terminal.update, "planning"))
            if arguments.gpus is not None:
                ranks = ranks_summary(given, card, arguments.gpus, link)
        if gpu_plan["chosen"]:
            config = filled_in(config, gpu_plan["chosen"])
        result = {**summary(config, CUDA, planner.dtype), "plan": gpu_plan}
        if ranks is not None:
            result["gpus"] = ranks
    result["base"] = base
    if shapes:
        result["known shapes"] = shapes
    result["learning rate"] = rates_of(config)
    result["notes"] = kept_by_stages(config, settings_given(argv))
    result["notes"] += notes_of(config, config.run.device if card is None else "cuda")
    more = (prediction_note(config, base_of(config.model)), space_note(config, result["checkpoint bytes"]))
    result["notes"] += [note for note in more if note]
    if ranks is not None:
        result["notes"] += ranks.pop("notes")
    if arguments.json:
        from safelight.output.plan_json import with_json_names

        print_json(with_json_names(result))
    else:
        _print_plan(result, rates_line(config, result["learning rate"]))
    if card is not None and result["plan"]["refusal"]:
        raise UserError(result["plan"]["refusal"] + _other_shards(ranks))
    if not arguments.json:
        say_next(_after_plan(arguments.config, config, "dataset" in result, arguments.gpus))
    return 0


def _check_gpus(num: int | None, link: str | None) -> None:
    """Raise UserError for a number of GPUs that exchange nothing, and for a link without any."""
    if num is None:
        if link is not None:
            raise UserError(f"--link {link} is what several GPUs are connected by; add --gpus 2 or more")
        return
    if num == 1:
        raise UserError("--gpus 1: a single GPU exchanges nothing; leave it out, or use 2 or more")
    if not 2 <= num <= MAX_GPUS:
        raise UserError(f"--gpus {num} must be 2 to {MAX_GPUS:,}")


def _other_shards(ranks: dict | None) -> str:
    """Return which values of distributed.shard fit where the run's own does not, as the end of a refusal."""
    from safelight.units import GIB

    fitting = {} if ranks is None else {shard: row for shard, row in ranks["shards"].items() if row["fits"]}
    needs = [f"{row['candidate']['needed'] / GIB:.2f} GiB with {shard}" for shard, row in fitting.items()]
    return f"; --distributed.shard divides what each GPU holds: {' and '.join(needs)}" if needs else ""


def _after_plan(file: Path, config, has_dataset: bool, gpus: int | None) -> str:
    """Return what to run after `safelight plan FILE`, on so many GPUs."""
    from safelight.data.manifest import how_to_prepare

    train = command_to_train(file) + (f" --gpus {gpus}" if gpus else "")
    if has_dataset:
        return f"{train}, with the same settings"
    prepare, place = how_to_prepare(Path(config.data.path))
    if place != Path(config.data.path):
        train = f"{train} --data.path {shlex.quote(str(place))}"
    return f"{prepare}, then {train}, with the same settings"


def _card(name: str, config):
    """Return the GPU named by --gpu, else the local one, else None."""
    import torch

    from safelight.trainer.memory_plan.gpus import find_card, this_card

    if name and name != "auto":
        return find_card(name)
    if not torch.cuda.is_available() or config.run.device == "cpu":
        if name == "auto":
            raise UserError(
                "--gpu auto: torch finds no CUDA device; give a GPU: t4, rtx3060, rtx4090, or its memory: 8GiB"
            )
        return None
    return this_card(torch.device("cuda"))


def _print_plan(result: dict, rates: str) -> None:
    from safelight.output.columns import fill
    from safelight.units import GIB

    if "known shapes" in result:
        from safelight.trainer.models.architectures import TITLES

        shapes = TITLES[result["known shapes"]]
        print(fill(f"The plan takes the known shapes of {shapes}; {result['base']} was not read."))
    if "plan" in result:
        from safelight.output.plan_table import print_ranks, print_ways

        print_ways(result)
        if "gpus" in result:
            print_ranks(result)
    else:
        from safelight.output.plan_table import trained_words

        parts = result["bytes"]
        print_table(
            f"{result['base']}, {result['unet_parameters']:,} parameters in {result['unet_tensors']} tensors, "
            f"{trained_words(result)}{result['precision']}, {result['optimizer']}",
            ("static memory", "bytes", "GiB", "bytes per parameter"),
            [
                (name, f"{n:,}", f"{n / GIB:.2f}", f"{n / result['unet_parameters']:.2f}")
                for name, n in parts.items()
                if n
            ],
        )
        print(fill("This machine has no GPU. Use --gpu t4 (rtx3060, rtx4090, 8GiB) to plan the whole step for one."))
    size, num = result["checkpoint bytes"], result["checkpoints at most"]
    print_line(f"A checkpoint takes {size / GIB:.2f} GiB on disk; up to {num} at a time: {num * size / GIB:.2f} GiB.")
    if "dataset" in result:
        data = result["dataset"]
        num = data["class images"]
        beside = f", beside {counted(num, 'class image')}" if num else ""
        steps, images = counted(data["steps"], "step"), counted(data["images trained"], "image")
        length = f"{counted(data['epochs'], 'epoch')}, {steps} over {images}"
        if data["end"]:
            length = f"{steps} over up to {images} ({data['end']})"
        text = (
            f"{counted(data['photographs'], 'photograph')}, {data['validation']} held out{beside}; "
            f"{length}; "
            f"the cache takes up to {data['cache bytes'] / 2**20:.1f} MiB on disk; "
            f"crops leave out {100 * data['crop loss']:.1f} % of the pixels."
        )
        weighted = [counted(data[kind], kind.removesuffix("s")) for kind in ("masks", "loss scales") if data[kind]]
        if weighted:
            text += f" The photographs to train on have {' and '.join(weighted)}."
        print(fill(text))
    else:
        path = result["dataset path"]
        print(fill(f"No dataset in {path} yet; with one, the plan also shows steps and disk space."))
    print(fill(rates))
    for note in result["notes"]:
        print(fill(f"note: {note}"))
