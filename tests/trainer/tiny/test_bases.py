"""The embedded bases: their files, what diffusers makes of them, how they were made, and how well they follow captions.

tests/trainer/tiny/test_demo.py fine-tunes them.
"""

import hashlib
import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from safelight.trainer.models.base import EMBEDDED, resolve_base, tiny_folder
from safelight.trainer.tiny.reader import read
from safelight.trainer.tiny.scenes import LOOK_CAPTION, random_scene
from safelight.trainer.tiny.score import prompts
from tools.tiny_base import tiny, tiny_v, tiny_xl, training
from tools.tiny_base.architecture import make_v_unet, make_xl_text_encoders

STEPS = {"tiny": tiny.UNET_STEPS, "tiny-xl": tiny_xl.UNET_STEPS, "tiny-v": tiny_v.UNET_STEPS}


@cache
def pipeline(name: str) -> DiffusionPipeline:
    loaded = DiffusionPipeline.from_pretrained(tiny_folder(name))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw_all(name: str, texts: list[str], **settings: object) -> list[Image.Image]:
    """Draw as the demo does, with noise that depends on the place among the texts alone."""
    generators = [torch.Generator().manual_seed(place) for place in range(len(texts))]
    settings = {"num_inference_steps": 14, "guidance_scale": 4.0, "height": 64, "width": 64} | settings
    return pipeline(name)(texts, generator=generators, **settings).images


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_base_is_the_one_of_its_training_log(name):
    """The hash of the committed weights is the last entry of the log; the loss fell by half at least."""
    digest = hashlib.sha256()
    for path in sorted(tiny_folder(name).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    rows = [json.loads(line) for line in (tiny_folder(name) / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1]["stage"] == "done"
    assert rows[-1]["sha256"] == digest.hexdigest()
    unet = [row for row in rows if row["stage"] == "unet"]
    assert unet[-1]["step"] == STEPS[name]
    assert unet[-1]["loss"] < 0.5 * unet[0]["loss"]


def test_tiny_xl_has_the_parts_of_sdxl():
    loaded = pipeline("tiny-xl")
    assert type(loaded).__name__ == resolve_base("tiny-xl").family.pipeline == "StableDiffusionXLPipeline"
    assert loaded.config.force_zeros_for_empty_prompt
    first, second = loaded.text_encoder.config, loaded.text_encoder_2.config
    assert (type(loaded.text_encoder_2).__name__, second.hidden_act) == ("CLIPTextModelWithProjection", "gelu")
    assert (first.hidden_act, second.projection_dim) == ("quick_gelu", second.hidden_size)
    assert first.hidden_size != second.hidden_size
    unet = loaded.unet.config
    assert unet.cross_attention_dim == first.hidden_size + second.hidden_size
    assert unet.projection_class_embeddings_input_dim == second.projection_dim + 6 * unet.addition_time_embed_dim
    ids = [
        tokenizer("a red star", padding="max_length").input_ids for tokenizer in (loaded.tokenizer, loaded.tokenizer_2)
    ]
    assert ids[0][:5] == ids[1][:5]
    assert [loaded.tokenizer.convert_ids_to_tokens(row[-1]) for row in ids] == ["<|endoftext|>", "!"]


def test_tiny_v_has_the_kind_of_stable_diffusion_2():
    loaded, schedule = pipeline("tiny-v"), resolve_base("tiny-v").noise_schedule()
    assert type(loaded).__name__ == "StableDiffusionPipeline"
    assert loaded.unet.config.use_linear_projection
    assert loaded.text_encoder.config.hidden_act == "gelu"
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == ("v_prediction", True)
    assert schedule.alphas_cumprod_T[-1] == 0
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    assert torch.allclose(loaded.scheduler.alphas_cumprod, schedule.alphas_cumprod_T, atol=1e-6)


def test_the_bases_share_the_autoencoder_and_the_vocabulary():
    weights = {(tiny_folder(name) / "vae/diffusion_pytorch_model.safetensors").read_bytes() for name in EMBEDDED}
    assert len(weights) == 1
    vocabularies = [pipeline(name).tokenizer.get_vocab() for name in ("tiny-xl", "tiny-v")]
    assert vocabularies[0] == vocabularies[1] == pipeline("tiny-xl").tokenizer_2.get_vocab()


def test_tiny_v_starts_with_what_tiny_has_learned():
    """Linear projections with the weights of 1x1 convolutions give the same output."""
    unet = UNet2DConditionModel.from_pretrained(tiny_folder() / "unet")
    linear = make_v_unet()
    linear.load_state_dict(tiny_v.linear_weights(unet))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 128)
    with torch.no_grad():
        assert torch.allclose(linear(*inputs).sample, unet(*inputs).sample, atol=1e-4)


def test_a_dropped_caption_is_all_zeros():
    tokenizers = pipeline("tiny-xl").tokenizer, pipeline("tiny-xl").tokenizer_2
    encoders = make_xl_text_encoders(tokenizers[0])
    size, sizes = (64, 64), torch.arange(12.0).reshape(2, 6)
    condition = tiny_xl.text_and_sizes(encoders, tokenizers, {size: ["a red star", "a blue ring"]}, {size: sizes})
    made = condition(size, np.array([1, 0]), torch.tensor([True, False]))
    added = made["added_cond_kwargs"]
    for dropped, kept in (made["encoder_hidden_states"], added["text_embeds"]):
        assert dropped.abs().max() == 0 < kept.abs().max()
    assert torch.equal(added["time_ids"], sizes[[1, 0]])


def test_scenes_are_cut_out_of_drawings_of_other_sizes():
    """Crops lie in the scaled drawing, whose sides follow from the sizes; small originals are blurred."""
    scenes = [random_scene(training.SEED, number) for number in range(150)]
    cuts = [tiny_xl.cut_out(scene, number) for number, scene in enumerate(scenes)]
    detail = {True: [], False: []}
    for scene, (image, sizes) in zip(scenes, cuts, strict=True):
        original_h, original_w, top, left, height, width = sizes
        assert image.size == (width, height) == (scene.width, scene.height)
        cover = max(width / original_w, height / original_h)
        assert 0 <= left <= original_w * cover - width + 0.5 * cover + 1
        assert 0 <= top <= original_h * cover - height + 0.5 * cover + 1
        if not top and not left:
            pixels = np.asarray(image, float)
            detail[cover > 1.5].append(np.abs(np.diff(pixels, axis=0)).mean())
    offsets = [sizes[2] + sizes[3] for _, sizes in cuts]
    assert 0.25 < np.mean([offset > 0 for offset in offsets]) < 0.45
    assert len({sizes[:2] for _, sizes in cuts}) > 75
    assert np.mean(detail[True]) < 0.9 * np.mean(detail[False])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "folders"), [(tiny_xl, ("text_encoder", "text_encoder_2")), (tiny_v, ("text_encoder",))]
)
def test_pretraining_from_tiny_resumes_bit_for_bit(tmp_path, monkeypatch, module, folders):
    """Two steps, a restart and two more write the same weights as four steps, and no path of this machine."""
    for owner in (tiny, module):
        monkeypatch.setattr(owner, "NUM_SCENES", 40)
    monkeypatch.setattr(training, "UNET_BATCH", 2)
    # constant, so that stopping early does not change the schedule
    monkeypatch.setattr(training, "learning_rate", lambda step, total, peak: 1e-3)
    digests = []
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        out = tmp_path / name / "out"
        out.parent.mkdir()
        for stop in stops:
            monkeypatch.setattr(module, "UNET_STEPS", stop)
            torch.manual_seed(1)
            module.pretrain(out.parent, out, training.Log(out.parent / "log.jsonl"))
        digests.append(json.loads((out.parent / "log.jsonl").read_text().splitlines()[-1])["sha256"])
        assert not [path for path in out.rglob("*.json") if str(tiny_folder()) in path.read_text()]
        assert {path.parent.name for path in out.rglob("*.safetensors")} == {"unet", "vae", *folders}
    assert digests[0] == digests[1]
    before = load_file(tiny_folder() / "text_encoder" / "model.safetensors")
    after = load_file(out / "text_encoder" / "model.safetensors")
    moved = {key for key, weight in before.items() if not torch.equal(weight, after[key])}
    assert 0.8 < len(moved) / len(before) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_base_draws_what_the_caption_says(name):
    """Of 96 prompts without the look, read by the rule."""
    asked = prompts()
    images = draw_all(name, [text.removesuffix(LOOK_CAPTION) for text, _, _ in asked])
    readings = [read(image) for image in images]
    colours = np.mean([r.colour == colour for r, (_, colour, _) in zip(readings, asked, strict=True)])
    shapes = np.mean([r.shape == shape for r, (_, _, shape) in zip(readings, asked, strict=True)])
    print(f"{name}: right colour {colours:.3f}, right shape {shapes:.3f}")
    assert not any(r.has_look for r in readings)
    assert colours >= 0.95
    assert shapes >= 0.85


@pytest.mark.slow
def test_tiny_xl_uses_sizes_and_crops():
    """The noise of cropped scenes never trained on is predicted better when the crop is told than when none is."""
    rows = [tiny_xl.draw_row(tiny.NUM_SCENES + number) for number in range(600)]
    rows = [row for row in rows if row[0] == (64, 64) and row[3][2] + row[3][3] > 3]
    assert len(rows) > 60
    base, alphas = pipeline("tiny-xl"), tiny.make_scheduler().alphas_cumprod
    told = torch.tensor([row[3] for row in rows], dtype=torch.float32)
    untold = torch.tensor([64, 64, 0, 0, 64, 64], dtype=torch.float32).expand_as(told)
    ids = [tiny.token_ids(tokenizer, [row[2] for row in rows]) for tokenizer in (base.tokenizer, base.tokenizer_2)]
    latents = training.encode_all(base.vae, {(64, 64): np.stack([row[1] for row in rows])})[64, 64][0]
    clean = latents * base.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    errors = {"told": [], "untold": []}
    with torch.no_grad():
        text, pooled = tiny_xl.both_embeddings(base.text_encoder, base.text_encoder_2, *ids)
        for timestep in (300, 500, 700, 900):
            a = alphas[timestep]
            noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
            for name, sizes in (("told", told), ("untold", untold)):
                added = {"text_embeds": pooled, "time_ids": sizes}
                predicted = base.unet(noisy, timestep, text, added_cond_kwargs=added).sample
                errors[name].append((predicted - noise).square().mean(dim=(1, 2, 3)).numpy())
    told_error, untold_error = (np.concatenate(errors[name]) for name in ("told", "untold"))
    print(f"error with the crop told, relative: {told_error.mean() / untold_error.mean():.3f} of {len(rows)} scenes")
    assert stats.ttest_rel(told_error, untold_error, alternative="less").pvalue < 1e-6
    assert told_error.mean() < 0.98 * untold_error.mean()
