"""What is checked before hours of encoding: that the run fits the computer's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safelight.errors import UserError
from safelight.trainer.loading import resolve
from safelight.trainer.loading.resolve import check_early, resolve_run
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.static_bytes import HostBytes, static_bytes
from safelight.units import GIB


@pytest.fixture
def free(monkeypatch):
    """A function that sets the memory and the swap space that seem to be free."""

    def set_free(memory: int | None, swap: int = 0) -> None:
        monkeypatch.setattr(resolve, "available_bytes", lambda: memory)
        monkeypatch.setattr(resolve, "swap_bytes", lambda: swap)

    return set_free


def test_a_run_on_the_cpu_that_the_system_would_kill_is_refused(make_config, tmp_path, free):
    run = resolve_run(make_config(), Path(tmp_path / "run"), None)
    needed = static_bytes(run.config, torch.device("cpu"), run.dtype).total
    for memory, swap in ((needed, 0), (needed // 2, needed), (None, 0)):
        free(memory, swap)
        check_early(run)
    free(needed // 2, needed // 4)
    with pytest.raises(
        UserError, match=r"the run needs 0\.0 GiB of the computer's memory .* the system would kill it; "
    ):
        check_early(run)


def test_host_memory_that_a_plan_for_a_gpu_needs_is_checked(make_config, tmp_path, free):
    run = resolve_run(make_config(), Path(tmp_path / "run"), None)
    sizes = {"states": 2 * GIB, "weights": GIB, "activations": 2 * GIB, "snapshot": 9 * GIB, "autoencoder": GIB}
    host = HostBytes(**sizes, loading=4 * GIB)
    plan = Candidate("streamed", "offload", False, 1, 0, 0, 0, 0, "", {}, None, host=host)
    run = replace(run, plan=plan)
    free(6 * GIB)
    check_early(run)
    free(5 * GIB)
    with pytest.raises(UserError, match=r"the run needs 6\.0 GiB .* but only 5\.0 GiB are free"):
        check_early(run)
