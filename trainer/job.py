"""Loads a run: its dataset, its models, and the checkpoint it resumes from.

`load_job` reads top to bottom; each part is one function below it. resolve.py resolves and checks the settings first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from safelight.data.cache import Sample
from safelight.data.epochs import count_uses
from safelight.data.side_stream import SideStream
from safelight.errors import UserError
from safelight.kernels.unet.attention import AttentionChoice, attention_cases, choose_attention
from safelight.kernels.unet.patch import Patch
from safelight.text import counted, shortened
from safelight.trainer.adapters.counting import num_saved_values
from safelight.trainer.adapters.embedding import WordVectors
from safelight.trainer.adapters.text_encoders import WithTextEncoders, load_text_encoders
from safelight.trainer.adapters.trained import Trained
from safelight.trainer.checkpoint.changed_settings import changes_between, flattened, with_changes
from safelight.trainer.checkpoint.files import (
    MISFIT,
    Position,
    check_files,
    folder_of,
    load_checkpoint,
    max_bytes_of,
    read_identity,
    read_position,
)
from safelight.trainer.checkpoint.identity import as_begun
from safelight.trainer.checkpoint.saver import Saver
from safelight.trainer.config.schema import Config
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.dataset import Dataset, encode_batch_size, open_dataset
from safelight.trainer.disk_space import space_note
from safelight.trainer.inference.prompt_file import largest_size
from safelight.trainer.memory_plan.resolve_auto import describe
from safelight.trainer.memory_plan.static_bytes import static_bytes
from safelight.trainer.models.class_photos import SOURCE, is_class_image
from safelight.trainer.models.encoders import CaptionEncoder, LatentCodec, load_caption_encoder, load_codec
from safelight.trainer.models.placing import once_each
from safelight.trainer.models.weights import load_unet
from safelight.trainer.notes import memory_note, notes_of
from safelight.trainer.optim.ema import Averages, take_averages
from safelight.trainer.progress import Progress
from safelight.trainer.resolve import ResolvedRun, check_early, resolve_run
from safelight.trainer.run_log.boards import Board, TensorBoard
from safelight.trainer.run_log.environment import (
    BASE,
    CHANGES,
    EPOCH_ORDER,
    MEMORY_PLAN,
    SETTINGS,
    recorded,
    recorded_attention,
    recorded_start,
)
from safelight.trainer.run_log.metrics import Metrics, reset_peak_memory
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_log.unlogged_steps import UnloggedSteps, take_state
from safelight.trainer.run_log.wandb_board import WandbBoard
from safelight.trainer.run_start import write_start
from safelight.trainer.step.cuda_graphs import GraphCapture, graph_capture
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import StepContext
from safelight.trainer.step.text_training import TextTraining, read_words, take_text_state, train_texts
from safelight.trainer.step.validate import choose_subset
from safelight.untrusted import path_in, read_json_object

# resumes that environment.json holds the changes of
MAX_CHANGES = 200


@dataclass
class Models:
    """The UNet with its optimizer, and what sampling needs besides.

    ema: None without averages of the weights. codec: the autoencoder, which decodes samples; it is in host memory and
    moves to the GPU only to decode. patched: the layers that run on our kernels, None if they are off. encoder: the
    text encoders of a run that trains them, even after they have stopped, or a word; else None.
    """

    trained: Trained
    context: StepContext
    ema: Averages | None
    codec: LatentCodec
    attention: AttentionChoice
    patched: Patch | None
    encoder: CaptionEncoder | None = None

    def live_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides the weights and the unlogged steps. Live tensors, not copies."""
        kept = [part for part in (self.ema, self.context.texts) if part is not None]
        return {name: x for part in (self.context.optimizer, *kept) for name, x in part.live_state().items()}


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    unlogged: state of the steps that were not logged when the checkpoint was saved; None for a new run.
    num_skipped_tensors: how many tensor updates were skipped inside backward so far. is_grouped: whether an epoch
    trains all batches of a bucket in a row; a run keeps the order it began with.
    """

    position: Position
    unlogged: dict[str, Tensor] | None
    num_skipped_tensors: int
    is_grouped: bool


@dataclass
class Job:
    """Everything the training loop needs.

    capture: captures an epoch's CUDA graphs. transport: copies batches to the GPU ahead of time; None on a CPU.
    train_subset: training samples that are validated too, for comparison with the held-out ones. stop_requested:
    returns whether the user asked the run to stop. planned_size: (width, height) in px of the largest samples that were
    planned for. said_of_prompts: what was said last of an error in the prompt file.
    """

    run: ResolvedRun
    dataset: Dataset
    timeline: Timeline
    models: Models
    capture: GraphCapture
    transport: SideStream | None
    is_grouped: bool
    progress: Progress
    saver: Saver
    train_subset: list[Sample]
    stop_requested: Callable[[], bool]
    planned_size: tuple[int, int]
    said_of_prompts: str = ""


def load_job(
    config: Config, run_dir: Path, resume_step: int | None, terminal: Terminal, stop_requested: Callable[[], bool]
) -> tuple[Job | None, Position]:
    """Return the job and the position to start at: the checkpoint's at `resume_step`, or step 0 if that is None.

    The job is None if the run has no step left; nothing in its folder was changed then.
    """
    if resume_step is not None:
        given, config = config, as_begun(config, read_identity(run_dir, resume_step)[0])
        if given.data.upscale != config.data.upscale:
            terminal.say(f"data.upscale stays {config.data.upscale}, as when the run began")
        identity, position = read_identity(run_dir, resume_step)[0], read_position(run_dir, resume_step)
        config, cuts = with_changes(config, identity, position, run_dir)
        if cuts:
            terminal.say(f"from here on {'; '.join(cuts)}; resume with {run_dir / 'config.toml'} from now on")
    run = resolve_run(config, run_dir, resume_step)
    base_note = check_early(run)
    checkpoint = static_bytes(run.config, run.device, run.dtype).checkpoint
    device_type = run.device.type
    for note in (
        base_note,
        *notes_of(config, device_type),
        memory_note(config, device_type, run.plan),
        space_note(config, checkpoint),
    ):
        if note:
            terminal.say(f"note: {note}")
    encoder = _load_encoder(run)
    dataset = _load_dataset(run, encoder, terminal)
    ended = () if resume_step is None else read_position(run_dir, resume_step).ended
    timeline, identity = _timeline(run, dataset, ended), run.identity(dataset.train)
    if resume_step is not None:
        position = _checked_position(run, timeline)
        if position.step >= timeline.num_steps and not position.unmeasured:
            terminal.pause()
            dataset.cache.close()
            return None, position
    models = _build_models(run, dataset, encoder)
    start = _restore(run, models)
    metrics = _announce(run, dataset, timeline, models, start, terminal)
    saved_step = -1 if resume_step is None else resume_step
    max_samples = max(stage.batch_size * stage.accumulate for stage in timeline.stages)
    # a run that patience ended has logged the last steps of its checkpoint
    steps = start.unlogged if metrics.logged_step < start.position.step else None
    unlogged = UnloggedSteps(max_samples, run.device, steps)
    job = Job(
        run=run,
        dataset=dataset,
        timeline=timeline,
        models=models,
        capture=graph_capture(models.context, with_graphs=not run.no_graphs),
        transport=SideStream(run.device) if run.device.type == "cuda" else None,
        is_grouped=start.is_grouped,
        progress=Progress(run, timeline, metrics, terminal, unlogged, start.num_skipped_tensors),
        saver=Saver(run_dir, identity, config.save.keep, metrics.sync, terminal.say, run.device, saved_step),
        train_subset=_train_subset(config, dataset),
        stop_requested=stop_requested,
        planned_size=largest_size(run.user_config),
    )
    return job, start.position


def _timeline(run: ResolvedRun, dataset: Dataset, ended: tuple[tuple[int, int], ...]) -> Timeline:
    """Return the run's timeline. Raises UserError for stages that ended early and are not in its settings, or for a
    stage that is to begin from the best checkpoint while no photograph is held out."""
    config, num_stages = run.user_config, len(run.user_config.stages())
    if ended and ended[-1][0] >= num_stages:
        raise UserError(
            f"{run.checkpoint} has ended stage {ended[-1][0] + 1}, but the settings have only "
            f"{counted(num_stages, 'stage')}; resume with {run.run_dir / 'config.toml'}"
        )
    stages = config.stages()
    if not dataset.validation and any(s.start_from == "best" or s.config.validate_.patience for s in stages):
        raise UserError(
            "start_from 'best' and validate.patience need held-out loss, but no photograph is held out; raise "
            "data.validation_fraction, or set start_from to 'last' and validate.patience to 0"
        )
    return Timeline.of(config, dataset.train, ended)


def _load_encoder(run: ResolvedRun) -> CaptionEncoder | None:
    """Return the text encoder of a run that trains it, with the checkpoint's weights, or a word; None for other runs.

    The word has its first vectors.
    """
    if not run.config.reads_captions_in_step:
        return None
    encoder = load_caption_encoder(run.config, run.base, run.device)
    if run.checkpoint is not None and run.config.text_encoder.train:
        load_text_encoders(run.checkpoint, encoder.parts)
        encoder.take_fingerprint()
    return encoder


def _reads_captions_in_step(run: ResolvedRun, epoch: int) -> bool:
    """Return whether the run reads captions inside the step in an epoch: it trains the text encoder, or a word."""
    return run.config.trains_word or run.config.text_encoder.is_trained_at(
        epoch, sum(stage.epochs for stage in run.config.stages())
    )


def stop_text_encoder(job: Job, position: Position) -> None:
    """If the text encoder is not trained from this position on: encode all captions by it, and take it off the GPU."""
    models, encoder = job.models, job.models.encoder
    if models.context.texts is None or _reads_captions_in_step(job.run, position.epoch):
        return
    models.context = replace(models.context, texts=None)
    encoder.text_encoders.requires_grad_(False)
    encoder.take_fingerprint()
    terminal = job.progress.terminal
    with job.progress.clock_paused():
        job.dataset.read_embeddings(encoder, encode_batch_size(job.run.device), terminal.update)
        encoder.move_home()
    job.train_subset = _train_subset(job.run.user_config, job.dataset)
    job.capture = graph_capture(models.context, with_graphs=not job.run.no_graphs)
    epochs = counted(position.epoch, "epoch")
    line = f"the text encoder has stopped training after {epochs}; captions have been encoded by it"
    terminal.say(line)
    job.progress.metrics.write("event", position.step, event="text encoder stopped", detail=line)


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


def _describe_text(run: ResolvedRun, texts: TextTraining | None) -> str:
    """Return a line on the training of the text encoder, or of a word. texts: None if it has ended."""
    if run.config.trains_word:
        own, num = run.config.embedding, sum(x.numel() for x in texts.vectors.values())
        kind = "negative word" if own.negative else "word"
        return (
            f"the {kind} {own.word!r} is trained: {counted(own.vectors, 'vector')}, {num:,} values in fp32, begun as "
            f"{own.initial_text!r}; UNet and text encoder are frozen"
        )
    settings, num_epochs = run.config.text_encoder, sum(stage.epochs for stage in run.config.stages())
    last = settings.trained_epochs(num_epochs)
    if texts is None:
        return f"the text encoder has been trained until the end of epoch {last}"
    num = sum(p.numel() for p in texts.optimizer.parameters.values())
    end = f", until the end of epoch {last}" if last < num_epochs else ""
    return f"the text encoder is trained, too: {num:,} parameters, fp32, lr {settings.lr:g} {settings.schedule}{end}"


def _train_subset(config: Config, dataset: Dataset) -> list[Sample]:
    """Return training samples to validate on, as many as are held out."""
    num = min(config.validate_.max_images, len(dataset.validation) or 1)
    return choose_subset(dataset.trained_photos, num, config.run.seed)


def _load_dataset(run: ResolvedRun, encoder: CaptionEncoder | None, terminal: Terminal) -> Dataset:
    """Return the dataset, after encoding whatever its cache lacks. Raises UserError if it is not the checkpoint's."""
    check = None if run.resume_step is None else partial(_check_same_data, run)
    reads_tokens = encoder is not None and _reads_captions_in_step(run, _epoch_of(run))
    dataset = open_dataset(run.user_config, run.base, run.device, terminal.update, check, encoder, reads_tokens)
    terminal.pause()
    if dataset.num_damaged:
        terminal.say(f"{counted(dataset.num_damaged, 'damaged row')} in the cache re-encoded")
    for note in dataset.cut_notes:
        terminal.say(note)
    return dataset


def _epoch_of(run: ResolvedRun) -> int:
    """Return the epoch in which the run goes on."""
    return 0 if run.resume_step is None else read_position(run.run_dir, run.resume_step).epoch


def _build_models(run: ResolvedRun, dataset: Dataset, encoder: CaptionEncoder | None) -> Models:
    """Return the UNet on its device, ready to train, its optimizer, and the autoencoder.

    encoder: of a run that trains it, or a word.
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
    prepared = prepare_unet(unet, run.config, attention, run.device, run.dtype)
    # the peak of training must not include encoding, probing and loading
    reset_peak_memory(run.device)
    schedule = run.schedule.to(run.device)
    texts, trained = None, prepared.trained
    zeros = None
    if encoder is not None and encoder.zeroes_empty_text:
        zeros = encoder.token_ids([""])[0].to(run.device)
    if isinstance(trained, WordVectors):
        (first,) = encoder.embeddings
        trained.begin_as(first)
        encoder = encoder.knowing([trained.embedding])
        texts = read_words(run.config, run.base.family, encoder.parts, unet.config, zeros, trained.vectors)
    elif encoder is not None:
        trained = WithTextEncoders(trained, encoder.parts)
        if dataset.token_condition is None:
            encoder.move_home()
        else:
            leader = prepared.optimizer.loss_scale
            texts = train_texts(run.config, run.base.family, encoder.parts, unet.config, zeros, run.device, leader)
    loss = run.user_config.loss
    context = StepContext(unet, prepared.optimizer, schedule, dataset.scaling_factor, loss, texts, trained.dropout_key)
    codec = load_codec(run.user_config, run.base, torch.device("cpu"))
    return Models(trained, context, prepared.ema, codec, attention, prepared.patched, encoder)


def _check_same_data(run: ResolvedRun, dataset: Dataset) -> None:
    """Raise UserError if the dataset has changed since the checkpoint to resume from was saved."""
    if read_identity(run.run_dir, run.resume_step)[0].data != run.identity(dataset.train).data:
        raise UserError(
            f"{run.checkpoint} was trained on other photographs, captions, crops, masks or photo settings than "
            f"{run.user_config.data.path} has now{_changes(run, dataset)}; start a new run with --run.dir"
        )


def _changes(run: ResolvedRun, dataset: Dataset) -> str:
    """Return how many photographs were added, removed, or got other captions or masks, as ": 2 added (...)".

    '' if unknown. Call it before the cache is filled: a caption or mask that is not in it, of a photograph that is, was
    edited.
    """
    try:
        split = read_json_object(path_in(run.run_dir, "split.json"))
        before = {str(file): None for half in ("train", "validation") for file in split[half]}
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    now = {sample.photo.file: sample for sample in dataset.samples if not is_class_image(sample.photo)}
    kept = [sample for file, sample in now.items() if file in before]
    keys = [key for s in kept for key in (*s.latent_keys, *s.caption_keys, *s.mask_keys)]
    missing = set(dataset.cache.missing(keys))
    kept = [s for s in kept if missing.isdisjoint(s.latent_keys)]
    groups = {
        "added": [file for file in now if file not in before],
        "removed": [file for file in before if file not in now],
        "with other captions": [s.photo.file for s in kept if missing.intersection(s.caption_keys)],
        "with other masks": [s.photo.file for s in kept if missing.intersection(s.mask_keys)],
    }
    words = [f"{len(files)} {what} (first: {shortened(files[0])})" for what, files in groups.items() if files]
    return f": {', '.join(words)}" if words else ""


def _checked_position(run: ResolvedRun, timeline: Timeline) -> Position:
    """Return the position of the checkpoint to resume from. Raises UserError if the run's timeline has none such."""
    position = read_position(run.run_dir, run.resume_step)
    is_reached = timeline.holds(position.step, position.epoch, position.step_in_epoch, position.stage)
    latest = max(position.best_step, position.stage_best_step, position.began_from)
    if not is_reached or latest > position.step:
        raise UserError(
            f"{run.checkpoint} is damaged: {MISFIT} (step {position.step}, epoch "
            f"{position.epoch} and {position.step_in_epoch} steps, stage {position.stage}); move that folder away to "
            "resume from the checkpoint before it"
        )
    return position


def _restore(run: ResolvedRun, models: Models) -> Start:
    """Load the checkpoint to resume from, if any, and return where the run starts."""
    if run.resume_step is None:
        return Start(Position(), None, 0, is_grouped=not run.no_graphs)
    optimizer = models.context.optimizer
    unlogged, position = _load_state(run, models, run.resume_step)
    num_skipped_tensors = int(optimizer.num_skipped_tensors) if optimizer.is_fused else 0
    order = recorded(run.run_dir, EPOCH_ORDER) or {}
    return Start(position, unlogged, num_skipped_tensors, is_grouped=order.get("grouped", False))


def _recorded_changes(run: ResolvedRun, changes: list[str]) -> dict[str, list[str]]:
    """Return what environment.json holds of changed settings: the step of a resume -> what it changed.

    Of those before the checkpoint to resume from, and of this one.
    """
    before = recorded(run.run_dir, CHANGES) if run.resume_step is not None else None
    kept = {
        step: rows
        for step, rows in (before or {}).items()
        if step.isdecimal() and isinstance(rows, list) and all(isinstance(row, str) for row in rows)
    }
    kept = {step: rows for step, rows in kept.items() if int(step) <= (run.resume_step or 0)}
    if changes:
        step = str(run.resume_step)
        kept[step] = [*kept.get(step, []), *changes]
    return dict(list(kept.items())[-MAX_CHANGES:])


def _open_metrics(run: ResolvedRun, terminal: Terminal) -> Metrics:
    """Return the run's log and the boards that show it."""
    step, config = -1 if run.resume_step is None else run.resume_step, run.user_config
    boards: list[Board] = []
    if config.log.tensorboard:
        boards.append(TensorBoard(run.run_dir, config, step))
    if config.log.wandb is not False:
        boards.append(WandbBoard(run.run_dir, config, terminal.say))
    return Metrics(run.run_dir, step, boards)


def _load_state(run: ResolvedRun, models: Models, step: int) -> tuple[dict[str, Tensor], Position]:
    """Load a checkpoint's weights, optimizer state and averages; return its unlogged steps and its position."""
    state, position = load_checkpoint(run.run_dir, step, models.trained)
    try:
        unlogged = take_state(state)
        take_averages(state, models.ema)
        trained_epochs = read_identity(run.run_dir, step)[0].settings.get("text_encoder.epochs")
        take_text_state(state, models.context.texts, trained_epochs)
        models.context.optimizer.load_state_tensors(state)
    except UserError as error:
        raise UserError(f"{folder_of(run.run_dir, step)}: {error}") from error
    return unlogged, position


def begin_from_best(job: Job, position: Position) -> Position:
    """Let a stage begin from the best checkpoint of the one before: its weights, optimizer state and averages.

    Steps and epochs count on. Raises UserError if that checkpoint is gone or damaged.
    """
    best, models, metrics = position.stage_best_step, job.models, job.progress.metrics
    stage = job.timeline.stage_of(position.epoch)
    if best != position.step:
        job.saver.wait()
        folder = folder_of(job.run.run_dir, best)
        if not (folder / "state.json").is_file():
            raise UserError(
                f"stage {stage + 1} begins from the best checkpoint of stage {stage}, {folder}, which is gone; put it "
                f"back, or resume with --stage.{stage}.start-from last"
            )
        check_files(folder, max_bytes=max_bytes_of(num_saved_values(job.run.config, job.run.base)))
        # what was captured reads tensors that loading may replace
        job.capture.release()
        _load_state(job.run, models, best)
        if job.run.config.text_encoder.train:
            load_text_encoders(folder, models.encoder.parts)
            _encode_again(job)
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


def _encode_again(job: Job) -> None:
    """Encode all captions by the text encoder as it is now, if it is no longer trained."""
    models, encoder = job.models, job.models.encoder
    if models.context.texts is not None:
        return
    encoder.take_fingerprint()
    with job.progress.clock_paused():
        job.dataset.read_embeddings(encoder, encode_batch_size(job.run.device), job.progress.terminal.update)
        encoder.move_home()
    job.train_subset = _train_subset(job.run.user_config, job.dataset)


def _announce(
    run: ResolvedRun, dataset: Dataset, timeline: Timeline, models: Models, start: Start, terminal: Terminal
) -> Metrics:
    """Print what is about to start, write the files that describe the run, and return its open metrics log."""
    plan = [] if run.plan is None else [describe(run.plan)]
    graphs = f"no CUDA graphs: {run.no_graphs}" if run.no_graphs else "steps are replayed as CUDA graphs"
    for line in (*plan, graphs) if run.device.type == "cuda" else ():
        terminal.say(line)
    kernels = "kernels off" if models.patched is None else str(models.patched)
    notes = [str(models.attention), str(models.context.optimizer), *plan, graphs, kernels]
    if line := models.trained.describe():
        terminal.say(line)
        notes.append(line)
    if models.encoder is not None:
        line = _describe_text(run, models.context.texts)
        terminal.say(line)
        notes.append(line)
    if models.ema is not None:
        notes.append(f"validation, samples and exports use {models.ema}")
    records = {EPOCH_ORDER: {"grouped": start.is_grouped}, BASE: run.recorded_base or run.base_record}
    if run.plan is not None:
        records[MEMORY_PLAN] = run.plan.to_json()
    if run.resume_step is not None and (started := recorded_start(run.run_dir)):
        records["started"] = started
    before, settings = recorded(run.run_dir, SETTINGS), flattened(run.user_config)
    is_known = run.resume_step is not None and before is not None and "unreadable" not in before
    changes = changes_between(before, settings) if is_known else []
    records |= {SETTINGS: settings, CHANGES: _recorded_changes(run, changes)}
    run.run_dir.mkdir(parents=True, exist_ok=True)
    if note := write_start(run, dataset, timeline, models.context.unet, models.attention, notes, records):
        terminal.say(f"note: {note}")
    metrics = _open_metrics(run, terminal)
    if metrics.num_unreadable:
        terminal.say(f"{counted(metrics.num_unreadable, 'unreadable line')} of {metrics.path} left out")
    num_photos, num_held_out = len(dataset.trained_photos), len(dataset.validation)
    uses = count_uses(dataset.train, seed=run.user_config.run.seed, num_epochs=1)
    class_images = ""
    if num := len(dataset.class_images):
        num_drawn = sum(sample.photo.source == SOURCE for sample in dataset.class_images)
        class_images = f" beside {counted(num, 'class image')} ({num_drawn} drawn by the base)"
    how_often = "" if uses == num_photos else f", used {uses} times in the first epoch"
    terminal.say(
        f"{counted(num_photos, 'photograph')} to train on{class_images}{how_often}, {num_held_out} held out; "
        f"{counted(timeline.num_steps, 'step')} in {counted(timeline.num_epochs, 'epoch')}"
    )
    if dataset.tag_note:
        terminal.say(dataset.tag_note)
    if num_masks := sum(bool(sample.mask_keys) for sample in once_each(dataset.train)):
        weight = run.user_config.loss.mask_weight
        outside = f"errors weigh {weight:g}" if weight else "nothing is learned"
        terminal.say(f"{counted(num_masks, 'photograph')} with a mask, outside of which {outside}")
    terminal.say(str(models.attention))
    if run.resume_step is not None:
        position = start.position
        terminal.say(f"resumed at step {position.step}, epoch {position.epoch + 1}")
        metrics.write("event", position.step, event="resumed", detail=f"from {run.checkpoint.name}")
        if changes:
            metrics.write("event", position.step, event="settings changed", detail="; ".join(changes))
        trains_text = models.context.texts is not None
        checkpoint, stage = read_identity(run.run_dir, run.resume_step)
        for change in run.identity().changed_rates(checkpoint, stage, trains_text):
            terminal.say(change)
            metrics.write("event", position.step, event="learning rate changed", detail=change)
    return metrics
