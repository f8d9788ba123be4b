"""Builds the modules of a model from their configs, on the meta device, and fills them with weights that were read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from safelight.errors import UserError, first_line
from safelight.trainer.families.original_layout import Shape


def build(make: Callable[[], nn.Module], source: object) -> nn.Module:
    """Return a module without memory for its weights. make: builds it from a config; source: names it in messages.

    Raises UserError if the library refuses the config.
    """
    try:
        with torch.device("meta"):
            return make()
    # values that are valid one by one may contradict each other, which the libraries notice in many ways
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{source}: no model can be built from its config ({reason}); use another model") from error


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Return the shape of each tensor of a module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def text_config(values: dict):
    """Return the CLIPTextConfig of a text encoder's checked config."""
    from transformers import CLIPTextConfig

    # named, so that transformers does not look for a kernel on the hub
    return CLIPTextConfig(**values, attn_implementation="sdpa")


def text_encoder_with(kind: type, config, state: dict[str, Tensor]) -> nn.Module:
    """Return a text encoder in fp32 on the CPU.

    kind: its class in transformers. config: a CLIPTextConfig. state: its state dict, in fp32.
    """
    # unlike load_state_dict, this also fills buffers that files do not contain; it opens no file
    return kind.from_pretrained(None, config=config, state_dict=state, torch_dtype=torch.float32)
