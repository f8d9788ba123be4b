"""What a run records of its base at its start, so that a base that was moved or replaced is recognized.

Autoencoder and text encoders have no hash here: the rows of the cache are named by theirs, and a checkpoint by those
rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

from safelight.text import shortened
from safelight.trainer.models.base import Base, vae_config
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.weights import unet_fingerprint

# values of the noise schedule that are recorded, evenly spaced
NUM_ALPHAS = 8
# relative; versions of torch round differently
TOLERANCE = 1e-4
UNET, UNET_CONFIG = "unet", "unet_config"
# what the latents are scaled by and how they are noised
_TRAINING = ("scaling_factor", "prediction_type", "num_timesteps", "alphas_cumprod")


def base_record(base: Base, vae: str, seed: int, schedule: NoiseSchedule) -> dict:
    """Return the record, of values that JSON can hold. Reads the UNet's files. vae: model.vae. seed: the run's."""
    alphas = schedule.alphas_cumprod_T
    places = torch.linspace(0, len(alphas) - 1, NUM_ALPHAS).long()
    record = {
        UNET: unet_fingerprint(base, seed),
        UNET_CONFIG: base.config_of("unet"),
        "scaling_factor": vae_config(base, vae).get("scaling_factor"),
        "prediction_type": schedule.prediction_type,
        "num_timesteps": len(alphas),
        "alphas_cumprod": alphas[places].tolist(),
    }
    return json.loads(json.dumps(record))


def is_same_unet(before: Mapping, now: Mapping) -> bool:
    """Return whether a run's base has the UNet that it had at the run's start."""
    return before.get(UNET) == now[UNET]


def changed_training(before: Mapping, now: Mapping) -> str:
    """Return what has changed that decides how a checkpoint is trained on, in words; '' if nothing is known to.

    before: the record at the run's start, which may be anything. Values that only one of the two has do not count.
    """
    config, earlier = now[UNET_CONFIG], before.get(UNET_CONFIG)
    pairs = {name: (before[name], now[name]) for name in _TRAINING if name in before}
    if isinstance(earlier, dict):
        pairs |= {f"the UNet's {name}": (earlier[name], config[name]) for name in config if name in earlier}
    changed = ((name, was, is_now) for name, (was, is_now) in pairs.items() if not _is_equal(was, is_now))
    return next((f"{name} is {_shown(is_now)}, but was {_shown(was)}" for name, was, is_now in changed), "")


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if type(one) in (int, float) and type(other) in (int, float):
        return math.isclose(one, other, rel_tol=TOLERANCE)
    return type(one) is type(other) and one == other


def _shown(value: object) -> str:
    return shortened(json.dumps(value), 100)
