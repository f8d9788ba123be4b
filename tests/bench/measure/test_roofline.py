"""`bench roofline`: the traced costs are those of the step that runs, and the printed figures add up."""

import json
from dataclasses import replace

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.core import ceilings as ceilings_module
from safelight.bench.core.results import read
from safelight.bench.counting.costs import OperatorCosts, _open_phase, step_costs
from safelight.bench.measure import roofline
from safelight.bench.measure.optimizers import held_bytes
from safelight.bench.recipes.workload import Ours, Workload, config_of, optimizer_config, random_batches
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import resolve_base
from safelight.trainer.step.profiler_ranges import listen_to_ranges

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def on_meta(device: torch.device, dtype: torch.dtype, optimizer: str, **changes) -> MetaRun:
    config = Config()
    config.optimizer = optimizer_config(optimizer)
    for name, value in changes.items():
        setattr(config.train, name, value)
    return MetaRun(config, resolve_base("tiny"), device, dtype)


@pytest.mark.usefixtures("noise_by_torch")
def test_a_step_traced_on_meta_tensors_has_the_costs_of_the_real_step(monkeypatch):
    # a trace clips the gradient, a real step only if it is too long
    monkeypatch.setattr("safelight.bench.recipes.workload.MAX_GRAD_NORM", 1e-3)
    work = Workload(batch_size=2, optimizer="adamw", device="cpu", precision="fp32").resolved()
    counted = step_costs(on_meta(CPU, torch.float32, "adamw"), 2, work.latent_size, work.latent_size)
    trainer, (batch,) = Ours(work), random_batches(1, work)
    trainer.step(batch)
    phases = []
    with OperatorCosts(phases) as seen, listen_to_ranges(lambda name: _open_phase(phases, name)):
        trainer.step(batch)
    for kind in roofline.CLASSES:
        ours, theirs = ([cost for cost in costs.values() if cost.kind == kind] for costs in (counted, seen.costs))
        assert sum(c.flops for c in ours) == sum(c.flops for c in theirs)
        # scalars on the host (learning rate, step counts) are not counted on meta tensors
        assert sum(c.num_bytes for c in ours) == pytest.approx(sum(c.num_bytes for c in theirs), rel=2e-3)
    assert all(sum(c.flops for c in counted.values() if c.kind == k) > 0 for k in ("conv", "linear", "attention"))


def test_the_bytes_of_our_kernels():
    """As on a GPU: a norm's are those of its tensors, the optimizer's those behind its table of addresses."""
    run = on_meta(CUDA, torch.bfloat16, "adamw8bit, exact", ema_decay=0.99)
    costs = {name: cost for (_, name), cost in step_costs(run, 2, 16, 16).items() if cost.is_kernel}
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
    # weights and states are read and written, the gradients are read
    assert stepped == pytest.approx(2 * held_bytes(kept) + weights, rel=1e-6)
    assert costs["_ema_kernel"].num_bytes == 3 * 4 * sum(p.numel() for p in parameters.values())
    # bf16 (2, tokens, 2 x features) in and half of it out, at 16x16, 8x8 and 4x4
    geglus = {(256, 128): 3, (64, 256): 3, (16, 512): 1}
    assert costs["_geglu_fwd_kernel"].sizes == {(2 * 2 * t * 3 * f, 0): n for (t, f), n in geglus.items()}


def test_model_flops_leave_out_recomputation_by_checkpointing():
    work = Workload(batch_size=1, latent_size=16, device="cuda")
    plain, plain_flops = roofline._traced(work, CUDA, torch.bfloat16)
    recomputed, model_flops = roofline._traced(replace(work, checkpointing="full"), CUDA, torch.bfloat16)
    flops = [sum(c.flops for c in costs.values()) for costs in (plain, recomputed)]
    assert model_flops == plain_flops == flops[0]
    # a third more, except for the first and the last convolution
    assert 1.2 < flops[1] / flops[0] < 4 / 3


@pytest.mark.long
def test_the_command_reports_classes_ceilings_and_flop_utilization(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceilings_module, "SMALL", (256, 2**23, 3))
    arguments = "--model tiny --device cpu --repeats 2 --steps 1 --batch-size 2 --latent-size 8 --checkpointing full"
    assert main(["bench", "roofline", *arguments.split(), "--append", str(tmp_path / "r.jsonl")]) == 0
    (record,), out = read(tmp_path / "r.jsonl"), capsys.readouterr().out
    figures = record["figures"]
    assert record["config"]["ceilings"] == "measured"
    assert list(figures["classes"]) == [*roofline.CLASSES, "Python and dispatch"]
    counted = [row for row in figures["classes"].values() if "gflop" in row]
    assert sum(row["gflop"] for row in counted) == pytest.approx(figures["step_gflop"], abs=0.01)
    assert sum(row["least_ms"] for row in counted) == pytest.approx(figures["least_ms"], rel=1e-3)
    measured_ms = sum(row["ms"] for row in figures["classes"].values())
    assert measured_ms == pytest.approx(figures["profiled_step_ms"], rel=0.02)
    assert figures["images_per_s"] == pytest.approx(2 * 1e3 / figures["step_ms"][1], rel=1e-3)
    # the model's FLOPs contain the forward pass once, the step's twice
    assert figures["model_gflop"] < 0.9 * figures["step_gflop"]
    for name, gflop in (("model_flop_use", figures["model_gflop"]), ("flop_use", figures["step_gflop"])):
        use = gflop / figures["step_ms"][1] / figures["matmul_tflops"]
        assert figures[name]["share_of_limit"] == pytest.approx(use, rel=0.01)
    for word in (*roofline.CLASSES, "of the roofline", "TFLOP/s", "model FLOP utilization"):
        assert word in out
    assert main(["bench", "plot", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["roofline.png"]


def test_a_card_that_is_not_here_is_predicted_from_its_data_sheet(capsys):
    assert main("bench roofline --gpu rtx3060 --model tiny --json".split()) == 0
    record = json.loads(capsys.readouterr().out)
    figures, config = record["figures"], record["config"]
    assert (config["precision"], config["ceilings"]) == ("bf16", "rtx3060's data sheet")
    assert (figures["matmul_tflops"], figures["copy_gb_per_s"]) == (25.6, 360)
    assert "step_ms" not in figures
    assert figures["classes"]["norm"]["calls"] > 0
    assert main("bench roofline --gpu 8GiB --model tiny".split()) == 2
    assert "the compute rate and bandwidth of 8 GiB are unknown" in capsys.readouterr().err
    assert main("bench roofline --repeats 0".split()) == 2


@pytest.mark.long
def test_a_step_has_its_costs_though_its_shapes_were_traced_before():
    """The planner's trace answers operators by their shapes; one that counts must see each call."""
    run = MetaRun(
        config_of(Workload("tiny", 8, device="cpu", precision="fp32")),
        resolve_base("tiny"),
        torch.device("cpu"),
        torch.float32,
    )
    first, second = (step_costs(run, 1, 8, 8) for _ in range(2))
    assert first == second
    assert sum(cost.calls for cost in first.values() if cost.kind == "conv") > 50
