"""A fake CUDA device for a CPU build of torch: its memory is the host's, its operators are the CPU's.

Tensors really are on device cuda:0, implemented by pretended_device.cpp, and torch.cuda is torch's own module over the
few functions that a CUDA build has in torch._C. So what a GPU rejects is rejected: host and device tensors in one
operator, another device's generator, `.numpy()`, a read back to the host during a graph capture. Fresh memory holds
NaN. Copies between pinned memory and the device run as late as streams, events and synchronization allow, so that code
that does not wait reads NaN.

A process gets the device from a pytest plugin loaded before all others (`-p tests.trainer.step.pretended_device`), if
PRETENDED_DEVICE in its environment is the path of the library made by `build`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import subprocess
import time
import types
import weakref
from pathlib import Path

# before torch is imported: it caches that there is no CUDA device
if LIBRARY := os.environ.get("PRETENDED_DEVICE"):
    ctypes.CDLL(LIBRARY)

import torch
from torch.profiler import ProfilerActivity

GIB = 2**30
SOURCE = Path(__file__).with_suffix(".cpp")
CARDS = {"Tesla T4": (7, 5), "NVIDIA A10G": (8, 6), "NVIDIA H100": (9, 0)}


def build(folder: Path) -> Path:
    """Compile the device into a folder, about 6 s, and return the library's path."""
    root = Path(torch.__file__).parent
    made = folder / "pretended_device.so"
    command = [
        "g++",
        "-std=c++20",
        "-O0",
        "-w",
        "-shared",
        "-fPIC",
        *(f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")),
        str(SOURCE),
        "-o",
        str(made),
        f"-L{root / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
        f"-Wl,-rpath,{root / 'lib'}",
    ]
    subprocess.run(command, check=True)
    return made


class _Stream(torch.Stream):
    """The base class of torch.cuda.Stream."""

    def __new__(cls, priority=0, stream_id=None, device_index=None, device_type=None, stream_ptr=0):
        if stream_id is None:
            return torch.Stream.__new__(cls, device="cuda:0", priority=priority)
        return torch.Stream.__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


class _Event(torch.Event):
    """The base class of torch.cuda.Event."""

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
        return torch.Event.__new__(cls, device="cuda:0", enable_timing=enable_timing, blocking=blocking)

    def record(self, stream):
        super().record(stream)
        self._when = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return (end._when - self._when) * 1e3

    @property
    def cuda_event(self) -> int:
        return self.event_id


class Properties:
    """What torch.cuda.get_device_properties returns."""

    def __init__(self, name: str, capability: tuple[int, int], total: int):
        self.name, (self.major, self.minor), self.total_memory = name, capability, total
        self.multi_processor_count, self.warp_size, self.L2_cache_size = 40, 32, 4 * 2**20
        self.shared_memory_per_block = self.shared_memory_per_block_optin = 64 * 2**10
        self.max_threads_per_multi_processor, self.regs_per_multiprocessor = 1024, 65536
        self.is_integrated, self.is_multi_gpu_board, self.gcnArchName, self.uuid = 0, 0, name, ""
        self.clock_rate, self.memory_clock_rate, self.memory_bus_width = 1590000, 5001000, 256


class Device:
    """The device: its counters and its settings."""

    def __init__(self, library: str):
        self._c = ctypes.CDLL(library)
        for name in ("allocated", "peak", "syncs", "operators", "total", "current_stream", "graph_size"):
            getattr(self._c, f"pretended_{name}").restype = ctypes.c_int64
        self._c.pretended_graph_begin.restype = ctypes.c_void_p
        self.properties = Properties("", (0, 0), 0)
        self.trims = self.num_launches = 0
        self._callbacks: list = []
        self.graphs: list[Graph] = []

    def become(self, card: str, total_gib: float = 16) -> None:
        """Pretend to be another card."""
        self.properties = Properties(card, CARDS[card], int(total_gib * GIB))
        self._c.pretended_set_total(ctypes.c_int64(self.properties.total_memory))

    def allow(self, num_bytes: int) -> None:
        """Limit allocated memory; allocations beyond it raise torch.OutOfMemoryError."""
        self._c.pretended_allow(ctypes.c_int64(num_bytes))

    def record(self, run) -> None:
        """Add a call of `run` to the graph that is being captured."""
        # keeps the callback alive, because the library calls it at every replay
        self._callbacks.append(ctypes.CFUNCTYPE(None)(run))
        self._c.pretended_graph_call(self._callbacks[-1])

    @property
    def allocated(self) -> int:
        return self._c.pretended_allocated()

    @property
    def num_syncs(self) -> int:
        """How often the host has waited for the device."""
        return self._c.pretended_syncs()

    @property
    def num_operators(self) -> int:
        return self._c.pretended_operators()


DEVICE: Device | None = None


class Graph:
    """The base class of torch.cuda.CUDAGraph: operators are recorded with their memory and run again on it."""

    def __new__(cls, keep_graph=False):
        return object.__new__(cls)

    def __init__(self, keep_graph=False):
        self._handle = None
        DEVICE.graphs.append(weakref.ref(self))

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        self._pool = pool
        self._handle = ctypes.c_void_p(DEVICE._c.pretended_graph_begin())

    def capture_end(self):
        DEVICE._c.pretended_graph_end()

    def replay(self):
        DEVICE._c.pretended_graph_replay(self._handle)

    def reset(self):
        if self._handle is not None:
            DEVICE._c.pretended_graph_free(self._handle)
        self._handle = None

    def pool(self):
        return self._pool

    def size(self) -> int:
        return DEVICE._c.pretended_graph_size(self._handle)


def _memory_stats(device: int) -> dict:
    current, peak = DEVICE.allocated, DEVICE._c.pretended_peak()
    numbers = {"current": current, "peak": peak, "allocated": peak, "freed": peak - current}
    kinds = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "requested_bytes")
    stats = {kind: {pool: dict(numbers) for pool in ("all", "small_pool", "large_pool")} for kind in kinds}
    return {**stats, "num_alloc_retries": 0, "num_ooms": 0, "max_split_size": -1}


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    DEVICE._c.pretended_set_stream(ctypes.c_int64(stream_id))


def _sync() -> None:
    # of the base class: the guard's
    torch.accelerator.synchronize()


class _CudaError:
    success = 0


class _Runtime(types.SimpleNamespace):
    """What torch.cuda.cudart() returns."""

    cudaError = _CudaError

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        return DEVICE._c.pretended_register(ctypes.c_void_p(address), ctypes.c_int64(num_bytes))

    def cudaHostUnregister(self, address: int) -> int:
        return DEVICE._c.pretended_unregister(ctypes.c_void_p(address))

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:
        total = DEVICE.properties.total_memory
        return total - DEVICE.allocated, total

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"

    def cudaProfilerStart(self) -> int:
        return 0

    cudaProfilerStop = cudaProfilerStart


def _functions() -> dict:
    """Return the functions and classes that a CUDA build has in torch._C, by name."""

    def snapshot(mempool=None) -> dict:
        return {"segments": [], "device_traces": [[]], "allocator_settings": {}, "external_annotations": []}

    def record_history(*_, **__) -> None:
        pass

    def trim() -> None:
        DEVICE.trims += 1

    def fraction(part: float, device: int) -> None:
        assert device == 0
        assert 0 <= part <= 1
        DEVICE.allow(int(part * DEVICE.properties.total_memory))

    pools = iter(range(1, 10**9))
    return {
        "_CudaStreamBase": _Stream,
        "_CudaEventBase": _Event,
        "_CUDAGraph": Graph,
        "_CudaDeviceProperties": Properties,
        "_graph_pool_handle": lambda: (0, next(pools)),
        "_cudart": _Runtime(),
        "_cuda_isCurrentStreamCapturing": lambda: bool(DEVICE._c.pretended_is_capturing()),
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_init": lambda: None,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda device: None,
        "_cuda_exchangeDevice": lambda device: 0,
        "_cuda_maybeExchangeDevice": lambda device: 0,
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_getArchFlags": lambda: "sm_75 sm_80 sm_86 sm_90",
        "_cuda_getDefaultStream": lambda device: (0, 0, 1),
        "_cuda_getCurrentStream": lambda device: (DEVICE._c.pretended_current_stream(), 0, 1),
        "_cuda_getCurrentRawStream": lambda device: DEVICE._c.pretended_current_stream(),
        "_cuda_setStream": _set_stream,
        "_cuda_sleep": lambda cycles: None,
        "_cuda_synchronize": _sync,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetPeakMemoryStats": lambda device: DEVICE._c.pretended_reset_peak(),
        "_cuda_resetAccumulatedMemoryStats": lambda device: None,
        "_cuda_emptyCache": trim,
        "_host_emptyCache": lambda: None,
        "_cuda_setMemoryFraction": fraction,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_memorySnapshot": snapshot,
        "_cuda_record_memory_history": record_history,
        "_cuda_record_memory_history_legacy": record_history,
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_set_sync_debug_mode": lambda mode: None,
        "_cuda_clearCublasWorkspaces": lambda: None,
    }


def _attention_operators() -> torch.library.Library:
    """Implement the GPU's fused attention operators for CUDA tensors with the CPU's own."""
    aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")

    def of_ampere() -> None:
        if DEVICE.properties.major < 8:
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    def number() -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64, device="cuda")

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        of_ampere()
        assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)
        empty = torch.empty(0, device="cuda")
        return out, lse, None, None, q.shape[2], k.shape[2], torch.zeros(2, device="cuda"), number(), empty

    def flash_backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
    ):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, dropout_p, is_causal, scale=scale
        )

    def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale
        )
        return out, lse if compute_log_sumexp else lse[:, :, :0], number(), number()

    def efficient_backward(
        grad, q, k, v, bias, out, lse, seed, offset, dropout_p, mask, is_causal=False, *, scale=None
    ):
        assert lse.shape[2], "compute_log_sumexp was False"
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, dropout_p, is_causal, attn_mask=bias, scale=scale
        )
        return *found, None

    def choice(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        return 1 if DEVICE.properties.major >= 8 and q.dtype != torch.float32 and mask is None else 2

    library.impl("_scaled_dot_product_flash_attention", flash, "CUDA")
    library.impl("_scaled_dot_product_flash_attention_backward", flash_backward, "CUDA")
    library.impl("_scaled_dot_product_efficient_attention", efficient, "CUDA")
    library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward, "CUDA")
    library.impl("_fused_sdp_choice", choice, "CUDA")
    return library


class _Launch:
    """Stands for a compiled kernel: runs it in Triton's interpreter on the tensors' memory."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        def run(*arguments, **options):
            from torch.utils._python_dispatch import _disable_current_modes

            devices = {x.device for x in arguments if isinstance(x, torch.Tensor)}
            # Triton: "Pointer argument cannot be accessed from Triton (cpu tensor?)"
            assert devices == {torch.device("cuda", 0)}, f"{self._kernel.__name__} got tensors on {devices}"
            options.pop("enable_fp_fusion", None)
            with _disable_current_modes(), torch.no_grad():
                host = [torch.ops.pretended.host_view(x) if isinstance(x, torch.Tensor) else x for x in arguments]
                DEVICE.num_launches += 1
                if DEVICE._c.pretended_is_capturing():
                    # not run now: the contents of its tables may be known only after the capture
                    DEVICE.record(lambda: self._kernel.interpreted[grid](*host, **options))
                else:
                    self._kernel.interpreted[grid](*host, **options)

        return run


def launch_kernels(really: bool) -> None:
    """Run our kernels in Triton's interpreter, or behave as if Triton were not installed."""
    from safelight.kernels.triton import jit

    jit.has_triton.cache_clear()
    jit.importlib = importlib
    if really:
        jit.check_launcher = lambda: None
        jit.Kernel.compiled = property(_Launch)
    else:
        util = types.SimpleNamespace(
            find_spec=lambda name: None if name == "triton" else importlib.util.find_spec(name)
        )
        jit.importlib = types.SimpleNamespace(util=util)


def install(card: str = "Tesla T4", total_gib: float = 16) -> Device:
    """Install the device in this process."""
    global DEVICE
    assert torch.version.cuda is None, "a CUDA build of torch has operators of its own for CUDA tensors"
    DEVICE = Device(LIBRARY)
    DEVICE.become(card, total_gib)
    for name, value in _functions().items():
        setattr(torch._C, name, value)
    torch._C._has_cuda = True
    torch.version.cuda = "13.0"
    for name in ("torch.cuda.streams", "torch.cuda.graphs", "torch.cuda"):
        importlib.reload(importlib.import_module(name))
    # it is asked for a GPU's timeline and finds it empty
    torch.autograd.profiler._supported_activities = lambda: {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    torch.cuda._get_device_properties = lambda device: DEVICE.properties
    DEVICE.library = _attention_operators()
    torch.cuda.default_generators = (torch.Generator("cuda"),)
    return DEVICE


if LIBRARY:
    install()
