"""`safelight evaluate`: measures a run's pictures, prints the figures, and writes the report again."""

from __future__ import annotations

import shlex

from safelight import bug_report
from safelight.output.show import print_json, print_line, say_loading


def evaluate(argv: list[str], description: str) -> int:
    from safelight.options.arguments import Evaluate, parse

    arguments = parse(Evaluate, argv, "evaluate", description)
    bug_report.belongs_to(arguments.run)
    say_loading()
    from safelight.output.evaluation_table import print_evaluation
    from safelight.trainer.evaluation.evaluate import Means
    from safelight.trainer.evaluation.evaluate import evaluate as evaluate_run
    from safelight.trainer.inference.compared_prompts import compared_prompts
    from safelight.trainer.inference.draw import open_run
    from safelight.trainer.inference.which_checkpoint import best_and_last, pick_steps
    from safelight.trainer.models.device import pick_device
    from safelight.trainer.report.build import build_report
    from safelight.trainer.run_log.terminal import Terminal
    from safelight.trainer.tagging.taggers import open_detector

    run, named = open_run(arguments.run), arguments.checkpoints
    steps = best_and_last(arguments.run) if named is None else pick_steps(arguments.run, named)
    detector = open_detector(arguments.detector) if arguments.detector else None
    means = Means(tuple(arguments.features), detector, arguments.lpips, arguments.crop_features)
    with Terminal() as terminal:
        evaluation, num_computed = evaluate_run(
            run,
            steps,
            compared_prompts(run, arguments.num, terminal.say),
            means,
            pick_device(arguments.device),
            num_seeds=arguments.seeds,
            guidance=arguments.guidance,
            progress=terminal.update,
            say=terminal.say,
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
