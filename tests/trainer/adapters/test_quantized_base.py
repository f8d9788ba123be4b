"""adapter.base: what is planned is what is held, runs resume bit for bit, pictures and exports, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.__main__ import main
from safelight.kernels.ops.quantized_weight import (
    FORMATS,
    QuantizedWeight,
    held_tensors,
    quantizable_layers,
    quantize_layers,
)
from safelight.kernels.unet import patch
from safelight.kernels.unet.attention import attention_cases, choose_attention
from safelight.trainer.adapters.lora import LoRA
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.schema import Adapter
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.inference.draw import open_run
from safelight.trainer.memory_plan.allocation_trace import WEIGHTS
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.memory_plan.static_bytes import static_bytes
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.registry.adapters import QUANTIZED_FORMATS
from safelight.trainer.step.prepare_unet import prepare_unet
from tests.kernels.unet.unets import CONFIGS, inputs_of, make
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs

CPU = torch.device("cpu")


def settings_of(folder: Path, dataset: Path, **tables) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base(), "precision": "bf16"},
        "adapter": {"kind": "lora", "rank": 4, "target": ["linear"], **tables.pop("adapter", {})},
        "data": {"path": str(dataset), "resolution": 64},
        "train": {"batch_size": 8, "accumulate": 2, "epochs": 2, **tables.pop("train", {})},
        "optimizer": {"lr": 1e-3},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 2, "compare_at_end": False},
        "validate": {"timesteps": 1, "max_images": 4},
        "save": {"every_steps": 1, "keep": 20},
        "log": {"every_steps": 1, "tensorboard": False},
        **tables,
    }


def test_the_setting_has_the_formats():
    assert QUANTIZED_FORMATS == FORMATS


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("base", FORMATS)
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_planned_weights_are_those_that_are_held(base, precision, optimizer):
    config = parse_config(
        {
            "model": {"base": small_base(), "precision": precision},
            "adapter": {"kind": "lora", "base": base},
            "optimizer": {"name": optimizer},
        },
        "here",
    )
    unet = load_unet(resolve_base(small_base()), 0).train()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    attention = choose_attention(CPU, dtype, attention_cases(unet))
    prepared = prepare_unet(unet, config, attention, CPU, dtype)
    held = sum(x.numel() * x.element_size() for p in unet.parameters() for x in held_tensors(p))
    planned = static_bytes(config, CPU, dtype)
    assert planned.weights == held
    full = static_bytes(parse_config({**config.model_dump(by_alias=True), "adapter": {"kind": "lora"}}, "here"), CPU)
    assert planned.weights < 0.8 * full.weights
    assert {name for name, p in unet.named_parameters() if isinstance(p, QuantizedWeight)}.isdisjoint(
        prepared.optimizer.parameters
    )
    run = MetaRun(config, resolve_base(small_base()), CPU, dtype)
    run.step(2, 8, 8)
    assert run.live.live[WEIGHTS] == planned.weights


@pytest.mark.slow
@pytest.mark.parametrize("base", FORMATS)
def test_a_killed_run_resumes_to_the_same_bits_and_holds_only_the_adapter(run, tiny_dataset, tmp_path, base):
    alone, killed = (settings_of(tmp_path / name, tiny_dataset, adapter={"base": base}) for name in ("alone", "killed"))
    assert run(alone) == 0
    assert run(killed, point="step", count=2) < 0
    assert run(killed, resume=True) == 0
    assert_equal_runs(tmp_path / "alone", tmp_path / "killed", "adapter/pytorch_lora_weights.safetensors")
    folder = folder_of(tmp_path / "alone", max(list_checkpoints(tmp_path / "alone")))
    assert not (folder / "unet").exists()
    weights = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    assert weights
    assert all("lora_" in name for name in weights)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1_000_000
    # pictures come from the base that was trained on
    opened = open_run(tmp_path / "alone")
    step = max(list_checkpoints(tmp_path / "alone"))
    unet = opened.unet(step)
    trained = [x.weight for x in quantizable_layers(unet) if isinstance(x.weight, QuantizedWeight)]
    base_unet = load_unet(resolve_base(small_base()), 0)
    assert len(trained) > 10
    assert {x.format for x in trained} == {base}
    assert not any(isinstance(p, QuantizedWeight) for p in opened.unet(None).parameters())
    # the export is merged into the full base: layers without an adapter have its bits
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "alone"), "-o", str(out), "--merge", "--dtype", "fp32"]) == 0
    merged = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    for name, p in base_unet.named_parameters():
        assert torch.equal(merged[name], p) == (not _has_adapter(base_unet, name)), name


def _has_adapter(unet: torch.nn.Module, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return isinstance(unet.get_submodule(module), torch.nn.Linear) and parameter == "weight"


@pytest.mark.long
def test_a_quantized_base_changes_the_training_and_is_part_of_the_identity(tiny_dataset, tmp_path, capsys):
    losses = {}
    for base in ("full", *FORMATS):
        path = tmp_path / f"{base}.toml"
        settings = settings_of(tmp_path / base, tiny_dataset, adapter={"base": base}, train={"max_steps": 1})
        path.write_text(to_toml(parse_config(settings, "here")))
        assert main(["train", str(path)]) == 0
        said = capsys.readouterr().err
        assert (f"held in {base}" in said) == (base != "full")
        lines = map(json.loads, (tmp_path / base / "metrics.jsonl").read_text().splitlines())
        losses[base] = [line["loss"] for line in lines if "loss" in line]
        assert losses[base]
    assert losses["full"] != losses["8bit"] != losses["nf4"]
    again = [str(tmp_path / "nf4" / "config.toml"), "--resume", "--train.max-steps", "2"]
    assert main(["train", *again, "--adapter.base", "8bit"]) == 2
    assert "adapter.base is '8bit', but 'nf4' in the checkpoint" in capsys.readouterr().err


def test_layers_and_a_base_without_effect_are_refused_or_said(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"which adapter\.kind lora leaves frozen; use adapter\.target instead"):
        parse_config({"adapter": {"kind": "lora"}, "train": {"layers": ["attention"]}}, "here")
    path = tmp_path / "run.toml"
    path.write_text(to_toml(parse_config({"adapter": {"base": "nf4"}}, "here")))
    assert main(["plan", str(path)]) == 0
    assert "adapter.base nf4 has no effect with adapter.kind none" in " ".join(capsys.readouterr().out.split())


def test_a_missing_bitsandbytes_is_said_early(tiny_dataset, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(parse_config(settings_of(tmp_path / "run", tiny_dataset, adapter={"base": "nf4"}), "here")))
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "bitsandbytes" else find(name))
    assert main(["train", str(path), "--optimizer.name", "adamw8bit"]) == 2
    assert "adapter.base nf4 needs bitsandbytes, which is not installed; use full" in capsys.readouterr().err


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("base", FORMATS)
def test_a_dora_on_a_quantized_base_has_the_gradients_of_one_on_its_dense_weights(base, patched):
    results = []
    for is_quantized in (True, False):
        unet = make(CONFIGS["sd15"])
        trained = LoRA(unet, Adapter(kind="lora", rank=2, target=["linear", "convolution"], dora=True), seed=1)
        trained.mark()
        if patched:
            patch.apply(unet)
        quantize_layers(unet, base, torch.float32, CPU)
        if not is_quantized:
            for layer in unet.modules():
                if isinstance(getattr(layer, "weight", None), QuantizedWeight):
                    layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        if patched:
            patch.repack(unet)
        with torch.no_grad():
            for name, p in unet.named_parameters():
                if name.endswith("lora_B"):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        output = unet(**inputs_of(unet), return_dict=False)[0]
        output.square().mean().backward()
        gradients = {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}
        results.append((output.detach(), gradients))
    (output, gradients), (dense_output, dense_gradients) = results
    torch.testing.assert_close(output, dense_output, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == dense_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense_gradients[name], rtol=1e-3, atol=1e-6, msg=name)
