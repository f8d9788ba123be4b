"""Estimated memory of every candidate, the choice among them, refusals, and golden plans of SD1.5 and SDXL.

`python tests/trainer/memory_plan/test_planner.py` rewrites the golden plans.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.counting.profiled import allocated_peak
from safelight.kernels.optim.blockwise_8bit import in_memory_order
from safelight.kernels.optim.split_weights import split_nearest
from safelight.kernels.unet.checkpointing import MODES
from safelight.options.overrides import take_overrides, with_overrides
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.memory_plan.allocation_trace import MASTER, OPTIMIZER, WEIGHTS
from safelight.trainer.memory_plan.estimator import MemoryEstimator, dtype_on, max_graphs
from safelight.trainer.memory_plan.gpus import (
    CARDS,
    CONTEXT_BYTES,
    CUDNN_BYTES,
    GRAPH_BYTES_A_LAUNCH,
    SECONDS_A_KERNEL,
    SECONDS_A_LAUNCH,
    Card,
    find_card,
    this_card,
)
from safelight.trainer.memory_plan.memory_tracer import CUDA_ROUNDING
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.static_bytes import static_bytes
from safelight.trainer.models.base import resolve_base
from safelight.trainer.optim import kernel_adamw
from safelight.trainer.optim.kernel_adamw import SPLIT_BYTES
from safelight.units import GIB
from tests.small_base import small_base

CUDA = torch.device("cuda")
GOLDEN = Path(__file__).parent / "golden_plans.json"
GOLDEN_LORA = Path(__file__).parent / "golden_lora.json"
GOLDEN_CARDS = ("t4", "rtx3060", "rtx4090")


def config_of(base: str = "", **sections: dict) -> Config:
    """Return the config of a base; by default of the small one, whose steps are traced in a third of the time."""
    sections = {"train": {"checkpointing": "auto", "batch_size": 4}, "data": {"resolution": 512}, **sections}
    if not base:
        # its steps need less than validation and sampling, which are off so that the steps decide
        sections |= {"data": {"resolution": 64}, "validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
        sections["train"] = {**sections["train"], "batch_size": 64}
    return parse_config({"model": {"base": base or small_base()}, **sections}, "here")


def card(gib: float, **more) -> Card:
    return Card(f"{gib:g} GiB", gib, **more)


@pytest.fixture(scope="module")
def roomy() -> MemoryEstimator:
    return MemoryEstimator(config_of(), card(100))


@pytest.mark.parametrize("memory", ["near", "rounded", "paged", "streamed", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_estimate_of_a_memory_mode_equals_a_trace_in_that_mode(memory, dtype):
    estimator = MemoryEstimator(config_of(), card(100, has_bf16=dtype == torch.bfloat16))
    real = MetaRun(config_of(optimizer={"memory": memory}), resolve_base(small_base()), CUDA, dtype)
    loading = real.loading.total
    real.step(1, 8, 8)
    fused = memory == "streamed"
    held = estimator.held(memory, estimator.meta_run(fused))
    if memory in ("paged", "streamed"):
        # tables of addresses, for each page and each slot, are not estimated
        more = real.live.live[OPTIMIZER] - held[OPTIMIZER]
        slots = 1 if real.optimizer.stream is None else len(real.optimizer.stream.ring)
        assert 0 <= more < 8192 * slots * len(real.optimizer.pages.page_of)
        held[OPTIMIZER] += more
    assert held == real.live.live
    # the trace has no fp32 pieces that pass through a real GPU
    largest = max(p.numel() for p in real.unet.parameters())
    most = max(loading, sum(held.values())) + 32 * largest
    assert loading <= estimator.loading_peak(memory, estimator.meta_run(fused)) <= most
    assert real.step(2, 16, 16).transient == estimator.step_trace("none", fused, 2).transient


def test_converting_weights_in_pieces_needs_no_more_than_planned_and_gives_the_same_values(monkeypatch):
    monkeypatch.setattr(kernel_adamw, "SPLIT_ELEMENTS", 2**18)
    for memory in ("exact", "near", "rounded"):
        for dtype in (torch.bfloat16, torch.float16):
            weights = torch.randn(2**19 + 100).view(-1, 4, 1, 1).to(memory_format=torch.channels_last)
            whole, in_pieces = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())

            def convert(p=in_pieces, dtype=dtype, memory=memory):
                return kernel_adamw.to_16_bit(p, dtype, memory, torch.device("cpu"))

            kept = []
            assert allocated_peak(lambda: kept.append(convert())) <= 4 * len(whole.flatten()) + SPLIT_BYTES * 2**18  # noqa: B023
            high, low = split_nearest(in_memory_order(whole.detach()), dtype, memory)
            assert torch.equal(in_memory_order(in_pieces.detach()), high)
            assert in_pieces.stride() == whole.stride()
            assert (kept[0] is None) == (low is None)
            assert low is None or torch.equal(in_memory_order(kept[0]), low)


@pytest.mark.parametrize("checkpointing", MODES[:3])
def test_a_step_of_any_batch_size_is_extrapolated_from_two_traces(checkpointing):
    run = MemoryEstimator(config_of(), card(100)).meta_run(True)
    run.checkpoint(checkpointing)
    small, large, traced = (run.step(n, 16, 16) for n in (2, 4, 7))
    assert traced.allocations.peak(CUDA_ROUNDING) == traced.peak
    extrapolated = small.extrapolate(2, large, 4, 7, CUDA_ROUNDING)
    assert (extrapolated.peak, extrapolated.work.flops, extrapolated.held) == (
        traced.peak,
        traced.work.flops,
        traced.held,
    )
    assert extrapolated.work.launches == traced.work.launches
    assert extrapolated.work.bytes_moved == pytest.approx(traced.work.bytes_moved, rel=0.01)
    # slices of a single row are not copied
    assert abs(small.extrapolate(2, large, 4, 1, CUDA_ROUNDING).transient - run.step(1, 16, 16).transient) < 40_000
    # a trace with other events cannot be used
    run.checkpoint("none" if checkpointing != "none" else "full")
    assert small.extrapolate(2, run.step(4, 16, 16), 4, 7, CUDA_ROUNDING) is None


@pytest.mark.long
def test_the_best_that_fits_is_chosen_and_otherwise_the_run_is_refused(roomy):
    exact, near = (roomy.estimate(memory, "none", 64).needed_bytes for memory in ("exact", "near"))
    full = roomy.estimate("exact", "full", 64).needed_bytes
    assert full < exact
    assert near < exact
    planner = Planner(config_of(), card(exact / GIB))
    assert (planner.choose().memory, planner.choose().checkpointing) == ("exact", "none")
    # a slower step is preferred to less exact weights
    chosen = Planner(config_of(), card((exact - 1) / GIB)).choose()
    assert (chosen.memory, chosen.checkpointing) == ("exact", "selective")
    pinned = config_of(optimizer={"memory": "exact"}, train={"checkpointing": "none"})
    tight = Planner(pinned, card((exact - 1) / GIB))
    assert tight.choose() is None
    assert tight.refusal().endswith(tight.what_would_fit().options())
    assert "--optimizer.memory exact --train.checkpointing selective" in tight.refusal()
    reached = []
    assert tight.summary(lambda *numbers: reached.append(numbers))["refusal"] == tight.refusal()
    # what takes long is told, from the first to the last
    num = len(tight.summary()["ways"])
    assert reached == [(done, num) for done in range(num + 1)]


@pytest.mark.long
def test_an_optimizer_that_cannot_fit_is_answered_with_one_that_does():
    adamw = config_of(optimizer={"name": "adamw", "memory": "fp32"})
    needs = Planner(adamw, card(100)).smallest().needed_bytes
    fits = Planner(config_of(), card(100)).smallest().needed_bytes
    assert fits < needs
    planner = Planner(adamw, card((fits + needs) / 2 / GIB))
    assert planner.choose() is None
    assert planner.what_would_fit() is None
    fix = r"it would need [\d.]+ GiB with (--optimizer.name adamw8bit --optimizer.memory .*)"
    options = re.search(fix, planner.refusal())
    # what it proposes does fit
    settings = with_overrides(adamw.model_dump(by_alias=True), take_overrides(options[1].split())[1])
    assert Planner(parse_config(settings, "here"), planner.card).choose() is not None
    # a resumed run keeps its optimizer
    assert "adamw8bit" not in planner.refusal(is_resumed=True)
    # the precision is at fault, not the optimizer
    fp32 = config_of(model={"base": small_base(), "precision": "fp32"})
    needs = Planner(fp32, card(100)).smallest().needed_bytes
    planner = Planner(fp32, card((fits + needs) / 2 / GIB))
    assert " GiB with --model.precision auto --optimizer.memory " in planner.refusal()


def test_a_limit_below_what_any_plan_needs(roomy):
    config = config_of(memory={"limit_gib": 0.25})
    planner = Planner(config, card(100))
    assert planner.choose() is None
    least = min(
        planner.estimator.estimate(memory, "offload", 64, True).needed_bytes for memory in ("paged", "streamed")
    )
    assert planner.refusal().startswith(f"this run needs {least / GIB:.2f} GiB at batch size 64")
    assert "memory.limit_gib allows 0.25 GiB; the smallest plan needs" in planner.refusal()
    assert planner.smallest().needed_bytes > planner.budget
    # a limit above the card's memory has no effect
    assert Planner(config_of(memory={"limit_gib": 9}), card(1)).budget == GIB


def test_accumulation_keeps_a_buffer_of_every_gradient_even_with_a_fused_step(roomy):
    accumulating = MemoryEstimator(config_of(train={"accumulate": 3, "checkpointing": "auto"}), card(100))
    one, several = (estimator.estimate("exact", "full", 1, True) for estimator in (roomy, accumulating))
    num_parameters = sum(p.numel() for p in roomy.meta_run(True).unet.parameters())
    assert several.held_bytes - one.held_bytes == pytest.approx(2 * num_parameters, rel=0.1)
    assert several.held_bytes + several.step_bytes - one.held_bytes - one.step_bytes > 2 * num_parameters * 0.9
    config = config_of(train={"accumulate": 3, "checkpointing": "auto", "accumulate_dtype": "fp32"})
    precise = MemoryEstimator(config, card(100)).estimate("exact", "full", 1, True)
    assert precise.held_bytes - one.held_bytes == pytest.approx(4 * num_parameters, rel=0.1)


def test_cards():
    assert find_card("T4") is find_card("Tesla T4") is CARDS["t4"]
    assert find_card("4090") is find_card("NVIDIA GeForce RTX 4090") is CARDS["rtx4090"]
    assert find_card("8GiB").usable_gib == find_card("8 gb").usable_gib == 8
    for name, message in (
        ("rtx4091", "did you mean rtx4090"),
        ("3061", "did you mean rtx306"),
        ("abacus", "known: t4"),
    ):
        with pytest.raises(ValueError, match=message):
            find_card(name)
    with pytest.raises(ValueError, match="has no memory"):
        find_card("0GiB")
    with pytest.raises(ValueError, match="t4 has no bf16 arithmetic"):
        dtype_on(CARDS["t4"], "bf16")


def test_a_replayed_step_does_not_wait_for_launches():
    h200, work = find_card("h200"), (2_470_000_000_000, 24_800_000_000, 1400)
    eager, replayed = h200.seconds(*work), h200.seconds(*work, is_replayed=True)
    assert eager == 1400 * SECONDS_A_LAUNCH
    assert replayed < eager / 2
    # a step that is bound by the device takes the same time either way
    many = (work[0] * 32, *work[1:])
    assert h200.seconds(*many) == h200.seconds(*many, is_replayed=True)
    assert h200.seconds(*many[:2], 1401) - h200.seconds(*many) == pytest.approx(SECONDS_A_KERNEL)
    assert find_card("8GiB").seconds(*work, is_replayed=True) is None


def test_graphs_are_counted_by_the_sizes_that_batches_have():
    def most(num_batch_ids: int = 0, **settings) -> int:
        return max_graphs(config_of("random:sd15", **settings), 10, num_batch_ids)

    assert most() == 20
    assert most(train={"accumulate": 2}) == 80
    # a short batch of each batch id, but no more than there are sizes
    assert most(2, train={"batch_size": 4}) == 40
    assert most(100, train={"batch_size": 4}) == 50
    assert most(100, data={"short_batches": "carry"}) == 10


def test_the_plan_says_whether_steps_are_replayed_and_counts_the_memory_of_graphs(roomy):
    known = Card("known", 100, 4800, 790, pcie_gb_s=50)
    estimators = {
        how: MemoryEstimator(config_of(train={"cuda_graphs": how, "checkpointing": "auto"}), known)
        for how in ("auto", "off")
    }
    replayed, eager = (estimator.estimate("exact", "none", 1) for estimator in estimators.values())
    assert (replayed.no_graphs, eager.no_graphs) == ("", "train.cuda_graphs is off")
    assert replayed.images_per_s > 3 * eager.images_per_s
    launches = estimators["auto"].step_trace("none", False, 1).work.launches
    graphs = max_graphs(roomy.config, len(roomy.buckets)) * launches * GRAPH_BYTES_A_LAUNCH
    # plus a third cuBLAS workspace: forward and backward on the capturing stream, and forward on the default one
    assert (replayed.graph_bytes, eager.graph_bytes) == (graphs + known.cublas_bytes(is_deterministic=False), 0)
    assert "memory paged streams" in estimators["auto"].estimate("paged", "none", 1).no_graphs
    streamed = estimators["auto"].estimate("streamed", "none", 1, True)
    assert "memory streamed streams weights and" in streamed.no_graphs
    # the weights twice to the GPU and once back, the state once each way
    host = streamed.host
    assert streamed.bytes_inward == 2 * host.weights + host.states
    assert streamed.bytes_outward == host.weights + host.states
    assert "offload streams" in estimators["auto"].estimate("exact", "offload", 1).no_graphs
    one_byte_more = replace(known, usable_gib=(replayed.needed_bytes + 1) / GIB)
    tight = MemoryEstimator(config_of(), one_byte_more).estimate("exact", "none", 1)
    assert re.fullmatch(r"with graphs the run would need \d+\.\d\d GiB of the \d+\.\d\d GiB available", tight.no_graphs)


def test_cuda_graphs_on_chooses_a_candidate_that_can_use_them(roomy):
    wanted = roomy.estimate("exact", "selective", 64)
    outside_step = wanted.needed_bytes + wanted.outside_step_bytes - wanted.held_bytes
    evaluating = wanted.eval_batching.peak_bytes + wanted.step_bytes
    room = card((max(outside_step, evaluating) + wanted.graph_bytes) / GIB)
    for setting, chosen in (("auto", "none"), ("on", "selective")):
        config = config_of(train={"cuda_graphs": setting, "checkpointing": "auto"}, optimizer={"fused_backward": False})
        candidate = Planner(config, room).choose()
        assert (candidate.memory, candidate.checkpointing, bool(candidate.no_graphs)) == (
            "exact",
            chosen,
            setting == "auto",
        )
    # if no candidate can use graphs, the best is returned with the reason
    config = config_of(train={"cuda_graphs": "on", "checkpointing": "auto"}, optimizer={"memory": "paged"})
    assert "paged streams" in Planner(config, card(100)).choose().no_graphs


def test_cublas_workspace_is_counted_for_each_handle_and_stream():
    for name, deterministic, each in (
        ("t4", False, 8_519_680 + 2**20),
        ("h200", False, 33 * 2**20),
        ("t4", True, 33 * 2**20),
    ):
        known = CARDS[name]
        assert known.cublas_bytes(is_deterministic=deterministic) == each
        assert known.workspace(is_deterministic=deterministic) == 2 * each + CUDNN_BYTES
    deterministic, fastest = (
        MemoryEstimator(config_of(run={"deterministic": how}), card(100)).estimate("exact", "none", 1)
        for how in (True, False)
    )
    assert deterministic.needed_bytes - fastest.needed_bytes == 2 * (33 * 2**20 - 8_519_680 - 2**20)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("Tesla T4", 24), ("NVIDIA GeForce RTX 3060 Laptop GPU", 25.6), ("NVIDIA H200", 790), ("Quadro 9", None)],
)
def test_the_local_card(name, rate, monkeypatch):
    properties = type("Properties", (), {"name": name, "major": 9 if "H200" in name else 7, "minor": 5})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    card = this_card(CUDA)
    assert (card.name, card.tflops) == (name, rate)
    assert card.usable_gib * GIB == 5 * GIB + CONTEXT_BYTES
    assert (card.has_bf16, card.is_hopper) == ((True, True) if "H200" in name else (False, False))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config_of()))
    assert main(["plan", str(path), "--gpu", "rtx4090"]) == 0
    text, progress = capsys.readouterr()
    assert "planning 0/" in progress
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert text.count("> ") >= 2
    assert main(["plan", str(path), "--gpu", "rtx4090", "--json"]) == 0
    printed = capsys.readouterr().out
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in re.findall(r'"([^"]+)":', printed))
    plan = json.loads(printed)["plan"]
    assert f"> {plan['chosen']['needed_bytes'] / GIB:.2f}" in text
    # streamed only steps inside backward
    assert len(plan["ways"]) == 4 * (4 * 4 * 2 + 4)
    assert text.splitlines()[2].split()[:3] == ["memory", "checkpointing", "fused"]
    rows = [line.split()[:3] for line in text.splitlines() if line.startswith(("exact ", "paged "))]
    # in order of preference
    assert rows[:5] == [["exact", how, "no"] for how in MODES[:3]] + [["exact", how, "yes"] for how in MODES[:2]]
    assert rows[8:10] == [["paged", "none", "yes"], ["paged", "selective", "yes"]]
    assert main(["plan", str(path), "--gpu", "rtx4091"]) == 2
    assert "did you mean rtx4090?" in capsys.readouterr().err
    assert main(["plan", str(path), "--gpu", "rtx4090", "--memory.limit-gib", "0.3"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("safelight plan: this run needs")


def golden(name: str) -> dict:
    """Return GiB of every candidate for SD1.5 at 512 px and SDXL at 1024 px, and the chosen one."""
    figures = {}
    for base, resolution in (("sd15", 512), ("sdxl", 1024)):
        plan = Planner(config_of(f"random:{base}", data={"resolution": resolution}), find_card(name)).summary()
        chosen = plan["chosen"]
        gib = {place(way): round(way["needed"] / GIB, 3) for way in plan["ways"]}
        figures[base] = {"chosen": chosen and place(chosen), "gib": gib}
    return figures


def golden_lora(base: str) -> dict:
    """Return GiB of some candidates of a LoRA on an RTX 3060, and what is held between steps."""
    resolution = {"sd15": 512, "sdxl": 1024}[base]
    sections = {"data": {"resolution": resolution}, "adapter": {"kind": "lora", "rank": 16}}
    estimator = MemoryEstimator(config_of(f"random:{base}", **sections), find_card("rtx3060"))
    figures = {}
    for checkpointing, batch_size in (("none", 1), ("full", 1), ("full", 4)):
        candidate = estimator.estimate("exact", checkpointing, batch_size, fused=False)
        figures[f"exact {checkpointing} {batch_size}"] = round(candidate.needed_bytes / GIB, 3)
    return {**figures, "held": round(candidate.held_bytes / GIB, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_golden_plans_of_a_lora(base):
    assert golden_lora(base) == json.loads(GOLDEN_LORA.read_text())[base]


def test_a_lora_keeps_no_state_of_frozen_weights():
    """Beside the frozen 16-bit weights: adapters, their remainders and moments; and fewer of them in a checkpoint."""
    lora = {"adapter": {"kind": "lora", "rank": 4}}
    whole, small = (static_bytes(config_of(**more), CUDA, torch.bfloat16) for more in ({}, lora))
    assert small.num_parameters == whole.num_parameters + small.num_trained
    assert small.weights == 2 * small.num_parameters
    assert small.master == small.saved_weights == 2 * small.num_trained
    assert small.gradients == 2 * small.num_trained
    assert small.checkpoint == 4 * small.num_trained + small.moments < whole.checkpoint / 10
    held = MemoryEstimator(config_of(**lora), card(100)).estimate("exact", "none", 64, fused=False)
    assert held.bytes_by_kind[MASTER] < 0.1 * held.bytes_by_kind[WEIGHTS]


def test_a_plan_for_a_lora_does_not_move_its_state_to_the_host():
    planner = Planner(config_of(adapter={"kind": "lora"}), card(100))
    assert planner.memory_modes() == ("exact", "near", "rounded")


def place(way: dict) -> str:
    fused = "fused" if way["fused_backward"] else "unfused"
    return f"{way['memory']} {way['checkpointing']} {fused} {way['batch_size']}"


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_CARDS)
def test_golden_plans(name):
    assert golden(name) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.long
def test_known_figures_of_sd15():
    """One candidate of the golden plans, and its largest parts."""
    config = config_of("random:sd15", optimizer={"fused_backward": True})
    candidate = MemoryEstimator(config, find_card("rtx4090")).estimate("exact", "full", 1)
    gib = json.loads(GOLDEN.read_text())["rtx4090"]["sd15"]["gib"]
    assert round(candidate.needed_bytes / GIB, 3) == gib["exact full fused 1"]
    num = 859_520_964
    # 686 tensors, each rounded up to 512 bytes
    assert 2 * num <= candidate.bytes_by_kind[MASTER] <= 2 * num + 686 * 512


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: golden(name) for name in GOLDEN_CARDS}, indent=1) + "\n")
    GOLDEN_LORA.write_text(json.dumps({base: golden_lora(base) for base in ("sd15", "sdxl")}, indent=1) + "\n")
