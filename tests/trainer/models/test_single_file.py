"""Single files: their parts equal the parts that they were made from; other files are refused with what they are."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.__main__ import main
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.families.original_layout import (
    CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_layout,
    open_clip_layout,
    to_original,
    unet_layout,
    vae_layout,
)
from safelight.trainer.models.base import base_of, resolve_base, tiny_folder
from safelight.trainer.models.tensor_files import TensorFile
from safelight.trainer.models.weights import check_unet, fingerprint, load_texts, load_unet, load_vae
from tests.trainer.models.tiny_base import Opened

CROSS = f"{UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "cond_stage_model."


@pytest.fixture(scope="module")
def tensors(tiny) -> dict[str, torch.Tensor]:
    """The tiny base in the original layout, in fp16 as it is stored, with some of the training code's own tensors."""
    unet = load_unet(tiny, 0, torch.float16)
    state, vae = unet.state_dict(), load_vae(tiny, "", 0).half().state_dict()
    ((_, text),) = load_texts(tiny, "", 0)
    text.half()
    leftovers = {
        "betas": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    return (
        to_original(state, unet_layout(state, unet.config.layers_per_block))
        | to_original(vae, vae_layout(vae))
        | to_original(text.state_dict(), clip_layout(text.state_dict()))
        | {f"{CLIP_PREFIX}embeddings.position_ids": torch.arange(48)[None]}
        | leftovers
    )


@pytest.fixture
def write(tmp_path):
    """A function that writes tensors into a new file and returns its path as a string."""

    def write_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
        path = tmp_path / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        return str(path)

    return write_file


def without(tensors: dict, *prefixes: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def prints(base, vae: str = "") -> list[str]:
    return [fingerprint(m) for m in (load_unet(base, 0), load_vae(base, vae, 0), load_texts(base, "", 0)[0][1])]


# loading


@pytest.mark.parametrize("missing", [(), (VAE_PREFIX,), (TEXT,), (VAE_PREFIX, TEXT)])
def test_a_file_with_and_without_its_frozen_parts(tiny, tensors, write, missing):
    base = resolve_base(write(without(tensors, *missing)), "tiny")
    assert prints(base) == prints(tiny)
    assert load_texts(base, "", 0)[0][0].get_vocab() == load_texts(tiny, "", 0)[0][0].get_vocab()
    frozen = load_vae(base, "", 0), load_texts(base, "", 0)[0][1]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())


def test_a_files_frozen_parts_are_preferred_to_the_folders(tiny, tensors, write):
    changed = {
        name: t * 1.5 if name.startswith((VAE_PREFIX, TEXT)) and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    base = resolve_base(write(changed), "tiny")
    for ours, theirs in zip(prints(base)[1:], prints(tiny)[1:], strict=True):
        assert ours != theirs
    assert fingerprint(load_vae(base, str(tiny_folder() / "vae"), 0)) == prints(tiny)[1]


def test_fp32_weights_keep_every_bit_and_16_bit_ones_are_exact(tensors, write):
    generator = torch.Generator().manual_seed(1)
    exact = {n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in tensors.items()}
    assert any(not torch.equal(t, t.half().float()) for t in exact.values())
    unet = load_unet(resolve_base(write(exact), "tiny"), 0)
    layout = unet_layout(unet.state_dict(), 1)
    assert all(torch.equal(tensor, exact[layout[name].name]) for name, tensor in unet.state_dict().items())
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in exact.items()}
    unet = load_unet(resolve_base(write(halved), "tiny"), 0)
    assert all(torch.equal(t, halved[layout[name].name].float()) for name, t in unet.state_dict().items())
    assert load_unet(resolve_base(write(exact), "tiny"), 0, torch.bfloat16).dtype == torch.bfloat16


def test_open_clip_of_sd2_with_its_unused_last_layer(tiny, tensors, write):
    state = load_texts(tiny, "", 0)[0][1].state_dict()
    unused = {
        f"{TEXT}model.transformer.resblocks.2.ln_1.weight": torch.ones(128),
        f"{TEXT}model.logit_scale": torch.ones(()),
    }
    base = resolve_base(write(without(tensors, TEXT) | to_original(state, open_clip_layout(state)) | unused), "tiny")
    assert prints(base) == prints(tiny)


def test_text_encoders_named_as_before_transformers_4(tiny, tensors, write):
    old = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    assert prints(resolve_base(write(old), "tiny")) == prints(tiny)


@pytest.mark.parametrize("prediction", ["v", "epsilon", None])
def test_a_files_prediction_type_overrides_the_schedulers(tensors, write, prediction):
    base = resolve_base(write(tensors, prediction and {"modelspec.prediction_type": prediction}), "tiny")
    assert base.config_of("scheduler")["prediction_type"] == {"v": "v_prediction"}.get(prediction, "epsilon")


def test_a_run_starts_from_a_file(tensors, write, make_config):
    from safelight.trainer.run_log.terminal import Terminal
    from safelight.trainer.train import train

    config = make_config(
        model={"base": write(tensors), "config": "tiny"},
        stage=[],
        train={"max_steps": 1, "epochs": 1},
        sample={"every_epochs": 0},
        validate={"every_epochs": 0},
    )
    assert train(config, terminal=Terminal()).position.step == 1


# autoencoders


@pytest.mark.parametrize("kind", ["prefixed", "bare", "matrices", "diffusers", "older diffusers"])
def test_an_autoencoder_file_in_any_layout(tiny, tensors, write, kind):
    vae = {name: t * 1.5 for name, t in tensors.items() if name.startswith(VAE_PREFIX) and "loss" not in name}
    if kind == "bare":
        vae = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in vae.items()}
    elif kind == "matrices":
        vae = {name: t[:, :, 0, 0] if "attn_1" in name and t.dim() == 4 else t for name, t in vae.items()}
    elif kind != "prefixed":
        vae = {name: t * 1.5 for name, t in load_vae(tiny, "", 0).half().state_dict().items()}
    if kind == "older diffusers":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            vae = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in vae.items()}
    expected = load_vae(tiny, "", 0).half()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.5)
    assert fingerprint(load_vae(tiny, write(vae), 0)) == fingerprint(expected.float())


def test_a_separate_autoencoder_for_a_file_without_one(tiny, tensors, write, tmp_path):
    vae = tmp_path / "vae.safetensors"
    shutil.copy(tiny_folder() / "vae" / "diffusion_pytorch_model.safetensors", vae)
    toml = tmp_path / "run.toml"
    model = {"base": write(without(tensors, VAE_PREFIX)), "config": "tiny", "vae": str(vae)}
    config = parse_config({"model": model}, "here")
    assert prints(base_of(config.model), config.model.vae) == prints(tiny)
    toml.write_text(to_toml(config))
    assert main(["plan", str(toml), "--json"]) == 0


def test_a_file_that_does_not_have_the_bases_autoencoder_is_refused(tiny, tensors, write, small_taesd, tmp_path):
    with pytest.raises(ValueError, match=r"^model\.vae '.*' is an AutoencoderTiny; give its diffusers folder"):
        load_vae(tiny, str(small_taesd / "diffusion_pytorch_model.safetensors"), 0)
    with pytest.raises(ValueError, match=r"does not contain an autoencoder \(its first tensor is cond_stage"):
        load_vae(tiny, write(without(tensors, VAE_PREFIX, "betas", "model")), 0)
    with pytest.raises(ValueError, match=r"its autoencoder does not fit model\.base 'random:small'"):
        load_vae(resolve_base("random:small"), write(tensors), 0)
    with pytest.raises(ValueError, match=r"does not exist"):
        load_vae(tiny, str(tmp_path / "none.safetensors"), 0)
    (tmp_path / "vae.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"vae\.pt' is not a \.safetensors file; other formats can run code"):
        load_vae(tiny, str(tmp_path / "vae.pt"), 0)


# recognizing other files


def shaped(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


IN = f"{UNET_PREFIX}input_blocks.0.0.weight"
SUPPORTED = "only Stable Diffusion 1.x, 2.x and XL are supported"
REFUSED = {
    "LoRA of kohya": (
        shaped(**{"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}),
        "is a LoRA, which only contains changes to a model; give the full model",
    ),
    "LoRA of peft": (
        shaped(**{"unet.down_blocks.0.to_q.lora_A.weight": (4, 8)}),
        "is a LoRA, which only contains changes to a model; give the full model",
    ),
    "embedding": (shaped(emb_params=(2, 768)), "is a textual inversion embedding"),
    "embedding called by its word": (
        shaped(**{"<look>": (2, 768)}),
        "is a textual inversion embedding, which prompts name: --emb",
    ),
    "SDXL's embedding": (shaped(clip_l=(2, 768), clip_g=(2, 1280)), "is a textual inversion embedding"),
    "SDXL's refiner": (
        shaped(**{CROSS: (8, 1280), IN: (8, 4, 3, 3)}),
        "is the refiner of Stable Diffusion XL, which only finishes pictures that the base began; give the base",
    ),
    "SDXL's inpainting": (shaped(**{CROSS: (8, 2048), IN: (8, 9, 3, 3)}), "is an inpainting or editing model, whose"),
    "SDXL's text encoders": (
        shaped(**{f"{SDXL_CLIP_PREFIX}final_layer_norm.bias": (8,)}),
        "is only the text encoder of a model; give the full model",
    ),
    "Playground 2.5": (
        shaped(**{CROSS: (8, 2048), IN: (8, 4, 3, 3), "edm_mean": (4,)}),
        f"is a model with a noise schedule of another kind (EDM); {SUPPORTED}",
    ),
    "ControlNet": (shaped(**{"control_model.zero_convs.0.0.weight": (1, 1)}), "is a ControlNet"),
    "SDXL's UNet": (
        shaped(**{CROSS: (8, 2048), IN: (8, 4, 3, 3)}),
        "does not contain a text encoder; set model.config",
    ),
    "SD3": (
        shaped(**{f"{UNET_PREFIX}joint_blocks.0.x_block.attn.proj.bias": (8,)}),
        f"is Stable Diffusion 3; {SUPPORTED}",
    ),
    "Flux": (shaped(**{"double_blocks.0.img_attn.proj.bias": (8,)}), f"is Flux; {SUPPORTED}"),
    "inpainting": (
        shaped(**{CROSS: (8, 768), IN: (8, 9, 3, 3)}),
        "is an inpainting or editing model, whose UNet has 9 input channels; give a text-to-image model",
    ),
    "bare UNet": (
        shaped(**{"input_blocks.0.0.weight": (8, 4, 3, 3)}),
        "is only the UNet of a model, without the prefix model.diffusion_model; give the full model",
    ),
    "diffusers' UNet": (
        shaped(**{"conv_in.bias": (8,), "down_blocks.0.resnets.0.conv1.bias": (8,)}),
        "is only the UNet of a model, with diffusers' names; save it",
    ),
    "VAE": (
        shaped(**{"first_stage_model.decoder.conv_in.bias": (8,)}),
        "is only an autoencoder; set model.vae to it, and model.base to a full model",
    ),
    "bare VAE": (
        shaped(**{"decoder.conv_in.bias": (8,), "encoder.down.0.block.0.conv1.bias": (8,)}),
        "is only an autoencoder",
    ),
    "text encoder": (
        shaped(**{"text_model.final_layer_norm.bias": (8,)}),
        "is only the text encoder of a model; give the full model",
    ),
    "something": (
        shaped(abc=(2,)),
        "is not a Stable Diffusion model: no tensor's name begins with model.diffusion_model. (its first tensor is",
    ),
    "other network": (
        shaped(**{f"{UNET_PREFIX}layers.0.weight": (2,)}),
        f"is not a Stable Diffusion model: it has no cross-attention to text; {SUPPORTED}",
    ),
    "nothing": ({}, "is not a Stable Diffusion model"),
    "SD2": (
        shaped(**{CROSS: (8, 1024), IN: (8, 4, 3, 3)}),
        "is Stable Diffusion 2.x, and does not say whether it predicts epsilon or v; set model.config",
    ),
    "own size": (
        shaped(**{CROSS: (8, 128), IN: (8, 4, 3, 3)}),
        "has a UNet for text embeddings of width 128, which is none of 768 (1.x), 1024 (2.x) or 2048 (XL); "
        "set model.config",
    ),
    "no text": (shaped(**{CROSS: (8, 768), IN: (8, 4, 3, 3)}), "does not contain a text encoder; set model.config"),
    "no VAE": (
        shaped(**{CROSS: (8, 768), f"{CLIP_PREFIX}final_layer_norm.bias": (8,)}),
        "does not contain an autoencoder; set model.vae to one, or",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_with_what_they_are(write, kind):
    tensors, line = REFUSED[kind]
    path = write(tensors)
    with pytest.raises(ValueError, match=f"^model.base '{re.escape(path)}' {re.escape(line)}") as refused:
        resolve_base(path)
    assert "\n" not in str(refused.value)


def test_a_full_sd1_file_needs_sd15s_configs_and_says_so_offline(write, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    names = {CROSS: (8, 768), f"{CLIP_PREFIX}final_layer_norm.bias": (8,), f"{VAE_PREFIX}decoder.conv_in.bias": (8,)}
    config = parse_config({"model": {"base": write(shaped(**names))}}, "here")
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert main(["plan", str(tmp_path / "run.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "safelight plan: model.config 'stable-diffusion-v1-5/stable-diffusion-v1-5' is not a folder on this machine"
    )
    assert line.endswith(
        "set model.config to a diffusers folder, for the configs, tokenizer and scheduler that model.safetensors lacks"
    )


def test_a_config_that_does_not_fit_the_file_is_refused(tensors, write, tmp_path):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "other"))
    for part, changes in (("unet", {"cross_attention_dim": 64}), ("text_encoder", {"vocab_size": 7})):
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    base = resolve_base(write(tensors), str(folder))
    with pytest.raises(
        ValueError,
        match=r"its UNet does not fit model\.config '.*other': .*attn2\.to_k\.weight is \(32, 128\), not \(32, 64\)",
    ):
        load_unet(base, 0)
    with pytest.raises(
        ValueError,
        match=r"its text encoder does not fit .*: .*token_embedding\.weight is \(1291, 128\), not \(7, 128\)",
    ):
        load_texts(base, "", 0)
    with pytest.raises(
        ValueError,
        match=r"model\.config 'x' is only for .* single \.safetensors file, and model\.base 'tiny' is not;",
    ):
        resolve_base("tiny", "x")
    with pytest.raises(ValueError, match=r"model\.config .* is not a diffusers folder: it has no model_index\.json"):
        resolve_base(write(tensors), str(tmp_path))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    with pytest.raises(ValueError, match=r"model\.config .* is a StableDiffusionInpaintPipeline; only Stable"):
        resolve_base(write(tensors), str(folder))


def test_missing_unexpected_and_quantized_tensors_are_refused(tensors, write):
    name = f"{UNET_PREFIX}middle_block.1.proj_in.weight"
    for changed, line in (
        (
            without(tensors, name),
            rf"its UNet does not fit model\.config 'tiny': it lacks 1 tensor, the first is {name}",
        ),
        (
            {**tensors, f"{UNET_PREFIX}label_emb.0.0.bias": torch.zeros(3)},
            r"its UNet does not fit model\.config 'tiny': it has 1 tensor more, the first is",
        ),
        ({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, rf"is quantized \({name} is F8_E4M3\)"),
    ):
        with pytest.raises(ValueError, match=line):
            load_unet(resolve_base(write(changed), "tiny"), 0)
        with pytest.raises(ValueError, match=line):
            check_unet(resolve_base(write(changed), "tiny"))


def test_a_truncated_or_missing_file_is_refused(tensors, write, tmp_path):
    path = Path(write(tensors))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged or not a safetensors file"):
        resolve_base(str(path), "tiny")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged or not a safetensors file"):
        resolve_base(str(path), "tiny")
    with pytest.raises(ValueError, match=r"none\.safetensors' does not exist"):
        resolve_base(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model"])
def test_a_file_of_another_format_is_refused_and_never_opened(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    with pytest.raises(
        ValueError, match=rf"{name}' is not a \.safetensors file; other formats can run code and are never opened"
    ):
        resolve_base(str(path))
    shutil.copy(path, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        resolve_base(str(tmp_path / "renamed.safetensors"))
    assert not (tmp_path / "opened").exists()
    pickle.loads(path.read_bytes()).close()
    assert (tmp_path / "opened").exists(), "the pickle of this test does nothing"


def test_only_the_requested_tensors_are_read_and_each_once(tensors, write):
    """Loading the UNet of a 4 GB file must not read the other parts."""
    path, names_read = write(tensors), []
    read = TensorFile.read

    def counting(file: TensorFile, name: str) -> torch.Tensor:
        names_read.append(name)
        return read(file, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFile, "read", counting)
        base = resolve_base(path, "tiny")
        assert names_read == []
        load_unet(base, 0)
    assert sorted(names_read) == sorted(name for name in load_file(path) if name.startswith(UNET_PREFIX))
