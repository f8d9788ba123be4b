"""Which models are said to copy training photographs."""

import numpy as np
import pytest

from safelight.trainer.evaluation.memorisation import judge_memorisation
from safelight.trainer.report.comparison import ComparedModel, ComparedRow, Comparison
from safelight.trainer.report.evaluation import Memorisation

NORMAL = np.random.Generator(np.random.Philox(key=8)).normal(size=(600, 32)).astype(np.float32)
TRAINING, HELD_OUT = NORMAL[:60], NORMAL[60:80]
FILES = [f"photo-{place}.jpg" for place in range(60)]
NUM = 12


def comparison(held_out: bool = False, models: tuple[str, ...] = ("base", "step-9"), num: int = NUM) -> Comparison:
    return Comparison(
        models=tuple(
            ComparedModel(id=model, step=0 if model == "base" else int(model[5:]), epoch=1.0) for model in models
        ),
        rows=tuple(
            ComparedRow(
                prompt=f"prompt {place}",
                place=place,
                seed=1,
                photo=f"{place}.png",
                held_out=held_out,
                images={model: f"{model}-{place}.png" for model in models},
            )
            for place in range(num)
        ),
        width=64,
        height=64,
        num_steps=4,
        cfg=5.0,
        sampler="ddim",
    )


def pictures(first: int, model: str, num_copies: int = 0, num: int = NUM) -> dict[str, np.ndarray]:
    rows = NORMAL[first : first + num].copy()
    rows[:num_copies] = TRAINING[:num_copies] + 0.2 * rows[:num_copies]
    return {f"{model}-{place}.png": row for place, row in enumerate(rows)}


def judge(drawn: dict[str, np.ndarray], **values) -> Memorisation:
    values = {"training": TRAINING, "held_out": HELD_OUT, "photo_files": FILES, "features": "noise"} | values
    compared = values.pop("compared", comparison())
    return judge_memorisation(compared, drawn, **values)


def test_copies_are_named_with_their_pairs():
    found = judge(pictures(100, "base") | pictures(200, "step-9", num_copies=8))
    assert found.memorised == ("step-9",)
    assert found.num_flagged["step-9"] >= 8
    assert found.num_flagged["base"] <= 1
    assert found.sentence == (
        f"Training photographs seem to be copied: {found.num_flagged['step-9']} of 12 by step 9 are more like one than "
        f"any of 80 real photographs resembles another training photograph; {found.num_flagged['base']} of 12 by the "
        "base. Similarity is no proof: look at the pairs."
    )
    assert (found.num, found.chance, found.features) == (12, 1 / 81, "noise")
    copies = [pair for pair in found.pairs if pair.model == "step-9"]
    assert len(copies) == 8
    assert {(pair.file, pair.photo) for pair in copies} == {(f"step-9-{n}.png", f"photo-{n}.jpg") for n in range(8)}
    assert all(pair.is_flagged and pair.base_similarity < found.limit < pair.similarity for pair in copies)
    assert all(pair.base_similarity is None for pair in found.pairs if pair.model == "base")
    assert Memorisation.model_validate_json(found.model_dump_json()) == found


def test_a_sound_model_is_not_accused():
    found = judge(pictures(100, "base") | pictures(200, "step-9"))
    assert found.memorised == ()
    assert "Training photographs seem" not in found.sentence
    assert found.sentence.startswith(("No sign of copied", "No clear sign of copied"))


def test_no_sign_of_copies_is_said_in_words_of_both_sides():
    none = {name: np.full_like(features, 1e-9) for name, features in pictures(200, "step-9").items()}
    found = judge(pictures(100, "base") | none)
    assert found.num_flagged["step-9"] == 0
    assert found.sentence.startswith(
        "No sign of copied training photographs: every picture is less like its nearest training photograph than some "
        "of 80 real photographs are like another."
    )


def test_held_out_prompts_do_not_rule_copies_out():
    found = judge(pictures(100, "base") | pictures(200, "step-9"), compared=comparison(held_out=True))
    assert "does not rule them out" in found.sentence
    assert "does not rule them out" not in judge(pictures(100, "base") | pictures(200, "step-9")).sentence


def test_what_the_base_draws_as_well_is_not_blamed_on_the_training():
    found = judge(pictures(100, "base", num_copies=8) | pictures(200, "step-9", num_copies=8))
    assert found.memorised == ()
    assert "by the base is too small to blame this training" in found.sentence


def test_without_pictures_of_the_base_chance_alone_is_the_measure():
    found = judge(pictures(200, "step-9", num_copies=8))
    assert found.memorised == ("step-9",)
    assert "the base" not in found.sentence
    assert all(pair.base_similarity is None for pair in found.pairs)


def test_one_flagged_picture_may_be_chance():
    compared = comparison(models=("step-9",), num=1)
    found = judge(pictures(200, "step-9", num_copies=1, num=1), compared=compared, training=TRAINING[:8])
    assert found.num_flagged == {"step-9": 1}
    assert found.memorised == ()
    assert "1 of 1 by epoch 1 are more like one than any of 28 real photographs" in found.sentence
    assert "which may be chance" in found.sentence


def test_mirrored_copies_are_found_where_training_mirrors():
    mirrored = NORMAL[500:560]
    rows = pictures(200, "step-9") | {f"step-9-{n}.png": mirrored[n] + 0.1 * NORMAL[n] for n in range(8)}
    found = judge(pictures(100, "base") | rows, mirrored=mirrored)
    assert found.memorised == ("step-9",)
    assert all(pair.is_mirrored for pair in found.pairs[:8])


def test_near_copies_in_training_do_not_hide_copies():
    training = np.concatenate([TRAINING, TRAINING[-1:] + 0.01])
    values = {"training": training, "photo_files": [*FILES, "again.jpg"]}
    drawn = pictures(100, "base") | pictures(200, "step-9", num_copies=8)
    assert judge(drawn, **values).memorised == ()
    assert judge(drawn, **values, groups=[""] * 59 + ["x", "x"]).memorised == ("step-9",)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"training": TRAINING[:0], "photo_files": []},
            "a limit takes a training photograph and one more",
        ),
        (
            {"training": TRAINING[:2], "held_out": HELD_OUT[:0], "groups": ["x", "x"]},
            "all training photographs are near-copies of each other, and none is held out",
        ),
    ],
)
def test_what_cannot_be_judged_says_so_and_flags_nothing(values, reason):
    found = judge(pictures(200, "step-9", num_copies=8), **values)
    sentence = f"Whether training photographs were copied cannot be judged: {reason}."
    assert (found.sentence, found.num_flagged, found.pairs, found.limit) == (sentence, {}, (), 1.0)


def test_pictures_of_the_base_alone_say_nothing_of_the_training():
    found = judge(pictures(100, "base"))
    assert found.sentence == ("No pictures of a trained model were there to be compared with the training photographs.")
    assert judge({}).num == 0
