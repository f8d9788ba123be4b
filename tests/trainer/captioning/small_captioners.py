"""Captioners of every kind with random weights, small enough for tests, saved with real processors and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = (
    *("a", "red", "blue", "green", "circle", "square", "dog", "tree", "sky", "on", "over", "and", "photo", "of"),
    *("the", "grass", "sea", "old", "house", "bright", "dark", "cat", "sun", "moon", "hill", "road", "bird", "boat"),
)


def wordpieces(folder: Path, length: int = 64):
    """Return a BERT tokenizer, as BLIP has it."""
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    path = folder / "words.txt"
    path.write_text("\n".join(tokens))
    tokenizer = BertTokenizer(str(path), model_max_length=length)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def bytes_tokenizer(kind, extra=None, **special):
    """Return a byte-level BPE tokenizer of `kind` without merges, in which every word of WORDS is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special.values(), *alphabet]))}
    merges = []
    for word in WORDS:
        text = f"Ġ{word}"
        for end in range(2, len(text) + 1):
            if text[:end] not in vocabulary:
                vocabulary[text[:end]] = len(vocabulary)
                merges.append((text[: end - 1], text[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return kind(tokenizer_object=tokenizer, extra_special_tokens=extra or {}, **special)


def _save(folder: Path, model, processor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def lively(model, scale: float = 8.0, more: tuple[str, ...] = (), more_scale: float = 8.0):
    """Return a model whose random weights are large enough that its words depend on the picture.

    more: parts of the names of weights that are scaled by more_scale as well.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale * (more_scale if any(part in name for part in more) else 1))
    return model


def save_blip(folder: Path, seed: int = 0) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = wordpieces(folder)
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    config = BlipConfig(
        text_config={
            **size,
            **ids,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": 32,
            "max_position_embeddings": 64,
        },
        vision_config={**size, "image_size": 32, "patch_size": 8, "initializer_range": 0.02},
        projection_dim=16,
    )
    model = lively(BlipForConditionalGeneration(config), 8, ("crossattention",), 2)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    return _save(folder, model, processor)


def change_json(path: Path, **values) -> None:
    """Set values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save_blip2(folder: Path, seed: int = 0) -> Path:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, GPT2Tokenizer, OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = bytes_tokenizer(GPT2Tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**size, "image_size": 32, "patch_size": 8, "initializer_range": 0.02},
        qformer_config={**size, "encoder_hidden_size": 32, "vocab_size": 40},
        text_config=OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _save(folder, lively(Blip2ForConditionalGeneration(config)), processor)


def save_florence2(folder: Path, seed: int = 0) -> Path:
    from transformers import BartTokenizer, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = bytes_tokenizer(BartTokenizer, {"image_token": "<image>"}, **special)
    images = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, crop_size={"height": 64, "width": 64}
    )
    images.image_seq_length = 5
    processor = Florence2Processor(images, tokenizer)
    torch.manual_seed(seed)
    config = Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": len(tokenizer),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [8, 4],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "projection_dim": 32,
        },
        image_token_id=tokenizer.image_token_id,
    )
    return _save(
        folder,
        lively(Florence2ForConditionalGeneration(config), 4, ("encoder_attn", "vision_tower", "projector")),
        processor,
    )


def save_llava(folder: Path, seed: int = 0) -> Path:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, template = _chat_tokenizer(), "USER: <image>\n{{ messages[0]['content'][1]['text'] }} ASSISTANT:"
    images = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, crop_size={"height": 32, "width": 32}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **size, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **size, **_text_ids(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return _save(folder, lively(LlavaForConditionalGeneration(config)), processor)


def save_idefics3(folder: Path, seed: int = 0) -> Path:
    """A photo is cut into a number of tiles that depends on its shape: prompts of a batch differ in length."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer, template = _chat_tokenizer(), "User:<image>{{ messages[0]['content'][1]['text'] }}\nAssistant:"
    images = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config={**size, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **size, **_text_ids(tokenizer)},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, lively(Idefics3ForConditionalGeneration(config)), processor)


def _chat_tokenizer(extra=None):
    from transformers import PreTrainedTokenizerFast

    tokenizer = bytes_tokenizer(
        PreTrainedTokenizerFast, extra, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    names = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, *rows]})
    return tokenizer


def _text_ids(tokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def save_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Its processor reads videos, too; the size of its inputs follows the photograph's."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = _chat_tokenizer({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", **marks})
    tokenizer.chat_template = (
        "<|vision_start|><|image_pad|><|vision_end|>{{ messages[0]['content'][1]['text'] }} Assistant:"
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 8192}, patch_size=8, merge_size=2, temporal_patch_size=2
    )
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in marks.items()}
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
        text_config={
            **size,
            **_text_ids(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        **ids,
    )
    lively(Qwen2VLForConditionalGeneration(config)).eval().save_pretrained(folder)
    # as the hub has it: no processor_config.json
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    change_json(folder / "preprocessor_config.json", processor_class="Qwen2VLProcessor")
    return folder


SAVERS = {
    "blip": save_blip,
    "blip-2": save_blip2,
    "florence2": save_florence2,
    "llava": save_llava,
    "idefics3": save_idefics3,
    "qwen2_vl": save_qwen2_vl,
}
