"""What single sections of the report say and show of an evaluation."""

import dataclasses
import html as html_entities
import re
from pathlib import Path

import pytest
from PIL import Image

from safelight.trainer.report.burn_panel import burn_section
from safelight.trainer.report.crop_map import EXPLANATION, crop_section
from safelight.trainer.report.evaluation import (
    Burn,
    CropDivergence,
    CropPoint,
    EvaluatedModel,
    SetDivergence,
    ShownPicture,
    Suggestion,
)
from safelight.trainer.report.grid_record import Grid, GridAxis
from safelight.trainer.report.grids import what_to_see
from safelight.trainer.report.learned import TERMS, learned_section
from safelight.trainer.report.measures import headline
from safelight.trainer.report.run_reader import RunFolder
from tests.trainer.report.evaluated_run import add_comparison
from tests.trainer.report.test_advice import burn_scores, measured, sound_run, with_burn, with_evaluation


def text_of(markup: str) -> str:
    return " ".join(html_entities.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def with_worst(run_dir: Path, burn: Burn) -> RunFolder:
    """Return a run with this burn check, whose pictures exist."""
    (run_dir / "compare").mkdir(exist_ok=True)
    for one in (*burn.worst_burnt, *burn.worst_smoothed):
        Image.new("RGB", (16, 16)).save(run_dir / "compare" / one.file)
    run = with_burn()
    return dataclasses.replace(run, path=run_dir, evaluation=run.evaluation.model_copy(update={"burn": burn}))


def test_sets_at_other_guidance_scales_are_folded_and_none_is_left_out():
    scales = [1.0 + 0.5 * i for i in range(14)]
    sets = [burn_scores("real")]
    sets += [
        burn_scores(model).model_copy(update={"cfg": cfg, "num": 1000 + place})
        for place, cfg in enumerate(scales)
        for model in ("base", "step-30")
    ]
    html = burn_section(with_burn(*sets))
    at_once, folded = html.split("<details>")
    assert text_of(at_once).count("cfg 7.5") == 2
    assert re.search(r"real photographs.*base model, cfg 7\.5.*epoch 3, cfg 7\.5", text_of(at_once))
    assert "cfg 1," not in text_of(at_once).replace("cfg 7.5", "")
    for place, cfg in enumerate(scales):
        if cfg != 7.5:
            assert text_of(folded).count(f", cfg {cfg:g} ") == 2
            assert text_of(folded).count(f" of 1,{place:03d}") == 4


@pytest.mark.parametrize("limit", [2.0, 4.0])
def test_the_worst_pictures_are_one_a_prompt_and_said_to_be_burnt_only_beyond_the_limit(tmp_path, limit):
    scores = [("a boat", 3.0, 7.5), ("a boat", 2.5, 12.0), ("a fox", 1.0, 7.5)]
    worst = tuple(
        ShownPicture(file=f"{place}.png", model="step-30", prompt=prompt, score=score, cfg=cfg)
        for place, (prompt, score, cfg) in enumerate(scores)
    )
    of_all = burn_scores("step-30", burnt=0.16)
    burn = Burn(sets=(of_all,), worst_burnt=worst, limit_burnt=limit, sentence=".")
    text, _, others = text_of(burn_section(with_worst(tmp_path, burn))).partition("Of other models and guidance scales")
    assert text.count("a boat") == text.count("a fox") == 1
    assert "cfg 12" not in text
    assert "cfg 12 · score 2.50" in others
    # the count is that of all pictures, not of those that are shown
    said = "At cfg 7.5, 16 of 100 do; shown are the highest scores, one a prompt."
    assert (said in text) == (limit == 2.0)
    assert "cfg 7.5 · score 3.00 " in text
    assert ("Most burnt of epoch 3" in text) == (limit == 2.0)
    assert ("Nearest to the limit for burnt, of epoch 3 None exceeds the limit, 4.00:" in text) == (limit == 4.0)


ALONE = "Only epoch 3 was evaluated, so no other checkpoint was compared with it"


def kid(base: float, trained: float):
    """Return KID of base and a checkpoint, each give or take 1."""
    metric = measured()[0]
    values = [
        one.model_copy(update={"model": name, "value": value, "low": value - 1, "high": value + 1})
        for one, name, value in zip(metric.values, ("base", "step-30"), (base, trained), strict=False)
    ]
    return metric.model_copy(update={"values": tuple(values), "title": "KID × 1000"})


@pytest.mark.parametrize(
    ("trained", "suggested", "said"),
    [
        (5.0, "step-30", f"{ALONE}; by KID it is nearer to the photographs than the base, beyond chance."),
        (9.0, "step-30", f"{ALONE}; by KID there is no clear difference from the base."),
        (15.0, "", "Evaluated was epoch 3; by KID it is farther from the photographs than the base, beyond chance."),
        (15.0, "base", "Only epoch 3 was evaluated, and it is not better than the base beyond chance."),
    ],
)
def test_the_lead_says_what_the_evaluation_found(trained, suggested, said):
    suggestion = Suggestion(model=suggested, sentence=".") if suggested else None
    assert headline(with_evaluation(metrics=(kid(10.0, trained),), suggestion=suggestion)) == said
    assert headline(sound_run()) == ""


def test_the_lead_names_the_suggested_of_several_and_the_features_where_there_are_others():
    metrics = (kid(10.0, 5.0), kid(10.0, 5.0).model_copy(update={"id": "kid_vae", "features": "the autoencoder"}))
    models = [EvaluatedModel(id=f"step-{step}", step=step, epoch=step / 10) for step in (0, 30, 60)]
    models[0] = models[0].model_copy(update={"id": "base"})

    def said(suggested: str) -> str:
        found = Suggestion(model=suggested, sentence=".")
        return headline(with_evaluation(models=tuple(models), metrics=metrics, suggestion=found))

    assert said("step-30").startswith(
        "Of the evaluated checkpoints epoch 3 is suggested; by KID (EfficientNet-Lite0) it is nearer"
    )
    assert said("base") == "No evaluated checkpoint is better than the base beyond chance."


@pytest.mark.parametrize("photos", [True, False])
def test_the_note_explains_the_photograph_only_where_there_is_one(tmp_path, photos):
    # of two prompts the last has no photograph
    compared = add_comparison(tmp_path, prompts=("a boat", "a fox"), edge_px=32, epochs=(26,), photos=photos)
    text = text_of(learned_section(dataclasses.replace(sound_run(), path=tmp_path, comparison=compared)))
    assert ("The photograph, where there is one, is the one whose caption is the prompt." in text) == photos
    assert text.count(TERMS) == 1


def test_too_few_things_are_said_once_and_their_map_is_folded():
    points = tuple(CropPoint(x=float(i), y=0.0, set="OD", name="dog") for i in range(3))
    few = [
        CropDivergence(
            model=model,
            detector="d",
            features="f",
            divergences=(SetDivergence(first="OD", second="TM", pooled=None),),
            sentence="Too few things were found.",
            points=points,
        )
        for model in ("step-30", "step-60")
    ]
    html = crop_section(with_evaluation(crops=tuple(few)))
    at_once, folded = html.split("<details>")
    assert text_of(html).count("Too few things were found.") == 1
    assert "The same holds of epoch 3." in text_of(at_once)
    assert '<svg class="crop-map"' in folded
    assert 'data-name="photographs · dog"' in folded
    assert EXPLANATION not in html


@pytest.mark.parametrize(
    ("trained", "base", "said"),
    [
        (0.4, 0.05, "Training made more pictures look burnt: 40 of 100 by epoch 3, 5 of 100 by the base."),
        (
            0.4,
            0.38,
            "was not added by training: 40 of 100 by epoch 3, 38 of 100 by the base, a difference within noise.",
        ),
        (0.4, 0.6, "was not added by training: 40 of 100 by epoch 3, 60 of 100 by the base."),
    ],
)
def test_the_burn_check_says_whether_training_did_it(trained, base, said):
    text = text_of(burn_section(with_burn(burn_scores("base", burnt=base), burn_scores("step-30", burnt=trained))))
    assert said in text
    assert "smoothed out was not added" not in text


def test_the_burn_check_says_that_it_knows_no_prompts():
    assert "pure colours that a prompt asks for" in text_of(burn_section(with_burn(burn_scores("step-30"))))


def test_a_grid_says_what_to_look_for_along_its_axes():
    grid = Grid(
        x=GridAxis(name="cfg", labels=("3", "5")),
        y=GridAxis(name="a setting", labels=("1",)),
        z=GridAxis(name="checkpoint", labels=("base",)),
        cells=(),
        prompt="p",
    )
    said = what_to_see(grid)
    assert said.startswith("Across, more cfg gives the prompt more weight; look for where colours turn hard")
    assert "down" not in said
    assert said.endswith(
        "; from table to table, look for when the subject appears, and for what later checkpoints spoil."
    )
