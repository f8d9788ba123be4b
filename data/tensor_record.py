"""Records of tensors that can be walked over without knowing their fields.

The loader, the copies to a GPU and CUDA graphs treat every batch alike, whatever a model family puts into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor


class TensorRecord:
    """Base of frozen dataclasses whose fields are tensors, None, tensor records, or plain values such as ids."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors of this record and of the records in it, in the order of the fields."""
        tensors: list[Tensor] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, TensorRecord):
                tensors.extend(value.tensors())
        return tensors

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the record with every tensor changed; all other values stay."""
        changed: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, TensorRecord):
                changed[field.name] = value.map(change)
        return dataclasses.replace(self, **changed)

    def __getitem__(self, rows: slice | list[int]) -> Self:
        """Return the record with some rows of every tensor's first dimension."""
        return self.map(lambda x: x[rows])


Record = TypeVar("Record", bound=TensorRecord)


def concatenate(records: Sequence[Record]) -> Record:
    """Return the records' tensors joined along the first dimension, other values as in the first record."""
    columns = iter(list(zip(*(record.tensors() for record in records), strict=True)))
    return records[0].map(lambda _: torch.cat(next(columns)))
