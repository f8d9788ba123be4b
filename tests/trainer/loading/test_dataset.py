"""Opening a dataset: what is encoded, what is encoded again, and that encoders are freed."""

import gc
import json
import os
import re
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from safelight.data.batches import load_batch
from safelight.data.epochs import EMPTY_CAPTION, plan_epoch
from safelight.data.manifest import read_manifest
from safelight.data.prepare.ingest import ingest
from safelight.data.verify import verify
from safelight.errors import UserError
from safelight.trainer.loading import dataset as module
from safelight.trainer.loading import run_start
from safelight.trainer.loading.dataset import open_dataset
from safelight.trainer.loading.run_start import _read_rejected
from safelight.trainer.models.base import Base, base_of, bucket_multiple, resolve_base
from safelight.trainer.models.latent_codec import load_codec
from safelight.trainer.tiny.scenes import caption, draw, random_scene

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(6):
        scene = random_scene(8, number)
        draw(scene).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(caption(scene, 8, number))
    ingest([source], tmp_path / "dataset")
    return tmp_path / "dataset"


def opened(make_config, folder, **changes):
    data = {"path": str(folder), "validation_fraction": 0.3, **changes.pop("data", {})}
    return open_dataset(make_config(data=data, **changes), resolve_base("tiny"), CPU)


def test_rows_are_the_autoencoders_posterior_and_the_encoders_embeddings(make_config, folder):
    config = make_config(data={"path": str(folder), "cache_dtype": "float32"})
    with open_dataset(config, resolve_base("tiny"), CPU).cache as cache:
        dataset = open_dataset(config, resolve_base("tiny"), CPU)
        sample = dataset.train[0]
        from tests.pixels import load_pixels

        bucket, crop = sample.bucket, sample.crops[0]
        pixels = load_pixels(folder / sample.photo.file, crop.box, (bucket.width, bucket.height), crop.is_flipped)
        mean, logvar = load_codec(config, resolve_base("tiny"), CPU).encode(torch.from_numpy(pixels)[None])
        row = cache.read([sample.latent_keys[0]])[0]
        np.testing.assert_allclose(row, torch.cat([mean, logvar], dim=1)[0].numpy(), rtol=1e-3, atol=1e-3)
        dataset.cache.close()


def test_latents_in_16_bits_have_rows_of_their_own_and_are_compared_with_fp32_first(make_config, folder, monkeypatch):
    exact = opened(make_config, folder)
    exact.cache.close()
    assert exact.vae_note == ""
    rounded = opened(make_config, folder, model={"vae_precision": "fp16"})
    keys = [[key for sample in one.samples for key in sample.latent_keys] for one in (exact, rounded)]
    assert not set(keys[0]) & set(keys[1])
    assert rounded.num_encoded == len(keys[1])
    assert rounded.vae_note.startswith("the autoencoder in fp16 differs from fp32 by 0.0")
    assert rounded.vae_note.endswith("on 3 photographs")
    # and they are what it says: latents in fp16
    mean = rounded.cache.read(keys[1][:1])[0][:4]
    true = opened(make_config, folder)
    exact_mean = true.cache.read(keys[0][:1])[0][:4]
    assert 0 < np.abs(mean - exact_mean).max() < 0.05
    true.cache.close()
    rounded.cache.close()
    # a limit that it does not keep, though nothing is left to encode
    monkeypatch.setattr("safelight.trainer.models.latent_codec.MAX_LATENT_ERROR", 1e-5)
    with pytest.raises(
        UserError, match=r"^model\.vae_precision fp16: .*\(0\.001 % allowed\).*set model\.vae_precision"
    ):
        opened(make_config, folder, model={"vae_precision": "fp16"})


def test_captions_and_prompts_that_are_cut_are_named(make_config, tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(4):
        draw(random_scene(8, number)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text("a word " * (60 if number in (1, 2) else 2))
    ingest([source], tmp_path / "dataset")
    prompts = ["short", "several words " * 250, "several words " * 50]
    dataset = opened(make_config, tmp_path / "dataset", sample={"prompts": prompts})
    dataset.cache.close()
    # prompts may be eight times as long
    assert dataset.cuts.keys() == {prompts[1]}
    of_prompts, of_captions = dataset.cut_notes
    assert of_prompts.startswith("note: sample prompt 2 is cut after '...")
    assert of_prompts.endswith(": the text encoder reads 368 tokens")
    # by the file that its owner knows
    assert re.findall(r"a caption of (\S+) (?:is cut )?after", of_captions) == ["photos/1.png", "photos/2.png"]
    assert of_captions.endswith(": the text encoder reads 46 tokens")
    # two captions: "a word" twice, and sixty times
    assert dataset.length_note == (
        "captions have 6 to 180 tokens, half of them up to 93; the text encoder reads 46; 1 of them is cut"
    )


def test_a_second_time_makes_nothing_and_another_suffix_only_texts(make_config, folder):
    first = opened(make_config, folder)
    first.cache.close()
    assert first.num_encoded > 6
    second = opened(make_config, folder)
    second.cache.close()
    assert second.num_encoded == 0
    suffixed = opened(make_config, folder, data={"caption_suffix": " on film"})
    captions = {text for s in (*suffixed.train, *suffixed.validation) for text in s.captions}
    assert all(text.endswith(" on film") for text in captions)
    assert suffixed.num_encoded == len(captions)
    suffixed.cache.close()


def test_encoders_leave_the_memory(make_config, folder, monkeypatch):
    seen = []

    def spy(load):
        def loading(*args):
            loaded = load(*args)
            seen.append(weakref.ref(getattr(loaded, "vae", None) or loaded.text_encoders))
            return loaded

        return loading

    monkeypatch.setattr(module, "load_codec", spy(module.load_codec))
    monkeypatch.setattr(module, "load_caption_encoder", spy(module.load_caption_encoder))
    dataset = opened(make_config, folder)
    gc.collect()
    assert len(seen) == 2
    assert all(reference() is None for reference in seen)
    dataset.cache.close()


def test_variants_apply_to_training_alone(make_config, folder):
    dataset = opened(make_config, folder, data={"variants": 3, "crop_jitter": 0.2, "flip_p": 0.5})
    assert all(len(s.latent_keys) == 3 and len(set(s.latent_keys)) > 1 for s in dataset.train)
    assert all(len(s.latent_keys) == 1 and not s.crops[0].is_flipped for s in dataset.validation)
    dataset.cache.close()


def texts_of(dataset, make_config, **sample) -> list[str]:
    return [prompt.prompt for prompt in dataset.sample_prompts(make_config(sample=sample))]


def test_prompts_are_the_configs_or_held_out_captions(make_config, folder):
    dataset = opened(make_config, folder, sample={"num_prompts": 1})
    held_out = {s.captions[0] for s in dataset.validation}
    assert len(texts_of(dataset, make_config, num_prompts=1)) == 1
    assert set(texts_of(dataset, make_config, num_prompts=1)) <= held_out
    assert texts_of(dataset, make_config, prompts=["a", "b"]) == ["a", "b"]
    dataset.cache.close()


def test_prompts_of_the_config_are_embedded_beforehand(make_config, folder):
    dataset = opened(make_config, folder, sample={"prompts": ["a thing nobody captioned"], "negative_prompt": "blur"})
    texts = dataset.sample_texts()
    positive, negative = texts.positive([0]), texts.negative([0])
    assert (len(dataset.pictures), positive.text_BTD.shape[0], negative.text_BTD.shape[0]) == (1, 1, 1)
    assert not torch.equal(positive.text_BTD, negative.text_BTD)
    dataset.cache.close()


def test_a_long_prompt_has_more_chunks_and_leaves_the_others_as_they_are(make_config, folder):
    prompts = ["a red circle", ", ".join(["a blue star"] * 30), "a (green:1.4) ring"]
    alone = opened(make_config, folder, sample={"prompts": prompts[:1]})
    first = alone.sample_texts().positive([0])
    alone.cache.close()
    dataset = opened(make_config, folder, sample={"prompts": prompts})
    texts = dataset.sample_texts()
    assert texts.num_chunks == (1, 3, 1)
    short, long = texts.positive([0, 2]), texts.positive([1])
    assert torch.equal(short.text_BTD[:1], first.text_BTD)
    num_tokens = short.text_BTD.shape[1]
    assert long.text_BTD.shape[1] == texts.negative([1]).text_BTD.shape[1] == 3 * num_tokens
    dataset.cache.close()


@pytest.mark.parametrize("weights", [False, True])
def test_captions_are_read_as_the_settings_say(make_config, folder, weights):
    plain = opened(make_config, folder)
    plain_rows = plain.cache.read(plain.train[0].text_keys[:1])
    plain.cache.close()
    dataset = opened(make_config, folder, data={"prompt_weights": weights, "caption_chunks": 2})
    assert dataset.train[0].text_keys != plain.train[0].text_keys
    rows = dataset.cache.read(dataset.train[0].text_keys[:1])
    assert rows.shape[1] == 2 * plain_rows.shape[1]
    assert np.array_equal(rows[:, : plain_rows.shape[1]], plain_rows)
    dataset.cache.close()


@pytest.mark.parametrize(
    ("spec", "factor", "expected"), [("random:sd15", 8, 64), ("tiny", 4, 8), ("random:small", 8, 16)]
)
def test_bucket_multiple(spec, factor, expected):
    assert bucket_multiple(resolve_base(spec), factor) == expected


def test_parts_that_do_not_fit_each_other_are_named(make_config, folder, monkeypatch):
    original = Base.config_of

    def narrower(self, part):
        config = original(self, part)
        return {**config, "cross_attention_dim": 768} if part == "unet" else config

    monkeypatch.setattr(Base, "config_of", narrower)
    with pytest.raises(ValueError, match="width 768, the text encoder gives 128"):
        opened(make_config, folder)


def test_nothing_left_to_train_on_is_said(make_config, folder):
    (folder / "manifest.jsonl").write_text(
        json.dumps(json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])) + "\n"
    )
    assert len(read_manifest(folder)) == 1
    dataset = opened(make_config, folder, data={"validation_fraction": 0.9})
    assert len(dataset.train) == 1, "a single photograph is trained on, not held out"
    dataset.cache.close()


@pytest.mark.parametrize("name", ["images", "images/0.png", "cache", "cache/shards", "cache/index.sqlite", "x/y"])
def test_a_dataset_with_a_link_that_leads_out_is_neither_read_nor_written(make_config, folder, name):
    """By prepare, cache and train."""
    home, path = folder.parent / "home", folder / name
    home.mkdir()
    (home / ".a.tmp").write_text("precious")
    path.parent.mkdir(exist_ok=True)
    path.rename(folder / "aside") if path.exists() else None
    path.symlink_to(home)
    with pytest.raises(UserError, match=f"{name} is a link to .*home, outside"):
        opened(make_config, folder)
    with pytest.raises(UserError, match=f"{name} is a link to .*home, outside"):
        ingest([folder.parent / "photos"], folder)
    assert [entry.name for entry in home.iterdir()] == [".a.tmp"]


def test_the_list_of_rejected_files_may_be_anything(folder):
    path = folder / "rejected.jsonl"
    path.write_text("[" * 100_000 + '\n{"path": "\\ud83d", "reason": 1e999}\n{"path": "a", "reason": {}}\nNaN\n')
    assert _read_rejected(path) == ([{"path": "a", "reason": "{}"}], "")
    path.unlink()
    assert _read_rejected(path) == ([], "")
    os.mkfifo(path)
    assert "is not a regular file but a device or pipe" in _read_rejected(path)[1]
    path.unlink()
    path.mkdir()
    rows, note = _read_rejected(path)
    assert rows == []
    assert re.fullmatch(
        r"the report lists no rejected files: \S+rejected\.jsonl cannot be read "
        r"\(.* not a regular file but a folder\); `safelight prepare` writes it",
        note,
    )
    path.rmdir()
    path.symlink_to("nothing")
    assert "cannot be read (No such file or directory)" in _read_rejected(path)[1]


def test_a_list_of_millions_of_rejected_files_takes_no_minutes(folder, monkeypatch):
    monkeypatch.setattr(run_start, "MAX_REJECTED", 1000)
    path = folder / "rejected.jsonl"
    for line, num_rows in ((b"\n", 0), (b"0\n", 0), (b'{"path": "a", "reason": "b"}\n', 1000)):
        path.write_bytes(line * (2**24 // len(line)))
        start = time.process_time()
        rows, note = _read_rejected(path)
        assert time.process_time() - start < 5
        assert len(rows) == num_rows
        assert note.startswith("the report lists the rejected files of the first 1,000 lines of") == (line != b"\n")


def test_a_run_that_trains_the_text_encoder_reads_token_ids_until_it_stops(make_config, folder):
    config = make_config(text_encoder={"train": True}, data={"caption_chunks": 2})
    base = base_of(config.model)
    encoder = module.load_caption_encoder(config, base, torch.device("cpu"))
    dataset = module.open_dataset(config, base, torch.device("cpu"), encoder=encoder)
    plan = plan_epoch(dataset.train, seed=1, epoch=0, batch_size=2, caption_dropout=0.5)
    for micro_batch in plan:
        batch = load_batch(dataset.rows(dataset.train), micro_batch)
        texts = [
            "" if ref.caption == EMPTY_CAPTION else dataset.train[ref.sample_index].captions[ref.caption]
            for ref in micro_batch.refs
        ]
        assert torch.equal(batch.conditioning.ids_BEN, encoder.token_ids(texts))
    assert any(ref.caption == EMPTY_CAPTION for micro_batch in plan for ref in micro_batch.refs)
    needed = module.Plan(dataset, load_codec(config, base, CPU), encoder).rows()
    assert {row.kind for row in needed.values()} == {"posterior", "tokens"}
    assert verify(dataset.cache, needed, len(needed), 1).is_sound
    keys = [sample.caption_keys for sample in dataset.train]
    with torch.no_grad():
        for parameter in encoder.text_encoders.parameters():
            parameter.mul_(1.5)
    encoder.take_fingerprint()
    live = dataset.sample_texts(encoder)
    dataset.read_embeddings(encoder, 8)
    assert [sample.caption_keys for sample in dataset.train] == keys
    batch = load_batch(dataset.rows(dataset.train), plan[0])
    ref = plan[0].refs[0]
    text = "" if ref.caption == EMPTY_CAPTION else dataset.train[ref.sample_index].captions[ref.caption]
    torch.testing.assert_close(batch.conditioning.text_BTD[:1], encoder.encode([text]), rtol=1e-3, atol=1e-3)
    kept = dataset.sample_texts()
    for number in range(len(dataset.pictures)):
        one, other = live.positive([number]), kept.positive([number])
        torch.testing.assert_close(one.text_BTD, other.text_BTD, rtol=1e-3, atol=1e-3)
    dataset.cache.close()
