"""The roofline: that what is counted is what runs, and that what is told of it adds up."""

import json

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.core import ceilings as ceilings_module
from safelight.bench.core.results import read
from safelight.bench.counting.costs import OperatorCosts, _entered, follow
from safelight.bench.measure import roofline as measuring
from safelight.bench.measure.optimizers import held_bytes
from safelight.bench.recipes.workload import Ours, Workload, optimizer_config, random_batches
from safelight.trainer.config.toml import Config
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import resolve_base
from safelight.trainer.step.profiler_ranges import told_to

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def on_meta(device: torch.device, dtype: torch.dtype, optimizer: str, **changes) -> MetaRun:
    config = Config()
    config.optimizer = optimizer_config(optimizer)
    for name, value in changes.items():
        setattr(config.train, name, value)
    return MetaRun(config, resolve_base("tiny"), device, dtype)


def test_a_step_followed_on_meta_tensors_is_the_step_that_runs():
    work = Workload(batch_size=2, optimizer="adamw", device="cpu", precision="fp32").resolved()
    counted = follow(on_meta(CPU, torch.float32, "adamw"), 2, work.latent_size, work.latent_size)
    trainer, (batch,) = Ours(work), random_batches(1, work)
    trainer.step(batch)
    stretches = []
    with OperatorCosts(stretches) as seen, told_to(lambda name: _entered(stretches, name)):
        trainer.step(batch)
    for kind in measuring.CLASSES:
        ours, theirs = ([cost for cost in costs.values() if cost.kind == kind] for costs in (counted, seen.costs))
        assert sum(c.flops for c in ours) == sum(c.flops for c in theirs)
        # the host's own numbers (learning rate, step counts) are no matter of the device's
        assert sum(c.num_bytes for c in ours) == pytest.approx(sum(c.num_bytes for c in theirs), rel=2e-3)
    assert all(sum(c.flops for c in counted.values() if c.kind == k) > 0 for k in ("conv", "linear", "attention"))


def test_our_kernels_have_their_bytes():
    """As on a GPU: a norm's by its tensors, the optimizer's by what its table of addresses points to."""
    run = on_meta(CUDA, torch.bfloat16, "adamw8bit, exact", ema_decay=0.99)
    costs = {name: cost for (_, name), cost in follow(run, 2, 16, 16).items() if cost.is_kernel}
    assert costs["_layer_norm_fwd_kernel"].kind == "norm"
    assert {cost.kind for cost in costs.values()} == {"norm", "elementwise", "optimizer"}
    assert costs["_geglu_fwd_kernel"].kind == "elementwise"
    parameters, optimizer = run.optimizer.parameters, run.optimizer
    state = {name: optimizer.parameter_state(name) for name in parameters}
    weights = sum(2 * p.numel() for p in parameters.values())
    kept = [
        *parameters.values(),
        *(x for parts in state.values() for part, x in parts.items() if part not in ("step", "strides")),
    ]
    stepped = costs["_adamw8bit_kernel"].num_bytes + costs["_adamw32bit_kernel"].num_bytes
    # all that is kept is read and written, the gradients read
    assert stepped == pytest.approx(2 * held_bytes(kept) + weights, rel=1e-6)
    assert costs["_ema_kernel"].num_bytes == 3 * 4 * sum(p.numel() for p in parameters.values())
    # bf16 in, (2, tokens, 2 x features), and half of it out: at 16 x 16, 8 x 8 and 4 x 4
    geglus = {(256, 128): 3, (64, 256): 3, (16, 512): 1}
    assert costs["_geglu_fwd_kernel"].sizes == {(2 * 2 * t * 3 * f, 0): n for (t, f), n in geglus.items()}


def test_checkpointings_second_forward_pass_is_no_work_of_the_models():
    work = Workload(batch_size=1, latent_size=16, device="cuda")
    plain, once = measuring._followed(work, CUDA, torch.bfloat16)
    again, model = measuring._followed(Workload(**{**vars(work), "checkpointing": "full"}), CUDA, torch.bfloat16)
    flops = [sum(c.flops for c in costs.values()) for costs in (plain, again)]
    assert model == once == flops[0]
    # a third more, but for the first and the last convolution
    assert 1.2 < flops[1] / flops[0] < 4 / 3


@pytest.fixture
def told(monkeypatch, tmp_path, capsys) -> tuple[dict, str]:
    monkeypatch.setattr(ceilings_module, "SMALL", (256, 2**23, 3))
    words = f"bench roofline --model tiny --device cpu --repeats 2 --steps 1 --batch-size 2 --checkpointing full --append {tmp_path / 'r.jsonl'}"
    assert main(words.split()) == 0
    return read(tmp_path / "r.jsonl")[0], capsys.readouterr().out


def test_the_command_tells_classes_ceilings_and_flop_use(told, tmp_path):
    record, out = told
    found = record["figures"]
    assert record["config"]["ceilings"] == "measured"
    assert list(found["classes"]) == [*measuring.CLASSES, "Python and dispatch"]
    needs = [row for row in found["classes"].values() if "gflop" in row]
    assert sum(row["gflop"] for row in needs) == pytest.approx(found["step_gflop"], abs=0.01)
    assert sum(row["least_ms"] for row in needs) == pytest.approx(found["least_ms"], rel=1e-3)
    took = sum(row["ms"] for row in found["classes"].values())
    assert took == pytest.approx(found["profiled_step_ms"], rel=0.02)
    assert found["images_per_s"] == pytest.approx(2 * 1e3 / found["step_ms"][1], rel=1e-3)
    # of the model's work, and of all that was computed: the forward pass twice
    assert found["model_gflop"] < 0.9 * found["step_gflop"]
    for name, gflop in (("model_flop_use", found["model_gflop"]), ("flop_use", found["step_gflop"])):
        use = gflop / found["step_ms"][1] / found["matmul_tflops"]
        assert found[name]["share_of_limit"] == pytest.approx(use, rel=0.01)
    for word in (*measuring.CLASSES, "of the roofline", "TFLOP/s", "model-FLOP use"):
        assert word in out
    assert main(["bench", "plot", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["roofline.png"]


def test_a_card_that_is_not_here_is_counted_for(capsys):
    assert main("bench roofline --gpu rtx3060 --model tiny --json".split()) == 0
    record = json.loads(capsys.readouterr().out)
    found, config = record["figures"], record["config"]
    assert (config["precision"], config["ceilings"]) == ("bf16", "rtx3060's data sheet")
    assert (found["matmul_tflops"], found["copy_gb_per_s"]) == (25.6, 360)
    assert "step_ms" not in found
    assert found["classes"]["norm"]["calls"] > 0
    assert main("bench roofline --gpu 8GiB --model tiny".split()) == 2
    assert "the rates of 8 GiB are not known" in capsys.readouterr().err
    assert main("bench roofline --repeats 0".split()) == 2
