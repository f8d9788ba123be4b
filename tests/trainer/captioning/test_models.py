"""Captioners of every kind, with transformers' own classes: what reaches them, and that batching changes nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor

from safelight.errors import UserError
from safelight.trainer.captioning.keyed_sampling import KeyedNucleus
from safelight.trainer.captioning.models import load_captioner
from safelight.trainer.captioning.options import Generation
from tests.trainer.captioning.conftest import CPU, photo
from tests.trainer.captioning.small_captioners import SAVERS, change_json

PHOTOS = [photo(number) for number in range(5)]
IDS = [11, 22, 33, 44, 55]
# importing and building the others takes seconds
KINDS = [kind if kind in ("blip", "idefics3") else pytest.param(kind, marks=pytest.mark.slow) for kind in SAVERS]
CLASSES = {
    "blip": "BlipForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "florence2": "Florence2ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_single_photos_give(captioner, kind):
    """The photos differ in shape: a kind whose prompt grows with the photo needs padding and its mask."""
    captioner = captioner(kind)
    assert type(captioner.model).__name__ == CLASSES[kind]
    assert type(captioner.processor.image_processor).__name__.endswith("Pil")
    for generation in (
        Generation(num_beams=3, max_new_tokens=10),
        Generation(num_beams=1, max_new_tokens=10, repetition_penalty=1.5, min_new_tokens=6),
        Generation(num_beams=1, max_new_tokens=10, top_p=0.9, seed=5),
    ):
        together = captioner.describe(PHOTOS, generation, IDS)
        alone = [captioner.describe([PHOTOS[i]], generation, [IDS[i]])[0] for i in range(5)]
        assert together == alone
        assert len({one.text for one in together}) > 1
        # neither the prompt nor the marks of the vocabulary
        assert not any(mark in one.text for one in together for mark in ("USER:", "Assistant:", "sentence"))
        assert not any(mark in one.text for one in together for mark in captioner.tokenizer.all_special_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_options_reach_the_decoder(captioner, kind, monkeypatch):
    """BLIP and BLIP-2 pass them on to a model of their own."""
    captioner, seen = captioner(kind), []
    make = GenerationMixin._get_logits_processor

    def spy(self, *args, **options):
        processors = make(self, *args, **options)
        seen.append((options.get("generation_config") or args[0], processors))
        return processors

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", spy)
    captioner.describe(PHOTOS[:1], Generation(num_beams=2, min_new_tokens=4, max_new_tokens=9, repetition_penalty=1.7))
    (config, processors) = seen[-1]
    by_kind = {type(processor): processor for processor in processors}
    assert (config.num_beams, config.do_sample, config.max_new_tokens) == (2, False, 9)
    assert by_kind[RepetitionPenaltyLogitsProcessor].penalty == 1.7
    assert by_kind[MinNewTokensLengthLogitsProcessor].min_new_tokens == 4
    assert KeyedNucleus not in by_kind
    captioner.describe(PHOTOS[:1], Generation(num_beams=1, max_new_tokens=3, top_p=0.5, seed=9), [7])
    assert isinstance(seen[-1][1][-1], KeyedNucleus)
    assert seen[-1][1][-1].top_p == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_as_on_a_gpu(captioner_folder, kind, dtype, monkeypatch):
    monkeypatch.setattr("safelight.trainer.captioning.models.pick_dtype", lambda *_: dtype)
    captioner = load_captioner(str(captioner_folder(kind)), CPU)
    # BLIP-2 keeps a part in fp32
    assert sum(p.numel() for p in captioner.model.parameters() if p.dtype == dtype) > 10_000
    said = captioner.describe(PHOTOS[:2], Generation(num_beams=2, max_new_tokens=6))
    assert all(one.num_tokens > 0 for one in said)
    captioner.describe(PHOTOS[:2], Generation(num_beams=1, max_new_tokens=6, top_p=0.9), IDS[:2])


def test_a_prompt_begins_blips_caption_and_is_not_part_of_it(captioner):
    captioner = captioner("blip")
    plain = captioner.caption(PHOTOS, Generation(max_new_tokens=8))
    asked = captioner.caption(PHOTOS, Generation(max_new_tokens=8, prompt="a photo of the old"))
    assert asked != plain
    assert not any(text.startswith("a photo of the old") for text in asked)


def test_a_sample_depends_on_its_photo_and_the_seed_alone(captioner):
    captioner = captioner("blip")
    generation = Generation(num_beams=1, max_new_tokens=10, top_p=0.95)
    forwards = captioner.caption([PHOTOS[0]] * 5, generation, IDS)
    assert captioner.caption([PHOTOS[0]] * 5, generation, IDS[::-1]) == forwards[::-1]
    assert len(set(forwards)) == 5
    assert captioner.caption([PHOTOS[0]] * 5, Generation(**{**generation.record(), "seed": 2}), IDS) != forwards


def test_the_nucleus_is_sampled_with_its_probabilities():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = KeyedNucleus(0.8, 1, range(2000))(None, scores.repeat(2000, 1)).argmax(dim=-1).tolist()
    frequencies = np.bincount(drawn, minlength=4) / 2000
    # 0.5 and 0.3 are the smallest set with 0.8
    assert frequencies[2] == frequencies[3] == 0
    assert abs(frequencies[0] - 0.625) < 0.03
    one = KeyedNucleus(0.01, 1, range(50))(None, scores.repeat(50, 1))
    assert one.argmax(dim=-1).tolist() == [0] * 50


def test_a_folder_as_the_first_blip_has_it(captioner, captioner_folder, tmp_path):
    """Written by transformers 4.26: image settings in a file of their own, generation settings among the model's."""
    folder = tmp_path / "model"
    shutil.copytree(captioner_folder("blip"), folder)
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "processor_config.json").unlink()
    (folder / "generation_config.json").unlink()
    images = {name: value for name, value in processor.items() if not name.endswith("_type")}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**images, "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor"})
    )
    change_json(
        folder / "tokenizer_config.json",
        **{"processor_class": "BlipProcessor", "tokenizer_class": "BertTokenizer", "special_tokens_map_file": None},
        model_max_length=10**30,
        name_or_path="/somewhere/else",
    )
    legacy = {
        **{"_name_or_path": "", "architectures": None, "add_cross_attention": False, "bad_words_ids": None},
        **{"begin_suppress_tokens": None, "cross_attention_hidden_size": None, "decoder_start_token_id": None},
        **{"diversity_penalty": 0.0, "do_sample": True, "early_stopping": False, "id2label": {"0": "LABEL_0"}},
        **{"length_penalty": 1.0, "max_length": 20, "min_length": 10, "num_beams": 7, "num_return_sequences": 2},
        **{"no_repeat_ngram_size": 1, "output_scores": False, "pruned_heads": {}, "repetition_penalty": 1.9},
        **{"temperature": 0.3, "top_k": 50, "torch_dtype": "float16", "torchscript": False, "use_bfloat16": False},
    }
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= legacy
    config["vision_config"] |= legacy
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16", "transformers_version": None}))
    captioned = load_captioner(str(folder), CPU)
    generation = Generation(num_beams=2, max_new_tokens=8)
    assert captioned.describe(PHOTOS, generation) == captioner("blip").describe(PHOTOS, generation)


def test_a_model_of_another_kind_is_refused(captioner_folder, tmp_path):
    shutil.copytree(captioner_folder("blip"), tmp_path / "model")
    for kind in ("bert", "nonsense", 7, None):
        change_json(tmp_path / "model" / "config.json", model_type=kind)
        with pytest.raises(UserError, match="does not describe pictures"):
            load_captioner(str(tmp_path / "model"), CPU)
