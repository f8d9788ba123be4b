"""Add to a run folder what compare, evaluate and grid write: plausible figures, invented pictures."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from safelight.trainer.report.comparison import ComparedModel, ComparedRow, Comparison
from safelight.trainer.report.evaluation import (
    Burn,
    BurnScores,
    ClassDivergence,
    CropDivergence,
    CropGain,
    CropPoint,
    Difference,
    Estimate,
    EvaluatedModel,
    Evaluation,
    Memorisation,
    Metric,
    NearestPhoto,
    SetDivergence,
    ShownPicture,
    Suggestion,
)
from safelight.trainer.report.grid_record import Grid, GridAxis, GridCell
from safelight.trainer.report.rate_test_record import ProposedRate, RateTest
from safelight.trainer.report.requested_record import Requested, RequestedPicture
from tests.trainer.report.conftest import PROMPTS, STEPS_PER_EPOCH, draw_scene, held_out_loss

EPOCHS = (10, 20, 26, 40)
SUGGESTED = 26


def model_id(epoch: int) -> str:
    return f"step-{epoch * STEPS_PER_EPOCH}" if epoch else "base"


def write_record(path: Path, record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(), encoding="utf-8")


def picture(seed: int, edge_px: int, epoch: int) -> Image.Image:
    """Return what the model of an epoch draws: clearer with every epoch, burnt from 30 on."""
    image = draw_scene(edge_px, edge_px, seed, 0.2 + 0.8 * min(1.0, epoch / 26))
    return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(1.8)).enhance(1.9) if epoch > 30 else image


def add_comparison(run: Path, *, prompts=PROMPTS, edge_px: int = 192, epochs=EPOCHS, photos: bool = True) -> Comparison:
    """Write RUN/compare: base and checkpoints, and a photograph for every prompt but the last."""
    folder = run / "compare"
    folder.mkdir(exist_ok=True)
    rows = []
    for place, prompt in enumerate(prompts):
        images = {}
        for epoch in (0, *epochs):
            images[model_id(epoch)] = f"{model_id(epoch)}-{place:03d}.png"
            picture(place, edge_px, epoch).save(folder / images[model_id(epoch)], compress_level=1)
        photo = f"photo-{place:03d}.png" if photos and place < len(prompts) - 1 else ""
        if photo:
            draw_scene(edge_px * 4 // 3, edge_px, 500 + place, 1.0).save(folder / photo, compress_level=1)
        rows.append(
            ComparedRow(prompt=prompt, place=place, seed=100 + place, photo=photo, held_out=bool(photo), images=images)
        )
    comparison = Comparison(
        models=tuple(
            ComparedModel(id=model_id(epoch), step=epoch * STEPS_PER_EPOCH, epoch=float(epoch))
            for epoch in (0, *epochs)
        ),
        rows=tuple(rows),
        width=max(8, edge_px),
        height=max(8, edge_px),
        num_steps=30,
        cfg=7.5,
        sampler="dpm++",
    )
    write_record(folder / "index.json", comparison)
    return comparison


def _metric(name: str, title: str, better: str, values, spread: float, real: float | None, **more) -> Metric:
    estimates = tuple(
        Estimate(model=model_id(epoch), value=value, low=value - spread, high=value + spread, num=100)
        for epoch, value in zip((0, *EPOCHS), values, strict=True)
    )
    level = None if real is None else Estimate(model="real", value=real, low=real - spread, high=real + spread, num=50)
    return Metric(id=name, title=title, better=better, values=estimates, real=level, **more)


def metrics() -> tuple[Metric, ...]:
    differences = tuple(
        Difference(
            model=model_id(epoch),
            value=value,
            low=value - 0.4,
            high=value + 0.4,
            p=p,
            wins=wins,
            ties=3,
            losses=97 - wins,
        )
        for epoch, value, p, wins in zip(
            EPOCHS, (0.2, 0.7, 0.9, -0.9), (0.31, 0.002, 0.0001, 0.0004), (51, 62, 66, 31), strict=True
        )
    )
    return (
        _metric(
            "kid",
            "KID",
            "lower",
            (41.2, 22.5, 14.1, 11.8, 15.6),
            4.2,
            1.1,
            meaning="How far the pictures as a whole are from the photographs, by the features of a network.",
            features="EfficientNet-Lite0",
        ),
        _metric(
            "fid",
            "FID",
            "lower",
            (231.0, 188.2, 160.4, 152.9, 171.3),
            12.0,
            118.0,
            meaning="The same by means and covariances alone.",
            features="EfficientNet-Lite0",
            warning="FID wants tens of thousands of pictures; at 100 most of it is bias. Compare it only here.",
        ),
        _metric(
            "clip_score",
            "CLIPScore",
            "higher",
            (27.1, 27.3, 27.8, 28.0, 26.2),
            0.6,
            29.4,
            meaning="How well each picture fits its prompt.",
            features="CLIP ViT-L/14",
            differences=differences,
        ),
        _metric(
            "diversity",
            "LPIPS diversity",
            "",
            (0.61, 0.62, 0.63, 0.62, 0.6),
            0.02,
            0.66,
            meaning="How different the pictures of different prompts are from each other.",
        ),
    )


def crop_divergence(num_points: int, seed: int = 5) -> CropDivergence:
    rng = np.random.default_rng(seed)
    classes = ("person", "boat", "bird", "chair", "dog", "potted plant")
    points = tuple(
        CropPoint(
            x=float(rng.normal(2 * math.cos(index % 6) + shift, 0.5)),
            y=float(rng.normal(2 * math.sin(index % 6), 0.5)),
            set=which,
            name=classes[index % 6],
        )
        for which, shift in (("OD", 0.0), ("BM", 1.1), ("TM", 0.3))
        for index in range(num_points // 3)
    )

    def divergence(first: str, second: str, kl: float, z: float) -> SetDivergence:
        def of(name: str, num: int, share: float) -> ClassDivergence:
            return ClassDivergence(
                name=name,
                num_first=num,
                num_second=num + 7,
                kl=kl * share,
                z=z * share,
                p=0.0005 if z * share > 3 else 0.2,
                mmd=kl * share / 10,
                mmd_z=z * share,
                is_grey=num < 50,
            )

        return SetDivergence(
            first=first,
            second=second,
            pooled=of("all", 240, 1.0),
            classes=(of("person", 120, 1.1), of("boat", 34, 0.6)),
        )

    return CropDivergence(
        model=model_id(SUGGESTED),
        detector="YOLOX nano",
        features="EfficientNet-Lite0",
        divergences=(
            divergence("BM", "TM", 0.31, 5.2),
            divergence("OD", "TM", 0.12, 2.1),
            divergence("OD", "BM", 0.52, 8.4),
        ),
        gain=CropGain(value=-0.4, z=-6.1, p=0.0005),
        sentence="Things in the trained model's pictures are closer to the real ones than those of the base model.",
        points=points,
    )


def add_evaluation(run: Path, comparison: Comparison, *, num_points: int = 600) -> Evaluation:
    """Write RUN/evaluation.json and the copies of photographs in RUN/evaluation."""
    (run / "evaluation").mkdir(exist_ok=True)
    rows = comparison.rows
    edge_px = comparison.width
    pairs, worst, smooth = [], [], []
    for place, row in enumerate(rows):
        draw_scene(edge_px, edge_px, 700 + place, 1.0).save(run / "evaluation" / f"{place:03d}.png", compress_level=1)
        model = model_id(SUGGESTED)
        pairs.append(
            NearestPhoto(
                file=row.images[model],
                model=model,
                prompt=row.prompt,
                photo=f"{place:03d}.png",
                similarity=0.93 - 0.04 * place,
                base_similarity=0.61,
                is_flagged=place == 0,
            )
        )
        last = model_id(EPOCHS[-1])
        why = {"cfg": 7.5, "why": "clipped colours"} if place else {}
        worst.append(ShownPicture(file=row.images[last], model=last, prompt=row.prompt, score=3.4 - 0.3 * place, **why))
        smooth.append(ShownPicture(file=row.images["base"], model="base", prompt=row.prompt, score=2.1 - 0.2 * place))
    burn = Burn(
        sets=tuple(
            BurnScores(
                model=model,
                cfg=7.5,
                num=100,
                burnt=tuple(shift + q for q in (-1.5, -0.6, 0.0, 0.6, 1.6)),
                smoothed=tuple(soft + q for q in (-1.4, -0.6, 0.0, 0.7, 1.7)),
                share_burnt=burnt,
                share_smoothed=smoothed,
                burnt_interval=(max(0.0, burnt - 0.05), burnt + 0.06),
                smoothed_interval=(max(0.0, smoothed - 0.05), smoothed + 0.06),
                is_burnt=burnt > 0.15,
                is_smoothed=smoothed > 0.15,
            )
            for model, shift, soft, burnt, smoothed in (
                ("real", 0.0, 0.0, 0.05, 0.05),
                ("base", 0.3, 1.1, 0.08, 0.22),
                (model_id(10), 0.3, 0.8, 0.07, 0.15),
                (model_id(20), 0.5, 0.5, 0.1, 0.11),
                (model_id(26), 0.6, 0.4, 0.09, 0.09),
                (model_id(40), 2.4, 0.2, 0.57, 0.04),
            )
        ),
        worst_burnt=tuple(worst),
        worst_smoothed=tuple(smooth),
        limit_burnt=1.9,
        limit_smoothed=2.0,
        sentence="9 % of epoch 26's pictures are burnt, 57 % of epoch 40's, and 5 % of the photographs.",
    )
    evaluation = Evaluation(
        models=tuple(
            EvaluatedModel(
                id=model_id(epoch), step=epoch * STEPS_PER_EPOCH, epoch=float(epoch), held_out_loss=held_out_loss(epoch)
            )
            for epoch in (0, *EPOCHS)
        ),
        num_prompts=100,
        num_real=50,
        width=edge_px,
        height=edge_px,
        num_steps=30,
        cfg=7.5,
        sampler="dpm++",
        metrics=metrics(),
        crops=(crop_divergence(num_points),),
        burn=burn,
        memorisation=Memorisation(
            features="EfficientNet-Lite0",
            limit=0.88,
            num_flagged={model_id(SUGGESTED): 1, "base": 0},
            chance=0.002,
            num=100,
            pairs=tuple(pairs),
            sentence="1 of 100 pictures of epoch 26 resembles a training photograph more than held-out photographs do.",
        ),
        suggestion=Suggestion(
            model=model_id(SUGGESTED),
            sentence="Use epoch 26.",
            reasons=("held-out loss lowest", "KID no worse than epoch 40's", "least burnt of the last three"),
        ),
        not_computed=("CMMD: needs CLIP ViT-L/14@336; name it with --clip openai/clip-vit-large-patch14-336",),
    )
    write_record(run / "evaluation.json", evaluation)
    return evaluation


def add_grid(
    run: Path, name: str = "cfg-steps", *, edge_px: int = 192, with_z: bool = True, prompt: str = PROMPTS[0]
) -> Grid:
    """Write RUN/grids/NAME: cfg over steps, for base and one checkpoint."""
    folder = run / "grids" / name
    folder.mkdir(parents=True, exist_ok=True)
    x, y = ("3", "5", "7.5", "12"), ("10", "20", "40")
    z = ("base", "epoch 26") if with_z else ("",)
    cells = []
    for k, of in enumerate(z):
        for j in range(len(y)):
            for i in range(len(x)):
                file = f"{i}-{j}-{k}.png"
                image = picture(i, edge_px, 26 * ("epoch" in of) + 4 * j)
                ImageEnhance.Color(image).enhance(0.7 + 0.5 * i).save(folder / file, compress_level=1)
                cells.append(GridCell(x=i, y=j, z=k, file=file))
    grid = Grid(
        x=GridAxis(name="cfg", labels=x),
        y=GridAxis(name="steps", labels=y),
        z=GridAxis(name="checkpoint", labels=z) if with_z else None,
        prompt=prompt,
        fixed=(("sampler", "dpm++"), ("seed", "100")),
        cells=tuple(cells),
        sheet="sheet.png",
    )
    write_record(folder / "index.json", grid)
    return grid


def rate_test(**changes) -> RateTest:
    """Return a test whose loss falls by 6 % until 1.8e-5, and which ends where the loss has doubled."""
    rates = tuple(float(f"{1e-7 * 10 ** (number / 4):.6g}") for number in range(16))
    losses = [0.138, 0.138, 0.1379, 0.1378, 0.1374, 0.1368, 0.136, 0.1345, 0.132, 0.1299, 0.131, 0.139, 0.16, 0.21]
    values = {
        "optimizer": "adamw8bit",
        "batch_size": 8,
        "accumulate": 1,
        "steps_per_rate": 1,
        "measured_on": "8 held-out photographs at 4 timesteps each",
        "first_loss": 0.138,
        "rates": rates,
        "losses": (*losses, 0.4, None),
        "training": (*losses, 0.3, None),
        "proposal": ProposedRate(
            rate=4.4e-6, low=1.5e-6, high=1.3e-5, sureness="clear", reason="the loss falls by 5.9 %, lowest at 1.8e-05"
        ),
        "options": "--optimizer.lr 4.4e-06",
    }
    return RateTest(**{**values, **changes})


def add_rate_test(run: Path, **changes) -> RateTest:
    """Write RUN/find_lr."""
    record = rate_test(**changes)
    write_record(run / "find_lr" / "result.json", record)
    return record


def add_requested(run: Path, *, prompts=PROMPTS, edge_px: int = 192) -> Requested:
    """Write RUN/samples/live: two pictures of each prompt."""
    folder, images = run / "samples" / "live", []
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in (10, 20):
        for place, prompt in enumerate(prompts):
            file = f"step{epoch * STEPS_PER_EPOCH}-seed7-{place:03d}.png"
            picture(place, edge_px, epoch).save(folder / file, compress_level=1)
            step = epoch * STEPS_PER_EPOCH
            row = RequestedPicture(
                file=file, prompt=prompt, step=step, seed=7, cfg=7.0, num_steps=25, sampler="dpm++", cut_after="water"
            )
            images.append(row)
    record = Requested(images=tuple(images))
    write_record(folder / "images.json", record)
    return record
