"""A profiling session of the tiny base, checked against what is known of its step; and the files it writes."""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safelight.__main__ import main
from safelight.bench.core.results import read
from safelight.bench.counting.costs import Cost, OperatorCosts
from safelight.bench.measure import count
from safelight.bench.profile import profiling_session
from safelight.bench.profile.analysis import PHASES, analyse, chosen_events, roofline_share, step_events
from safelight.bench.profile.profile_page import boxes, render
from safelight.bench.profile.profiling_session import SavedTensorTracker, run_session
from safelight.trainer.config.schema import Config
from safelight.trainer.models.base import resolve_base
from safelight.trainer.report.theme import asset
from safelight.trainer.step.profiler_ranges import listen_to_ranges, profiler_range

CEILINGS = {"matmul_tflops": 0.05, "copy_gb_per_s": 10.0}


@pytest.fixture(scope="module")
def session(tmp_path_factory, tiny_dataset):
    from safelight.trainer.config.toml import parse_config

    out = tmp_path_factory.mktemp("profile")
    config = parse_config(
        {
            "model": {"base": "tiny"},
            "data": {"resolution": 64, "max_aspect": 1.0, "path": str(tiny_dataset), "variants": 1},
            "train": {"batch_size": 2},
            "optimizer": {"name": "adamw"},
        },
        "test",
    )
    return run_session(config, 2, out)


def test_phases_are_reported_to_a_listener_and_cost_nothing_without_one():
    seen = []

    class Listener:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(self.name)

        def __exit__(self, *error):
            seen.append(f"end of {self.name}")

    assert profiler_range("load") is profiler_range("backward")
    with listen_to_ranges(Listener), profiler_range("load"):
        pass
    with profiler_range("loss"):
        pass
    assert seen == ["load", "end of load"]


@pytest.mark.long
def test_profiled_steps_are_of_the_largest_batch_and_have_every_phase(session):
    assert session.shape == (2, 4, 16, 16)
    steps = step_events(session)
    assert len(steps) == len(session.chosen) == 2
    names = [e.name for e in chosen_events(session)]
    assert {name: names.count(name) for name in PHASES} == {
        # each step loads its batch and looks whether another follows
        "load": 4,
        "noise": 2,
        "forward": 2,
        "loss": 2,
        "backward": 2,
        "optimizer": 2,
    }
    unet = resolve_base("tiny").config_of("unet")
    resnets = {name for name in names if re.fullmatch(r"down_blocks\.\d\.resnets\.\d", name)}
    assert len(resnets) == unet["layers_per_block"] * len(unet["down_block_types"])
    # the range of a block is nested in the forward pass
    depths = {box.name: box.depth for box in boxes(session)}
    assert depths["step"] == 0
    assert depths["forward"] == 1
    assert depths["down_blocks.0.resnets.0"] == 2


@pytest.mark.long
def test_flops_and_saved_bytes_agree_with_the_count_on_meta_tensors(session):
    analysis = analyse(session, CEILINGS)
    counted = count.trace(resolve_base("tiny"), precision="fp32", batch_size=2)
    # the tiny base's captions are shorter than the 77 tokens that are counted
    assert 0.96 * counted.flops_total < analysis.flops < counted.flops_total
    peak = max(n for _, n in session.saved.points)
    assert peak == pytest.approx(counted.saved_bytes, rel=0.1)
    # each storage counts once, and all are released
    assert session.saved.points[-1][1] == 0
    assert sum(session.saved.by_block.values()) >= peak
    assert "down_blocks.0.attentions.0" in session.saved.by_block


def test_phases_and_classes_each_add_up_to_the_step(session):
    analysis = analyse(session, CEILINGS)
    whole = sum(e.time_range.elapsed_us() for e in step_events(session)) / 2e3
    assert sum(analysis.phases.values()) == pytest.approx(whole, rel=0.01)
    assert sum(analysis.kinds.values()) == pytest.approx(whole, rel=0.01)
    assert set(analysis.kinds) == {
        "conv",
        "linear",
        "attention",
        "norm",
        "elementwise",
        "copies",
        "optimizer",
        "Python and dispatch",
    }
    calls = {o.name: o.calls for o in analysis.operators if o.kind != "optimizer"}
    convolutions = [m for m in count.meta_unet(resolve_base("tiny")).modules() if isinstance(m, nn.Conv2d)]
    assert calls["convolution"] == len(convolutions)
    assert 0 < analysis.unprofiled_ms < 20 * analysis.step_ms
    assert analysis.model_flop_use == pytest.approx(analysis.flops / analysis.unprofiled_ms / 1e-3 / 0.05e12)


def test_bytes_flops_and_roofline_times_computed_by_hand():
    a, b = torch.ones(4, 8), torch.ones(8, 16)
    with OperatorCosts([]) as costs:
        product = a @ b
        product.add_(1.0)
        product.view(-1)
    product_bytes, sum_bytes = 4 * (4 * 8 + 8 * 16 + 4 * 16), 4 * 2 * 4 * 16
    assert costs.costs == {
        (False, "mm"): Cost("linear", sizes=Counter({(product_bytes, 2 * 4 * 8 * 16): 1})),
        (False, "add_"): Cost("elementwise", sizes=Counter({(sum_bytes, 0): 1})),
    }
    with OperatorCosts([]) as costs:
        # expand reads 8 stored numbers as 32
        torch.ones(1, 8).expand(4, 8).exp()
    assert costs.costs[False, "exp"].num_bytes == 4 * (8 + 4 * 8)
    # 10 GB in a second at 10 GB/s; 50 GFLOP in two seconds at 50 GFLOP/s
    memory, matrices = Cost(sizes=Counter({(10**10, 0): 1})), Cost(sizes=Counter({(10**9, 50 * 10**9): 1}))
    assert roofline_share(memory, 1000, CEILINGS) == pytest.approx(1)
    assert roofline_share(matrices, 2000, CEILINGS) == pytest.approx(0.5)
    # each call has its own bound, and the two times add up
    both = Cost(sizes=memory.sizes + matrices.sizes)
    assert both.roofline_ms(CEILINGS) == pytest.approx(2000)
    assert (both.calls, both.num_bytes, both.flops) == (2, 11 * 10**9, 50 * 10**9)
    assert roofline_share(Cost(), 1, CEILINGS) is None


def test_the_largest_batch_of_the_warm_up_steps_is_profiled(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(profiling_session, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    step_profiler = profiling_session._StepProfiler(1, torch.device("cpu"), tmp_path)
    monkeypatch.setattr(step_profiler.profiler, "start", lambda: None)
    # the first step creates states and compiles, so it is neither timed nor chosen
    for size, seconds in ((9, 60.0), (2, 1.0), (3, 5.0), (3, 4.0)):
        now[0] += seconds
        step_profiler._end_warmup_step((size, 4, 8, 8))
    assert (step_profiler.shape, step_profiler.unprofiled_ms) == ((3, 4, 8, 8), 4000.0)


def test_a_gpus_memory_history_covers_the_profiled_steps_and_is_written(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        profiling_session,
        "profile",
        lambda activities, **_: SimpleNamespace(
            start=lambda: calls.append("profiler starts"),
            stop=lambda: calls.append("profiler stops"),
        ),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: calls.append(file))
    step_profiler = profiling_session._StepProfiler(1, torch.device("cuda"), tmp_path)
    for _ in range(profiling_session.NUM_WARMUPS):
        step_profiler._end_warmup_step((2, 4, 8, 8))
    assert calls == ["all", "profiler starts"]
    step_profiler._stop_profiler()
    assert calls[2:] == [str(tmp_path / "memory.pickle"), None, "profiler stops"]


def test_only_training_steps_are_profiled(tmp_path):
    """Checkpoints, validation, samples and TensorBoard are off, and the run folder is another; other settings stay."""
    config = Config()
    config.train.max_steps, config.save.every_steps, config.save.every_epochs = 7, 1, 1
    before = config.model_copy(deep=True)
    settings = profiling_session.settings_for(config, tmp_path / "elsewhere")
    assert config == before
    assert settings.run.dir == str(tmp_path / "elsewhere")
    assert (settings.train.max_steps, settings.log.tensorboard) == (0, False)
    assert [settings.save.every_steps, settings.save.every_epochs] == [0, 0]
    assert [settings.validate_.every_epochs, settings.sample.every_epochs] == [0, 0]
    # a replayed step has no phases
    assert settings.train.cuda_graphs == "off"
    assert (settings.train.batch_size, settings.optimizer) == (config.train.batch_size, config.optimizer)


def test_saved_tensors_live_from_the_first_save_to_the_last_release():
    x = torch.randn(256, requires_grad=True)
    tracker = SavedTensorTracker(["forward", "down_blocks.0.resnets.0"], set())
    with tracker:
        y = x.exp()
        (y * y).sum().backward()
    # exp and the product save the same tensor
    assert [n for _, n in tracker.saved.points] == [1024, 0]
    assert tracker.saved.by_block == {"down_blocks.0.resnets.0": 1024}
    own = SavedTensorTracker([], {x.untyped_storage()._cdata})
    with own:
        x.sin().sum().backward()
    assert own.saved.points == []


def test_the_page_is_self_contained_and_the_trace_names_phases_and_blocks(session):
    (trace,) = session.files
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {*PHASES, "step", "up_blocks.0.resnets.0"} <= names
    page = render(session, analyse(session, CEILINGS), CEILINGS, "tiny <b>", "a machine")
    assert "tiny &lt;b&gt;" in page
    for word in ("Flame chart", "Roofline", "Memory", "Saved for backward", "Python and dispatch"):
        assert word in page
    # the charts' library names its home in a comment
    text = page.replace(asset("uplot/uPlot.iife.min.js").partition("\n")[0], "")
    assert not re.search(r'(?:src|href)="(?!#|data:,")|url\((?!#)|https?://', text)
    assert "style=" not in page
    assert page.count("<rect") > 100
    # timelines as charts, each with a table; on a phone, tables that scroll as a whole, a flame chart that scrolls
    assert page.count("data-chart=") == 2
    assert page.count("<table") == page.count('<table class="figures') == 7
    assert 'class="scroll chart"' in page
    # a step twice as fast has twice the throughput
    rate = re.compile(r"([\d.,]+) <small>images/s")
    once, twice = (
        float(rate.search(render(s, analyse(s, CEILINGS), CEILINGS, "", ""))[1].replace(",", ""))
        for s in (session, replace(session, unprofiled_ms=session.unprofiled_ms / 2))
    )
    assert twice == pytest.approx(2 * once, rel=0.02)


def test_a_run_that_is_too_short_is_refused_and_leaves_no_run_folder(make_config, tmp_path, monkeypatch):
    config = make_config(stage=[{"epochs": 1}], train={"batch_size": 24}, data={"max_aspect": 1.0})
    said = "--steps 50: the run has only 1 step; lower --steps, or train for more epochs"
    # before anything is encoded or trained
    with monkeypatch.context() as patched:
        patched.setattr("safelight.bench.profile.profiling_session.train", None)
        with pytest.raises(ValueError, match=said):
            run_session(config, 50, tmp_path / "out")
    # its steps are used up by the warm-up
    with pytest.raises(
        ValueError,
        match="the run ends after 1 step, before 1 step with full batches was profiled; lower --steps, or train",
    ):
        run_session(config, 1, tmp_path / "out")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="--steps 0 is below 1"):
        run_session(config, 0, tmp_path / "out")


@pytest.mark.slow
def test_the_command_writes_page_figures_and_trace_and_appends_its_line(tmp_path, tiny_dataset, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "tiny", "-o", "run.toml"]) == 0
    words = (
        f"profile run.toml --data.path {tiny_dataset} --data.variants 1 --steps 1 -o out --append lines.jsonl --json"
    )
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    record = json.loads(out[out.index("{") :])
    assert record["bench"] == "profile"
    assert read(tmp_path / "lines.jsonl")[0]["figures"] == record["figures"]
    assert record["figures"]["step_gflop"] > 0
    assert set(record["figures"]["stretches_ms"]) == {*PHASES, "the loop around them"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.html", "profile.json", "trace.json.gz"}
    assert not (tmp_path / "runs").exists()
