"""Triton kernels that are made when they are first launched: compiled for CUDA tensors, interpreted for CPU ones.

Importing an op's module must not import triton, which Windows and macOS lack, and both forms of a kernel must live in
one process: the tests interpret kernels while the ahead-of-time gate compiles the same ones. `triton.jit` decides once,
when it decorates. So a kernel here is a plain function under `@kernel`, and what it refers to is bound late: `tl`,
other kernels, and the module's int and float constants (which Triton wants as constexpr).

Triton's own library functions (`tl.sum`, `tl.zeros`, `tl.cdiv`, `tl.sigmoid`) are kernels bound at Triton's import and
cannot be interpreted after it; use `tl.reduce` with `tl.standard._sum_combine`, `tl.full`, and plain arithmetic.

A dispatch mode that sees our kernels too: torch's dispatcher knows operators alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import subprocess
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.errors import UserError


class LaunchMode(TorchDispatchMode):
    """While it is entered, `_launched` is called with every launch on meta tensors, beside `__torch_dispatch__`."""

    def __init__(self):
        super().__init__()
        self._listening = contextlib.ExitStack()

    def __enter__(self):
        self._listening.enter_context(tell_launches(self._launched))
        return super().__enter__()

    def __exit__(self, *error):
        self._listening.close()
        return super().__exit__(*error)

    def _launched(self, launch: Launch) -> None:
        """Called with each launch; every subclass has its own."""
        raise NotImplementedError


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """A launch on meta tensors, which ran nothing. arguments: parameter name -> value; options: num_warps and the like."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: dict[str, object] = field(hash=False)
    options: dict[str, object] = field(hash=False)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, each once: one may stand for another that is not there."""
        given = (x for x in self.arguments.values() if isinstance(x, Tensor))
        return list({(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in given}.values())


_listeners: list[Callable[[Launch], None]] = []
_runs_on_meta = True


@contextmanager
def tell_launches(listener: Callable[[Launch], None]) -> Iterator[None]:
    """Call `listener` with every launch on meta tensors: what a GPU would be asked to run.

    A listener that keeps a launch keeps its tensors, and autograd then copies gradients that it would have taken over.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Yield a list that fills with every launch on meta tensors."""
    launches: list[Launch] = []
    with tell_launches(launches.append):
        yield launches


class Kernel:
    """A Triton kernel. Launch with `kernel[grid](*arguments, **options)`; the tensors' device decides how it runs.

    fp_fusion: False forbids fused multiply-add, where results must equal numpy's and torch's bit for bit.
    varying: integer parameters whose value shall not make a new compilation (Triton makes one for 1, one for multiples
    of 16, one for the rest): counts that no address depends on in a way that vector loads need.
    """

    def __init__(self, function: Callable, fp_fusion: bool = True, varying: tuple[str, ...] = ()):
        functools.update_wrapper(self, function)
        self.function = function
        self.fp_fusion = fp_fusion
        self.varying = varying
        self.parameters = function.__code__.co_varnames[: function.__code__.co_argcount]

    def _bind(self, form: str) -> types.FunctionType:
        """Return the function with its globals bound for one form: 'compiled' or 'interpreted'."""
        import triton.language as tl

        function = self.function
        bound = {**function.__globals__, "tl": tl}
        for name in function.__code__.co_names:
            value = bound.get(name)
            if isinstance(value, Kernel):
                # calling an interpreted helper as such would patch all of `tl` once more, a millisecond a call
                bound[name] = value.compiled if form == "compiled" else value.interpreted.rewrite()
            elif isinstance(value, (int, float)):
                bound[name] = tl.constexpr(value)
        copy = types.FunctionType(function.__code__, bound, function.__name__, function.__defaults__)
        copy.__annotations__ = dict(function.__annotations__)
        copy.__qualname__ = function.__qualname__
        return copy

    @functools.cached_property
    def compiled(self):
        from triton.runtime.jit import JITFunction

        return JITFunction(self._bind("compiled"), do_not_specialize=list(self.varying))

    @functools.cached_property
    def interpreted(self):
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(self._bind("interpreted"))

    @functools.cached_property
    def _text(self) -> str:
        return inspect.getsource(self.function)

    def source(self) -> str:
        """Return the kernel's source with that of the helpers it calls and the constants it names: what decides its code."""
        parts = [self._text, f"fp_fusion {self.fp_fusion}, varying {self.varying}"]
        for name in self.function.__code__.co_names:
            value = self.function.__globals__.get(name)
            if isinstance(value, Kernel):
                parts.append(value.source())
            elif isinstance(value, (int, float)):
                parts.append(f"{name} = {value!r}")
        return "\n".join(parts)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments, **options) -> None:
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        if device.type == "cuda":
            if not self.fp_fusion:
                options["enable_fp_fusion"] = False
            if device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    self.compiled[grid](*arguments, **options)
            else:
                self.compiled[grid](*arguments, **options)
        elif device.type == "cpu":
            self.interpreted[grid](*arguments, **options)
        elif device.type == "meta":
            self._record(grid, arguments, options)
        else:
            raise ValueError(
                f"{self.__name__} got tensors on {device}; it runs on cuda, and on cpu in Triton's interpreter"
            )

    def _record(self, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        named = dict(zip(self.parameters, arguments, strict=False))
        named |= {name: options[name] for name in self.parameters if name in options}
        rest = {name: value for name, value in options.items() if name not in named}
        if not self.fp_fusion:
            rest["enable_fp_fusion"] = False
        for listener in _listeners:
            listener(Launch(self, grid, named, rest))


def kernel(
    function: Callable | None = None, *, fp_fusion: bool = True, varying: tuple[str, ...] = ()
) -> Kernel | Callable[[Callable], Kernel]:
    """Decorate a function as a Triton kernel, or as a helper that kernels call; options as of Kernel."""
    if function is None:
        return functools.partial(Kernel, fp_fusion=fp_fusion, varying=varying)
    return Kernel(function, fp_fusion, varying)


@functools.cache
def has_triton() -> bool:
    """Return whether kernels run on a GPU here. Raises UserError, one line, where Triton is there and cannot launch."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn("triton is not installed: the plain PyTorch operations run in place of the kernels", stacklevel=3)
    else:
        check_launcher()
    return found


def check_launcher() -> None:
    """Raise UserError, one line, where Triton cannot launch: it compiles a C file for the machine's driver and this Python."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    # a missing compiler, a compiler that finds no Python.h, a missing libcuda
    except subprocess.CalledProcessError as error:
        why = f"its compiler {error.cmd[0]} ends with status {error.returncode}"
    except (RuntimeError, OSError, AssertionError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    else:
        return
    raise UserError(
        f"Triton cannot launch kernels here: {why}; it needs a C compiler and Python's headers (apt install gcc "
        "python3-dev), or uninstall triton and PyTorch's own operations run instead"
    )


@contextmanager
def references_on_meta(wanted: bool = True) -> Iterator[None]:
    """Let ops on meta tensors run their references within the block, where wanted: what a CPU would run."""
    global _runs_on_meta
    before = _runs_on_meta
    _runs_on_meta = not wanted
    try:
        yield
    finally:
        _runs_on_meta = before


def runs_kernel(x: Tensor) -> bool:
    """Return whether an op on `x` runs its kernel: on CUDA, on meta (where it is recorded), not on the CPU.

    TRITON_INTERPRET=1 runs kernels on the CPU too, in Triton's interpreter; float64, which no kernel takes, always runs
    the reference there. Raises ValueError on CUDA for a dtype no kernel takes.
    """
    if x.device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and x.dtype in KERNEL_DTYPES
    if x.device.type == "meta" and not _runs_on_meta:
        return False
    if x.device.type == "cuda" and not has_triton():
        return False
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype {x.dtype} has no kernel; use float32, float16 or bfloat16")
    return True


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    """Return n / d rounded up."""
    return -(-n // d)


def is_dense(x: Tensor) -> bool:
    """Return whether x's elements fill its memory without gaps or overlaps, in whatever order of dimensions."""
    # only then does empty_like keep the strides
    return torch.empty_like(x, device="meta").stride() == x.stride()


def with_flat_pixels(x: Tensor) -> Tensor:
    """Return x (N, C, ...), copied only where its pixels cannot be counted by one stride."""
    flat = all(
        x.stride(i) == x.shape[i + 1] * x.stride(i + 1) or 1 in x.shape[i : i + 2] for i in range(2, x.dim() - 1)
    )
    return x if flat else x.contiguous()
