"""Runs that train the text encoder: stopped by kill -9 and resumed, sampled, exported, what its checkpoints hold."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.errors import UserError
from safelight.trainer.between_steps import evaluate
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import load_config, parse_config
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.export import export
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures, keys_of
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_texts
from safelight.trainer.step.validate import Validation
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs
from tests.trainer.families.small_sdxl import write_small_sdxl

TEXT = {"train": True, "lr": 1e-3, "schedule": "cosine"}


def settings_for(folder: Path, dataset: Path, text: dict, **tables) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "data": {"path": str(dataset), "resolution": 64, "caption_dropout": 0.2, "validation_fraction": 0.5},
        "train": {"batch_size": 4, "accumulate": 2, "epochs": 3},
        "optimizer": {"lr": 1e-4},
        "text_encoder": {**TEXT, **text},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 1, "compare_at_end": False},
        "validate": {"timesteps": 1, "max_images": 4},
        "save": {"every_steps": 1, "keep": 20},
        "log": {"every_steps": 2, "tensorboard": False},
        **tables,
    }


def texts_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted(folder_of(run, step).glob("text_encoder*/model.safetensors"))
    return {f"{path.parent.name}/{name}": x for path in files for name, x in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "tables"),
    [
        ({"epochs": 2}, {}),
        ({"epochs": 0, "last_layers": 1}, {"model": {"precision": "bf16"}, "optimizer": {"name": "adamw", "lr": 1e-4}}),
    ],
)
def test_killed_and_resumed_at_any_step_equals_uninterrupted(run, tiny_dataset, tmp_path, text, tables):
    alone, killed = (settings_for(tmp_path / name, tiny_dataset, text, **tables) for name in ("alone", "killed"))
    assert run(alone) == 0
    folder, num_killed = tmp_path / "killed", 0
    # one step at a time: before, at and after the end of the encoder's training
    for _ in range(30):
        code = run(killed, resume=bool(list_checkpoints(folder)), point="step", count=2)
        num_killed += code == -signal.SIGKILL
        if code == 0:
            break
    assert code == 0
    steps = list_checkpoints(tmp_path / "alone")
    assert num_killed >= len(steps) // 2
    assert_equal_runs(tmp_path / "alone", folder)
    for step in steps:
        one, other = (texts_of(tmp_path / name, step) for name in ("alone", "killed"))
        assert one
        assert all(torch.equal(one[name], other[name]) for name in one | other)
    trained = [
        bool([n for n in load_file(folder_of(folder, s) / "state.safetensors") if n.startswith("text/")]) for s in steps
    ]
    position = [json.loads((folder_of(folder, s) / "state.json").read_text())["position"]["epoch"] for s in steps]
    assert trained == [not text["epochs"] or epoch < text["epochs"] for epoch in position]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "sdxl"])
def test_a_run_ends_with_its_own_text_encoder_in_pictures_and_exports(tiny_dataset, tmp_path, family):
    base = "tiny" if family == "tiny" else str(write_small_sdxl(tmp_path / "base"))
    folder = tmp_path / "run"
    settings = settings_for(folder, tiny_dataset, {"epochs": 1}, model={"base": base}, train={"epochs": 2})
    train(parse_config(settings, "here"))
    first, *_, last = list_checkpoints(folder)
    parts = resolve_base(base).family.text_encoders
    loaded = dict(zip(parts, load_texts(resolve_base(base), "", 9), strict=True))
    before = {f"{part}/{name}": x for part, (_, text) in loaded.items() for name, x in text.state_dict().items()}
    after = texts_of(folder, last)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    opened = open_run(folder)
    settings = settings_of(load_config(folder / "config.toml"))
    requests = [Request(Weights(step), "a red square", 0, settings) for step in (None, first, last)]
    assert len(set(keys_of(opened, requests))) == 3
    assert len(dict(draw_pictures(opened, requests))) == 3
    out = export(folder, tmp_path / "model", dtype="fp32")
    assert "exported the text encoder as trained" in out.notes
    for name, x in after.items():
        part, _, rest = name.partition("/")
        stored = {n.removeprefix("text_model."): y for n, y in load_file(out.path / part / "model.safetensors").items()}
        assert torch.equal(stored[rest.removeprefix("text_model.")], x)
    single = load_file(export(folder, tmp_path / "model.safetensors", dtype="fp32").path)
    values = {round(float(x.double().sum()), 6) for x in single.values()}
    for name, x in after.items():
        if "q_proj" not in name and "k_proj" not in name and "v_proj" not in name and "position_ids" not in name:
            assert round(float(x.double().sum()), 6) in values, name
    path = folder_of(folder, last) / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors is not a whole"):
        dict(draw_pictures(open_run(folder), requests[2:]))


@pytest.mark.parametrize("num_epochs", [2, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_stage_begins_with_the_text_encoder_of_the_best_checkpoint(tiny_dataset, tmp_path, monkeypatch, num_epochs):
    """The best one is of epoch 1. One encoder has stopped training after epoch 2: its captions are encoded again."""
    stages = [{"epochs": 3}, {"epochs": 2, "start_from": "best"}]
    base = small_base()

    def settings(name: str, **more) -> dict:
        tables = {"stage": stages, "sample": {"every_epochs": 0}, "train": {"batch_size": 4, **more}}
        tables["validate"] = {"timesteps": 2, "max_images": 4}
        tables["model"] = {"base": base}
        text = {"epochs": num_epochs, "schedule": "constant"}
        return settings_for(tmp_path / name, tiny_dataset, text, **copy.deepcopy(tables))

    original = evaluate.validate

    def scripted() -> None:
        held_out, subset = iter([1.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98]), iter([1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
        both = [held_out, subset]

        def validate(unet, rows, *args, **options):
            if options["num_bands"] == 1:
                # weights are tried before they are saved
                return original(unet, rows, *args, **options)
            both.reverse()
            loss = next(both[1])
            return Validation(loss, (loss, loss), len(rows.samples))

        monkeypatch.setattr(evaluate, "validate", validate)

    scripted()
    train(parse_config(settings("alone"), "test"))
    folder = tmp_path / "alone"
    steps = list_checkpoints(folder)
    num = steps[-1] // 5
    best, border, first = num, 3 * num, 3 * num + 1
    kept, last, after = (texts_of(folder, step) for step in (best, border, first))
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    if num_epochs:
        assert all(torch.equal(kept[name], after[name]) for name in kept)
    else:
        far = [sum((after[n] - other[n]).square().sum() for n in after) for other in (kept, last)]
        assert 0 < far[0] < far[1]
    # a resume in the second stage reads the encoder of its checkpoint, and encodes captions by it
    scripted()
    train(parse_config(settings("stopped", max_steps=first), "test"))
    train(parse_config(settings("stopped"), "test"), resume=True)
    place = [
        folder_of(tmp_path / name, steps[-1]) / "unet/diffusion_pytorch_model.safetensors"
        for name in ("alone", "stopped")
    ]
    one, other = map(load_file, place)
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (texts_of(tmp_path / name, steps[-1]) for name in ("alone", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
