"""Class images: which a run trains on and how often, how they are drawn, and that a killed run goes on with them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

from safelight.data.epochs import num_uses, plan_epoch
from safelight.data.manifest import read_manifest, split_validation, write_manifest
from safelight.data.photo import PhotoSettings
from safelight.errors import UserError
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.inference import class_images
from safelight.trainer.loading.dataset import open_dataset, plan_dataset
from safelight.trainer.memory_plan.static_bytes import placed_photos, summary
from safelight.trainer.models.base import base_of
from safelight.trainer.models.class_photos import SOURCE
from safelight.trainer.models.device import pick_device
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.equal_runs import metrics

PROMPT = "a drawing of shapes"


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    shutil.copytree(tiny_dataset, tmp_path / "dataset")
    return tmp_path / "dataset"


def config_of(dataset, folder, prior: dict, **tables):
    values = {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {"path": str(dataset), "resolution": 64, "caption_suffix": ", in the look"},
        "train": {"batch_size": 4},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "stage": [{"epochs": 2}],
        "prior": {"steps": 2, **prior} if prior.get("prompt") else prior,
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 0},
        "validate": {"timesteps": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    return parse_config({**values, **tables}, "test")


def opened(config):
    dataset = open_dataset(config, base_of(config.model), pick_device("cpu"))
    dataset.cache.close()
    return dataset


def pictures(dataset):
    return sorted((dataset / "class_images").rglob("*.png"))


def test_the_base_draws_what_is_missing_and_only_that(dataset, tmp_path, monkeypatch):
    config = config_of(dataset, tmp_path / "run", {"prompt": PROMPT, "num_images": 5, "weight": 0.5})
    first = opened(config)
    files = pictures(dataset)
    assert len(files) == len(first.class_images) == 5
    before = {file: file.read_bytes() for file in files}
    # a run that was killed after two of them, in the middle of writing the third
    for file in files[2:]:
        file.unlink()
    (files[0].parent / ".half.tmp").write_bytes(b"half")
    drawn = []
    generate = class_images.generate
    monkeypatch.setattr(class_images, "generate", lambda *a, **k: drawn.append(k["places"]) or generate(*a, **k))
    again = opened(config)
    assert len(drawn) == 3
    assert {file: file.read_bytes() for file in pictures(dataset)} == before
    assert [s.latent_keys for s in again.train] == [s.latent_keys for s in first.train]
    drawn.clear()
    opened(config)
    assert drawn == []
    # another prompt has pictures of its own
    opened(config_of(dataset, tmp_path / "run", {"prompt": "a tree", "num_images": 1}))
    assert len(pictures(dataset)) == 6


def test_class_images_are_used_as_often_as_photographs_and_weigh_what_is_set(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", {"prompt": PROMPT, "num_images": 7, "weight": 0.5})
    opened_dataset = opened(config)
    own, classes = opened_dataset.trained_photos, opened_dataset.class_images
    assert len(classes) == 7
    assert {sample.photo.settings.loss_scale for sample in classes} == {0.5}
    assert {sample.photo.settings.repeats for sample in classes} == {len(own) / 7}
    # the look's suffix is not part of the class
    assert {sample.captions for sample in classes} == {(PROMPT,)}
    assert all(sample.captions[0].endswith(", in the look") for sample in own)
    assert not any(sample.photo.settings.class_image for sample in opened_dataset.validation)
    # they have the buckets of the photographs, so that they share batches
    assert {s.bucket for s in classes} <= {s.bucket for s in own}
    uses = num_uses(opened_dataset.train, 9, range(2000))
    is_class = [sample.photo.settings.class_image for sample in opened_dataset.train]
    ratio = uses[:, is_class].sum() / uses[:, [not one for one in is_class]].sum()
    assert ratio == pytest.approx(1, abs=0.02)
    assert plan_epoch(opened_dataset.train, seed=9, epoch=3, batch_size=4, caption_dropout=0.1) == plan_epoch(
        opened_dataset.train, seed=9, epoch=3, batch_size=4, caption_dropout=0.1
    )


def test_class_images_of_the_dataset_come_first_and_are_never_held_out(dataset, tmp_path):
    photos = read_manifest(dataset)
    marked = [dataclasses.replace(p, settings=PhotoSettings(class_image=True)) for p in photos[:10]]
    write_manifest(dataset, [*marked, *photos[10:]])
    for fraction in (0.0, 0.1, 0.5):
        kept, held_out = split_validation(read_manifest(dataset), fraction, 3)
        assert not any(photo.settings.class_image for photo in held_out)
        assert len(held_out) == -(-fraction * 14 // 1)
        assert len(kept) + len(held_out) == len(photos)
    alone = opened(config_of(dataset, tmp_path / "run", {"weight": 2.0}))
    assert len(alone.class_images) == 10
    assert {sample.photo.settings.loss_scale for sample in alone.class_images} == {2.0}
    assert pictures(dataset) == []
    both = opened(config_of(dataset, tmp_path / "run", {"prompt": PROMPT, "num_images": 12}))
    assert len(both.class_images) == 12
    assert sum(sample.photo.source == SOURCE for sample in both.class_images) == 2


def test_the_plan_counts_them_before_there_are_any(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", {"prompt": PROMPT, "num_images": 21})
    planned, numbers = Timeline.of(config, placed_photos(config).train), summary(config)["dataset"]
    assert pictures(dataset) == []
    actual = opened(config)
    assert len(actual.trained_photos) == 21
    assert planned.num_steps == Timeline.of(config, actual.train).num_steps == numbers["steps"]
    assert (numbers["train"], numbers["class images"]) == (21, 21)
    plain = summary(config_of(dataset, tmp_path / "run", {}))["dataset"]
    assert plain["class images"] == 0
    assert numbers["images trained"] == 2 * plain["images trained"]


def test_checking_a_cache_draws_nothing(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", {"prompt": PROMPT, "num_images": 3})
    plan = plan_dataset(config, base_of(config.model), pick_device("cpu"))
    plan.dataset.cache.close()
    assert plan.dataset.class_images == []
    assert pictures(dataset) == []


@pytest.mark.long
def test_a_run_with_class_images_resumes_and_shows_them(dataset, tmp_path):
    prior = {"prompt": PROMPT, "num_images": 4, "weight": 0.5}

    def run(name: str, prior: dict, resume: bool = False, **train_settings):
        tables = {"train": {"batch_size": 4, **train_settings}}
        train(config_of(dataset, tmp_path / name, prior, **tables), resume=resume)
        return metrics(tmp_path / name)

    whole = run("whole", prior)
    run("halved", prior, max_steps=3)
    assert run("halved", prior, resume=True)[-1] == whole[-1]
    for change, message in (
        ({"weight": 1.0}, r"prior\.weight is 1\.0, but 0\.5"),
        ({"prompt": "a"}, r"prior\.prompt is 'a'"),
        ({"num_images": 5}, r"prior\.num_images is 5, but 4"),
    ):
        with pytest.raises(UserError, match=message):
            run("halved", {**prior, **change}, resume=True)
    split = json.loads((tmp_path / "whole" / "split.json").read_text())
    assert not any("class_images" in file for half in ("train", "validation") for file in split[half])
    data = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert (data["num_class_images"], data["num_drawn_class_images"]) == (4, 4)
    assert data["num_train"] + data["num_validation"] == data["num_photos"] == 24
    assert [row["caption"] for row in data["class_examples"]] == [PROMPT] * 4
    for row in data["class_examples"]:
        assert max(Image.open(tmp_path / "whole" / row["file"]).size) <= 320
    assert first_validation(whole) == first_validation(run("plain", {}, max_steps=1))


def first_validation(rows: list[dict]) -> float:
    return next(row["loss"] for row in rows if row["kind"] == "validation")


def test_an_edited_class_image_is_noticed(dataset, tmp_path):
    prior = {"prompt": PROMPT, "num_images": 2}
    train(config_of(dataset, tmp_path / "run", prior, train={"max_steps": 2, "batch_size": 4}))
    Image.new("RGB", Image.open(pictures(dataset)[0]).size).save(pictures(dataset)[0])
    with pytest.raises(UserError, match="was trained on other photographs"):
        train(config_of(dataset, tmp_path / "run", prior), resume=True)


def test_too_many_uses_of_a_class_image_are_refused(dataset, tmp_path):
    photos = read_manifest(dataset)
    often = [dataclasses.replace(p, settings=PhotoSettings(repeats=9000)) for p in photos]
    write_manifest(dataset, often)
    with pytest.raises(UserError, match=r"would be used .* times an epoch each.*set prior\.num_images higher"):
        placed_photos(config_of(dataset, tmp_path / "run", {"prompt": PROMPT, "num_images": 1}))


@pytest.mark.slow
def test_a_run_killed_while_it_draws_goes_on_with_the_same_pictures(dataset, tmp_path):
    """With kill -9, after the second picture; every file is complete, and the rest is as if nothing had happened."""
    prior = {"prompt": PROMPT, "num_images": 8, "steps": 12}
    config = config_of(dataset, tmp_path / "run", prior)
    settings = tmp_path / "run.toml"
    settings.write_text(to_toml(config))
    # as many threads as here: the order of a sum depends on them
    process = subprocess.Popen(
        [sys.executable, "-m", "safelight", "cache", str(settings)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 120
    while len(pictures(dataset)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    drawn = {file.name: file.read_bytes() for file in pictures(dataset)}
    assert 2 <= len(drawn) < 8
    resumed = {sample.photo.sha256 for sample in opened(config).class_images}
    assert drawn.items() <= {file.name: file.read_bytes() for file in pictures(dataset)}.items()
    shutil.rmtree(dataset / "class_images")
    assert {sample.photo.sha256 for sample in opened(config).class_images} == resumed
    assert len(resumed) == 8


def test_an_autoencoder_that_rounds_too_much_draws_none(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("safelight.trainer.models.latent_codec.MAX_LATENT_ERROR", 1e-6)
    prior = {"prompt": PROMPT, "num_images": 1}
    config = config_of(dataset, tmp_path / "run", prior, model={"base": small_base(), "vae_precision": "bf16"})
    with pytest.raises(UserError, match=r"model\.vae_precision bf16: .*set model\.vae_precision to fp32"):
        opened(config)
    assert pictures(dataset) == []
