"""A v-prediction base of SD 2.x's kind the whole way: trained, validated, drawn, exported, and a base again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.inference.draw import open_run, sample
from safelight.trainer.inference.export import export
from safelight.trainer.train import train
from tests.called import call
from tests.trainer.families.small_sd2 import write_small_sd2
from tests.trainer.inference.exported_runs import make_run

PROMPT, SEED = "a red circle on a wall", 7
DRAWN = {"steps": 3, "cfg": 5.0, "seed": SEED, "sampler": "ddim", "width": 64, "height": 64}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def draw(run: Path, checkpoint: str, out: Path) -> np.ndarray:
    (file,) = sample(open_run(run), [PROMPT], checkpoint, out, DRAWN)
    with Image.open(file) as image:
        return np.asarray(image, np.int16)


def draw_with_diffusers(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """Draw with the pipeline's own schedule, the spacing and the end of our samplers, and our noise."""
    ours = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **ours)
    pipeline.set_progress_bar_config(disable=True)
    latents = normals_torch([Key(SEED, Purpose.SAMPLE_NOISE, 0)], (4, 16, 16), torch.device("cpu"))
    (image,) = pipeline(PROMPT, num_inference_steps=3, guidance_scale=5.0, height=64, width=64, latents=latents).images
    return np.asarray(image, np.int16)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["neither", "the base", "the setting"])
def test_the_whole_way(make_config, tmp_path, of):
    """of: what brings zero terminal SNR, weighted by min-SNR, whose SNR is 0 at the last timestep."""
    base = write_small_sd2(tmp_path / "base", **(ZERO_SNR if of == "the base" else {}))
    config = make_config(
        model={"base": str(base)},
        loss={"min_snr_gamma": 5.0, "zero_terminal_snr": of == "the setting"},
        stage=[{"epochs": 2}],
        sample={"prompts": [PROMPT]},
    )
    result = train(config)
    run = result.run_dir
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert len(losses) >= 3
    assert np.isfinite(losses).all()
    assert list((run / "samples").rglob("*.png"))
    assert call("compare", run, "--num", 1).status == 0
    assert list((run / "compare").glob("step*.png"))
    model = json.loads((run / "model.json").read_text())
    assert (model["family"], model["prediction_type"]) == ("Stable Diffusion 2.x", "v_prediction")

    folder, file = tmp_path / "out", tmp_path / "out.safetensors"
    for place in (folder, file):
        export(run, place, dtype="fp32")
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["rescale_betas_zero_snr"] == (of != "neither")
    assert saved["timestep_spacing"] == ("leading" if of == "neither" else "trailing")

    ours = draw(run, "last", tmp_path / "ours.png")
    assert not np.array_equal(ours, draw(run, "base", tmp_path / "base.png"))
    for name, spec in (("folder", {"base": str(folder)}), ("file", {"base": str(file), "config": str(folder)})):
        again = make_run(tmp_path / f"of {name}", model=spec)
        assert np.array_equal(draw(again, "base", tmp_path / f"{name}.png"), ours), name
    theirs = draw_with_diffusers(StableDiffusionPipeline.from_pretrained(folder))
    assert np.abs(theirs - ours).max() <= 1
    of_file = StableDiffusionPipeline.from_single_file(str(file), config=str(folder))
    assert np.array_equal(draw_with_diffusers(of_file), theirs)
