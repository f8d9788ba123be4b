"""Pictures are drawn once: a folder lacks those that a kill lost, and those whose weights or settings changed."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import Position, folder_of, read_identity, save_checkpoint
from safelight.trainer.distributed.together import Stopped
from safelight.trainer.inference import pictures
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.gallery import read_key
from safelight.trainer.inference.pictures import Request, Weights, draw_missing, draw_pictures, keys_of
from safelight.trainer.inference.sampling import Settings
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.tensor_files import TensorFile
from safelight.trainer.optim.ema import PREFIX as EMA_PREFIX
from safelight.trainer.run_log.environment import AUTOENCODER, FILE_NAME
from tests.trainer.checkpoints import writes
from tests.trainer.inference.exported_runs import STEP, make_run

SETTINGS = Settings(width=16, height=16, steps=2, cfg=3.0, seed=5, sampler="ddim")
REQUEST = Request(Weights(STEP), "a red circle", 0, SETTINGS, "blurry")
PROMPTS = ("a red circle", "a blue star", "a green ring")


def both_models(prompts=PROMPTS, settings=SETTINGS) -> dict[str, Request]:
    """Return requests for the base and the checkpoint, by file name."""
    return {
        f"{name}-{place}.png": Request(Weights(step), prompt, place, settings)
        for name, step in (("base", None), ("trained", STEP))
        for place, prompt in enumerate(prompts)
    }


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.int16)


@pytest.fixture(scope="module")
def unets(tiny_run):
    run = open_run(tiny_run)
    return {step: run.unet(step) for step in (None, STEP)}


@pytest.fixture
def run(tiny_run, unets, monkeypatch) -> OpenRun:
    """Its UNets are loaded once for all tests."""
    monkeypatch.setattr(OpenRun, "unet", lambda self, step, *_: unets[step])
    return open_run(tiny_run)


@pytest.fixture
def batches_of_two(monkeypatch):
    monkeypatch.setattr(OpenRun, "fit_to_memory", lambda self, settings: (self.device, 2))


def test_a_kill_loses_at_most_one_batch_and_the_rest_is_not_drawn_again(run, tmp_path, batches_of_two, monkeypatch):
    whole, killed, requests = tmp_path / "whole", tmp_path / "killed", both_models()
    assert draw_missing(run, requests, whole) == list(requests)

    def stop(done, total):
        # in the second batch of the base
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        draw_missing(run, requests, killed, progress=stop)
    assert sorted(path.name for path in killed.iterdir()) == ["base-0.png", "base-1.png"]
    before = (killed / "base-0.png").stat().st_mtime_ns
    assert draw_missing(run, requests, killed) == list(requests)[2:]
    assert (killed / "base-0.png").stat().st_mtime_ns == before
    for name in requests:
        assert np.abs(pixels(whole / name) - pixels(killed / name)).max() <= 1
    monkeypatch.setattr(OpenRun, "unet", lambda *_: pytest.fail("loaded"))
    assert draw_missing(run, requests, killed) == []


def test_each_unet_is_loaded_once_and_each_text_is_encoded_once(run, tmp_path, monkeypatch, batches_of_two):
    loaded, encoded = [], []
    unet, encode = OpenRun.unet, CaptionEncoder.encode
    monkeypatch.setattr(OpenRun, "unet", lambda self, step, *rest: loaded.append(step) or unet(self, step, *rest))
    monkeypatch.setattr(CaptionEncoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    several = {
        f"{seed}-{name}": replace(request, settings=replace(SETTINGS, seed=seed))
        for seed in (5, 6)
        for name, request in both_models().items()
    }
    draw_missing(run, several, tmp_path)
    assert loaded == [None, STEP]
    assert sorted(encoded) == sorted(["", *PROMPTS])


def test_the_pictures_of_both_models_start_from_the_same_noise(run, monkeypatch):
    """With weights that are equal, the pictures are."""
    base = run.unet(None)
    monkeypatch.setattr(OpenRun, "unet", lambda *_: base)
    drawn = dict(draw_pictures(run, list(both_models().values())))
    for place in range(3):
        assert np.abs(np.asarray(drawn[place], np.int16) - np.asarray(drawn[place + 3], np.int16)).max() <= 1
    assert np.abs(np.asarray(drawn[0], np.int16) - np.asarray(drawn[1], np.int16)).mean() > 3


def test_seeds_share_a_batch_and_pictures_are_those_drawn_alone(run):
    requests = [replace(REQUEST, settings=replace(SETTINGS, seed=seed)) for seed in (5, 6, 2**64 - 1)]
    calls = []
    together = dict(draw_pictures(run, requests, progress=lambda done, total: calls.append((done, total))))
    assert calls == [(3, 6), (6, 6)]
    for number, request in enumerate(requests):
        ((_, alone),) = draw_pictures(run, [request])
        assert np.abs(np.asarray(alone, np.int16) - np.asarray(together[number], np.int16)).max() <= 1
    assert np.abs(np.asarray(together[0], np.int16) - np.asarray(together[1], np.int16)).mean() > 1


def test_the_time_that_the_rest_takes_is_said_after_the_first_batch(run, tmp_path, batches_of_two, monkeypatch):
    clock, said = [100.0], []
    monkeypatch.setattr(pictures.time, "monotonic", lambda: clock[0])

    def drawing(done, total):
        clock[0] += 15

    draw_missing(run, both_models(), tmp_path, progress=drawing, say=said.append)
    assert said == ["2 pictures took 30 s, and the rest will take about 1 min 0 s"]
    draw_missing(run, both_models(("a cup",)), tmp_path / "few", progress=drawing, say=said.append)
    assert said[1:] == ["1 picture took 30 s, and the rest will take about 30 s"]
    # without guidance, which takes half of the time
    mixed = {f"{cfg}.png": replace(REQUEST, settings=replace(SETTINGS, cfg=cfg)) for cfg in (1.0, 3.0)}
    draw_missing(run, mixed, tmp_path / "mixed", progress=drawing, say=said.append)
    assert said.pop() == "1 picture took 30 s, and the rest will take about 1 min 0 s"
    monkeypatch.setattr(pictures, "MIN_TOLD_S", 31)
    draw_missing(run, both_models(("a cup",)), tmp_path / "short", progress=drawing, say=said.append)
    assert len(said) == 2


CHANGES = {
    "model": {"weights": Weights(None)},
    "prompt": {"prompt": "a red circle "},
    "place": {"place": 1},
    "negative prompt": {"negative": ""},
    "clip skip": {"clip_skip": 1},
    **{
        name: {"settings": replace(SETTINGS, **{name: value})}
        for name, value in {"width": 64, "height": 64, "steps": 3, "cfg": 3.5, "seed": 6, "sampler": "euler"}.items()
    },
}


def test_everything_that_changes_pixels_changes_the_key(run, monkeypatch):
    keys = keys_of(run, [REQUEST, *(replace(REQUEST, **change) for change in CHANGES.values())])
    assert len(set(keys)) == len(keys)
    # half a surrogate pair, as a caption file may have
    assert keys_of(run, [replace(REQUEST, prompt="\udce9")]) != keys[:1]
    for target, name, value in (
        (OpenRun, "dtype", torch.bfloat16),
        (run.codec, "fingerprint", "other"),
        (run, "schedule", replace(run.schedule, prediction_type="v_prediction")),
        (run, "schedule", replace(run.schedule, alphas_cumprod_T=run.schedule.alphas_cumprod_T * 0.99)),
        (pictures, "DRAWING_VERSION", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert keys_of(run, [REQUEST]) != keys[:1], name
    assert keys_of(run, [REQUEST]) == keys[:1]


def test_clip_skip_draws_another_picture(run):
    requests = [REQUEST, replace(REQUEST, clip_skip=1)]
    first, second = (np.asarray(image, np.int16) for _, image in draw_pictures(run, requests))
    assert np.abs(first - second).max() > 1
    with pytest.raises(UserError, match="clip_skip 99 leaves none"):
        list(draw_pictures(run, [replace(REQUEST, clip_skip=99)]))


def test_pictures_of_a_checkpoint_that_was_written_again_are_drawn_again(tmp_path):
    folder = make_run(tmp_path / "run")
    draw_missing(open_run(folder), both_models(), folder / "compare")
    before = {name: read_key(folder / "compare" / name) for name in both_models()}
    shutil.rmtree(folder_of(folder, STEP))
    make_run(folder, largest=0.5)
    assert draw_missing(open_run(folder), both_models(), folder / "compare") == [
        name for name in both_models() if name.startswith("trained")
    ]
    after = {name: read_key(folder / "compare" / name) for name in both_models()}
    assert {name for name in before if before[name] == after[name]} == {n for n in before if n.startswith("base")}


@pytest.mark.slow
def test_averaged_weights_have_their_own_key_only_where_there_are_any(tmp_path):
    folder = make_run(tmp_path / "run")
    run = open_run(folder)
    plain = replace(REQUEST, weights=Weights(STEP, averaged=False))
    assert len(set(keys_of(run, [REQUEST, plain]))) == 1
    state = TensorFile(folder_of(folder, STEP) / "state.safetensors")
    unet = run.unet(STEP)
    averages = {f"{EMA_PREFIX}{name}": value.detach() * 0 for name, value in unet.named_parameters()}
    tensors = {name: state.read(name) for name in state.entries} | averages
    save_checkpoint(folder, writes(unet), tensors, Position(step=8), read_identity(folder, STEP)[0])
    averaged, plain = (replace(REQUEST, weights=Weights(8, flag)) for flag in (True, False))
    assert len(set(keys_of(run, [averaged, plain]))) == 2
    assert not run.unet(8).conv_in.weight.any()
    assert run.unet(8, averaged=False).conv_in.weight.any()


def test_a_picture_has_its_key_and_parameters_that_a1111_reads(run, tmp_path):
    draw_missing(run, {"x.png": replace(REQUEST, prompt="ein Löwe, \N{LION FACE}", clip_skip=1)}, tmp_path)
    with Image.open(tmp_path / "x.png") as image:
        text = image.info["parameters"]
    assert text.startswith("ein Löwe, \N{LION FACE}\nNegative prompt: blurry\nSteps: 2, Sampler: DDIM, CFG scale: 3,")
    assert "Model: run step 7, Clip skip: 2, Version: Safelight" in text
    assert len(read_key(tmp_path / "x.png")) == 64


def test_a_file_that_is_no_picture_of_ours_has_no_key(run, tmp_path):
    draw_missing(run, {"x.png": REQUEST}, tmp_path)
    content = (tmp_path / "x.png").read_bytes()
    assert read_key(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        image.copy().save(tmp_path / "edited.png")
    (tmp_path / "cut.png").write_bytes(content[:50])
    (tmp_path / "other.png").write_bytes(b"\xff" * 8 + content[8:])
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("edited", "cut", "other", "empty", "folder", "pipe", "missing"):
        assert read_key(tmp_path / f"{name}.png") == "", name
    assert draw_missing(run, {"edited.png": REQUEST, "cut.png": REQUEST}, tmp_path) == ["edited.png", "cut.png"]
    for name in ("folder.png", "pipe.png"):
        with pytest.raises(UserError, match=f"{name} is .* where a folder of images keeps a file"):
            draw_missing(run, {name: REQUEST}, tmp_path)


def test_full_gpu_memory_halves_the_batch_and_is_said(run, tmp_path, monkeypatch):
    sizes, generate, said = [], pictures.generate, []

    def full(*args, **options):
        sizes.append(options["batch_size"])
        if options["batch_size"] > most:
            raise torch.OutOfMemoryError
        return generate(*args, **options)

    monkeypatch.setattr(pictures, "generate", full)
    most = 2
    draw_missing(run, both_models((*PROMPTS, "a ring", "a dot")), tmp_path, say=said.append)
    assert sizes == [5, 2, 2, 1] * 2
    assert said == ["the GPU has too little free memory for 5 pictures at a time: drawing 2"] * 2
    most = 0
    with pytest.raises(UserError, match="too little free memory to draw a picture of 16x16 px; close other programs"):
        draw_missing(run, {"x.png": REQUEST}, tmp_path)


def test_broken_weights_are_named_and_what_was_drawn_before_is_kept(tmp_path):
    folder = make_run(tmp_path / "run", largest=float("nan"))
    with pytest.raises(UserError, match=r"the checkpoint of step 7 draws no picture of 'a red circle', .* fp32; use"):
        draw_missing(open_run(folder), both_models(), folder / "compare")
    assert len(list((folder / "compare").glob("base-*.png"))) == 3


def test_a_size_that_does_not_fit_the_autoencoder_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(OpenRun, "unet", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="width 30 is not a multiple of 4; use 28 or 32"):
        draw_missing(run, {"x.png": replace(REQUEST, settings=replace(SETTINGS, width=30))}, tmp_path)


@pytest.mark.parametrize(
    ("recorded", "opened"), [({"precision": "fp16"}, "auto"), ({"precision": "fp32"}, "fp32"), (None, "fp32")]
)
def test_a_run_is_decoded_in_16_bits_only_if_it_compared_them_with_fp32(tmp_path, recorded, opened):
    """Without a record: a run from before there was one, all of which encoded in fp32."""
    run = make_run(tmp_path / "run")
    (run / FILE_NAME).write_text(json.dumps({} if recorded is None else {AUTOENCODER: recorded}))
    assert open_run(run).config.model.vae_precision == opened
