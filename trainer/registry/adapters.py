"""The registry of adapters: every value of `adapter.kind`, what of the model it trains. Does not import torch.

Training, checkpoints, sampling, export and the planner read this registry instead of comparing names. A new adapter is
a row here and a class that implements `Trained` (trainer/adapters/trained.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is.

    name: as in adapter.kind. help: its line in the config's help. implementation: the Trained, "module:class".
    """

    name: str
    help: str
    implementation: str


_SPECS = (
    AdapterSpec(
        name="none",
        help="the weights of the UNet themselves",
        implementation="safelight.trainer.adapters.full:FullFineTune",
    ),
)

ADAPTERS: dict[str, AdapterSpec] = {spec.name: spec for spec in _SPECS}


def help_text() -> str:
    """Return the help of adapter.kind, which describes each adapter."""
    return "What is trained. " + ";\n".join(f"{spec.name}: {spec.help}" for spec in _SPECS) + "."
