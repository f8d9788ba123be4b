"""`safelight bench attention`: every backend at the shapes that SD1.5, SD2.1 and SDXL attend in, and which is chosen.

Forward and backward apart, backends interleaved, inputs rotated, as views of packed projections. A backend that cannot
leaves its reason in the place of its times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from safelight.bench.core.harness import Prepared, interleave_prepared, percentiles
from safelight.bench.core.layers import MODELS, meta_model
from safelight.bench.core.results import make_record
from safelight.bench.counting.counters import MIB, SavedBytes
from safelight.kernels.unet.attention import Case, allowed_backends, attention_cases, choose_attention
from safelight.kernels.unet.attention_backends import CALLS
from safelight.kernels.unet.attention_probe import MAX_SCORES, make_inputs, probe

NUM_ROTATED = 3
# a CPU's time for a card's shapes is minutes
CPU_TOKENS = 128
CPU_NOTE = f"shapes cut to {CPU_TOKENS} tokens for a CPU, whose times say little of a card's"


def shapes_of(model: str, device: torch.device) -> list[Case]:
    """Return a model's shapes, the largest first; on a CPU small ones in their place."""
    side = MODELS[model].side
    cases = attention_cases(meta_model(model), (side, side))
    if device.type == "cpu":
        cases = {
            replace(c, queries=min(c.queries, CPU_TOKENS), keys=min(c.queries, CPU_TOKENS) if c.is_self else c.keys)
            for c in cases
        }
    return sorted(cases, key=lambda c: c.heads * c.queries * c.keys, reverse=True)


def _saved_mib(call: Callable, inputs: tuple[Tensor, ...]) -> float:
    """Return what one call keeps for backward besides q, k and v, MiB."""
    q, k, v, _ = inputs
    # the inputs are the projections' outputs, whichever backend reads them
    saved = SavedBytes([q, k, v])
    with saved:
        call(q, k, v, None)
    return round(saved.total / MIB, 3)


def _passes(call: Callable, sets: list[tuple[Tensor, ...]]) -> dict[str, Prepared]:
    """Return a backend's forward and backward pass, each over the sets of inputs in turn."""
    turn = 0

    def inputs() -> tuple[Tensor, ...]:
        nonlocal turn
        turn += 1
        return sets[turn % len(sets)]

    def attended() -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        q, k, v, grad = inputs()
        return call(q, k, v, None), (q, k, v), grad

    return {
        "forward": Prepared(inputs, lambda x: call(*x[:3], None)),
        "backward": Prepared(attended, lambda made: torch.autograd.grad(*made)),
    }


def measure(case: Case, batch: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """Return a shape's figures: `chosen`, and by backend its times in ms [p20, p50, p80], the ratio of the sum of its
    p50s to the chosen one's, and what it keeps for backward, MiB; or why it cannot.
    """
    sets = [make_inputs(case, batch, device, dtype) for _ in range(NUM_ROTATED if device.type == "cuda" else 1)]
    found: dict[str, dict] = {}
    runs: dict[str, Prepared] = {}
    for name in allowed_backends(device, dtype, "auto"):
        if name == "math" and batch * case.heads * case.queries * case.keys > MAX_SCORES:
            found[name] = {"cannot": f"left out: more than {MAX_SCORES:,} scores, which it keeps several times"}
            continue
        reason = probe(name, sets[0], deterministic=False)
        found[name] = {"cannot": reason} if reason else {"saved_mib": _saved_mib(CALLS[name], sets[0])}
        if not reason:
            runs |= {f"{name} {which}": run for which, run in _passes(CALLS[name], sets).items()}
    for which, seconds in interleave_prepared(runs, device, repeats).items():
        name, direction = which.split()
        found[name][f"{direction}_ms"] = [round(1e3 * x, 4) for x in percentiles(seconds)]
    chosen = choose_attention(device, dtype, [case], batch=batch).verdicts[case].backend
    for row in found.values():
        # math may be all that works, and too large to be measured
        if "cannot" not in row and "cannot" not in found[chosen]:
            row["ratio"] = round(_both_ms(row) / _both_ms(found[chosen]), 3)
    return {"chosen": chosen, **found}


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
    """Return a result line's rows for the terminal."""
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
    """Return a line for each backend and reason that it was not measured for, with the head dims."""
    dims: dict[tuple[str, str], set[int]] = {}
    for record in records:
        for name, row in record["figures"].items():
            if isinstance(row, dict) and "cannot" in row:
                dims.setdefault((name, row["cannot"]), set()).add(record["config"]["head_dim"])
    return [
        f"{name} not at head dim {', '.join(map(str, sorted(of)))}: {reason}" for (name, reason), of in dims.items()
    ]
