"""What is outside of a mask is not learned, a loss scale scales gradients, and a run with both resumes bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from safelight.__main__ import main
from safelight.data.batches import load_batch
from safelight.data.epochs import plan_epoch
from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.photo import PhotoSettings
from safelight.data.prepare.ingest import ingest
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import to_toml
from safelight.trainer.loading.dataset import open_dataset
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import (
    StepContext,
    StepSettings,
    accumulate,
    add_noise,
    sample_losses,
    train_step,
    upload,
)
from safelight.trainer.step.validate import validate
from safelight.trainer.train import train
from tests.trainer.equal_runs import metrics

CPU = torch.device("cpu")
NUM_PHOTOS = 4
NUM_STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos, stripes to the left and checks to the right, of which a mask leaves out the right half."""
    source = tmp_path_factory.mktemp("masked") / "photos"
    source.mkdir()
    y, x = np.mgrid[:64, :64]
    for number in range(NUM_PHOTOS):
        rows = (y + 2 * number) // 4 % 2
        stripes, checks = np.where(rows, 230, 20), np.where((x // 4 + rows) % 2, 200, 60)
        grey = np.where(x < 32, stripes, checks)
        green = np.where(x < 32, grey // 2, grey)
        Image.fromarray(np.stack([grey, green, grey], -1).astype(np.uint8)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text("a pattern")
        Image.fromarray(np.where(x < 32, 255, 0).astype(np.uint8)).save(source / f"{number}-mask.png")
    ingest([source], source.parent / "dataset")
    return source.parent / "dataset"


@pytest.fixture
def dataset(folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "dataset")


@pytest.fixture
def opened(make_config, folder):
    """A function that returns the tiny base, ready to train on the photos, and all of them as one batch."""
    datasets = []

    def open_with(mask_weight: float, path: Path = folder) -> SimpleNamespace:
        data = {"path": str(path), "validation_fraction": 0.0}
        config = make_config(data=data, loss={"mask_weight": mask_weight}, optimizer={"name": "adamw"})
        base = resolve_base("tiny")
        dataset = open_dataset(config, base, CPU)
        datasets.append(dataset)
        unet = load_unet(base, 0).train()
        schedule = make_schedule(base.config_of("scheduler"))
        optimizer = make_optimizer(unet, config.optimizer, torch.float32)
        context = StepContext(unet, optimizer, schedule, dataset.scaling_factor, config.loss)
        plan = plan_epoch(dataset.train, seed=1, epoch=0, batch_size=NUM_PHOTOS, caption_dropout=0.0)
        return SimpleNamespace(context=context, dataset=dataset, batch=load_batch(dataset.rows(dataset.train), plan[0]))

    yield open_with
    for dataset in datasets:
        dataset.cache.close()


def losses_by_side(trained: SimpleNamespace) -> tuple[float, float]:
    """Return the losses of the left and the right half of the photos, on noise that is not trained on."""
    context, sides = trained.context, []
    left = torch.zeros(NUM_PHOTOS, 1, *trained.batch.mean_BCHW.shape[2:])
    left[..., : left.shape[3] // 2] = 1
    with torch.no_grad():
        for mask in (left, 1 - left):
            total = 0.0
            for epoch in range(3):
                inputs = upload(trained.batch, CPU, 99, epoch)
                noised = add_noise(inputs, context.schedule, context.scaling_factor)
                total += float(sample_losses(context.unet, noised, inputs.conditioning, mask).mean())
            sides.append(total / 3)
    return tuple(sides)


def test_what_is_outside_of_the_mask_is_not_learned(opened):
    outside_after = {}
    for mask_weight in (0.0, 1.0):
        trained = opened(mask_weight)
        assert (trained.batch.mask_B1HW is None) == (mask_weight == 1)
        inside, outside = losses_by_side(trained)
        for epoch in range(NUM_STEPS):
            train_step(trained.context, [trained.batch], StepSettings(NUM_PHOTOS, 2e-4, 0.0, 1.0), seed=1, epoch=epoch)
        inside_after, outside_after[mask_weight] = losses_by_side(trained)
        assert inside_after < 0.4 * inside
    assert outside_after[0.0] > 0.9 * outside
    assert outside_after[1.0] < 0.7 * outside


def gradients(trained: SimpleNamespace, **changes) -> dict[str, torch.Tensor]:
    """Return the gradients of a batch, with fields changed."""
    context = trained.context
    context.unet.zero_grad(set_to_none=True)
    inputs = upload(dataclasses.replace(trained.batch, **changes), CPU, 1, 0)
    noised = add_noise(inputs, context.schedule, context.scaling_factor)
    optimizer = context.optimizer
    accumulate(
        context.unet,
        noised,
        inputs.conditioning,
        context.schedule,
        context.loss,
        NUM_PHOTOS,
        optimizer.loss_scale.scale,
        inputs.mask_B1HW,
        inputs.scales_B,
    )
    return {name: p.grad.clone() for name, p in context.unet.named_parameters()}


def test_masks_and_loss_scales_in_the_gradients_of_all_weights(opened, dataset):
    trained = opened(0.0)
    mask = trained.batch.mask_B1HW
    assert mask.unique().tolist() == [0.0, 1.0]
    whole, inside, outside = (gradients(trained, mask_B1HW=m) for m in (None, mask, 1 - mask))
    for name, gradient in whole.items():
        torch.testing.assert_close(inside[name] + outside[name], gradient, rtol=1e-3, atol=1e-5)
    # a photo of loss scale 4 counts as four, exactly; of 0, not at all
    nothing = gradients(trained, scales_B=torch.zeros(NUM_PHOTOS))
    assert not any(gradient.any() for gradient in nothing.values())
    four = gradients(trained, scales_B=torch.full((NUM_PHOTOS,), 4.0))
    assert all(torch.equal(four[name], 4 * gradient) for name, gradient in inside.items())
    # from the manifest
    photos = read_manifest(dataset)
    write_manifest(dataset, [dataclasses.replace(p, settings=PhotoSettings(loss_scale=4.0)) for p in photos])
    scaled = opened(0.0, dataset)
    assert scaled.batch.scales_B.tolist() == [4.0] * NUM_PHOTOS
    assert all(torch.equal(gradient, 4 * inside[name]) for name, gradient in gradients(scaled).items())


def test_validation_is_masked_and_not_scaled(opened, dataset):
    def loss(trained: SimpleNamespace) -> float:
        rows = trained.dataset.rows(trained.dataset.train)
        context = trained.context
        return validate(
            context.unet, rows, context.schedule, context.scaling_factor, seed=3, num_bands=2, batch_size=NUM_PHOTOS
        ).loss

    masked, half, whole = (loss(opened(weight)) for weight in (0.0, 0.5, 1.0))
    assert 0 < masked < 0.9 * whole
    assert half == pytest.approx((masked + whole) / 2, rel=1e-5)
    photos = read_manifest(dataset)
    write_manifest(dataset, [dataclasses.replace(p, settings=PhotoSettings(loss_scale=4.0)) for p in photos])
    assert loss(opened(0.0, dataset)) == masked


def run_of(make_config, dataset: Path, run_dir: Path, **changes):
    return make_config(
        run={"dir": str(run_dir)},
        data={"path": str(dataset), "validation_fraction": 0.25, "variants": 2, "flip_p": 0.5},
        train={"batch_size": 2},
        optimizer={"name": "adamw"},
        stage=[{"epochs": 2}],
        sample={"every_epochs": 0},
        validate={"timesteps": 1, "every_epochs": 5},
        save={"every_steps": 1, "keep": 9},
        **changes,
    )


@pytest.mark.slow
def test_a_run_with_masks_and_scales_resumes_bit_for_bit_and_notices_other_ones(make_config, dataset, tmp_path, capsys):
    photos = read_manifest(dataset)
    photos[0] = dataclasses.replace(photos[0], settings=PhotoSettings(loss_scale=3.0))
    photos[1] = dataclasses.replace(photos[1], mask="", mask_sha256="")
    write_manifest(dataset, photos)
    alone = train(run_of(make_config, dataset, tmp_path / "alone")).run_dir
    stopped = run_of(make_config, dataset, tmp_path / "stopped")
    stops = iter([False] * 3)
    assert train(stopped, stop_requested=lambda: next(stops, True)).interrupted
    first = list_checkpoints(tmp_path / "stopped")[-1]
    last = list_checkpoints(alone)[-1]
    assert 0 < first < last

    def refused(words: str) -> None:
        with pytest.raises(
            ValueError, match=f"other photographs, captions, crops, masks or photo settings than .*{words}"
        ):
            train(stopped, resume=True)

    trained = json.loads((alone / "split.json").read_text())["train"]
    masked = next(photo for photo in photos if photo.file in trained and photo.mask)
    without = [dataclasses.replace(p, mask="", mask_sha256="") if p == masked else p for p in photos]
    write_manifest(dataset, without)
    refused("dataset has now; start")
    write_manifest(dataset, [dataclasses.replace(p, mask_sha256="0" * 64) if p == masked else p for p in photos])
    refused(rf"now: 1 with other masks \(first: {masked.file}\)")
    other = PhotoSettings(loss_scale=2.0)
    write_manifest(dataset, [dataclasses.replace(p, settings=other) if p == masked else p for p in photos])
    refused("dataset has now; start")
    write_manifest(dataset, photos)
    train(stopped, resume=True)
    for name in ("unet/diffusion_pytorch_model.safetensors", "state.safetensors"):
        one, two = (load_file(folder_of(run, last) / name) for run in (alone, tmp_path / "stopped"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert metrics(alone) == metrics(tmp_path / "stopped")
    # said by the run, its records and its report
    data = json.loads((alone / "data.json").read_text())
    assert (data["num_masks"], data["num_loss_scales"]) == (
        sum(bool(photo.mask) for photo in photos if photo.file in trained),
        sum(photo.settings.loss_scale != 1 for photo in photos if photo.file in trained),
    )
    assert data["num_masks"] >= 1
    assert main(["report", str(alone)]) == 0
    assert "outside of which nothing is learned" in (alone / "report.html").read_text()


def test_the_plan_and_its_notes_count_masks_and_scales(make_config, dataset, tmp_path, capsys):
    photos = read_manifest(dataset)
    write_manifest(dataset, [dataclasses.replace(photos[0], settings=PhotoSettings(loss_scale=3.0)), *photos[1:]])

    def planned(*options: str) -> dict:
        toml = tmp_path / "run.toml"
        toml.write_text(to_toml(make_config(data={"path": str(dataset), "validation_fraction": 0.0})))
        assert main(["plan", str(toml), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    plan = planned()
    assert (plan["dataset"]["masks"], plan["dataset"]["loss_scales"]) == (4, 1)
    without = planned("--loss.mask-weight", "1")
    assert without["dataset"]["masks"] == 0
    assert "4 masks without effect: loss.mask_weight is 1" in without["notes"]
    assert without["dataset"]["cache_bytes"] < plan["dataset"]["cache_bytes"]
    write_manifest(dataset, [dataclasses.replace(photo, mask="", mask_sha256="") for photo in photos])
    notes = planned("--loss.mask-weight", "0.5")["notes"]
    assert "loss.mask_weight 0.5 has no effect: no photograph has a mask" in notes
