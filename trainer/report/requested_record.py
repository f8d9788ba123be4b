"""RUN/samples/live/images.json: pictures that `safelight sample RUN --live` had a run draw while it trained.

trainer/inference/gallery.py writes it; the report reads what it shows of it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from safelight.trainer.report.comparison import Count, FileName, Record, Text

FOLDER = "samples/live"
NAME = f"{FOLDER}/images.json"
MAX_PICTURES = 100_000


class RequestedPicture(Record):
    """A picture and how it was drawn. step: at which training was."""

    model_config = ConfigDict(extra="ignore")

    file: FileName
    prompt: Text
    negative_prompt: Text = ""
    step: Count
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    cfg: Annotated[float, Field(ge=0, le=1000)]
    num_steps: Annotated[int, Field(ge=1, le=10_000)]
    sampler: Annotated[str, Field(max_length=40)]
    spacing: Annotated[str, Field(max_length=40)] = "trailing"
    cut_after: Text = ""


class Requested(Record):
    """All of them, in the order in which they were drawn."""

    images: Annotated[tuple[RequestedPicture, ...], Field(max_length=MAX_PICTURES)] = ()
