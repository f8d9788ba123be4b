"""Fixtures for the recipes: torch.compile replaced, and the same batches for all."""

import pytest
import torch

from safelight.bench.recipes.workload import Workload, random_batches

WORK = Workload(batch_size=2, optimizer="adamw", device="cpu", precision="fp32").resolved()


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The modules passed to torch.compile, which returns them unchanged here: compiling takes a minute."""
    modules = []
    monkeypatch.setattr(torch, "compile", lambda module: modules.append(module) or module)
    return modules


@pytest.fixture(scope="module")
def inputs() -> list[tuple]:
    """Three batches of (latents, noise, timesteps, conditioning)."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            batch.mean_BCHW,
            torch.randn(batch.mean_BCHW.shape, generator=generator),
            torch.randint(0, 1000, (2,), generator=generator),
            batch.conditioning,
        )
        for batch in random_batches(3, WORK)
    ]
