"""Exported runs: what diffusers draws with a file and a folder, which weights they contain, and the metadata."""

import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safelight.kernels.optim.split_weights import join
from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.families.original_layout import UNET_PREFIX, unet_layout
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.export import export
from safelight.trainer.inference.modelspec import modelspec
from safelight.trainer.models.base import resolve_base, tiny_folder
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import fingerprint, load_texts, load_unet, load_vae
from tests.trainer.families.small_sd2 import write_small_sd2
from tests.trainer.inference.exported_runs import STEP, checkpoint_unet, make_run


@pytest.fixture(scope="module")
def exported(tiny_run) -> tuple[Path, Path]:
    """The run of the tiny base, exported as (file, folder) in fp16, the default."""
    places = tiny_run.parent / "mine.safetensors", tiny_run.parent / "mine"
    for place in places:
        export(tiny_run, place)
    return places


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipeline("a red circle", height=64, width=64, num_inference_steps=3, generator=generator, output_type="pt")
    return images.images[0]


def draw_both(file: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image drawn with the file and one with the folder, from the same seed."""
    from diffusers import StableDiffusionPipeline

    return draw(StableDiffusionPipeline.from_single_file(str(file), config=str(folder))), draw(
        StableDiffusionPipeline.from_pretrained(folder)
    )


def original_unet(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(file).items() if name.startswith(UNET_PREFIX)}


def parts_of(base) -> list[str]:
    return [fingerprint(m) for m in (load_unet(base, 0), load_vae(base, "", 0), load_texts(base, "", 0)[0][1])]


# both forms contain the run's model


def test_diffusers_draws_the_same_image_with_the_file_and_with_the_folder(exported, tiny_run):
    from diffusers import StableDiffusionPipeline

    of_file, of_folder = draw_both(*exported)
    assert of_file.isfinite().all()
    assert torch.equal(of_file, of_folder)
    base = StableDiffusionPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32)
    assert (draw(base) - of_file).abs().max() > 0.01
    base.unet.load_state_dict({name: tensor.half().float() for name, tensor in checkpoint_unet(tiny_run).items()})
    assert torch.equal(draw(base), of_folder), "the image is not the checkpoint's"


def test_an_export_can_be_the_base_of_a_run(exported, tiny_run):
    file, folder = exported
    trained = {name: tensor.half().float() for name, tensor in checkpoint_unet(tiny_run).items()}
    of_folder, of_file = resolve_base(str(folder)), resolve_base(str(file), str(folder))
    assert parts_of(of_file) == parts_of(of_folder)
    assert parts_of(of_folder)[1:] == parts_of(resolve_base("tiny"))[1:]
    state = load_unet(of_file, 0).state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    assert of_folder.config_of("scheduler")["prediction_type"] == "epsilon"


@pytest.mark.parametrize("base", ["a folder", "a file"])
def test_a_run_from_an_export_can_be_exported(exported, tmp_path, base):
    file, folder = exported
    model = {"a folder": {"base": str(folder)}, "a file": {"base": str(file), "config": str(folder)}}[base]
    run = make_run(tmp_path / "run", model=model)
    for place in ("out.safetensors", "out"):
        export(run, tmp_path / place)
    of_file, of_folder = draw_both(tmp_path / "out.safetensors", tmp_path / "out")
    assert torch.equal(of_file, of_folder)
    assert parts_of(resolve_base(str(tmp_path / "out.safetensors"), str(tmp_path / "out"))) == parts_of(
        resolve_base(str(tmp_path / "out"))
    )


def test_a_run_from_untrained_weights(tmp_path):
    """The scheduler's config is ours; what it leaves out must not become diffusers' defaults, which clip latents."""
    from diffusers import StableDiffusionPipeline

    run = make_run(tmp_path / "run", model={"base": "random:small"})
    for place in ("out.safetensors", "out"):
        export(run, tmp_path / place, dtype="bf16")
    assert parts_of(resolve_base(str(tmp_path / "out.safetensors"), str(tmp_path / "out"))) == parts_of(
        resolve_base(str(tmp_path / "out"))
    )
    scheduler = StableDiffusionPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert (scheduler.clip_sample, scheduler.set_alpha_to_one, scheduler.steps_offset) == (False, False, 1)
    assert (scheduler.beta_schedule, scheduler.prediction_type) == ("scaled_linear", "epsilon")


def test_sd2_has_open_clips_names(tmp_path):
    run = make_run(tmp_path / "run", model={"base": str(write_small_sd2(tmp_path / "sd2"))})
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    for place in (file, folder):
        export(run, place)
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in load_file(file)
    of_file, of_folder = draw_both(file, folder)
    assert torch.equal(of_file, of_folder)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"
    assert resolve_base(str(file), str(folder)).config_of("scheduler")["prediction_type"] == "v_prediction"
    assert parts_of(resolve_base(str(file), str(folder))) == parts_of(resolve_base(str(folder)))


def test_a_file_leaves_out_an_autoencoder_tiny(tmp_path, small_taesd, capsys):
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel

    from safelight.__main__ import main

    run = make_run(tmp_path / "run", model={"base": "tiny", "vae": str(small_taesd)})
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    assert main(["export", str(run), "-o", str(file)]) == 0
    note = f"AutoencoderTiny, which single files cannot contain: {file.name} contains only the UNet"
    assert note in capsys.readouterr().err
    assert load_file(file).keys() == original_unet(file).keys()
    # the folder is complete, because diffusers supports this autoencoder
    assert export(run, folder).notes == []
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert draw(pipeline).isfinite().all()
    unet = UNet2DConditionModel.from_single_file(str(file), config=str(folder), subfolder="unet")
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    assert fingerprint(load_vae(resolve_base(str(file), str(folder)), "", 0)) == fingerprint(
        load_vae(resolve_base("tiny"), str(small_taesd), 0).half().float()
    )


# which weights


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_tensor_is_in_the_requested_dtype(tiny_run, tmp_path, dtype):
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    export(tiny_run, tmp_path / "out.safetensors", dtype=dtype)
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out.safetensors").items()}
    assert kinds.pop("cond_stage_model.transformer.text_model.embeddings.position_ids") == torch.int64
    assert set(kinds.values()) == {expected}
    export(tiny_run, tmp_path / "out", dtype=dtype)
    files = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == 3
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {expected}


@pytest.mark.parametrize("memory", ["fp32", "exact", "near"])
def test_the_fp32_values_of_a_16_bit_run_are_exported(tmp_path, memory):
    run = make_run(tmp_path / "run", torch.bfloat16, optimizer={"memory": memory})
    state = load_file(folder_of(run, STEP) / "state.safetensors")
    weights = checkpoint_unet(run)
    layout = unet_layout(weights, 1)
    part = "master" if memory == "fp32" else "remainder"
    values = {name: join(weight, state[f"{part}/{name}"]) for name, weight in weights.items()}
    assert any(not torch.equal(weights[name].float(), value) for name, value in values.items())
    for dtype, kind in (("fp32", torch.float32), ("fp16", torch.float16)):
        export(run, tmp_path / f"{dtype}.safetensors", dtype=dtype)
        file = original_unet(tmp_path / f"{dtype}.safetensors")
        assert len(file) == len(layout)
        assert all(torch.equal(file[place.name], values[name].to(kind)) for name, place in layout.items())


def test_last_best_and_a_step(tmp_path):
    run = make_run(tmp_path / "run", step=3, best=3)
    make_run(run, step=9, best=3)
    assert not torch.equal(checkpoint_unet(run, 3)["conv_in.weight"], checkpoint_unet(run, 9)["conv_in.weight"])
    for checkpoint, step in (("last", 9), ("best", 3), ("3", 3), ("9", 9)):
        exported = export(run, tmp_path / "out.safetensors", checkpoint, "fp32", force=True)
        assert exported.step == step
        weight = load_file(exported.path)[f"{UNET_PREFIX}input_blocks.0.0.weight"]
        assert torch.equal(weight, checkpoint_unet(run, step)["conv_in.weight"])


def test_the_exported_scheduler_has_the_trained_prediction(tmp_path):
    loss = {"prediction": "v_prediction", "zero_terminal_snr": True}
    run = make_run(tmp_path / "run", model={"base": "tiny", "clip_skip": 1}, loss=loss)
    *_, snr, skip = export(run, tmp_path / "out.safetensors").notes
    assert snr.startswith("trained with zero terminal SNR")
    assert skip == "trained with clip_skip 1: use clip_skip=1 in diffusers, Clip skip 2 in A1111"
    assert export(run, tmp_path / "out").notes == [skip]
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == ("DDIMScheduler", "v_prediction")
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")


def zero_snr_folder(folder: Path, kind: str = "DDIMScheduler") -> str:
    """Make a base like the tiny one whose own scheduler has v-prediction and zero terminal SNR."""
    shutil.copytree(tiny_folder(), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    own = {"_class_name": kind, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    return str(folder)


@pytest.mark.parametrize("of", ["the setting", "the base"])
def test_zero_terminal_snr_survives_every_export(tmp_path, of):
    """Whether the run or its base brought it: in a folder, in a file, and in a run that starts from either."""
    loss, base = {"prediction": "v_prediction", "zero_terminal_snr": True}, "tiny"
    if of == "the base":
        loss, base = {}, zero_snr_folder(tmp_path / "base")
    run, file, folder = tmp_path / "run", tmp_path / "out.safetensors", tmp_path / "out"
    make_run(run, model={"base": base}, loss=loss)
    assert "trained with zero terminal SNR" in " ".join(export(run, file).notes)
    export(run, folder)
    schedule = open_run(run).schedule
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == ("v_prediction", True)
    assert schedule.alphas_cumprod_T[-1] == 0
    for name, model in (("file", {"base": str(file), "config": "tiny"}), ("folder", {"base": str(folder)})):
        again = make_run(tmp_path / f"of_{name}", model=model)
        assert open_run(again).schedule.prediction_type == "v_prediction"
        assert torch.equal(open_run(again).schedule.alphas_cumprod_T, schedule.alphas_cumprod_T)
        export(again, tmp_path / "again_out", force=True)
        config = json.loads((tmp_path / "again_out" / "scheduler" / "scheduler_config.json").read_text())
        assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")
        assert config["prediction_type"] == "v_prediction"


def test_the_markers_that_web_uis_read(tmp_path):
    """Empty tensors, and only what is true of the file. Source: A1111's pull requests 16567 and 16569."""
    settings = {"plain": {}, "v": {"prediction": "v_prediction"}}
    settings["zero"] = {"prediction": "v_prediction", "zero_terminal_snr": True}
    markers = {"plain": set(), "v": {"v_pred"}, "zero": {"v_pred", "ztsnr"}}
    for name, loss in settings.items():
        run = make_run(tmp_path / name, loss=loss)
        tensors = load_file(export(run, tmp_path / f"{name}.safetensors").path)
        assert {"v_pred", "ztsnr"} & tensors.keys() == markers[name]
        assert all(tensors[marker].shape == (0,) for marker in markers[name])
    with safe_open(tmp_path / "zero.safetensors", "pt") as file:
        assert file.metadata()["modelspec.usage_hint"].startswith("zero terminal SNR")


def test_markers_are_read_where_there_is_no_metadata(tmp_path):
    run = make_run(tmp_path / "run")
    tensors = load_file(export(run, tmp_path / "out.safetensors").path)
    for markers, expected in (
        ((), ("epsilon", False)),
        (("v_pred",), ("v_prediction", False)),
        (("v_pred", "ztsnr"), ("v_prediction", True)),
    ):
        save_file(tensors | {name: torch.empty(0) for name in markers}, tmp_path / "made.safetensors")
        schedule = make_schedule(resolve_base(str(tmp_path / "made.safetensors"), "tiny").config_of("scheduler"))
        assert (schedule.prediction_type, schedule.zero_terminal_snr) == expected


def test_a_scheduler_without_zero_terminal_snr_becomes_ddim_and_others_stay(tmp_path):
    for kind, expected in (("PNDMScheduler", "DDIMScheduler"), ("EulerDiscreteScheduler", "EulerDiscreteScheduler")):
        run = make_run(tmp_path / f"run{kind}", model={"base": zero_snr_folder(tmp_path / kind, kind)})
        export(run, tmp_path / f"out{kind}")
        path = tmp_path / f"out{kind}" / "scheduler" / "scheduler_config.json"
        assert json.loads(path.read_text())["_class_name"] == expected


@pytest.mark.parametrize(("kind", "value"), [("NoSuchScheduler", "x"), ("DPMSolverMultistepScheduler", "no such type")])
def test_a_scheduler_that_diffusers_cannot_make_is_refused(tmp_path, kind, value):
    folder = Path(zero_snr_folder(tmp_path / "base", kind))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "algorithm_type": value}))
    run = make_run(tmp_path / "run", model={"base": str(folder)})
    with pytest.raises(ValueError, match=r"its scheduler"):
        export(run, tmp_path / "out")


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    run = make_run(tmp_path / "run", largest=float("nan"))
    for place in ("out.safetensors", "out"):
        with pytest.raises(ValueError, match=r"step-00000007: conv_in\.bias has values that are not finite") as caught:
            export(run, tmp_path / place, dtype="bf16")
        assert "export an earlier checkpoint" in str(caught.value)
        assert not (tmp_path / place).exists()


# metadata


def test_the_files_metadata_and_its_hash(exported, tiny_run):
    content = exported[0].read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata.pop("modelspec.hash_sha256") == f"0x{hashlib.sha256(content[8 + length :]).hexdigest()}"
    date = datetime.fromisoformat(metadata.pop("modelspec.date"))
    assert abs((datetime.now(UTC) - date).total_seconds()) < 600
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-custom",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": f"{tiny_run.name} step {STEP}",
        "modelspec.description": f"tiny (Stable Diffusion 1.x) fine-tuned with Safelight, {STEP} steps",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
    }


@pytest.mark.parametrize(
    ("width", "prediction", "architecture", "word"),
    [
        (768, "epsilon", "stable-diffusion-v1", "epsilon"),
        (768, "v_prediction", "stable-diffusion-v1", "v"),
        (1024, "epsilon", "stable-diffusion-v2-512", "epsilon"),
        (1024, "v_prediction", "stable-diffusion-v2-768-v", "v"),
    ],
)
def test_the_architectures_of_the_specification(width, prediction, architecture, word):
    unet = {"cross_attention_dim": width, "block_out_channels": (320, 640, 1280, 1280)}
    metadata = modelspec(unet, prediction, 512, "", "")
    assert (metadata["modelspec.architecture"], metadata["modelspec.prediction_type"]) == (architecture, word)
    assert metadata["modelspec.resolution"] == "512x512"
    unet["block_out_channels"] = (320, 640, 1280)
    assert modelspec(unet, prediction, 512, "", "")["modelspec.architecture"] == "stable-diffusion-custom"


def test_a_title_of_any_characters(tiny_run, tmp_path):
    title = '"hash_sha256":"0x' + "0" * 64 + '" Ünï 猫'
    export(tiny_run, tmp_path / "out.safetensors", title=title)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == title
        assert file.metadata()["modelspec.hash_sha256"] != "0x" + "0" * 64
