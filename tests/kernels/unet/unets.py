"""Small UNets built like SD1.5's, SD2.1's and SDXL's, their inputs, and the results of a forward and backward pass."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from safelight.trainer.models.architectures import RANDOM_MODELS

_SMALL = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8, "cross_attention_dim": 24}
# the models' structure at a tenth of their width
CONFIGS = {
    "sd15": {
        **RANDOM_MODELS["sd15"]["unet"],
        **_SMALL,
        "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": 4,
    },
    "sd21": {
        **RANDOM_MODELS["sd15"]["unet"],
        **_SMALL,
        "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": [2, 4, 8, 8],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **_SMALL,
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4, 8],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


def one_block(width, heads, text):
    """Return the config of a UNet with one level: every kind of module once or twice."""
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [width],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "cross_attention_dim": text,
        "attention_head_dim": heads,
    }


def make(config, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).to(dtype).train()
    for name, p in unet.named_parameters():
        # non-trivial norms and biases
        if p.dim() == 1:
            nn.init.normal_(p, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
    return unet


def inputs_of(unet, dtype=torch.float32, sides=(16, 8), batch=2, text_grad=True):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {
        "sample": draw(batch, 4, *sides).requires_grad_(),
        "timestep": torch.tensor([3, 500, 999][:batch]),
        "encoder_hidden_states": draw(batch, 7, unet.config.cross_attention_dim).requires_grad_(text_grad),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": draw(batch, 16), "time_ids": draw(batch, 6) * 100}
    return inputs


def run(unet, inputs):
    """Return the output and all gradients by name."""
    y = unet(**inputs).sample
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    leaves = {"sample": inputs["sample"], "text": inputs["encoder_hidden_states"], **dict(unet.named_parameters())}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), up)
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def worst_error(results, truth):
    """Return the largest error of any tensor, relative to that tensor's largest value."""
    return max(
        ((results[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-12)).item() for name, x in truth.items()
    )
