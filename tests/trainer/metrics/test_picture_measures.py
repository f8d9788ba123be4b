"""What is measured of one picture, on pictures whose figures are known."""

import numpy as np
import pytest

from safelight.trainer.metrics.picture_measures import MEASURES, measure
from tests.trainer.metrics.synthetic_photos import blurred, harder, sharpened, synthetic_photos


def figures(pixels: np.ndarray) -> dict[str, float]:
    return dict(zip(MEASURES, measure(pixels), strict=True))


def grey(luma: np.ndarray) -> np.ndarray:
    return np.repeat((255 * np.clip(luma, 0, 1)).round().astype(np.uint8)[..., None], 3, axis=-1)


def power_law_noise(exponent: float, height: int, width: int) -> np.ndarray:
    """Return a grey picture whose power falls as f^-exponent."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    random = np.random.Generator(np.random.Philox(key=3))
    spectrum = frequency ** (-exponent / 2) * np.exp(2j * np.pi * random.random(frequency.shape))
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (height, width))
    return grey(0.5 + 0.15 * noise / noise.std())


@pytest.mark.parametrize("exponent", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("shape", [(256, 256), (192, 320)])
def test_the_slope_is_that_of_the_power_spectrum(exponent, shape):
    assert figures(power_law_noise(exponent, *shape))["slope"] == pytest.approx(-exponent, abs=0.15)


def test_clipped_counts_channel_values():
    pixels = np.full((40, 40, 3), 128, np.uint8)
    pixels[:10, :, 0] = 255
    pixels[:5, :, 2] = 1
    assert figures(pixels)["clipped"] == pytest.approx(np.log((400 + 200) / 4800 + 1e-3))
    assert figures(np.full((40, 40, 3), 128, np.uint8))["clipped"] == pytest.approx(np.log(1e-3))


def test_colour_is_the_chroma_that_5_percent_of_the_pixels_exceed():
    pixels = np.full((40, 40, 3), 128, np.uint8)
    pixels[:4] = (204, 128, 102)
    assert figures(pixels)["colour"] == pytest.approx(np.log(102 / 255 + 0.05))
    assert figures(grey(np.random.default_rng(0).random((40, 40))))["colour"] == pytest.approx(np.log(0.05))


@pytest.mark.parametrize("overshoot", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("is_turned", [False, True])
def test_halo_is_the_overshoot_beside_a_step(overshoot, is_turned):
    line = np.full(64, 0.3)
    line[32:] = 0.7
    # half of it on each side
    line[31], line[32] = 0.3 - overshoot * 0.2, 0.7 + overshoot * 0.2
    luma = np.tile(line, (64, 1))
    assert figures(grey(luma.T if is_turned else luma))["halo"] == pytest.approx(overshoot, abs=0.01)


def test_a_line_is_no_halo_and_a_flat_picture_shows_neither_edges_nor_detail():
    luma = np.full((64, 64), 0.4)
    luma[:, ::16] = 0.8
    assert np.isnan(figures(grey(luma))["halo"])
    flat = figures(np.full((64, 64, 3), 90, np.uint8))
    assert [name for name in MEASURES if np.isnan(flat[name])] == ["halo", "detail", "slope"]


def test_contrast_changes_neither_slope_nor_detail_nor_halo():
    photo = synthetic_photos(1)[0]
    pale = (photo * 0.5 + 64).round().astype(np.uint8)
    before, after = figures(photo), figures(pale)
    for name in ("slope", "detail", "halo"):
        assert after[name] == pytest.approx(before[name], abs=0.06), name
    assert after["contrast"] < before["contrast"] - 0.4


@pytest.mark.parametrize(
    ("change", "rising", "falling"),
    [
        (lambda photo: harder(photo, 2), ("clipped", "colour", "contrast"), ()),
        (lambda photo: sharpened(photo, 2), ("halo", "contrast", "slope"), ()),
        (lambda photo: blurred(photo, 1), (), ("slope", "detail", "halo")),
    ],
)
def test_each_damage_moves_its_measures(change, rising, falling):
    photos = synthetic_photos(4)
    for photo in photos:
        before, after = figures(photo), figures(change(photo))
        for name in rising:
            assert after[name] > before[name], name
        for name in falling:
            assert after[name] < before[name], name


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((8, 64, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="expected"):
        measure(pixels)
