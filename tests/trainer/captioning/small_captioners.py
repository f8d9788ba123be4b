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


def bytes_tokenizer(kind, **special):
    """Return a byte-level BPE tokenizer of `kind` without merges, in which every word of WORDS is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special.values(), *alphabet])}
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
    return kind(tokenizer_object=tokenizer, **special)


def _save(folder: Path, model, processor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def lively(model, scale: float = 8.0):
    """Return a model whose random weights are large enough that its words depend on the picture."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
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
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = lively(BlipForConditionalGeneration(config))
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    return _save(folder, model, processor)


def change_json(path: Path, **values) -> None:
    """Set values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
