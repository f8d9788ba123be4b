"""Softmax attention by one fused operator, in the layout that projections give: nothing is copied.

Every backend is called as the operator itself, not through scaled_dot_product_attention, whose choice on meta tensors
is the mathematical path: the operators' own meta implementations and gradients are PyTorch's, so a trace on meta
tensors saves for backward what the card would, selective checkpointing and FlopCounterMode see one operator, and an eager
call costs no Python beyond its own (measured in docs/log.md).

No backend copies an input whose last dimension is contiguous, or writes its output in another order than (B, M, H, K)
for transposed views of such inputs: on the CPU a test counts operators; of the others torch's source says so (flash:
empty_like of the query, flash_api.cpp; cuDNN: alloc_with_matching_layout, MHA.cpp; efficient: empty({B, M, H, K}),
attention.cu), and tests marked gpu wait for a card. math copies.

xformers 0.0.35 has no kernels of its own for these two: its cutlass operator is aten::_efficient_attention_forward and
its flash operator, without the flash_attn package, aten::_flash_attention_forward.

Shapes: B batch, M queries, N keys, H heads, K head dim.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

# in the order preferred where nothing is timed; math keeps whole attention matrices and stands for where nothing works
CUDA_BACKENDS = ("flash", "xformers-flash3", "xformers-flash", "cudnn", "efficient", "xformers-cutlass", "math")
CPU_BACKENDS = ("cpu-flash", "math")
# what a setting stands for
GROUPS = {
    "auto": (*CUDA_BACKENDS, "cpu-flash"),
    "xformers": ("xformers-flash3", "xformers-flash", "xformers-cutlass"),
    "sdpa": ("flash", "cudnn", "efficient", "cpu-flash", "math"),
    "flash": ("flash", "cpu-flash"),
    "cudnn": ("cudnn",),
    "efficient": ("efficient",),
    "math": ("math",),
}
LABELS = {
    "cpu-flash": "sdpa",
    "flash": "sdpa flash",
    "cudnn": "sdpa cuDNN",
    "efficient": "sdpa efficient",
    "math": "sdpa math",
}


def attention_operators() -> list[torch._ops.OpOverload]:
    """Return the operators whose outputs a checkpointing policy keeps to keep attention's."""
    found = [
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        # under xformers
        aten._flash_attention_forward.default,
        aten._efficient_attention_forward.default,
    ]
    for library in ("xformers_flash", "xformers_flash3"):
        # registered when xformers is imported
        packet = getattr(getattr(torch.ops, library), "flash_fwd", None)
        if packet is not None:
            found.append(packet.default)
    return found


def _needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=scale)[0].transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0].transpose(1, 2)


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    keep = _needs_gradient(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_efficient_attention.default(q, k, v, None, keep, scale=scale)[0].transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    keep = _needs_gradient(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, keep, scale=scale)[0].transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return aten._scaled_dot_product_attention_math.default(q, k, v, scale=scale)[0].transpose(1, 2)


@functools.cache
def _xformers_operators(module: str):
    """Return xformers' (forward, backward) operators: of fmha.cutlass, fmha.flash or fmha.flash3.

    Raises ImportError where its compiled library, built for one CUDA, does not load: on a GPU xformers then refuses its
    operators that are PyTorch's own, too, and tells another reason.
    """
    from xformers import _cpp_lib

    error = _cpp_lib._cpp_library_load_exception
    if error is not None:
        while error.__cause__ is not None:
            error = error.__cause__
        raise ImportError(f"its library fails to load: {error}")
    found = importlib.import_module(f"xformers.ops.fmha.{module}")
    return found.FwOp, found.BwOp


def _xformers(module: str, on_meta: Callable) -> Callable:
    """Return a call of one of xformers' operators; on meta tensors, which xformers refuses, of the aten one below it."""

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if q.is_meta:
            return on_meta(q, k, v, scale)
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale, op=_xformers_operators(module))

    return call


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, float | None], Tensor]] = {
    "cpu-flash": _cpu_flash,
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "math": _math,
    "xformers-flash": _xformers("flash", _flash),
    "xformers-flash3": _xformers("flash3", _flash),
    "xformers-cutlass": _xformers("cutlass", _efficient),
}

if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    # the CPU's operator is the one of them that torch 2.13 has no formula for

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def _cpu_flash_flop(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _cpu_flash_backward_flop(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


@dataclass(frozen=True, order=True)
class Case:
    """One shape of attention: self-attention where queries and keys are as many, else cross-attention."""

    head_dim: int
    heads: int = 1
    queries: int = 64
    keys: int = 64

    @property
    def is_self(self) -> bool:
        return self.queries == self.keys


@dataclass(frozen=True)
class Verdict:
    """What was chosen for a case. reasons: backend -> why it cannot; ms: backend -> forward and backward, where timed."""

    backend: str
    reasons: dict[str, str]
    ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of each case on one device and dtype, and why. how: how it was decided; probe_s: seconds it took."""

    device: str
    dtype: str
    verdicts: dict[Case, Verdict]
    wanted: str = "auto"
    how: str = ""
    notes: tuple[str, ...] = ()
    probe_s: float = field(default=0.0, compare=False)
    _calls: dict[tuple[int, int, int], Callable] = field(default_factory=dict, compare=False, repr=False)

    def backend(self, head_dim: int, queries: int, keys: int) -> str:
        """Return the backend for a shape: that of the case of this head dim and kind with the nearest query length."""
        nearest, found = (True, True, 0.0), ""
        for case, verdict in self.verdicts.items():
            ratio = max(case.queries, queries) / min(case.queries, queries)
            distance = (case.head_dim != head_dim, case.is_self != (queries == keys), ratio)
            if not found or distance < nearest:
                nearest, found = distance, verdict.backend
        if nearest[0]:
            known = ", ".join(str(d) for d in sorted({c.head_dim for c in self.verdicts}))
            raise ValueError(f"attention was chosen for head dim {known}, not {head_dim}; choose it for this model")
        return found

    def __str__(self) -> str:
        dims_of: dict[str, list[str]] = {}
        for dim in sorted({case.head_dim for case in self.verdicts}):
            cases = {c: v.backend for c, v in self.verdicts.items() if c.head_dim == dim}
            for name in sorted(set(cases.values())):
                where = ", ".join(f"{c.queries} x {c.keys}" for c in sorted(cases) if cases[c] == name)
                one = len(set(cases.values())) == 1
                dims_of.setdefault(name, []).append(str(dim) if one else f"{dim} ({where})")
        parts = [f"{LABELS.get(name, name)} for head dim {', '.join(dims)}" for name, dims in dims_of.items()]
        for case, verdict in self.verdicts.items():
            if verdict.backend == "math":
                why = "; ".join(f"{name}: {reason}" for name, reason in verdict.reasons.items())
                parts.append(f"math keeps whole attention matrices, and stands for head dim {case.head_dim} as {why}")
        notes = [self.how, *self.notes]
        return f"attention on {self.device}, {self.dtype}: " + "; ".join(parts) + f" ({'; '.join(filter(None, notes))})"

    def record(self) -> dict:
        """Return the choice as plain values, for environment.json and for `previous` of choose_attention."""
        cases = [{**asdict(case), **asdict(verdict)} for case, verdict in self.verdicts.items()]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "wanted": self.wanted,
            "how": self.how,
            "probe_s": self.probe_s,
            "notes": list(self.notes),
            "cases": cases,
        }

    def call(self, head_dim: int, queries: int, keys: int) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
        """Return the function that attends in a shape."""
        key = (head_dim, queries, keys)
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = CALLS[self.backend(*key)]
        return found


def attend(
    q_BMHK: Tensor, k_BNHK: Tensor, v_BNHK: Tensor, choice: AttentionChoice, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v, (B, M, H, K), contiguous, of the inputs' dtype.

    q_BMHK: (B, M, H, K); k_BNHK, v_BNHK: (B, N, H, K), same dtype and device; views of packed projections are taken as
    they are if their last dimension is contiguous. scale: None for 1 / sqrt(K). No copy is made, but by the math
    backend. Raises ValueError for a head dim that `choice` knows nothing of.
    """
    found = choice.call(q_BMHK.shape[3], q_BMHK.shape[1], k_BNHK.shape[1])
    # fused backends write in this order already, and then it is no operator
    return found(q_BMHK, k_BNHK, v_BNHK, scale).contiguous()
