"""Which backend attends best here, found by running each forward and backward in the model's own shapes.

A backend is taken if it runs, is right and finite; of those the fastest, by CUDA events, where there is a GPU. Nothing is
timed on a CPU, nor where runs must repeat bit for bit: there a fixed order decides.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from safelight.kernels.unet.attention_backends import (
    CALLS,
    CPU_BACKENDS,
    CUDA_BACKENDS,
    GROUPS,
    AttentionChoice,
    Case,
    Verdict,
)

# longer sequences take the time, not another turn
MAX_TOKENS = {"cuda": 4096, "cpu": 64, "meta": 64}
# elements of the attention matrices that batch, heads, queries and keys would have
MAX_SCORES = 2**28
NUM_REPEATS = 5
# a backend this much slower than the fastest counts as equally fast, so that noise does not decide
TIE = 1.05
# cuDNN's backward is not deterministic (torch's sdp_utils.cpp), and xformers asks no flash of its own to be
NOT_DETERMINISTIC = ("cudnn", "xformers-flash", "xformers-flash3")
# how torch and xformers say that a backend cannot: missing operators and builds, shapes refused by assertion. Each is kept
# as the backend's reason, printed and recorded; what is no Exception of these ends the run
FAILURES = (RuntimeError, NotImplementedError, ValueError, ImportError, OSError, AttributeError, AssertionError)


def _short(error: BaseException) -> str:
    """Return an error's reason in one line."""
    text = str(error).strip() or type(error).__name__
    # xformers tells what it was asked first, and then, indented, why each operator refuses
    _, because, after = text.partition("is not supported because:")
    lines = [line.strip() for line in (after if because else text).strip().splitlines()]
    return "; ".join(lines[:2])[:100] if because else lines[0].partition(". ")[0][:100]


def make_inputs(
    case: Case, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v, as views of packed projections, and an upstream gradient. The generator of the run is left alone."""
    generator = torch.Generator(device).manual_seed(0) if device.type != "meta" else None

    def packed(tokens: int, num: int) -> list[Tensor]:
        shape = (batch, tokens, num * case.heads * case.head_dim)
        whole = torch.randn(shape, generator=generator, device=device).to(dtype)
        parts = whole.split(case.heads * case.head_dim, dim=-1)
        return [x.view(batch, tokens, case.heads, case.head_dim).requires_grad_() for x in parts]

    if case.is_self:
        q, k, v = packed(case.queries, 3)
    else:
        (q,), (k, v) = packed(case.queries, 1), packed(case.keys, 2)
    grad = torch.randn(q.shape, generator=generator, device=device).to(dtype)
    return q, k, v, grad


def _both_ways(backend: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    out = CALLS[backend](q, k, v, None)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def _error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return the largest error of the first queries' outputs, relative to the largest output."""
    q, k, v = (x.detach()[:1].transpose(1, 2).float() for x in (q[:, :64], k, v))
    exact = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
    return float((out[:1, :64].float() - exact).abs().max() / exact.abs().max())


def probe(backend: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor], deterministic: bool) -> str:
    """Return '' if a backend attends rightly, forward and backward, to q, k, v with an upstream gradient; else why not."""
    if backend.startswith("xformers") and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if deterministic and backend in NOT_DETERMINISTIC:
        return "its backward is not deterministic"
    try:
        results = _both_ways(backend, *inputs)
        if results[0].is_meta:
            return ""
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        for name, x in zip(names, results, strict=True):
            if not bool(x.isfinite().all()):
                return f"its {name} is not finite"
        # 16-bit operands and TensorFloat-32 err by less
        error = _error_of(results[0], *inputs[:3])
        if error > 0.03:
            return f"its output is wrong by {error:.0%}"
        if deterministic and not all(
            torch.equal(a, b) for a, b in zip(results, _both_ways(backend, *inputs), strict=True)
        ):
            return "two passes differ"
    except FAILURES as error:
        return _short(error)
    return ""


def time_ms(backends: list[str], inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Return milliseconds of a forward and backward pass by backend on a GPU, the median of interleaved repeats."""
    events: dict[str, list] = {name: [] for name in backends}
    for _ in range(NUM_REPEATS):
        for name in backends:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            _both_ways(name, *inputs)
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize(inputs[0].device)
    return {
        name: round(statistics.median(begin.elapsed_time(end) for begin, end in pairs), 4)
        for name, pairs in events.items()
    }


def _capped(case: Case, device: torch.device, batch: int) -> tuple[Case, int]:
    """Return a case and a batch size small enough to be probed in."""
    most = MAX_TOKENS[device.type]
    queries = min(case.queries, most)
    keys = queries if case.is_self else min(case.keys, most if case.keys > 2 * 77 else case.keys)
    return Case(case.head_dim, case.heads, queries, keys), max(
        1, min(batch, MAX_SCORES // (case.heads * queries * keys))
    )


def _judge(
    case: Case,
    candidates: list[str],
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    is_timed: bool,
    deterministic: bool,
) -> Verdict | dict[str, str]:
    """Return the best candidate for a case; or, if none works, why each does not. Preferred candidates come first."""
    case, batch = _capped(case, device, batch)
    inputs = make_inputs(case, batch, device, dtype)
    reasons, working = {}, []
    for backend in candidates:
        if backend == "math" and working:
            reasons["math"] = "it keeps whole attention matrices, and others work"
            continue
        reason = probe(backend, inputs, deterministic)
        if reason:
            reasons[backend] = reason
        else:
            working.append(backend)
            if not is_timed:
                break
    if not working:
        return reasons
    if len(working) == 1 or not is_timed:
        return Verdict(working[0], reasons)
    ms = time_ms(working, inputs)
    fastest = min(ms.values())
    chosen = next(name for name in working if ms[name] <= TIE * fastest)
    reasons |= {name: f"slower: {ms[name]:.3f} ms, {ms[chosen]:.3f} ms" for name in working if name != chosen}
    return Verdict(chosen, reasons, ms)


def backends_of(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the backends that may work on a device, preferred ones first."""
    if device.type == "cpu":
        return CPU_BACKENDS
    if device.type == "meta" and dtype.itemsize != 2:
        # no card's flash or cuDNN takes fp32, which no meta implementation says
        return tuple(name for name in CUDA_BACKENDS if name in ("efficient", "xformers-cutlass", "math"))
    return CUDA_BACKENDS


def allowed_backends(device: torch.device, dtype: torch.dtype, wanted: str) -> list[str]:
    """Return the backends that a setting leaves to be probed. Raises ValueError if none of them is for this device."""
    if wanted not in GROUPS:
        raise ValueError(f"model.attention {wanted!r} is unknown; use {', '.join(GROUPS)}")
    allowed = [name for name in backends_of(device, dtype) if name in GROUPS[wanted]]
    if not allowed:
        why = "xformers has no CPU operator" if wanted == "xformers" else f"it does not run on {device.type}"
        raise ValueError(f"model.attention = {wanted!r} cannot be had on {device.type}: {why}; use auto or sdpa")
    return allowed


def can_time(device: torch.device) -> bool:
    """Return whether backends are timed on a device: on a GPU; a CPU has one fused operator."""
    return device.type == "cuda"


def device_name(device: torch.device) -> str:
    """Return what a choice depends on: the GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    cases: Iterable[Case],
    *,
    wanted: str = "auto",
    batch: int = 1,
    previous: Mapping | None = None,
) -> AttentionChoice:
    """Return the backend of each case on a device and dtype.

    wanted: a key of GROUPS, the setting model.attention. batch: rows attended to at a time. previous: the `record()` of the run that goes on, whose backends are
    kept where they still work, since another backend gives other bits. On meta tensors nothing is probed but shapes: the
    first backend of the card's order that takes the dtype. Raises ValueError if nothing wanted works for a case.
    """
    began = time.perf_counter()
    allowed = allowed_backends(device, dtype, wanted)
    deterministic = torch.are_deterministic_algorithms_enabled()
    name, dtype_name = device_name(device), str(dtype).removeprefix("torch.")
    kept, notes = _previous_verdicts(previous, name, dtype_name)
    verdicts: dict[Case, Verdict] = {}
    is_timed = can_time(device) and not deterministic
    for case in sorted(set(cases)):
        candidates = allowed
        if case in kept:
            before = kept[case].backend
            why = "is not wanted now"
            if before in allowed:
                verdict = _judge(case, [before], device, dtype, batch, False, deterministic)
                if isinstance(verdict, Verdict):
                    verdicts[case] = kept[case]
                    continue
                why = f"does not work now: {verdict[before]}"
                candidates = [x for x in allowed if x != before]
            notes.append(f"{before}, the run's so far for head dim {case.head_dim}, {why}")
        verdict = _judge(case, candidates, device, dtype, batch, is_timed, deterministic)
        if not isinstance(verdict, Verdict):
            why = "; ".join(f"{backend}: {reason}" for backend, reason in verdict.items())
            raise ValueError(
                f"model.attention = {wanted!r} cannot attend on {name} in {dtype_name} with head dim {case.head_dim}: "
                f"{why}; use another"
            )
        verdicts[case] = verdict
    if device.type == "cpu" and wanted == "auto":
        notes.append("xformers has no CPU operator")
    # a CPU has one fused operator, and nothing to decide
    how = "" if device.type == "cpu" else "assumed, not probed"
    if device.type not in ("cpu", "meta"):
        how = "in a fixed order, for a deterministic run" if deterministic else "the fastest that works"
        if kept and all(verdicts[case] is kept.get(case) for case in verdicts):
            how = "as the run began"
    notes = tuple(dict.fromkeys(notes))
    return AttentionChoice(name, dtype_name, verdicts, wanted, how, notes, round(time.perf_counter() - began, 3))


def _previous_verdicts(previous: Mapping | None, name: str, dtype_name: str) -> tuple[dict[Case, Verdict], list[str]]:
    """Return the verdict of each case in a record(), and what has to be told if the device is another now."""
    if not previous:
        return {}, []
    try:
        where = (previous["device"], previous["dtype"])
        kept = {
            Case(*(int(row[key]) for key in ("head_dim", "heads", "queries", "keys"))): Verdict(
                str(row["backend"]), dict(row["reasons"]), dict(row["ms"])
            )
            for row in previous["cases"]
        }
    except (KeyError, TypeError, ValueError):
        return {}, ["the run's environment.json does not tell its attention; chosen anew"]
    if where != (name, dtype_name):
        return {}, [f"the run's attention was chosen on {' in '.join(map(str, where))}; chosen anew"]
    return kept, []
