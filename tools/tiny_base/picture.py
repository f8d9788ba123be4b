"""Make the README's picture from the comparison of a demo run: base above, trained below, same prompts and noise.

python -m tools.tiny_base.picture runs/demo/faded-print docs/pictures/demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ZOOM = 2
GAP = 10
MARGIN = 12
LABEL_WIDTH = 86
NUM_PAIRS = 7
INK, PAPER = (60, 56, 54), (250, 249, 247)


def draw_picture(run_dir: Path) -> Image.Image:
    """Return two rows of images: the run's first pairs, base above trained."""
    folder = run_dir / "compare"
    pairs = json.loads((folder / "index.json").read_text())["pairs"][:NUM_PAIRS]
    rows = []
    for side in ("base", "trained"):
        row = []
        for pair in pairs:
            with Image.open(folder / pair[side]) as image:
                row.append(
                    image.convert("RGB").resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.LANCZOS)
                )
        rows.append(row)
    width, height = rows[0][0].size
    sheet = Image.new(
        "RGB", (2 * MARGIN + LABEL_WIDTH + len(pairs) * (width + GAP) - GAP, 2 * MARGIN + 2 * height + GAP), PAPER
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for r, (label, row) in enumerate(zip(("base", "trained"), rows, strict=True)):
        top = MARGIN + r * (height + GAP)
        pen.text((MARGIN, top + height / 2), label, fill=INK, font=font, anchor="lm")
        for c, image in enumerate(row):
            sheet.paste(image, (MARGIN + LABEL_WIDTH + c * (width + GAP), top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder with a compare folder")
    parser.add_argument("out", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(arguments.run_dir).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
