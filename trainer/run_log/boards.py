"""Boards that show a run while it goes on: TensorBoard, and W&B if it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from safelight.broken_imports import message
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import to_toml
from safelight.trainer.run_log.names import SETTINGS, hparams_of

# (the board's name, the prompt, the picture)
Pictures = Sequence[tuple[str, str, Image.Image]]


class Board(Protocol):
    """What metrics are shown on. Its methods return soon, and never raise for what the board's own service does."""

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def write_images(self, step: int, pictures: Pictures) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def import_tensorboard() -> type:
    """Return TensorBoard's SummaryWriter. Raises UserError if it cannot be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    # whatever a broken installation raises
    except Exception as error:
        raise UserError(message("tensorboard", error)) from error
    return SummaryWriter


class TensorBoard:
    """Event files in RUN/tensorboard. step: from which on earlier events are hidden, as they are written again."""

    def __init__(self, run_dir: Path, config: Config, step: int):
        self._writer = import_tensorboard()(run_dir / "tensorboard", purge_step=step + 1)
        self._write_settings(config, max(0, step))

    def _write_settings(self, config: Config, step: int) -> None:
        """Write the settings as a text, and as the hyperparameters that TensorBoard compares runs by."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text(SETTINGS, "\n".join(f"    {line}" for line in to_toml(config).splitlines()), step)
        values = hparams_of(config.model_dump(by_alias=True, mode="json"))
        # numbers of 64 bits, such as a seed, are no float: they would lose their last digits
        values = {name: str(v) if type(v) is int and abs(v) > 2**53 else v for name, v in values.items()}
        # its add_hparams would make a second run of a run
        for summary in hparams(values, {"validation/loss/held_out": None, "train/loss": None}):
            self._writer.file_writer.add_summary(summary)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_images(self, step: int, pictures: Pictures) -> None:
        for tag, _, image in pictures:
            self._writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
