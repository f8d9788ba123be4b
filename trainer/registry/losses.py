"""The registry of losses: how a sample's error is computed and how it is weighted. Does not import torch.

To add one: a row here, its parameter as a setting of [loss] in trainer/config/schema.py if it has one, and its formula
in kernels/ops/diffusion_loss.py. The config's choices and the kernel's options are made from these rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """name: as in the config and in LossOptions. parameter: the setting of [loss] that it uses, "" for none."""

    name: str
    parameter: str = ""


# how the error of one latent value is computed
KINDS = {row.name: row for row in (Row("mse"), Row("huber", "huber_delta"))}
# how the errors at different timesteps are weighted
WEIGHTINGS = {
    row.name: row for row in (Row("none"), Row("min_snr", "min_snr_gamma"), Row("p2", "p2_gamma"), Row("debiased"))
}
