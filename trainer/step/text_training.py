"""Captions that are read inside the step: to train the text encoders together with the UNet, or a word's vectors.

Captions arrive as token ids. The text encoders' weights are fp32 and so is the arithmetic, whatever the UNet's
precision: they are small beside it, and an update at a learning rate of 5e-7 would be lost in 16-bit weights. Their
optimizer is another one of the UNet's kind, with its own learning rate. It clips by the norm of its own gradients, and
shares the UNet's loss scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.adapters.trained import Trained
from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.spread import text_sharers_of
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.families.conditioning import TextConditioning, TokenConditioning
from safelight.trainer.families.family import Family
from safelight.trainer.models.embeddings import read_ids
from safelight.trainer.optim.base import FollowedScale, LossScale
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer

# of the optimizer's state in a checkpoint
PREFIX = "text/"


@dataclass
class TextTraining:
    """The text encoders of a run while gradients pass through them.

    parts: by their folders in a model. optimizer: of their weights, None if they are frozen. unet_config: has what
    `Family.conditioning` reads. zeros_EN: token ids of the text whose row is all zeros, None if no text's is. vectors:
    of the words that are trained, (K, D) for each of the parts; None without such words.
    """

    family: Family
    parts: nn.ModuleDict
    optimizer: UNetOptimizer | None
    unet_config: Mapping
    clip_skip: int
    num_chunks: int
    zeros_EN: Tensor | None
    vectors: Mapping[str, Tensor] | None = None

    def conditioning(self, tokens: TokenConditioning) -> TextConditioning:
        """Return the UNet's conditioning, through which its gradient reaches the text encoders."""
        embeddings, pooled = [], None
        for number, (part, text_encoder) in enumerate(self.parts.items()):
            ids = tokens.ids_BEN[:, number].unflatten(1, (self.num_chunks, -1)).flatten(0, 1)
            own_KD = None if self.vectors is None else self.vectors[part]
            states, pooled = read_ids(self.family, text_encoder, ids, self.clip_skip, own_KD)
            embeddings.append(states.unflatten(0, (-1, self.num_chunks)).flatten(1, 2))
        if pooled is not None:
            pooled = pooled.unflatten(0, (-1, self.num_chunks))[:, 0]
        rows = self.family.text_row(torch.cat(embeddings, dim=2), pooled)
        if self.zeros_EN is not None:
            is_empty_B = (tokens.ids_BEN == self.zeros_EN).flatten(1).all(dim=1)
            rows = rows.masked_fill(is_empty_B.view(-1, *[1] * (rows.dim() - 1)), 0)
        return self.family.conditioning(self.unet_config, rows, tokens.sizes_B6)

    def whole_state(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """Yield what `live_state` returns, of all processes together: see UNetOptimizer.whole_state."""
        if self.optimizer is not None:
            for name, value in self.optimizer.whole_state(world):
                yield f"{PREFIX}{name}", value

    def live_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state for a checkpoint, without copies; nothing of frozen text encoders."""
        if self.optimizer is None:
            return {}
        return {f"{PREFIX}{name}": value for name, value in self.optimizer.live_state().items()}


def take_text_state(state: dict[str, Tensor], texts: TextTraining | None, trained_epochs: object = None) -> None:
    """Remove the text encoders' optimizer state from a checkpoint's, and load it if they are trained on.

    trained_epochs: the checkpoint's text_encoder.epochs. Raises UserError if they are trained and it has no state.
    """
    own = {name.removeprefix(PREFIX): state.pop(name) for name in list(state) if name.startswith(PREFIX)}
    if texts is None or texts.optimizer is None:
        return
    if not own:
        raise UserError(
            f"the text encoder was no longer trained in this checkpoint, but would be now; set text_encoder.epochs to "
            f"{trained_epochs}, as it was, and give the run more epochs than that, as it had"
        )
    texts.optimizer.load_state_tensors(own)


def texts_in_step(
    config: Config,
    trained: Trained,
    family: Family,
    parts: Mapping[str, nn.Module],
    zeros_EN: Tensor | None,
    device: torch.device,
    leader: LossScale,
    world: World = ALONE,
) -> TextTraining:
    """Return the text encoders that read captions inside the step: trained ones, or frozen ones that know new words.

    Other arguments: as for `train_texts`.
    """
    unet_config = trained.unet.config
    if config.text_encoder.train:
        return train_texts(config, family, parts, unet_config, zeros_EN, device, leader, world)
    return read_words(config, family, parts, unet_config, zeros_EN, trained.vectors)


def train_texts(
    config: Config,
    family: Family,
    parts: Mapping[str, nn.Module],
    unet_config: Mapping,
    zeros_EN: Tensor | None,
    device: torch.device,
    leader: LossScale,
    world: World = ALONE,
) -> TextTraining:
    """Return the training of text encoders, whose weights are fp32. leader: the UNet's loss scale.
    world: the processes that train the run together.

    Other arguments: as in TextTraining. device: where the weights are, or are moved to. Raises UserError for
    text_encoder.last_layers beyond the layers.
    """
    clip_skip = config.model.clip_skip
    mark(family, parts.values(), clip_skip, config.text_encoder.last_layers)
    module = nn.ModuleDict(parts)
    sharers = text_sharers_of(config, world)
    optimizer = make_optimizer(
        module, config.optimizer.for_fp32(), torch.float32, config.run.seed, device, sharers=sharers
    )
    optimizer.loss_scale = FollowedScale(leader)
    optimizer.buffers.dtype = config.train.accumulate_dtype
    if any(stage.accumulate > world.size for stage in config.stages()):
        optimizer.buffers.allocate()
    return TextTraining(family, module, optimizer, unet_config, clip_skip, config.data.caption_chunks, zeros_EN)


def read_words(
    config: Config,
    family: Family,
    parts: Mapping[str, nn.Module],
    unet_config: Mapping,
    zeros_EN: Tensor | None,
    vectors: Mapping[str, Tensor],
) -> TextTraining:
    """Return what reads captions with words whose vectors are trained; the text encoders are frozen.

    Arguments as in TextTraining.
    """
    module, num_chunks = nn.ModuleDict(parts).requires_grad_(False), config.data.caption_chunks
    return TextTraining(family, module, None, unet_config, config.model.clip_skip, num_chunks, zeros_EN, vectors)


def mark(family: Family, text_encoders: Iterable[nn.Module], clip_skip: int, last_layers: int) -> None:
    """Set requires_grad for the parameters to train. last_layers: as text_encoder.last_layers.

    What the embeddings do not depend on is not trained: weight decay alone would change it.
    """
    for text_encoder in text_encoders:
        text_encoder.requires_grad_(False)
        for part in _trained_parts(family, text_encoder, clip_skip, last_layers):
            part.requires_grad_(True)


def _trained_parts(family: Family, text_encoder: nn.Module, clip_skip: int, last_layers: int) -> Iterator[nn.Module]:
    inner = getattr(text_encoder, "text_model", text_encoder)
    num_layers, with_norm = family.read_parts(text_encoder, clip_skip)
    if last_layers > num_layers:
        raise UserError(
            f"text_encoder.last_layers {last_layers} is more than the {num_layers} layers that are read of a text "
            "encoder; use 0 to train them all"
        )
    if not last_layers:
        yield inner.embeddings
    yield from inner.encoder.layers[num_layers - (last_layers or num_layers) : num_layers]
    if with_norm:
        yield inner.final_layer_norm
    if hasattr(text_encoder, "text_projection"):
        yield text_encoder.text_projection
