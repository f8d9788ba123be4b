"""Which models are said to draw burnt or smoothed-out pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.evaluation.burn import PictureMeasures, PictureSet, judge_burn, measures_of
from safelight.trainer.evaluation.flagged import check_folder, write_flagged
from safelight.trainer.metrics.picture_measures import MEASURES
from safelight.trainer.report.evaluation import Burn

# of what burns: the first four; smoothing: the last two
NORMAL = np.random.Generator(np.random.Philox(key=7)).normal(size=(700, len(MEASURES)))


def drawn(model: str, num: int, first: int, num_burnt: int = 0, num_smoothed: int = 0, cfg: float = 7.5) -> PictureSet:
    rows = NORMAL[first : first + num].copy()
    rows[:num_burnt, MEASURES.index("colour")] += 30
    rows[num - num_smoothed :, MEASURES.index("slope")] -= 20
    files = [f"{model}-{cfg:g}-{place}.png" for place in range(num)]
    return PictureSet(model, cfg, files, [f"prompt {place}" for place in range(num)], rows)


def test_a_burnt_checkpoint_is_named_and_the_base_is_not():
    burn = judge_burn(NORMAL[:100], [drawn("base", 100, 100), drawn("step-300", 100, 200, num_burnt=30)])
    assert burn.sentence.startswith("More pictures look burnt than among the run's own photographs: 3")
    assert "by step 300 (not the base). No" in burn.sentence
    assert "more pictures look smoothed" not in burn.sentence.lower().replace("no more", "")
    real, base, trained = burn.sets
    assert (real.model, base.model, trained.model) == ("real", "base", "step-300")
    assert (real.is_burnt, base.is_burnt, trained.is_burnt, trained.is_smoothed) == (False, False, True, False)
    assert trained.share_burnt >= 0.3
    assert trained.burnt_interval[0] < trained.share_burnt < trained.burnt_interval[1]
    # the photographs' own share is that of the limit
    assert real.share_burnt == 0.01
    assert list(trained.burnt) == sorted(trained.burnt)
    worst = burn.worst_burnt[0]
    assert (worst.model, worst.why, worst.cfg) == ("step-300", "strong colours", 7.5)
    assert worst.score > burn.limit_burnt
    assert Burn.model_validate_json(burn.model_dump_json()) == burn


def test_smoothed_pictures_are_named():
    burn = judge_burn(
        NORMAL[:100], [drawn("base", 60, 100, num_smoothed=40), drawn("step-9", 60, 200, num_smoothed=45)]
    )
    assert "look smoothed out than among the run's own photographs: 4" in burn.sentence
    assert " by the base and 4" in burn.sentence
    assert {picture.why for picture in burn.worst_smoothed} == {"weak high frequencies"}
    assert len(burn.worst_smoothed) == 12


def test_the_base_is_compared_prompt_by_prompt_at_the_same_cfg():
    rows = np.zeros((40, len(MEASURES)))
    base = PictureSet("base", 3.0, ["a.png"] * 40, [f"prompt {place}" for place in range(40)], rows)
    over = rows.copy()
    over[:7, MEASURES.index("colour")] = 30
    sets = [base, dataclasses.replace(base, model="step-9", measures=over), drawn("step-9", 40, 100, cfg=12.0)]
    _, of_base, trained, alone = judge_burn(NORMAL[:100], sets).sets
    # seven prompts became burnt, none the other way
    assert (trained.burnt_p, trained.smoothed_p) == (1 / 2**7, 1)
    assert of_base.burnt_p is alone.burnt_p is None


def test_it_says_what_its_limits_are_fitted_to_and_how_many_photographs_it_flags():
    sets = [drawn("base", 100, 100)]
    said = judge_burn(NORMAL[:100], sets, num_photographs=367).sentence
    real = judge_burn(NORMAL[:100], sets).sets[0]
    assert (
        "fitted to this run's own photographs: of 100, evenly chosen from 367, each scored against the others, "
        f"{round(100 * real.share_burnt)} are above the limit for burnt and {round(100 * real.share_smoothed)} above "
        "that for smoothed out, so that a further photograph is above either with a probability of at most 2 %."
    ) in said
    assert "photographs: of 100, each scored" in judge_burn(NORMAL[:100], sets).sentence


def test_each_cfg_is_a_set_of_its_own():
    sets = [drawn("step-9", 60, 100, cfg=3.0), drawn("step-9", 60, 200, num_burnt=40, cfg=12.0)]
    burn = judge_burn(NORMAL[:100], sets)
    assert "by step 9 at cfg 12 (not step 9 at cfg 3)." in burn.sentence
    assert [scores.cfg for scores in burn.sets[1:]] == [3.0, 12.0]


def test_pictures_like_the_photographs_are_rarely_called_anything():
    claims = [
        scores.is_burnt or scores.is_smoothed
        for first in range(0, 600, 100)
        for scores in judge_burn(NORMAL[first : first + 40], [drawn("base", 50, first + 50)]).sets
    ]
    assert not any(claims)


def test_no_claim_from_few_photographs_or_pictures():
    assert judge_burn(NORMAL[:12], [drawn("base", 50, 100)]).sets == ()
    assert judge_burn(NORMAL[:12], [drawn("base", 50, 100)]).sentence == (
        "Whether pictures are burnt or smoothed out cannot be judged: that takes at least 19 real photographs to "
        "compare with, and there are 12."
    )
    assert judge_burn(NORMAL[:40], []).sentence == "No drawn pictures were there to be judged."
    one = judge_burn(NORMAL[:100], [drawn("step-9", 1, 100, num_burnt=1)])
    assert not one.sets[1].is_burnt
    assert "No more pictures look burnt than chance explains: at most 1 of 1 by step 9." in one.sentence
    assert one.sentence.endswith("A set of 1 picture is small: only a strong effect would show.")


def test_a_picture_that_shows_neither_edges_nor_detail_is_judged_by_the_rest():
    features = PictureMeasures().features([Image.new("RGB", (64, 64), "grey")])
    assert features.dtype == np.float32
    # the store of features keeps no others
    assert np.isfinite(features).all()
    rows = measures_of(features)
    assert np.isnan(rows).any()
    assert rows.shape == (1, PictureMeasures.width)
    burn = judge_burn(NORMAL[:40], [PictureSet("base", 7.5, ["a.png"], ["p"], rows)])
    assert np.isfinite(burn.sets[1].burnt).all()
    assert PictureMeasures().features([]).shape == (0, PictureMeasures.width)


def test_flagged_pictures_are_copied_with_their_prompts(tmp_path):
    """Those above a limit, each kind in a folder that `safelight prepare` reads; the others are not."""
    draws = np.random.default_rng(0)
    photographs = draws.normal(size=(60, 6))
    pictures = np.zeros((3, 6))
    pictures[1, MEASURES.index("clipped")] = 50.0
    pictures[2, MEASURES.index("detail")] = -50.0
    compared = tmp_path / "compare"
    compared.mkdir()
    for number in range(3):
        (compared / f"{number}.png").write_bytes(bytes([number]))
    made = PictureSet("step-8", 7.0, ["0.png", "1.png", "2.png"], ["a barn", "a cow", "a hen"], pictures)
    line = write_flagged(compared, tmp_path / "out", photographs, [made])
    assert line.startswith(
        f"1 picture to {tmp_path / 'out' / 'burnt'} and 1 picture to {tmp_path / 'out' / 'smoothed'}"
    )
    assert f"safelight prepare {tmp_path / 'out' / 'burnt'} -o DATASET" in line
    written = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {
        "burnt/step-8-cfg7-1.png": b"\x01",
        "burnt/step-8-cfg7-1.txt": b"a cow\n",
        "smoothed/step-8-cfg7-2.png": b"\x02",
        "smoothed/step-8-cfg7-2.txt": b"a hen\n",
    }
    assert "flags no picture" in write_flagged(compared, tmp_path / "none", photographs, [])
    with pytest.raises(UserError, match=r"--flagged .*out exists and is not an empty folder"):
        check_folder(tmp_path / "out")
