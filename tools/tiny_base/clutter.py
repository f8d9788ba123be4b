"""Abstract pictures without captions, which the tiny base's autoencoder is pretrained on beside scenes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from safelight.kernels.philox import Key, Purpose, uniforms


def draw_clutter(seed: int, number: int, width: int, height: int) -> Image.Image:
    """Return a random abstract picture, soft or sharp, in any colours. It keeps the VAE from specializing in scenes."""
    u = uniforms(Key(seed, Purpose.SCENE, (1 << 40) + number), 200).tolist()
    ends = [tuple(int(255 * v) for v in u[i : i + 3]) for i in (0, 3)]
    ramp = Image.linear_gradient("L").rotate(360 * u[6]).resize((width * 2, height * 2))
    image = Image.composite(Image.new("RGB", ramp.size, ends[0]), Image.new("RGB", ramp.size, ends[1]), ramp)
    pen = ImageDraw.Draw(image)
    w, h = image.size
    for i in range(3 + int(14 * u[7])):
        v = u[10 + 9 * i : 19 + 9 * i]
        fill = tuple(int(255 * c) for c in v[:3])
        x, y, rx, ry = v[3] * w, v[4] * h, (0.02 + 0.25 * v[5] ** 2) * w, (0.02 + 0.25 * v[6] ** 2) * h
        if v[7] < 0.35:
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
        elif v[7] < 0.6:
            pen.rectangle((x - rx, y - ry, x + rx, y + ry), fill=fill)
        elif v[7] < 0.85:
            pen.line((x, y, v[5] * w, v[8] * h), fill=fill, width=1 + int(5 * v[6]))
        else:
            pen.polygon(((x, y - ry), (x + rx, y + ry), (x - rx, y + ry * v[8])), fill=fill)
    if u[8] < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(3 * u[9]))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    grain = np.random.default_rng(number).normal(0, 10 * u[199] ** 2, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
