"""The models of a run, built for training: UNet, optimizer, averages, what reads captions, autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.kernels.unet.attention import AttentionChoice, attention_cases, choose_attention
from safelight.kernels.unet.patch import Patch
from safelight.trainer.adapters.text_encoders import WithTextEncoders, load_text_encoders
from safelight.trainer.adapters.trained import Trained
from safelight.trainer.distributed.sharded import gathered_weights
from safelight.trainer.distributed.world import World
from safelight.trainer.loading.dataset import Dataset
from safelight.trainer.loading.resolve import ResolvedRun
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder
from safelight.trainer.models.latent_codec import LatentCodec, load_codec
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.ema import Averages
from safelight.trainer.run_log.environment import recorded_attention
from safelight.trainer.run_log.metrics import reset_peak_memory
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import StepContext
from safelight.trainer.step.text_training import texts_in_step


@dataclass
class Models:
    """The UNet with its optimizer, and what sampling needs besides.

    ema: None without averages of the weights. codec: the autoencoder, which decodes samples; it is in host memory and
    moves to the GPU only to decode. patched: the layers that run on our kernels, None if they are off. encoder:
    the text encoders if the run trains them, also after that has ended, or a word; None for other runs.
    """

    trained: Trained
    context: StepContext
    ema: Averages | None
    codec: LatentCodec
    attention: AttentionChoice
    patched: Patch | None
    encoder: CaptionEncoder | None = None

    @contextmanager
    def shown(self, averages: bool = True) -> Iterator[None]:
        """Let every process have the weights that are validated, sampled or checked inside the block.

        averages: these instead of the weights, if the run keeps any. With distributed.shard all processes must enter
        the block; inside of it each may run as many forward passes as it likes.
        """
        with (
            self.ema.applied() if averages and self.ema is not None else nullcontext(),
            gathered_weights(self.context.unet),
        ):
            yield

    def whole_state(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """Yield what `live_state` returns, of all processes together: see UNetOptimizer.whole_state."""
        for part in (self.context.optimizer, self.ema, self.context.texts):
            if part is not None:
                yield from part.whole_state(world)

    def live_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides the weights and the unlogged steps. Live tensors, not copies."""
        kept = [part for part in (self.ema, self.context.texts) if part is not None]
        return {name: x for part in (self.context.optimizer, *kept) for name, x in part.live_state().items()}


def load_encoder(run: ResolvedRun) -> CaptionEncoder | None:
    """Return the text encoders that captions are read with inside the steps; None if they are encoded beforehand.

    Text encoders that are trained have the checkpoint's weights. A word that is trained has its first vectors.
    """
    if not run.config.reads_captions_in_step:
        return None
    encoder = load_caption_encoder(run.config, run.base, run.device)
    if run.checkpoint is not None and run.config.text_encoder.train:
        load_text_encoders(run.checkpoint, encoder.parts)
        encoder.take_fingerprint()
    return encoder


def build_models(run: ResolvedRun, dataset: Dataset, encoder: CaptionEncoder | None, world: World) -> Models:
    """Return the UNet on its device, ready to train, its optimizer, and the autoencoder.

    encoder: as `load_encoder` returned it.
    """
    unet = load_unet(run.base, run.user_config.run.seed).train()
    side = run.user_config.data.max_resolution // dataset.latent_factor
    attention = choose_attention(
        run.device,
        run.dtype,
        attention_cases(unet, (side, side)),
        setting=run.user_config.model.attention,
        batch=run.user_config.train.batch_size,
        previous=None if run.resume_step is None else recorded_attention(run.run_dir),
    )
    prepared = prepare_unet(unet, run.config, attention, run.device, run.dtype, world=world)
    # the peak of training must not include encoding, probing and loading
    reset_peak_memory(run.device)
    schedule = run.schedule.to(run.device)
    trained, texts = prepared.trained, None
    if encoder is not None:
        encoder = trained.reading(encoder)
        if run.config.text_encoder.train:
            trained = WithTextEncoders(trained, encoder.parts)
        if dataset.token_condition is None:
            encoder.move_home()
        else:
            zeros = encoder.token_ids([""])[0].to(run.device) if encoder.zeroes_empty_text else None
            family, leader = run.base.family, prepared.optimizer.loss_scale
            texts = texts_in_step(run.config, trained, family, encoder.parts, zeros, run.device, leader, world)
    loss = run.user_config.loss
    context = StepContext(unet, prepared.optimizer, schedule, dataset.scaling_factor, loss, texts, trained.dropout_key)
    for optimizer in (context.optimizer, context.text_optimizer):
        if optimizer is not None:
            optimizer.reduce_over(world, torch.float32 if run.config.train.accumulate_dtype == "fp32" else None)
    codec = load_codec(run.user_config, run.base, torch.device("cpu"), run.device)
    return Models(trained, context, prepared.ema, codec, attention, prepared.patched, encoder)
