"""Nucleus sampling whose draws are keyed by photo, so that a caption does not depend on the batch it is made in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from safelight.kernels.philox import Key, Purpose, words


class KeyedNucleus(LogitsProcessor):
    """Samples one token per row and leaves nothing else to choose from.

    transformers would draw all rows from one generator, so that a photo's caption would change with its neighbours.
    Here the n-th token of a photo is found with one uniform number of (seed, CAPTION_TOKEN, sample id, n), by inverting
    the cumulative distribution of the nucleus. Used with greedy generation, after all other processors.
    Nucleus: the smallest set of tokens with a probability of at least top_p (Holtzman et al. 2020, arXiv:1904.09751).
    """

    def __init__(self, top_p: float, seed: int, sample_ids: Sequence[int]):
        self.top_p, self._num_drawn = top_p, 0
        self._keys = [Key(seed, Purpose.CAPTION_TOKEN, sample_id) for sample_id in sample_ids]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) that are 0 for the chosen tokens and -inf for all others."""
        logits, order = scores.float().sort(descending=True, dim=-1, stable=True)
        probabilities = logits.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        # the first token always belongs to the nucleus, as nothing comes before it
        nucleus = probabilities.masked_fill(before >= self.top_p, 0)
        cumulative = nucleus.cumsum(dim=-1)
        draws = [words(key._replace(epoch=self._num_drawn), 1)[0] / 2**32 for key in self._keys]
        self._num_drawn += 1
        thresholds = torch.tensor(draws, dtype=torch.float32, device=scores.device)[:, None] * cumulative[:, -1:]
        chosen = (cumulative <= thresholds).sum(dim=-1, keepdim=True)
        last = (nucleus > 0).sum(dim=-1, keepdim=True) - 1
        token = order.gather(-1, torch.minimum(chosen, last))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0)
