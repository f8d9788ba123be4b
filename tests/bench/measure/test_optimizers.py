"""`bench optimizer` and `bench memory`: every optimizer is measured, bytes match hand counts, emulated cards."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.core.results import read
from safelight.bench.counting.profiled import allocated_peak
from safelight.bench.measure import memory, optimizers
from safelight.bench.recipes.workload import Ours, Workload, optimizer_config
from safelight.errors import UserError
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.memory_plan.gpus import find_card
from tests.small_base import small_base

CPU = torch.device("cpu")
# all have 4,096 elements or more, so that every moment is 8-bit
SHAPES = {"a.weight": (128, 64), "b.weight": (64, 64, 3, 3)}
NUM = 128 * 64 + 64 * 64 * 9
# AdamW8bit's, whatever the model: of each moment a map, bounds and lines
TABLES = 2 * 256 * (4 + 4 + 8)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(optimizers, "part_of_sd15", lambda every: SHAPES)


def test_every_optimizer_and_memory_mode_of_the_config_is_measured_and_can_be_built():
    configs_of = {dtype: optimizers.offered(dtype) for dtype in (torch.float32, torch.bfloat16)}
    fields = Optimizer.model_fields
    for dtype, configs in configs_of.items():
        for name, config in configs.items():
            assert optimizer_config(name) == config
            # all can be built here, except the one that needs CUDA's unified memory
            if config.name == "bnb_paged_adamw8bit":
                with pytest.raises(
                    ValueError, match="keeps its moments in CUDA's unified memory, and this run is on a"
                ):
                    optimizers._build(config, SHAPES, dtype, CPU)
                continue
            optimizers._build(config, SHAPES, dtype, CPU)
        assert {name.split(", ")[0] for name in configs} == set(get_args(fields["name"].annotation))
    # fp32 weights have no remainder to store
    assert {name.split(", ")[1] for name in configs_of[torch.float32]} == {"fp32"}
    assert {name.split(", ")[1] for name in configs_of[torch.bfloat16]} == set(
        get_args(fields["memory"].annotation)
    ) - {"auto"}


def test_a_part_of_sd15_has_small_and_large_tensors_in_proportion():
    whole, part = optimizers.part_of_sd15(1), optimizers.part_of_sd15(64)
    sizes = [torch.Size(shape).numel() for shape in whole.values()]
    assert (len(whole), sum(sizes)) == (686, 859_520_964)
    part_sizes = [torch.Size(shape).numel() for shape in part.values()]
    assert len(part) == 11
    assert max(part_sizes) > 10**7 / 2
    assert min(part_sizes) < 1000
    assert sum(part_sizes) / sum(sizes) == pytest.approx(1 / 64, rel=0.2)


def test_bytes_held_and_moved_agree_with_counts_by_hand(small):
    lines = {
        line["config"]["optimizer"]: line["figures"] for line in optimizers.bench_optimizers(CPU, torch.bfloat16, 1, 1)
    }
    # "cannot" means that a library is missing; none is missing here, and a bug of ours must not pass as one
    assert {name for name, figures in lines.items() if "cannot" in figures} == {"bnb_paged_adamw8bit, fp32"}
    measured = {name: figures for name, figures in lines.items() if "cannot" not in figures}

    def of(name: str) -> dict:
        return next(figures for key, figures in measured.items() if key in (name, f"{name}, fp32"))

    # bf16 weight, fp32 master, two fp32 moments; the step counts are negligible
    assert of("adamw")["held_bytes_per_parameter"] == pytest.approx(2 + 4 + 8, abs=0.01)
    # prodigy keeps the first weight and a sum as well, the schedule-free ones z and one moment
    assert of("prodigy")["held_bytes_per_parameter"] == pytest.approx(2 + 4 + 16, abs=0.01)
    for name in ("schedulefree_adamw", "schedulefree_radam"):
        assert of(name)["held_bytes_per_parameter"] == pytest.approx(2 + 4 + 8, abs=0.01)
    # two 8-bit codes, each with an fp32 scale per block of 256
    codes = 2 + 8 / 256
    bitsandbytes = of("bnb_adamw8bit" if "bnb_adamw8bit, fp32" in lines else "adamw8bit")
    assert bitsandbytes["held_bytes_per_parameter"] == pytest.approx(2 + 4 + codes, abs=0.06)
    # gradient to fp32: 2 + 4, norm: 4, clipping: 4 + 4, kernel: 8 + 4 + 4, master to bf16: 4 + 2
    assert bitsandbytes["moved_bytes_per_parameter"] == pytest.approx(40, abs=0.2)
    # bytes of each memory mode's remainder
    for mode, remainder in (("exact", 2), ("near", 1), ("rounded", 0)):
        held, figures = 2 + remainder + codes, measured[f"adamw8bit, {mode}"]
        assert figures["held_bytes_per_parameter"] == pytest.approx(held + TABLES / NUM, abs=0.02)
        assert figures["moved_bytes_per_parameter"] == pytest.approx(2 * (held + TABLES / NUM) + 4, abs=0.04)
    # each of the two tensors is a page; the ring has two slots of the larger one's size, the rest is on the host
    ring, paged_bytes = 2 * 64 * 64 * 9 / NUM, 2 + codes
    paged = measured["adamw8bit, paged"]
    assert paged["held_bytes_per_parameter"] == pytest.approx(2 + ring * paged_bytes + TABLES / NUM, abs=0.02)
    assert paged["host_bytes_per_parameter"] == pytest.approx(paged_bytes, abs=0.01)
    assert paged["moved_bytes_per_parameter"] == pytest.approx(2 * (2 + 2 * paged_bytes + TABLES / NUM) + 4, abs=0.04)
    assert lines["ema"]["moved_bytes_per_parameter"] == 10
    for figures in measured.values():
        assert min(figures["step_ms"]) > 0
    assert next(iter(measured.values()))["ratio"] == 1


def test_held_bytes_include_the_states_of_our_optimizer():
    weights = [torch.randn(64, 64), torch.randn(16)]
    held = optimizers.held_bytes(AdamW8bit(weights))
    # codes of the first; fp32 moments of the second, too small for blocks; both weights; tables, scales and addresses
    expected = 4096 * (4 + 2) + 16 * 8 + 16 * (4 + 8)
    assert expected + TABLES <= held <= expected + TABLES + 128


def test_an_optimizer_that_cannot_run_has_its_reason_and_the_rest_is_measured(small, monkeypatch, tmp_path, capsys):
    real = optimizers.make_optimizer

    def refuse(module, config, dtype):
        if config.name == "adamw":
            raise UserError("adamw is not there", "more")
        return real(module, config, dtype)

    monkeypatch.setattr(optimizers, "make_optimizer", refuse)
    words = ["bench", "optimizer", "--device", "cpu", "--repeats", "1", "--append", str(tmp_path / "r")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "adamw is not there" in out
    records = {line["config"]["optimizer"]: line["figures"] for line in read(tmp_path / "r")}
    for name, figures in records.items():
        if name.split(", ")[0] == "adamw":
            assert figures == {"cannot": "adamw is not there"}
    assert any("step_ms" in figures for name, figures in records.items() if name.startswith("adamw8bit"))


def test_the_allocated_peak_counts_live_memory():
    def step():
        a = torch.ones(1024, 1024)
        b = a + 1
        del a
        return (b * 2).sum()

    # a and b, then b and its double, but never three at once
    assert 2 * 2**22 <= allocated_peak(step) < 2 * 2**22 + 2**12


@pytest.mark.slow
def test_memory_on_a_cpu_agrees_with_the_plans_trace(capsys):
    name = next(name for name in optimizers.offered(torch.float32) if name.startswith("adamw8bit"))
    command = ["bench", "memory", "--device", "cpu", "--batch-size", "4", "--precision", "fp32", "--json"]
    name = name if "memory" not in Optimizer.model_fields else "adamw8bit, fp32"
    assert main([*command, "--optimizer", name]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures_of = {line["config"]["checkpointing"]: line["figures"] for line in lines}
    assert set(figures_of) == set(memory.checkpointing_modes())
    # 3.2 M parameters: fp32 weights and 8-bit codes, fp32 moments of small tensors
    assert 6 * 3.1 < figures_of["none"]["held_mib"] * 1.049 < 7 * 3.3
    # checkpointing saves memory, up to the optimizer's own peak
    assert figures_of["full"]["step_mib"] < 0.9 * figures_of["none"]["step_mib"]
    # the trace behind `safelight plan` agrees with the allocator
    assert all(figures["step_to_predicted"] == pytest.approx(1, rel=0.05) for figures in figures_of.values())
    assert main([*command, "--optimizer", "sgd"]) == 2
    assert "adamw" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_stream_are_not_held_and_what_a_step_copies_is_counted(monkeypatch):
    monkeypatch.setattr(memory, "checkpointing_modes", lambda: ("full",))
    work = Workload(small_base(), latent_size=8, precision="bf16", device="cpu")
    paged, streamed = memory.bench_memory(work, ("paged", "streamed"))
    stream = Ours(replace(work, optimizer="adamw8bit, streamed", checkpointing="full"), fused=True).optimizer.stream
    weights_mib = stream.num_bytes / 2**20
    ring_mib = sum(slot.nbytes for slot in stream.ring) / 2**20
    assert paged["figures"].keys() == streamed["figures"].keys() - {"weights_in_mib", "weights_out_mib"}
    saved = paged["figures"]["held_mib"] - streamed["figures"]["held_mib"]
    assert saved == pytest.approx(weights_mib - ring_mib, abs=0.02)
    # in for forward and backward, except the block at the turn, which is still there, and out once
    inward, outward = (streamed["figures"][f"weights_{way}_mib"] for way in ("in", "out"))
    assert 1.5 * weights_mib < inward <= 2 * weights_mib + 0.01
    assert outward == pytest.approx(weights_mib, abs=0.01)
    assert streamed["figures"]["step_to_predicted"] == pytest.approx(1, rel=0.05)


def test_emulated_cards_are_tried_from_small_to_large_and_the_limit_is_lifted(monkeypatch):
    """CUDA calls are recorded; the step is replaced by one that allocates 5 GiB and reserves up to 7."""
    fractions, tried = [1.0], []

    class Properties:
        total_memory = 10 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    # it accepts no torch.device without an index
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: fractions.append(share))
    monkeypatch.setattr(memory, "context_bytes", lambda device: 2**29)
    monkeypatch.setattr(memory, "free", lambda device: None)
    monkeypatch.setattr(memory, "this_card", lambda device: find_card("10GiB"))
    predicted = SimpleNamespace(peak=SimpleNamespace(total=4 * 2**30), transient=2**30)
    monkeypatch.setattr(memory, "traced_step", lambda work: predicted)

    def fake_step(work):
        tried.append(fractions[-1])
        fits = fractions[-1] * 10 >= 6
        return {"allocated_gib": 5.0, "reserved_gib": 7.0, "step_ms": 1.0} if fits else None

    monkeypatch.setattr(memory, "try_step", fake_step)
    work = Workload(device="cpu").resolved()
    figures = memory.measure_on_gpu(work)
    # 4 GiB is less than what is allocated; 6 GiB minus the context fails; 8 suffices; this GPU does not have 12
    assert tried == pytest.approx([1.0, 0.55, 0.75])
    assert figures["smallest_card_gib"] == 8
    assert figures["allocated_to_predicted"] == 5 / 4
    assert fractions[-1] == 1.0
    monkeypatch.setattr(memory, "try_step", lambda work: None)
    assert memory.measure_on_gpu(work) == {"fits": False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_fails_on_an_emulated_card_that_is_too_small():
    work = Workload(device="cuda").resolved()
    figures = memory.measure_on_gpu(work)
    assert figures["fits"]
    assert figures["smallest_card_gib"] == 4
    assert memory.step_on_emulated_card(work, 0.01, 0) is None
