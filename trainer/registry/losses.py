"""The registry of losses: how errors are computed and weighted, and which timesteps are drawn. Does not import torch.

To add one: a row here, its parameters as settings of [loss] in trainer/config/schema.py, and its formula: that of a
kind or weighting in kernels/ops/diffusion_loss.py, that of a distribution of timesteps in
trainer/models/timesteps.py. The config's choices and the kernel's options are made from these rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A choice. name: as in the config and in LossOptions. help: its words in the config's help.

    parameters: the settings of [loss] that it uses -> the options of the kernel that they are.
    """

    name: str
    help: str
    parameters: dict[str, str] = field(default_factory=dict)


_HUBER = {"huber_delta": "delta", "huber_schedule": "delta_schedule"}


def _by_name(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


# how the error of one latent value is computed
KINDS = _by_name(
    Row("mse", "squared error"),
    Row("huber", "squared up to huber_delta and linear beyond, so that outliers count less", _HUBER),
    Row("pseudo_huber", "the same without a corner, which kohya calls huber", _HUBER),
    Row("mse_huber", "mse where there is much noise and huber where there is little, blended by timestep", _HUBER),
    Row("huber_mse", "the other way round", _HUBER),
)
# how the errors at different timesteps are weighted
WEIGHTINGS = _by_name(
    Row("none", "all equally"),
    Row("min_snr", "those with little noise less (Hang et al. 2023)", {"min_snr_gamma": "gamma"}),
    Row("p2", "the same with a smooth transition (Choi et al. 2022)", {"p2_gamma": "gamma"}),
    Row("debiased", "by 1 / sqrt(SNR) (Yu et al. 2023)"),
)
# how huber_delta depends on the timestep; the ones that do fall from 1
HUBER_SCHEDULES = _by_name(
    Row("constant", "huber_delta at every timestep"),
    Row("exponential", "from 1 without noise to huber_delta at the noisiest timestep, by a constant factor"),
    Row("snr", "the same, by the ratio of signal to noise, so that it falls early"),
)
# which timesteps are drawn; a row's parameters are read in trainer/models/timesteps.py
TIMESTEPS = _by_name(
    Row("uniform", "all equally often"),
    Row(
        "logit_normal",
        "those in the middle more often, the logit of the timestep being normal (Esser et al. 2024)",
        {"timestep_location": "", "timestep_scale": ""},
    ),
)

# a setting of [loss] -> the words before those on its choices, the choices, and the words after them
_SETTINGS = {
    "kind": ("Error of a latent value.", KINDS, ""),
    "huber_schedule": ("How huber_delta depends on the timestep.", HUBER_SCHEDULES, ""),
    "weighting": (
        "How much each timestep counts.",
        WEIGHTINGS,
        ";\nauto: min_snr if min_snr_gamma is above 0, else none",
    ),
    "timesteps": ("Which timesteps are drawn.", TIMESTEPS, ""),
}


def help_text(setting: str) -> str:
    """Return the help of a setting of [loss], which describes each of its choices."""
    before, rows, after = _SETTINGS[setting]
    return f"{before} " + ";\n".join(f"{row.name}: {row.help}" for row in rows.values()) + f"{after}."
