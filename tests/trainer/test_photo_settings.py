"""What a photograph's own settings and its tags change in training."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from safelight.data.epochs import EMPTY_CAPTION
from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.photo import PhotoSettings, Tag
from safelight.data.prepare.ingest import ingest
from safelight.trainer import train as module
from safelight.trainer.inference.compared_prompts import held_out_prompts
from safelight.trainer.loading.notes import notes_of
from safelight.trainer.report.course import _timeline
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.tiny.scenes import caption, draw, random_scene
from safelight.trainer.train import train
from tests.called import call
from tests.trainer.equal_runs import metrics

NUM = 7
TAGS = (Tag("bright", 2.0), Tag("flat", 1.0), Tag("shape", 1.0), Tag("never", 0.0))
SETTINGS = {
    0: PhotoSettings(repeats=2.5),
    1: PhotoSettings(repeats=0.5, caption_dropout=1.0),
    2: PhotoSettings(caption_dropout=0.0, flip_p=1.0),
    3: PhotoSettings(batch_id="apart"),
    4: PhotoSettings(batch_id="apart", keep_tags=1),
    5: PhotoSettings(repeats=0.0),
}


@pytest.fixture
def dataset(tmp_path) -> Path:
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(NUM):
        scene = random_scene(8, number)
        draw(scene).resize((64, 64)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(caption(scene, 8, number))
    folder = tmp_path / "dataset"
    ingest([source], folder)
    photos = {int(Path(photo.source).stem): photo for photo in read_manifest(folder)}
    write_manifest(
        folder,
        [
            replace(photo, settings=SETTINGS.get(number, photo.settings), tags=TAGS if number in (4, 6) else ())
            for number, photo in photos.items()
        ],
    )
    return folder


@pytest.fixture
def configured(small_config, dataset, tmp_path):
    def configured(name: str = "run", **data):
        return small_config(
            run={"dir": str(tmp_path / name)},
            data={
                "path": str(dataset),
                "validation_fraction": 0.0,
                "variants": 3,
                "caption_dropout": 0.3,
                "max_aspect": 1.0,
                **data,
            },
            train={"batch_size": 3},
            stage=[{"epochs": 4}, {"epochs": 2, "batch_size": 2, "accumulate": 2}],
            sample={"every_epochs": 0},
            validate={"every_epochs": 0},
            save={"every_epochs": 1},
            log={"every_steps": 1},
        )

    return configured


@pytest.fixture
def plans(monkeypatch) -> dict:
    """By epoch, what a run trains: (samples, micro-batches)."""
    made, plan_epoch = {}, module.plan_epoch

    def plan(samples, **arguments):
        batches = plan_epoch(samples, **arguments)
        made[arguments["epoch"]] = samples, batches
        return batches

    monkeypatch.setattr(module, "plan_epoch", plan)
    return made


def number_of(sample) -> int:
    return int(Path(sample.photo.source).stem)


@pytest.mark.parametrize("short_batches", [pytest.param("keep", marks=pytest.mark.slow), "carry"])
@pytest.mark.long
def test_each_setting_takes_effect_and_a_resumed_run_is_the_same(configured, plans, short_batches, tmp_path):
    config = configured(short_batches=short_batches)
    result = train(config)
    uses, dropped, captions, flips = Counter(), Counter(), Counter(), Counter()
    num_steps, stages = 0, config.stages()
    for epoch, (samples, batches) in sorted(plans.items()):
        stage = stages[epoch >= 4]
        num_steps += -(-len(batches) // stage.accumulate)
        in_epoch = Counter()
        for batch in batches:
            members = [samples[ref.sample_index] for ref in batch.refs]
            assert {sample.photo.settings.batch_id for sample in members} in ({""}, {"apart"})
            assert short_batches == "keep" or len(members) == stage.batch_size
            for ref, sample in zip(batch.refs, members, strict=True):
                number = number_of(sample)
                in_epoch[number] += 1
                dropped[number] += ref.caption == EMPTY_CAPTION
                captions[number, sample.captions[ref.caption]] += ref.caption != EMPTY_CAPTION
                flips[number] += sample.crops[ref.variant].is_flipped
                assert ref.variant == 0 or sample.crops[ref.variant].is_flipped == (number == 2)
        if short_batches == "keep":
            assert in_epoch[0] in (2, 3)
            assert in_epoch[1] in (0, 1)
            assert [in_epoch[number] for number in (2, 3, 4, 5, 6)] == [1, 1, 1, 0, 1]
        uses += in_epoch
    assert num_steps == result.position.step
    assert uses[5] == 0
    assert 12 < uses[0] + (short_batches == "carry") < 18
    assert dropped[1] == uses[1] > 0
    assert dropped[2] == 0
    assert flips[2] > 0 == sum(flips.values()) - flips[2]
    orders = {number: {text for seen, text in captions if seen == number} for number in range(NUM)}
    assert len(orders[6]) > 1
    assert not any("never" in text for text in orders[6])
    assert all(text.split(", ")[-3] == "bright" for text in orders[4])
    assert [len(orders[number]) for number in (0, 2)] == [1, 1]
    # the report knows each epoch's steps from the run alone
    timeline = _timeline(read_run_folder(tmp_path / "run"))
    assert timeline.total_steps == num_steps
    assert [timeline.steps_of(epoch) for epoch in sorted(plans)] == [
        -(-len(batches) // stages[epoch >= 4].accumulate) for epoch, (_, batches) in sorted(plans.items())
    ]
    if short_batches == "keep":
        return
    # stopped in the middle of epochs, twice
    again = configured("again", short_batches=short_batches)
    for after in (2, 3):
        steps = iter(range(after))
        assert train(again, resume=after != 2, stop_requested=lambda steps=steps: next(steps, None) is None).interrupted
    train(again, resume=True)
    assert_equal_states(tmp_path / "run", tmp_path / "again")


def assert_equal_states(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    folders = [max((run / "checkpoints").iterdir()) for run in (one, other)]
    for name in ("unet/diffusion_pytorch_model.safetensors", "state.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_other_settings_of_a_photograph_are_another_run(configured, dataset):
    config = configured()
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1})}))
    photos = read_manifest(dataset)
    write_manifest(dataset, [replace(photos[0], settings=PhotoSettings(repeats=3.0)), *photos[1:]])
    with pytest.raises(
        ValueError, match="was trained on other photographs, captions, crops, masks or photo settings than "
    ):
        train(config, resume=True)


def test_prompts_from_captions_have_their_tags(configured, dataset, tmp_path):
    config = configured(caption_suffix=", film")
    (tmp_path / "run").mkdir()
    files = [photo.file for photo in read_manifest(dataset)]
    (tmp_path / "run" / "split.json").write_text(json.dumps({"validation": [files[4], files[0]], "train": []}))
    prompts = held_out_prompts(SimpleNamespace(run_dir=tmp_path / "run", config=config))
    tagged, plain = (prompt.text for prompt in prompts)
    assert tagged.endswith(", bright, flat, shape, film")
    assert plain.endswith(", film")
    assert "bright" not in plain


def test_cache_counts_the_distinct_captions(configured, tmp_path):
    from safelight.trainer.config.toml import to_toml

    (tmp_path / "run.toml").write_text(to_toml(configured()))
    printed = json.loads(call("cache", tmp_path / "run.toml", "--json").out)
    assert printed["num_tagged"] == 2
    assert NUM < printed["num_captions"] <= NUM - 2 + 2 * 4
    lines = call("cache", tmp_path / "run.toml").out.splitlines()
    assert lines[-2].startswith(f"{printed['num_captions']} distinct captions of 7 photographs; 2 have tags, in up to ")


def test_sizes_merged_buckets_and_small_photographs_take_effect(small_config, tmp_path, plans):
    """Two resolutions: 5 photographs fill both, 5 only the smaller, 6 none; 4 alone is of another shape."""
    source, sizes = tmp_path / "sized", {4: (76, 64), 5: (50, 50), 6: (30, 30)}
    source.mkdir()
    for number in range(NUM):
        draw(random_scene(8, number)).resize(sizes.get(number, (64, 64))).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"scene {number}")
    ingest([source], tmp_path / "sized-dataset")
    data = {"path": str(tmp_path / "sized-dataset"), "resolution": [48, 64], "validation_fraction": 0.0}

    def bucket_sizes(name: str, **more) -> dict[int, list[tuple[int, int]]]:
        config = small_config(
            run={"dir": str(tmp_path / name)},
            data={**data, **more},
            train={"batch_size": 4, "max_steps": 2},
            stage=[{"epochs": 1}],
            sample={"every_epochs": 0},
            validate={"every_epochs": 0},
        )
        assert any(
            note.startswith("1 photograph would be enlarged more than 1.25 ") for note in notes_of(config, "cpu")
        )
        train(config)
        met = {number: [] for number in range(NUM)}
        samples, batches = plans[0]
        for batch in batches:
            for ref in batch.refs:
                met[number_of(samples[ref.sample_index])].append((batch.bucket.width, batch.bucket.height))
        assert {ref.occurrence for batch in batches for ref in batch.refs} == {0, 1}
        return {number: sorted(met[number]) for number in met}

    both = [(48, 48), (64, 64)]
    expected = {**dict.fromkeys(range(4), both), 5: [(48, 48)], 6: []}
    assert bucket_sizes("kept") == {**expected, 4: [(56, 40), (72, 56)]}
    assert bucket_sizes("merged", short_batches="merge") == {**expected, 4: both}
    written = json.loads((tmp_path / "merged" / "data.json").read_text())
    assert (written["num_photos"], written["num_train"]) == (6, 6)
    assert [(row["width"], row["num_train"]) for row in written["buckets"]] == [(48, 6), (64, 5)]
    assert written["buckets"][0]["crop_loss"] == pytest.approx(12 * 64 / (4 * 64**2 + 76 * 64 + 50**2), abs=1e-6)
    (row,) = written["rejected"]
    assert row["reason"] == "30 x 30 px is too small for data.resolution 48 with data.upscale allow"
    split = json.loads((tmp_path / "merged" / "split.json").read_text())
    assert len(split["train"]) == 6
