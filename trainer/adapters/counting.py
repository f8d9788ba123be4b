"""How many weights a run's checkpoints hold, counted from its settings without loading any."""

from __future__ import annotations

from safelight.trainer.adapters.trained import trained_of
from safelight.trainer.config.schema import Config
from safelight.trainer.models.base import Base
from safelight.trainer.models.weights import meta_texts, meta_unet


def num_saved_values(config: Config, base: Base) -> int:
    """Return how many weights a run's checkpoints hold: the UNet's or the adapter's, and those of text encoders that
    are trained."""
    modules = meta_texts(base).values() if config.text_encoder.train else ()
    tensors = [*trained_of(meta_unet(base), config).tensors().values(), *(p for m in modules for p in m.parameters())]
    return sum(tensor.numel() for tensor in tensors)
