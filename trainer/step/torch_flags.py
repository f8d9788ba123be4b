"""Context manager for torch's flags of deterministic algorithms, of filled memory, and of cuDNN's benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from safelight.errors import UserError


@contextmanager
def torch_flags(*, deterministic: bool = False, cudnn_benchmark: bool = False) -> Iterator[None]:
    """Set the flags inside the block and restore them afterwards.

    deterministic: raise on any operator that has no deterministic implementation, and do not fill empty tensors.
    cudnn_benchmark: let cuDNN time its convolution algorithms at the first call with a shape instead of choosing by
    heuristics; torch caches the choice for the life of the process, also after the block. Raises UserError for both
    together: timings differ between processes.
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
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before[0] or deterministic)
    torch.backends.cudnn.benchmark = cudnn_benchmark or (before[1] and not deterministic)
    if deterministic:
        # By default torch then writes NaN into every empty tensor, one more pass over each result of ours and of its
        # own operators. All of them are written whole: the tests fill what the kernels get with NaN.
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = filled
