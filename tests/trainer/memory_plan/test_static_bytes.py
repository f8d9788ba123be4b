"""Planned bytes equal those of real tensors after a real step."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from safelight.__main__ import main
from safelight.output.plan_json import with_json_names
from safelight.output.plan_table import duration
from safelight.trainer.checkpoint.files import Position, save_checkpoint
from safelight.trainer.checkpoint.identity import identify
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.loading.dataset import open_dataset
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.static_bytes import cache_bytes, static_bytes, summary, text_bytes
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_texts, load_unet
from safelight.trainer.optim.base import LossScale
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.step.text_training import train_texts
from tests.small_base import small_base
from tests.trainer.checkpoints import state_tensors, writes

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def size(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def moments_of(optimizer: UNetOptimizer) -> list[torch.Tensor]:
    """Return the optimizer's state without step counters, masters and remainders."""
    others = ("step", "strides", "master", "remainder")
    states = [optimizer.parameter_state(name) for name in optimizer.parameters]
    return [x for state in states for part, x in state.items() if part not in others]


@pytest.mark.parametrize(
    ("memory", "moments"),
    [("auto", "8bit"), ("fp32", "8bit"), ("near", "8bit"), ("rounded", "8bit"), ("auto", "4bit"), ("near", "4bit")],
)
def test_planned_bytes_of_the_memory_modes_are_the_real_bytes(memory, moments, tmp_path):
    settings = {"memory": memory, "moments": moments}
    config = parse_config({"model": {"precision": "bf16"}, "optimizer": settings}, "here")
    planned = static_bytes(config, CPU)
    unet = load_unet(resolve_base("tiny"), 0).train()
    optimizer = make_optimizer(unet, config.optimizer, torch.bfloat16)
    assert size(unet.parameters()) == planned.weights
    assert size(optimizer.master_tensors()) == planned.master
    assert planned.master == {"auto": 2, "fp32": 4, "near": 1, "rounded": 0}[memory] * planned.num_parameters
    assert size(moments_of(optimizer)) == planned.moments
    assert (planned.gradients, planned.master_gradients) == (2 * planned.num_parameters, 0)
    folder = save_checkpoint(
        tmp_path, writes(unet), state_tensors(optimizer), Position(step=1), identify(config, "bf16")
    )
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0 < on_disk - planned.checkpoint < 300_000


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "name", ["adamw", "bnb_adamw8bit", "adafactor", "bnb_lion8bit", "prodigy", "schedulefree_adamw"]
)
def test_planned_bytes_are_the_real_bytes(precision, name, tmp_path, monkeypatch):
    config = parse_config({"model": {"precision": precision}, "optimizer": {"name": name}}, "here")
    planned = static_bytes(config, CPU)
    unet = load_unet(resolve_base("tiny"), 0, DTYPES[precision]).train()
    dtype = DTYPES[precision]
    unet(
        torch.randn(1, 4, 8, 8, dtype=dtype), 500, torch.randn(1, 48, 128, dtype=dtype)
    ).sample.float().sum().backward()
    optimizer = make_optimizer(unet, config.optimizer)
    weights = list(unet.parameters())
    assert size(weights) == planned.weights
    assert size(p.grad for p in weights) == planned.gradients
    assert (size(optimizer.master_tensors()) if optimizer.has_master else 0) == planned.master
    gradient_bytes, update = [], optimizer._update

    def measured_update():
        assert not optimizer.has_master or all(p.grad is None for p in weights), "16-bit gradients are freed by now"
        gradient_bytes.append(size(p.grad for p in optimizer.master_tensors()))
        update()

    monkeypatch.setattr(optimizer, "_update", measured_update)
    optimizer.set_hyper(1e-4, 0.01, 1.0)
    _, is_applied = optimizer.step()
    assert is_applied
    if optimizer.has_master:
        assert gradient_bytes == [planned.master_gradients]
    else:
        # the optimizer reads the 16-bit gradients
        assert (gradient_bytes, planned.master_gradients) == ([planned.gradients], 0)
    assert size(moments_of(optimizer)) == planned.moments
    assert planned.num_parameters == sum(p.numel() for p in weights)
    assert planned.num_tensors == len(weights)
    kept = planned.weights + planned.master + planned.moments
    assert planned.total == kept + max(planned.gradients, planned.master_gradients)
    folder = save_checkpoint(
        tmp_path, writes(unet), state_tensors(optimizer), Position(step=1), identify(config, precision)
    )
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # the rest is names and step counters
    assert 0 < on_disk - planned.checkpoint < 300_000


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices])
@pytest.mark.parametrize("shape", [(1,), (4095,), (4096,), (4097,), (5000,), (64, 65), (8, 16, 3, 3), (16, 8, 1, 1)])
def test_the_registry_predicts_the_bytes_of_moments(name, shape):
    assert_predicted(Optimizer(name=name), shape)


@pytest.mark.parametrize("shape", [(4095,), (4096,), (4097,), (8, 16, 3, 3), (64, 65)])
def test_the_registry_predicts_the_bytes_of_4_bit_moments(shape):
    assert_predicted(Optimizer(moments="4bit"), shape)


def assert_predicted(config: Optimizer, shape: tuple[int, ...]) -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(shape))
    module.weight.grad = torch.ones(shape)
    optimizer = make_optimizer(module, config)
    optimizer.set_hyper(1e-4, 0.01, 1.0)
    optimizer.step()
    assert size(moments_of(optimizer)) == OPTIMIZERS[config.name].moment_bytes(shape, config)


def test_stable_diffusion_15_in_known_numbers():
    num = 859_520_964

    def plan(precision: str, name: str):
        values = {"model": {"base": "random:sd15", "precision": precision}, "optimizer": {"name": name}}
        return static_bytes(parse_config(values, "here"), CPU)

    exact = plan("fp32", "adamw")
    assert (exact.num_parameters, exact.num_tensors) == (num, 686)
    assert (exact.weights, exact.master, exact.moments, exact.gradients, exact.master_gradients) == (
        4 * num,
        0,
        8 * num,
        4 * num,
        0,
    )
    ours = plan("bf16", "adamw8bit")
    assert (ours.memory, ours.master, ours.gradients, ours.master_gradients) == ("exact", 2 * num, 2 * num, 0)
    values = {"model": {"base": "random:sd15", "precision": "bf16"}, "optimizer": {"fused_backward": True}}
    # the largest part: a ResNet from 2,560 to 1,280 channels, its time projection and shortcut
    resnet = (2560 + 1280) * 1280 * 9 + (2560 + 1280) * 1280 + 2 * 2560 + 6 * 1280
    assert static_bytes(parse_config(values, "here"), CPU).gradients == 2 * resnet
    small = plan("bf16", "bnb_adamw8bit")
    assert ours.moments == small.moments
    assert (small.weights, small.master, small.gradients, small.master_gradients) == (
        2 * num,
        4 * num,
        2 * num,
        4 * num,
    )
    # 393 tensors of under 4,096 elements, 356,804 in all, keep fp32 moments; the rest 2 x (1 byte + 4 in 256)
    large = num - 356_804
    assert 0 <= small.moments - 8 * 356_804 - 2 * large - 8 * (large // 256) < 8 * (686 - 393)
    assert small.precision == "bf16"


@pytest.mark.parametrize("vae", ["the base's", "without a posterior"])
def test_cache_bytes_are_an_upper_bound_near_the_real_ones(make_config, tiny_dataset, small_taesd, tmp_path, vae):
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset, ignore=shutil.ignore_patterns("cache"))
    config = make_config(
        data={"path": str(dataset), "variants": 2}, model={"vae": "" if vae == "the base's" else str(small_taesd)}
    )
    opened = open_dataset(config, resolve_base("tiny"), CPU)
    opened.cache.close()
    texts = sum(path.stat().st_size for path in (dataset / "cache" / "shards").glob("text*"))
    # a few prompts are captions
    assert texts <= text_bytes(config, [s.photo for s in opened.samples]) <= 1.5 * texts
    shards = [path for path in (dataset / "cache" / "shards").iterdir() if not path.name.startswith("text")]
    assert {path.name.split("-")[0] for path in shards} == {"posterior" if vae == "the base's" else "latent"}
    real = sum(path.stat().st_size for path in shards)
    # fewer than the bound: one variant of held-out photographs, one row for equal crops, smaller buckets
    channels = 8 if vae == "the base's" else 4
    samples = [*opened.train, *opened.validation]
    buckets = {key: sample.bucket for sample in samples for key in sample.latent_keys}
    # 16-bit values, 4 px per latent
    exact = sum(channels * 2 * bucket.width * bucket.height // 16 for bucket in buckets.values())
    assert exact == real <= cache_bytes(config, 24)


def test_the_summary_has_the_length_of_the_run(make_config):
    config = make_config(data={"validation_fraction": 0.25})
    result = summary(config)
    dataset = open_dataset(config, resolve_base("tiny"), CPU)
    dataset.cache.close()
    num_steps = Timeline.of(config, dataset.train).num_steps
    assert result["dataset"] == {
        "photographs": 24,
        "train": 18,
        "validation": 6,
        "too small": 0,
        "epochs": 3,
        "steps": num_steps,
        "end": "",
        "images trained": 54,
        "class images": 0,
        "masks": 0,
        "loss scales": 0,
        "crop loss": 0.0,
        "cache bytes": cache_bytes(config, 24) + text_bytes(config, [s.photo for s in dataset.samples]),
    }
    cut = summary(make_config(data={"validation_fraction": 0.25}, train={"max_steps": num_steps // 3 + 1}))["dataset"]
    assert (cut["epochs"], cut["end"]) == (3, f"train.max_steps {num_steps // 3 + 1} ends the run in epoch 2 of 3")
    assert 18 < cut["images trained"] <= 18 + config.train.batch_size
    planned = static_bytes(config, CPU)
    assert list(result["bytes"].values()) == [
        planned.weights,
        planned.master,
        planned.moments,
        planned.gradients,
        planned.master_gradients,
        planned.total,
    ]
    assert (result["checkpoint bytes"], result["checkpoints at most"]) == (planned.checkpoint, config.save.keep + 3)
    assert (result["base"], result["precision"], result["optimizer"]) == ("tiny", "fp32", "adamw8bit")
    assert "dataset" not in summary(make_config(data={"path": str(Path(config.data.path) / "none")}))


def test_the_command_prints_a_table_and_json(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "run.toml"
    path.write_text(to_toml(make_config()))
    assert main(["plan", str(path), "--optimizer.name", "adamw", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (note,) = printed.pop("notes")
    assert "fewer photographs than batch_size" in note
    assert printed.pop("learning_rate")["test"] is None
    planned = summary(make_config(optimizer={"name": "adamw"}))
    assert printed == with_json_names(planned)
    assert list(printed["bytes"].values()) == list(planned["bytes"].values())
    assert main(["plan", str(path), "--optimizer.name", "adamw"]) == 0
    text, advice = capsys.readouterr()
    assert advice == f"next: safelight train {path}, with the same settings\n"
    for name, value in planned["bytes"].items():
        is_shown = any(line.startswith(name) and f"{value:,}" in line for line in text.splitlines())
        # what the run does not have is left out
        assert is_shown == (value > 0)
    assert f"{printed['unet_parameters']:,} parameters" in text
    assert "A checkpoint takes 0.04 GiB on disk; up to 5 at a time: 0.18 GiB." in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    steps = f"3 epochs, {printed['dataset']['steps']} steps over 63 images"
    assert "Learning rate " in text
    assert f"24 photographs, 3 held out; {steps}; the cache takes up to" in " ".join(text.split())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.3, "1 s"), (41.2, "41 s"), (95, "2 min"), (5000, "83 min"), (11520, "3.2 hours"), (200_000, "2.3 days")],
)
def test_a_duration_is_written_in_its_largest_unit(seconds, text):
    assert duration(seconds) == text


def test_the_bytes_of_the_text_encoders_training_are_the_real_ones():
    values = {"text_encoder": {"train": True, "last_layers": 1}}
    config, frozen = (parse_config({"model": {"precision": "bf16"}, **more}, "here") for more in (values, {}))
    planned, without = static_bytes(config, CPU), static_bytes(frozen, CPU)
    base = resolve_base("tiny")
    ((_, text),) = load_texts(base, "", 0)
    training = train_texts(config, base.family, {"text_encoder": text}, {}, None, CPU, LossScale(CPU, False))
    trained = [p for p in text.parameters() if p.requires_grad]
    assert planned.num_text_parameters == sum(p.numel() for p in trained) < sum(p.numel() for p in text.parameters())
    assert planned.text_weights == sum(p.nbytes for p in text.parameters())
    assert planned.text_gradients == sum(p.nbytes for p in trained)
    assert planned.text_moments == size(moments_of(training.optimizer))
    text_bytes = planned.text_weights + planned.text_moments
    assert planned.checkpoint == without.checkpoint + text_bytes
    assert planned.total == without.total + text_bytes + planned.text_gradients
    shown = summary(config, CPU, torch.bfloat16)
    assert shown["text_encoder_parameters"] == planned.num_text_parameters
    assert shown["bytes"]["text encoder: weights, fp32"] == planned.text_weights
    assert not any("text encoder" in name for name in summary(frozen, CPU, torch.bfloat16)["bytes"])


def test_a_plan_for_a_gpu_counts_the_text_encoder_and_uses_no_graphs():
    more = {"data": {"resolution": 64}, "train": {"batch_size": 2}}
    with_text, without = (
        MemoryEstimator(parse_config({"text_encoder": {"train": train}, **more}, "here"), Card("8 GiB", 8)).estimate(
            "exact", "none", 2
        )
        for train in (True, False)
    )
    config = parse_config({"text_encoder": {"train": True}, **more}, "here")
    static = static_bytes(config, CPU)
    held = with_text.held_bytes - without.held_bytes
    # rounded up to the allocator's pieces, and the optimizer's small tensors
    assert 0 <= held - static.text_weights - static.text_moments < 0.1 * held
    assert with_text.step_bytes > without.step_bytes
    assert with_text.no_graphs == "the text encoder is trained, whose steps are not captured"
    assert with_text.host.snapshot >= without.host.snapshot


@pytest.mark.long
def test_a_plan_shows_what_the_text_encoder_takes(tmp_path, capsys):
    path = tmp_path / "run.toml"
    values = {"data": {"path": str(tmp_path / "none"), "resolution": 64}, "text_encoder": {"train": True}}
    values |= {"model": {"base": small_base()}, "train": {"checkpointing": "none"}}
    path.write_text(to_toml(parse_config(values, "here")))
    assert main(["plan", str(path), "--gpu", "t4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    num = static_bytes(parse_config(values, "here"), CPU).num_text_parameters
    assert f"of the text encoder, of which {num:,} parameters are trained in fp32" in shown
    assert "No CUDA graphs: the text encoder is trained" in shown
