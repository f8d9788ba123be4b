"""Predicted steps, stages and learning rates equal those of the planned epochs."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from safelight.data.buckets import make_buckets
from safelight.data.epochs import plan_epoch
from safelight.data.manifest import read_manifest
from safelight.data.photo import Photo, PhotoSettings
from safelight.data.placement import place_photos
from safelight.data.samples import plan_samples
from safelight.trainer.config.timeline import StageSteps, Timeline
from safelight.trainer.config.toml import parse_config


def samples_of(photos: list[Photo]):
    return plan_samples(
        place_photos(photos, make_buckets(64, 8, 2.0)),
        variants=1,
        crop_jitter=0.0,
        flip_p=0.0,
        seed=1,
        vae_fingerprint="v",
        text_fingerprint="t",
        dtype="float16",
    )


@pytest.fixture
def samples(tiny_dataset):
    return samples_of(read_manifest(tiny_dataset))


def timeline_of(samples, stages: list[dict], **tables) -> Timeline:
    return Timeline.of(parse_config({"stage": stages, **tables}, "here"), samples)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 50])
def test_steps_per_epoch_equal_the_plans(samples, batch_size, accumulation):
    assert len({sample.bucket for sample in samples}) > 2
    for epoch in range(3):
        plan = plan_epoch(samples, seed=3, epoch=epoch, batch_size=batch_size, caption_dropout=0.1)
        groups = [plan[start : start + accumulation] for start in range(0, len(plan), accumulation)]
        stages = [{"epochs": 3, "batch_size": batch_size, "accumulate": accumulation}]
        assert timeline_of(samples, stages).steps_of(epoch) == len(groups)


def test_stages_have_their_own_steps(samples):
    timeline = timeline_of(samples, [{"epochs": 2, "batch_size": 1}, {"epochs": 3, "batch_size": 1, "accumulate": 5}])
    assert timeline.stage_steps == (StageSteps(2, (24,)), StageSteps(3, (5,)))
    assert (timeline.num_epochs, timeline.num_steps) == (5, 2 * 24 + 3 * 5)


@pytest.mark.parametrize(("max_steps", "expected"), [(0, 63), (1, 1), (50, 50), (63, 63), (64, 63)])
def test_max_steps_shortens_the_run_and_never_extends_it(samples, max_steps, expected):
    stages = [{"epochs": 2, "batch_size": 1}, {"epochs": 3, "batch_size": 1, "accumulate": 5}]
    timeline = timeline_of(samples, stages, train={"max_steps": max_steps})
    assert timeline.num_steps == expected
    is_cut = expected < timeline.total_steps
    assert timeline.epochs_begun == (timeline.place_of(expected)[0] + 1 if is_cut else timeline.num_epochs)
    end = f"train.max_steps {max_steps} ends the run in epoch {timeline.epochs_begun} of {timeline.num_epochs}"
    assert timeline.cut_words == (end if is_cut else "")


def test_every_position_that_a_run_reaches_is_in_its_timeline_and_no_other(samples):
    timeline = timeline_of(samples, [{"epochs": 2, "batch_size": 4}, {"epochs": 1, "batch_size": 3}, {"epochs": 2}])
    reached, step = {(0, 0, 0, 0)}, 0
    for epoch in range(timeline.num_epochs):
        stage = timeline.stage_of(epoch)
        per_epoch = timeline.steps_of(epoch)
        reached |= {(step + number, epoch, number, stage) for number in range(1, per_epoch + 1)}
        step += per_epoch
        reached.add((step, epoch + 1, 0, stage))
    counts = range(-1, timeline.num_epochs + 2)
    found = {
        (number, epoch, in_epoch, stage)
        for number in range(-1, step + 2)
        for epoch in counts
        for in_epoch in range(-1, max(map(timeline.steps_of, range(timeline.num_epochs))) + 2)
        for stage in range(-1, 4)
        if timeline.holds(number, epoch, in_epoch, stage)
    }
    assert found == reached
    assert not timeline.holds(2, 1, 10**9, 0)


def test_stage_of_an_epoch(samples):
    timeline = timeline_of(samples, [{"epochs": 2}, {"epochs": 1}, {"epochs": 3}])
    assert [timeline.stage_of(epoch) for epoch in range(8)] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [timeline.first_epoch(stage) for stage in range(3)] == [0, 2, 3]


def rates(timeline: Timeline) -> list[float]:
    """Return the learning rate of every step of the run."""
    return [
        timeline.learning_rate(epoch, step)
        for epoch in range(timeline.num_epochs)
        for step in range(timeline.steps_of(epoch))
    ]


# a stage of 48 steps: 2 epochs of 24
STAGE = {"epochs": 2, "batch_size": 1, "lr": 1e-3}


def test_constant(samples):
    assert rates(timeline_of(samples, [{**STAGE, "schedule": "constant"}])) == [1e-3] * 48


def test_linear_decays_in_equal_steps_and_would_reach_zero_after_the_last(samples):
    actual = rates(timeline_of(samples, [{**STAGE, "schedule": "linear"}]))
    assert actual == pytest.approx([1e-3 * (48 - step) / 48 for step in range(48)], rel=1e-12)
    assert actual[0] == 1e-3
    assert actual[24] == 0.5e-3


def test_cosine_is_half_in_the_middle(samples):
    actual = rates(timeline_of(samples, [{**STAGE, "schedule": "cosine"}]))
    assert actual[0] == 1e-3
    assert actual[12] == pytest.approx(1e-3 * (2 + math.sqrt(2)) / 4, rel=1e-12)
    assert actual[24] == pytest.approx(0.5e-3, rel=1e-12)
    assert actual[16] == pytest.approx(0.75e-3, rel=1e-12)
    assert actual[32] == pytest.approx(0.25e-3, rel=1e-12)
    assert 0 < actual[47] < 2e-6
    assert all(later < earlier for earlier, later in pairwise(actual))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_steps_to_the_peak(samples, schedule):
    actual = rates(timeline_of(samples, [{**STAGE, "schedule": schedule, "warmup_steps": 8}]))
    assert actual[:8] == pytest.approx([1e-3 * (step + 1) / 9 for step in range(8)], rel=1e-12)
    assert actual[8] == 1e-3
    # halfway through the remaining 40 steps
    assert actual[28] == pytest.approx({"constant": 1e-3, "linear": 0.5e-3, "cosine": 0.5e-3}[schedule], rel=1e-12)


def test_a_warm_up_longer_than_its_stage_only_rises(samples):
    actual = rates(timeline_of(samples, [{**STAGE, "schedule": "cosine", "warmup_steps": 100}]))
    assert actual == pytest.approx([1e-3 * (step + 1) / 101 for step in range(48)], rel=1e-12)


def test_a_schedule_restarts_with_each_stage(samples):
    second = {"epochs": 1, "batch_size": 1, "lr": 1e-4, "schedule": "cosine", "warmup_steps": 2}
    actual = rates(timeline_of(samples, [{**STAGE, "schedule": "linear"}, second]))
    assert len(actual) == 48 + 24
    assert actual[47] == pytest.approx(1e-3 / 48, rel=1e-12)
    assert actual[48:50] == pytest.approx([1e-4 / 3, 2e-4 / 3], rel=1e-12)
    assert actual[50] == 1e-4
    assert actual[61] == pytest.approx(0.5e-4, rel=1e-12)


def test_a_run_without_a_step_is_refused(samples):
    stages = [{"epochs": 2, "batch_size": 100}]
    assert timeline_of(samples, stages).num_steps > 0
    with pytest.raises(ValueError, match=r"^the run has no step: its buckets never fill a batch"):
        timeline_of(samples, stages, data={"short_batches": "carry"})


def test_carried_batches_and_fractions_of_repeats_make_epochs_differ(samples):
    """Positions, rates and places agree with the epochs' own numbers of steps."""
    varied = [
        replace(sample, photo=replace(sample.photo, settings=PhotoSettings(repeats=0.5 + number % 3)))
        for number, sample in enumerate(samples)
    ]
    stages = [{"epochs": 3, "batch_size": 4, "schedule": "linear", "lr": 1e-3}, {"epochs": 2, "batch_size": 3}]
    for how in ("keep", "carry"):
        timeline = timeline_of(varied, stages, data={"short_batches": how})
        per_epoch = [timeline.steps_of(epoch) for epoch in range(5)]
        assert len(set(per_epoch)) > 1
        places = [(epoch, step) for epoch, num in enumerate(per_epoch) for step in range(num)]
        assert timeline.num_steps == len(places) == sum(per_epoch)
        assert [timeline.place_of(number + 1) for number in range(len(places))] == places
        for number, (epoch, step) in enumerate(places):
            assert timeline.holds(number + 1, epoch, step + 1, timeline.stage_of(epoch))
            assert not timeline.holds(number + 2, epoch, step + 1, timeline.stage_of(epoch))
        total = sum(per_epoch[:3])
        assert rates(timeline)[:total] == pytest.approx([1e-3 * (total - n) / total for n in range(total)], rel=1e-12)


def test_max_steps_does_not_change_the_schedule(samples):
    """A run that is stopped early and continued has the same learning rates as one that is not."""
    stages = [{**STAGE, "schedule": "cosine", "warmup_steps": 3}]
    assert rates(timeline_of(samples, stages, train={"max_steps": 10})) == rates(timeline_of(samples, stages))


def test_the_text_encoders_schedule_spans_the_epochs_in_which_it_is_trained():
    stages = [{"epochs": 2}, {"epochs": 2, "lr": 1e-5}]
    config = parse_config(
        {"stage": stages, "text_encoder": {"train": True, "lr": 4e-7, "schedule": "linear", "epochs": 3}}, "here"
    )
    stage_steps = (StageSteps(2, (2,)), StageSteps(2, (1, 2)))
    timeline, text = Timeline(tuple(config.stages()), stage_steps, 0), config.text_encoder
    assert [timeline.steps_before(epoch) for epoch in range(5)] == [0, 2, 4, 5, 7]
    rates = [timeline.text_learning_rate(text, *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
    assert rates == pytest.approx([4e-7 * (1 - step / 5) for step in range(5)])
    assert [text.is_trained_at(epoch, 4) for epoch in range(5)] == [True, True, True, False, False]
    whole = text.model_copy(update={"epochs": 0})
    # a run that ends with it stays as it is, as long as it is not lengthened
    assert all(whole.is_trained_at(epoch, 4) for epoch in range(5))
    assert not text.model_copy(update={"train": False}).is_trained_at(0, 4)


def test_a_stage_that_ends_early_changes_no_rate_of_the_text_encoder(samples):
    text = {"train": True, "lr": 1e-4, "schedule": "linear"}
    config = parse_config({"stage": [STAGE, {**STAGE, "epochs": 3, "batch_size": 2}], "text_encoder": text}, "here")
    planned, cut = Timeline.of(config, samples), Timeline.of(config, samples, ((0, 1),))

    def course(timeline):
        places = [(e, step) for e in range(timeline.num_epochs) for step in range(timeline.steps_of(e))]
        return [timeline.text_learning_rate(config.text_encoder, *place) for place in places]

    whole = course(planned)
    assert course(cut) == whole[: cut.num_steps]
    assert cut.num_steps == planned.num_steps - 24

    # the epochs of the text encoder's training may have become longer than planned: its rate never rises again
    text = {**text, "epochs": 2, "schedule": "cosine"}
    config = parse_config({"stage": [{**STAGE, "batch_size": 24}, STAGE], "text_encoder": text}, "here")
    planned, cut = Timeline.of(config, samples), Timeline.of(config, samples, ((0, 1),))
    found = course(cut)[: cut.steps_before(2)]
    whole = course(planned)[: planned.steps_before(2)]
    assert len(found) > len(whole)
    assert found[: len(whole)] == whole
    assert set(found[len(whole) :]) == {whole[-1]}
