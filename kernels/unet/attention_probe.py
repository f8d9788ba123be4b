"""Choosing the attention backend by running each one, forward and backward, in the model's own shapes.

A backend qualifies if it runs and its results are correct and finite. On a GPU the fastest of these, timed with CUDA
events, is chosen. On a CPU, or if runs must repeat bit for bit, nothing is timed and a fixed order decides.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.unet.attention_backends import (
    CPU_BACKENDS,
    CUDA_BACKENDS,
    GROUPS,
    AttentionChoice,
    Case,
    Verdict,
    call_of,
)
from safelight.kernels.unet.padded_attention import padded_name

# probe at most this many tokens: longer sequences take longer but do not change the result
MAX_TOKENS = {"cuda": 4096, "cpu": 64, "meta": 64}
# probe at most this many elements of attention matrices: batch x heads x queries x keys
MAX_SCORES = 2**28
NUM_REPEATS = 5
# backends within this factor of the fastest count as equally fast, so that timing noise does not decide
TIE = 1.05
# cuDNN's backward is not deterministic (torch's sdp_utils.cpp); xformers does not ask its flash kernels to be
NOT_DETERMINISTIC = ("cudnn", "xformers-flash", "xformers-flash3")
# What torch and xformers raise for a backend that is missing, not built, or does not support a shape. The message
# becomes the backend's reason, which is printed and kept with the run. Any other exception ends the run.
FAILURES = (RuntimeError, NotImplementedError, ValueError, ImportError, OSError, AttributeError, AssertionError)


def _short(error: BaseException) -> str:
    """Return an error's reason as one short line."""
    text = str(error).strip() or type(error).__name__
    # xformers first lists the inputs, and then, indented, why each operator refuses them
    _, because, after = text.partition("is not supported because:")
    lines = [line.strip() for line in (after if because else text).strip().splitlines()]
    return "; ".join(lines[:2])[:100] if because else lines[0].partition(". ")[0][:100]


def make_inputs(
    case: Case, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (q, k, v, upstream gradient) of a case, random; q, k, v are views of packed projections.

    Uses a generator of its own, so torch's random state does not change.
    """
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


def _forward_backward(backend: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return (output, dq, dk, dv)."""
    out = call_of(backend)(q, k, v, None)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def _error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return the largest error among the first 64 queries' outputs, relative to the largest output."""
    q, k, v = (x.detach()[:1].transpose(1, 2).float() for x in (q[:, :64], k, v))
    exact = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
    return float((out[:1, :64].float() - exact).abs().max() / exact.abs().max())


def _has_flash4() -> bool:
    # by its distribution: FlashAttention 2 is a package of the same name, flash_attn
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def probe(backend: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor], deterministic: bool) -> str:
    """Return '' if a backend works on these inputs, forward and backward; else why not.

    It must run, its results must be finite, its output close to fp32 attention and, with deterministic, two runs equal.
    inputs: as from `make_inputs`. On meta tensors only whether it runs is checked.
    """
    name = backend.partition("@")[0]
    if name.startswith("xformers") and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if name == "flash4" and not _has_flash4():
        return "flash-attn-4 is not installed"
    if deterministic and name in NOT_DETERMINISTIC:
        return "its backward is not deterministic"
    try:
        results = _forward_backward(backend, *inputs)
        if results[0].is_meta:
            return ""
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        for name, x in zip(names, results, strict=True):
            if not bool(x.isfinite().all()):
                return f"its {name} is not finite"
        # 16-bit operands and TF32 are well within this
        error = _error_of(results[0], *inputs[:3])
        if error > 0.03:
            return f"its output is wrong by {error:.0%}"
        if deterministic and not all(
            torch.equal(a, b) for a, b in zip(results, _forward_backward(backend, *inputs), strict=True)
        ):
            return "two runs give different results"
    except FAILURES as error:
        return _short(error)
    return ""


def time_ms(backends: list[str], inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Return backend -> milliseconds of forward and backward on a GPU: the median of interleaved repeats."""
    events: dict[str, list] = {name: [] for name in backends}
    for _ in range(NUM_REPEATS):
        for name in backends:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            _forward_backward(name, *inputs)
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize(inputs[0].device)
    return {
        name: round(statistics.median(begin.elapsed_time(end) for begin, end in pairs), 4)
        for name, pairs in events.items()
    }


def _capped(case: Case, device: torch.device, batch: int) -> tuple[Case, int]:
    """Return a case and a batch size reduced to the limits for probing."""
    max_tokens = MAX_TOKENS[device.type]
    queries = min(case.queries, max_tokens)
    keys = queries if case.is_self else min(case.keys, max_tokens if case.keys > 2 * 77 else case.keys)
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
    """Return the best of the candidates, given in order of preference; if none works, candidate -> reason."""
    case, batch = _capped(case, device, batch)
    inputs = make_inputs(case, batch, device, dtype)
    reasons, working = {}, []
    for backend in candidates:
        if backend == "math" and working:
            reasons["math"] = "it materializes the attention matrix, and others work"
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
    """Return the backends that may work on a device, in order of preference."""
    if device.type == "cpu":
        return CPU_BACKENDS
    if device.type == "meta" and dtype.itemsize != 2:
        # no GPU's flash or cuDNN supports fp32, but their meta implementations accept it
        return tuple(name for name in CUDA_BACKENDS if name in ("efficient", "xformers-cutlass", "math"))
    return CUDA_BACKENDS


def with_padded(backends: list[str], head_dim: int) -> list[str]:
    """Return backends with, behind each, the one that pads heads of this width, if there is one."""
    return [name for backend in backends for name in (backend, padded_name(backend, head_dim)) if name]


def allowed_backends(device: torch.device, dtype: torch.dtype, setting: str) -> list[str]:
    """Return the backends to probe for a value of model.attention. Raises UserError if none exists for this device."""
    if setting not in GROUPS:
        raise UserError(f"model.attention {setting!r} is unknown; use {', '.join(GROUPS)}")
    allowed = [name for name in backends_of(device, dtype) if name in GROUPS[setting]]
    if not allowed:
        why = "xformers has no CPU operator" if setting == "xformers" else f"it does not run on {device.type}"
        raise UserError(f"model.attention = {setting!r} is not available on {device.type}: {why}; use auto or sdpa")
    return allowed


def can_time(device: torch.device) -> bool:
    """Return whether backends can be timed on a device: only on a GPU. On a CPU their order decides."""
    return device.type == "cuda"


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the device type; a choice made on another one is not reused."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    cases: Iterable[Case],
    *,
    setting: str = "auto",
    batch: int = 1,
    previous: Mapping | None = None,
) -> AttentionChoice:
    """Return the backend of each case on a device and dtype.

    setting: the value of model.attention, a key of GROUPS. batch: samples per forward pass. previous: `to_dict()` of
    the run being resumed; its backends are kept if they still work, because another backend gives other bits. On meta
    tensors nothing is computed: the first backend in a GPU's order that accepts shapes and dtype is taken.
    Raises UserError if no allowed backend works for a case.
    """
    began = time.perf_counter()
    allowed = allowed_backends(device, dtype, setting)
    deterministic = torch.are_deterministic_algorithms_enabled()
    name, dtype_name = device_name(device), str(dtype).removeprefix("torch.")
    kept, notes = _previous_verdicts(previous, name, dtype_name)
    verdicts: dict[Case, Verdict] = {}
    is_timed = can_time(device) and not deterministic
    for case in sorted(set(cases)):
        # meta tensors tell what a backend saves and launches, not whether padding pays
        candidates = allowed if device.type == "meta" else with_padded(allowed, case.head_dim)
        if case in kept:
            previous_backend = kept[case].backend
            why = "is not allowed by the setting now"
            if previous_backend in candidates:
                verdict = _judge(case, [previous_backend], device, dtype, batch, False, deterministic)
                if isinstance(verdict, Verdict):
                    verdicts[case] = kept[case]
                    continue
                why = f"does not work now: {verdict[previous_backend]}"
                candidates = [x for x in candidates if x != previous_backend]
            notes.append(f"{previous_backend}, so far the run's backend for head dim {case.head_dim}, {why}")
        verdict = _judge(case, candidates, device, dtype, batch, is_timed, deterministic)
        if not isinstance(verdict, Verdict):
            why = "; ".join(f"{backend}: {reason}" for backend, reason in verdict.items())
            raise UserError(
                f"model.attention = {setting!r} does not work on {name} in {dtype_name} with head dim {case.head_dim}: "
                f"{why}; use another"
            )
        verdicts[case] = verdict
    if device.type == "cpu" and setting == "auto":
        notes.append("xformers has no CPU operator")
    # on a CPU the first that works is chosen, always
    how = "" if device.type == "cpu" else "assumed, not probed"
    if device.type not in ("cpu", "meta"):
        how = "first that works, for a deterministic run" if deterministic else "the fastest that works"
        if kept and all(verdicts[case] is kept.get(case) for case in verdicts):
            how = "as when the run began"
    notes = tuple(dict.fromkeys(notes))
    return AttentionChoice(name, dtype_name, verdicts, setting, how, notes, round(time.perf_counter() - began, 3))


def _previous_verdicts(previous: Mapping | None, name: str, dtype_name: str) -> tuple[dict[Case, Verdict], list[str]]:
    """Return the verdicts in `previous`, and notes to print; none if it is damaged or from another device or dtype."""
    if not previous:
        return {}, []
    try:
        where = (str(previous["device"])[:100], str(previous["dtype"])[:100])
        kept = {
            Case(*(int(row[key]) for key in ("head_dim", "heads", "queries", "keys"))): Verdict(
                str(row["backend"]), dict(row["reasons"]), dict(row["ms"])
            )
            for row in previous["cases"]
        }
    except (KeyError, TypeError, ValueError):
        return {}, ["the run's environment.json does not say which attention it used; chosen again"]
    if where != (name, dtype_name):
        return {}, [f"the run's attention was chosen on {' in '.join(where)}; chosen again"]
    return kept, []
