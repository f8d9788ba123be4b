"""What can be named as an extractor, what its features are, and what is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.features import transformers_features
from safelight.trainer.features.extractor import PictureModel
from safelight.trainer.features.latents import open_latents
from safelight.trainer.features.onnx_features import prepared
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.models.tensor_files import save_file
from tests.trainer.tagging.onnx_maker import info, model, node, tensor

CPU = torch.device("cpu")
SMALL_DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(**SMALL_DINO)).eval().save_pretrained(folder)
    images = BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    images.save_pretrained(folder)
    return folder


def check_rows(extractor, pictures: list[Image.Image]) -> np.ndarray:
    """Return the features of pictures, which are the same bit for bit one by one, together and in another order."""
    together = extractor.features(pictures)
    assert together.shape == (len(pictures), extractor.width)
    assert together.dtype == np.float32
    assert (together == np.concatenate([extractor.features([picture]) for picture in pictures])).all()
    assert (together[::-1] == extractor.features(pictures[::-1])).all()
    assert len(np.unique(together, axis=0)) == len(pictures)
    return together


@pytest.mark.long
def test_clip(model_folder, pictures):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = model_folder("clip")
    extractor = open_extractor(str(folder), CPU)
    found = check_rows(extractor, pictures)
    texts = ["a large red circle", "a blue square " * 40]
    words = extractor.text_features(texts)
    assert (words == np.concatenate([extractor.text_features([text]) for text in texts])).all()
    plain = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(texts[:1], return_tensors="pt")
    with torch.inference_mode():
        assert found == pytest.approx(plain.get_image_features(**pixels).pooler_output.numpy(), abs=1e-5)
        assert words[:1] == pytest.approx(plain.get_text_features(**tokens).pooler_output.numpy(), abs=1e-5)
    assert extractor.name == f"CLIP {folder}"


def test_dinov2_is_the_class_token(dino, pictures):
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    found = check_rows(open_extractor(str(dino), CPU), pictures)
    pixels = BitImageProcessorPil.from_pretrained(dino)(pictures, return_tensors="pt")
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(dino).eval()(**pixels).pooler_output
    assert found == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_tiny_captioner_is_at_hand(pictures):
    extractor = open_extractor("tiny", CPU)
    assert (extractor.name, extractor.width) == ("the built-in captioner", 128)
    check_rows(extractor, pictures)


def test_the_runs_own_latents(small_taesd, pictures):
    from diffusers import AutoencoderTiny

    codec = LatentCodec(AutoencoderTiny.from_pretrained(small_taesd).eval(), CPU)
    extractor = open_latents(codec)
    assert extractor.width == 4 * 16 * 16
    found = check_rows(extractor, pictures)
    # the second picture has the autoencoder's size
    pixels = torch.from_numpy(np.array(pictures[1])).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        assert found[1] == pytest.approx(codec.vae.encode(pixels).latents.flatten().numpy(), abs=1e-6)


@pytest.mark.parametrize("batch", [1, "n"])
def test_any_onnx_file(onnx_file, pictures, batch):
    extractor = open_extractor(str(onnx_file(batch)), CPU)
    found = check_rows(extractor, pictures)
    assert found == pytest.approx(
        np.stack([prepared(picture, 24, 16).mean(axis=(1, 2)) for picture in pictures]), abs=1e-5
    )
    twice = open_extractor(f"{onnx_file(batch)}#twice", CPU)
    assert twice.features(pictures) == pytest.approx(2 * found)
    assert twice.fingerprint != extractor.fingerprint
    assert open_extractor(str(onnx_file(batch, factor=3)), CPU).fingerprint != extractor.fingerprint


def test_an_onnx_file_without_a_size_gets_224():
    picture = Image.new("RGB", (448, 300), (255, 0, 0))
    pixels = prepared(picture, 224, 224)
    assert pixels.shape == (3, 224, 224)
    assert pixels[:, 100, 100] == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    # 300 px become 256, of which the centre 224 stay; at the left (448 * 256 / 300 - 224) / 2 px are cut off
    half = Image.new("RGB", (448, 300))
    half.paste((255, 255, 255), (224, 0, 448, 300))
    columns = prepared(half, 224, 224)[0, 50] > 0
    assert columns.tolist() == [False] * 112 + [True] * 112


REFUSED = {
    "two inputs' worth of pictures": {"batch": 2},
    "grey pictures": {"shape": (1, 1, 16, 16)},
    "too large": {"size": (16, 4096)},
    "no vector": {"outputs": (info("means", (1, 3, 1)),)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_onnx_files_that_are_no_extractors(onnx_file, name):
    with pytest.raises(UserError, match=r"means.onnx is (not used|damaged)") as error:
        open_extractor(str(onnx_file(**REFUSED[name])), CPU)
    assert "\n" not in str(error.value)


def test_an_output_that_is_not_there_is_named_with_those_that_are(onnx_file):
    with pytest.raises(UserError, match=r"no output 'logits' of .* its vectors are: means \(3\), twice \(3\)"):
        open_extractor(f"{onnx_file()}#logits", CPU)


def test_features_that_are_no_numbers(onnx_file):
    with pytest.raises(UserError, match="its features of a picture are not 3 finite numbers"):
        open_extractor(str(onnx_file(factor=float("nan"))), CPU)


@pytest.mark.parametrize("operator", ["Expand", "ConstantOfShape"])
def test_an_operator_that_makes_large_tensors_ends_at_the_memory_limit(tmp_path, operator):
    """8 GB of a picture that has 3 KB."""
    shape = tensor("shape", np.array([1, 3, 30_000, 22_000], dtype=np.int64))
    inputs = ("scalar", "shape") if operator == "Expand" else ("shape",)
    nodes = (
        node("ReduceMean", ("image",), ("scalar",)),
        node(operator, inputs, ("large",)),
        node("ReduceMax", ("large",), ("most",)),
        node("Add", ("scalar", "most"), ("sum",)),
        node("Flatten", ("sum",), ("vector",)),
    )
    content = model(nodes, (shape,), (info("image", (1, 3, 16, 16)),), (info("vector", (1, 1)),))
    (tmp_path / "large.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"large.onnx: it makes no features .*bfc_arena") as error:
        open_extractor(str(tmp_path / "large.onnx"), CPU)
    assert "\n" not in str(error.value)


def test_what_cannot_be_opened_is_one_line(tmp_path, small_taesd, monkeypatch):
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    for spec, message in (
        ("missing.onnx", "does not exist"),
        ("text.safetensors", "is no .safetensors file"),
        ("other.safetensors", "is not FID's Inception v3"),
        ("empty", "has no config.json"),
        ("other", "is of the kind 'bert', which is no feature extractor here"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_extractor(str(tmp_path / spec), CPU, "--embed")
        assert "\n" not in str(error.value)
        assert "--embed" in str(error.value) or "safetensors" in spec


def test_a_gpu_that_is_too_small_is_said(monkeypatch, model_folder):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(transformers_features, "_clip", full)
    with pytest.raises(UserError, match=r"does not fit the GPU's memory; .* add --device cpu"):
        open_extractor(str(model_folder("clip")), CPU)


def test_features_of_no_pictures():
    assert PictureModel("none", "0", 7, lambda image: np.zeros(7)).features([]).shape == (0, 7)


def test_lite0_knows_a_corgi(shared):
    file = shared / "weights" / "efficientnet_lite0" / "efficientnet_lite0.onnx"
    photo = Image.open(shared / "photos" / "dreambooth_071.jpg")
    logits = open_extractor(f"{file}#logits", CPU).features([photo])[0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    # the file's first line is "background", which the model lacks
    names = file.with_name("imagenet_labels.txt").read_text().splitlines()[1:]
    assert names[int(probabilities.argmax())].startswith("Pembroke")
    assert probabilities.max() > 0.4
