"""Detectors and CLIP with transformers' own classes: batches, 16 bits, names, and folders that come from anybody."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from safelight.errors import UserError
from safelight.trainer.tagging.categories import DEFAULT_CATEGORIES, parse_categories
from safelight.trainer.tagging.clip import Clip, embedding_of_row, row_of_embedding
from safelight.trainer.tagging.taggers import open_clip, open_detector
from tests.trainer.captioning.conftest import photo
from tests.trainer.captioning.small_captioners import change_json
from tests.trainer.tagging.conftest import CPU
from tests.trainer.tagging.small_models import SAVERS

PHOTOS = [photo(number) for number in range(5)]
# importing and building the others takes seconds
KINDS = [kind if kind in ("clip", "yolos") else pytest.param(kind, marks=pytest.mark.slow) for kind in SAVERS]
CLASSES = {
    "clip": "CLIPModel",
    "yolos": "YolosForObjectDetection",
    "detr": "DetrForObjectDetection",
    "rt_detr": "RTDetrForObjectDetection",
    "d_fine": "DFineForObjectDetection",
}


def opened(folder: Path):
    return (open_clip if folder.name == "clip" else open_detector)(str(folder))


def loaded(folder: Path):
    with opened(folder) as source:
        return source.build(CPU)


def model_of(tagger) -> torch.nn.Module:
    model = tagger.tagger.clip if hasattr(tagger.tagger, "clip") else tagger.tagger.find.__self__
    return model.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_single_photos_give(model_folder, kind):
    """The photos differ in shape: some kinds would shift boxes if they were padded to one."""
    tagger = loaded(model_folder(kind))
    assert type(model_of(tagger)).__name__ == CLASSES[kind]
    together, alone = tagger.look(PHOTOS), [tagger.look([image])[0] for image in PHOTOS]
    if kind == "clip":
        assert torch.allclose(torch.stack(together).float(), torch.stack(alone).float(), atol=1e-3)
        assert len({tuple(embedding.tolist()) for embedding in together}) == 5
    else:
        for boxes, single in zip(together, alone, strict=True):
            assert [box.name for box in boxes] == [box.name for box in single]
            assert [box.confidence for box in boxes] == pytest.approx([box.confidence for box in single], abs=1e-3)
        assert len({str(boxes) for boxes in together}) == 5
        assert all(0 <= box.left < box.right <= 1 for boxes in together for box in boxes)
        assert {box.name for boxes in together for box in boxes} <= {"dog", "cat", "spoon", "ghost"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_as_on_a_gpu(model_folder, kind, dtype, monkeypatch):
    module = "clip" if kind == "clip" else "detectors"
    monkeypatch.setattr(f"safelight.trainer.tagging.{module}.pick_dtype", lambda *_: dtype)
    tagger = loaded(model_folder(kind))
    assert next(model_of(tagger).parameters()).dtype == dtype
    assert len(tagger.look(PHOTOS[:2])) == 2
    tagger.tags(tagger.look(PHOTOS[:1])[0], DEFAULT_CATEGORIES, 0.1)


def test_clip_gives_the_probabilities_of_transformers(model_folder):
    """As CLIPModel itself computes them from pictures and texts, for each word of the categories."""
    categories = parse_categories("animal: dog, cat\nplant")
    folder, clip = model_folder("clip"), loaded(model_folder("clip"))
    model = CLIPModel.from_pretrained(folder).eval()
    processor = clip.tagger.clip.processor
    texts = [f"a photo of a {name}" for name in ("animal", "dog", "cat", "plant")]
    inputs = processor(text=texts, images=PHOTOS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image.softmax(dim=1)
    for seen, row in zip(clip.look(PHOTOS), expected, strict=True):
        tags = {tag.name: tag.weight - 1 for tag in clip.tags(seen, categories, 0)}
        assert tags["dog"] == pytest.approx(row[1].item(), abs=0.012)
        assert tags["cat"] == pytest.approx(row[2].item(), abs=0.012)
        assert tags["animal"] == pytest.approx(row[:3].sum().item(), abs=0.012)
        assert tags["plant"] == pytest.approx(row[3].item(), abs=0.012)


def test_an_embedding_is_kept_in_a_row(model_folder):
    (embedding,) = loaded(model_folder("clip")).look(PHOTOS[:1])
    row = json.loads(json.dumps(row_of_embedding(embedding)))
    assert torch.equal(embedding_of_row(row, 24), embedding)
    # another length; what is no base64; NaN
    for bad in (None, "", "A", "AAA=", "!!!!", "AH4A" * 16, row["embedding"][4:], f"{row['embedding']}AAAA", "A" * 999):
        assert embedding_of_row({"embedding": bad}, 24) is None


def test_a_word_longer_than_clips_texts_is_cut(model_folder):
    clip = loaded(model_folder("clip"))
    categories = parse_categories(f"{'a b c d e f g h i j k l m n o p q r s t'}: dog")
    assert clip.tags(clip.look(PHOTOS[:1])[0], categories, 0.01)


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder("yolos"), tmp_path / "yolos"))


def refused(opened) -> str:
    with pytest.raises(UserError) as error, opened:
        pass
    return str(error.value)


def test_models_of_another_kind_are_refused(model_folder, folder, tmp_path):
    message = refused(open_detector(str(model_folder("clip"))))
    assert "is of the kind 'clip', which finds no things in transformers; give a DETR" in message
    assert "is of the kind 'yolos', not a CLIP, which --tags needs" in refused(open_clip(str(folder)))
    assert "x.onnx' does not exist" in refused(open_detector(str(tmp_path / "x.onnx")))
    message = refused(open_detector("/no/where"))
    assert "--tags-from-detector '/no/where' is neither a folder on this machine nor a Hugging Face id" in message
    change_json(folder / "config.json", use_timm_backbone=True)
    assert "needs timm's layers" in refused(open_detector(str(folder)))


def test_classes_without_a_name_are_no_tags(folder):
    change_json(
        folder / "config.json", id2label={"0": "N/A", "1": "LABEL_1", "2": "7", "3": "a|b", "4": "x\x1b[2J" * 99}
    )
    names = loaded(folder).tagger.find.__self__.names
    assert names[:4] == ["", "", "", ""]
    assert len(names[4]) <= 60
    assert names[4].isprintable()
    change_json(folder / "config.json", id2label={str(number): f"LABEL_{number}" for number in range(5)})
    with pytest.raises(UserError, match="names none of its 5 class"):
        loaded(folder)


def test_a_folder_may_not_claim_more_than_its_files_hold_or_run_code(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    flag = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(flag)!r}, 'w')\nclass Model: pass\nclass Processor: pass\n")
    change_json(folder / "config.json", auto_map={"AutoModelForObjectDetection": "modeling.Model"})
    (processor,) = folder.glob("*processor*.json")
    change_json(processor, auto_map={"AutoImageProcessor": "modeling.Processor"})
    loaded(folder)
    assert not flag.exists()
    original = (folder / "config.json").read_text()
    for changes, message in (
        ({"num_hidden_layers": 3}, "describes .* weights, and its files have"),
        ({"hidden_size": 33}, "no model can be built|do not fit its config.json"),
        ({"num_detection_tokens": 10**9}, "num_detection_tokens is .*, over the limit"),
    ):
        change_json(folder / "config.json", **changes)
        with pytest.raises(UserError, match=message) as error:
            loaded(folder)
        assert "\n" not in str(error.value)
        (folder / "config.json").write_text(original)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="values that are not finite"):
        loaded(folder)


def test_a_picture_of_any_mode_is_looked_at(folder):
    tagger = loaded(folder)
    for mode in ("L", "RGBA", "P", "1"):
        assert len(tagger.look([Image.new(mode, (50, 40))])) == 1


def test_what_fails_after_the_first_picture_is_one_line_with_the_models_name(model_folder, monkeypatch):
    tagger, seen = loaded(model_folder("clip")), torch.zeros(8)

    def fail(*_, **__):
        raise TypeError("pow() of a str\nand more")

    monkeypatch.setattr(Clip, "embed_images", fail)
    monkeypatch.setattr(Clip, "embed_names", fail)
    for use in (lambda: tagger.look(PHOTOS), lambda: tagger.tags(seen, DEFAULT_CATEGORIES, 0.5)):
        with pytest.raises(UserError, match=r"clip: it .* \(pow\(\) of a str\); get this model again") as error:
            use()
        assert "\n" not in str(error.value)
