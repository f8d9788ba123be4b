"""The commands, one short function each. Heavy imports are deferred until a command needs them."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path

from safelight import bug_report
from safelight.errors import UserError
from safelight.output.show import command_to_train, print_json, print_line, print_table, say_loading, say_next
from safelight.text import counted

COMMANDS = {
    "init": "write a commented settings file: tiny, sd15, sd21, sdxl, everydream2",
    "prepare": "make a dataset from photos and captions: checked, resized, no duplicates",
    "caption": "describe a dataset's photos with BLIP or another captioner",
    "cache": "encode a dataset's photos and captions, only those not cached yet",
    "plan": "predict GPU memory and duration of a run; needs no GPU",
    "train": "fine-tune; --resume continues from the newest checkpoint",
    "sample": "generate images from prompts with a checkpoint of a run",
    "compare": "draw base, checkpoints and real photo side by side, from the same noise",
    "grid": "draw all combinations of up to three settings, such as cfg and steps",
    "evaluate": "measure base, checkpoints and photographs: KID, CLIPScore, crops, burn, copies",
    "export": "write one .safetensors for A1111 and ComfyUI, or a diffusers folder",
    "report": "write an HTML page about a run, or several; --serve follows a run",
    "demo": "fine-tune a tiny model, start to finish; minutes on two CPU cores",
    "profile": "show where a step spends time and memory: flame chart, roofline, trace",
    "bench": "measure the training step, other recipes, kernels, memory, the loader",
}


def init(argv: list[str]) -> int:
    from safelight.data.atomic import atomic_write_text
    from safelight.options.arguments import Init, parse
    from safelight.trainer.config.presets import PRESETS, preset
    from safelight.trainer.config.toml import to_toml

    if not argv:
        raise UserError(f"give a preset: {', '.join(PRESETS)}; see safelight init --help")
    arguments = parse(Init, argv, "init", COMMANDS["init"])
    config = preset(arguments.preset)
    if arguments.out.exists() and not arguments.force:
        raise UserError(f"{arguments.out} already exists; choose another file with -o, or add --force to overwrite it")
    atomic_write_text(arguments.out, to_toml(config, comments=True))
    print_line(
        f"wrote {arguments.out}; next: safelight prepare PHOTOS -o {config.data.path}, "
        f"then safelight train {shlex.quote(str(arguments.out))}"
    )
    return 0


def prepare(argv: list[str]) -> int:
    from safelight.options.arguments import Prepare, parse

    arguments = parse(Prepare, argv, "prepare", COMMANDS["prepare"])
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


def caption(argv: list[str]) -> int:
    from safelight import caption_command

    return caption_command.caption(argv, COMMANDS["caption"])


def cache(argv: list[str]) -> int:
    from safelight import cache_command

    return cache_command.cache(argv, COMMANDS["cache"])


def plan(argv: list[str]) -> int:
    from safelight.options.arguments import parse_with_config

    arguments, config = parse_with_config(argv, "plan", COMMANDS["plan"])
    say_loading("loading libraries, then tracing a training step without a GPU")
    from safelight.trainer.disk_space import space_note
    from safelight.trainer.memory_plan.static_bytes import summary
    from safelight.trainer.models.architectures import known_shapes
    from safelight.trainer.notes import notes_of
    from safelight.trainer.rate_advice import rates_line, rates_of

    base, shapes = config.model.base, known_shapes(config.model.base)
    if shapes:
        # so that a plan needs neither a download nor the hub
        config.model.base = f"random:{shapes}"
    card = _card(arguments.gpu, config)
    if card is None:
        result = summary(config)
    else:
        from safelight.trainer.memory_plan.meta_run import CUDA
        from safelight.trainer.memory_plan.planner import Planner
        from safelight.trainer.memory_plan.resolve_auto import filled_in
        from safelight.trainer.run_log.terminal import Terminal

        planner = Planner(config, card)
        with Terminal() as terminal:
            gpu_plan = planner.summary(partial(terminal.update, "planning"))
        if gpu_plan["chosen"]:
            config = filled_in(config, gpu_plan["chosen"])
        result = {**summary(config, CUDA, planner.dtype), "plan": gpu_plan}
    result["base"] = base
    if shapes:
        result["known shapes"] = shapes
    result["learning rate"] = rates_of(config)
    result["notes"] = notes_of(config, config.run.device if card is None else "cuda")
    if note := space_note(config, result["checkpoint bytes"]):
        result["notes"].append(note)
    if arguments.json:
        from safelight.output.plan_json import with_json_names

        print_json(with_json_names(result))
    else:
        _print_plan(result, rates_line(config, result["learning rate"]))
    if card is not None and result["plan"]["refusal"]:
        raise UserError(result["plan"]["refusal"])
    if not arguments.json:
        say_next(_after_plan(arguments.config, config, "dataset" in result))
    return 0


def _after_plan(file: Path, config, has_dataset: bool) -> str:
    """Return what to run after `safelight plan FILE`."""
    from safelight.data.manifest import how_to_prepare

    train = command_to_train(file)
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
        from safelight.output.plan_table import print_ways

        print_ways(result)
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
        text = (
            f"{counted(data['photographs'], 'photograph')}, {data['validation']} held out{beside}; "
            f"{counted(data['epochs'], 'epoch')}, {counted(data['steps'], 'step')} "
            f"over {counted(data['images trained'], 'image')}; "
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


def train(argv: list[str]) -> int:
    from safelight import train_command

    return train_command.train(argv, COMMANDS["train"])


def sample(argv: list[str]) -> int:
    from safelight.options.arguments import Sample, parse

    arguments = parse(Sample, argv, "sample", COMMANDS["sample"])
    bug_report.belongs_to(arguments.run)
    names = ("steps", "seed", "width", "height", "sampler", "spacing", "negative_prompt")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.cfg:
        changes["cfg"] = list(arguments.cfg)
    if arguments.live:
        return _sample_live(arguments, changes)
    if not arguments.prompt:
        raise UserError('give --prompt "..."; a run that is going on draws its own with --live')
    say_loading()
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.draw import sample as draw_sample
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal:
        files = draw_sample(
            open_run(arguments.run, arguments.embeddings),
            list(arguments.prompt),
            arguments.checkpoint,
            arguments.out or arguments.run / "images",
            changes,
            lambda done, total: terminal.update("sampling", done, total),
            terminal.say,
            arguments.lora_scale,
        )
    for file in files:
        print_line(file)
    if (files[0].parent / "index.html").is_file() and arguments.out not in files:
        say_next(f"open {shlex.quote(str(files[0].parent / 'index.html'))} in a browser")
    return 0


def _sample_live(arguments, changes: dict) -> int:
    """Have a run that is going on draw, and print what it drew. changes: settings in place of the run's."""
    if arguments.out is not None:
        raise UserError(f"--live draws into {arguments.run / 'samples' / 'live'}; leave out -o")
    if arguments.checkpoint != "last":
        raise UserError("--live draws with the weights in memory; leave out --checkpoint")
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


def compare(argv: list[str]) -> int:
    from safelight.options.arguments import Compare, parse

    arguments = parse(Compare, argv, "compare", COMMANDS["compare"])
    bug_report.belongs_to(arguments.run)
    say_loading()
    from safelight.trainer.inference.compare import FOLDER
    from safelight.trainer.inference.compare import compare as draw_comparison
    from safelight.trainer.inference.compared_prompts import compared_prompts
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.which_checkpoint import best_and_last, pick_steps, with_chosen
    from safelight.trainer.report.build import build_report
    from safelight.trainer.run_log.terminal import Terminal

    opened, named = open_run(arguments.run, arguments.embeddings), arguments.checkpoints

    def choose() -> list[int]:
        return best_and_last(arguments.run) if named is None else pick_steps(arguments.run, named)

    # before prompts are read
    choose()
    with Terminal() as terminal:
        prompts = compared_prompts(opened, arguments.num, terminal.say)
        try:
            comparison = with_chosen(
                choose,
                lambda steps: draw_comparison(
                    opened,
                    steps,
                    prompts,
                    num_seeds=arguments.seeds,
                    progress=lambda done, total: terminal.update("sampling", done, total),
                    say=terminal.say,
                ),
                terminal.say,
            )
        except KeyboardInterrupt:
            terminal.say("what is drawn so far is kept; the same command draws the rest")
            raise
    rows, models = counted(len(comparison.rows), "row"), counted(len(comparison.models), "model")
    print_line(
        f"{rows} of {models} in {arguments.run / FOLDER} (open its index.html); report: {build_report(arguments.run)}"
    )
    run = shlex.quote(str(arguments.run))
    print_line(
        f"next: open the report in a browser; "
        f"safelight export {run} -o {shlex.quote(arguments.run.resolve().name)}.safetensors"
    )
    return 0


def grid(argv: list[str]) -> int:
    from safelight import grid_command

    return grid_command.grid(argv, COMMANDS["grid"])


def evaluate(argv: list[str]) -> int:
    from safelight import evaluate_command

    return evaluate_command.evaluate(argv, COMMANDS["evaluate"])


def export(argv: list[str]) -> int:
    from safelight.options.arguments import Export, parse

    arguments = parse(Export, argv, "export", COMMANDS["export"])
    bug_report.belongs_to(arguments.run)
    for name in ("push_existing", "public", "yes"):
        if getattr(arguments, name) and not arguments.push:
            raise UserError(f"--{name.replace('_', '-')} is for --push USER/REPO; give both, or leave it out")
    say_loading()
    from safelight.trainer.inference.export import export as export_run
    from safelight.trainer.inference.push import check_target, describe_upload, push
    from safelight.trainer.run_log.terminal import Terminal

    target = None
    if arguments.push:
        # before gigabytes are written
        if not arguments.yes and not (sys.stdin and sys.stdin.isatty()):
            raise UserError("--push asks before it uploads, and there is no terminal to answer on; add --yes")
        target = check_target(arguments.push, not arguments.public, arguments.push_existing)
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
        arguments.card or target is not None,
    )
    for note in done.notes:
        Terminal().say(f"note: {note}")
    is_small = done.num_bytes < 2**20
    num_bytes = f"{done.num_bytes / 2**10:,.1f} KiB" if is_small else f"{done.num_bytes / 2**20:,.1f} MiB"
    print_line(f"wrote {done.path}: step {done.step}, {done.dtype}, {num_bytes}")
    if done.card_files:
        print_line(f"wrote {done.card_files[0]}: its model card, with {counted(len(done.card_files) - 1, 'sample')}")
    if target is not None:
        for line in describe_upload(done.path, target, done.card_files):
            print_line(line)
        if not arguments.yes and input("upload? [y/N] ").strip().lower() not in ("y", "yes"):
            print_line(f"nothing was uploaded; {done.path} stays")
            return 0
        print_line(f"uploaded: {push(done.path, target, done.card_files, f'Step {done.step}, by Safelight')}")
        return 0
    if done.is_word and done.path.is_dir():
        say_next(f"in Python: pipeline.load_textual_inversion({str(done.path)!r})")
    elif done.is_word:
        say_next("copy it to A1111's embeddings or ComfyUI's models/embeddings")
    elif done.layout == "kohya":
        say_next("copy it to A1111's models/Lora or ComfyUI's models/loras")
    elif done.layout:
        say_next(f"in Python: pipeline.load_lora_weights({str(done.path)!r}); for A1111 and ComfyUI: --layout kohya")
    elif done.path.is_dir():
        say_next(f"in Python: DiffusionPipeline.from_pretrained({str(done.path)!r})")
    elif not done.notes:
        say_next("copy it to A1111's models/Stable-diffusion or ComfyUI's models/checkpoints")
    return 0


def report(argv: list[str]) -> int:
    from safelight import report_command

    return report_command.report(argv, COMMANDS["report"])


def demo(argv: list[str]) -> int:
    from safelight.options.arguments import Demo, parse

    arguments = parse(Demo, argv, "demo", COMMANDS["demo"])
    if arguments.dir.exists() and not arguments.dir.is_dir():
        raise UserError(f"{arguments.dir} is a file; give a folder with --dir")
    from safelight.trainer.run_log.terminal import Terminal
    from safelight.trainer.tiny.demo import run_demo

    result = run_demo(arguments.dir, Terminal(), arguments.model)
    if arguments.json:
        print_json(result)
        return 0
    rows = [
        (
            row["what"],
            *(
                f"{100 * row[k][0]:.0f} %  [{100 * row[k][1]:.0f}, {100 * row[k][2]:.0f}]"
                for k in ("base", "trained", "difference")
            ),
            "" if row["chance"] is None else f"{100 * row['chance']:.0f} %",
        )
        for row in result["rows"]
    ]
    print_table(
        f"{result['num_samples']} images of combinations left out of fine-tuning, {result['interval']} intervals",
        ("", "base", "trained", "difference", "chance"),
        rows,
    )
    print_line(f"report: {result['report']}")
    return 0


def profile(argv: list[str]) -> int:
    from safelight.options.arguments import parse_with_config

    arguments, config = parse_with_config(argv, "profile", COMMANDS["profile"])
    say_loading()
    from safelight.bench.core.results import append
    from safelight.bench.profile.profiling import profile_run
    from safelight.trainer.run_log.terminal import Terminal

    with Terminal() as terminal:
        profiled = profile_run(config, arguments.steps, arguments.out, terminal)
    if arguments.append is not None:
        append(arguments.append, profiled.record)
    if arguments.json:
        print_json(profiled.record)
        return 0
    analysis = profiled.analysis
    title = (
        f"step time by phase: {analysis.unprofiled_ms:,.1f} ms per step, {analysis.step_ms:,.1f} under the profiler; "
        f"model FLOP utilization {100 * analysis.model_flop_use:.1f} %"
    )
    for head, part in ((title, analysis.phases), ("step time by class of operator", analysis.kinds)):
        rows = [(name, f"{ms:.2f}", f"{100 * ms / sum(part.values()):.0f} %") for name, ms in part.items()]
        print_table(head, ("", "ms", "share"), rows)
    for file in profiled.files:
        print_line(file)
    say_next(f"open {profiled.files[0]} in a browser")
    return 0


def bench(argv: list[str]) -> int:
    from safelight.bench.command_line import MEASURING
    from safelight.bench.command_line import main as bench_main

    if argv and argv[0] in MEASURING and not {"-h", "--help"} & set(argv):
        say_loading("loading libraries, then measuring; the first result takes seconds to minutes")
    return bench_main(argv)
