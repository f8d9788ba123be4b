"""What a run needs of a card: every way, the choice among them, refusals, and golden tables for SD1.5 and SDXL.

`python tests/trainer/memory_plan/test_planner.py` writes the golden tables anew.
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
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.memory_plan.allocation_trace import MASTER, OPTIMIZER
from safelight.trainer.memory_plan.estimator import dtype_on, most_graphs
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
from safelight.trainer.models.base import resolve_base
from safelight.trainer.optim import kernel_adamw
from safelight.trainer.optim.kernel_adamw import SPLIT_BYTES
from safelight.units import GIB

CUDA = torch.device("cuda")
GOLDEN = Path(__file__).parent / "golden_plans.json"
GOLDEN_CARDS = ("t4", "rtx3060", "rtx4090")


def config_of(base: str = "tiny", **sections: dict) -> Config:
    sections = {"train": {"checkpointing": "auto", "batch_size": 4}, "data": {"resolution": 512}, **sections}
    if base == "tiny":
        # its steps are smaller than anything else: only they are looked at
        sections |= {"data": {"resolution": 64}, "validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
        sections["train"] = {**sections["train"], "batch_size": 64}
    return parse_config({"model": {"base": base}, **sections}, "here")


def card(gib: float, **more) -> Card:
    return Card(f"{gib:g} GiB", gib, **more)


@pytest.fixture(scope="module")
def roomy() -> Planner:
    return Planner(config_of(), card(100))


@pytest.mark.parametrize("memory", ["near", "rounded", "paged", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mode_that_was_not_traced_is_as_if_it_had_been(memory, dtype):
    planner = Planner(config_of(), card(100, has_bf16=dtype == torch.bfloat16))
    real = MetaRun(config_of(optimizer={"memory": memory}), resolve_base("tiny"), CUDA, dtype)
    loading = real.loading.total
    real.step(1, 8, 8)
    held = planner.held(memory, planner._run(False))
    if memory == "paged":
        # tables of addresses are there for each page, and for each slot
        more = real.live.live[OPTIMIZER] - held[OPTIMIZER]
        assert 0 <= more < 8192 * len(real.optimizer.pages.page_of)
        held[OPTIMIZER] += more
    assert held == real.live.live
    # pieces of fp32 pass a real card, meta tensors hold no values
    largest = max(p.numel() for p in real.unet.parameters())
    assert loading <= planner._loading(memory, planner._run(False)) <= loading + 32 * largest
    assert real.step(2, 16, 16).transient == planner._trace("none", False, 2).transient


def test_bringing_weights_to_16_bits_takes_no_more_than_is_planned_and_by_pieces_gives_the_same(monkeypatch):
    monkeypatch.setattr(kernel_adamw, "SPLIT_ELEMENTS", 2**18)
    for memory in ("exact", "near", "rounded"):
        for dtype in (torch.bfloat16, torch.float16):
            weights = torch.randn(2**19 + 100).view(-1, 4, 1, 1).to(memory_format=torch.channels_last)
            whole, by_pieces = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())

            def bring(p=by_pieces, dtype=dtype, memory=memory):
                return kernel_adamw.to_16_bit(p, dtype, memory, torch.device("cpu"))

            kept = []
            assert allocated_peak(lambda: kept.append(bring())) <= 4 * len(whole.flatten()) + SPLIT_BYTES * 2**18  # noqa: B023
            high, low = split_nearest(in_memory_order(whole.detach()), dtype, memory)
            assert torch.equal(in_memory_order(by_pieces.detach()), high)
            assert by_pieces.stride() == whole.stride()
            assert (kept[0] is None) == (low is None)
            assert low is None or torch.equal(in_memory_order(kept[0]), low)


@pytest.mark.parametrize("how", MODES[:3])
def test_a_step_of_any_batch_size_follows_from_two_traces(how):
    run = Planner(config_of(), card(100))._run(True)
    run.checkpoint(how)
    small, large, wanted = (run.step(n, 16, 16) for n in (2, 4, 7))
    assert wanted.allocations.peak(CUDA_ROUNDING) == wanted.peak
    found = small.between(2, large, 4, 7, CUDA_ROUNDING)
    assert (found.peak, found.work.flops, found.held) == (wanted.peak, wanted.work.flops, wanted.held)
    assert found.work.launches == wanted.work.launches
    assert found.work.bytes_moved == pytest.approx(wanted.work.bytes_moved, rel=0.01)
    # the pieces of a single row are not copied
    assert abs(small.between(2, large, 4, 1, CUDA_ROUNDING).transient - run.step(1, 16, 16).transient) < 40_000
    # of another order, nothing follows
    run.checkpoint("none" if how != "none" else "full")
    assert small.between(2, run.step(4, 16, 16), 4, 7, CUDA_ROUNDING) is None


def test_the_best_that_fits_is_taken_and_what_does_not_fit_is_refused(roomy):
    exact, near = (roomy.need(memory, "none", 64).needed for memory in ("exact", "near"))
    full = roomy.need("exact", "full", 64).needed
    assert full < exact
    assert near < exact
    planner = Planner(config_of(), card(exact / GIB))
    assert (planner.choose().memory, planner.choose().checkpointing) == ("exact", "none")
    # what is kept of the weights comes before time
    chosen = Planner(config_of(), card((exact - 1) / GIB)).choose()
    assert (chosen.memory, chosen.checkpointing) == ("exact", "selective")
    pinned = config_of(optimizer={"memory": "exact"}, train={"checkpointing": "none"})
    tight = Planner(pinned, card((exact - 1) / GIB))
    assert tight.choose() is None
    assert tight.refusal().endswith(tight.what_would_fit().settings())
    assert "--optimizer.memory exact --train.checkpointing selective" in tight.refusal()
    assert tight.table()["refusal"] == tight.refusal()


def test_a_limit_below_what_any_plan_needs(roomy):
    config = config_of(memory={"limit_gib": 0.25})
    planner = Planner(config, card(100))
    assert planner.choose() is None
    least = min(planner.need(memory, "offload", 64).needed for memory in ("paged", "rounded"))
    assert planner.refusal().startswith(f"this run needs {least / GIB:.2f} GiB at batch size 64")
    assert "memory.limit_gib allows 0.25 GiB; the least that any plan needs is" in planner.refusal()
    assert planner.least().needed > planner.budget
    # a limit above the card's memory gives no more than it has
    assert Planner(config_of(memory={"limit_gib": 9}), card(1)).budget == GIB


def test_accumulation_keeps_a_buffer_of_every_gradient_whoever_steps(roomy):
    accumulating = Planner(config_of(train={"accumulate": 3, "checkpointing": "auto"}), card(100))
    one, several = (planner.need("exact", "full", 1, True) for planner in (roomy, accumulating))
    num_parameters = sum(p.numel() for p in roomy._run(True).unet.parameters())
    assert several.held - one.held == pytest.approx(2 * num_parameters, rel=0.1)
    assert several.held + several.step - one.held - one.step > 2 * num_parameters * 0.9
    config = config_of(train={"accumulate": 3, "checkpointing": "auto", "accumulate_dtype": "fp32"})
    precise = Planner(config, card(100)).need("exact", "full", 1, True)
    assert precise.held - one.held == pytest.approx(4 * num_parameters, rel=0.1)


def test_cards():
    assert find_card("T4") is find_card("Tesla T4") is CARDS["t4"]
    assert find_card("4090") is find_card("NVIDIA GeForce RTX 4090") is CARDS["rtx4090"]
    assert find_card("8GiB").usable_gib == find_card("8 gb").usable_gib == 8
    for name, told in (("rtx4091", "did you mean rtx4090"), ("3061", "did you mean rtx306"), ("abacus", "known: t4")):
        with pytest.raises(ValueError, match=told):
            find_card(name)
    with pytest.raises(ValueError, match="has no memory"):
        find_card("0GiB")
    with pytest.raises(ValueError, match="t4 has no bf16 arithmetic"):
        dtype_on(CARDS["t4"], "bf16")


def test_a_replayed_step_waits_for_no_launch_of_the_host():
    h200, work = find_card("h200"), (2_470_000_000_000, 24_800_000_000, 1400)
    eager, replayed = h200.seconds(*work), h200.seconds(*work, is_replayed=True)
    assert eager == 1400 * SECONDS_A_LAUNCH
    assert replayed < eager / 2
    # of a step that is the device's alone both are the same, on the way from kernel to kernel too
    many = (work[0] * 32, *work[1:])
    assert h200.seconds(*many) == h200.seconds(*many, is_replayed=True)
    assert h200.seconds(*many[:2], 1401) - h200.seconds(*many) == pytest.approx(SECONDS_A_KERNEL)
    assert find_card("8GiB").seconds(*work, is_replayed=True) is None


def test_a_plan_says_whether_steps_are_replayed_and_counts_what_that_takes(roomy):
    known = Card("known", 100, 4800, 790, pcie_gb_s=50)
    planners = {
        how: Planner(config_of(train={"cuda_graphs": how, "checkpointing": "auto"}), known) for how in ("auto", "off")
    }
    replayed, eager = (planner.need("exact", "none", 1) for planner in planners.values())
    assert (replayed.no_graphs, eager.no_graphs) == ("", "train.cuda_graphs is off")
    assert replayed.images_per_s > 3 * eager.images_per_s
    launches = planners["auto"]._trace("none", False, 1).work.launches
    graphs = most_graphs(roomy.config, roomy.base) * launches * GRAPH_BYTES_A_LAUNCH
    # and a third handle and stream that multiply: forward and backward where graphs are recorded, forward elsewhere
    assert (replayed.graphs, eager.graphs) == (graphs + known.cublas_bytes(is_deterministic=False), 0)
    assert "memory paged streams" in planners["auto"].need("paged", "none", 1).no_graphs
    assert "offload streams" in planners["auto"].need("exact", "offload", 1).no_graphs
    tight = Planner(config_of(), replace(known, usable_gib=(replayed.needed + 1) / GIB)).need("exact", "none", 1)
    assert re.fullmatch(r"they would take \d+\.\d\d GiB of \d+\.\d\d", tight.no_graphs)


def test_who_asks_for_graphs_gets_a_way_with_them(roomy):
    wanted = roomy.need("exact", "selective", 64)
    room = card(
        (max(wanted.needed + wanted.others - wanted.held, wanted.between.most + wanted.step) + wanted.graphs) / GIB
    )
    for how, taken in (("auto", "none"), ("on", "selective")):
        config = config_of(train={"cuda_graphs": how, "checkpointing": "auto"}, optimizer={"fused_backward": False})
        need = Planner(config, room).choose()
        assert (need.memory, need.checkpointing, bool(need.no_graphs)) == ("exact", taken, how == "auto")
    # where none has them the best is returned, with the reason
    config = config_of(train={"cuda_graphs": "on", "checkpointing": "auto"}, optimizer={"memory": "paged"})
    assert "paged streams" in Planner(config, card(100)).choose().no_graphs


def test_what_products_keep_is_counted_for_each_handle_and_stream():
    for name, deterministic, each in (
        ("t4", False, 8_519_680 + 2**20),
        ("h200", False, 33 * 2**20),
        ("t4", True, 33 * 2**20),
    ):
        found = CARDS[name]
        assert found.cublas_bytes(is_deterministic=deterministic) == each
        assert found.workspace(is_deterministic=deterministic) == 2 * each + CUDNN_BYTES
    needs = [
        Planner(config_of(run={"deterministic": how}), card(100)).need("exact", "none", 1) for how in (True, False)
    ]
    assert needs[0].needed - needs[1].needed == 2 * (33 * 2**20 - 8_519_680 - 2**20)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("Tesla T4", 24), ("NVIDIA GeForce RTX 3060 Laptop GPU", 25.6), ("NVIDIA H200", 790), ("Quadro 9", None)],
)
def test_the_card_that_is_here(name, rate, monkeypatch):
    found = type("Properties", (), {"name": name, "major": 9 if "H200" in name else 7, "minor": 5})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
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
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert text.count("> ") >= 2
    assert main(["plan", str(path), "--gpu", "rtx4090", "--json"]) == 0
    told = capsys.readouterr().out
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in re.findall(r'"([^"]+)":', told))
    plan = json.loads(told)["plan"]
    assert f"> {plan['chosen']['needed_bytes'] / GIB:.2f}" in text
    assert len(plan["ways"]) == 4 * 4 * 2 * 4
    assert text.splitlines()[2].split()[:3] == ["memory", "checkpoints", "fused"]
    rows = [line.split()[:3] for line in text.splitlines() if line.startswith(("exact ", "paged "))]
    # in the order in which they are tried
    assert rows[:5] == [["exact", how, "no"] for how in MODES[:3]] + [["exact", how, "yes"] for how in MODES[:2]]
    assert rows[8:10] == [["paged", "none", "yes"], ["paged", "selective", "yes"]]
    assert main(["plan", str(path), "--gpu", "rtx4091"]) == 2
    assert "did you mean rtx4090?" in capsys.readouterr().err
    assert main(["plan", str(path), "--gpu", "rtx4090", "--memory.limit-gib", "0.3"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("safelight plan: this run needs")


def golden(name: str) -> dict:
    """Return plans' figures in GiB by memory, checkpointing, fused or not, and batch: SD1.5 at 512 px, SDXL at 1024 px."""
    found = {}
    for base, resolution in (("sd15", 512), ("sdxl", 1024)):
        table = Planner(config_of(f"random:{base}", data={"resolution": resolution}), find_card(name)).table()
        chosen = table["chosen"]
        gib = {place(way): round(way["needed"] / GIB, 3) for way in table["ways"]}
        found[base] = {"chosen": chosen and place(chosen), "gib": gib}
    return found


def place(way: dict) -> str:
    fused = "fused" if way["fused_backward"] else "unfused"
    return f"{way['memory']} {way['checkpointing']} {fused} {way['batch_size']}"


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_CARDS)
def test_golden_tables(name):
    assert golden(name) == json.loads(GOLDEN.read_text())[name]


def test_known_figures_of_sd15():
    """One way of the golden tables, and the sums that make it."""
    planner = Planner(config_of("random:sd15", optimizer={"fused_backward": True}), find_card("rtx4090"))
    need = planner.need("exact", "full", 1)
    gib = json.loads(GOLDEN.read_text())["rtx4090"]["sd15"]["gib"]
    assert round(need.needed / GIB, 3) == gib["exact full fused 1"]
    num = 859_520_964
    # of 512 B pieces: 686 tensors
    assert 2 * num <= need.kinds[MASTER] <= 2 * num + 686 * 512


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: golden(name) for name in GOLDEN_CARDS}, indent=1) + "\n")
