"""The untrained parts of the embedded bases: VAE, UNets, text encoders and tokenizer. Used by pretrain.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tools.tiny_base.words import WORDS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

NUM_TOKENS = 48
# width of the second text encoder of tiny-xl, and of its pooled embedding
XL_SECOND_WIDTH = 96


def make_vae() -> AutoencoderKL:
    """Return the untrained VAE: 4 px per latent, four latent channels, 0.7 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def make_unet() -> UNet2DConditionModel:
    """Return the untrained UNet: Stable Diffusion 1.5's block types, three levels, 3.2 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_v_unet() -> UNet2DConditionModel:
    """Return the UNet of make_unet() with linear projections and heads by level, as Stable Diffusion 2.x has them."""
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in make_unet().config.items() if not key.startswith("_")}
    return UNet2DConditionModel(**config | {"use_linear_projection": True, "attention_head_dim": [4, 4, 4]})


def make_xl_unet() -> UNet2DConditionModel:
    """Return the untrained tiny-xl UNet: SDXL's block types, 16 channels a head at every level, 3.8 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        cross_attention_dim=128 + XL_SECOND_WIDTH,
        # diffusers takes it as the number of heads
        attention_head_dim=[2, 4, 6],
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=XL_SECOND_WIDTH + 6 * 16,
    )


def _text_config(tokenizer: CLIPTokenizer, **settings: object):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )


FIRST_ENCODER = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}


def make_text_encoder(tokenizer: CLIPTokenizer, hidden_act: str = "quick_gelu") -> CLIPTextModel:
    """Return the untrained text encoder: two layers, width 128."""
    from transformers import CLIPTextModel

    layers = {"num_hidden_layers": 2, "hidden_act": hidden_act, "pad_token_id": tokenizer.pad_token_id}
    return CLIPTextModel(_text_config(tokenizer, **FIRST_ENCODER, **layers))


def make_xl_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Return the untrained text encoders of tiny-xl, three layers each, of which the next to last is used."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first = _text_config(tokenizer, **FIRST_ENCODER, num_hidden_layers=3, pad_token_id=tokenizer.pad_token_id)
    second = _text_config(
        tokenizer,
        hidden_size=XL_SECOND_WIDTH,
        intermediate_size=4 * XL_SECOND_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=XL_SECOND_WIDTH,
        hidden_act="gelu",
        pad_token_id=tokenizer.convert_tokens_to_ids("!"),
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Return a byte-level CLIP tokenizer whose merges are learned from the captions and a list of common words."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import CLIPTokenizer

    raw = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # every byte needs a token that ends a word, such as ",</w>", or a single punctuation mark would be unknown
    trainer = trainers.BpeTrainer(
        vocab_size=1600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    corpus = [text.replace(",", " , ") for text in captions] + [" ".join(WORDS)] * 4
    raw.train_from_iterator(corpus, trainer)
    learnt = json.loads(raw.to_str())["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_TOKENS)
