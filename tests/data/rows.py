"""The keys of a cache's rows and their contents, to compare caches, and a source of batches made from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safelight.data.batches import RowSource
from safelight.data.cache import empty_text_key
from safelight.data.tensor_record import TensorRecord

EMPTY = empty_text_key("text-a", "float16")


@dataclass(frozen=True)
class Text(TensorRecord):
    """Conditioning with text embeddings alone, the minimum."""

    text_BTD: Tensor


def source(cache, samples, empty_key: str = EMPTY) -> RowSource:
    return RowSource(cache, samples, empty_key, lambda rows, sizes: Text(rows))


def all_keys(samples):
    texts = {key for sample in samples for key in sample.text_keys} | {EMPTY}
    return sorted({key for sample in samples for key in sample.latent_keys}) + sorted(texts)


def contents(cache, keys):
    return {key: cache.read([key])[0].tobytes() for key in keys}
