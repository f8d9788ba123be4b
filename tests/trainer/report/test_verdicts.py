"""What an evaluation says beyond "better than the base": nearness to photographs, and measures that disagree."""

import dataclasses
import re

import pytest

from safelight.trainer.report.build import content_of
from safelight.trainer.report.evaluation import Estimate, EvaluatedModel, Metric
from safelight.trainer.report.markup import kept_together
from safelight.trainer.report.measures import measures_section
from safelight.trainer.report.verdicts import (
    AS_PHOTOGRAPHS,
    by_other_features,
    disagreement,
    judge,
    nearness,
    which_is_better,
)
from tests.trainer.report.test_advice import with_evaluation
from tests.trainer.report.test_panels import text_of

UNTRAINED = "clip_tokenizer, untrained (random weights), frozen"


def metric(kind: str, better: str, real: float | None, features: str = "f", **values: float) -> Metric:
    """Return a metric whose every value has an interval of one to either side."""

    def estimate(model: str, value: float) -> Estimate:
        return Estimate(model=model.replace("_", "-"), value=value, low=value - 1, high=value + 1, num=100)

    return Metric(
        id=f"{kind}_x",
        title={"kid": "KID × 1000", "density": "Density"}.get(kind, kind.capitalize()),
        meaning="",
        better=better,
        features=features,
        values=tuple(estimate(*pair) for pair in values.items()),
        real=None if real is None else estimate("real", real),
    )


def run_of(*metrics: Metric):
    models = tuple(EvaluatedModel(id=f"step-{step}", step=step, epoch=step / 10) for step in (30, 60))
    base = EvaluatedModel(id="base", step=0, epoch=0.0)
    return with_evaluation(metrics=metrics, models=(base, *models))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            71.0,
            "Its pictures are still far from photographs: KID × 1000 is 71.0 (70.0 to 72.0), against 0.4 (−0.6 to 1.4)",
        ),
        (2.0, "By KID its pictures are not clearly farther from photographs than photographs from each other"),
    ],
)
def test_pictures_are_far_if_their_interval_lies_above_that_of_photographs(value, said):
    assert nearness(run_of(metric("kid", "lower", 0.4, step_60=value)).evaluation, "step-60").startswith(said)


def test_without_a_level_of_photographs_nothing_is_said():
    assert nearness(run_of(metric("kid", "lower", None, step_60=2.0)).evaluation, "step-60") == ""


def test_another_checkpoint_that_is_better_is_named_clearly_or_within_noise():
    clear = metric("coverage", "higher", 9.0, step_30=7.0, step_60=3.0)
    near = metric("frechet", "lower", None, step_30=3.0, step_60=4.0)
    agreeing = metric("kid", "lower", 0.0, step_30=9.0, step_60=4.0)
    run = run_of(clear, near, agreeing)
    assert disagreement(run, run.evaluation, "step-60") == (
        "Not all measures agree: by Coverage epoch 3 is better, 7.0 (6.0 to 8.0) against 3.0 (2.0 to 4.0). "
        "Ahead, but within noise: epoch 3 in Frechet."
    )
    assert disagreement(run, run.evaluation, "step-30").startswith("Not all measures agree: by KID epoch 6 is better")
    run = run_of(agreeing)
    assert disagreement(run, run.evaluation, "step-60") == ""


def test_metrics_of_one_name_are_told_apart_by_their_features():
    both = [metric("coverage", "higher", 9.0, name, step_30=7.0, step_60=3.0) for name in ("CLIP", "the autoencoder")]
    run = run_of(*both)
    assert "by Coverage (the autoencoder) epoch 3 is better" in disagreement(run, run.evaluation, "step-60")


def test_further_features_that_say_otherwise_are_named_in_one_sentence():
    agreeing = [metric("kid", "lower", 0.0, name, base=50.0, step_60=20.0) for name in ("net", "autoencoder")]
    assert by_other_features(run_of(*agreeing).evaluation, "step-60") == ""
    leading = [metric("kid", "lower", 0.0, "net", base=50.0, step_60=20.0)]
    leading.append(metric("density", "higher", 9.0, "net", base=1.0, step_60=6.0))
    others = [metric("kid", "lower", 19.0, "autoencoder", base=50.0, step_60=20.0)]
    others.append(metric("density", "higher", 9.0, "autoencoder", base=6.0, step_60=1.0))
    others.append(metric("coverage", "higher", 9.0, "autoencoder", base=6.0, step_60=1.0))
    run = run_of(*leading, *others)
    said = (
        "Other features disagree: by autoencoder, KID is not clearly apart from that of photographs and Density is "
        "worse than the base's beyond chance, 1.0 against 6.0."
    )
    assert by_other_features(run.evaluation, "step-60") == said
    assert said in text_of(content_of(run).header)
    page = text_of(measures_section(run))
    assert said in page
    assert "Where several features give a figure, net leads: it was named first for the evaluation." in page


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (2.0, "clearly below the photographs' own 6.0: pictures are too much alike"),
        (6.5, "not clearly apart from the photographs' own 6.0, the best there is"),
        (9.0, "clearly above the photographs' own 6.0: pictures differ more than photographs do, no gain"),
    ],
)
def test_diversity_is_best_where_the_photographs_are(own, said):
    found = metric("diversity", "", 6.0, base=1.0, step_60=own)
    assert which_is_better(found) == AS_PHOTOGRAPHS
    assert said in text_of(measures_section(run_of(found)))


@pytest.mark.parametrize("warning", ["", "Only 37 pictures on one side: a rough figure."])
def test_few_pictures_are_said_once(warning):
    found = metric("kid", "lower", 0.4, base=60.0, step_60=7.0)
    few = tuple(value.model_copy(update={"num": 37}) for value in found.values)
    page = text_of(measures_section(run_of(found.model_copy(update={"values": few, "warning": warning}))))
    assert ("read it with care" in page) == (not warning)


def test_scores_by_rules_are_in_the_lead():
    rows = [
        {"what": "the new look", "base": [0.0, 0.0, 0.06], "trained": [0.99, 0.9, 1.0], "difference": [0.99, 0.9, 1.0]},
        {"what": "right colour", "base": [1.0, 0.9, 1.0], "trained": [1.0, 0.9, 1.0], "difference": [0, -0.1, 0.1]},
    ]
    run = dataclasses.replace(run_of(), scores={"rows": rows})
    said = "Scored by rules: the new look rose from 0.00 to 0.99; no clear change in right colour."
    assert said in text_of(content_of(run).header)
    assert "Scored by rules" not in text_of(content_of(run_of()).header)


def test_density_above_that_of_photographs_is_no_better():
    above = metric("density", "higher", 8.0, base=30.0, step_30=20.0, step_60=8.0)
    run = run_of(above)
    assert which_is_better(above) == AS_PHOTOGRAPHS
    assert disagreement(run, run.evaluation, "step-60") == ""
    assert judge(above, "step-60") == "unclear"
    assert judge(metric("density", "higher", 40.0, base=30.0, step_60=8.0), "step-60") == "worse"
    assert which_is_better(metric("coverage", "higher", 8.0, step_60=8.0)) == "higher is better"


@pytest.mark.parametrize(
    ("text_encoder", "is_trained", "is_said"),
    [(UNTRAINED, False, True), (UNTRAINED, True, False), ("the base's, frozen", False, False)],
)
def test_the_top_says_that_a_base_is_untrained_and_compares_with_photographs(text_encoder, is_trained, is_said):
    run = run_of(metric("kid", "lower", 0.4, base=600.0, step_30=80.0, step_60=71.0))
    model = {"from_scratch": True, "text_encoder": text_encoder}
    settings = {**run.config, "text_encoder": {"train": is_trained}}
    scratch = dataclasses.replace(run, model=model, config=settings)
    top = text_of(content_of(scratch).header)
    assert "That a checkpoint is better than it says little" in top
    assert "nearer to the photographs than the untrained base, beyond chance. Its pictures are still far from" in top
    assert ("it understands no prompt" in top) == is_said
    usual = text_of(content_of(run).header)
    assert "untrained" not in usual
    assert "Its pictures are still far from photographs" in usual


def test_a_number_and_its_unit_stay_on_one_line():
    assert kept_together("by 79.7 % in 3 min, 2 pixels") == "by 79.7\u00a0% in 3\u00a0min, 2 pixels"
    top = content_of(run_of()).header
    assert not re.search(r"\d %", top.partition('class="lead"')[2].partition("</p>")[0])


def test_the_contents_are_named_as_the_headings():
    content = content_of(run_of(metric("kid", "lower", 0.4, base=600.0, step_60=71.0)))
    for key, section in content.sections.items():
        heading = section.partition("<h2>")[2].partition("</h2>")[0]
        assert f'<a href="#{key}">{heading}</a>' in content.header
