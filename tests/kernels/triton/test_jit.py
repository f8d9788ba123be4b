"""Late binding of kernels: no triton at import, both forms in one process, launches on meta recorded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import UserError
from safelight.kernels.ops.geglu import geglu
from safelight.kernels.triton import jit
from safelight.kernels.triton.jit import cdiv, is_dense, kernel, next_power_of_2, record_launches, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

ROOT = Path(__file__).resolve().parents[3]
STEP = 2.5
OPS = (
    "ops.geglu",
    "ops.group_norm_silu",
    "ops.layer_norm",
    "ops.bias_residual",
    "ops.noising",
    "ops.diffusion_loss",
    "ops.norm_then_matmul",
    "optim.adamw8bit",
    "optim.ema",
)


@kernel
def _add_step(x):
    return x + STEP


@kernel
def _shift_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, _add_step(tl.load(x_ptr + i, mask=i < size, other=0.0)), mask=i < size)


def test_ops_are_imported_and_run_without_triton():
    """As on Windows and macOS, where triton is not available."""
    code = (
        "import sys, importlib, torch\nsys.modules['triton'] = None\n"
        f"for name in {OPS!r}: importlib.import_module('safelight.kernels.' + name)\n"
        "from safelight.kernels.ops.geglu import geglu\n"
        "x = torch.ones(2, 4, requires_grad=True)\ngeglu(x).sum().backward()\nprint(float(x.grad.sum()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # two rows, two features: each g + (cdf + pdf) at 1
    assert float(result.stdout) == pytest.approx(4 * (0.841345 + 0.841345 + 0.241971), rel=1e-5)


def test_helpers_and_constants_are_bound(device):
    x = torch.arange(5.0, device=device)
    y = torch.empty_like(x)
    _shift_kernel[(2,)](x, y, 5, BLOCK=4)
    assert y.tolist() == [2.5, 3.5, 4.5, 5.5, 6.5]


def test_both_forms_live_in_one_process(monkeypatch):
    """The tests interpret the kernels that the gate compiles, whatever TRITON_INTERPRET was at import."""
    x = torch.arange(4.0)
    y = torch.empty_like(x)
    _shift_kernel[(1,)](x, y, 4, BLOCK=4)
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    assert isinstance(_shift_kernel.interpreted, InterpretedFunction)
    assert isinstance(_shift_kernel.compiled, JITFunction)
    # binding changes nothing in the module's own globals
    assert "tl" not in globals()
    assert isinstance(_add_step, jit.Kernel)


def test_where_the_kernel_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(2)
    assert not runs_kernel(x)
    assert runs_kernel(x.to("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs_kernel(x)
    assert runs_kernel(x.bfloat16())
    assert not runs_kernel(x.double())
    with pytest.raises(ValueError, match=r"float64 has no kernel; use float32, float16 or bfloat16"):
        runs_kernel(x.double().to("meta"))


def test_a_missing_triton_is_warned_about_once(monkeypatch):
    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float32

    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None)
    jit.has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="triton is not installed: the plain PyTorch operations run"):
            assert not runs_kernel(OnCuda)
    finally:
        jit.has_triton.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "why"), [(None, "Failed to find C compiler"), ("false", "its compiler false ends with status 1")]
)
def test_a_launcher_that_cannot_be_built_is_a_user_error_of_one_line(monkeypatch, tmp_path, compiler, why):
    from triton.runtime import build, driver

    class Driver:
        def get_current_target(self):
            return build.compile_module_from_src("int nothing;", "nothing")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(driver, "_active", Driver())
    with pytest.raises(
        UserError, match=f"Triton cannot launch kernels here: .*{why}.*; it needs a C compiler"
    ) as raised:
        jit.check_launcher()
    assert "\n" not in str(raised.value)


def test_launches_on_meta_are_recorded_and_run_nothing():
    x = torch.empty(2, 3, 40, device="meta", dtype=torch.float16, requires_grad=True)
    with record_launches() as launches:
        y = geglu(x)
        y.backward(torch.empty_like(y))
    assert [launch.kernel.__name__ for launch in launches] == ["_geglu_fwd_kernel", "_geglu_bwd_kernel"]
    assert launches[0].grid == (6, 1)
    assert launches[0].arguments["num_features"] == 20
    assert launches[0].arguments["BLOCK_F"] == 32
    geglu(x)
    assert len(launches) == 2


def test_a_kernels_source_includes_its_helpers_and_constants(monkeypatch):
    source = _shift_kernel.source()
    assert "def _shift_kernel" in source
    assert "def _add_step" in source
    assert "STEP = 2.5" in source
    monkeypatch.setitem(_add_step.function.__globals__, "STEP", 3.5)
    assert _shift_kernel.source() != source


def test_a_kernels_source_ignores_comments_and_docstrings():
    def plain(x_ptr):
        tl.store(x_ptr, tl.load(x_ptr) + 1.0)

    def commented(x_ptr):
        """Increment one number."""
        # a comment, and another layout
        tl.store(
            x_ptr,
            tl.load(x_ptr) + 1.0,
        )

    def other(x_ptr):
        tl.store(x_ptr, tl.load(x_ptr) + 2.0)

    sources = [kernel(f).source().replace(f.__name__, "f") for f in (plain, commented, other)]
    assert sources[0] == sources[1]
    assert sources[0] != sources[2]


@given(n=st.integers(1, 1 << 40), d=st.integers(1, 1 << 20))
def test_sizes(n, d):
    power = next_power_of_2(n)
    assert power & (power - 1) == 0
    assert power // 2 < n <= power
    assert (cdiv(n, d) - 1) * d < n <= cdiv(n, d) * d


@given(st.permutations(range(4)), st.integers(0, 3), st.integers(1, 3))
def test_is_dense_for_every_order_without_gaps(order, cut_dim, cut):
    x = torch.empty(4, 5, 6, 7).permute(order)
    assert is_dense(x)
    # a slice has gaps unless it cuts the dimension outermost in memory
    sliced = x.narrow(cut_dim, 0, x.shape[cut_dim] - cut)
    assert is_dense(sliced) == (order[cut_dim] == 0)
