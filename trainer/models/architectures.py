"""Configs for `model.base = "random:NAME"`: published architectures with untrained weights.

`sd15`, `sd21` and `sdxl` are Stable Diffusion 1.5, 2.1 and XL, with 859,520,964, 865,910,724 and 2,567,463,684
parameters in the UNet. `small` is a UNet that two CPU cores can train from scratch in an hour. The vocabulary size of a
text encoder comes from the tokenizer.
"""

from __future__ import annotations

from pathlib import Path

# what `safelight plan` knows without the model: names, and hub ids in lower case -> the key in RANDOM_MODELS. Variants
# of a model differ in their weights, and in settings that take no memory.
KNOWN_SHAPES = {
    "sd15": "sd15",
    "sd21": "sd21",
    "sdxl": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "benjamin-paine/stable-diffusion-v1-5": "sd15",
    **{f"compvis/stable-diffusion-v1-{n}": "sd15" for n in range(1, 5)},
    **{
        f"{owner}/stable-diffusion-2{version}": "sd21"
        for owner in ("stabilityai", "sd2-community")
        for version in ("", "-base", "-1", "-1-base")
    },
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-xl-base-0.9": "sdxl",
}


# shown for them
TITLES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "Stable Diffusion XL"}


def known_shapes(base: str) -> str:
    """Return the name in RANDOM_MODELS that has the shapes of a `model.base`, '' if none is known to.

    A folder or file of that name on this machine is not overridden.
    """
    return "" if Path(base).exists() else KNOWN_SHAPES.get(base.lower(), "")


_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    # Stable Diffusion's own values, which are not diffusers' defaults
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

_CROSS_BLOCKS = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}

_KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}

# CLIP ViT-L/14
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}

_SD15_UNET = {
    **_CROSS_BLOCKS,
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    # diffusers' name for the number of heads
    "attention_head_dim": 8,
}

RANDOM_MODELS: dict[str, dict[str, dict]] = {
    "sd15": {
        "unet": _SD15_UNET,
        "vae": {**_KL, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512},
        "text_encoder": _CLIP_L,
        "scheduler": _SCHEDULER,
    },
    "sd21": {
        "unet": {
            **_SD15_UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": {**_KL, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768},
        # the first 23 layers of OpenCLIP's ViT-H
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
        "scheduler": {**_SCHEDULER, "prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": {
            **_SD15_UNET,
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {
            **_KL,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
        },
        "text_encoder": _CLIP_L,
        # OpenCLIP ViT-bigG/14
        "text_encoder_2": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        "scheduler": _SCHEDULER,
    },
    "small": {
        "unet": {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "block_out_channels": [64, 128, 256],
            "cross_attention_dim": 256,
            "attention_head_dim": 8,
        },
        "vae": {**_KL, "block_out_channels": [32, 64, 128, 128], "layers_per_block": 1, "sample_size": 128},
        "text_encoder": {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "projection_dim": 256,
        },
        "scheduler": _SCHEDULER,
    },
}
