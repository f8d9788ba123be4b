"""What a run says and records when it starts: settings, notes, what is trained, on which photographs."""

from __future__ import annotations

from safelight.data.epochs import count_uses
from safelight.text import counted
from safelight.trainer.checkpoint.changed_settings import changes_between, flattened
from safelight.trainer.checkpoint.files import (
    read_identity,
)
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.distributed.world import World, in_turn
from safelight.trainer.loading.dataset import Dataset
from safelight.trainer.loading.models import Models
from safelight.trainer.loading.resolve import ResolvedRun
from safelight.trainer.loading.restore import Start
from safelight.trainer.loading.run_start import write_start
from safelight.trainer.memory_plan.resolve_auto import describe
from safelight.trainer.models.class_photos import SOURCE
from safelight.trainer.models.placing import once_each
from safelight.trainer.run_log.boards import Board, TensorBoard
from safelight.trainer.run_log.environment import (
    AUTOENCODER,
    BASE,
    CHANGES,
    EPOCH_ORDER,
    MEMORY_PLAN,
    SETTINGS,
    recorded,
    recorded_start,
)
from safelight.trainer.run_log.metrics import Metrics
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_log.wandb_board import WandbBoard
from safelight.trainer.step.text_training import TextTraining

# resumes that environment.json holds the changes of
MAX_CHANGES = 200


def announce(
    run: ResolvedRun,
    dataset: Dataset,
    timeline: Timeline,
    models: Models,
    start: Start,
    terminal: Terminal,
    world: World,
) -> Metrics:
    """Print what is about to start, write the files that describe the run, and return its open metrics log.

    Only the main process prints and writes.
    """
    with in_turn(world):
        if not world.is_main:
            return Metrics(run.run_dir, -1 if run.resume_step is None else run.resume_step, is_writer=False)
        return _announce(run, dataset, timeline, models, start, terminal)


def _announce(
    run: ResolvedRun, dataset: Dataset, timeline: Timeline, models: Models, start: Start, terminal: Terminal
) -> Metrics:
    plan = [] if run.plan is None else [describe(run.plan)]
    graphs = f"no CUDA graphs: {run.no_graphs}" if run.no_graphs else "steps are replayed as CUDA graphs"
    for line in (*plan, graphs) if run.device.type == "cuda" else ():
        terminal.say(line)
    kernels = "kernels off" if models.patched is None else str(models.patched)
    if models.patched is None and models.context.optimizer.cut_by is not None:
        kernels += ": distributed.shard full cuts weights that they share"
    notes = [str(models.attention), str(models.context.optimizer), *plan, graphs, kernels]
    if line := models.trained.describe():
        terminal.say(line)
        notes.append(line)
    if run.config.text_encoder.train:
        line = _describe_text(run, models.context.texts)
        terminal.say(line)
        notes.append(line)
    if models.ema is not None:
        notes.append(f"validation, samples and exports use {models.ema}")
    records = {EPOCH_ORDER: {"grouped": start.is_grouped}, BASE: run.recorded_base or run.base_record}
    records[AUTOENCODER] = {"precision": run.config.model.vae_precision}
    if run.plan is not None:
        records[MEMORY_PLAN] = run.plan.to_json()
    if run.resume_step is not None and (started := recorded_start(run.run_dir)):
        records["started"] = started
    before, settings = recorded(run.run_dir, SETTINGS), flattened(run.user_config)
    is_known = run.resume_step is not None and before is not None and "unreadable" not in before
    changes = changes_between(before, settings) if is_known else []
    records |= {SETTINGS: settings, CHANGES: _recorded_changes(run, changes)}
    run.run_dir.mkdir(parents=True, exist_ok=True)
    if note := write_start(run, dataset, timeline, models.trained, models.attention, notes, records):
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
    steps, cut = counted(timeline.num_steps, "step"), timeline.cut_words
    terminal.say(
        f"{counted(num_photos, 'photograph')} to train on{class_images}{how_often}, {num_held_out} held out; "
        + (f"{steps}: {cut}" if cut else f"{steps} in {counted(timeline.num_epochs, 'epoch')}")
    )
    for note in filter(None, (dataset.tag_note, dataset.vae_note)):
        terminal.say(note)
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


def _describe_text(run: ResolvedRun, texts: TextTraining | None) -> str:
    """Return a line on the training of the text encoder. texts: None if it has ended."""
    settings, num_epochs = run.config.text_encoder, sum(stage.epochs for stage in run.config.stages())
    last = settings.trained_epochs(num_epochs)
    if texts is None:
        return f"the text encoder has been trained until the end of epoch {last}"
    num = sum(p.numel() for p in texts.optimizer.parameters.values())
    end = f", until the end of epoch {last}" if last < num_epochs else ""
    return f"the text encoder is trained, too: {num:,} parameters, fp32, lr {settings.lr:g} {settings.schedule}{end}"


def _recorded_changes(run: ResolvedRun, changes: list[str]) -> dict[str, list[str]]:
    """Return what environment.json is to hold of changed settings: the step of a resume -> what it changed.

    Earlier resumes count as far as they lie before the checkpoint that this one goes on from.
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
