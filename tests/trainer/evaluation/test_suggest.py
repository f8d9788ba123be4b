"""Which checkpoint is suggested, and for which reasons."""

import re

import pytest

from safelight.trainer.evaluation.evaluate import _at_other_scales, _blemishes, _not_by_training
from safelight.trainer.evaluation.suggest import KidChange, suggest
from safelight.trainer.report.evaluation import (
    Burn,
    BurnScores,
    Estimate,
    EvaluatedModel,
    Metric,
    is_worse_than_base,
)


def model(step: int, loss: float | None) -> EvaluatedModel:
    name = f"step-{step}" if step else "base"
    return EvaluatedModel(id=name, step=step, epoch=step / 10, held_out_loss=loss)


def kid_of(values: dict[str, float]) -> Metric:
    estimates = [
        Estimate(model=name, value=value, low=value - 1, high=value + 1, num=100) for name, value in values.items()
    ]
    return Metric(id="kid_x", title="KID × 1000", meaning="", better="lower", values=tuple(estimates))


def changes_of(values: dict[str, float], p: float) -> dict[tuple[str, str], KidChange]:
    return {(a, b): KidChange(values[a] - values[b], p) for a in values for b in values if a != b}


MODELS = [model(0, 0.20), model(100, 0.15), model(200, 0.12), model(300, 0.14)]
KIDS = {"base": 60.0, "step-100": 20.0, "step-200": 22.0, "step-300": 21.0}


def test_the_lowest_held_out_loss_wins_if_no_kid_is_lower_beyond_chance():
    # the base's KID is higher beyond chance, those of checkpoints differ by chance
    changes = changes_of(KIDS, 0.4) | {
        (name, "base"): KidChange(KIDS[name] - 60, 0.001) for name in KIDS if name != "base"
    }
    found = suggest(MODELS, kid_of(KIDS), changes, {})
    assert (found.model, found.sentence) == ("step-200", "Use the checkpoint of epoch 20 (step 200).")
    assert found.reasons == (
        "epoch 20's held-out loss, 0.1200, is the lowest of the checkpoints that were evaluated",
        "no other checkpoint's KID × 1000 is lower beyond chance",
        "epoch 20's pictures are closer to your photographs than the base's (KID × 1000 −38.0, p 0.001)",
        "the base's held-out loss is 0.2000",
    )


def test_a_kid_that_is_lower_beyond_chance_wins_over_the_loss():
    found = suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.001), {})
    assert found.model == "step-100"
    assert "epoch 10's KID × 1000 is 20.0, lower than epoch 20's 22.0 beyond chance (p 0.001)" in found.reasons[1]
    # one of three comparisons is below 0.05 by chance too often
    assert suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.03), {}).model == "step-200"


def test_burnt_checkpoints_are_set_aside_if_another_is_left():
    burnt = {"burnt": "16 of 116, 2 of 116 by the base", "smoothed out": ""}
    found = suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.4), {"step-200": burnt})
    assert found.model == "step-300"
    assert found.reasons[-1] == (
        "epoch 20 is set aside: its pictures are burnt (16 of 116, 2 of 116 by the base) and smoothed out"
    )
    assert (
        found.reasons[0] == "epoch 30's held-out loss, 0.1400, is the lowest of the checkpoints that are not set aside"
    )
    every = {name: {"burnt": "9 of 12"} for name in KIDS if name != "base"}
    found = suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.4), every)
    assert found.model == "step-200"
    assert found.reasons[-1] == (
        "all checkpoints draw pictures with more faults than the base's: epoch 10: burnt (9 of 12); "
        "epoch 20: burnt (9 of 12); epoch 30: burnt (9 of 12)"
    )


def test_the_only_checkpoint_is_said_to_be_the_only_one_that_was_evaluated():
    kids = {"base": 60.0, "step-100": 20.0}
    found = suggest(MODELS[:2], kid_of(kids), changes_of(kids, 0.001), {})
    assert found.sentence == "Use the checkpoint of epoch 10 (step 100): no other was evaluated."
    assert found.reasons[0] == "epoch 10 is the only checkpoint that was evaluated; its held-out loss is 0.1500"
    # of several that were evaluated, one is left
    faults = {name: {"burnt": ""} for name in ("step-100", "step-300")}
    found = suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.4), faults)
    assert found.sentence == "Use the checkpoint of epoch 20 (step 200)."
    assert found.reasons[0] == "epoch 20 is the only one that is not set aside; its held-out loss is 0.1200"


def test_every_reason_names_its_checkpoint():
    found = suggest(
        MODELS, kid_of(KIDS), changes_of(KIDS, 0.001), {"step-300": {"burnt": ""}}, {"step-100": ["pictures differ"]}
    )
    assert len(found.reasons) > 4
    assert all(re.match(r"epoch \d+|the base's|no other checkpoint", reason) for reason in found.reasons)


def test_faults_at_another_guidance_scale_are_said_and_decide_nothing():
    sets = burn_of(3.0, base=(2, (0.0, 0.1)), step_200=(3, (0.0, 0.1)))
    sets += burn_of(6.0, base=(2, (0.0, 0.1)), step_200=(30, (0.2, 0.4)), step_300=(40, (0.3, 0.5)))
    clauses = _at_other_scales(Burn(sets=tuple(sets), sentence="."), 3.0)
    found = suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.4), {}, {}, clauses)
    assert found.model == "step-200"
    assert found.reasons[-1] == (
        "epoch 20's pictures at cfg 6 are burnt more often than chance explains, 30 of 100, 2 of 100 of the base's; "
        "checkpoints are chosen by those at cfg 3"
    )


def burn_of(cfg: float, **models: tuple[int, tuple[float, float]]) -> list[BurnScores]:
    """Return scores of models: how many of 100 are burnt, and the interval of that share."""
    still = {"smoothed": (0.0,) * 5, "burnt": (0.0,) * 5, "share_smoothed": 0.0, "num": 100}
    return [
        BurnScores(
            model=name.replace("_", "-"),
            cfg=cfg,
            share_burnt=num / 100,
            burnt_interval=interval,
            is_burnt=num > 9,
            **still,
        )
        for name, (num, interval) in models.items()
    ]


@pytest.mark.parametrize(
    ("of_base", "found"),
    [
        ((2, (0.0, 0.08)), {"step-100": {"burnt": "14 of 100, 2 of 100 by the base"}}),
        # as burnt as the base: nothing that training did
        ((12, (0.06, 0.2)), {}),
        ((16, (0.1, 0.22)), {}),
        # more than the base, which no more than chance explains: but the difference may be noise
        ((7, (0.03, 0.14)), {}),
    ],
)
def test_a_checkpoint_is_blemished_only_if_the_base_is_less_so(of_base, found):
    sets = burn_of(3.0, base=of_base, step_100=(14, (0.05, 0.2))) + burn_of(9.0, step_200=(99, (0.9, 1.0)))
    assert _blemishes(Burn(sets=tuple(sets), sentence="."), None, 3.0) == found


def test_a_difference_within_noise_decides_nothing_and_is_said():
    few = burn_of(3.0, base=(7, (0.03, 0.14)), step_300=(14, (0.05, 0.2)), step_200=(3, (0.0, 0.1)))
    burnt = burn_of(3.0, base=(12, (0.06, 0.2)), step_200=(14, (0.05, 0.2)))
    clauses = _not_by_training(Burn(sets=tuple(few), sentence="."), 3.0)
    found = suggest(MODELS, kid_of(KIDS), changes_of(KIDS, 0.4), {}, clauses)
    assert found.reasons[-1] == (
        "epoch 30 is not set aside: its pictures have no more faults than the base's beyond noise: "
        "14 of 100 are burnt, 7 of 100 of the base's"
    )
    found = suggest(
        MODELS, kid_of(KIDS), changes_of(KIDS, 0.4), {}, _not_by_training(Burn(sets=tuple(burnt), sentence="."), 3.0)
    )
    assert found.reasons[-1] == (
        "epoch 20's pictures have a fault that training did not add: 14 of 100 are burnt, 12 of 100 of the base's"
    )


@pytest.mark.parametrize(("p", "is_worse"), [(0.01, True), (0.2, False)])
def test_where_the_base_drew_the_same_prompts_these_decide(p, is_worse):
    # 14 of 100 against 2: beyond noise by the counts, but the test by prompt goes first
    base, own = burn_of(3.0, base=(2, (0.0, 0.08)), step_100=(14, (0.05, 0.2)))
    assert is_worse_than_base(own, base, "burnt")
    assert is_worse_than_base(own.model_copy(update={"burnt_p": p}), base, "burnt") is is_worse


def test_losses_that_are_nearly_equal_leave_the_choice_to_kid():
    models = [model(0, 0.2), model(100, 0.12001), model(200, 0.12)]
    kids = {"base": 60.0, "step-100": 20.0, "step-200": 22.0}
    assert suggest(models, kid_of(kids), changes_of(kids, 0.4), {}).model == "step-100"


def test_no_checkpoint_is_suggested_if_none_is_better_than_the_base():
    models = [model(0, 0.10), model(100, 0.15)]
    kids = {"base": 20.0, "step-100": 21.0}
    found = suggest(models, kid_of(kids), changes_of(kids, 0.4), {})
    assert found.model == "base"
    assert found.sentence == (
        "The only checkpoint that was evaluated, epoch 10 (step 100), is not better than the base beyond chance."
    )
    of_two = suggest([*models, model(200, 0.15)], kid_of({**kids, "step-200": 21.0}), {}, {})
    assert of_two.sentence.startswith("No checkpoint is better than the base beyond chance. Of those")
    # a lower loss does not make up for pictures that are farther away
    worse = suggest([model(0, 0.2), model(100, 0.15)], kid_of(kids), changes_of(kids, 0.001), {})
    assert worse.model == "base"
    assert any("farther from your photographs than the base's" in reason for reason in worse.reasons)


def test_without_validation_kid_decides_and_without_both_nothing_does():
    models = [model(0, None), model(100, None), model(200, None)]
    kids = {"base": 60.0, "step-100": 25.0, "step-200": 22.0}
    assert suggest(models, kid_of(kids), changes_of(kids, 0.001), {}).model == "step-200"
    assert suggest(models, None, {}, {}) is None
    assert suggest([model(0, 0.1)], kid_of({"base": 1.0}), {}, {}) is None


@pytest.mark.parametrize("loss", [0.15, 0.25])
def test_without_kid_the_loss_decides(loss):
    found = suggest([model(0, 0.2), model(100, loss)], None, {}, {})
    assert found.model == ("step-100" if loss < 0.2 else "base")
