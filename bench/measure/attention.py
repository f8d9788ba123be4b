"""`safelight bench attention`: every attention backend at the shapes of SD1.5, SD2.1 and SDXL, and which one is chosen.

Forward and backward are timed separately, backends interleaved, inputs rotated and laid out as views of packed
projections. A backend that does not support a shape has the reason in place of its times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from safelight.bench.core.harness import Prepared, interleave_prepared, percentiles
from safelight.bench.core.layers import MODELS, meta_model
from safelight.bench.core.results import make_record
from safelight.bench.counting.counters import MIB, SavedBytes
from safelight.kernels.unet.attention import Case, allowed_backends, attention_cases, choose_attention
from safelight.kernels.unet.attention_backends import call_of
from safelight.kernels.unet.attention_probe import MAX_SCORES, make_inputs, probe, with_padded

NUM_ROTATED = 3
# a GPU's shapes would take minutes on a CPU
CPU_TOKENS = 128
CPU_NOTE = f"shapes are cut to {CPU_TOKENS} tokens for a CPU; these times say little about a GPU"


def shapes_of(model: str, device: torch.device) -> list[Case]:
    """Return a model's attention shapes, the largest first; on a CPU cut to CPU_TOKENS tokens."""
    side = MODELS[model].side
    cases = attention_cases(meta_model(model), (side, side))
    if device.type == "cpu":
        cases = {
            replace(c, queries=min(c.queries, CPU_TOKENS), keys=min(c.queries, CPU_TOKENS) if c.is_self else c.keys)
            for c in cases
        }
    return sorted(cases, key=lambda c: c.heads * c.queries * c.keys, reverse=True)


def _saved_mib(call: Callable, inputs: tuple[Tensor, ...]) -> float:
    """Return the MiB that one call saves for backward, apart from q, k and v."""
    q, k, v, _ = inputs
    # q, k and v exist anyway, whichever backend reads them
    saved = SavedBytes([q, k, v])
    with saved:
        call(q, k, v, None)
    return round(saved.total / MIB, 3)


def _passes(call: Callable, sets: list[tuple[Tensor, ...]]) -> dict[str, Prepared]:
    """Return the forward and backward pass of a backend, rotating through the sets of inputs."""
    rotated = itertools.cycle(sets)

    def run_forward() -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        q, k, v, grad = next(rotated)
        return call(q, k, v, None), (q, k, v), grad

    return {
        "forward": Prepared(lambda: next(rotated), lambda inputs: call(*inputs[:3], None)),
        "backward": Prepared(run_forward, lambda outputs: torch.autograd.grad(*outputs)),
    }


def measure(case: Case, batch: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """Return the figures of a shape: `chosen`, the backend that training would use, and figures by backend.

    These are forward_ms and backward_ms [p20, p50, p80], the MiB saved for backward, and the ratio of the summed p50s
    to those of the chosen backend; or the reason why it cannot run.
    """
    sets = [make_inputs(case, batch, device, dtype) for _ in range(NUM_ROTATED if device.type == "cuda" else 1)]
    backends: dict[str, dict] = {}
    runs: dict[str, Prepared] = {}
    for name in with_padded(allowed_backends(device, dtype, "auto"), case.head_dim):
        if name == "math" and batch * case.heads * case.queries * case.keys > MAX_SCORES:
            reason = f"skipped: more than {MAX_SCORES:,} attention scores, of which math stores several copies"
        else:
            reason = probe(name, sets[0], deterministic=False)
        backends[name] = {"cannot": reason} if reason else {"saved_mib": _saved_mib(call_of(name), sets[0])}
        if not reason:
            runs |= {f"{name} {direction}": run for direction, run in _passes(call_of(name), sets).items()}
    for key, seconds in interleave_prepared(runs, device, repeats).items():
        name, direction = key.split()
        backends[name][f"{direction}_ms"] = [round(1e3 * x, 4) for x in percentiles(seconds)]
    chosen = choose_attention(device, dtype, [case], batch=batch).verdicts[case].backend
    for row in backends.values():
        # the chosen backend has no times if it is math on a shape too large to be measured
        if "cannot" not in row and "cannot" not in backends[chosen]:
            row["ratio"] = round(_both_ms(row) / _both_ms(backends[chosen]), 3)
    return {"chosen": chosen, **backends}


def _both_ms(row: dict) -> float:
    return row["forward_ms"][1] + row["backward_ms"][1]


def bench_attention(
    models: tuple[str, ...], batch: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[dict]:
    """Yield a result line for each shape."""
    seen = set()
    for model in models:
        for case in shapes_of(model, device):
            if case in seen:
                continue
            seen.add(case)
            config = {
                "model": model,
                "batch_size": batch,
                "heads": case.heads,
                "queries": case.queries,
                "keys": case.keys,
                "head_dim": case.head_dim,
                "precision": str(dtype).removeprefix("torch."),
            }
            note = CPU_NOTE if device.type == "cpu" else ""
            yield make_record("attention", config, measure(case, batch, dtype, device, repeats), device, note)


def rows_of(record: dict) -> list[tuple]:
    """Return the rows of a result line for the terminal, the fastest backend first."""
    config, figures = record["config"], record["figures"]
    shape = f"{config['heads']} x {config['head_dim']}, {config['queries']} x {config['keys']}"
    measured = {name: row for name, row in figures.items() if isinstance(row, dict) and "ratio" in row}
    return [
        (
            shape,
            name + (" *" if name == figures["chosen"] else ""),
            f"{row['forward_ms'][1]:.3f}",
            f"{row['backward_ms'][1]:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['saved_mib']:.2f}",
        )
        for name, row in sorted(measured.items(), key=lambda item: item[1]["ratio"])
    ]


def reasons_of(records: list[dict]) -> list[str]:
    """Return a line of text for each backend and reason why it was not measured, with the head dims concerned."""
    dims: dict[tuple[str, str], set[int]] = {}
    for record in records:
        for name, row in record["figures"].items():
            if isinstance(row, dict) and "cannot" in row:
                dims.setdefault((name, row["cannot"]), set()).add(record["config"]["head_dim"])
    return [
        f"{name} was not measured at head dim {', '.join(map(str, sorted(head_dims)))}: {reason}"
        for (name, reason), head_dims in dims.items()
    ]
