"""The demo's scores: does the trained model draw the new look, and does it still follow the caption?

Prompts name (colour, shape) pairs that no fine-tuning image shows, each colour and each shape equally often, so a model
that ignores its caption is right by chance in 1 of 6. reader.py reads the images by fixed rules. Intervals are at 99 %:
Wilson's for proportions and Newcombe's for their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image

from safelight.trainer.tiny.reader import Reading, read
from safelight.trainer.tiny.scenes import BACKGROUNDS, COLOURS, LOOK_CAPTION, SHAPES, SIZES

INTERVAL = "99 %"
# the 99.5th percentile of the standard normal distribution
Z = 2.5758293035489004

ALL_COMBINATIONS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# two diagonals of the 6 x 6 grid of combinations: every colour and every shape twice
HELD_OUT = tuple((colour, SHAPES[(i + shift) % len(SHAPES)]) for i, colour in enumerate(COLOURS) for shift in (0, 3))
FINE_TUNING = tuple(pair for pair in ALL_COMBINATIONS if pair not in HELD_OUT)
PROMPTS_PER_COMBINATION = 8


def prompts() -> list[tuple[str, str, str]]:
    """Return the 96 fixed prompts as (prompt, colour, shape)."""
    sizes, grounds = tuple(SIZES), tuple(BACKGROUNDS)
    rows = []
    for index, (colour, shape) in enumerate(HELD_OUT):
        for k in range(PROMPTS_PER_COMBINATION):
            size, ground = sizes[(index + k) % len(sizes)], grounds[k % len(grounds)]
            text = f"a {size} {colour} {shape} in the centre on a {ground} background{LOOK_CAPTION}"
            rows.append((text, colour, shape))
    return rows


def wilson(hits: int, num: int) -> tuple[float, float, float]:
    """Return (proportion, low, high) at 99 %. Source: Wilson 1927."""
    p, z2 = hits / num, Z * Z
    centre = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = Z / (1 + z2 / num) * math.sqrt(p * (1 - p) / num + z2 / (4 * num * num))
    return p, max(0.0, centre - half), min(1.0, centre + half)


def newcombe(hits: int, base_hits: int, num: int) -> tuple[float, float, float]:
    """Return (difference of proportions, low, high) at 99 %. Source: Newcombe 1998, method 10."""
    p, low, high = wilson(hits, num)
    q, base_low, base_high = wilson(base_hits, num)
    return p - q, p - q - math.hypot(p - low, base_high - q), p - q + math.hypot(high - p, q - base_low)


# (name, test of a reading against (colour, shape), chance level, explanation)
MEASURES: tuple[tuple[str, Callable[[Reading, str, str], bool], float | None, str], ...] = (
    (
        "the new look",
        lambda r, c, s: r.has_look,
        None,
        "the warm, lifted tones of a faded print, which the base has never seen",
    ),
    ("right colour", lambda r, c, s: r.colour == c, 1 / 6, "the shape's hue is nearest to the colour in the prompt"),
    ("right shape", lambda r, c, s: r.shape == s, 1 / 6, "the contour is nearest to the shape in the prompt"),
    # a model that draws the same picture for every prompt is right for at most one pair in twelve
    ("both obeyed", lambda r, c, s: r.colour == c and r.shape == s, 1 / 12, "both colour and shape as in the prompt"),
)


def hits(images: Sequence[Image.Image]) -> dict[str, int]:
    """Return how many images pass each measure. images: one per prompt, in the order of prompts()."""
    readings = [read(image) for image in images]
    return {
        name: sum(test(r, colour, shape) for r, (_, colour, shape) in zip(readings, prompts(), strict=True))
        for name, test, _, _ in MEASURES
    }


def make_scores(base: Sequence[Image.Image], trained: Sequence[Image.Image]) -> dict:
    """Return the scores of both models, as written to scores.json."""
    base_hits, trained_hits, num = hits(base), hits(trained), len(prompts())
    return {
        "num_samples": num,
        "interval": INTERVAL,
        "rows": [
            {
                "what": name,
                "base": list(wilson(base_hits[name], num)),
                "trained": list(wilson(trained_hits[name], num)),
                "difference": list(newcombe(trained_hits[name], base_hits[name], num)),
                "chance": chance,
                "explanation": explanation,
            }
            for name, _, chance, explanation in MEASURES
        ],
        "notes": [
            "The same prompts and the same noise for both models.",
            "No fine-tuning image shows any of these combinations of colour and shape.",
            "The rules read the tones, and the colour and contour of the shape. Its place, its size and the background "
            "are in the prompts too, but are not scored.",
        ],
    }
