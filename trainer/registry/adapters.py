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
    trains_word: whether the vectors of a word are trained and no weight of the model: UNet and text encoders are
    frozen, and captions, which have the word, are read inside the step.
    """

    name: str
    help: str
    implementation: str
    trains_word: bool = False


_SPECS = (
    AdapterSpec(
        name="none",
        help="the weights of the UNet themselves",
        implementation="safelight.trainer.adapters.full:FullFineTune",
    ),
    AdapterSpec(
        name="embedding",
        help="the vectors of a new word (textual inversion), see [embedding]; the model itself stays as it is",
        implementation="safelight.trainer.adapters.embedding:WordVectors",
        trains_word=True,
    ),
)

ADAPTERS: dict[str, AdapterSpec] = {spec.name: spec for spec in _SPECS}


def help_text() -> str:
    """Return the help of adapter.kind, which describes each adapter."""
    return "What is trained. " + ";\n".join(f"{spec.name}: {spec.help}" for spec in _SPECS) + "."
