"""Write a run folder like that of a real training: 40 epochs in two stages, five prompts, one interruption."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from safelight.trainer.report.build import build_report
from tests.trainer.report.chromium import ARGUMENTS, SIZES, WATCH, Opened, find_chromium

STEPS_PER_EPOCH = 55
PROMPTS = (
    "a red fox standing in tall grass at the edge of a forest, unsplash photography",
    "a wooden boat on a still mountain lake in the early morning, fog over the water, unsplash photography",
    "portrait of an old fisherman in a yellow raincoat, unsplash photography",
    "a bowl of ripe cherries on a linen cloth, soft light from a window, unsplash photography",
    "a lighthouse on a cliff during a storm",
)
CONFIG = """# Safelight run: written by `safelight init sd15`
[run]
dir = "runs/unsplash"
seed = 20230817

[model]
base = "runwayml/stable-diffusion-v1-5"
precision = "bf16"

[data]
path = "datasets/unsplash-500"
resolution = 512
validation_fraction = 0.1
variants = 4
crop_jitter = 0.05
flip_p = 0.5
caption_dropout = 0.04

[train]
batch_size = 8
accumulate = 1
checkpointing = "auto"
max_grad_norm = 1.0

[[stage]]
epochs = 30
lr = 1e-6

[[stage]]
epochs = 10
lr = 5e-7

[optimizer]
name = "adamw8bit"
lr = 1e-6
betas = [0.9, 0.999]
weight_decay = 0.01
memory = "exact"
schedule = "constant"
warmup_steps = 100

[validate]
every_epochs = 2

[sample]
every_epochs = 1
prompts = [
    "a red fox standing in tall grass at the edge of a forest, unsplash photography",
    "a lighthouse on a cliff during a storm",
]

[save]
every_epochs = 5
keep = 3
"""


def held_out_loss(epoch: float, turn: float = 27.0, rise: float = 0.0022) -> float:
    """Return a held-out loss that falls until epoch `turn` and rises afterwards."""
    return 0.1385 - 0.0088 * (1 - math.exp(-epoch / 9)) + rise * max(0.0, epoch - turn) / 6


def time_at(epoch: float) -> float:
    """Return the time at an epoch: 70 s per epoch, and ten minutes lost to an interruption after epoch 18."""
    return 1_700_000_000 + 70.0 * epoch + 600.0 * (epoch > 18)


def validation_line(epoch: float, split: str, loss: float) -> dict:
    shape = np.array([2.35, 1.05, 0.5, 0.1])
    return {
        "kind": "validation",
        "step": round(epoch * STEPS_PER_EPOCH),
        "epoch": epoch,
        "split": split,
        "loss": loss,
        "loss_by_timestep": [float(v) for v in loss * shape * (1 + 0.004 * epoch / 40 * np.array([-6, 0, 3, 5]))],
        "num_images": 50,
        "time": time_at(epoch),
    }


def event(step: int, name: str, detail: str) -> dict:
    return {"kind": "event", "step": step, "event": name, "detail": detail, "time": time_at(step / STEPS_PER_EPOCH)}


def metrics_lines(num_epochs: int = 40) -> list[dict]:
    generator = np.random.default_rng(3)
    lines = [
        event(0, "attention path", "xformers memory-efficient, head dims 40, 80, 160; forward and backward probed")
    ]
    for step in range(1, num_epochs * STEPS_PER_EPOCH + 1):
        epoch = step / STEPS_PER_EPOCH
        stage = int(epoch > 30)
        if step % 5 == 0:
            lines.append(
                {
                    "kind": "train",
                    "step": step,
                    "epoch": epoch,
                    "stage": stage,
                    "loss": float((0.1385 - 0.014 * (1 - math.exp(-epoch / 14))) * generator.lognormal(0, 0.33)),
                    "lr": min(1.0, step / 100) * (5e-7 if stage else 1e-6),
                    "grad_norm": float(0.6 * generator.lognormal(0, 0.25)),
                    "images_per_s": float(6.4 + generator.normal(0, 0.12)) if step > 5 else 2.1,
                    "memory_gib": 11.3 + 0.42 * (step > 300),
                    "time": time_at(epoch),
                }
            )
        if step % (5 * STEPS_PER_EPOCH) == 0:
            lines.append(event(step, "checkpoint saved", f"checkpoints/step-{step:08d}"))
        if step == 18 * STEPS_PER_EPOCH:
            lines.append({**event(step, "resumed", "from step 990"), "time": time_at(18) + 600})
    for epoch in range(0, num_epochs + 1, 2):
        lines.append(validation_line(epoch, "held_out", held_out_loss(epoch)))
        lines.append(validation_line(epoch, "train_subset", 0.1379 - 0.0125 * (1 - math.exp(-epoch / 14))))
    return sorted(lines, key=lambda line: line["step"])


def draw_scene(width: int, height: int, seed: int, strength: float) -> Image.Image:
    """Return a picture of sky, ground and sun, noisier for a lower strength."""
    generator = np.random.default_rng(seed)
    sky, ground, sun = generator.integers(40, 230, (3, 3))
    ramp = np.linspace(0, 1, height)[:, None, None]
    pixels = (1 - ramp) * sky + ramp * (0.5 * sky + 100) + np.zeros((height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    horizon = int(height * (0.55 + 0.2 * generator.random()))
    points = [(0, height)] + [
        (x, horizon + int(0.08 * height * math.sin(5 * x / width + seed))) for x in range(0, width + 9, 8)
    ]
    draw.polygon([*points, (width, height)], fill=tuple(int(v) for v in ground))
    x, y, radius = int(width * (0.2 + 0.6 * generator.random())), int(horizon * 0.6), int(0.12 * height)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(v) for v in sun))
    image = image.filter(ImageFilter.GaussianBlur(width / 200))
    noise = np.random.default_rng(7).normal(0, 60 * (1 - strength) + 3, (height, width, 1))
    return Image.fromarray((np.asarray(image, np.float64) + noise).clip(0, 255).astype(np.uint8))


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_metrics(run_dir: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_run(
    run_dir: Path,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    num_epochs: int = 40,
    edge_px: int = 512,
    scores: bool = True,
    sample_every: int = 1,
    num_sampled: int = 24,
    num_examples: int = 8,
) -> Path:
    """Fill a run folder with everything a run can have, and return it: a row of pictures
    per prompt, samples of the first few."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(CONFIG, encoding="utf-8")
    write_metrics(run_dir, metrics_lines(num_epochs))
    write_json(
        run_dir / "environment.json",
        {
            "started": "2026-03-07T21:14:09",
            "command": "safelight train run.toml --train.max-grad-norm 1.0",
            "safelight": "0.1.0",
            "git_commit": "7fb3adc5e0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "device_name": "NVIDIA GeForce RTX 4090",
            "device_memory_gib": 23.64,
            "cpu": "AMD Ryzen 9 7950X, 16 cores",
            "attention_path": "xformers",
        },
    )
    write_json(
        run_dir / "model.json",
        {
            "base": "runwayml/stable-diffusion-v1-5",
            "from_scratch": False,
            "unet_parameters": 859_520_964,
            "trained_parameters": 859_520_964,
            "vae": "the base model's own",
            "text_encoder": "the base model's own, frozen",
            "prediction_type": "epsilon",
            "precision": "bf16 with 16-bit remainder",
            "notes": [],
        },
    )
    _write_data(run_dir, num_examples)
    for epoch in range(0, num_epochs + 1, sample_every):
        _write_samples(run_dir, prompts[:num_sampled], epoch, edge_px, epoch / num_epochs)
    rows = []
    for index, prompt in enumerate(prompts):
        images = {}
        for model, strength in (("base", 0.3), ("step-1430", 1.0)):
            images[model] = f"{model}-{index:03d}.png"
            path = run_dir / "compare" / images[model]
            path.parent.mkdir(exist_ok=True)
            draw_scene(edge_px, edge_px, index, strength).save(path, compress_level=1)
        rows.append({"prompt": prompt, "place": index, "seed": 100 + index, "images": images})
    models = [{"id": "base", "step": 0, "epoch": 0.0}, {"id": "step-1430", "step": 1430, "epoch": 26.0}]
    drawn = {"width": edge_px, "height": edge_px, "num_steps": 30, "cfg": 7.5, "sampler": "ddim"}
    write_json(run_dir / "compare" / "index.json", {"models": models, "rows": rows, **drawn})
    if scores:
        rows = [
            (
                "the new look",
                [0.02, 0.0, 0.07],
                [0.91, 0.82, 0.96],
                [0.89, 0.78, 0.95],
                0.05,
                "the paper-cut outline is present",
            ),
            (
                "obedience: colour",
                [0.83, 0.72, 0.91],
                [0.86, 0.75, 0.93],
                [0.03, -0.08, 0.14],
                0.125,
                "the dominant colour is the one in the caption",
            ),
            (
                "obedience: shape",
                [0.71, 0.58, 0.81],
                [0.74, 0.62, 0.84],
                [0.03, -0.11, 0.17],
                0.2,
                "the contour is of the shape in the caption",
            ),
        ]
        names = ("what", "base", "trained", "difference", "chance", "explanation")
        write_json(
            run_dir / "scores.json",
            {
                "num_samples": 96,
                "interval": "99 %",
                "rows": [dict(zip(names, row, strict=True)) for row in rows],
                "notes": ["Seeds were fixed beforehand; none of these attribute combinations was trained on."],
            },
        )
    return run_dir


def _write_data(run_dir: Path, num_examples: int) -> None:
    (run_dir / "data_examples").mkdir(exist_ok=True)
    sizes = [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (704, 384), (512, 512), (576, 448)]
    examples = []
    for index in range(num_examples):
        width, height = sizes[index % len(sizes)]
        draw_scene(width // 2, height // 2, 50 + index, 1.0).save(run_dir / "data_examples" / f"{index:03d}.jpg")
        caption = f"{('a field under a wide sky', 'a hill by the sea in the evening')[index % 2]}, unsplash photography"
        examples.append(
            {"file": f"data_examples/{index:03d}.jpg", "caption": caption, "width": width, "height": height}
        )
    write_json(
        run_dir / "data.json",
        {
            "dataset": "datasets/unsplash-500",
            "num_photos": 496,
            "num_train": 446,
            "num_validation": 50,
            "num_captions": 496,
            "variants": 4,
            "examples": examples,
            "buckets": [
                {"width": w, "height": h, "num_train": n, "num_validation": v}
                for w, h, n, v in (
                    (768, 320, 9, 1),
                    (640, 384, 168, 19),
                    (576, 448, 94, 11),
                    (512, 512, 41, 4),
                    (448, 576, 52, 6),
                    (384, 640, 82, 9),
                )
            ],
            "rejected": [{"path": "photos/broken.jpg", "reason": "truncated: 4,096 of 81,220 bytes"}],
        },
    )


def _write_samples(run_dir: Path, prompts: tuple[str, ...], epoch: int, edge_px: int, strength: float) -> None:
    step = epoch * STEPS_PER_EPOCH
    folder = run_dir / "samples" / f"step-{step:08d}"
    images = []
    for index, prompt in enumerate(prompts):
        folder.mkdir(parents=True, exist_ok=True)
        draw_scene(edge_px, edge_px, index, 0.3 + 0.7 * strength).save(folder / f"{index:03d}.png", compress_level=1)
        images.append({"file": f"{index:03d}.png", "prompt": prompt, "seed": 100 + index, "cfg": 7.5, "num_steps": 30})
    write_json(folder / "index.json", {"step": step, "epoch": float(epoch), "images": images})


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 40 epochs. Tests share it and must not change it."""
    return write_run(tmp_path_factory.mktemp("runs") / "unsplash-sd15", edge_px=192)


@pytest.fixture(scope="session")
def full_report(full_run: Path) -> Path:
    """The report of the complete run, built once."""
    return build_report(full_run)


@pytest.fixture(scope="session", name="write_run")
def write_run_fixture():
    """The function that writes a run, for tests that change it afterwards."""
    return write_run


@pytest.fixture(scope="session", name="write_metrics")
def write_metrics_fixture():
    """The function that writes metrics.jsonl."""
    return write_metrics


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium, started once a module."""
    reason = "playwright is not installed: pip install -e '.[dev]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = find_chromium()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser) -> Iterator[Callable[..., Opened]]:
    """The function that opens a page, or an address, in a window of one of SIZES, and watches what it does."""
    contexts = []

    def open_(path: Path | str, size: str = "desk", **options: object) -> Opened:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, has_touch=size == "phone", is_mobile=size == "phone", **options
        )
        contexts.append(context)
        context.add_init_script(WATCH)
        opened = Opened(context.new_page())
        page = opened.page
        page.on("console", lambda message: opened.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: opened.messages.append(f"error: {error}"))
        page.on("requestfailed", lambda request: opened.messages.append(f"failed: {request.url[:80]}"))
        page.on("dialog", lambda dialog: (opened.messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: opened.requests.append(request.url[:80]))
        page.goto(path if isinstance(path, str) else path.as_uri())
        return opened

    yield open_
    for context in contexts:
        context.close()
