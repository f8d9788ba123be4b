"""A hand-written GPU timeline in Chrome's trace format: kernels by step, length of a step, idle gaps."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from safelight.bench.core.device_timeline import busy_us, device_steps, kernel_runs
from safelight.bench.counting.costs import Cost
from safelight.bench.profile.analysis import analyse, figures
from safelight.bench.profile.profiling_session import ProfileSession, SavedTimeline

CEILINGS = {"matmul_tflops": 100.0, "copy_gb_per_s": 1000.0}
# the host finishes both steps before the first kernel runs; (category, name, thread, start us, length us, ids)
HOST, BACKWARD, GPU = 1, 2, 7
TRACE = [
    {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur, "args": args}
    for step in (0, 1)
    for cat, name, tid, ts, dur, args in [
        ("user_annotation", "step", HOST, 100 * step, 95, {"External id": 10 + 100 * step}),
        ("user_annotation", "forward", HOST, 100 * step + 2, 50, {"External id": 11 + 100 * step}),
        ("cpu_op", "aten::conv2d", HOST, 100 * step + 5, 20, {"External id": 12 + 100 * step}),
        ("cpu_op", "aten::convolution", HOST, 100 * step + 6, 18, {"External id": 13 + 100 * step}),
        ("cpu_op", "aten::copy_", HOST, 100 * step + 7, 5, {"External id": 14 + 100 * step}),
        # a copy inside a convolution belongs to the convolution
        (
            "cuda_runtime",
            "cudaLaunchKernel",
            HOST,
            100 * step + 8,
            1,
            {"External id": 14 + 100 * step, "correlation": 1 + 10 * step},
        ),
        (
            "cuda_runtime",
            "cudaLaunchKernel",
            HOST,
            100 * step + 15,
            1,
            {"External id": 13 + 100 * step, "correlation": 2 + 10 * step},
        ),
        # Triton's launches are inside a phase but in no operator
        (
            "cuda_driver",
            "cuLaunchKernelEx",
            HOST,
            100 * step + 30,
            1,
            {"External id": 11 + 100 * step, "correlation": 3 + 10 * step},
        ),
        ("user_annotation", "optimizer", HOST, 100 * step + 60, 30, {"External id": 15 + 100 * step}),
        ("cpu_op", "aten::mul", HOST, 100 * step + 61, 5, {"External id": 16 + 100 * step}),
        (
            "cuda_runtime",
            "cudaLaunchKernel",
            HOST,
            100 * step + 62,
            1,
            {"External id": 16 + 100 * step, "correlation": 4 + 10 * step},
        ),
        (
            "kernel",
            "nchwToNhwcKernel",
            GPU,
            1000 + 500 * step,
            20,
            {"External id": 14 + 100 * step, "correlation": 1 + 10 * step},
        ),
        (
            "kernel",
            "sm90_xmma_fprop_implicit_gemm",
            GPU,
            1020 + 500 * step,
            200,
            {"External id": 13 + 100 * step, "correlation": 2 + 10 * step},
        ),
        (
            "kernel",
            "_apply_kernel",
            GPU,
            1230 + 500 * step,
            100,
            {"External id": 11 + 100 * step, "correlation": 3 + 10 * step},
        ),
        (
            "kernel",
            "elementwise_kernel",
            GPU,
            1340 + 500 * step,
            60,
            {"External id": 16 + 100 * step, "correlation": 4 + 10 * step},
        ),
        # the copy of a range on the GPU's timeline is not a kernel
        ("gpu_user_annotation", "forward", GPU, 1000 + 500 * step, 330, {"External id": 11 + 100 * step}),
    ]
]
ON_GPU = ("kernel", "gpu_user_annotation")


def kineto_event(event: dict) -> SimpleNamespace:
    """Return an event of the trace with the methods of the profiler's C++ events."""
    ids, is_op = event["args"], event["cat"] in ("cpu_op", "user_annotation")
    values = {
        "name": event["name"],
        "start_ns": 1000 * event["ts"] + 7,
        "end_ns": 1000 * (event["ts"] + event["dur"]) + 7,
        "device_type": DeviceType.CUDA if event["cat"] in ON_GPU else DeviceType.CPU,
        "is_user_annotation": event["cat"].endswith("user_annotation"),
        "correlation_id": ids["External id"] if is_op else ids.get("correlation", 0),
        "linked_correlation_id": 0 if is_op else ids["External id"],
    }
    return SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})


def function_events() -> EventList:
    """Return the host's events as torch parses them, nested."""
    parsed = [
        FunctionEvent(
            id=e["args"].get("correlation", e["args"]["External id"]),
            name=e["name"],
            thread=e["tid"],
            start_us=e["ts"],
            end_us=e["ts"] + e["dur"],
            device_type=DeviceType.CPU,
        )
        for e in TRACE
        if e["cat"] not in ON_GPU
    ]
    events = EventList(sorted(parsed, key=lambda e: (e.time_range.start, -e.time_range.end)), use_device="cuda")
    events._build_tree()
    return events


@pytest.fixture
def session() -> ProfileSession:
    costs = {
        # at the ceilings: 10 us for its FLOPs; 50 us for its bytes
        (False, "convolution"): Cost("conv", sizes=Counter({(10**6, 10**9): 1})),
        (False, "_apply_kernel"): Cost("norm", True, Counter({(5 * 10**7, 0): 1})),
        (True, "mul"): Cost("optimizer", sizes=Counter({(6 * 10**6, 0): 1})),
    }
    runs = kernel_runs([kineto_event(event) for event in TRACE], 7)
    return ProfileSession(
        torch.device("cuda"),
        [0, 1],
        list(function_events()),
        runs,
        {},
        costs,
        SavedTimeline(),
        [],
        (2, 4, 8, 8),
        1,
        0.45,
    )


def test_a_kernel_belongs_to_the_step_that_launched_it():
    runs = kernel_runs([kineto_event(event) for event in TRACE], 7)
    assert [r.name for r in runs[:4]] == [e["name"] for e in TRACE if e["cat"] == "kernel"][:4]
    assert (runs[0].start, runs[0].end, runs[0].launched, runs[0].operator) == (1000, 1020, 8, 14)
    steps = device_steps(runs, [0, 100])
    assert [len(steps[n].kernels) for n in (0, 1)] == [4, 4]
    # the first lasts until the second's first kernel, the second until its own last
    assert (steps[0].length_us, steps[1].length_us) == (500, 400)
    # 10 us before and after the third kernel each, and in the first step the wait for the second
    assert (steps[0].idle_us, steps[1].idle_us) == (120, 20)
    # kernels of a CUDA graph have no launch call of their own: they belong to the step they start in
    assert device_steps(
        kernel_runs([kineto_event({**e, "ts": 5}) for e in TRACE if e["name"] == "_apply_kernel"], 7), [0]
    )[0]


def test_overlapping_kernels_are_busy_once():
    assert busy_us([(0, 10), (5, 12), (6, 7), (20, 21)]) == 13
    assert busy_us([]) == 0


def test_classes_operators_and_idle_time_of_a_gpus_step(session):
    analysis = analyse(session, CEILINGS)
    rows = {(o.name, o.kind): (o.calls, round(o.ms, 3), o.share) for o in analysis.operators}
    assert rows == {
        ("convolution", "conv"): (2, 0.22, pytest.approx(0.01 / 0.22)),
        ("_apply_kernel", "norm"): (1, 0.1, pytest.approx(0.05 / 0.1)),
        ("mul", "optimizer"): (1, 0.06, pytest.approx(0.006 / 0.06)),
    }
    assert analysis.kinds == pytest.approx({"conv": 0.22, "norm": 0.1, "optimizer": 0.06, "idle": 0.07})
    assert analysis.step_ms == pytest.approx(0.45)
    assert sum(analysis.kinds.values()) == pytest.approx(analysis.step_ms)
    assert analysis.launches == 4
    json.dumps(figures(session, analysis, CEILINGS))


def test_a_kernel_of_unknown_cost_is_classified_by_its_name(session):
    session.costs = {}
    analysis = analyse(session, CEILINGS)
    assert {o.name: o.kind for o in analysis.operators} == {
        "sm90_xmma_fprop_implicit_gemm": "conv",
        "nchwToNhwcKernel": "copies",
        "_apply_kernel": "elementwise",
        "elementwise_kernel": "optimizer",
    }
    assert all(o.share is None for o in analysis.operators)
