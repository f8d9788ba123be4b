"""The embedded tiny-v base, of Stable Diffusion 2.x's kind: v-prediction with zero terminal SNR, linear projections.

It starts with the tiny base's weights: a 1x1 convolution that becomes a linear layer keeps its values, and the text
encoder's GELU is nearly the quick one that its weights were trained with. Source of the noise schedule: Lin et al.
2023, arXiv:2305.08891.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safelight.trainer.models.base import tiny_folder
from tools.tiny_base.architecture import make_text_encoder, make_v_unet
from tools.tiny_base.tiny import NUM_SCENES, make_scenes, train_and_write
from tools.tiny_base.training import Log, encode_all, log_models

UNET_STEPS, UNET_LR = 2000, 1e-3


def linear_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return a UNet's weights with the attentions' 1x1 projections, (F, C, 1, 1), as linear layers' (F, C)."""
    weights = unet.state_dict()
    return {
        name: w[:, :, 0, 0] if name.endswith(("proj_in.weight", "proj_out.weight")) else w
        for name, w in weights.items()
    }


def make_scheduler() -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule, rescaled to zero terminal SNR."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def pretrain(work: Path, out: Path, log: Log) -> None:
    """Fine-tune the tiny base to v-prediction and write the pipeline."""
    base = tiny_folder()
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    unet, text_encoder = make_v_unet(), make_text_encoder(tokenizer, "gelu")
    unet.load_state_dict(linear_weights(UNet2DConditionModel.from_pretrained(base / "unet")))
    text_encoder.load_state_dict(CLIPTextModel.from_pretrained(base / "text_encoder").state_dict())
    images, captions = make_scenes()
    log.write(stage="data", scenes=NUM_SCENES)
    log_models(log, len(tokenizer), {"vae": vae, "unet": unet, "text_encoder": text_encoder})
    latents = encode_all(vae, images)
    log.write(stage="latents")
    parts = vae, unet, text_encoder, tokenizer
    train_and_write(parts, captions, latents, make_scheduler(), UNET_STEPS, UNET_LR, work, out, log)
