"""Triton kernels bound at their first launch: compiled for CUDA tensors, interpreted for CPU tensors, recorded on meta.

Two things must hold. Importing an op must not import triton, which Windows and macOS lack; and one process must be able
to both interpret a kernel (the tests) and compile it (the ahead-of-time gate). `triton.jit` allows neither, because it
decides at decoration time. So a kernel here is a plain function under `@kernel`, and the globals it uses are bound at
first use: `tl`, other kernels, and the module's int and float constants, which Triton needs as constexpr.

Triton's own library functions (`tl.sum`, `tl.zeros`, `tl.cdiv`, `tl.sigmoid`) are kernels bound when triton is
imported, so they cannot be interpreted afterwards. Use `tl.reduce` with `tl.standard._sum_combine`, `tl.full` and plain
arithmetic.

On meta tensors nothing runs: the launch is handed to whoever listens (`record_launches`, `LaunchMode`). That is how the
benchmarks count kernels and how the memory plan and the ahead-of-time gate see them without a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import os
import subprocess
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.broken_imports import message
from safelight.errors import UserError

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_launch_listeners: list[Callable[[Launch], None]] = []
_runs_on_meta = True


@dataclass(frozen=True)
class Launch:
    """A launch on meta tensors, which ran nothing.

    arguments: parameter name -> value; options: num_warps and the like.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: dict[str, object] = field(hash=False)
    options: dict[str, object] = field(hash=False)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, each once: an absent one is passed as an alias of another."""
        given = (x for x in self.arguments.values() if isinstance(x, Tensor))
        return list({(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in given}.values())


class Kernel:
    """A Triton kernel. Launch with `kernel[grid](*arguments, **options)`; the tensors' device decides how it runs.

    fp_fusion: False forbids fused multiply-add, where results must equal numpy's and torch's bit for bit.
    do_not_specialize: integer parameters for which Triton must not compile variants (it does so for 1, for multiples of
    16 and for the rest). Use it for counts that no address depends on in a way that vectorized loads could exploit.
    interpreted_as: a helper with the same results that stands in for this one in the interpreter, if this one has
    instructions that the interpreter lacks.
    """

    def __init__(
        self,
        function: Callable,
        fp_fusion: bool = True,
        do_not_specialize: tuple[str, ...] = (),
        interpreted_as: Kernel | None = None,
    ):
        functools.update_wrapper(self, function)
        self.interpreted_as = interpreted_as
        self.function = function
        self.fp_fusion = fp_fusion
        self.do_not_specialize = do_not_specialize
        self.parameters = function.__code__.co_varnames[: function.__code__.co_argcount]

    def _bind(self, form: str) -> types.FunctionType:
        """Return a copy of the function whose globals are bound for one form: 'compiled' or 'interpreted'."""
        import triton.language as tl

        function = self.function
        bound = {**function.__globals__, "tl": tl}
        for name in function.__code__.co_names:
            value = bound.get(name)
            if isinstance(value, Kernel) and form == "compiled":
                bound[name] = value.compiled
            elif isinstance(value, Kernel):
                # called as an InterpretedFunction, a helper would patch all of `tl` again: a millisecond a call
                bound[name] = (value.interpreted_as or value).interpreted.rewrite()
            elif isinstance(value, (int, float)):
                bound[name] = tl.constexpr(value)
        copy = types.FunctionType(function.__code__, bound, function.__name__, function.__defaults__)
        copy.__annotations__ = dict(function.__annotations__)
        copy.__qualname__ = function.__qualname__
        return copy

    @functools.cached_property
    def compiled(self):
        from triton.runtime.jit import JITFunction

        return JITFunction(self._bind("compiled"), do_not_specialize=list(self.do_not_specialize))

    @functools.cached_property
    def interpreted(self):
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(self._bind("interpreted"))

    @functools.cached_property
    def _code_text(self) -> str:
        """The function's source without comments, docstring and layout, none of which reach the compiler."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        (function,) = tree.body
        if ast.get_docstring(function) is not None:
            function.body = function.body[1:] or [ast.Pass()]
        return ast.unparse(tree)

    def source(self) -> str:
        """Return everything that decides the compiled code: the kernel's code, its helpers' and its constants.

        Comments and docstrings are left out, so rewording them does not call for a new compilation.
        """
        parts = [self._code_text, f"fp_fusion {self.fp_fusion}, do_not_specialize {self.do_not_specialize}"]
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
            self._notify_listeners(grid, arguments, options)
        else:
            raise ValueError(
                f"{self.__name__} got tensors on {device}; it runs on cuda, and on cpu in Triton's interpreter"
            )

    def _notify_listeners(self, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        named = dict(zip(self.parameters, arguments, strict=False))
        named |= {name: options[name] for name in self.parameters if name in options}
        rest = {name: value for name, value in options.items() if name not in named}
        if not self.fp_fusion:
            rest["enable_fp_fusion"] = False
        for listener in _launch_listeners:
            listener(Launch(self, grid, named, rest))


def kernel(
    function: Callable | None = None,
    *,
    fp_fusion: bool = True,
    do_not_specialize: tuple[str, ...] = (),
    interpreted_as: Kernel | None = None,
) -> Kernel | Callable[[Callable], Kernel]:
    """Decorate a function as a Triton kernel, or as a helper that kernels call; options as for `Kernel`."""
    options = {"fp_fusion": fp_fusion, "do_not_specialize": do_not_specialize, "interpreted_as": interpreted_as}
    return functools.partial(Kernel, **options) if function is None else Kernel(function, **options)


@contextmanager
def listen_to_launches(listener: Callable[[Launch], None]) -> Iterator[None]:
    """Call `listener` with every launch on meta tensors, that is, with every kernel a GPU would run.

    A listener that keeps a launch keeps its tensors alive, and autograd then copies gradients it would otherwise have
    taken over.
    """
    _launch_listeners.append(listener)
    try:
        yield
    finally:
        _launch_listeners.remove(listener)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Yield a list to which every launch on meta tensors is appended."""
    launches: list[Launch] = []
    with listen_to_launches(launches.append):
        yield launches


class LaunchMode(TorchDispatchMode):
    """A dispatch mode that also sees our kernels, which torch's dispatcher does not know.

    While entered, `_launched` is called with every launch on meta tensors, as `__torch_dispatch__` is with every
    operator.
    """

    def __init__(self):
        super().__init__()
        self._listening = contextlib.ExitStack()

    def __enter__(self):
        self._listening.enter_context(listen_to_launches(self._launched))
        return super().__enter__()

    def __exit__(self, *error):
        self._listening.close()
        return super().__exit__(*error)

    def _launched(self, launch: Launch) -> None:
        """Handle one launch; each subclass defines it."""
        raise NotImplementedError


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed, that is, whether ops on a GPU run kernels. Warns once if it is not.

    Raises UserError if Triton is installed but cannot launch.
    """
    is_installed = importlib.util.find_spec("triton") is not None
    if not is_installed:
        warnings.warn("triton is not installed: the plain PyTorch operations run in place of the kernels", stacklevel=3)
    else:
        check_launcher()
    return is_installed


def check_launcher() -> None:
    """Raise UserError if Triton cannot build its launcher, a C extension for this driver and this Python."""
    try:
        from triton.runtime import driver
    # whatever a broken installation raises
    except Exception as error:
        raise UserError(message("triton", error)) from error
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
def references_on_meta(enabled: bool = True) -> Iterator[None]:
    """Run PyTorch references instead of recording launches for meta tensors inside the block, as a CPU would."""
    global _runs_on_meta
    before = _runs_on_meta
    _runs_on_meta = not enabled
    try:
        yield
    finally:
        _runs_on_meta = before


def runs_kernel(x: Tensor) -> bool:
    """Return whether an op on `x` launches its kernel: on CUDA and on meta (recorded only), but not on the CPU.

    TRITON_INTERPRET=1 runs kernels on the CPU too, in Triton's interpreter, except for float64, which no kernel
    supports.
    Raises ValueError on CUDA and meta for a dtype that no kernel supports.
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
    """Return the smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    """Return n / d rounded up."""
    return -(-n // d)


def is_dense(x: Tensor) -> bool:
    """Return whether x's elements fill its memory without gaps or overlaps, in any order of dimensions."""
    # empty_like keeps the strides of such tensors only
    return torch.empty_like(x, device="meta").stride() == x.stride()


def with_flat_pixels(x: Tensor) -> Tensor:
    """Return x (N, C, ...) such that one stride steps through its pixels; copies only if it has to."""
    flat = all(
        x.stride(i) == x.shape[i + 1] * x.stride(i + 1) or 1 in x.shape[i : i + 2] for i in range(2, x.dim() - 1)
    )
    return x if flat else x.contiguous()
