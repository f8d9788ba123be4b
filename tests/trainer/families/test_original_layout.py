"""The original layout against the names in SD1.5's published file and against diffusers' converters, both ways."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from safelight.trainer.families.original_layout import (
    CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_layout,
    open_clip_layout,
    to_original,
    unet_layout,
    vae_layout,
)
from safelight.trainer.families.registry import FAMILIES
from safelight.trainer.inference.model_export import original_frozen
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_texts, load_unet, load_vae
from tests.trainer.families.small_sdxl import write_small_sdxl

META = torch.device("meta")


def parts(spec: str, device=META) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Return the UNet, autoencoder and text encoder of a base's configs, untrained."""
    base = resolve_base(spec)
    torch.manual_seed(0)
    with device:
        return (
            UNet2DConditionModel.from_config(base.config_of("unet")),
            AutoencoderKL.from_config(base.config_of("vae")),
            CLIPTextModel(CLIPTextConfig(**{"vocab_size": 50, **base.config_of("text_encoder")})),
        )


def original_shapes(shapes: dict[str, tuple], layout: dict) -> dict[str, tuple]:
    """Return the shapes of the original tensors by original name."""
    return {layout[name].name: layout[name].original_shape(tuple(shape)) for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def sd15_file() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the 1131 tensors of v1-5-pruned-emaonly.safetensors."""
    lines = (Path(__file__).parent / "sd15_original.txt").read_text().splitlines()
    return {name: tuple(map(int, shape.split("x"))) for name, shape in map(str.split, lines)}


@pytest.fixture(scope="module")
def sd15() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    unet, vae, _ = parts("random:sd15")
    with META:
        text_encoder = CLIPTextModel(CLIPTextConfig(**resolve_base("random:sd15").config_of("text_encoder")))
    return unet, vae, text_encoder


def test_the_committed_names_are_those_of_sd15(sd15_file):
    """Published counts and sizes; the 197th tensor of the text encoder has the position ids."""
    expected = {UNET_PREFIX: (686, 859_520_964), VAE_PREFIX: (248, 83_653_863), CLIP_PREFIX: (197, 123_060_480 + 77)}
    for prefix, (num, numel) in expected.items():
        sizes = [torch.Size(shape).numel() for name, shape in sd15_file.items() if name.startswith(prefix)]
        assert (len(sizes), sum(sizes)) == (num, numel)
    assert len(sd15_file) == 1131


def test_sd15_is_exported_with_the_original_names_and_shapes(sd15, sd15_file):
    unet, vae, text_encoder = (module.state_dict() for module in sd15)
    layout = unet_layout(unet, 2)
    ours = to_original(unet, layout) | original_frozen(FAMILIES["sd1"], vae, {"text_encoder": text_encoder})
    assert shapes_of(ours) == sd15_file
    assert original_shapes(shapes_of(unet), layout).items() <= sd15_file.items()
    assert ours[f"{CLIP_PREFIX}embeddings.position_ids"].tolist() == [list(range(77))]


def test_diffusers_reads_the_committed_names_as_sd15(sd15, sd15_file):
    """diffusers' converters find every tensor of the models, with its shape, and no other."""
    unet, vae, text_encoder = sd15
    file = {name: torch.empty(shape, device="meta") for name, shape in sd15_file.items()}
    assert shapes_of(convert_ldm_unet_checkpoint(file, unet.config)) == shapes_of(unet.state_dict())
    assert shapes_of(convert_ldm_vae_checkpoint(file, vae.config)) == shapes_of(vae.state_dict())
    text = shapes_of(convert_ldm_clip_checkpoint(file))
    assert text.pop("text_model.embeddings.position_ids") == (1, 77)
    bare = {name.removeprefix("text_model."): shape for name, shape in text.items()}
    assert bare == {n.removeprefix("text_model."): s for n, s in shapes_of(text_encoder.state_dict()).items()}


@pytest.mark.parametrize("spec", ["tiny", "random:small"])
def test_every_tensor_comes_back_through_diffusers(spec):
    """Compares values too: two swapped tensors of equal shape would silently change the model."""
    unet, vae, text_encoder = (module.state_dict() for module in parts(spec, torch.device("cpu")))
    # make tensors distinguishable, because new norms and biases are all zeros or ones
    for state in (unet, vae, text_encoder):
        for number, tensor in enumerate(state.values()):
            tensor.add_(number)
    unet_config, vae_config = (resolve_base(spec).config_of(part) for part in ("unet", "vae"))
    read = {
        "unet": convert_ldm_unet_checkpoint(
            to_original(unet, unet_layout(unet, unet_config["layers_per_block"])), unet_config
        ),
        "vae": convert_ldm_vae_checkpoint(to_original(vae, vae_layout(vae)), vae_config),
        "clip": convert_ldm_clip_checkpoint(to_original(text_encoder, clip_layout(text_encoder))),
    }
    read["clip"] = {name.removeprefix("text_model."): tensor for name, tensor in read["clip"].items()}
    for actual, expected in zip(read.values(), (unet, vae, text_encoder), strict=True):
        assert actual.keys() == {name.removeprefix("text_model.") for name in expected}
        assert all(torch.equal(actual[name.removeprefix("text_model.")], tensor) for name, tensor in expected.items())


def test_open_clip_stacks_query_key_and_value():
    text_encoder = parts("tiny", torch.device("cpu"))[2]
    state = text_encoder.state_dict()
    original = to_original(state, open_clip_layout(state))
    width = text_encoder.config.hidden_size
    assert original["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (3 * width, width)
    assert shapes_of(original) == original_shapes(shapes_of(state), open_clip_layout(state))
    read = convert_open_clip_checkpoint(text_encoder, original)
    read = {name.removeprefix("text_model."): tensor for name, tensor in read.items()}
    assert read.keys() == {name.removeprefix("text_model.") for name in state}
    assert all(torch.equal(read[name.removeprefix("text_model.")], tensor) for name, tensor in state.items())


def test_an_unknown_tensor_name_raises():
    with pytest.raises(KeyError):
        unet_layout(["class_embedding.linear_1.weight"], 2)


def test_sdxl_is_exported_with_the_original_names():
    """Counts and sizes of sd_xl_base_1.0."""
    base = resolve_base("random:sdxl")
    with META:
        unet = UNet2DConditionModel.from_config(base.config_of("unet")).state_dict()
        vae = AutoencoderKL.from_config(base.config_of("vae")).state_dict()
        first = CLIPTextModel(CLIPTextConfig(**base.config_of("text_encoder"))).state_dict()
        second = CLIPTextModelWithProjection(CLIPTextConfig(**base.config_of("text_encoder_2"))).state_dict()
        states = {"text_encoder": first, "text_encoder_2": second}
        ours = to_original(unet, unet_layout(unet, 2)) | original_frozen(base.family, vae, states)
    counts = {
        UNET_PREFIX: (1680, 2_567_463_684),
        VAE_PREFIX: (248, 83_653_863),
        SDXL_CLIP_PREFIX: (197, 123_060_480 + 77),
        # CLIPTextModelWithProjection has no logit scale
        SDXL_OPEN_CLIP_PREFIX: (390, 694_659_840 + 1),
    }
    for prefix, (num, numel) in counts.items():
        found = [tensor.numel() for name, tensor in ours.items() if name.startswith(prefix)]
        assert (len(found), sum(found)) == (num, numel)
    assert len(ours) == 2515


def test_diffusers_reads_every_tensor_of_sdxl(tmp_path):
    """Compares values too, through diffusers' converters."""
    base = resolve_base(str(write_small_sdxl(tmp_path / "base")))
    unet = load_unet(base, 0).state_dict()
    (_, first), (_, second) = load_texts(base, "", 0)
    states = {"text_encoder": first.state_dict(), "text_encoder_2": second.state_dict()}
    vae = load_vae(base, "", 0).state_dict()
    original = to_original(unet, unet_layout(unet, 1)) | original_frozen(base.family, vae, states)
    read = convert_ldm_unet_checkpoint(original, base.config_of("unet"))
    assert read.keys() == unet.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in unet.items())
    clip = convert_ldm_clip_checkpoint(original, remove_prefix="conditioner.embedders.0.transformer.")
    clip.pop("text_model.embeddings.position_ids")
    open_clip = convert_open_clip_checkpoint(second, original, prefix="conditioner.embedders.1.model.")
    for found, state in ((clip, states["text_encoder"]), (open_clip, states["text_encoder_2"])):
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        assert found.keys() == {name.removeprefix("text_model.") for name in state}
        assert all(torch.equal(found[name.removeprefix("text_model.")], tensor) for name, tensor in state.items())
