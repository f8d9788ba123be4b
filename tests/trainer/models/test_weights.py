"""Loading the weights of a base: random ones, every supported file layout, and damaged or refused files."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.trainer.models.base import resolve_base, tiny_folder
from safelight.trainer.models.weights import check_unet, fingerprint, load_texts, load_unet, load_vae, meta_unet
from tests.trainer.models.tiny_base import WEIGHTS, Opened, load


def test_random_sd15_has_the_published_size():
    unet = meta_unet(resolve_base("random:sd15"))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert len(list(unet.parameters())) == 686
    assert all(p.is_meta for p in unet.parameters())


def test_random_weights_depend_only_on_the_seed():
    base = resolve_base("random:small")

    def prints(seed: int) -> list[str]:
        parts = load_unet(base, seed), load_vae(base, "", seed), load_texts(base, "", seed)[0][1]
        return [fingerprint(part) for part in parts]

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = prints(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(3)
    assert prints(5) == first
    assert not set(prints(6)) & set(first)


def test_the_unet_is_loaded_in_the_requested_dtype(tiny):
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in load_unet(tiny, 0, dtype).parameters()} == {dtype}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_a_pickle_is_refused_and_never_opened(base_folder, tmp_path, part, suffix):
    weights = base_folder / part / WEIGHTS[part]
    weights.unlink()
    weight_name = "pytorch_model" if part == "text_encoder" else weights.stem
    (base_folder / part / f"{weight_name}{suffix}").write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    with pytest.raises(
        ValueError, match=rf"has no \.safetensors file \(it has .*{suffix}.*other formats are never loaded"
    ):
        load(part, base_folder)
    assert not (tmp_path / "opened").exists()
    pickle.loads((base_folder / part / f"{weight_name}{suffix}").read_bytes()).close()
    assert (tmp_path / "opened").exists(), "the pickle of this test does nothing"


def test_a_pickle_next_to_safetensors_is_ignored(base_folder, tmp_path):
    content = pickle.dumps(Opened(tmp_path / "opened"))
    (base_folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(content)
    (base_folder / "text_encoder" / "pytorch_model.bin").write_bytes(content)
    for part in WEIGHTS:
        assert fingerprint(load(part, base_folder)) == fingerprint(load(part, tiny_folder()))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_only_a_16_bit_variant_is_loaded(base_folder, part, variant):
    weights = base_folder / part / WEIGHTS[part]
    tensors = {name: tensor.bfloat16() if variant == "bf16" else tensor for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    loaded = load(part, base_folder).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_are_loaded(base_folder, part, variant):
    whole = load(part, tiny_folder())
    (base_folder / part / WEIGHTS[part]).unlink()
    whole.save_pretrained(base_folder / part, max_shard_size="300KB", variant=variant)
    assert len(list((base_folder / part).glob("*-of-*.safetensors"))) > 1
    assert fingerprint(load(part, base_folder)) == fingerprint(whole)


@pytest.mark.parametrize("part", WEIGHTS)
def test_fp32_weights_are_preferred_to_a_variant_and_keep_every_bit(base_folder, part):
    weights = base_folder / part / WEIGHTS[part]
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    shutil.copy(weights, weights.with_suffix(".non_ema.safetensors"))
    generator = torch.Generator().manual_seed(1)
    exact = {name: torch.randn(t.shape, generator=generator) for name, t in load_file(weights).items()}
    save_file(exact, weights, {"format": "pt"})
    loaded = load(part, base_folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in exact.items())


def test_a_folder_with_the_tensor_names_of_sd15_on_the_hub(base_folder):
    """The autoencoder has the names of diffusers before 0.15, the text encoder those of transformers before 5."""
    vae, text = (base_folder / part / WEIGHTS[part] for part in ("vae", "text_encoder"))
    tensors = load_file(vae)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae, {"format": "pt"})
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(text).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(48)[None]}, text, {"format": "pt"})
    for part in ("vae", "text_encoder"):
        assert fingerprint(load(part, base_folder)) == fingerprint(load(part, tiny_folder()))


def test_a_folder_with_an_autoencoder_tiny(base_folder, small_taesd):
    shutil.rmtree(base_folder / "vae")
    shutil.copytree(small_taesd, base_folder / "vae")
    assert fingerprint(load("vae", base_folder)) == fingerprint(load_vae(resolve_base("tiny"), str(small_taesd), 0))


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_misshapen_and_truncated_weights_are_refused(base_folder, part):
    """diffusers and transformers would fill missing tensors with random weights."""
    path = base_folder / part / WEIGHTS[part]
    weights = load_file(path)
    name = sorted(weights)[5]
    save_file({key: value for key, value in weights.items() if key != name}, path)
    missing = r"its \.safetensors files lack 1 tensor required by its config\.json, the first is .*\w"
    with pytest.raises(ValueError, match=missing):
        load(part, base_folder)
    refused_from_headers(part, base_folder, missing)
    save_file({**weights, name: torch.zeros(3, 5)}, path)
    with pytest.raises(ValueError, match=r"its weights are damaged or do not fit its config\.json"):
        load(part, base_folder)
    refused_from_headers(part, base_folder, rf"do not fit its config\.json; .*{name} is \(3, 5\), not")
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"its weights are damaged or do not fit its config\.json"):
        load(part, base_folder)
    refused_from_headers(part, base_folder, r"its weights are damaged")
    path.unlink()
    refused_from_headers(part, base_folder, r"has no \.safetensors file")


def refused_from_headers(part: str, folder: Path, match: str) -> None:
    """For the UNet, check that check_unet raises the same error; the other parts are loaded before encoding anyway."""
    if part == "unet":
        with pytest.raises(ValueError, match=match):
            check_unet(resolve_base(str(folder)))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_intact_unet_passes_check_unet(base_folder, variant):
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


def test_only_a_random_base_accepts_another_tokenizer(tiny, tmp_path):
    folder = str(tiny_folder() / "tokenizer")
    ((tokenizer, text_encoder),) = load_texts(resolve_base("random:small"), folder, 0)
    assert text_encoder.config.vocab_size == len(tokenizer)
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(
        ValueError,
        match="does not fit the text encoder of 'tiny', which was trained",
    ):
        load_texts(tiny, folder, 0)
    with pytest.raises(ValueError, match="is not a folder; give one with a CLIP tokenizer"):
        load_texts(resolve_base("random:small"), str(tmp_path / "none"), 0)
