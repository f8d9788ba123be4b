"""Sums over partial rows: any number of them, in a fixed order."""

import pytest
import torch

from safelight.kernels.ops.column_sum import column_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 64), (3, 150, 100), (1, 513, 65)])
def test_sums(device, shape, dtype):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(15)).to(device)
    kept = parts.clone()
    found = column_sum(parts, dtype)
    assert torch.equal(found, column_sum(parts, dtype))
    assert torch.equal(parts, kept)
    exact = parts.double().sum(dim=1)
    # fp32's own error, and one rounding to the dtype asked for
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
