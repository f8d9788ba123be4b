"""What changes in the middle of a run: the settings of a stage, where it begins, and the text encoder's end."""

from __future__ import annotations

from dataclasses import replace

from safelight.text import counted
from safelight.trainer.adapters.counting import num_saved_values
from safelight.trainer.adapters.text_encoders import load_text_encoders
from safelight.trainer.checkpoint.files import (
    Position,
    check_files,
    folder_of,
    max_bytes_of,
)
from safelight.trainer.distributed.together import together
from safelight.trainer.loading.dataset import encode_batch_size
from safelight.trainer.loading.job import Job, train_subset_of
from safelight.trainer.loading.restore import load_state, no_best
from safelight.trainer.step.cuda_graphs import graph_capture


def enter_stage(job: Job, stage: int) -> None:
    """Let the following steps and checkpoints be as the settings of this stage say."""
    config, models = job.timeline.stages[stage].config, job.models
    job.saver.keep = config.save.keep
    if config.loss == models.context.loss:
        return
    models.context = replace(models.context, loss=config.loss)
    # the loss is part of what was captured
    job.capture.release()
    job.capture = graph_capture(models.context, with_graphs=not job.run.no_graphs)


def begin_from_best(job: Job, position: Position) -> Position:
    """Let a stage begin from the best checkpoint of the one before: its weights, optimizer state and averages.

    Steps and epochs count on. Raises UserError if that checkpoint is gone or damaged.
    """
    best, models, metrics = position.stage_best_step, job.models, job.progress.metrics
    stage = job.timeline.stage_of(position.epoch)
    if best != position.step:
        # the main process writes it
        with together(job.world):
            job.saver.wait()
        folder = folder_of(job.run.run_dir, best)
        if not (folder / "state.json").is_file():
            raise no_best(job.run, job.timeline, stage, f"{folder}, which is gone; put it back, or")
        check_files(folder, max_bytes=max_bytes_of(num_saved_values(job.run.config, job.run.base)))
        # what was captured reads tensors that loading may replace
        job.capture.release()
        load_state(job.run, models, best)
        if job.run.config.text_encoder.train:
            load_text_encoders(folder, models.encoder.parts)
            if models.context.texts is None:
                # they are no longer trained, and captions have been encoded by them
                _encode_captions(job)
        optimizer = models.context.optimizer
        if optimizer.is_fused:
            job.progress.count_skips_from(int(optimizer.num_skipped_tensors))
        job.capture = graph_capture(models.context, with_graphs=not job.run.no_graphs)
    loss = f"held-out loss {position.stage_best_loss:.5f}"
    detail = f"stage {stage + 1} begins from the checkpoint of step {best}, the best of stage {stage} ({loss})"
    job.progress.terminal.say(detail)
    # as `stage began`: under the number of the next step
    metrics.write("event", position.step + 1, event="stage begins from the best", detail=detail)
    return replace(position, began_from=best)


def stop_text_encoder(job: Job, position: Position) -> None:
    """If the text encoder is not trained from this position on: encode all captions by it, and take it off the GPU."""
    models = job.models
    if models.context.texts is None or job.run.config.reads_captions_in_step_at(position.epoch):
        return
    models.context = replace(models.context, texts=None)
    models.encoder.text_encoders.requires_grad_(False)
    _encode_captions(job)
    job.capture = graph_capture(models.context, with_graphs=not job.run.no_graphs)
    epochs = counted(position.epoch, "epoch")
    line = f"the text encoder has stopped training after {epochs}; captions have been encoded by it"
    job.progress.terminal.say(line)
    job.progress.metrics.write("event", position.step, event="text encoder stopped", detail=line)


def _encode_captions(job: Job) -> None:
    """Encode all captions by the text encoders as they are now, and take these off the GPU."""
    encoder = job.models.encoder
    encoder.take_fingerprint()
    with job.progress.clock_paused(), together(job.world):
        job.dataset.read_embeddings(encoder, encode_batch_size(job.run.device), job.progress.terminal.update)
        encoder.move_home()
    job.train_subset = train_subset_of(job.run.user_config, job.dataset)
