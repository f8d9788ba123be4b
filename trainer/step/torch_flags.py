"""Context manager for torch's deterministic-algorithms and cuDNN-benchmark flags."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from safelight.errors import UserError


@contextmanager
def torch_flags(*, deterministic: bool = False, cudnn_benchmark: bool = False) -> Iterator[None]:
    """Set both flags inside the block and restore them afterwards.

    deterministic: raise on any operator that has no deterministic implementation. cudnn_benchmark: let cuDNN time its
    convolution algorithms at the first call with a shape instead of choosing by heuristics; torch caches the choice for
    the life of the process, also after the block. Raises UserError for both together: timings differ between processes.
    """
    if deterministic and cudnn_benchmark:
        raise UserError(
            "train.cudnn_benchmark does not go with run.deterministic: what is fastest differs from process to "
            "process; set one of them to false"
        )
    if deterministic:
        # cuBLAS reads it when its first handle is created, and without it torch refuses matrix products
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(before[0] or deterministic)
    torch.backends.cudnn.benchmark = cudnn_benchmark or (before[1] and not deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
