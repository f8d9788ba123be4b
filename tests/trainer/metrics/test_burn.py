"""The scores of burnt and smoothed-out pictures, relative to the photographs that they are compared with."""

import numpy as np
import pytest

from safelight.trainer.metrics.burn import CHANCE, fit_scale
from safelight.trainer.metrics.picture_measures import MEASURES, measure
from tests.trainer.metrics.synthetic_photos import blurred, harder, sharpened, synthetic_photos

NUM = 80


def measures(photos) -> np.ndarray:
    return np.array([measure(photo) for photo in photos])


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return measures(synthetic_photos(NUM))


def test_scores_rise_with_the_damage_and_real_pictures_keep_the_limits(real):
    scale = fit_scale(real[::2])
    judged = synthetic_photos(NUM)[1::2]
    for name in ("burnt", "smoothed"):
        assert scale.is_over(name, real[1::2]).mean() <= 0.07
    grades = [real[1::2], *(measures(harder(photo, k) for photo in judged) for k in (1.25, 1.5, 2, 3))]
    medians = [np.median(scale.score("burnt", grade)) for grade in grades]
    assert medians == sorted(medians)
    assert scale.is_over("burnt", grades[3]).mean() > 0.8
    assert scale.is_over("burnt", measures(sharpened(photo, 3) for photo in judged)).mean() > 0.7
    smooth = measures(blurred(photo, 1) for photo in judged)
    assert scale.is_over("smoothed", smooth).all()
    assert scale.is_over("burnt", smooth).mean() <= 0.07
    assert set(scale.main_measures("smoothed", smooth)) <= {"slope", "detail", "halo"}


@pytest.mark.parametrize(
    "style",
    [lambda photo: harder(photo, 2), lambda photo: harder(photo, 0.4), lambda photo: photo[..., 1:2].repeat(3, -1)],
    ids=["hard", "faded", "without colour"],
)
def test_a_style_that_the_photographs_have_is_not_called_burnt(style):
    styled = measures(style(photo) for photo in synthetic_photos(NUM))
    scale = fit_scale(styled[::2])
    assert scale.is_over("burnt", styled[1::2]).mean() <= 0.07
    assert scale.is_over("smoothed", styled[1::2]).mean() <= 0.07


def test_the_same_pictures_are_burnt_against_pale_photographs_and_not_against_hard_ones(real):
    pale = fit_scale(measures(harder(photo, 0.4) for photo in synthetic_photos(NUM)))
    hard = fit_scale(measures(harder(photo, 2) for photo in synthetic_photos(NUM)))
    assert pale.is_over("burnt", real).mean() > 0.5
    assert hard.is_over("burnt", real).mean() < 0.05


def test_the_score_is_the_distance_in_spreads_of_what_harms():
    random = np.random.Generator(np.random.Philox(key=2))
    rows = random.normal(size=(4001, len(MEASURES))) * 5 + 1
    scale = fit_scale(rows[:200])
    assert scale.medians == pytest.approx(np.median(rows[:200], axis=0))
    picture = scale.medians.copy()
    picture[MEASURES.index("clipped")] += 3 * scale.spreads[MEASURES.index("clipped")]
    picture[MEASURES.index("colour")] += 4 * scale.spreads[MEASURES.index("colour")]
    # far out, but harmless: it does not hide the others
    picture[MEASURES.index("contrast")] -= 50
    assert scale.score("burnt", picture[None]) == pytest.approx([5])
    assert scale.main_measures("burnt", picture[None]) == ["colour"]
    assert scale.score("smoothed", picture[None]) == pytest.approx([0])
    assert scale.main_measures("smoothed", picture[None]) == [""]


def test_odd_photographs_do_not_move_median_and_spread():
    random = np.random.Generator(np.random.Philox(key=2))
    rows = random.normal(size=(200, len(MEASURES)))
    odd = rows.copy()
    odd[:10] += 1000
    assert fit_scale(odd).medians == pytest.approx(fit_scale(rows).medians, abs=0.2)
    assert fit_scale(odd).spreads == pytest.approx(fit_scale(rows).spreads, abs=0.25)


def test_photographs_are_measured_against_the_others_and_exceed_the_limit_as_rarely_as_said():
    random = np.random.Generator(np.random.Philox(key=4))
    over = []
    for _ in range(25):
        rows = random.standard_t(4, size=(240, len(MEASURES)))
        scale = fit_scale(rows[:40])
        over += [scale.is_over(name, rows[40:]).mean() for name in ("burnt", "smoothed")]
    assert scale.limits["burnt"].num_above == 0
    # 50 limits, each the largest of 40: the mean share of 1 / 41 has a standard error of about 0.0035
    assert np.mean(over) == pytest.approx(CHANCE, abs=0.012)


def test_what_a_picture_does_not_show_does_not_count():
    random = np.random.Generator(np.random.Philox(key=5))
    rows = random.normal(size=(50, len(MEASURES)))
    rows[:, MEASURES.index("halo")] = np.nan
    scale = fit_scale(rows)
    assert np.isfinite(scale.score("burnt", rows)).all()
    rows[0], rows[1] = np.nan, -3e38
    assert scale.score("smoothed", rows)[0] == 0
    assert scale.score("smoothed", rows)[1] < 1e7


def test_photographs_that_are_all_alike_have_the_least_spread_that_can_be_seen():
    row = measure(synthetic_photos(1)[0])
    scale = fit_scale(np.tile(row, (40, 1)))
    assert (scale.spreads > 0).all()
    barely = row + 0.01
    assert scale.score("burnt", barely[None])[0] < 0.2


def test_too_few_photographs_are_refused():
    with pytest.raises(ValueError, match="18 photographs are too few"):
        fit_scale(np.zeros((18, len(MEASURES))))
