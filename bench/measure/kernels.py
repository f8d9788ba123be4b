"""`safelight bench kernels`: each kernel against plain PyTorch and torch.compile, in the layers of real models.

Bytes are computed for every layer of a model and need no GPU: bytes moved by our kernels from formulas
(bench/measure/kernel_ops.py), bytes moved by plain PyTorch from the counter's model, and bytes saved by autograd,
counted exactly. Times are measured on a GPU, for the layers that move the most bytes, forward and backward separately,
and compared with the GPU's copy bandwidth. On a CPU the kernels' PyTorch references run instead, at reduced shapes;
their times say nothing about the kernels.

Plain PyTorch's bytes count each operator's inputs and outputs once. Ours count every read, which is stricter. Plain
PyTorch gets NCHW tensors, which its GroupNorm is made for; our kernels and torch.compile get channels-last tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from safelight.bench.core.ceilings import copy_gb_per_s
from safelight.bench.core.harness import Prepared, interleave_prepared, percentiles
from safelight.bench.core.layers import Layer, layers
from safelight.bench.core.results import make_record
from safelight.bench.counting.counters import MIB, Counter, SavedBytes
from safelight.bench.measure.kernel_ops import FIXED, OPS, Inputs, Op, reduced
from safelight.errors import UserError
from safelight.trainer.models.device import PRECISIONS

META = torch.device("meta")
PASSES = ("forward", "backward")
CPU_NOTE = "times are of the PyTorch references on a CPU, at reduced shapes; they say nothing about the kernels"


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _differentiable(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.values() if x.requires_grad]


def _backward(outputs: tuple[Tensor, ...], inputs: Inputs, upstream: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(outputs, _differentiable(inputs), upstream)


def saved_bytes(function: Callable, inputs: Inputs, parameters: set[str]) -> int:
    """Return the bytes autograd saves for backward in a call, without parameters and inputs without gradient."""
    saved = SavedBytes([x for name, x in inputs.items() if name in parameters or name in FIXED])
    with saved:
        function(**inputs)
    return saved.total


def plain_bytes(op: Op, layer: Layer, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes plain PyTorch moves (forward, backward), by the counter's model."""
    inputs = op.inputs(layer.shape, dtype, META, torch.contiguous_format)
    with Counter() as forward:
        outputs = _outputs(op.plain(**inputs))
    if not op.is_differentiable:
        return forward.counts.total("bytes_moved"), 0
    upstream = tuple(torch.empty_like(y) for y in outputs)
    with Counter() as backward:
        _backward(outputs, inputs, upstream)
    return forward.counts.total("bytes_moved"), backward.counts.total("bytes_moved")


def layer_bytes(layer: Layer, dtype: torch.dtype) -> dict:
    """Return the MB (10^6) moved and MiB saved by one layer; moved bytes only for memory-bound ops."""
    op = OPS[layer.op]
    parameters = set(op.parameters(layer.shape))
    figures = {}
    if op.forward_bytes is not None:
        ours = (op.forward_bytes, op.backward_bytes)
        for name, formula, plain in zip(PASSES, ours, plain_bytes(op, layer, dtype), strict=True):
            if formula is not None:
                moved = formula(layer.shape, dtype.itemsize)
                figures[name] = {"mb": round(moved / 1e6, 4), "plain_mb": round(plain / 1e6, 4)}
    if op.is_differentiable:
        for name, function in (("saved_mib", op.ours), ("plain_saved_mib", op.plain)):
            inputs = op.inputs(layer.shape, dtype, META, torch.channels_last)
            figures[name] = round(saved_bytes(function, inputs, parameters) / MIB, 4)
    return figures


def bytes_record(model: str, batch_size: int, dtype: torch.dtype, ops: tuple[str, ...] = ()) -> dict:
    """Return a result line with the bytes of every layer of a model, and the sums over a step by op."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_layer: dict[str, dict] = {}
    for layer in layers(model, batch_size):
        if ops and layer.op not in ops:
            continue
        figures = layer_bytes(layer, dtype)
        by_layer[name_of(layer)] = {"count": layer.count, **figures}
        for name in PASSES:
            for key, value in figures.get(name, {}).items():
                sums[layer.op][key.replace("mb", "gb")] += layer.count * value / 1e3
        for key in ("saved_mib", "plain_saved_mib"):
            if key in figures:
                sums[layer.op][key] += layer.count * figures[key]
    by_op = {op: {key: round(value, 4) for key, value in row.items()} for op, row in sums.items()}
    config = {"model": model, "batch_size": batch_size, "precision": PRECISIONS[dtype], "what": "bytes"}
    return make_record("kernels", config, {"step": by_op, "layers": by_layer}, torch.device("cpu"))


def name_of(layer: Layer) -> str:
    """Return a layer's name in result lines: `group_norm_silu 1x320x64x64`."""
    return f"{layer.op} {'x'.join(map(str, layer.shape))}"


def _timed(function: Callable, inputs: Inputs) -> dict[str, Prepared]:
    """Return the forward and backward pass of a function, to be timed."""
    kept: list[tuple[Tensor, ...]] = []

    def outputs_and_upstream() -> tuple:
        outputs = _outputs(function(**inputs))
        if not kept:
            kept.append(tuple(torch.randn_like(y) for y in outputs))
        return outputs, kept[0]

    forward = Prepared(lambda: None, lambda _: function(**inputs))
    if not _differentiable(inputs):
        return {"forward": forward}
    backward = Prepared(outputs_and_upstream, lambda made: _backward(made[0], inputs, made[1]))
    return {"forward": forward, "backward": backward}


def _variants(
    op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Prepared]]:
    """Return the passes of ours, plain and compiled, each with its own inputs in its own memory layout."""
    torch._dynamo.reset()
    compiled = torch.compile(op.plain, dynamic=False, fullgraph=True)
    functions = {
        "ours": (op.ours, torch.channels_last),
        "plain": (op.plain, torch.contiguous_format),
        "compiled": (compiled, torch.channels_last),
    }
    return {
        name: _timed(function, op.inputs(shape, dtype, device, layout))
        for name, (function, layout) in functions.items()
    }


def failure_reason(passes: dict[str, Prepared]) -> str:
    """Run each pass once; return '' or the reason why it fails here, such as a missing compiler."""
    try:
        for prepared in passes.values():
            prepared.run(prepared.prepare())
    except (RuntimeError, OSError, ImportError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ""


def time_layer(
    layer: Layer, dtype: torch.dtype, device: torch.device, copy_rate: float, repeats: int, with_compile: bool = True
) -> dict:
    """Return the times of one layer by pass in ms (p20, p50, p80); on a GPU also GB/s of ours and share of copy_rate.

    A variant that cannot run here has the reason in place of times. On a CPU the shape is reduced. copy_rate: GB/s.
    """
    op = OPS[layer.op]
    shape = layer.shape if device.type == "cuda" else reduced(layer.shape)
    variants = _variants(op, shape, dtype, device)
    if not with_compile:
        del variants["compiled"]
    figures: dict = {name: {} for name in PASSES}
    for name in list(variants):
        if reason := failure_reason(variants[name]):
            figures[f"{name}_cannot"] = reason
            del variants[name]
    formulas = dict(zip(PASSES, (op.forward_bytes, op.backward_bytes), strict=True))
    for direction in PASSES:
        runs = {name: passes[direction] for name, passes in variants.items() if direction in passes}
        for name, seconds in interleave_prepared(runs, device, repeats).items():
            low, middle, high = percentiles(seconds)
            figures[direction][f"{name}_ms"] = [round(1e3 * s, 5) for s in (low, middle, high)]
            # the formula describes the kernels, not the references that run on a CPU
            if name == "ours" and formulas[direction] is not None and device.type == "cuda":
                rate = formulas[direction](shape, dtype.itemsize) / middle / 1e9
                figures[direction]["gb_per_s"] = round(rate, 2)
                figures[direction]["share_of_limit"] = round(rate / copy_rate, 4)
    return {key: value for key, value in figures.items() if value}


def largest_layers(model: tuple[Layer, ...], ops: tuple[str, ...], num_shapes: int, itemsize: int) -> list[Layer]:
    """Return the `num_shapes` layers of each op that move the most bytes per step, or are largest if compute-bound."""

    def weight(layer: Layer) -> float:
        formula = OPS[layer.op].forward_bytes
        size = formula(layer.shape, itemsize) if formula else torch.Size(layer.shape).numel()
        return layer.count * size

    by_op: dict[str, list[Layer]] = defaultdict(list)
    for layer in model:
        by_op[layer.op].append(layer)
    return [
        layer
        for op, members in by_op.items()
        if not ops or op in ops
        for layer in sorted(members, key=weight, reverse=True)[:num_shapes]
    ]


def bench_kernels(
    models: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    ops: tuple[str, ...] = (),
    num_shapes: int = 2,
    with_bytes: bool = True,
    times: bool = True,
    repeats: int = 20,
    with_compile: bool = True,
) -> Iterator[dict]:
    """Yield a line with the bytes of each model and batch size, then, with `times`, a line for each timed layer.

    Raises UserError for an unknown model or op.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise UserError(f"unknown kernels {', '.join(map(repr, unknown))}; use {', '.join(OPS)}")
    cases = [(model, size, layers(model, size)) for model in models for size in batch_sizes]
    for model, size, _ in cases if with_bytes else ():
        yield bytes_record(model, size, dtype, ops)
    if not times:
        return
    is_cpu = device.type == "cpu"
    copy_rate = copy_gb_per_s(device, *((2**26, 3) if is_cpu else ()))
    record = partial(make_record, device=device, note=CPU_NOTE if is_cpu else "")
    for model, size, all_layers in cases:
        for layer in largest_layers(all_layers, ops, num_shapes, dtype.itemsize):
            figures = time_layer(layer, dtype, device, copy_rate, repeats, with_compile)
            shape = list(reduced(layer.shape) if is_cpu else layer.shape)
            config = {
                "model": model,
                "batch_size": size,
                "precision": PRECISIONS[dtype],
                "what": "time",
                "op": layer.op,
                "shape": shape,
                "count": layer.count,
                "device": device.type,
            }
            yield record("kernels", config, {**figures, "copy_gb_per_s": round(copy_rate, 2)})


def bytes_rows(figures: dict) -> list[tuple]:
    """Return rows for the terminal: op, GB moved by ours and by plain PyTorch, MiB saved by either."""
    return [
        (
            op,
            *(f"{row[key]:.4f}" if key in row else "" for key in ("gb", "plain_gb")),
            *(f"{row[key]:,.1f}" if key in row else "" for key in ("saved_mib", "plain_saved_mib")),
        )
        for op, row in figures["step"].items()
    ]


def time_rows(records: list[dict]) -> list[tuple]:
    """Return rows for the terminal: layer, pass, ms of each variant, GB/s of ours and its share of the copy rate."""
    rows = []
    for record in records:
        config, figures = record["config"], record["figures"]
        for direction in PASSES:
            row = figures.get(direction)
            if row is None:
                continue
            cells = [
                f"{row[f'{name}_ms'][1]:.3f}" if f"{name}_ms" in row else "-" for name in ("ours", "plain", "compiled")
            ]
            rate = f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else ""
            share = f"{100 * row['share_of_limit']:.0f} %" if "share_of_limit" in row else ""
            name = f"{config['op']} {'x'.join(map(str, config['shape']))}"
            rows.append((name, direction, *cells, rate, share))
    return rows


def failures(records: list[dict]) -> list[str]:
    """Return a line of text for each variant that could not be timed, with the reason."""
    lines = [
        f"{key.removesuffix('_cannot')} was not timed: {reason}"
        for record in records
        for key, reason in record["figures"].items()
        if key.endswith("_cannot")
    ]
    return list(dict.fromkeys(lines))
