"""The page of a comparison: labels, order of columns, and prompts without a photograph."""

import re

from PIL import Image

from safelight.trainer.inference.compare_page import write_comparison_page
from safelight.trainer.report.comparison import ComparedModel, ComparedRow, Comparison


def test_every_picture_has_its_label_and_the_photograph_stands_last(tmp_path):
    for name in ("base.png", "step.png", "photo.png"):
        Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / name)
    images = {"base": "base.png", "step-300": "step.png"}
    rows = [
        ComparedRow(prompt=f"prompt {place}", place=place, seed=0, photo="photo.png" * (place == 1), images=images)
        for place in range(3)
    ]
    models = (ComparedModel(id="base", step=0, epoch=0.0), ComparedModel(id="step-300", step=300, epoch=3.0))
    compared = Comparison(
        models=models, rows=tuple(rows), width=16, height=16, num_steps=5, cfg=1.0, sampler="ddim", negative_prompt=""
    )
    write_comparison_page(tmp_path, "run", compared, {"base": "base", "step-300": "epoch 3\nstep 300"}, ["sheet.png"])
    html = (tmp_path / "index.html").read_text()
    rows = re.findall(r"<tr>(<td.*?)</tr>", html)
    # beside each picture, for screens too narrow for columns; nothing stands for a photograph that there is not
    assert [re.findall(r'data-label="(.*?)"', re.sub(r"<img[^>]*>", "", row)) for row in rows] == [
        ["base", "epoch 3"],
        ["base", "epoch 3", "photograph"],
        ["base", "epoch 3"],
    ]
    assert rows[0].endswith("<td></td>")
    assert "The photograph, of 1 of 3 rows, is the one that has the prompt as its caption." in html
