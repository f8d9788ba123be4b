"""Where models come from, what is refused, and that encoders give what diffusers' own calls give."""

import copy
import functools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from safelight.__main__ import main
from safelight.trainer.config import parse_config, to_toml
from safelight.trainer.device import pick_device, pick_dtype
from safelight.trainer.encoders import CaptionEncoder, LatentCodec
from safelight.trainer.models import resolve_base, tiny_folder
from safelight.trainer.weights import check_unet, fingerprint, load_text, load_unet, load_vae, meta_unet

CPU = torch.device("cpu")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CAPTIONS = ["a large red circle on a grey background", "", "An Émigré's cat; 猫 🐈" * 20]


@pytest.fixture(scope="module")
def tiny():
    return resolve_base("tiny")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    # the plain way, without a dtype: every part comes in fp32
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def base_folder(tmp_path):
    """A copy of the tiny base, to be spoilt."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "base"))


def load(part: str, folder: Path):
    base = resolve_base(str(folder))
    loaders = {
        "unet": lambda: load_unet(base, 0),
        "vae": lambda: load_vae(base, "", 0),
        "text_encoder": lambda: load_text(base, "", 0)[1],
    }
    return loaders[part]()


# where a base may be


def test_tiny_is_embedded_and_small(tiny):
    assert tiny.folder == tiny_folder()
    assert not tiny.from_scratch
    size = sum(path.stat().st_size for path in tiny_folder().rglob("*") if path.is_file())
    assert size <= 10 * 10**6
    assert not [path for path in tiny_folder().rglob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl")]


def test_a_diffusers_folder_is_taken_as_it_is(base_folder, tiny):
    base = resolve_base(str(base_folder))
    assert (base.folder, base.from_scratch) == (base_folder, False)
    assert base.config_of("unet") == tiny.config_of("unet")
    assert base.config_of("scheduler")["prediction_type"] == "epsilon"


def test_a_name_of_random_weights_that_is_unknown():
    with pytest.raises(
        ValueError, match="'random:sd9' is unknown; use one of random:sd15, random:sd21, random:sdxl, random:small"
    ):
        resolve_base("random:sd9")


def test_a_folder_that_is_no_diffusers_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is no diffusers folder: it has no model_index\.json"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "StableDiffusionXLPipeline"},
        {"_class_name": "Other", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]},
    ],
)
def test_other_kinds_of_pipeline_are_refused(tmp_path, index):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"is a {index['_class_name']}; only Stable Diffusion 1.x and 2.x"):
        resolve_base(str(tmp_path))


def test_an_index_or_config_that_is_broken_or_missing(base_folder):
    (base_folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"unet/config\.json is missing; a diffusers folder has unet/config\.json"):
        resolve_base(str(base_folder)).config_of("unet")
    (base_folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is not readable as JSON"):
        resolve_base(str(base_folder))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("owner/missing", "could not be had from the hub"),
        ("no such/thing/at all", "neither a folder here nor a hub id"),
    ],
)
def test_a_base_that_cannot_be_had_is_one_clear_line(tmp_path, monkeypatch, capsys, spec, reason):
    import huggingface_hub.constants

    # what HF_HUB_OFFLINE=1 sets, were it set before the import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "run.toml").write_text(to_toml(parse_config({"model": {"base": spec}}, "here")))
    assert main(["plan", str(tmp_path / "run.toml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"safelight plan: model.base '{spec}' is")
    assert reason in lines[0]


def test_a_download_shows_its_progress_where_libraries_are_silenced():
    """Gigabytes on their way are shown; what is on the disk already, or comes at once, is not."""
    code = (
        "import time\nfrom safelight.__main__ import quiet_libraries\nquiet_libraries()\n"
        "from huggingface_hub.utils.tqdm import _create_progress_bar\n"
        "from safelight.trainer.hub import late_bar\n"
        "for name, seconds in (('slow', 2.2), ('quick', 0)):\n"
        "    with _create_progress_bar(cls=late_bar(), log_level=40, desc=name, total=2) as bar:\n"
        "        time.sleep(seconds)\n        bar.mininterval = 0\n        bar.update(1)\n        bar.update(1)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "slow" in shown
    assert "quick" not in shown


# weights: true sizes, random ones, damaged ones


def test_random_sd15_is_the_true_size():
    unet = meta_unet(resolve_base("random:sd15"))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert len(list(unet.parameters())) == 686
    assert all(p.is_meta for p in unet.parameters())


def test_random_weights_depend_on_the_seed_alone():
    base = resolve_base("random:small")

    def prints(seed: int) -> list[str]:
        parts = load_unet(base, seed), load_vae(base, "", seed), load_text(base, "", seed)[1]
        return [fingerprint(part) for part in parts]

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = prints(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(3)
    assert prints(5) == first
    assert not set(prints(6)) & set(first)


def test_the_dtype_asked_for_is_the_dtype_loaded(tiny):
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in load_unet(tiny, 0, dtype).parameters()} == {dtype}


class Opened:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_a_pickle_is_refused_and_never_opened(base_folder, tmp_path, part, suffix):
    weights = base_folder / part / WEIGHTS[part]
    weights.unlink()
    weight_name = "pytorch_model" if part == "text_encoder" else weights.stem
    (base_folder / part / f"{weight_name}{suffix}").write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    with pytest.raises(
        ValueError, match=rf"holds no \.safetensors \(found: .*{suffix}.*other formats are never loaded"
    ):
        load(part, base_folder)
    assert not (tmp_path / "opened").exists()
    pickle.loads((base_folder / part / f"{weight_name}{suffix}").read_bytes()).close()
    assert (tmp_path / "opened").exists(), "the pickle of this test does nothing"


def test_a_pickle_beside_safetensors_is_left_alone(base_folder, tmp_path):
    content = pickle.dumps(Opened(tmp_path / "opened"))
    (base_folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(content)
    (base_folder / "text_encoder" / "pytorch_model.bin").write_bytes(content)
    for part in WEIGHTS:
        assert fingerprint(load(part, base_folder)) == fingerprint(load(part, tiny_folder()))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_of_a_16_bit_variant_alone_is_loaded(base_folder, part, variant):
    weights = base_folder / part / WEIGHTS[part]
    tensors = {name: tensor.bfloat16() if variant == "bf16" else tensor for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    loaded = load(part, base_folder).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_put_together(base_folder, part, variant):
    whole = load(part, tiny_folder())
    (base_folder / part / WEIGHTS[part]).unlink()
    whole.save_pretrained(base_folder / part, max_shard_size="300KB", variant=variant)
    assert len(list((base_folder / part).glob("*-of-*.safetensors"))) > 1
    assert fingerprint(load(part, base_folder)) == fingerprint(whole)


@pytest.mark.parametrize("part", WEIGHTS)
def test_fp32_weights_go_before_a_variant_and_keep_every_bit(base_folder, part):
    weights = base_folder / part / WEIGHTS[part]
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    shutil.copy(weights, weights.with_suffix(".non_ema.safetensors"))
    generator = torch.Generator().manual_seed(1)
    exact = {name: torch.randn(t.shape, generator=generator) for name, t in load_file(weights).items()}
    save_file(exact, weights, {"format": "pt"})
    loaded = load(part, base_folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in exact.items())


def test_a_folder_with_the_names_of_the_hubs_sd15(base_folder):
    """Its autoencoder's attention is named as before diffusers 0.15, its text encoder as before transformers 5."""
    vae, text = (base_folder / part / WEIGHTS[part] for part in ("vae", "text_encoder"))
    tensors = load_file(vae)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae, {"format": "pt"})
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(text).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(48)[None]}, text, {"format": "pt"})
    for part in ("vae", "text_encoder"):
        assert fingerprint(load(part, base_folder)) == fingerprint(load(part, tiny_folder()))


def test_a_folder_whose_autoencoder_is_a_tiny_one(base_folder, small_taesd):
    shutil.rmtree(base_folder / "vae")
    shutil.copytree(small_taesd, base_folder / "vae")
    assert fingerprint(load("vae", base_folder)) == fingerprint(load_vae(resolve_base("tiny"), str(small_taesd), 0))


def test_a_hub_model_that_is_not_supported_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(spec, allow_patterns, **options):
        asked.append(allow_patterns)
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ValueError, match=r"model\.base 'owner/xl' is a StableDiffusionXLPipeline; only Stable Diffusion 1"
    ):
        resolve_base("owner/xl")
    assert asked == [["*.json", "*.txt"]]
    (tmp_path / "model_index.json").unlink()
    shutil.copytree(tiny_folder(), tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, allow_patterns, **o: asked.append(allow_patterns) or tmp_path
    )
    assert resolve_base("owner/sd").folder == tmp_path
    assert asked[-1] == ["*.json", "*.txt", *(f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder"))]


def test_a_hub_model_of_halves_alone_is_fetched_and_one_of_both_comes_in_fp32(tmp_path, monkeypatch):
    """The hub is a folder here, and what is asked of it is filtered as the hub's own client does."""
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
    found = {path.name for path in base.folder.rglob("*.safetensors")}
    assert found == {"diffusion_pytorch_model.fp16.safetensors", WEIGHTS["vae"], WEIGHTS["text_encoder"]}
    assert not list((base.folder / "vae").glob("*fp16*"))
    check_unet(base)
    assert fingerprint(load_unet(base, 0)) == fingerprint(load("unet", tiny_folder()))


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_with_a_gap_or_of_another_size_or_cut_short_are_refused(base_folder, part):
    """diffusers and transformers fill a gap with random weights and go on."""
    path = base_folder / part / WEIGHTS[part]
    weights = load_file(path)
    name = sorted(weights)[5]
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"its \.safetensors lack 1 of the model's tensors, the first is .*\w"):
        load(part, base_folder)
    refused_from_headers(part, base_folder, r"its \.safetensors lack 1 of the model's tensors, the first is .*\w")
    save_file({**weights, name: torch.zeros(3, 5)}, path)
    with pytest.raises(ValueError, match=r"its weights are damaged or do not fit its config\.json"):
        load(part, base_folder)
    refused_from_headers(part, base_folder, rf"do not fit its config\.json: {name} is \(3, 5\), not")
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"its weights are damaged or do not fit its config\.json"):
        load(part, base_folder)
    refused_from_headers(part, base_folder, r"its weights are damaged")
    path.unlink()
    refused_from_headers(part, base_folder, r"holds no \.safetensors")


def refused_from_headers(part: str, folder: Path, match: str) -> None:
    """The UNet's check before encoding says what loading it would say; the encoders are loaded first anyway."""
    if part == "unet":
        with pytest.raises(ValueError, match=match):
            check_unet(resolve_base(str(folder)))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_sound_unet_passes_the_check_of_its_headers(base_folder, variant):
    check_unet(resolve_base("tiny"))
    check_unet(resolve_base("random:small"))
    whole = load("unet", tiny_folder())
    (base_folder / "unet" / WEIGHTS["unet"]).unlink()
    whole.save_pretrained(base_folder / "unet", max_shard_size="300KB", variant=variant)
    check_unet(resolve_base(str(base_folder)))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_fingerprint_changes_with_any_weight(part):
    module = load(part, tiny_folder())
    original = fingerprint(module)
    assert fingerprint(copy.deepcopy(module)) == original
    seen = {original}
    with torch.no_grad():
        for parameter in module.parameters():
            last = parameter.view(-1)[-1:]
            before = last.clone()
            last.copy_(torch.nextafter(before, before + 1))
            seen.add(fingerprint(module))
            last.copy_(before)
    assert len(seen) == 1 + len(list(module.parameters()))
    assert fingerprint(module) == original
    assert fingerprint(module.half()) != original


def test_a_caption_fingerprint_changes_with_clip_skip_and_vocabulary(tiny, tmp_path):
    tokenizer, text_encoder = load_text(tiny, "", 0)
    prints = {CaptionEncoder(tokenizer, text_encoder, CPU, skip).fingerprint for skip in (0, 1)}
    folder = shutil.copytree(tiny_folder() / "tokenizer", tmp_path / "tokenizer")
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    other = type(tokenizer).from_pretrained(folder)
    prints.add(CaptionEncoder(other, text_encoder, CPU).fingerprint)
    assert len(prints) == 3


def test_a_clip_skip_that_leaves_no_layer(tiny):
    tokenizer, text_encoder = load_text(tiny, "", 0)
    with pytest.raises(ValueError, match="clip_skip 2 leaves no layer of 2; use at most 1"):
        CaptionEncoder(tokenizer, text_encoder, CPU, 2)


def test_a_random_base_takes_another_tokenizer_and_its_vocabulary(tiny, tmp_path):
    folder = str(tiny_folder() / "tokenizer")
    tokenizer, text_encoder = load_text(resolve_base("random:small"), folder, 0)
    assert text_encoder.config.vocab_size == len(tokenizer)
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="does not fit the text encoder of 'tiny'; leave it empty"):
        load_text(tiny, folder, 0)
    with pytest.raises(ValueError, match="is no folder"):
        load_text(resolve_base("random:small"), str(tmp_path / "none"), 0)


# encoders


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_latents_and_pixels_are_those_of_diffusers(tiny, pipeline, pixels):
    codec = LatentCodec(load_vae(tiny, "", 0), CPU)
    assert (codec.has_posterior, codec.factor, codec.latent_channels) == (True, pipeline.vae_scale_factor, 4)
    mean, logvar = codec.encode(pixels)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        scaled = posterior.mean * pipeline.vae.config.scaling_factor
        unscaled = scaled / pipeline.vae.config.scaling_factor
        decoded = torch.cat([pipeline.vae.decode(latents).sample for latents in unscaled.split(1)])
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(logvar, posterior.logvar)
    assert torch.equal(codec.decode(mean * codec.scaling_factor), pipeline.image_processor.postprocess(decoded, "pt"))


def test_an_autoencoder_tiny_in_place_of_the_bases_vae(tiny, small_taesd, pixels):
    from diffusers import AutoencoderTiny

    codec = LatentCodec(load_vae(tiny, str(small_taesd), 0), CPU)
    assert (codec.has_posterior, codec.factor, codec.latent_channels, codec.scaling_factor) == (False, 4, 4, 1.0)
    vae = AutoencoderTiny.from_pretrained(small_taesd)
    latents, logvar = codec.encode(pixels)
    assert logvar is None
    with torch.no_grad():
        assert torch.equal(latents, vae.encode(pixels).latents)
        decoded = torch.cat([vae.decode(one).sample for one in latents.split(1)])
        expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert torch.equal(codec.decode(latents), expected)


def test_a_folder_that_is_no_autoencoder(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"is no autoencoder folder: it has no config\.json"):
        load_vae(tiny, str(tmp_path), 0)
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; use an AutoencoderKL or AutoencoderTiny"):
        load_vae(tiny, str(tiny_folder() / "unet"), 0)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_embeddings_are_those_of_diffusers(tiny, pipeline, clip_skip, monkeypatch):
    """diffusers' clip_skip 1 is the output of the pre-final layer."""
    if not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers 0.42 still looks for the wrapper that transformers 5 did away with
        wrapper = property(lambda text_encoder: text_encoder)
        monkeypatch.setattr(type(pipeline.text_encoder), "text_model", wrapper, raising=False)
    encoder = CaptionEncoder(*load_text(tiny, "", 0), CPU, clip_skip)
    with torch.no_grad():
        expected, empty = pipeline.encode_prompt(CAPTIONS, CPU, 1, True, [""] * 3, clip_skip=clip_skip or None)
    found = encoder.encode(CAPTIONS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "all captions look alike: this base compares nothing"
    if clip_skip == 0:
        torch.testing.assert_close(found[1], empty[0], rtol=0, atol=1e-6)


def test_clip_skip_changes_the_embeddings(tiny):
    tokenizer, text_encoder = load_text(tiny, "", 0)
    last, before = (CaptionEncoder(tokenizer, text_encoder, CPU, skip).encode(CAPTIONS[:1]) for skip in (0, 1))
    assert (last - before).abs().max() > 1e-3


def test_encoders_are_frozen(tiny):
    for module in (load_vae(tiny, "", 0), load_text(tiny, "", 0)[1]):
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training


# the tokenizer and the whole pipeline


def test_the_vocabulary_is_small(tiny):
    assert len(load_text(tiny, "", 0)[0]) <= 2000


@functools.cache
def tiny_tokenizer():
    return load_text(resolve_base("tiny"), "", 0)[0]


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
def test_any_text_is_written_in_known_tokens(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, truncation=False).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # the unknown token is the end token; it must not stand in for anything
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])
    # words are spaced anew and lower-cased, as CLIP does; nothing else may be lost
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "".join(normal.split())


def test_diffusers_draws_with_the_embedded_folder(pipeline):
    def draw(prompt: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(prompt, height=64, width=48, num_inference_steps=3, generator=generator, output_type="pt")
        return images.images[0]

    image = draw("a red circle on a dark background", 1)
    assert image.shape == (3, 64, 48)
    assert image.isfinite().all()
    assert image.std() > 0.01
    assert torch.equal(image, draw("a red circle on a dark background", 1))
    assert not torch.equal(image, draw("a blue square on a silver background", 1))
    assert not torch.equal(image, draw("a red circle on a dark background", 2))


# devices


def test_the_device_and_dtype_that_are_taken(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="but torch finds no CUDA device; use auto or cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # with its number, as tensors tell it: torch.cuda.set_per_process_memory_fraction refuses a device without
    assert pick_device("auto") == pick_device("cuda") == gpu
    assert pick_dtype("auto", CPU) == torch.float32
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert pick_dtype(name, CPU) == dtype
    # a T4 has no bf16 arithmetic
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_dtype("auto", gpu) == torch.float16
    with pytest.raises(ValueError, match="bf16: this GPU has no bf16 arithmetic; use fp16 or auto"):
        pick_dtype("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert pick_dtype("auto", gpu) == pick_dtype("bf16", gpu) == torch.bfloat16
