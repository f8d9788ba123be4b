"""`safelight evaluate`: measures a run's pictures, prints the figures, and writes the report again."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from safelight import bug_report
from safelight.errors import UserError
from safelight.output.show import print_json, print_line, say_loading
from safelight.several import launched

if TYPE_CHECKING:
    from safelight.options.arguments import Evaluate

MAX_CFG = 100


def _check(arguments: Evaluate) -> None:
    """Raise UserError for options that cannot be meant so, before anything is loaded."""
    if bad := [scale for scale in arguments.guidance if not 0 < scale <= MAX_CFG]:
        raise UserError(f"--guidance {bad[0]:g} is not above 0 and up to {MAX_CFG}; use for example 3 7.5 12")
    named = {"--features": arguments.features, "--detector": [arguments.detector], "--lpips": [arguments.lpips]}
    for option, specs in named.items():
        for spec in specs:
            path = os.path.expanduser(spec.rpartition("#")[0] if ".onnx#" in spec else spec)
            # a name such as tiny, or owner/model on the hub, is no path
            is_path = option == "--lpips" or path.startswith((".", os.sep)) or path.endswith((".onnx", ".safetensors"))
            if spec and is_path and not os.path.exists(path):
                raise UserError(f"{option} {spec!r} does not exist; check the path")
    if arguments.crop_features and not arguments.detector:
        raise UserError("--crop-features describes what a detector finds, and none is named; add --detector MODEL")
    if arguments.crop_features and arguments.crop_features not in arguments.features:
        raise UserError(f"--crop-features {arguments.crop_features!r} is not among --features; name it there as well")
    if arguments.suggest and arguments.json:
        raise UserError("--suggest and --json exclude each other; --json has the suggestion, with its reasons")


def evaluate(argv: list[str], description: str) -> int:
    from safelight.options.arguments import Evaluate
    from safelight.options.parsing import parse

    arguments = parse(Evaluate, argv, "evaluate", description)
    bug_report.belongs_to(arguments.run)
    _check(arguments)
    if (status := launched("evaluate", argv, arguments.gpus, arguments.run)) is not None:
        return status
    say_loading()
    from safelight.output.evaluation_table import print_evaluation
    from safelight.trainer.evaluation.evaluate import Means
    from safelight.trainer.evaluation.evaluate import evaluate as evaluate_run
    from safelight.trainer.inference.compared_prompts import compared_prompts
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.which_checkpoint import best_and_last, pick_steps, with_chosen
    from safelight.trainer.loading.processes import joined
    from safelight.trainer.models.device import pick_device
    from safelight.trainer.report.build import build_report
    from safelight.trainer.report.records import read_evaluation
    from safelight.trainer.run_log.terminal import Terminal
    from safelight.trainer.tagging.taggers import open_detector

    named = arguments.checkpoints

    def choose() -> list[int]:
        return best_and_last(arguments.run) if named is None else pick_steps(arguments.run, named)

    def means() -> Means:
        # a detector is opened once
        detector = open_detector(arguments.detector) if arguments.detector else None
        return Means(tuple(arguments.features), detector, arguments.lpips, arguments.crop_features)

    with Terminal() as terminal, joined("evaluate", arguments.run, terminal) as world:
        run = open_run(arguments.run, arguments.embeddings, world)
        # before prompts are read
        choose()
        earlier = read_evaluation(arguments.run, [])
        prompts, device = compared_prompts(run, arguments.num, terminal.say), pick_device(arguments.device)
        evaluation, num_computed = with_chosen(
            lambda: world.from_main(choose()),
            lambda steps: evaluate_run(
                run,
                steps,
                prompts,
                means(),
                device,
                num_seeds=arguments.seeds,
                guidance=arguments.guidance,
                flagged=arguments.flagged,
                progress=terminal.update,
                say=terminal.say,
            ),
            terminal.say,
        )
    if not world.is_main:
        return 0
    if earlier is not None and earlier.num_prompts > evaluation.num_prompts:
        terminal.say(
            f"note: this replaces an evaluation of {earlier.num_prompts} prompts; what it computed is kept, and "
            f"--num {earlier.num_prompts} gives it again"
        )
    report = build_report(arguments.run)
    if arguments.json:
        print_json(evaluation.model_dump(mode="json"))
        return 0
    if arguments.suggest:
        if evaluation.suggestion is None:
            print_line("no checkpoint can be suggested: there is neither held-out loss nor KID to choose by")
        else:
            print_line(evaluation.suggestion.sentence)
            for reason in evaluation.suggestion.reasons:
                print_line(f"  {reason}")
        return 0
    print_evaluation(evaluation)
    if num_computed == 0:
        print_line("nothing was computed again: all pictures and figures are those of an earlier evaluation")
    print_line(f"report: {report}")
    if evaluation.suggestion is not None and evaluation.suggestion.model != "base":
        step = evaluation.suggestion.model.removeprefix("step-")
        name = shlex.quote(arguments.run.resolve().name)
        run_name = shlex.quote(str(arguments.run))
        print_line(f"next: safelight export {run_name} --checkpoint {step} -o {name}.safetensors")
    return 0
