"""Our GPU path from end to end, on a pretended device: collected by test_pretended_device.py alone."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from safelight.__main__ import main
from safelight.bench.measure import memory, optimizers
from safelight.bench.recipes import other_trainers, suite
from safelight.bench.recipes.workload import Workload, random_batches
from safelight.kernels.triton import jit
from safelight.kernels.unet import attention_probe
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.models.base import tiny_folder
from safelight.trainer.train import train
from tests.trainer.step import pretended_device

T4, A10G = "Tesla T4", "NVIDIA A10G"
device = pretended_device.DEVICE
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def a_card():
    """Each test begins with a T4 without Triton, whose interpreter takes minutes."""
    device.become(T4)
    pretended_device.launch_kernels(False)
    yield
    device.become(T4)
    gc.collect()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The tiny base with a UNet of 85,668 parameters."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny_folder(), folder)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 16),
        cross_attention_dim=128,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def config_of(tiny_dataset, base, tmp_path):
    """A function that returns a small run's config, with changes by table."""

    def make(name: str, **changes: dict):
        values = {
            "run": {"dir": str(tmp_path / name)},
            "model": {"base": str(base)},
            "data": {"path": str(tiny_dataset), "resolution": 64, "caption_dropout": 0.3},
            "train": {"batch_size": 4, "max_steps": 3},
            "optimizer": {"lr": 1e-4},
            "stage": [{"epochs": 4}],
            "validate": {"timesteps": 1, "max_images": 2},
            "sample": {"every_epochs": 0, "steps": 1, "prompts": ["a red circle"]},
            "log": {"tensorboard": False, "every_steps": 1},
        }
        for table, change in changes.items():
            values[table] = {**values.get(table, {}), **change}
        return parse_config(values, "here")

    return make


def result(run_dir: Path) -> tuple[dict, list[float]]:
    """Return the last checkpoint's weights and the logged losses."""
    folder = folder_of(run_dir, list_checkpoints(run_dir)[-1])
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), [
        row["loss"] for row in rows if row["kind"] in ("train", "validation")
    ]


def assert_near(one: tuple[dict, list], other: tuple[dict, list], tolerance: float) -> None:
    torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)


# the device itself


def test_it_refuses_what_a_gpu_refuses():
    x = torch.ones(3, device="cuda")
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(1)]),
        lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
        lambda: x.numpy(),
        lambda: torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda")),
        lambda: jit.check_launcher(),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            wrong()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert torch.empty(1000, device="cuda").isnan().all()


def test_who_does_not_wait_for_a_copy_meets_nan():
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    pinned = torch.arange(3.0).pin_memory()
    with torch.cuda.stream(side):
        sent = pinned.to("cuda", non_blocking=True)
    arrived = side.record_event()
    assert sent.isnan().all()
    here.wait_event(arrived)
    assert sent.tolist() == [0, 1, 2]
    back = torch.empty(3, pin_memory=True).copy_(sent, non_blocking=True)
    assert back.isnan().all()
    here.record_event().synchronize()
    assert back.tolist() == [0, 1, 2]


def test_a_graph_is_replayed_on_its_memory():
    graph, x = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda")
    with torch.cuda.graph(graph):
        x.add_(1)
        total = (2 * x).sum()
        with pytest.raises(RuntimeError, match="capturing"):
            total.item()
    assert x.tolist() == [1, 1, 1]
    for expected in (12, 18):
        graph.replay()
        assert total.item() == expected


# runs


@pytest.mark.parametrize(
    ("card", "precision", "memory_mode"),
    [
        (T4, "fp16", "exact"),
        (T4, "fp16", "near"),
        (A10G, "bf16", "rounded"),
        (A10G, "bf16", "paged"),
        (T4, "fp16", "streamed"),
    ],
)
def test_every_memory_mode(config_of, card, precision, memory_mode):
    device.become(card)
    changes = {"optimizer": {"lr": 1e-4, "memory": memory_mode}, "train": {"batch_size": 4, "max_steps": 2}}
    found = train(config_of("run", **changes))
    _, losses = result(found.run_dir)
    environment = json.loads((found.run_dir / "environment.json").read_text())
    assert environment["device"] == card
    assert json.loads((found.run_dir / "model.json").read_text())["precision"] == precision
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_a_run_equals_the_cpus(config_of, optimizer):
    """In fp32 without kernels both take the same operators; attention alone is asked for by another name."""
    changes = {"model": {"precision": "fp32"}, "optimizer": {"lr": 1e-4, "name": optimizer, "memory": "fp32"}}
    base = config_of("any").model.base
    changes["model"]["base"] = base
    changes["train"] = {"batch_size": 4, "max_steps": 4, "kernels": "off", "accumulate": 2}
    found = [
        result(train(config_of(where, **changes, run={"dir": config_of(where).run.dir, "device": where})).run_dir)
        for where in ("cpu", "cuda")
    ]
    assert_near(*found, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpointing": "selective"},
        {"checkpointing": "full", "ema_decay": 0.9, "accumulate": 2},
        {"checkpointing": "offload", "accumulate": 2, "memory": "paged"},
        {"checkpointing": "full", "accumulate": 2, "memory": "streamed"},
    ],
)
def test_stopped_and_gone_on_with_equals_not_stopping(config_of, settings):
    mode = settings.get("memory", "auto")
    settings = {name: value for name, value in settings.items() if name != "memory"}
    changes = {"train": {"batch_size": 4, **settings}, "save": {"every_steps": 1}}
    changes["optimizer"] = {"lr": 1e-4, "memory": mode}
    whole = result(train(config_of("whole", **changes)).run_dir)
    train(config_of("parts", **{**changes, "train": {**changes["train"], "max_steps": 1}}))
    again = train(config_of("parts", **changes), resume=True)
    # the shorter run was validated once more
    assert_near((whole[0], []), (result(again.run_dir)[0], []), 0)
    if mode == "streamed":
        # whoever did not wait for a copy would have met NaN
        other = {**changes, "optimizer": {**changes["optimizer"], "memory": "paged", "fused_backward": True}}
        assert_near(whole, result(train(config_of("other", **other)).run_dir), 0)


def test_the_commands(config_of, tmp_path, capsys):
    config = config_of("run", sample={"every_epochs": 1, "steps": 1, "prompts": ["a red circle"]})
    run_dir = train(config).run_dir
    for command in (
        ["sample", str(run_dir), "--prompt", "a blue square", "--out", str(tmp_path / "drawn")],
        ["compare", str(run_dir), "--num", "2"],
        ["export", str(run_dir), "-o", str(tmp_path / "out.safetensors")],
        ["report", str(run_dir)],
        ["plan", str(run_dir / "config.toml")],
    ):
        assert main(command) == 0, (command, capsys.readouterr())


def test_memory_that_is_too_small_is_told(config_of):
    device.become(T4, 0.5)
    with pytest.raises(ValueError, match=r"has 0\.50 GiB available"):
        train(config_of("small"))
    device.become(T4)
    train(config_of("limited", memory={"limit_gib": 2}))
    steps = iter(range(100))

    def full() -> bool:
        if next(steps) == 4:
            device.allow(device.allocated + 4096)
        return False

    with pytest.raises(ValueError, match="the GPU's memory was full in step"):
        train(config_of("full"), stop_requested=full)


# benchmarks


def test_steps_that_are_replayed_equal_steps_that_are_taken(base, monkeypatch):
    """Kernels and graphs as in a run: what is recorded is torch's own capture of a step, interpreted."""
    pretended_device.launch_kernels(True)
    # else the clock chooses
    monkeypatch.setattr(attention_probe, "can_time", lambda device: False)
    work, found = Workload(base=str(base), latent_size=8), []
    for recipe in ("safelight", "safelight-graphs"):
        trainer, before = suite.build(recipe, work.resolved()), device.num_launches
        losses = [trainer.step(batch).tolist() for batch in random_batches(2, work)]
        assert device.num_launches > before
        found.append((losses, {name: x.clone() for name, x in trainer.optimizer.live_state().items()}))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert device.graphs


def test_kernels_step_streamed_weights_as_paged(base, monkeypatch):
    """The optimizer's kernel reads addresses: of pages in their slots, and of weights in theirs."""
    pretended_device.launch_kernels(True)
    monkeypatch.setattr(attention_probe, "can_time", lambda device: False)
    found = []
    for mode in ("paged", "streamed"):
        work = Workload(base=str(base), latent_size=8, optimizer=f"adamw8bit, {mode}", checkpointing="full")
        trainer, before = suite.build("safelight-fused", work.resolved()), device.num_launches
        losses = [trainer.step(batch).tolist() for batch in random_batches(2, work)]
        assert device.num_launches > before
        state = {name: x.cpu().clone() for name, x in trainer.optimizer.live_state().items()}
        state |= {name: x.cpu() for name, x in trainer.unet.state_dict().items()}
        found.append((losses, state))
    assert trainer.optimizer.stream.bytes_outward > 0
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(*(state for _, state in found), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["safelight", "safelight-fused", *other_trainers.ALL_RECIPES])
def test_every_recipe(base, monkeypatch, recipe):
    # Inductor writes Triton
    monkeypatch.setattr(torch, "compile", lambda module: module)
    work = Workload(base=str(base), optimizer="adamw" if recipe in other_trainers.ALL_RECIPES else "adamw8bit")
    if recipe == "kohya-fused":
        device.become(A10G)
    (line,) = suite.measure(suite.variants((recipe,), (2,), work), 1, together=False)
    assert line["figures"]["peak_gib"] > 0


def test_a_steps_memory(base):
    work = Workload(base=str(base), optimizer="adamw8bit").resolved()
    lines = [line["figures"] for line in memory.bench_memory(work, ("adamw8bit, exact",))]
    assert lines
    assert all(line["smallest_card_gib"] == 4 for line in lines)


def test_ours_of_the_optimizers(monkeypatch):
    ours = {name: c for name, c in optimizers.offered(torch.float16).items() if name.startswith("adamw8bit")}
    monkeypatch.setattr(optimizers, "offered", lambda dtype: ours)
    for line in optimizers.bench_optimizers(torch.device("cuda"), torch.float16, 343, 1):
        assert "cannot" not in line["figures"], line
