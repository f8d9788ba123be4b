"""A random Stable Diffusion 2.x of a few million parameters, as a diffusers folder."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from safelight.trainer.models.base import resolve_base, tiny_folder


def write_small_sd2(folder: Path, **scheduler) -> Path:
    """Write the model and return its folder: the tiny base with text width 1024 and v-prediction.

    scheduler: further values of its config that differ from the tiny base's.
    """
    shutil.copytree(tiny_folder(), folder)
    torch.manual_seed(1)
    config = resolve_base("tiny").config_of("unet")
    UNet2DConditionModel.from_config(
        {**config, "cross_attention_dim": 1024, "use_linear_projection": True}
    ).save_pretrained(folder / "unet")
    text = {
        **resolve_base("tiny").config_of("text_encoder"),
        "hidden_size": 1024,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
    }
    CLIPTextModel(CLIPTextConfig.from_dict(text)).save_pretrained(folder / "text_encoder")
    path = folder / "scheduler" / "scheduler_config.json"
    own = {**json.loads(path.read_text()), "prediction_type": "v_prediction", **scheduler}
    path.write_text(json.dumps(own))
    return folder
