"""Where a base may come from, and which ones are refused."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from safelight.__main__ import main
from safelight.errors import UserError
from safelight.trainer.config.presets import SD15, SD21
from safelight.trainer.config.schema import Model
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.models import architectures
from safelight.trainer.models.architectures import known_shapes
from safelight.trainer.models.base import base_of, resolve_base, resolve_model, tiny_folder
from safelight.trainer.models.weights import check_unet, fingerprint, load_unet
from tests.trainer.families.small_sdxl import write_small_sdxl
from tests.trainer.models.tiny_base import WEIGHTS, load

# folders and names


@pytest.mark.parametrize(("name", "max_mb"), [("tiny", 10), ("tiny-xl", 12), ("tiny-v", 10)])
def test_the_built_in_bases_are_small(name, max_mb):
    base = resolve_base(name)
    assert base.folder == tiny_folder(name)
    assert not base.from_scratch
    files = [path for path in base.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= max_mb * 10**6
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}


def test_a_diffusers_folder_is_used_in_place(base_folder, tiny):
    base = resolve_base(str(base_folder))
    assert (base.folder, base.from_scratch) == (base_folder, False)
    assert base.config_of("unet") == tiny.config_of("unet")
    assert base.config_of("scheduler")["prediction_type"] == "epsilon"


def test_an_unknown_random_base_is_refused():
    with pytest.raises(
        ValueError, match="'random:sd9' is unknown; use one of random:sd15, random:sd21, random:sdxl, random:small"
    ):
        resolve_base("random:sd9")


def test_a_folder_without_a_model_index_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"is not a diffusers folder: it has no model_index\.json; give a diffusers folder"
    ):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "StableDiffusionXLInpaintPipeline"},
        {"_class_name": "KandinskyV22Pipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
        {"_class_name": "Other", "text_encoder_3": ["transformers", "T5EncoderModel"]},
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]},
    ],
)
def test_other_kinds_of_pipeline_are_refused(tmp_path, index):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"is a {index['_class_name']}; only Stable Diffusion 1.x, 2.x and XL are"):
        resolve_base(str(tmp_path))


def test_a_broken_or_missing_index_or_config_is_refused(base_folder):
    (base_folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"unet/config\.json is missing, which a diffusers folder of its kind has"):
        resolve_base(str(base_folder)).config_of("unet")
    (base_folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is not valid JSON"):
        resolve_base(str(base_folder))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("owner/missing", "could not be downloaded from Hugging Face"),
        ("no such/thing/at all", "neither a folder on this machine nor a Hugging Face id"),
    ],
)
def test_a_base_that_cannot_be_found_or_downloaded_is_one_line(tmp_path, monkeypatch, capsys, spec, reason):
    import huggingface_hub.constants

    # as HF_HUB_OFFLINE=1, which is read at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "run.toml").write_text(to_toml(parse_config({"model": {"base": spec}}, "here")))
    assert main(["plan", str(tmp_path / "run.toml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"safelight plan: model.base '{spec}' is")
    assert reason in lines[0]


def test_a_download_shows_its_progress_although_libraries_are_silenced():
    """A slow download has a bar; cached files and quick downloads have none."""
    code = (
        "import time\nfrom safelight.__main__ import quiet_libraries\nquiet_libraries()\n"
        "from huggingface_hub.utils.tqdm import _create_progress_bar\n"
        "from safelight.trainer.models.hub import delayed_bar\n"
        "for name, seconds in (('slow', 2.2), ('quick', 0)):\n"
        "    with _create_progress_bar(cls=delayed_bar(), log_level=40, desc=name, total=2) as bar:\n"
        "        time.sleep(seconds)\n        bar.mininterval = 0\n        bar.update(1)\n        bar.update(1)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "slow" in shown
    assert "quick" not in shown


# the hub


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cross_attention_dim": 1280}, "is the refiner of Stable Diffusion XL, which only finishes pictures"),
        (
            {"in_channels": 9},
            "is an inpainting or editing model, whose UNet has 9 input channels",
        ),
        (
            {"in_channels": 8},
            "is an inpainting or editing model, whose UNet has 8 input channels",
        ),
        ({"time_cond_proj_dim": 256}, "is a latent consistency model, distilled for a few sampling steps"),
    ],
)
def test_unets_of_other_kinds_are_refused_with_what_they_are(base_folder, changes, line):
    path = base_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=f"{re.escape(str(base_folder))}' {line}"):
        resolve_base(str(base_folder))


@pytest.mark.parametrize("kind", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_other_noise_schedules_are_refused(base_folder, kind):
    path = base_folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": kind}))
    with pytest.raises(UserError, match=f"its {kind} has a noise schedule of another kind, which is not supported"):
        resolve_base(str(base_folder)).noise_schedule()


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    requested = []

    def snapshot_download(spec, allow_patterns, **options):
        requested.append(allow_patterns)
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLInpaintPipeline"}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ValueError, match=r"model\.base 'owner/xl' is a StableDiffusionXLInpaintPipeline; only Stable Diffusion 1"
    ):
        resolve_base("owner/xl")
    assert requested == [["*.json", "*.txt"]]
    (tmp_path / "model_index.json").unlink()
    shutil.copytree(tiny_folder(), tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, allow_patterns, **o: requested.append(allow_patterns) or tmp_path,
    )
    assert resolve_base("owner/sd").folder == tmp_path
    assert requested[-1] == ["*.json", "*.txt", *(f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder"))]


def test_fp16_weights_are_downloaded_only_for_parts_without_fp32_ones(tmp_path, monkeypatch):
    """A folder stands in for the hub; file names are filtered by the hub client's own function."""
    import huggingface_hub

    hub = tmp_path / "hub"
    shutil.copytree(tiny_folder(), hub)
    for part in ("unet", "vae"):
        weights = hub / part / WEIGHTS[part]
        shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    (hub / "unet" / WEIGHTS["unet"]).unlink()

    def snapshot_download(spec, allow_patterns, ignore_patterns, **options):
        names = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, tmp_path / "here" / name)
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = resolve_base("owner/sd")
    downloaded = {path.name for path in base.folder.rglob("*.safetensors")}
    assert downloaded == {"diffusion_pytorch_model.fp16.safetensors", WEIGHTS["vae"], WEIGHTS["text_encoder"]}
    assert not list((base.folder / "vae").glob("*fp16*"))
    check_unet(base)
    assert fingerprint(load_unet(base, 0)) == fingerprint(load("unet", tiny_folder()))


@pytest.mark.parametrize(
    "name", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "RunwayML/stable-diffusion-v1-5", "sd15"]
)
def test_the_shapes_of_well_known_models_are_known(name, tmp_path, monkeypatch):
    assert known_shapes(name) == "sd15"
    assert known_shapes(SD15) == "sd15"
    assert known_shapes(SD21) == "sd21"
    assert known_shapes("stabilityai/stable-diffusion-xl-base-1.0") == "sdxl"
    assert known_shapes("owner/another") == ""
    # what is on this machine is read
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert known_shapes(name) == ""


def test_a_plan_of_a_well_known_hub_id_is_made_offline(tmp_path, monkeypatch, capsys):
    def not_called(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("safelight.trainer.models.base.fetch", not_called)
    monkeypatch.setitem(architectures.KNOWN_SHAPES, "somebody/small", "small")
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "somebody/small"\n[run]\ndevice = "cpu"\n[data]\nresolution = 64\n')
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["base"], planned["known_shapes"]) == ("somebody/small", "small")
    monkeypatch.setitem(architectures.TITLES, "small", "a small model")
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The plan takes the known shapes of a small model; somebody/small was not read.\n")
    assert "somebody/small, " in out


def test_a_name_of_shapes_is_no_model_to_train(tmp_path):
    with pytest.raises(UserError, match=r"model.base 'sd15' is only for `safelight plan`"):
        base_of(Model(base="sd15"))


def test_both_text_encoders_of_sdxl_are_downloaded(monkeypatch, tmp_path):
    folder, asked = write_small_sdxl(tmp_path / "base"), []

    def fetch(spec, setting, fix, parts):
        asked.append(list(parts))
        return folder

    monkeypatch.setattr("safelight.trainer.models.base.fetch", fetch)
    assert base_of(Model(base="owner/xl")).family.name == "sdxl"
    assert asked == [[], ["unet", "vae", "text_encoder", "text_encoder_2"]]


def test_a_plan_downloads_configs_alone(monkeypatch, tmp_path):
    asked = []

    def fetch(spec, setting, fix, parts=()):
        asked.append(parts)
        return tiny_folder()

    monkeypatch.setattr("safelight.trainer.models.base.fetch", fetch)
    resolve_model(Model(base="owner/tiny"))
    assert set(asked) == {()}
    base_of(Model(base="owner/tiny"))
    assert list(asked[-1]) == ["unet", "vae", "text_encoder"]
