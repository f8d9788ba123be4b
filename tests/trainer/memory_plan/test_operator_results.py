"""Remembered results of operators on meta tensors: equal to computed ones, only where shapes decide, once a shape."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from safelight.trainer.memory_plan import memory_tracer
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.meta_run import MetaRun, _meta_run
from safelight.trainer.memory_plan.operator_results import OperatorResults
from safelight.trainer.memory_plan.planner import Planner
from tests.trainer.memory_plan.test_planner import config_of

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def plain(func, args, outputs):
    return outputs


def form(x) -> object:
    if not isinstance(x, Tensor):
        return x
    return x.dtype, x.shape, x.stride(), x.storage_offset(), x.untyped_storage().nbytes(), x.device, type(x)


CALLS = [
    (aten.addmm.default, (meta(5), meta(3, 4), meta(4, 5)), {}),
    (aten.mm.default, (meta(4, 3).t(), meta(4, 5)), {}),
    (aten.mul.Tensor, (meta(3, 4).t(), 2), {}),
    (aten.mul.Tensor, (meta(3, 4, dtype=torch.int64), 2.0), {}),
    (aten.cat.default, ([meta(2, 4), meta(3, 4)],), {}),
    (aten.native_group_norm.default, (meta(2, 8, 4, 4), meta(8), meta(8), 2, 8, 16, 4, 1e-5), {}),
    (aten._foreach_norm.Scalar, ([meta(4), meta(5)], 2), {}),
    (aten.empty_like.default, (meta(3, 4),), {"dtype": torch.float32}),
    (aten.sum.dim_IntList, (meta(3, 0), [1]), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS, ids=lambda x: str(x) if callable(x) else "")
def test_a_remembered_result_is_the_computed_one_and_new(func, args, kwargs):
    results = OperatorResults()
    wanted = func(*args, **kwargs)
    computed, remembered = (results.call(func, args, kwargs, plain) for _ in range(2))
    assert results.num_computed == 1
    assert type(wanted) is type(computed) is type(remembered)
    all_outputs = [(x,) if isinstance(x, Tensor) else x for x in (wanted, computed, remembered)]
    assert [list(map(form, outputs)) for outputs in all_outputs] == 3 * [list(map(form, all_outputs[0]))]
    storages = [x.untyped_storage()._cdata for outputs in all_outputs for x in outputs]
    assert len(set(storages)) == len(storages)


def test_what_a_result_depends_on_is_part_of_its_key():
    results = OperatorResults()
    whole = results.call(aten.mul.Tensor, (meta(2, dtype=torch.int64), 2), {}, plain)
    fraction = results.call(aten.mul.Tensor, (meta(2, dtype=torch.int64), 2.0), {}, plain)
    assert (whole.dtype, fraction.dtype) == (torch.int64, torch.float32)
    rows, columns = meta(3, 4), meta(4, 3).t()
    assert results.call(aten.empty_like.default, (rows,), {}, plain).stride() == (4, 1)
    assert results.call(aten.empty_like.default, (columns,), {}, plain).stride() == (1, 3)
    assert results.num_computed == 4


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (meta(3, 4), [12])),
        # a view whose schema does not say so
        (aten._unsafe_view.default, (meta(3, 4), [12])),
        (aten.add_.Tensor, (meta(3), meta(3))),
        (aten.mul.Tensor, (torch.ones(3), 2)),
    ],
    ids=["a view", "an unsafe view", "in place", "not on meta"],
)
def test_views_writes_and_values_are_computed_each_time(func, args):
    results = OperatorResults()
    outputs = [results.call(func, args, {}, plain) for _ in range(2)]
    assert results.num_computed == 2
    if args[0].is_meta:
        assert all(x.untyped_storage()._cdata == args[0].untyped_storage()._cdata for x in outputs)
    else:
        assert all(torch.equal(x, args[0] * 2) for x in outputs)


@pytest.mark.long
def test_a_plan_traces_two_batch_sizes_of_each_mode_and_computes_each_shape_once(monkeypatch):
    steps, num_calls, results = [], 0, OperatorResults()
    step, call = MetaRun.step, results.call

    def counted_step(run, *args):
        steps.append(args)
        return step(run, *args)

    def counted_call(*args):
        nonlocal num_calls
        num_calls += 1
        return call(*args)

    monkeypatch.setattr(MetaRun, "step", counted_step)
    monkeypatch.setattr(results, "call", counted_call)
    monkeypatch.setattr(memory_tracer, "_RESULTS", results)
    _meta_run.cache_clear()
    found = Planner(config_of(), Card("100 GiB", 100)).summary()
    assert len(found["ways"]) == 144
    # fused or not: four modes of checkpointing, and the step that allocates the optimizer's state
    by_size = Counter(size for size, *_ in steps)
    assert (by_size[2], by_size[4]) == (8, 8)
    # two modes of so small a UNet cannot be extrapolated, and are traced at three more sizes
    assert len(steps) == 2 * (1 + 4 * 2) + 2 * 3
    # computed are views, writes, and the first call of each shape: 0.69 of all calls
    assert results.num_computed < 0.75 * num_calls
    _meta_run.cache_clear()
    again = OperatorResults()
    monkeypatch.setattr(again, "_remember", lambda *_: None)
    monkeypatch.setattr(memory_tracer, "_RESULTS", again)
    assert Planner(config_of(), Card("100 GiB", 100)).summary() == found
