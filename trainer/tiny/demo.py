"""`safelight demo`: the whole workflow on a built-in base, which learns a look that it has never seen.

Its photographs come without captions; the embedded captioner writes them, as a BLIP would for a photographer.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safelight.data.atomic import atomic_write_text, remove
from safelight.data.images import decode
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from safelight.trainer.captioning.caption_dataset import caption_dataset
from safelight.trainer.captioning.options import Generation, Wording
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.evaluation.evaluate import Means, evaluate
from safelight.trainer.inference.axes import parse_axes
from safelight.trainer.inference.compare import FOLDER as COMPARED
from safelight.trainer.inference.compare import MAX_FILE_BYTES, RECORD_NAME
from safelight.trainer.inference.compared_prompts import Prompt, held_out_prompts
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.grid import draw_grid
from safelight.trainer.inference.grid_plan import plan_grid
from safelight.trainer.inference.which_checkpoint import best_and_last
from safelight.trainer.models.device import pick_device
from safelight.trainer.report.build import build_report
from safelight.trainer.report.comparison import Comparison
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.tiny.scene_detector import open_scene_detector
from safelight.trainer.tiny.scenes import LOOK_CAPTION, Scene, draw, random_scene
from safelight.trainer.tiny.score import FINE_TUNING, make_scores, prompts
from safelight.trainer.train import train
from safelight.untrusted import read_bytes

SEED = 42
RUN_NAME = "faded-print"
NUM_PHOTOS = 200
# what each built-in base is a small one of
KINDS = {"tiny": "Stable Diffusion", "tiny-xl": "Stable Diffusion XL", "tiny-v": "Stable Diffusion 2"}
NOTES = (
    "The demo: a tiny {kind} that comes with Safelight (the base “{base}”), which draws coloured shapes of "
    f"64 px, learns the look of a faded print from {NUM_PHOTOS} drawn scenes. Where this page says photographs, it "
    "means these scenes.\n"
    "A built-in captioner, a small BLIP (“captioner tiny”), wrote their captions, and pictures are compared by its "
    f"features. Fixed rules find and score the shapes in pictures of {len(prompts())} prompts, whose pairs of colour "
    "and shape no scene shows. Evaluated beside these are the captions of the scenes that were held out."
)
# 192 px, so that prepare has something to shrink and crop
DRAWING_SCALE = 3
SAMPLE_STEPS = 14
SAMPLE_CFG = 4.0
GRID = {"x": "cfg=1,2,4,8", "y": "steps=4,8,16", "z": "checkpoint=base,last"}


def photo_name(number: int) -> str:
    return f"print-{number:03d}.png"


def scene_of(number: int) -> Scene:
    """Return what photo `number` shows: a faded print whose pair of colour and shape is not held out."""
    return random_scene(SEED, number, in_look=True, combinations=FINE_TUNING)


def draw_photos(folder: Path, num: int = NUM_PHOTOS) -> None:
    """Write the photos, without captions."""
    folder.mkdir(parents=True)

    def draw_one(number: int) -> None:
        draw(scene_of(number), DRAWING_SCALE).save(folder / photo_name(number))

    # numpy and Pillow release the interpreter while they work
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw_one, range(num)))


def caption_photos(dataset: Path, terminal: Terminal) -> int:
    """Caption the dataset with the embedded captioner; return how many captions name the drawn colour and shape."""
    summary = caption_dataset(
        dataset,
        "tiny",
        Generation(num_beams=1),
        Wording(suffix=LOOK_CAPTION),
        pick_device("auto"),
        progress=lambda done, total, note: terminal.update("captioning", done, total, note),
        say=terminal.say,
    )
    terminal.pause()
    texts = {photo.source.rpartition("/")[2]: photo.captions[0] for photo in summary.photos}
    drawn = {photo_name(number): scene_of(number) for number in range(NUM_PHOTOS)}
    return sum(f"{drawn[name].colour} {drawn[name].shape}" in text for name, text in texts.items())


def demo_config(folder: Path, base: str = "tiny") -> Config:
    """Return the demo's settings: two stages on a built-in base, a key of KINDS."""
    notes = NOTES.format(kind=KINDS[base], base=base)
    return parse_config(
        {
            "run": {"dir": str(folder / RUN_NAME), "seed": SEED, "title": "Faded prints", "notes": notes},
            "model": {"base": base},
            "data": {"path": str(folder / "dataset"), "resolution": 64, "variants": 2, "caption_dropout": 0.1},
            "train": {"batch_size": 8},
            # 8-bit moments save memory, and on a CPU cost a quarter of such a small model's step
            "optimizer": {
                "name": "adamw" if pick_device("auto").type == "cpu" else "adamw8bit",
                "lr": 1e-4,
                "warmup_steps": 10,
            },
            "stage": [{"epochs": 14}, {"epochs": 8, "lr": 1e-4, "schedule": "cosine", "warmup_steps": 0}],
            # as in the training of the base
            "loss": {"min_snr_gamma": 5.0},
            "validate": {"every_epochs": 2},
            "sample": {
                "prompts": [text for text, _, _ in prompts()[::19]],
                "every_epochs": 4,
                "steps": SAMPLE_STEPS,
                "cfg": SAMPLE_CFG,
            },
            "save": {"every_epochs": 4},
            "log": {"every_steps": 5},
        },
        "demo",
    )


def evaluated_prompts(run: OpenRun) -> list[Prompt]:
    """Return the 96 scored prompts, those first that the run samples, then the held-out captions."""
    sampled = run.config.sample.prompts
    texts = dict.fromkeys([*sampled, *(text for text, _, _ in prompts())])
    return [*map(Prompt, texts), *held_out_prompts(run)]


def score(run_dir: Path) -> dict:
    """Read what the evaluation drew for the 96 scored prompts, write scores.json and return its contents."""
    comparison = Comparison.model_validate_json(read_bytes(run_dir / COMPARED / RECORD_NAME, MAX_FILE_BYTES))
    rows = {row.prompt: row for row in comparison.rows}
    images = []
    for model in (comparison.models[0], comparison.models[-1]):
        paths = [run_dir / COMPARED / rows[text].images[model.id] for text, _, _ in prompts()]
        images.append([decode(read_bytes(path, MAX_FILE_BYTES)).image for path in paths])
    result = make_scores(*images)
    atomic_write_text(run_dir / "scores.json", json.dumps(result, indent=1))
    return result


def evaluate_run(run_dir: Path, terminal: Terminal) -> None:
    """Evaluate the run, and draw a grid of guidance scales and steps."""
    run = open_run(run_dir)
    evaluate(
        run,
        best_and_last(run_dir),
        evaluated_prompts(run),
        Means(("tiny",), open_scene_detector()),
        run.device,
        progress=terminal.update,
        say=terminal.say,
    )
    plan = plan_grid(run, parse_axes(GRID), prompts=run.config.sample.prompts[:1])
    draw_grid(run, plan, progress=lambda d, t: terminal.update("drawing a grid", d, t))


def run_demo(folder: Path, terminal: Terminal, base: str = "tiny") -> dict:
    """Run the whole demo on a built-in base in a folder and return the scores and the report's path.

    Replaces an earlier demo. Raises UserError if the folder contains anything else.
    """
    began = time.monotonic()
    mark = folder / "demo.json"
    if folder.exists() and any(folder.iterdir()):
        if not mark.is_file():
            raise UserError(f"{folder} is not empty and is not an earlier demo; choose another folder with --dir")
        # not the folder itself, which may be a link
        for path in list(folder.iterdir()):
            remove(path)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(mark, "{}\n")
    terminal.say(f"drawing {NUM_PHOTOS} faded prints, a look that the base model has never seen")
    draw_photos(folder / "photos")
    dataset = folder / "dataset"
    summary = ingest([folder / "photos"], dataset)
    terminal.say(f"prepared {len(summary.photos)} photographs, which have no captions")
    terminal.say(f'captioning them: safelight caption {dataset} --model tiny --num-beams 1 --suffix "{LOOK_CAPTION}"')
    num_named = caption_photos(dataset, terminal)
    terminal.say(f"{num_named} of {NUM_PHOTOS} captions name the colour and the shape that were drawn")
    config = demo_config(folder, base)
    train(config, terminal=terminal)
    run_dir = Path(config.run.dir)
    evaluate_run(run_dir, terminal)
    result = score(run_dir) | {"captions": NUM_PHOTOS, "captions_right": num_named}
    terminal.pause()
    result["report"] = str(build_report(run_dir))
    result["seconds"] = round(time.monotonic() - began, 1)
    atomic_write_text(mark, json.dumps(result, indent=1) + "\n")
    return result
