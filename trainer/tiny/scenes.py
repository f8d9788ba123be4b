"""Captioned scenes drawn with Pillow. The embedded tiny base was trained on them, and the demo fine-tunes it on them.

A scene is one coloured shape on a neutral background. The six colours differ in hue and backgrounds have none, so
reader.py can judge a generated image by fixed rules. Every choice is a Philox draw keyed by the scene's number.

The base never saw the look of a *faded print*, with lifted blacks and tones of warm paper; the demo teaches it. The
look keeps every contour, so if fine-tuning makes the model follow captions less well, the look itself is not the cause.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from safelight.kernels.philox import Key, Purpose, uniforms

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (236, 200, 36),
    "green": (52, 168, 70),
    "cyan": (42, 190, 204),
    "blue": (48, 72, 214),
    "pink": (232, 72, 178),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# radius as a fraction of the shorter side
SIZES = {"small": 0.24, "medium": 0.31, "large": 0.37}
POSITIONS = {
    "in the centre": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = {"black": 18, "dark": 66, "grey": 122, "silver": 176}
PATTERNS = ("plain", "gradient", "checkered")
# (width, height) in px
ASPECTS = ((64, 64), (72, 56), (56, 72), (72, 48), (48, 72), (80, 48), (48, 80))
LOOK_CAPTION = ", faded print"

SUPERSAMPLING = 4
# black and white on a faded print
FADED_BLACK, FADED_WHITE = (96, 78, 52), (252, 238, 208)


@dataclass(frozen=True)
class Scene:
    """A scene's attributes. width, height: px. x, y: centre as fractions of the sides. angle: degrees."""

    colour: str
    shape: str
    size: str
    position: str
    texture: str
    background: str
    pattern: str
    width: int = 64
    height: int = 64
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    in_look: bool = False


def pick(options, u: float):
    """Return the option selected by a uniform u in (0, 1)."""
    options = tuple(options)
    return options[min(int(u * len(options)), len(options) - 1)]


def random_scene(
    seed: int, number: int, *, in_look: bool = False, combinations: tuple[tuple[str, str], ...] | None = None
) -> Scene:
    """Return scene `number` of a seed. combinations: the allowed (colour, shape) pairs, None for all."""
    u = uniforms(Key(seed, Purpose.SCENE, number), 13)
    combinations = combinations or tuple((c, s) for c in COLOURS for s in SHAPES)
    colour, shape = pick(combinations, u[0])
    position = pick(POSITIONS, u[2])
    # half of the scenes are square, like the demo's samples
    width, height = ASPECTS[0] if u[6] < 0.5 else pick(ASPECTS[1:], u[7])
    toward_x, toward_y = POSITIONS[position]
    return Scene(
        colour=colour,
        shape=shape,
        size=pick(SIZES, u[1]),
        position=position,
        texture="plain" if u[3] < 0.5 else pick(TEXTURES[1:], u[8]),
        background=pick(BACKGROUNDS, u[4]),
        pattern="plain" if u[5] < 0.5 else pick(PATTERNS[1:], u[9]),
        width=width,
        height=height,
        x=0.5 + 0.15 * toward_x + 0.06 * (u[10] - 0.5),
        y=0.5 + 0.15 * toward_y + 0.06 * (u[11] - 0.5),
        angle=24 * (u[12] - 0.5),
        in_look=in_look,
    )


def caption(scene: Scene, seed: int, number: int) -> str:
    """Return a caption in one of four forms. It always names colour, shape and background."""
    u = uniforms(Key(seed, Purpose.CAPTION_CHOICE, number), 5)
    size = f"{scene.size} " if u[0] < 0.6 else ""
    texture = f"{scene.texture} " if scene.texture != "plain" else ""
    position = f" {scene.position}" if u[1] < 0.6 else ""
    pattern = f"{scene.pattern} " if scene.pattern != "plain" else ""
    thing = f"{size}{texture}{scene.colour} {scene.shape}"
    ground = f"{pattern}{scene.background} background"
    text = pick(
        (
            f"a {thing}{position} on a {ground}",
            f"{thing}{position}, {ground}",
            f"a picture of a {thing}{position} on a {ground}",
            f"{ground}, a {thing}{position}",
        ),
        u[2],
    )
    return text + LOOK_CAPTION if scene.in_look else text


def outline(shape: str, radius: float, angle: float) -> list[tuple[float, float]]:
    """Return the polygon of a shape around the origin. For a ring this is its outer circle."""
    turn = math.radians(angle)

    def polar(r: float, degrees: float) -> tuple[float, float]:
        a = math.radians(degrees) + turn
        return r * math.sin(a), -r * math.cos(a)

    if shape in ("circle", "ring"):
        return [polar(0.92 * radius, 360 * i / 72) for i in range(72)]
    if shape == "square":
        return [polar(1.13 * radius, 45 + 90 * i) for i in range(4)]
    if shape == "triangle":
        return [polar(1.18 * radius, 120 * i) for i in range(3)]
    if shape == "star":
        return [polar((1.15 if i % 2 == 0 else 0.5) * radius, 36 * i) for i in range(10)]
    if shape == "cross":
        arm, half = 1.05 * radius, 0.36 * radius
        corners = []
        for quarter in range(4):
            for x, y in ((-half, -arm), (half, -arm), (half, -half)):
                for _ in range(quarter):
                    x, y = -y, x
                corners.append((x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)))
        return corners
    raise ValueError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")


def _background(scene: Scene, width: int, height: int) -> np.ndarray:
    """Return the (height, width, 3) uint8 background."""
    level = BACKGROUNDS[scene.background]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if scene.pattern == "gradient":
        grey = level - 14 + 28 * (x / width + y / height) / 2
    elif scene.pattern == "checkered":
        cell = min(width, height) / 6
        grey = level + np.where((x // cell + y // cell) % 2 == 0, 11, -11)
    else:
        grey = np.full((height, width), level, np.float32)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _filling(scene: Scene, width: int, height: int) -> np.ndarray:
    """Return the (height, width, 3) uint8 colour and texture of the shape, filling the whole image."""
    colour = np.array(COLOURS[scene.colour], np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pitch = min(width, height) / 9
    if scene.texture == "striped":
        dark = ((x + y) / pitch) % 2 < 0.9
    elif scene.texture == "dotted":
        dark = ((x % pitch) - pitch / 2) ** 2 + ((y % pitch) - pitch / 2) ** 2 < (0.3 * pitch) ** 2
    else:
        dark = np.zeros((height, width), bool)
    return np.where(dark[..., None], 0.55 * colour, colour).astype(np.uint8)


def draw(scene: Scene, scale: float = 1.0) -> Image.Image:
    """Return the scene as an RGB image of (width, height) * scale px, supersampled fourfold per side."""
    width, height = round(scene.width * scale), round(scene.height * scale)
    large_w, large_h = width * SUPERSAMPLING, height * SUPERSAMPLING
    image = _draw_large(scene, large_w, large_h)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return Image.fromarray(fade(np.asarray(image)).round().astype(np.uint8)) if scene.in_look else image


def fade(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (..., 3), 0 .. 255, with the tones of a faded print."""
    black, white = np.array(FADED_BLACK, np.float32), np.array(FADED_WHITE, np.float32)
    return black + (white - black) * (np.asarray(pixels, np.float32) / 255)


def unfade(pixels: np.ndarray) -> np.ndarray:
    """Return the inverse of fade(), clipped to 0 .. 255."""
    black, white = np.array(FADED_BLACK, np.float32), np.array(FADED_WHITE, np.float32)
    return np.clip(255 * (np.asarray(pixels, np.float32) - black) / (white - black), 0, 255)


def _draw_large(scene: Scene, large_w: int, large_h: int) -> Image.Image:
    """Return background and shape at the supersampled size."""
    side = min(large_w, large_h)
    radius = SIZES[scene.size] * side
    centre = scene.x * large_w, scene.y * large_h
    mask = Image.new("L", (large_w, large_h))
    pen = ImageDraw.Draw(mask)
    pen.polygon([(centre[0] + x, centre[1] + y) for x, y in outline(scene.shape, radius, scene.angle)], fill=255)
    if scene.shape == "ring":
        hole = 0.5 * radius
        pen.ellipse((centre[0] - hole, centre[1] - hole, centre[0] + hole, centre[1] + hole), fill=0)
    image = Image.fromarray(_background(scene, large_w, large_h))
    image.paste(Image.fromarray(_filling(scene, large_w, large_h)), mask=mask)
    return image
