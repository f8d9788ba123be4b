"""RUN/compare/index.json: the same prompts drawn from the same noise with the base and with checkpoints.

`safelight compare` and `safelight evaluate` write it, evaluation and the report read it. The pictures lie beside it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_ROWS = 5000
MAX_MODELS = 200

MAX_TEXT = 20_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
# a name in RUN/compare, checked again where it is opened
FileName = Annotated[str, Field(max_length=255)]
# of a model in the records of a run: "base", or "step-300"
ModelId = Annotated[str, Field(max_length=40, pattern=r"^(base|step-[0-9]{1,8})$")]
Count = Annotated[int, Field(ge=0, le=10**12)]


class Record(BaseModel):
    """A part of a record of a run: only its own fields, of their types, and finite numbers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ComparedModel(Record):
    """A model that drew a column. step: 0 for the base. weights: hash of its weights, '' if unknown.

    epoch: at which its training was saved.
    """

    id: ModelId
    step: Count
    epoch: Annotated[float, Field(ge=0, le=1e9)]
    weights: Annotated[str, Field(max_length=64)] = ""


class ComparedRow(Record):
    """A prompt and its pictures. place: of the prompt, which with the seed keys the noise.

    photo: the real photograph that has this caption, as the run's crop shows it, '' if the prompt is nobody's caption.
    held_out: whether it was held out of training. images: the picture of each model.
    cut_after: the end of what was read of a prompt that is too long.
    """

    prompt: Text
    place: Count
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    photo: FileName = ""
    held_out: bool = False
    cut_after: Text = ""
    images: dict[ModelId, FileName]


class Comparison(Record):
    """All columns and rows. The settings are those of every picture."""

    models: Annotated[tuple[ComparedModel, ...], Field(max_length=MAX_MODELS)]
    rows: Annotated[tuple[ComparedRow, ...], Field(max_length=MAX_ROWS)]
    width: Annotated[int, Field(ge=8, le=4096)]
    height: Annotated[int, Field(ge=8, le=4096)]
    num_steps: Annotated[int, Field(ge=1, le=10_000)]
    cfg: Annotated[float, Field(ge=0, le=1000)]
    sampler: Annotated[str, Field(max_length=40)]
    negative_prompt: Text = ""
