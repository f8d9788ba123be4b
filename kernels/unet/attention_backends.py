"""Softmax attention by one fused operator, on the projections as they lie in memory: nothing is copied.

The exceptions are cpu-narrow (kernels/unet/narrow_attention.py), our own way of computing it for narrow heads on a CPU,
and backends with padded heads, such as flash@64 (kernels/unet/padded_attention.py).

Each backend calls its operator directly instead of scaled_dot_product_attention, which on meta tensors picks the math
path. Called directly, PyTorch's meta implementation of the operator runs, so a trace on meta tensors saves for backward
what a GPU would save; selective checkpointing and FlopCounterMode see a single operator; and an eager call has no
Python overhead beyond its own (measured in docs/log.md).

But for math, cpu-narrow and padded heads, no backend copies an input whose last dimension is contiguous, and given
transposed views of such inputs each writes its output in (B, M, H, K) order. For the CPU a test counts operators. For
the others this is what torch's source does (flash: empty_like of the query, flash_api.cpp; cuDNN:
alloc_with_matching_layout, MHA.cpp; efficient: empty({B, M, H, K}), attention.cu) and what tests marked gpu check.

xformers 0.0.35 ships no kernels of its own for two of its backends: its cutlass operator calls
aten::_efficient_attention_forward and its flash operator, without the flash_attn package,
aten::_flash_attention_forward.

Letters: B batch, M queries, N keys, H heads, K head dim.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from safelight.kernels.unet import flash4
from safelight.kernels.unet.narrow_attention import narrow_attention
from safelight.kernels.unet.padded_attention import padded_attention

aten = torch.ops.aten

# In order of preference where nothing is timed. `math`, which materializes the attention matrix, is the last resort.
CUDA_BACKENDS = (
    "flash",
    "xformers-flash3",
    "flash4",
    "xformers-flash",
    "cudnn",
    "efficient",
    "xformers-cutlass",
    "math",
)
CPU_BACKENDS = ("cpu-narrow", "cpu-flash", "math")
# the backends that each value of model.attention allows
GROUPS = {
    "auto": (*CUDA_BACKENDS, "cpu-narrow", "cpu-flash"),
    "xformers": ("xformers-flash3", "xformers-flash", "xformers-cutlass"),
    "sdpa": ("flash", "cudnn", "efficient", "cpu-flash", "math"),
    "flash": ("flash", "flash4", "cpu-flash"),
    "cudnn": ("cudnn",),
    "efficient": ("efficient",),
    "math": ("math",),
}
LABELS = {
    "cpu-narrow": "matmuls in blocks",
    "cpu-flash": "sdpa",
    "flash": "sdpa flash",
    "flash4": "FlashAttention 4",
    "cudnn": "sdpa cuDNN",
    "efficient": "sdpa efficient",
    "math": "sdpa math",
}


def attention_operators() -> list[torch._ops.OpOverload]:
    """Return the fused attention operators, whose outputs selective checkpointing saves."""
    operators = [
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        # called by xformers
        aten._flash_attention_forward.default,
        aten._efficient_attention_forward.default,
        flash4.OPERATOR,
    ]
    for library in ("xformers_flash", "xformers_flash3"):
        # registered when xformers is imported
        packet = getattr(getattr(torch.ops, library), "flash_fwd", None)
        if packet is not None:
            operators.append(packet.default)
    return operators


def _needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=scale)[0].transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0].transpose(1, 2)


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    saves_logsumexp = _needs_gradient(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, *_ = aten._scaled_dot_product_efficient_attention.default(q, k, v, None, saves_logsumexp, scale=scale)
    return out.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    saves_logsumexp = _needs_gradient(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, *_ = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, saves_logsumexp, scale=scale)
    return out.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_attention_math.default(q, k, v, scale=scale)[0].transpose(1, 2)


@functools.cache
def _xformers_operators(module: str):
    """Return xformers' (forward, backward) operators of fmha.cutlass, fmha.flash or fmha.flash3.

    Raises ImportError if xformers' compiled library, which is built for one CUDA version, does not load. xformers would
    then refuse even the operators that are PyTorch's own, and name another reason.
    """
    try:
        from xformers import _cpp_lib
    # whatever a broken installation raises
    except Exception as error:
        raise ImportError(f"it cannot be imported: {error}") from error
    error = _cpp_lib._cpp_library_load_exception
    if error is not None:
        while error.__cause__ is not None:
            error = error.__cause__
        raise ImportError(f"its library fails to load: {error}")
    operators = importlib.import_module(f"xformers.ops.fmha.{module}")
    return operators.FwOp, operators.BwOp


def _xformers(module: str, on_meta: Callable) -> Callable:
    """Return a function calling an xformers operator; on meta tensors, which xformers refuses, its aten equivalent."""

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if q.is_meta:
            return on_meta(q, k, v, scale)
        operators = _xformers_operators(module)
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale, op=operators)

    return call


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, float | None], Tensor]] = {
    "cpu-flash": _cpu_flash,
    "cpu-narrow": narrow_attention,
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "flash4": flash4.flash4_attention,
    "math": _math,
    "xformers-flash": _xformers("flash", _flash),
    "xformers-flash3": _xformers("flash3", _flash),
    "xformers-cutlass": _xformers("cutlass", _efficient),
}


def call_of(backend: str) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    """Return the function of a backend, which may be one with padded heads, flash@64."""
    return padded_attention(backend) if "@" in backend else CALLS[backend]


def label(backend: str) -> str:
    """Return what a backend is called in messages."""
    name, _, width = backend.partition("@")
    return LABELS.get(name, name) + (f" padded to {width}" if width else "")


if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    # torch 2.13 has FLOP formulas for the other operators but not for the CPU's

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def _cpu_flash_flop(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _cpu_flash_backward_flop(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


@register_flop_formula(torch.ops.safelight.flash4_forward)
def _flash4_flop(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    # (B, T, H, K), where the others' are (B, H, T, K)
    return sdpa_flop_count(*((batch, heads, tokens, dim) for batch, tokens, heads, dim in (q_shape, k_shape, v_shape)))


@dataclass(frozen=True, order=True)
class Case:
    """One attention shape: self-attention if there are as many queries as keys, else cross-attention."""

    head_dim: int
    heads: int = 1
    queries: int = 64
    keys: int = 64

    @property
    def is_self(self) -> bool:
        return self.queries == self.keys


@dataclass(frozen=True)
class Verdict:
    """The backend chosen for a case.

    reasons: other backend -> why it was not chosen; ms: backend -> time of forward and backward, if timed.
    """

    backend: str
    reasons: dict[str, str]
    ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of each case on one device and dtype.

    setting: the value of model.attention; how: how the choice was made, in words; probe_s: seconds it took.
    """

    device: str
    dtype: str
    verdicts: dict[Case, Verdict]
    setting: str = "auto"
    how: str = ""
    notes: tuple[str, ...] = ()
    probe_s: float = field(default=0.0, compare=False)
    _calls: dict[tuple[int, int, int], Callable] = field(default_factory=dict, compare=False, repr=False)

    def backend(self, head_dim: int, queries: int, keys: int) -> str:
        """Return the backend of the case with this head dim and kind (self or cross) that is nearest in query length.

        Raises ValueError for a head dim without a case.
        """
        nearest, backend = (True, True, 0.0), ""
        for case, verdict in self.verdicts.items():
            ratio = max(case.queries, queries) / min(case.queries, queries)
            distance = (case.head_dim != head_dim, case.is_self != (queries == keys), ratio)
            if not backend or distance < nearest:
                nearest, backend = distance, verdict.backend
        if nearest[0]:
            known = ", ".join(str(d) for d in sorted({c.head_dim for c in self.verdicts}))
            raise ValueError(f"attention was chosen for head dim {known}, not {head_dim}; choose it for this model")
        return backend

    def __str__(self) -> str:
        dims_of: dict[str, list[str]] = {}
        for dim in sorted({case.head_dim for case in self.verdicts}):
            cases = {c: v.backend for c, v in self.verdicts.items() if c.head_dim == dim}
            for name in sorted(set(cases.values())):
                where = ", ".join(f"{c.queries} x {c.keys}" for c in sorted(cases) if cases[c] == name)
                one = len(set(cases.values())) == 1
                dims_of.setdefault(name, []).append(str(dim) if one else f"{dim} ({where})")
        parts = [f"{label(name)} for head dim {', '.join(dims)}" for name, dims in dims_of.items()]
        for case, verdict in self.verdicts.items():
            if verdict.backend == "math":
                why = "; ".join(f"{name}: {reason}" for name, reason in verdict.reasons.items())
                parts.append(
                    f"head dim {case.head_dim} falls back to math, which materializes the attention matrix: {why}"
                )
        notes = [self.how, *self.notes]
        return f"attention on {self.device}, {self.dtype}: " + "; ".join(parts) + f" ({'; '.join(filter(None, notes))})"

    def to_dict(self) -> dict:
        """Return the choice as plain values, for environment.json and for choose_attention's `previous`."""
        cases = [{**asdict(case), **asdict(verdict)} for case, verdict in self.verdicts.items()]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "wanted": self.setting,
            "how": self.how,
            "probe_s": self.probe_s,
            "notes": list(self.notes),
            "cases": cases,
        }

    def call(self, head_dim: int, queries: int, keys: int) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
        """Return the function that computes attention for a shape. Raises ValueError as `backend`."""
        key = (head_dim, queries, keys)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = call_of(self.backend(*key))
        return call


def attend(
    q_BMHK: Tensor, k_BNHK: Tensor, v_BNHK: Tensor, choice: AttentionChoice, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v, (B, M, H, K), contiguous, in the inputs' dtype.

    q_BMHK: (B, M, H, K); k_BNHK, v_BNHK: (B, N, H, K), same dtype and device. They may be views of packed projections:
    only the last dimension must be contiguous, and only math, cpu-narrow and padded heads copy them. scale: None for
    1 / sqrt(K). Raises ValueError for a head dim that `choice` has no case for.
    """
    call = choice.call(q_BMHK.shape[3], q_BMHK.shape[1], k_BNHK.shape[1])
    # the fused backends' outputs are contiguous already, so for them this is a no-op
    return call(q_BMHK, k_BNHK, v_BNHK, scale).contiguous()
