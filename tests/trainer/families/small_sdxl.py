"""A random Stable Diffusion XL of a few hundred thousand parameters, as a diffusers folder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safelight.trainer.models.base import tiny_folder

FIRST_WIDTH, SECOND_WIDTH, SIZE_WIDTH = 32, 64, 16


def write_small_sdxl(folder: Path, **scheduler) -> Path:
    """Write the model and return its folder. scheduler: values of its config that differ from SDXL's."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(tiny_folder() / "vae"),
        text_encoder=CLIPTextModel(_text_config(tokenizer, FIRST_WIDTH, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, SECOND_WIDTH, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer", pad_token="!"),
        unet=small_unet(),
        scheduler=EulerDiscreteScheduler(
            **{
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "steps_offset": 1,
                "timestep_spacing": "leading",
                **scheduler,
            }
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def small_unet() -> UNet2DConditionModel:
    """Return a UNet with all kinds of blocks that SDXL has, random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=FIRST_WIDTH + SECOND_WIDTH,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
        transformer_layers_per_block=[1, 1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=SECOND_WIDTH + 6 * SIZE_WIDTH,
    )


def _text_config(tokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
