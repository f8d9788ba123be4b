"""The noise schedule, as pure functions over tensors: a_t = prod_{s <= t} (1 - beta_s), and what is predicted under it.

Noising and targets are in kernels/ops/noising.py, weights in kernels/ops/diffusion_loss.py.
Letters: B batch, C latent channels, H W latent height and width, T timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safelight.errors import UserError


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod_T: (T,) float32 a_t; prediction_type: epsilon | v_prediction.

    zero_terminal_snr: whether a_T is 0, so that the last timestep's input is nothing but noise.
    """

    alphas_cumprod_T: Tensor
    prediction_type: str
    zero_terminal_snr: bool = False

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod_T)

    def to(self, device: torch.device) -> NoiseSchedule:
        return replace(self, alphas_cumprod_T=self.alphas_cumprod_T.to(device))


def betas(kind: str, start: float, end: float, num: int) -> Tensor:
    """Return beta_t, (num,) float32. kind: linear, or scaled_linear, which is linear in the root.

    Raises UserError for another kind. Source: diffusers' DDPMScheduler.
    """
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32) ** 2
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float32)
    raise UserError(f"beta_schedule {kind!r} is not supported, only linear and scaled_linear are; use another base")


def rescale_zero_terminal_snr(alphas_cumprod_T: Tensor) -> Tensor:
    """Return a_t with a_T = 0 and a_1 kept. Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1."""
    root = alphas_cumprod_T.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


def make_schedule(scheduler_config: dict, prediction: str = "auto", zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Return the schedule of a diffusers scheduler config. prediction: auto takes the config's.

    zero_terminal_snr: rescale the schedule even if the config does not say so.

    Raises UserError if the config has betas or a prediction type that are not supported, in words that follow the
    config's name.
    """
    kind = scheduler_config.get("_class_name", "")
    if kind.startswith(("EDM", "FlowMatch")):
        raise UserError(f"its {kind} has a noise schedule of another kind, which is not supported; use another base")
    if scheduler_config.get("trained_betas") is not None:
        raise UserError("it has trained_betas, which are not supported, only a beta_schedule is; use another base")
    # the defaults are diffusers'
    beta = betas(
        scheduler_config.get("beta_schedule", "linear"),
        scheduler_config.get("beta_start", 0.0001),
        scheduler_config.get("beta_end", 0.02),
        scheduler_config.get("num_train_timesteps", 1000),
    )
    alphas_cumprod = torch.cumprod(1 - beta, dim=0)
    if not alphas_cumprod[-1] < alphas_cumprod[0] < 1:
        raise UserError("its noise schedule leaves no noise in the inputs of the UNet; use another base")
    if alphas_cumprod[-1] == 0:
        raise UserError(
            "its noise schedule leaves nothing of the image in the last inputs of the UNet; use another base"
        )
    prediction_type = scheduler_config.get("prediction_type", "epsilon") if prediction == "auto" else prediction
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"prediction type {prediction_type!r} is not supported; set loss.prediction to epsilon or v_prediction, "
            "whichever the base was trained with"
        )
    zero_terminal_snr = zero_terminal_snr or scheduler_config.get("rescale_betas_zero_snr", False)
    if zero_terminal_snr:
        if prediction_type == "epsilon":
            raise UserError(
                "zero_terminal_snr needs v_prediction: the input of the last timestep is the noise itself, so there is "
                "nothing to learn from predicting it; set loss.prediction to v_prediction, or use another base"
            )
        alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(alphas_cumprod, prediction_type, zero_terminal_snr)


def mse_per_sample(predicted_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """Return mean squared errors, (B,) float32, computed in fp32. mask_B1HW: weights of the pixels' errors."""
    errors = (predicted_BCHW.float() - target_BCHW.float()).square()
    return (errors if mask_B1HW is None else errors * mask_B1HW).mean(dim=(1, 2, 3))
