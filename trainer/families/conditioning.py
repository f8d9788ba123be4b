"""Conditioning: a UNet's inputs other than the noisy latents and the timestep, one record per kind.

Letters: B batch, T tokens, D embedding, P pooled embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.data.tensor_record import TensorRecord
from safelight.errors import UserError


@dataclass(frozen=True)
class TextConditioning(TensorRecord):
    """The embeddings of the captions: the only conditioning of Stable Diffusion 1.x and 2.x."""

    text_BTD: Tensor

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the keyword arguments for diffusers' UNet2DConditionModel. dtype: the UNet's, for embeddings."""
        return {"encoder_hidden_states": self.text_BTD.to(dtype)}


@dataclass(frozen=True)
class TokenConditioning(TensorRecord):
    """Captions that the step's text encoders have yet to read, while they are trained.

    ids_BEN: token ids for each of the E text encoders, int64. sizes_B6: as in SdxlConditioning.
    """

    ids_BEN: Tensor
    sizes_B6: Tensor


def token_conditioning(vocab_sizes: Sequence[int], ids_BEN: Tensor, sizes_B6: Tensor) -> TokenConditioning:
    """Return the captions of a batch as token ids. vocab_sizes: of each text encoder, with the vectors of own words.

    Raises UserError for an id that an encoder does not have, at which a GPU would stop working.
    """
    for number, vocab_size in enumerate(vocab_sizes):
        ids = ids_BEN[:, number]
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(
                "the cache's token ids are not of this text encoder: someone else wrote them; delete the dataset's "
                "cache folder, which is filled again"
            )
    return TokenConditioning(ids_BEN, sizes_B6)


@dataclass(frozen=True)
class SdxlConditioning(TextConditioning):
    """SDXL's additional conditioning: the second encoder's pooled embedding, and sizes in px.

    sizes_B6: original height and width, top and left of the crop, target height and width. They stay float32, because
    bfloat16 cannot tell 1021 px from 1024 px.
    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """

    pooled_BP: Tensor
    sizes_B6: Tensor

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        added = {"text_embeds": self.pooled_BP.to(dtype), "time_ids": self.sizes_B6}
        return {**super().unet_arguments(dtype), "added_cond_kwargs": added}
