"""The commands, a short function each; longer ones have a module of their own, NAME_command.py.

Heavy imports are deferred until a command needs them.
"""

from __future__ import annotations

import shlex

from safelight import bug_report
from safelight.errors import UserError
from safelight.output.show import print_json, print_line, print_table, say_loading, say_next
from safelight.several import launched
from safelight.text import counted

COMMANDS = {
    "init": "write a commented settings file: tiny, sd15, sd15-lora, sd15-embedding, sd21, sdxl, sdxl-lora, "
    "everydream2",
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
    from safelight.options.arguments import Init
    from safelight.options.parsing import parse
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
    from safelight import prepare_command

    return prepare_command.prepare(argv, COMMANDS["prepare"])


def caption(argv: list[str]) -> int:
    from safelight import caption_command

    return caption_command.caption(argv, COMMANDS["caption"])


def cache(argv: list[str]) -> int:
    from safelight import cache_command

    return cache_command.cache(argv, COMMANDS["cache"])


def plan(argv: list[str]) -> int:
    from safelight import plan_command

    return plan_command.plan(argv, COMMANDS["plan"])


def train(argv: list[str]) -> int:
    from safelight import train_command

    return train_command.train(argv, COMMANDS["train"])


def sample(argv: list[str]) -> int:
    from safelight import sample_command

    return sample_command.sample(argv, COMMANDS["sample"])


def compare(argv: list[str]) -> int:
    from safelight.options.arguments import Compare
    from safelight.options.parsing import parse

    arguments = parse(Compare, argv, "compare", COMMANDS["compare"])
    bug_report.belongs_to(arguments.run)
    if (status := launched("compare", argv, arguments.gpus, arguments.run)) is not None:
        return status
    say_loading()
    from safelight.trainer.inference.compare import FOLDER
    from safelight.trainer.inference.compare import compare as draw_comparison
    from safelight.trainer.inference.compared_prompts import compared_prompts
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.which_checkpoint import best_and_last, pick_steps, with_chosen
    from safelight.trainer.loading.processes import joined
    from safelight.trainer.report.build import build_report
    from safelight.trainer.run_log.terminal import Terminal

    named = arguments.checkpoints

    def choose() -> list[int]:
        return best_and_last(arguments.run) if named is None else pick_steps(arguments.run, named)

    with Terminal() as terminal, joined("compare", arguments.run, terminal) as world:
        opened = open_run(arguments.run, arguments.embeddings, world)
        # before prompts are read
        choose()
        prompts = compared_prompts(opened, arguments.num, terminal.say)
        try:
            comparison = with_chosen(
                lambda: world.from_main(choose()),
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
    if not world.is_main:
        return 0
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
    from safelight import export_command

    return export_command.export(argv, COMMANDS["export"])


def report(argv: list[str]) -> int:
    from safelight import report_command

    return report_command.report(argv, COMMANDS["report"])


def demo(argv: list[str]) -> int:
    from safelight.options.arguments import Demo
    from safelight.options.parsing import parse

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
    from safelight.options.parsing import parse_with_config

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
