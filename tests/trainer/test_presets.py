"""Every preset from `init` to the export, through the command line, on an embedded base of its kind at 64 px."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from safelight.trainer.config.presets import PRESETS
from safelight.trainer.config.toml import load_config
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import fingerprint, load_texts
from safelight.trainer.tiny.scenes import caption, draw, random_scene
from tests.called import call

NUM_PHOTOS = 8
# preset -> (embedded base of its kind, title of the family that its UNet belongs to, class of diffusers)
KINDS = {
    "tiny": ("tiny", "Stable Diffusion 1.x", "StableDiffusionPipeline"),
    "sd15": ("tiny", "Stable Diffusion 1.x", "StableDiffusionPipeline"),
    # it predicts v as SD 2.1 does, but has no SD 2.x width; test_sd2.py has one
    "sd21": ("tiny-v", "Stable Diffusion 2.x", "StableDiffusionPipeline"),
    "sdxl": ("tiny-xl", "Stable Diffusion XL", "StableDiffusionXLPipeline"),
    "sd15-lora": ("tiny", "Stable Diffusion 1.x", "StableDiffusionPipeline"),
    "sd15-embedding": ("tiny", "Stable Diffusion 1.x", "StableDiffusionPipeline"),
    "sdxl-lora": ("tiny-xl", "Stable Diffusion XL", "StableDiffusionXLPipeline"),
    "everydream2": ("tiny", "Stable Diffusion 1.x", "StableDiffusionPipeline"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photographs of two shapes, larger than they are trained at."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(NUM_PHOTOS):
        scene = random_scene(7, number, in_look=True)
        draw(scene).resize((96, 80) if number % 2 else (80, 80)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(scene, 7, number))
    return folder


def test_every_preset_has_a_base_of_its_kind():
    assert KINDS.keys() == PRESETS.keys()


def check_word_exports(go: Callable[..., str], run: Path, folder: Path) -> None:
    """Check that the word is exported as a file and a folder, and draws in another run as it does in its own."""
    go("export", run, "-o", folder / "look.safetensors")
    go("export", run, "-o", folder / "look")
    assert [path.name for path in (folder / "look").glob("*.safetensors")] == ["learned_embeds.safetensors"]
    prompt = ("--prompt", "a red circle, <look>")
    go("sample", run, *prompt, "-o", folder / "own.png")
    other = folder / "other"
    more = ["--run.dir", other, "--train.max-steps", 1, "--adapter.kind", "none", "--optimizer.lr", "1e-9"]
    go("train", run / "config.toml", *more, "--validate.every-epochs", 0, "--sample.every-epochs", 0)
    for form in ("look", "look.safetensors"):
        png = folder / f"{form}.png"
        go("sample", other, *prompt, "--checkpoint", "base", "--embedding", f"<look>={folder / form}", "-o", png)
        with Image.open(png) as image, Image.open(folder / "own.png") as expected:
            assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_from_init_to_export(name, photos, tmp_path):
    base, title, pipeline = KINDS[name]
    settings, dataset, run = tmp_path / "run.toml", tmp_path / "dataset", tmp_path / "run"

    def go(*argv: object) -> str:
        """Run a command and return what it says on stderr."""
        called = call(*argv)
        assert called.status == 0, called.err
        return called.err

    go("init", name, "-o", settings)
    go("prepare", photos, "-o", dataset)
    changes = ["--model.base", base, "--data.path", dataset, "--run.dir", run, "--data.resolution", 64]
    changes += ["--stage.0.epochs", 1, "--stage.1.epochs", 1, "--sample.steps", 2, "--log.tensorboard", "false"]
    told = go("train", settings, *changes)
    # each note is about what this test made short, not about what the preset says
    short = (
        "is beyond the run's",
        "before its warm-up of",
        "is more than the run's 2 epochs",
        "is never filled",
        "buckets have fewer photographs than batch_size",
        "one photograph is held out",
    )
    notes = [line for line in told.splitlines() if line.startswith("note:")]
    assert [line for line in notes if not any(words in line for words in short)] == []
    model = json.loads((run / "model.json").read_text())
    assert model["family"] == title
    assert title in (run / "report.html").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] in ("train", "validation")]
    assert len(losses) >= 4
    assert np.isfinite(losses).all()

    pictures = tmp_path / "pictures"
    go("sample", run, "--prompt", "a (red:1.2) circle", "", "--negative-prompt", "blurry", "-o", pictures)
    assert len(list(pictures.glob("*.png"))) == 2
    go("compare", run, "--num", 1)
    assert len(list((run / "compare").glob("step*.png"))) == 1
    folder, file = tmp_path / "model", tmp_path / "model.safetensors"
    if load_config(run / "config.toml").trains_word:
        check_word_exports(go, run, tmp_path)
        return
    is_adapter = load_config(run / "config.toml").adapter.spec.needs_base
    whole = ["--dtype", "fp32", *(["--merge"] if is_adapter else [])]
    go("export", run, "-o", folder, *whole)
    go("export", run, "-o", file, *whole)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    drawn = DiffusionPipeline.from_pretrained(folder)("a red circle", height=64, width=64, num_inference_steps=2).images
    assert np.asarray(drawn[0]).std() > 0

    trained = load_config(run / "config.toml").text_encoder.train
    assert trained == (name == "everydream2")
    texts = [
        [fingerprint(text_encoder.half()) for _, text_encoder in load_texts(resolve_base(spec), "", 0)]
        for spec in (base, str(folder))
    ]
    assert (texts[0] != texts[1]) == trained

    # both are bases again, and draw what the run does
    of = {}
    go("sample", run, "--prompt", "a red circle", "-o", tmp_path / "run.png")
    for form, spec in (("folder", [folder]), ("file", [file, "--model.config", folder])):
        again = tmp_path / f"of {form}"
        more = ["--run.dir", again, "--train.max-steps", 1, "--model.base", *spec, "--optimizer.lr", "1e-9"]
        more += ["--adapter.kind", "none"]
        go("train", run / "config.toml", *more, "--validate.every-epochs", 0, "--sample.every-epochs", 0)
        go("sample", again, "--prompt", "a red circle", "--checkpoint", "base", "-o", tmp_path / f"{form}.png")
        with Image.open(tmp_path / f"{form}.png") as image, Image.open(tmp_path / "run.png") as expected:
            # a merged weight is rounded once more
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
            of[form] = difference.max() <= (2 if is_adapter else 0)
    assert of == {"folder": True, "file": True}
