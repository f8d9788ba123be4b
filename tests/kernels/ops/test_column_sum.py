"""Sums over rows of partial sums: any number of rows, deterministic, input untouched."""

import pytest
import torch

from safelight.kernels.ops.column_sum import column_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 64), (3, 150, 100), (1, 513, 65)])
def test_column_sum(device, shape, dtype):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(15)).to(device)
    kept = parts.clone()
    sums = column_sum(parts, dtype)
    assert torch.equal(sums, column_sum(parts, dtype))
    assert torch.equal(parts, kept)
    exact = parts.double().sum(dim=1)
    # fp32 accumulation error, also of the interpreter, which adds a tile's rows in sequence, and one rounding
    accumulated = float(torch.finfo(torch.float32).eps * parts.abs().sum(dim=1).max())
    torch.testing.assert_close(sums.double(), exact, rtol=torch.finfo(dtype).eps, atol=min(accumulated, 1.2e-5))
