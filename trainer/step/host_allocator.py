"""glibc's allocator on a CPU, where tensors come and go with every operator."""

from __future__ import annotations

import ctypes

# parameters of mallopt(3): how much free memory at the end of the heap goes back to the system, and from which size
# on a block is mapped by itself, and unmapped when it is freed
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_TRIM = 2**31 - 1
# before 2.35 glibc took no more than the second
MMAP_THRESHOLDS = 2**30, 2**25


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next; return whether it does.

    By default glibc gives large blocks back to the system, which fills every page with zeros before the process may
    write to it again: thousands of page faults in each step (docs/log.md). The process stays as large as it was at its
    peak, so this is for training on a CPU alone; on a GPU's host weights that were only loaded would stay. Other C
    libraries than glibc are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    is_kept = any(mallopt(M_MMAP_THRESHOLD, threshold) for threshold in MMAP_THRESHOLDS)
    return is_kept and bool(mallopt(M_TRIM_THRESHOLD, MAX_TRIM))
