"""Which algorithms torch takes of its libraries' choice: deterministic ones alone, or the fastest of a trial."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from safelight.errors import UserError


@contextmanager
def algorithms(*, deterministic: bool = False, cudnn_benchmark: bool = False) -> Iterator[None]:
    """Have torch choose so within the block, and as before after it.

    deterministic: raise where there is only an operator that is not. cudnn_benchmark: cuDNN times a convolution's algorithms
    when it meets a shape, instead of guessing by rule. Torch keeps what was found, in this process, after the block too.
    Raises UserError for both: trials of another process may end otherwise.
    """
    if deterministic and cudnn_benchmark:
        raise UserError(
            "train.cudnn_benchmark does not go with run.deterministic: what is fastest differs from process to process; "
            "set one of them to false"
        )
    if deterministic:
        # cuBLAS reads it when its first handle is made, and torch refuses its products without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(before[0] or deterministic)
    torch.backends.cudnn.benchmark = cudnn_benchmark or (before[1] and not deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
