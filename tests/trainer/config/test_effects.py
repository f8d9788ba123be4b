"""Every setting has an effect: a step, a dataset, a run or a report differs when the setting does.

A row of CHECKS says of a setting which other value it is given, by which function the difference is looked for, and
what else is set so that there is one. A new setting without a row fails here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from safelight.data.atomic import atomic_write_text
from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.data.epochs import plan_epoch
from safelight.data.manifest import read_manifest
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from safelight.kernels.unet.attention import attention_cases, choose_attention
from safelight.trainer import train as loop
from safelight.trainer.config.schema import Config
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.distributed.world import World
from safelight.trainer.families.original_layout import to_original, unet_layout
from safelight.trainer.inference import after_training
from safelight.trainer.loading import processes
from safelight.trainer.loading.dataset import plan_dataset
from safelight.trainer.memory_plan import resolve_auto
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import find_card
from safelight.trainer.memory_plan.resolve_auto import resolve_for
from safelight.trainer.models.base import base_of, resolve_base, tiny_folder
from safelight.trainer.models.device import pick_dtype
from safelight.trainer.models.weights import load_unet
from safelight.trainer.registry.schedules import learning_rate
from safelight.trainer.report.build import render
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_log.wandb_board import WandbBoard
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import StepContext, StepSettings, train_step
from safelight.trainer.tiny.scenes import caption, draw, random_scene
from tests.small_base import small_base
from tests.trainer.equal_runs import CLOCK_FIELDS
from tools.settings_page import tables

CPU = torch.device("cpu")
NUM_PHOTOS = 8
# what a run of the checks is, besides its base and its dataset
SHORT = {
    "run": {"device": "cpu", "seed": 3},
    "data": {"resolution": 64, "validation_fraction": 0.25},
    "train": {"batch_size": 4, "epochs": 2, "max_steps": 1},
    "optimizer": {"lr": 1e-4},
    "validate": {"every_epochs": 0},
    "sample": {"every_epochs": 0},
    "log": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_taesd) -> Path:
    """A folder with two datasets of photographs with tags, in several shapes, and what else the settings name."""
    folder = tmp_path_factory.mktemp("effects")
    for name, num in (("photos", NUM_PHOTOS), ("others", NUM_PHOTOS - 1)):
        (folder / name).mkdir()
        for number in range(num):
            scene = random_scene(7, number, in_look=True)
            # the last one is too small to be enlarged to 64 px
            size = (64, 64) if number < 5 else (128, 64) if number < 7 else (40, 40)
            draw(scene).resize(size).save(folder / name / f"{number}.png")
            text = f"({caption(scene, 7, number)}) | large:3, round:2, warm, faded"
            (folder / name / f"{number}.txt").write_text(text)
            grey = draw(random_scene(9, number, in_look=True)).resize(size).convert("L")
            grey.point(lambda value: 255 * (value > 128)).save(folder / name / f"{number}-masklabel.png")
        ingest([folder / name], folder / f"{name}-dataset")
    assert all(photo.mask for photo in read_manifest(folder / "photos-dataset"))
    unet = load_unet(resolve_base(small_base()), 0)
    layout = unet_layout(unet.state_dict(), unet.config.layers_per_block)
    save_file(to_original(unet.state_dict(), layout), folder / "unet.safetensors")
    # the same base, but for what its scheduler says that the UNet predicts
    (folder / "small").symlink_to(small_base())
    shutil.copytree(small_base(), folder / "v")
    scheduler = folder / "v" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    save_file({"emb_params": torch.ones(1, 128)}, folder / "word.safetensors")
    (folder / "prompts.txt").write_text("a drawn house\n")
    (folder / "taesd").symlink_to(small_taesd)
    tokenizer = json.loads((tiny_folder() / "tokenizer" / "tokenizer.json").read_text())
    (folder / "tokenizer").mkdir()
    for path in (tiny_folder() / "tokenizer").iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        flat = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1))
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# what is looked at: each returns values that compare unequal if the config made a difference


def steps(config: Config) -> object:
    """Take four steps on random batches; return weights, state, average, losses, and what was kept for backward."""
    dtype, base, stage = pick_dtype(config.model.precision, CPU), base_of(config.model), config.stages()[0]
    unet = load_unet(base, config.run.seed).train()
    attention = choose_attention(CPU, dtype, attention_cases(unet, (8, 8)), setting=config.model.attention, batch=2)
    prepared = prepare_unet(unet, config, attention, CPU, dtype)
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)
    optimizer, key = prepared.optimizer, prepared.trained.dropout_key
    context = StepContext(unet, optimizer, schedule, 1.0, stage.config.loss, dropout_key=key)
    generator = torch.Generator().manual_seed(5)
    unet_config, kept, losses = base.config_of("unet"), [0], []

    def batch(number: int) -> Batch:
        mean, logvar = (torch.randn(2, unet_config["in_channels"], 8, 8, generator=generator) for _ in range(2))
        text = torch.randn(2, 77, unet_config["cross_attention_dim"], generator=generator)
        condition = base.family.stand_in_conditioning(unet_config, text, (8, 8))
        return Batch(mean, logvar - 4, condition, (2 * number, 2 * number + 1), (0, 0), Bucket(64, 64))

    def keep(x: Tensor) -> Tensor:
        kept[0] += x.nbytes
        return x

    for number in range(4):
        lr = learning_rate(stage, number, 4)
        settings = StepSettings(2 * stage.accumulate, lr, stage.weight_decay, stage.max_grad_norm)
        micro = [batch(10 * number + place) for place in range(stage.accumulate)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            result = train_step(context, micro, settings, seed=config.run.seed, epoch=0)
        losses.append(result.losses.tolist())
        if prepared.ema is not None:
            prepared.ema.update(result.is_applied)
    state = {**optimizer.live_state(), **(prepared.ema.live_state() if prepared.ema else {})}
    weights = {name: optimizer.value(name) for name in optimizer.parameters}
    return digest(weights), digest(state), losses, kept[0], str(attention), str(prepared.patched), optimizer.memory


def rows(config: Config) -> object:
    """Return what the dataset's cache is to hold, which rows two epochs train in which batches, and the steps."""
    plan = plan_dataset(config, base_of(config.model), CPU)
    plan.dataset.cache.close()
    stage, timeline = config.stages()[0], Timeline.of(config, plan.dataset.train)
    epochs = [
        plan_epoch(
            plan.dataset.train,
            seed=config.run.seed,
            epoch=epoch,
            batch_size=stage.batch_size,
            caption_dropout=stage.config.data.caption_dropout,
        )
        for epoch in range(2)
    ]
    needed = sorted((key, str(row.shape)) for key, row in plan.rows().items())
    prompts = sorted(plan.dataset.sampled.keys.items())
    settings = repr([sample.photo.settings for sample in plan.dataset.train])
    return needed, settings, plan.dataset.cache.dtype, prompts, repr(epochs), timeline.num_steps, timeline.total_steps


def run(config: Config) -> object:
    """Train; return the run's name and files, its log without times, its samples, and how validation was batched."""
    folder = Path(config.run.dir)
    batched: Counter[int] = Counter()

    def count(module: torch.nn.Module, args: tuple) -> None:
        if type(module).__name__ == "UNet2DConditionModel" and not torch.is_grad_enabled():
            batched[len(args[0])] += 1

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        loop.train(config)
    finally:
        hook.remove()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    log = [{name: value for name, value in line.items() if name not in CLOCK_FIELDS} for line in lines]
    files = sorted(str(path.relative_to(folder).parent) for path in folder.rglob("*") if path.is_file())
    drawn = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("samples/*/*.png"))]
    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.safetensors"))]
    return folder.name, files, log, drawn, weights, batched


def flags(config: Config) -> object:
    """Return the flags of torch that training sets."""
    seen = {}

    def refuse(**values):
        seen.update(values)
        raise UserError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "torch_flags", refuse)
        with pytest.raises(UserError, match="enough"):
            loop.train(config)
    return seen


def page(config: Config) -> object:
    """Return the head of the report of a run of which only the settings are known."""
    folder = Path(config.run.dir)
    atomic_write_text(folder / "config.toml", to_toml(config))
    return render(read_run_folder(folder)).split("<h2", 1)[0]


def board(config: Config) -> object:
    """Return what wandb is asked to begin."""
    asked = []
    wandb = SimpleNamespace(
        api=SimpleNamespace(api_key="key"),
        Settings=lambda **settings: settings["mode"],
        init=lambda **values: asked.append({**values, "config": None}) or MagicMock(),
    )
    opened = object.__new__(WandbBoard)
    opened._config, opened._run_dir, opened._run_id = config, Path(config.run.dir), "id"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        opened._begin()
    return asked


def compared(config: Config) -> object:
    """Return whether a run that has ended is compared."""
    reached = []

    class Opened:
        def __init__(self):
            self.config = config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after_training, "open_run", lambda folder, **_: Opened())
        patch.setattr(after_training, "sampled_prompts", lambda run, say: reached.append(run) or [])
        after_training.compare_after_training(Path(config.run.dir), 1, lambda *_: None, print)
    return len(reached)


def told(use: Callable[[Config], object]) -> Callable[[Config], object]:
    """Return a function that returns what another one does, or the error it raises."""

    def result(config: Config) -> object:
        try:
            return repr(use(config))
        except UserError as error:
            return str(error)

    return result


@told
def machine(config: Config) -> object:
    """Train; return the device that the run recorded. On a machine without a GPU: why it cannot be the GPU."""
    loop.train(config)
    return json.loads((Path(config.run.dir) / "environment.json").read_text())["device"]


def graphs(config: Config) -> object:
    """Return why a run on a GPU does not replay its steps as CUDA graphs, '' if it does."""
    resolved, plan = resolve_for(config, find_card("rtx4090"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve_auto, "has_triton", lambda: True)
        return resolve_auto.why_no_cuda_graphs(resolved, torch.device("cuda"), plan, 20 * 2**30)


def text_rates(config: Config) -> object:
    """Train; return the rates with which the text encoder's optimizer stepped, and what it made of the weights."""
    rates, step = [], loop.train_step

    def watched(context, *arguments, **more):
        result = step(context, *arguments, **more)
        optimizer = context.text_optimizer
        rates.append(None if optimizer is None else [digest(dict(optimizer.parameters)), optimizer.spec.name])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        loop.train(config)
    return rates


def class_pictures(config: Config) -> object:
    """Return the class images that the base draws, without their names."""
    plan = plan_dataset(config, base_of(config.model), CPU, draws_class_images=True)
    plan.dataset.cache.close()
    photos = {sample.photo.file: sample.photo for sample in plan.dataset.class_images}
    return sorted(Image.open(Path(config.data.path) / file).tobytes() for file in photos)


def waits(config: Config) -> object:
    """How long the processes of a run wait for each other."""
    with patch.object(processes, "join_world") as joined:
        processes.join("train", config, Terminal())
    return joined.call_args.args[1]


def kept_by_the_second(config: Config) -> object:
    """What the second of two processes keeps the optimizer's state of."""
    unet = load_unet(base_of(config.model), config.run.seed)
    attention = choose_attention(CPU, torch.float32, attention_cases(unet, (16, 16)), setting="math", batch=1)
    return prepare_unet(unet, config, attention, CPU, torch.float32, world=World(1, 2)).optimizer.owned


budget = told(lambda config: MemoryEstimator(config, find_card("rtx3060")).budget)


@dataclass(frozen=True)
class Check:
    """other: value of the setting. look: finds the difference. given: tables with what else is set in both cases."""

    other: object
    look: Callable[[Config], object]
    given: dict = field(default_factory=dict)


BF16, SAMPLED = {"model": {"precision": "bf16"}}, {"sample": {"every_epochs": 1, "num_prompts": 1, "steps": 2}}
# one batch, and so one step, an epoch
ONE = {"data": {"max_aspect": 1.0, "validation_fraction": 0.5}, "train": {"batch_size": 8, "max_steps": 0}}
OF_A_FILE = {"model": {"base": "{place}/unet.safetensors", "config": "{place}/small"}}
VALIDATED = {**ONE, "validate": {"every_epochs": 1, "timesteps": 1}, "train": {"batch_size": 8, "max_steps": 1}}
LORA = {"adapter": {"kind": "lora"}}
WORD = {"adapter": {"kind": "embedding"}, "embedding": {"initial_text": "photograph", "vectors": 4}}
PATIENT = {
    **ONE,
    "validate": {"every_epochs": 1, "timesteps": 1, "max_images": 1, "patience": 1, "min_gain": 100.0},
    "save": {"every_epochs": 0},
    "stage": [{"epochs": 6}, {"epochs": 1}],
}
STAGES = {**ONE, "validate": {"every_epochs": 1, "timesteps": 1, "max_images": 2}}
PRODIGY = {"optimizer": {"name": "prodigy", "lr": 1.0, "d0": 1e-4}}
CLASS = {"prior": {"prompt": "a photograph", "num_images": 1, "steps": 1}}
AVERAGED = {"optimizer": {"name": "schedulefree_adamw"}}


def with_text(**text) -> dict:
    return {**ONE, "train": {**ONE["train"], "epochs": 3}, "text_encoder": {"train": True, **text}}


# what {place} stands for is the folder of the fixture
CHECKS: dict[str, Check] = {
    "run.dir": Check("other", run),
    "run.seed": Check(4, rows),
    "run.device": Check("cuda", machine),
    "run.deterministic": Check(True, flags),
    "run.title": Check("A title of my own", page),
    "run.notes": Check("A note of my own", page),
    "model.base": Check("tiny", steps),
    "model.config": Check(
        "{place}/v", steps, {"model": {"base": "{place}/unet.safetensors", "config": "{place}/small"}}
    ),
    "model.vae": Check("{place}/taesd", rows),
    "model.vae_precision": Check("fp16", rows),
    "model.tokenizer": Check("{place}/tokenizer", rows, {"model": {"base": "random:small"}}),
    "model.clip_skip": Check(1, rows),
    "model.precision": Check("bf16", steps),
    "model.attention": Check("math", steps),
    "data.path": Check("{place}/others-dataset", rows),
    "data.resolution": Check([48, 64], rows),
    "data.upscale": Check("always", rows),
    "data.max_aspect": Check(1.0, rows),
    "data.validation_fraction": Check(0.5, rows),
    "data.variants": Check(2, rows),
    "data.crop_jitter": Check(0.4, rows, {"data": {"variants": 2}}),
    "data.flip_p": Check(1.0, rows, {"data": {"variants": 2}}),
    "data.caption_dropout": Check(0.9, rows),
    "data.caption_variants": Check(2, rows),
    "data.max_tags": Check(2, rows),
    "data.keep_tags": Check(1, rows),
    "data.shuffle_tags": Check(False, rows),
    "data.caption_suffix": Check(", on paper", rows),
    "data.prompt_weights": Check(True, rows),
    "data.caption_chunks": Check(2, rows),
    "data.short_batches": Check("carry", rows, {"train": {"max_steps": 0}}),
    "data.cache_dtype": Check("float32", rows),
    "train.batch_size": Check(2, rows),
    "train.accumulate": Check(2, steps),
    "train.accumulate_dtype": Check("fp32", steps, BF16 | {"train": {"accumulate": 2}}),
    "train.epochs": Check(3, rows, {"train": {"max_steps": 0}}),
    "train.max_steps": Check(2, rows),
    "train.kernels": Check("on", steps),
    "train.checkpointing": Check("full", steps),
    "train.cuda_graphs": Check("off", graphs),
    "train.cudnn_benchmark": Check(True, flags),
    "train.max_grad_norm": Check(1e-3, steps),
    "train.ema_decay": Check(0.5, steps),
    "train.layers": Check(["attention"], steps),
    "optimizer.name": Check("adamw", steps),
    "optimizer.memory": Check("rounded", steps, BF16),
    "optimizer.moments": Check("4bit", steps),
    "optimizer.lr": Check(1e-3, steps),
    "optimizer.fused_backward": Check(True, steps, {"train": {"max_grad_norm": 0.01}}),
    "optimizer.clipping": Check(
        "per-tensor", steps, {"optimizer": {"fused_backward": True}, "train": {"max_grad_norm": 0.01}}
    ),
    "optimizer.betas": Check((0.5, 0.9), steps),
    "optimizer.eps": Check(1e-3, steps),
    "optimizer.weight_decay": Check(0.5, steps),
    "optimizer.schedule": Check("linear", steps),
    "optimizer.warmup_steps": Check(2, steps),
    "optimizer.d0": Check(1e-2, steps, PRODIGY),
    "optimizer.d_coef": Check(100.0, steps, PRODIGY),
    "optimizer.safeguard_warmup": Check(True, steps, {"optimizer": {**PRODIGY["optimizer"], "warmup_steps": 2}}),
    "optimizer.use_bias_correction": Check(True, steps, PRODIGY),
    "optimizer.slice_p": Check(11, steps, PRODIGY),
    "optimizer.average_power": Check(2.0, steps, AVERAGED),
    "optimizer.average_lr_power": Check(0.0, steps, {"optimizer": {**AVERAGED["optimizer"], "warmup_steps": 3}}),
    "optimizer.lr_end": Check(0.5, steps, {"optimizer": {"schedule": "cosine"}}),
    "optimizer.lr_start": Check(0.5, steps, {"optimizer": {"schedule": "one_cycle"}}),
    "optimizer.lr_rise": Check(0.7, steps, {"optimizer": {"schedule": "one_cycle"}}),
    "optimizer.lr_cycles": Check(2, steps, {"optimizer": {"schedule": "cosine_restarts"}}),
    "optimizer.lr_cycle_decay": Check(0.5, steps, {"optimizer": {"schedule": "cosine_restarts"}}),
    "optimizer.lr_power": Check(1.0, steps, {"optimizer": {"schedule": "polynomial"}}),
    "text_encoder.train": Check(True, text_rates),
    "text_encoder.lr_end": Check(0.5, text_rates, with_text(schedule="cosine")),
    "text_encoder.lr_start": Check(0.5, text_rates, with_text(schedule="one_cycle")),
    "text_encoder.lr_rise": Check(0.7, text_rates, with_text(schedule="one_cycle")),
    "text_encoder.lr_cycles": Check(2, text_rates, with_text(schedule="cosine_restarts")),
    "text_encoder.lr_cycle_decay": Check(0.5, text_rates, with_text(schedule="cosine_restarts")),
    "text_encoder.lr_power": Check(1.0, text_rates, with_text(schedule="polynomial")),
    "text_encoder.lr": Check(1e-3, text_rates, with_text()),
    "text_encoder.schedule": Check("cosine", text_rates, with_text()),
    "text_encoder.warmup_steps": Check(2, text_rates, with_text()),
    "text_encoder.last_layers": Check(1, text_rates, with_text()),
    "text_encoder.epochs": Check(1, text_rates, with_text()),
    "adapter.kind": Check("lora", steps),
    "adapter.rank": Check(4, steps, LORA),
    "adapter.alpha": Check(3.0, steps, LORA),
    "adapter.dropout": Check(0.5, steps, LORA),
    "adapter.target": Check(["linear"], steps, LORA),
    "adapter.dora": Check(True, steps, LORA),
    "adapter.base": Check("8bit", steps, LORA),
    "adapter.rslora": Check(True, steps, {"adapter": {"kind": "lora", "alpha": 8.0}}),
    "embedding.word": Check("<other>", rows, WORD),
    "embedding.initial_text": Check("drawing", run, WORD),
    "embedding.vectors": Check(5, run, WORD),
    "embedding.templates": Check(["a photograph of {word}"], rows, WORD),
    "embedding.negative": Check(True, rows, WORD),
    "memory.limit_gib": Check(2.0, budget),
    "distributed.shard": Check("states", kept_by_the_second),
    "distributed.timeout_s": Check(60.0, waits),
    "stage.epochs": Check(2, rows, {"train": {"max_steps": 0}, "stage": [{"epochs": 1}]}),
    "stage.start_from": Check("best", run, STAGES | {"stage": [{"epochs": 2, "lr": 1.0}, {"epochs": 1, "lr": 1e-6}]}),
    "prior.prompt": Check("a drawing", run, CLASS),
    "prior.num_images": Check(2, run, CLASS),
    "prior.weight": Check(0.5, run, CLASS),
    "prior.negative_prompt": Check("blue", class_pictures, CLASS),
    "prior.steps": Check(2, class_pictures, CLASS),
    "prior.cfg": Check(1.0, class_pictures, CLASS),
    "loss.prediction": Check("v_prediction", steps),
    "loss.kind": Check("huber", steps),
    "loss.huber_delta": Check(0.01, steps, {"loss": {"kind": "huber"}}),
    "loss.weighting": Check("debiased", steps),
    "loss.min_snr_gamma": Check(1.0, steps),
    "loss.p2_gamma": Check(0.5, steps, {"loss": {"weighting": "p2"}}),
    "loss.huber_schedule": Check("exponential", steps, {"loss": {"kind": "huber", "huber_delta": 0.1}}),
    "loss.timesteps": Check("logit_normal", steps),
    "loss.timestep_location": Check(2.0, steps, {"loss": {"timesteps": "logit_normal"}}),
    "loss.timestep_scale": Check(0.1, steps, {"loss": {"timesteps": "logit_normal"}}),
    "loss.min_timestep": Check(900, steps),
    "loss.max_timestep": Check(100, steps),
    "loss.pyramid_noise": Check(0.3, steps),
    "loss.pyramid_octaves": Check(2, steps, {"loss": {"pyramid_noise": 0.5}}),
    "loss.input_perturbation": Check(0.2, steps),
    "loss.mask_weight": Check(0.5, run),
    "loss.offset_noise": Check(0.5, steps),
    "loss.zero_terminal_snr": Check(True, steps, {"loss": {"prediction": "v_prediction"}}),
    "validate.every_epochs": Check(0, run, VALIDATED),
    "validate.timesteps": Check(2, run, VALIDATED),
    "validate.batch_size": Check(1, run, VALIDATED),
    "validate.max_images": Check(1, run, VALIDATED),
    "validate.patience": Check(0, run, PATIENT),
    "validate.min_gain": Check(0.0, run, PATIENT),
    "validate.patience_ends": Check("run", run, PATIENT),
    "sample.prompts": Check(["a red circle"], rows),
    "sample.num_prompts": Check(1, rows, {"data": {"validation_fraction": 0.5}}),
    "sample.every_epochs": Check(0, run, SAMPLED),
    "sample.compare_at_end": Check(False, compared, SAMPLED),
    "sample.sampler": Check("ddim", run, SAMPLED),
    "sample.steps": Check(3, run, SAMPLED),
    "sample.cfg": Check(3.0, run, SAMPLED),
    "sample.negative_prompt": Check("blue", run, SAMPLED),
    "sample.prompts_file": Check("{place}/prompts.txt", rows),
    "sample.spacing": Check("leading", run, SAMPLED),
    "sample.embeddings": Check(["{place}/word.safetensors"], rows, {"sample": {"prompts": ["a word"]}}),
    "sample.width": Check(32, run, SAMPLED),
    "sample.height": Check(32, run, SAMPLED),
    "save.every_epochs": Check(0, run, ONE),
    "save.every_steps": Check(1, run, {**ONE, "save": {"every_epochs": 0}}),
    "save.keep": Check(1, run, ONE),
    "log.every_steps": Check(1, run, ONE),
    "log.tensorboard": Check(True, run),
    "log.wandb": Check(True, board, {"log": {"wandb": "offline"}}),
    "log.wandb_project": Check("mine", board, {"log": {"wandb": "offline"}}),
    "log.wandb_entity": Check("us", board, {"log": {"wandb": "offline"}}),
    "log.wandb_name": Check("first", board, {"log": {"wandb": "offline"}}),
}
NAMES = [f"{table}.{name}" for table, section in tables() for name in section.model_fields]


def merged(values: dict, more: dict) -> dict:
    tables = dict(values)
    for name, table in more.items():
        both = isinstance(table, dict) and isinstance(tables.get(name), dict)
        tables[name] = merged(tables[name], table) if both else table
    return tables


def placed(value: object, place: Path) -> object:
    """Return a value with the folder in place of {place}."""
    if isinstance(value, dict):
        return {name: placed(one, place) for name, one in value.items()}
    if isinstance(value, list):
        return [placed(one, place) for one in value]
    return value.replace("{place}", str(place)) if isinstance(value, str) else value


@dataclass
class Seen:
    """What was looked at before, by what was set: many checks begin with the same settings."""

    place: Path
    results: dict[str, object] = field(default_factory=dict)

    def look(self, check: Check, changes: dict, again: bool = False) -> object:
        tables = {"model": {"base": small_base()}, "data": {"path": f"{self.place}/photos-dataset"}}
        settings = placed(merged(merged(merged(SHORT, tables), check.given), changes), self.place)
        key = f"{check.look.__name__} {id(check.look)} {json.dumps(settings)}"
        if again or key not in self.results:
            folder = self.place / "runs" / str(len(list((self.place / "runs").glob("*"))))
            folder.mkdir(parents=True)
            settings = merged(settings, {"run": {"dir": str(folder / settings["run"].get("dir", "run"))}})
            self.results[key] = check.look(parse_config(settings, "here"))
        return self.results[key]


@pytest.fixture(scope="module")
def seen(place) -> Seen:
    return Seen(place)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_every_setting_has_a_check():
    missing = [name for name in NAMES if name not in CHECKS]
    assert not missing, (
        f"no check shows that {', '.join(missing)} has an effect: add a row to CHECKS in {Path(__file__).name}, with "
        "another value and the function (steps, rows, run, ...) whose result it changes"
    )
    assert not [name for name in CHECKS if name not in NAMES], "checks of settings that are gone"


@pytest.mark.parametrize("name", CHECKS)
def test_a_setting_has_an_effect(name, seen):
    check, (table, key) = CHECKS[name], name.split(".")
    changes: dict = {table: {key: check.other}}
    if table == "stage":
        *stages, last = check.given["stage"]
        changes = {"stage": [*stages, {**last, key: check.other}]}
    assert seen.look(check, {}) != seen.look(check, changes), f"{name} = {check.other!r} changes nothing"


@pytest.mark.parametrize("look", sorted({check.look for check in CHECKS.values()}, key=lambda look: look.__name__))
def test_what_is_looked_at_is_equal_for_equal_settings(look, seen):
    """Else every setting would seem to have an effect."""
    check = next(check for check in CHECKS.values() if check.look is look)
    assert seen.look(check, {}) == seen.look(check, {}, again=True)
