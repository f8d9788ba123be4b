"""Every rule of "what to try next": when it applies, what it says, and when it is silent."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from safelight.trainer.report.advice import RULES, advice, advice_section
from safelight.trainer.report.comparison import ComparedModel, ComparedRow, Comparison
from safelight.trainer.report.evaluation import (
    Burn,
    BurnScores,
    EvaluatedModel,
    Evaluation,
    Memorisation,
    Suggestion,
)
from safelight.trainer.report.run_reader import TRAIN_COLUMNS, Metrics, RunFolder, Validation
from tests.trainer.report.evaluated_run import metrics as measured

STEPS = 10


def validations(*losses: float, num_images: int = 50) -> list[Validation]:
    return [Validation(STEPS * i, float(i), loss, (), num_images) for i, loss in enumerate(losses)]


def sound_run(**changes: object) -> RunFolder:
    """Return a run for which no rule applies: level at its end, enough photographs, all captioned."""
    held_out, subset = validations(1.0, 0.9, 0.8, 0.8), validations(1.0, 0.9, 0.8, 0.8)
    train = {name: np.array([1.0, 2.0, 3.0]) for name in TRAIN_COLUMNS}
    train["lr"] = np.full(3, 1e-5)
    values: dict[str, object] = {
        "path": Path("run"),
        "config": {"train": {"batch_size": 4, "epochs": 3}},
        "config_text": "",
        "environment": {},
        "model": {},
        "metrics": Metrics(train, {"held_out": held_out, "train_subset": subset}, [], [], [], 30, 3.0),
        "samples": [],
        "data": {
            "num_photos": 100,
            "num_train": 90,
            "num_captions": 100,
            "buckets": [{"num_train": 50, "crop_loss": 0.01}, {"num_train": 40, "crop_loss": 0.02}],
        },
        "comparison": None,
        "evaluation": None,
        "grids": [],
        "scores": None,
    }
    return RunFolder(**(values | changes))


def with_metrics(run: RunFolder, **changes: object) -> RunFolder:
    return dataclasses.replace(run, metrics=dataclasses.replace(run.metrics, **changes))


def with_losses(held_out: tuple, subset: tuple | None = None, **changes: object) -> RunFolder:
    """Return a run with these losses of its validations, complete after the last."""
    split = {"held_out": validations(*held_out), "train_subset": validations(*(subset or held_out))}
    epochs = len(held_out) - 1
    run = with_metrics(sound_run(**changes), validation=split, last_step=STEPS * epochs, last_epoch=float(epochs))
    return dataclasses.replace(run, config={"train": {"batch_size": 4, "epochs": epochs}})


def with_data(**changes: object) -> RunFolder:
    return sound_run(data={**sound_run().data, **changes})


def burn_scores(model: str, burnt: float = 0.05, smoothed: float = 0.05) -> BurnScores:
    quantiles = (0.0, 1.0, 2.0, 3.0, 4.0)
    found = {"share_burnt": burnt, "share_smoothed": smoothed, "is_burnt": burnt > 0.2, "is_smoothed": smoothed > 0.2}
    return BurnScores(model=model, cfg=7.5, num=100, burnt=quantiles, smoothed=quantiles, **found)


def with_evaluation(**changes: object) -> RunFolder:
    models = tuple(EvaluatedModel(id=name, step=step, epoch=step / 10) for name, step in (("base", 0), ("step-30", 30)))
    values: dict[str, object] = {
        "models": models,
        "num_prompts": 100,
        "num_real": 50,
        "width": 64,
        "height": 64,
        "num_steps": 20,
        "cfg": 7.5,
        "sampler": "ddim",
    }
    return sound_run(evaluation=Evaluation(**(values | changes)))


def with_burn(*sets: BurnScores) -> RunFolder:
    return with_evaluation(burn=Burn(sets=sets, sentence="."))


def with_flags(of_base: int, of_trained: int) -> RunFolder:
    flagged, memorised = {"base": of_base, "step-30": of_trained}, ("step-30",) * (of_trained > of_base)
    found = Memorisation(features="f", limit=0.9, num_flagged=flagged, num=100, memorised=memorised, sentence=".")
    return with_evaluation(memorisation=found)


def clip_score(trained_is_worse: bool):
    """Return CLIPScore with the difference of one model, whose id is made that of the run."""
    metric = measured()[2]
    difference = metric.differences[-1 if trained_is_worse else 0].model_copy(update={"model": "step-30"})
    return metric.model_copy(update={"differences": (difference,)})


def cut_comparison() -> Comparison:
    row = ComparedRow(prompt="p", place=0, seed=0, cut_after="the end", images={"base": "a.png"})
    models = (ComparedModel(id="base", step=0, epoch=0.0),)
    return Comparison(models=models, rows=(row,), width=64, height=64, num_steps=5, cfg=1.0, sampler="ddim")


def event(name: str) -> dict:
    return {"event": name, "step": 30, "detail": ""}


# rule -> runs to which it applies, with a part of what it says; and near misses, to which it does not
CASES = {
    "untrained-base": (
        [
            (
                sound_run(model={"from_scratch": True, "text_encoder": "CLIP, untrained (random weights), frozen"}),
                "this one had random weights, and its text encoder knows no language, so everything that the model can "
                "draw had to be learnt from 90 photographs",
            ),
            (sound_run(model={"from_scratch": True}), "this one had random weights, so everything"),
        ],
        [sound_run(), sound_run(model={"from_scratch": False})],
    ),
    "diverged": (
        [(with_metrics(sound_run(), events=[event("diverged")]), "about 3e-06 instead of 1e-05")],
        [with_metrics(sound_run(), events=[event("diverged"), event("resumed")])],
    ),
    "unfinished": (
        [(with_metrics(sound_run(), last_epoch=1.5, last_step=15), "its log ends at epoch 1.5 of 3")],
        [with_metrics(sound_run(), last_epoch=0.0, last_step=0)],
    ),
    "still-falling": (
        [(with_losses((1.0, 0.9, 0.8, 0.7)), "from epoch 2 to 3 held-out loss still fell by 12.5 %, to 0.7000")],
        [
            with_losses((1.0, 0.9, 0.8, 0.7999)),
            with_metrics(with_losses((1.0, 0.9, 0.8, 0.7)), last_epoch=2.5),
            with_metrics(
                with_losses((1.0, 0.9, 0.8, 0.7)),
                train={**sound_run().metrics.train, "lr": np.array([1e-5, 1e-6, 1e-9])},
            ),
            with_losses((1.0, 0.7)),
        ],
    ),
    "early-best": (
        [(with_losses((1.0, 0.7, 0.8, 0.9), (1.0, 0.7, 0.6, 0.5)), "lowest at epoch 1 of 3")],
        [with_losses((1.0, 0.8, 0.7, 0.9), (1.0, 0.8, 0.7, 0.6))],
    ),
    "late-best": (
        [(with_losses((1.0, 0.8, 0.7, 0.9), (1.0, 0.8, 0.7, 0.6)), "Stop near epoch 2 next time")],
        [with_losses((1.0, 0.8, 0.7, 0.7), (1.0, 0.8, 0.7, 0.6))],
    ),
    "never-better": (
        [(with_losses((1.0, 1.1, 1.2, 1.3)), "a third of the learning rate")],
        [with_losses((1.0, 0.9, 1.2, 1.3))],
    ),
    "both-rise": (
        [(with_losses((1.0, 0.8, 0.9, 1.0), (1.0, 0.8, 0.9, 1.05)), "steps that are too large")],
        [with_losses((1.0, 0.8, 0.9, 1.0), (1.0, 0.8, 0.7, 0.6))],
    ),
    "burnt": (
        [
            (
                with_burn(burn_scores("real"), burn_scores("step-30", burnt=0.4)),
                "at cfg 7.5, 40 of 100 pictures of epoch 3 are burnt, against 5 of 100 of the real photographs",
            ),
            (
                with_burn(burn_scores("base"), burn_scores("step-30", burnt=0.4)),
                "of epoch 3 are burnt, against 5 of 100 of the base model's.",
            ),
        ],
        [
            with_burn(burn_scores("base", burnt=0.38), burn_scores("step-30", burnt=0.4)),
            with_burn(burn_scores("base", burnt=0.5), burn_scores("step-30", burnt=0.4)),
            with_burn(burn_scores("step-30", burnt=0.9).model_copy(update={"cfg": 12.0})),
            with_burn(burn_scores("real"), burn_scores("step-30", burnt=0.08)),
            with_burn(burn_scores("real"), burn_scores("base", burnt=0.9)),
        ],
    ),
    "smoothed": (
        [(with_burn(burn_scores("real"), burn_scores("step-30", smoothed=0.4)), "40 of 100 pictures of epoch 3 are")],
        [
            with_burn(burn_scores("step-30", smoothed=0.4).model_copy(update={"cfg": 1.0})),
            with_burn(burn_scores("real"), burn_scores("step-30", burnt=0.4)),
        ],
    ),
    "burnt-as-base": (
        [
            (
                with_burn(burn_scores("base", burnt=0.38), burn_scores("step-30", burnt=0.4)),
                "40 of 100 pictures of epoch 3 are burnt, against 38 of 100 of the base model's. Training did not add",
            ),
            (with_burn(burn_scores("base", burnt=0.5), burn_scores("step-30", burnt=0.4)), "Try a lower cfg, whose"),
        ],
        [
            with_burn(burn_scores("base", burnt=0.05), burn_scores("step-30", burnt=0.4)),
            with_burn(burn_scores("base", burnt=0.4), burn_scores("step-30", burnt=0.05)),
            dataclasses.replace(
                with_burn(burn_scores("base", burnt=1.0), burn_scores("step-30", burnt=0.4)),
                model={"from_scratch": True},
            ),
        ],
    ),
    "smoothed-as-base": (
        [
            (
                with_burn(burn_scores("base", smoothed=0.38), burn_scores("step-30", smoothed=0.4)),
                "40 of 100 pictures of epoch 3 are smoothed out",
            )
        ],
        [with_burn(burn_scores("base", smoothed=0.05), burn_scores("step-30", smoothed=0.4))],
    ),
    "memorised": (
        [(with_flags(0, 1), "flagged are 1 picture of epoch 3 and 0 of the base model")],
        [with_flags(2, 2), with_flags(0, 0)],
    ),
    "worse-metric": (
        [(with_evaluation(metrics=(clip_score(True),)), "epoch 3 is worse than its base in CLIPScore")],
        [with_evaluation(metrics=(clip_score(False),))],
    ),
    "few-prompts": (
        [(with_evaluation(num_prompts=49), "49 prompts leave wide intervals")],
        [with_evaluation(num_prompts=50)],
    ),
    "no-validation": (
        [(with_metrics(sound_run(), validation={"held_out": [], "train_subset": []}), "data.validation_fraction")],
        [with_metrics(sound_run(), validation={"held_out": [], "train_subset": []}, last_step=0)],
    ),
    "few-held-out": (
        [
            (
                with_metrics(
                    sound_run(),
                    validation={"held_out": validations(1.0, 0.9, 0.8, 0.8, num_images=9), "train_subset": []},
                ),
                "with 9, the best epoch",
            )
        ],
        [
            with_metrics(
                sound_run(), validation={"held_out": validations(1.0, 0.9, 0.8, 0.8, num_images=10), "train_subset": []}
            )
        ],
    ),
    "few-photos": (
        [(with_data(num_train=29), "29 training photographs")],
        [with_data(num_train=30), sound_run(data=None)],
    ),
    "scattered-buckets": (
        [
            (
                with_data(buckets=[{"num_train": 20}, {"num_train": 3}, {"num_train": 2}, {"num_train": 0}]),
                "2 sizes of 3 have fewer photographs than a batch of 4, 20 % of all",
            )
        ],
        [with_data(buckets=[{"num_train": 90}, {"num_train": 3}]), sound_run(config={})],
    ),
    "crop-loss": (
        [(with_data(buckets=[{"num_train": 5, "crop_loss": 0.25}]), "cut off 5 photographs: up to 25 %")],
        [with_data(buckets=[{"num_train": 5, "crop_loss": 0.1}, {"num_train": 0, "crop_loss": 0.9}])],
    ),
    "no-captions": (
        [(with_data(num_captions=60), "at least 40 photographs have none")],
        [with_data(num_captions=300), with_data(num_captions=None)],
    ),
    "cut-captions": (
        [
            (with_data(num_cut_captions=1), "1 caption is cut"),
            (sound_run(comparison=cut_comparison()), "1 prompt is longer than what was read of them"),
        ],
        [with_data(num_cut_captions=0)],
    ),
}


def test_every_rule_has_its_cases() -> None:
    assert [rule.name for rule in RULES] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_applies_where_it_says_and_nowhere_else(name: str) -> None:
    applies, silent = CASES[name]
    for run, said in applies:
        given = {rule.name: text for rule, text in advice(run)}
        assert said in given[name]
    for run in silent:
        assert name not in {rule.name for rule, _ in advice(run)}


@pytest.mark.parametrize(
    ("at_lower", "said"),
    [
        (None, "Try a lower cfg, whose pictures were not measured here (`--guidance` of evaluate), or choose another"),
        (0.1, "Lower cfg (at cfg 3 10 of 100 were burnt), or choose another base: at cfg 7.5, 40 of 100"),
        (0.38, "Choose another base (a lower cfg did not clearly help: at cfg 3 38 of 100 were burnt): at cfg 7.5"),
    ],
)
def test_a_lower_cfg_is_advised_as_far_as_it_was_measured(at_lower: float | None, said: str) -> None:
    sets = [burn_scores("base", burnt=0.38), burn_scores("step-30", burnt=0.4)]
    sets.append(burn_scores("step-30", burnt=0.0).model_copy(update={"cfg": 12.0}))
    if at_lower is not None:
        sets.append(burn_scores("step-30", burnt=at_lower).model_copy(update={"cfg": 3.0}))
    [(_, text)] = advice(with_burn(*sets))
    assert text.startswith(said)


def test_a_longer_training_is_advised_only_if_a_later_checkpoint_is_there() -> None:
    run = with_burn(burn_scores("step-30", smoothed=0.4))
    [(_, text)] = advice(run)
    assert "trained longer" not in text
    later = EvaluatedModel(id="step-60", step=60, epoch=6.0)
    best = Suggestion(model="step-30", sentence=".")
    more = run.evaluation.model_copy(update={"models": (*run.evaluation.models, later), "suggestion": best})
    [(_, text)] = advice(dataclasses.replace(run, evaluation=more))
    assert "compare a checkpoint that was trained longer: at cfg 7.5, 40 of 100" in text


def test_a_higher_max_aspect_is_advised_for_none_that_it_does_not_fit() -> None:
    def said(num: int, width: int, height: int, lost: float, limit: float) -> str:
        bucket = {"num_train": num, "crop_loss": lost, "width": width, "height": height}
        settings = {"train": {"batch_size": 4, "epochs": 3}, "data": {"max_aspect": limit}}
        given = advice(sound_run(config=settings, data={**sound_run().data, "buckets": [bucket]}))
        return next((text for rule, text in given if rule.name == "crop-loss"), "")

    # the widest size that 2 allows, and photographs that are wider: 128 x 64 less 30 % is a 2.9:1 photograph
    assert "A higher data.max_aspect" in said(9, 128, 64, 0.3, 2.0)
    # square sizes: photographs of 4:3 lie between them
    assert "data.max_aspect" not in said(9, 64, 64, 0.2, 4.0)
    assert "data.resolution" in said(9, 64, 64, 0.2, 4.0)


def test_a_sound_run_gets_no_advice() -> None:
    assert advice(sound_run()) == []
    assert f"None of the {len(RULES)} rules" in advice_section(sound_run())


def test_the_rule_stands_beside_its_advice() -> None:
    html = advice_section(with_metrics(sound_run(), last_epoch=1.5, last_step=15))
    assert "Rule: the run ended before its last planned epoch." in html
    assert "<code>safelight train RUN --resume</code>" in html
