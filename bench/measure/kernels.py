"""`safelight bench kernels`: each kernel against plain PyTorch and torch.compile, at the layers that models train.

Bytes stand for every layer of a model: what the kernels move by formula (bench/measure/kernel_ops.py), what plain PyTorch moves
(the counter's model), and what autograd keeps, counted exactly. All of that needs no GPU. Times are taken on a GPU, of
the layers that move most, forward and backward apart, as a share of the card's own copy bandwidth. On a CPU the
kernels' references run instead, at reduced shapes: their times say nothing about the kernels.

Plain PyTorch's bytes are each operator's inputs and outputs once; ours count every read, so they are the stricter count.
Plain PyTorch gets NCHW memory, which its GroupNorm is made for; ours and torch.compile get channels-last.
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
CPU_NOTE = "times are of the PyTorch references on a CPU at reduced shapes; they say nothing about the kernels"


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _wanted(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.values() if x.requires_grad]


def _backward(outputs: tuple[Tensor, ...], inputs: Inputs, upstream: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(outputs, _wanted(inputs), upstream)


def saved_bytes(function: Callable, inputs: Inputs, parameters: set[str]) -> int:
    """Return what autograd keeps of a call for its backward pass, parameters left out, and what never has a gradient."""
    saved = SavedBytes([x for name, x in inputs.items() if name in parameters or name in FIXED])
    with saved:
        function(**inputs)
    return saved.total


def plain_bytes(op: Op, layer: Layer, dtype: torch.dtype) -> tuple[int, int]:
    """Return what plain PyTorch moves, forward and backward, by the counter's model."""
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
    """Return one layer's bytes, MB (10^6) moved and MiB saved; moved ones only where memory, not products, takes the time."""
    op = OPS[layer.op]
    parameters = set(op.parameters(layer.shape))
    found = {}
    if op.forward_bytes is not None:
        ours = (op.forward_bytes, op.backward_bytes)
        for name, formula, plain in zip(PASSES, ours, plain_bytes(op, layer, dtype), strict=True):
            if formula is not None:
                moved = formula(layer.shape, dtype.itemsize)
                found[name] = {"mb": round(moved / 1e6, 4), "plain_mb": round(plain / 1e6, 4)}
    if op.is_differentiable:
        for name, function in (("saved_mib", op.ours), ("plain_saved_mib", op.plain)):
            inputs = op.inputs(layer.shape, dtype, META, torch.channels_last)
            found[name] = round(saved_bytes(function, inputs, parameters) / MIB, 4)
    return found


def bytes_record(model: str, batch_size: int, dtype: torch.dtype, ops: tuple[str, ...] = ()) -> dict:
    """Return a result line with the bytes of every layer of a model, and their sums over a step by op."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_layer: dict[str, dict] = {}
    for layer in layers(model, batch_size):
        if ops and layer.op not in ops:
            continue
        found = layer_bytes(layer, dtype)
        by_layer[name_of(layer)] = {"count": layer.count, **found}
        for name in PASSES:
            for key, value in found.get(name, {}).items():
                sums[layer.op][key.replace("mb", "gb")] += layer.count * value / 1e3
        for key in ("saved_mib", "plain_saved_mib"):
            if key in found:
                sums[layer.op][key] += layer.count * found[key]
    by_op = {op: {key: round(value, 4) for key, value in row.items()} for op, row in sums.items()}
    config = {"model": model, "batch_size": batch_size, "precision": PRECISIONS[dtype], "what": "bytes"}
    return make_record("kernels", config, {"step": by_op, "layers": by_layer}, torch.device("cpu"))


def name_of(layer: Layer) -> str:
    """Return `group_norm_silu 1x320x64x64`."""
    return f"{layer.op} {'x'.join(map(str, layer.shape))}"


def _timed(function: Callable, inputs: Inputs) -> dict[str, Prepared]:
    """Return how a function's forward and backward pass are prepared and run."""
    kept: list[tuple[Tensor, ...]] = []

    def outputs_and_upstream() -> tuple:
        outputs = _outputs(function(**inputs))
        if not kept:
            kept.append(tuple(torch.randn_like(y) for y in outputs))
        return outputs, kept[0]

    forward = Prepared(lambda: None, lambda _: function(**inputs))
    if not _wanted(inputs):
        return {"forward": forward}
    backward = Prepared(outputs_and_upstream, lambda made: _backward(made[0], inputs, made[1]))
    return {"forward": forward, "backward": backward}


def _variants(
    op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Prepared]]:
    """Return ours, plain and compiled, each with its passes; each on inputs of its own, in its own memory order."""
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


def why_not(passes: dict[str, Prepared]) -> str:
    """Run each pass once and return '' or the reason why that cannot be done here: a compiler that is missing, memory."""
    try:
        for prepared in passes.values():
            prepared.run(prepared.prepare())
    except (RuntimeError, OSError, ImportError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ""


def time_layer(
    layer: Layer, dtype: torch.dtype, device: torch.device, copy_rate: float, repeats: int, with_compile: bool = True
) -> dict:
    """Return one layer's figures: milliseconds (p20, p50, p80); on a GPU GB/s of ours by formula, and its share of a copy's.

    A variant that cannot run here leaves its reason in place of times. On a CPU the shape is reduced.
    """
    op = OPS[layer.op]
    shape = layer.shape if device.type == "cuda" else reduced(layer.shape)
    variants = _variants(op, shape, dtype, device)
    if not with_compile:
        del variants["compiled"]
    found: dict = {name: {} for name in PASSES}
    for name in list(variants):
        if reason := why_not(variants[name]):
            found[f"{name}_cannot"] = reason
            del variants[name]
    formulas = dict(zip(PASSES, (op.forward_bytes, op.backward_bytes), strict=True))
    for direction in PASSES:
        runs = {name: passes[direction] for name, passes in variants.items() if direction in passes}
        for name, seconds in interleave_prepared(runs, device, repeats).items():
            low, middle, high = percentiles(seconds)
            found[direction][f"{name}_ms"] = [round(1e3 * s, 5) for s in (low, middle, high)]
            # the formula is the kernels'; a CPU runs their references
            if name == "ours" and formulas[direction] is not None and device.type == "cuda":
                rate = formulas[direction](shape, dtype.itemsize) / middle / 1e9
                found[direction]["gb_per_s"] = round(rate, 2)
                found[direction]["share_of_limit"] = round(rate / copy_rate, 4)
    return {key: value for key, value in found.items() if value}


def chosen(found: tuple[Layer, ...], ops: tuple[str, ...], num_shapes: int, itemsize: int) -> list[Layer]:
    """Return, of each op, the shapes that take most of a step: by bytes moved, or by size where products take the time."""

    def weight(layer: Layer) -> float:
        formula = OPS[layer.op].forward_bytes
        size = formula(layer.shape, itemsize) if formula else torch.Size(layer.shape).numel()
        return layer.count * size

    by_op: dict[str, list[Layer]] = defaultdict(list)
    for layer in found:
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
    """Yield result lines: of each model and batch its bytes; with times, then a line for each layer that is timed.

    Raises ValueError for an unknown model or op.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise UserError(f"kernels {unknown} are unknown; use {', '.join(OPS)}")
    lists = [(model, size, layers(model, size)) for model in models for size in batch_sizes]
    for model, size, _ in lists if with_bytes else ():
        yield bytes_record(model, size, dtype, ops)
    if not times:
        return
    is_cpu = device.type == "cpu"
    copy_rate = copy_gb_per_s(device, *((2**26, 3) if is_cpu else ()))
    record = partial(make_record, device=device, note=CPU_NOTE if is_cpu else "")
    for model, size, found in lists:
        for layer in chosen(found, ops, num_shapes, dtype.itemsize):
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


def bytes_rows(found: dict) -> list[tuple]:
    """Return a step's bytes as rows: op, GB moved by ours and by plain PyTorch, MiB saved by either."""
    return [
        (
            op,
            *(f"{row[key]:.4f}" if key in row else "" for key in ("gb", "plain_gb")),
            *(f"{row[key]:,.1f}" if key in row else "" for key in ("saved_mib", "plain_saved_mib")),
        )
        for op, row in found["step"].items()
    ]


def time_rows(records: list[dict]) -> list[tuple]:
    """Return timed layers as rows: layer, pass, ms of each variant, GB/s of ours and its share of a copy's."""
    rows = []
    for record in records:
        config, found = record["config"], record["figures"]
        for direction in PASSES:
            row = found.get(direction)
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
