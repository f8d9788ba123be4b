"""Runs that train a LoRA: checkpoints, kills and resumes, pictures, and the files that other programs read."""

import copy
import json
import shutil
import signal
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from safelight.__main__ import main
from safelight.errors import UserError
from safelight.trainer.adapters.lora import LoRA
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.schema import Adapter
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.axes import parse_axes
from safelight.trainer.inference.draw import open_run, sample
from safelight.trainer.inference.export import export
from safelight.trainer.inference.grid import draw_grid
from safelight.trainer.inference.grid_plan import plan_grid
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import settings_of as sampling_of
from safelight.trainer.report.evaluation import Evaluation
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs
from tests.trainer.families.small_sdxl import small_unet, write_small_sdxl
from tests.trainer.test_resume import settings_of

# each makes runs or uses the three of `finished`
pytestmark = pytest.mark.long

ADAPTER = {"kind": "lora", "rank": 4, "target": ["attention", "feed-forward", "*conv1", "*.time_emb_proj"]}
WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


def lora_settings(folder: Path, dataset: Path, adapter: dict | None = None, **more) -> dict:
    more = copy.deepcopy(more)
    more["optimizer"] = {"lr": 1e-2, **more.get("optimizer", {})}
    more["stage"] = [{"epochs": 1}, {"epochs": 1, "lr": 5e-3, "batch_size": 3, "accumulate": 1}]
    return settings_of(folder, dataset, adapter={**ADAPTER, **(adapter or {})}, **more)


KILLED = {
    # a moving average, 16-bit weights with remainders, dropout's masks, magnitudes
    "average": ({}, {"train": {"ema_decay": 0.9}}),
    "bf16, dropout, DoRA": ({"dropout": 0.3, "dora": True}, {"model": {"precision": "bf16"}}),
    "kernels": ({}, {"train": {"kernels": "on", "checkpointing": "full"}}),
    "fused": ({}, {"optimizer": {"fused_backward": True}, "train": {"kernels": "on"}}),
    "adamw": ({"rslora": True}, {"optimizer": {"name": "adamw"}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", KILLED)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(run, tiny_dataset, tmp_path, what):
    adapter, more = KILLED[what]
    assert run(lora_settings(tmp_path / "alone", tiny_dataset, adapter, **more)) == 0
    killed = lora_settings(tmp_path / "killed", tiny_dataset, adapter, **more)
    assert run(killed, point="step", count=4) == -signal.SIGKILL
    assert run(killed, resume=True, point="checkpoint file", count=1) == -signal.SIGKILL
    assert run(killed, resume=True) == 0
    assert_equal_runs(tmp_path / "alone", tmp_path / "killed", WEIGHTS)


@pytest.fixture(scope="module")
def finished(run, tiny_dataset, tmp_path_factory) -> dict[str, Path]:
    """Finished runs: of a DoRA on the small base, an rsLoRA on SDXL, and a LoRA on the small base."""
    folder = tmp_path_factory.mktemp("lora")
    bases = {"dora": small_base(), "sdxl": str(write_small_sdxl(folder / "base")), "sd1": small_base()}
    runs = {name: folder / name for name in bases}
    for name, base in bases.items():
        adapter = {"target": ["linear", "convolution"], "dora": name == "dora", "rslora": name == "sdxl", "alpha": 3.0}
        more = {"data": {"validation_fraction": 0.3}} if name == "sd1" else {"train": {"ema_decay": 0.5}}
        settings = lora_settings(runs[name], tiny_dataset, adapter, model={"base": base}, **more)
        settings["stage"] = [{"epochs": 1}]
        assert run(settings) == 0
    return runs


def test_a_checkpoint_holds_the_adapter_only(finished):
    folder = folder_of(finished["dora"], list_checkpoints(finished["dora"])[-1])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {WEIGHTS, "state.safetensors", "state.json"}
    weights = load_file(folder / WEIGHTS)
    assert {name.rpartition(".lora_")[2] for name in weights} == {"A.weight", "B.weight", "magnitude_vector"}
    trained = sum(x.numel() for x in weights.values())
    state = load_file(folder / "state.safetensors")
    assert sum(x.numel() for name, x in state.items() if name.startswith("ema/")) == trained
    assert not [
        name
        for name in state
        if "/" in name and name.partition("/")[0] in ("state1", "state2", "ema") and ".adapter." not in name
    ]
    model = json.loads((finished["dora"] / "model.json").read_text())
    assert model["trained_parameters"] == trained
    assert any("rank 4" in note and f"{trained:,} parameters" in note for note in model["notes"])


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipeline("a red circle", height=64, width=64, num_inference_steps=3, generator=generator, output_type="pt")
    return images.images[0]


@pytest.mark.parametrize("name", ["dora", "sdxl", "sd1"])
def test_exports_draw_the_same_picture_in_diffusers(finished, tmp_path, name):
    """The LoRA's own file in both layouts, read by diffusers into the base, and the merged model."""
    from diffusers import DiffusionPipeline

    run = finished[name]
    export(run, tmp_path / "merged", dtype="fp32", merge=True)
    merged = draw(DiffusionPipeline.from_pretrained(tmp_path / "merged"))
    base = open_run(run).base.folder
    plain = draw(DiffusionPipeline.from_pretrained(base, safety_checker=None))
    assert (merged - plain).abs().max() > 0.05
    for layout in ("diffusers", "kohya"):
        file = tmp_path / f"{layout}.safetensors"
        done = export(run, file, dtype="fp32", layout=layout)
        assert ("A1111's models/Lora" if layout == "kohya" else "load_lora_weights") in done.next_step
        pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
        if layout == "kohya" and name == "dora":
            # diffusers reads no dora_scale of kohya's
            continue
        pipeline.load_lora_weights(file)
        assert (draw(pipeline) - merged).abs().max() < 2e-3, layout


def test_pictures_with_less_of_the_lora(finished, tmp_path):
    """Scale 0 draws what the base draws, 1 what is drawn without the option; the PNG tells another scale."""
    opened = open_run(finished["sdxl"])

    def picture(name: str, checkpoint: str = "last", **options) -> Image.Image:
        (file,) = sample(opened, ["a red circle"], checkpoint, tmp_path / f"{name}.png", {"steps": 2}, **options)
        return Image.open(file)

    none, half, whole = (picture(f"scale{scale}", lora_scale=scale) for scale in (0.0, 0.5, 1.0))
    assert none.tobytes() == picture("base", "base").tobytes()
    assert whole.tobytes() == picture("plain").tobytes()
    assert len({image.tobytes() for image in (none, half, whole)}) == 3
    assert "LoRA scale: 0.5" in half.info["parameters"]
    assert "LoRA scale" not in whole.info["parameters"]
    with pytest.raises(UserError, match="--lora-scale 11 is not from -10 to 10"):
        picture("much", lora_scale=11.0)


def test_a_grid_of_scales(finished):
    opened = open_run(finished["sdxl"])
    plan = plan_grid(opened, parse_axes({"x": "lora-scale=0,0.5,1"}), prompts=["a red circle"], changes={"steps": 2})
    assert [cell.request.weights.lora_scale for cell in plan.cells] == [0, 0.5, 1]
    keys = [opened.weights_hash(cell.request.weights) for cell in plan.cells]
    assert len(set(keys)) == 3
    assert (draw_grid(opened, plan, "scales") / "sheet.png").is_file()


def test_comparisons_and_evaluations_set_the_lora_beside_its_base(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished["sd1"], tmp_path / "run"))
    step = list_checkpoints(run)[-1]
    opened = open_run(run)
    assert main(["compare", str(run), "--checkpoints", "last", "--num", "2"]) == 0
    index = json.loads((run / "compare/index.json").read_text())
    assert [model["id"] for model in index["models"]] == ["base", f"step-{step}"]
    for row in index["rows"]:
        files = (row["images"][name] for name in ("base", f"step-{step}"))
        drawn = [np.asarray(Image.open(run / "compare" / file), np.int16) for file in files]
        assert np.abs(drawn[0] - drawn[1]).max() > 20
        # the LoRA's picture is what `sample` draws, and the base's what it draws without the LoRA
        settings = replace(sampling_of(opened.config), seed=row["seed"])
        requests = [
            Request(Weights(step, lora_scale=scale), row["prompt"], row["place"], settings) for scale in (0.0, 1.0)
        ]
        again = sorted(draw_pictures(opened, requests), key=itemgetter(0))
        for image, (_, expected) in zip(drawn, again, strict=True):
            # batches differ, and so does rounding
            assert np.abs(image - np.asarray(expected)).max() <= 2
    assert main(["evaluate", str(run), "--checkpoints", "last", "--num", "6", "--device", "cpu", "--json"]) == 0
    evaluation = Evaluation.model_validate_json((run / "evaluation.json").read_text())
    assert [model.id for model in evaluation.models] == ["base", f"step-{step}"]
    values = {estimate.model: estimate.value for estimate in evaluation.metrics[0].values}
    assert set(values) == {"base", f"step-{step}"}
    assert values["base"] != values[f"step-{step}"]
    report = (run / "report.html").read_text()
    assert f"step-{step}" in report
    assert "rank 4" in report


def test_the_model_card_of_a_loras_file(finished, tmp_path):
    run = finished["sd1"]
    done = export(run, tmp_path / "mine.safetensors", layout="kohya", card=True)
    text = (tmp_path / "mine.md").read_text()
    assert {path.suffix for path in done.card_files} == {".md", ".png"}
    for part in (
        "fine-tuned from small: a LoRA, after 4 steps (1 epoch).",
        "- lora\n",
        '`pipeline.load_lora_weights("mine.safetensors")`',
        "| LoRA | rank 4, alpha 3, on linear, convolution |",
        "24 photographs, of which 8 were held out of training",
        "![](mine-samples/00.png)",
    ):
        assert part in text, part
    export(run, tmp_path / "merged", merge=True)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "a LoRA, merged into the UNet, after" in text
    assert "from_pretrained" in text
    assert "- lora\n" not in text
    card = ModelCard.load(tmp_path / "mine.md")
    assert "lora" in card.data.tags


def test_merging_less_of_the_lora_and_averages(finished, tmp_path):
    """--lora-scale scales what is merged; --weights ema and trained differ; options without effect are refused."""
    run = finished["sdxl"]

    def merged(name: str, **options) -> torch.Tensor:
        export(run, tmp_path / name, dtype="fp32", merge=True, **options)
        weights = load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
        return weights["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]

    base = open_run(run).base.folder / "unet/diffusion_pytorch_model.safetensors"
    plain = load_file(base)["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    whole = merged("whole")
    torch.testing.assert_close(merged("half", lora_scale=0.5) - plain, (whole - plain) / 2, rtol=1e-4, atol=1e-7)
    assert (merged("trained", weights="trained") - whole).abs().max() > 1e-6
    for name, options, message in (
        ("other.safetensors", {"layout": "kohya", "merge": True}, "leave one out"),
        ("other.safetensors", {"lora_scale": 0.5}, "is for --merge"),
        ("other", {}, "name a .safetensors file with -o, or add --merge"),
    ):
        with pytest.raises(UserError, match=message):
            export(run, tmp_path / name, **options)


def test_the_files_metadata(finished, tmp_path):
    for layout in ("diffusers", "kohya"):
        export(finished["dora"], tmp_path / f"{layout}.safetensors", layout=layout)
        with safe_open(tmp_path / f"{layout}.safetensors", "pt") as file:
            metadata = file.metadata()
            assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118
        assert metadata["modelspec.architecture"].endswith("/lora")
        assert metadata["modelspec.hash_sha256"] != "0x" + "0" * 64
        if layout == "kohya":
            assert metadata["ss_network_dim"] == "4"
            assert metadata["ss_network_alpha"] == "3"
            assert metadata["ss_base_model_version"] == "sd_v1"
            assert json.loads(metadata["ss_network_args"])["conv_dim"] == "4"
        else:
            values = json.loads(metadata["lora_adapter_metadata"])
            assert values["unet.r"] == 4
            assert values["unet.lora_alpha"] == 3
            assert values["unet.use_dora"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_encoder": {"train": True}}, "text_encoder.train true does not work with adapter.kind lora"),
        ({"optimizer": {"memory": "paged"}}, "optimizer.memory paged .* adapter.kind lora trains a few MB"),
        ({"adapter": {"target": []}}, "adapter.target"),
        ({"adapter": {"rank": 0}}, "adapter.rank"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        parse_config({**settings, "adapter": {"kind": "lora", **settings.get("adapter", {})}}, "here")


def test_a_target_that_no_layer_fits_is_refused():
    unet = small_unet()
    with pytest.raises(UserError, match=r"adapter.target 'atention' names no linear layer"):
        LoRA(unet, Adapter(kind="lora", target=["atention"]), seed=0)


@pytest.mark.parametrize(
    ("target", "part", "without"),
    [
        (["attention"], "attn2.to_out.0", "ff.net"),
        (["feed-forward"], "ff.net.2", "attn1"),
        (["linear"], "time_embedding.linear_1", "conv_in"),
        (["convolution"], "downsamplers.0.conv", "attn1"),
        (["up_blocks.*.attn2.to_k"], "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks"),
    ],
)
def test_targets(target, part, without):
    layers = LoRA(small_unet(), Adapter(kind="lora", target=target), seed=0).layers
    assert any(part in name for name in layers)
    assert not any(without in name for name in layers)
