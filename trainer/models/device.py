"""Resolves run.device, model.precision and model.vae_precision on this machine."""

from __future__ import annotations

import torch

from safelight.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


def pick_device(name: str) -> torch.device:
    """Return the device that run.device names, a GPU with its index. Raises UserError if there is no GPU for cuda."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch finds no CUDA device; use auto or cpu")
    # with the index: tensor.device reports cuda:0, which does not compare equal to cuda, and
    # torch.cuda.set_per_process_memory_fraction requires an index
    return torch.device("cuda", torch.cuda.current_device())


def pick_vae_dtype(precision: str, device: torch.device, allows_fp16: bool) -> torch.dtype:
    """Return the autoencoder's dtype. auto: fp16 on a GPU if the family's autoencoder allows it, else fp32.

    Raises UserError for bf16 on a GPU without it.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" and allows_fp16 else torch.float32
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError("model.vae_precision bf16: this GPU has no bf16 arithmetic; use fp16, fp32 or auto")
    return DTYPES[precision]


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the UNet's dtype. auto: fp32 on a CPU; on a GPU bf16 if it supports bf16 (cc >= 8.0), else fp16."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError("model.precision bf16: this GPU has no bf16 arithmetic; use fp16 or auto")
    return DTYPES[precision]
