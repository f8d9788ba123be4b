"""Runs that train a word: equal to plain torch, stopped by kill -9 and resumed, sampled, exported and loaded again."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from safelight.data.manifest import read_manifest
from safelight.data.samples import photo_captions
from safelight.errors import UserError
from safelight.trainer.between_steps import evaluate
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.export import export
from safelight.trainer.inference.gallery import read_key
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures, keys_of, sample_key
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.loading.dataset import plan_dataset
from safelight.trainer.models.base import base_of, resolve_base
from safelight.trainer.models.embeddings import open_embedding
from safelight.trainer.models.encoders import load_caption_encoder
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs
from tests.trainer.families.small_sdxl import write_small_sdxl
from tests.trainer.models.test_embeddings import encoder_of, theirs

DATA = {"resolution": 64, "caption_dropout": 0.2, "validation_fraction": 0.5}


def settings_for(folder: Path, dataset: Path, embedding: dict | None = None, **tables) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {**DATA, "path": str(dataset)},
        "train": {"batch_size": 4, "accumulate": 2, "epochs": 3},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
        "adapter": {"kind": "embedding"},
        "embedding": {"word": "<look>", "initial_text": "a square", "vectors": 3, **(embedding or {})},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 1, "compare_at_end": False},
        "validate": {"timesteps": 1, "max_images": 4},
        "save": {"every_steps": 1, "keep": 20},
        "log": {"every_steps": 2, "tensorboard": False},
        **tables,
    }


def test_only_the_vectors_change(tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    train(parse_config(settings_for(folder, tiny_dataset), "here"))
    steps = list_checkpoints(folder)
    words = [load_file(folder_of(folder, step) / "embedding" / "learned_embeds.safetensors") for step in steps]
    assert all(list(word) == ["<look>"] and word["<look>"].shape == (3, 128) for word in words)
    assert not any(torch.equal(a["<look>"], b["<look>"]) for a, b in itertools.pairwise(words))
    for step in steps:
        checkpoint = folder_of(folder, step)
        files = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.*"))
        assert files == ["embedding/learned_embeds.safetensors", "state.json", "state.safetensors"]
        assert sum(x.numel() for x in load_file(folder_of(folder, step) / "state.safetensors").values()) < 4000


def vectors_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((folder_of(folder, step) / "embedding").glob("*.safetensors"))
    return {f"{path.name}/{name}": x for path in files for name, x in load_file(path).items()}


@pytest.fixture(scope="module")
def word_run(tiny_dataset, tmp_path_factory) -> Path:
    """A finished run of two steps on a base that draws something."""
    folder = tmp_path_factory.mktemp("word") / "run"
    settings = settings_for(folder, tiny_dataset, {"vectors": 2}, train={"batch_size": 8, "epochs": 2})
    train(parse_config(settings, "here"))
    return folder


def test_pictures_have_the_word_of_their_checkpoint(word_run):
    opened = open_run(word_run)
    first, *_, last = list_checkpoints(word_run)
    settings = replace(settings_of(opened.config), steps=2)
    requests = [
        Request(Weights(step), prompt, 0, settings, negative)
        for prompt, negative in (("a red square, <look>", ""), ("a red square", ""), ("a red square", "<LOOK>"))
        for step in (None, first, last)
    ]
    keys = keys_of(opened, requests)
    # a prompt without the word gives the base's picture at every step
    assert len(set(keys)) == 7
    assert len(set(keys[3:6])) == 1
    images = dict(draw_pictures(opened, requests))
    drawn = [images[number].tobytes() for number in range(9)]
    assert len(set(drawn)) == 7
    assert len(set(drawn[3:6])) == 1


def test_samples_and_opened_runs_agree(word_run):
    """What training sampled is what the opened run draws with the checkpoint: compare takes it over."""
    opened, step = open_run(word_run), list_checkpoints(word_run)[-1]
    index = json.loads((word_run / "samples" / f"step-{step:08d}" / "index.json").read_text())
    (row,) = index["images"]
    assert row["prompt"].startswith("<look>, ")
    request = Request(Weights(step), row["prompt"], 0, settings_of(opened.config))
    with Image.open(word_run / "samples" / f"step-{step:08d}" / row["file"]) as sampled:
        assert sampled.tobytes() == dict(draw_pictures(opened, [request]))[0].tobytes()
    assert read_key(word_run / "samples" / f"step-{step:08d}" / row["file"]) == sample_key(request, {})


@pytest.mark.parametrize("dtype", ["", "fp16"])
def test_exports_are_read_by_diffusers_and_by_us(word_run, tmp_path, dtype):
    step = list_checkpoints(word_run)[-1]
    (own,) = vectors_at(word_run, step).values()
    expected = own.half().float() if dtype else own
    done = export(word_run, tmp_path / "look.safetensors", dtype=dtype)
    assert done.step == step
    assert done.next_step == "copy it to A1111's embeddings or ComfyUI's models/embeddings"
    assert "know it by the name of the file: write look into the prompt" in done.notes[0]
    folder = export(word_run, tmp_path / "folder", dtype=dtype)
    assert {path.name for path in folder.path.iterdir()} == {"learned_embeds.safetensors", "README.md", "samples"}
    encoder = encoder_of("tiny")
    for path in (done.path, folder.path):
        found = open_embedding(str(path), encoder.widths, "here")
        assert torch.equal(found.vectors["text_encoder"], expected)
        loader = theirs("tiny")
        loader.load_textual_inversion(str(path))
        ids = loader.tokenizer.convert_tokens_to_ids(["<look>", "<look>_1"])
        assert torch.equal(loader.text_encoder.get_input_embeddings().weight[ids].float(), expected)
    # again in its place
    export(word_run, folder.path, dtype=dtype, force=True)
    (folder.path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"mine\.txt, which no export writes"):
        export(word_run, folder.path, force=True)
    with pytest.raises(UserError, match="--weights ema: a run that trains an embedding has no moving average"):
        export(word_run, tmp_path / "other.safetensors", weights="ema")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "sdxl"])
def test_killed_and_resumed_at_any_step_equals_uninterrupted(run, tiny_dataset, tmp_path, family):
    base = small_base() if family == "tiny" else str(write_small_sdxl(tmp_path / "base"))
    tables = {"model": {"base": base}, "data": {**DATA, "path": str(tiny_dataset), "caption_chunks": 2}}
    alone, killed = (settings_for(tmp_path / name, tiny_dataset, **tables) for name in ("alone", "killed"))
    assert run(alone) == 0
    folder, num_killed = tmp_path / "killed", 0
    for _ in range(30):
        code = run(killed, resume=bool(list_checkpoints(folder)), point="step", count=2)
        num_killed += code == -signal.SIGKILL
        if code == 0:
            break
    assert code == 0
    steps = list_checkpoints(tmp_path / "alone")
    assert num_killed >= len(steps) // 2
    assert_equal_runs(tmp_path / "alone", folder, trained="embedding/learned_embeds.safetensors")
    for step in steps:
        one, other = (vectors_at(tmp_path / name, step) for name in ("alone", "killed"))
        assert len(one) == (1 if family == "tiny" else 2)
        assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_what_cannot_be_set_together_is_refused(tmp_path):
    for table, name, value, message in (
        ("text_encoder", "train", True, "trains weights, and adapter.kind embedding none"),
        ("train", "ema_decay", 0.9, "averages weights"),
        ("data", "prompt_weights", True, "does not work with adapter.kind embedding"),
        ("optimizer", "memory", "exact", "is for 16-bit weights"),
        ("optimizer", "fused_backward", True, "updates the UNet"),
        ("optimizer", "clipping", "lagged", "is for optimizer.fused_backward"),
        ("embedding", "word", "two words", "expected a word without spaces"),
        ("embedding", "templates", ["a picture"], "has neither {word} nor {caption}"),
        ("embedding", "templates", [], "expected 1 to 100 texts"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config({"adapter": {"kind": "embedding"}, table: {name: value}}, "here")


def test_initial_text(tiny_dataset, tmp_path):
    config = Config(
        model={"base": "tiny"}, adapter={"kind": "embedding"}, embedding={"initial_text": "red square", "vectors": 5}
    )
    encoder = load_caption_encoder(config, resolve_base("tiny"), torch.device("cpu"))
    (word,) = encoder.embeddings
    red, square = encoder.tokenizer("red square", add_special_tokens=False).input_ids
    table = encoder.text_encoders[0].get_input_embeddings().weight
    assert torch.equal(word.vectors["text_encoder"], table[[red, red, red, square, square]])
    for text, message in (
        ("", "has no token"),
        ("a " * 9, "9 tokens, more than embedding.vectors 5; set"),
    ):
        config.embedding.initial_text = text
        with pytest.raises(UserError, match=message):
            load_caption_encoder(config, resolve_base("tiny"), torch.device("cpu"))


def test_templates_and_where_the_word_stands(tiny_dataset, tmp_path):
    def planned(**embedding):
        settings = settings_for(tmp_path / "run", tiny_dataset, embedding)
        config = parse_config({**settings, "sample": {"negative_prompt": "blurry"}}, "here")
        plan = plan_dataset(config, base_of(config.model), torch.device("cpu"))
        plan.dataset.cache.close()
        return plan.dataset, config

    plain = [photo.captions[0] for photo in read_manifest(tiny_dataset)]
    dataset, config = planned(templates=["{word}, {caption}", "a picture of {word}"])
    sample = dataset.train[0]
    caption = sample.photo.captions[0]
    assert sample.captions == (f"<look>, {caption}", "a picture of <look>")
    assert all(one.prompt.startswith("<look>, ") for one in dataset.sample_prompts(config))
    assert config.negative_text == "blurry"
    ids = dataset.token_condition.args[0]
    dataset, config = planned(templates=["{word}, {caption}"], negative=True)
    assert dataset.train[0].captions == (f"<look>, {caption}",)
    assert all(one.prompt in plain for one in dataset.sample_prompts(config))
    assert config.negative_text == "blurry, <look>"
    assert "blurry, <look>" in {text for text, _ in dataset.sampled.keys}
    assert ids == [encoder_of(small_base()).text_encoders[0].config.vocab_size + 3]
    # without a caption no comma is left
    assert photo_captions(
        [replace(sample.photo, captions=("",), tags=())], config.data.tags, 0, templates=["w, {caption}"]
    ) == [("w",)]


def test_a_stage_begins_from_the_best_vectors(tiny_dataset, tmp_path, monkeypatch):
    """The second stage, whose rate changes nothing, ends with the vectors that were best in the first."""
    folder, losses = tmp_path / "run", iter([5.0, 5.0, 1.0, 1.0, *map(float, range(2, 20))])
    measured = evaluate.validate

    def rising(*args, **kwargs):
        return replace(measured(*args, **kwargs), loss=next(losses))

    monkeypatch.setattr(evaluate, "validate", rising)
    stages = [{"epochs": 3}, {"epochs": 1, "lr": 1e-12, "start_from": "best"}]
    settings = settings_for(folder, tiny_dataset, stage=stages, train={"batch_size": 8})
    monkeypatch.setattr("safelight.trainer.train.check_weights", lambda job, position: False)
    train(parse_config(settings, "here"))
    steps = list_checkpoints(folder)
    begun = steps[len(steps) // 4 - 1]
    before = steps[3 * len(steps) // 4 - 1]
    (best,), (worse,), (last,) = (vectors_at(folder, step).values() for step in (begun, before, steps[-1]))
    assert torch.allclose(best, last, atol=1e-6)
    assert not torch.allclose(best, worse, atol=1e-4)
