"""The registry of samplers: every value of `sample.sampler`. Does not import torch.

The config's choices, the axes of grids, prompt files and the parameters inside PNGs are made from these rows. To add
one: a row here, and its scheduler in `make_scheduler` (trainer/inference/sampling.py).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from safelight.errors import UserError

# how the steps' timesteps are spaced, as diffusers calls it
SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True)
class SamplerSpec:
    """What a sampler is.

    name: as in sample.sampler. title: A1111's name of it. help: its line in the config's help. schedule: A1111's
    schedule type for trailing timesteps, '' where A1111 has no choice of one. is_ancestral: whether every step adds
    noise. fixed_schedule: A1111's schedule type if the sampler has noise levels of its own, whatever the spacing.
    others: names that other programs give it.
    """

    name: str
    title: str
    help: str
    schedule: str = ""
    is_ancestral: bool = False
    fixed_schedule: str = ""
    others: tuple[str, ...] = ()


_SPECS = (
    SamplerSpec("ddim", "DDIM", "deterministic, needs more steps"),
    SamplerSpec(
        "dpm++",
        "DPM++ 2M",
        "DPM++ 2M, needs the fewest steps",
        schedule="SGM Uniform",
        others=("dpm++ 2m", "dpmsolver++", "dpmpp_2m", "dpm++ 2m sgm uniform"),
    ),
    SamplerSpec(
        "dpm++-karras",
        "DPM++ 2M",
        "the same with the noise levels of Karras et al. 2022",
        fixed_schedule="Karras",
        others=("dpm++ 2m karras", "dpm++_2m_k", "dpmpp_2m_karras"),
    ),
    SamplerSpec("euler", "Euler", "Euler's method", schedule="SGM Uniform", others=("k_euler",)),
    SamplerSpec(
        "euler-a",
        "Euler a",
        "Euler's method, and new noise at every step, keyed by the seed",
        schedule="SGM Uniform",
        is_ancestral=True,
        others=("k_euler_a", "euler_ancestral", "k_euler_ancestral"),
    ),
    SamplerSpec("unipc", "UniPC", "predictor and corrector, good with few steps", others=("uni_pc",)),
)

SAMPLERS: dict[str, SamplerSpec] = {spec.name: spec for spec in _SPECS}
# A1111's schedule type for spacings, where the sampler leaves the choice; none is like "leading"
_SCHEDULES = {"linspace": "Uniform", "leading": ""}


def help_text() -> str:
    """Return the help of sample.sampler, which describes each sampler."""
    return "Sampling algorithm. " + "; ".join(f"{spec.name}: {spec.help}" for spec in _SPECS) + "."


def title_of(sampler: str, spacing: str = "trailing") -> str:
    """Return what a reader calls a sampler: Euler a, DPM++ 2M Karras; the word itself if it is none."""
    spec = SAMPLERS.get(sampler)
    if spec is None:
        return sampler
    name = f"{spec.title} {spec.fixed_schedule}" if spec.fixed_schedule else spec.title
    return name if spacing == "trailing" or spec.fixed_schedule else f"{name} ({spacing})"


def schedule_type(sampler: str, spacing: str) -> str:
    """Return A1111's schedule type, '' if it has no such choice or no equal."""
    spec = SAMPLERS.get(sampler)
    if spec is None:
        return ""
    return spec.fixed_schedule or (_SCHEDULES.get(spacing, spec.schedule) if spec.schedule else "")


def sampler_named(word: str) -> str:
    """Return the name of the sampler that a word means, also as other programs write it. Raises UserError."""
    names = {_plain(name): spec.name for spec in _SPECS for name in (spec.name, *spec.others)}
    plain = _plain(word[:60])
    if plain in names:
        return names[plain]
    nearest = difflib.get_close_matches(plain, names, n=1)
    hint = f"the nearest is {names[nearest[0]]}; " if nearest else ""
    raise UserError(f"sampler {word.strip()[:60]!r} is unknown; {hint}use {', '.join(SAMPLERS)}")


def _plain(name: str) -> str:
    """Return a name as it is compared: case does not matter, nor whether words are joined by a space, - or _."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower())
