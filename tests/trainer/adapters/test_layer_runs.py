"""Runs with train.layers: only those change, resuming equals not stopping, exports are whole, mistakes are early."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.__main__ import main
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs

LAYERS = ["mid_block", "*.resnets.0.*=0.5", "norms=0"]


def settings_of(folder: Path, dataset: Path, **tables) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base(), "precision": "bf16"},
        "data": {"path": str(dataset), "resolution": 64},
        "train": {"batch_size": 8, "accumulate": 2, "epochs": 3, "layers": LAYERS, "ema_decay": 0.9},
        "optimizer": {"lr": 1e-3},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 3, "compare_at_end": False},
        "validate": {"timesteps": 1, "max_images": 4},
        "save": {"every_steps": 1, "keep": 20},
        "log": {"every_steps": 1, "tensorboard": False},
        **tables,
    }


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder_of(run, step) / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_run_trains_only_its_layers_and_a_killed_one_resumes_to_the_same_bits(run, tiny_dataset, tmp_path, capsys):
    alone, killed = (settings_of(tmp_path / name, tiny_dataset) for name in ("alone", "killed"))
    assert run(alone) == 0
    assert run(killed, point="step", count=2) < 0
    assert run(killed, resume=True) == 0
    assert_equal_runs(tmp_path / "alone", tmp_path / "killed")
    base = {name: p.detach() for name, p in load_unet(resolve_base(small_base()), 0).named_parameters()}
    last = max(list_checkpoints(tmp_path / "alone"))
    trained = weights_of(tmp_path / "alone", last)
    state = load_file(folder_of(tmp_path / "alone", last) / "state.safetensors")
    changed = {name for name, x in trained.items() if not torch.equal(x, base[name].bfloat16())}
    is_chosen = {
        name: "norm" not in name and (name.startswith("mid_block.") or ".resnets.0." in name) for name in trained
    }
    assert changed == {name for name, chosen in is_chosen.items() if chosen}
    for part in ("remainder", "state1", "ema"):
        assert {key.removeprefix(f"{part}/") for key in state if key.startswith(f"{part}/")} == changed
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path / "alone"), "-o", str(out), "--dtype", "fp32"]) == 0
    assert out.is_file()
    # a run that trains other layers is another run
    config = tmp_path / "alone" / "config.toml"
    capsys.readouterr()
    assert main(["train", str(config), "--resume", "--train.epochs", "4", "--train.layers", "mid_block"]) == 2
    assert "train.layers is ['mid_block'], but" in capsys.readouterr().err


def test_a_run_says_what_it_trains_and_refuses_layers_that_it_lacks(tiny_dataset, tmp_path, capsys):
    path = tmp_path / "run.toml"
    settings = settings_of(tmp_path / "run", tiny_dataset)
    settings["train"]["max_steps"] = 1
    path.write_text(to_toml(parse_config(settings, "here")))
    assert main(["train", str(path), "--train.layers", "mid_bock", "conv_in"]) == 2
    error = capsys.readouterr().err
    assert "'mid_bock' matches no parameter of this UNet; the nearest are mid_block" in " ".join(error.split())
    assert not (tmp_path / "run").exists()
    assert main(["train", str(path), "--train.layers", "conv_in", "conv_out=0.25"]) == 0
    said_lines = " ".join(capsys.readouterr().err.split())
    unet = load_unet(resolve_base(small_base()), 0)
    num = sum(p.numel() for conv in (unet.conv_in, unet.conv_out) for p in conv.parameters())
    total = sum(p.numel() for p in unet.parameters())
    said = f"{num:,} of the UNet's {total:,} parameters are trained (conv_in, conv_out=0.25), at 0.25 to 1 times"
    assert said in said_lines
    assert said in (tmp_path / "run" / "model.json").read_text()


@pytest.mark.parametrize("layers", [["all"], ["conv_in"]])
def test_the_plan_says_how_many_parameters_are_trained(tmp_path, capsys, layers):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(parse_config({"model": {"base": small_base()}, "train": {"layers": layers}}, "here")))
    assert main(["plan", str(path)]) == 0
    assert (" of them trained" in capsys.readouterr().out) == (layers == ["conv_in"])
