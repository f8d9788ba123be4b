"""Tables of gradients' addresses: every captured graph has its own, which lives until captures are released."""

import weakref

import pytest
import torch

from safelight.kernels.optim import adamw8bit, launch_tables
from safelight.kernels.optim.adamw8bit import AdamW8bit


def test_every_captured_graph_has_a_table_of_its_own(monkeypatch):
    """Without a GPU: captures are simulated, launches recorded, and tables read where a replay would read them."""
    capturing, launched = [], []
    monkeypatch.setattr(launch_tables, "_is_capturing", lambda device: bool(capturing))
    monkeypatch.setattr(adamw8bit, "runs_kernel", lambda x: True)

    class NotedLaunch:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(arguments[1])

    for name in ("_adamw8bit_kernel", "_adamw32bit_kernel"):
        monkeypatch.setattr(adamw8bit, name, NotedLaunch())
    weights = [torch.zeros(64, 64), torch.zeros(8)]
    optimizer = AdamW8bit(weights)

    def take_step():
        gradients = [torch.ones_like(w) for w in weights]
        optimizer.step(gradients, 1e-3)
        return gradients

    take_step()
    made, graphs = torch.tensor, []
    for _ in range(2):
        launched.clear()
        capturing.append(True)
        with monkeypatch.context() as during:
            during.setattr(torch, "tensor", lambda *a, **k: pytest.fail("a copy from the host in a capture"))
            gradients = take_step()
        capturing.clear()
        assert not any(table.any() for table in launched)
        optimizer.finish_capture()
        graphs.append((gradients, list(launched)))
    assert torch.tensor is made
    launched.clear()
    graphs.append((take_step(), list(launched)))
    tables = [table for _, found in graphs for table in found]
    assert len({table.data_ptr() for table in tables}) == 6
    for gradients, (coded, plain) in graphs:
        assert coded.tolist() == [gradients[0].data_ptr(), 0]
        assert plain.tolist() == [0, gradients[1].data_ptr()]
    # a second capture that is begun before the first is finished would share its table
    capturing.append(True)
    take_step()
    with pytest.raises(AssertionError, match="finish_capture was not called"):
        take_step()
    # once released, no table is kept alive
    alive = [weakref.ref(table) for _, found in graphs[:2] for table in found]
    del graphs, tables, coded, plain
    launched.clear()
    assert all(ref() is not None for ref in alive)
    optimizer.release_captures()
    assert all(ref() is None for ref in alive)
