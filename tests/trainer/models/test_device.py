"""run.device and model.precision are resolved on a CPU, a T4 and a newer GPU."""

import pytest
import torch

from safelight.trainer.models.device import pick_device, pick_dtype

CPU = torch.device("cpu")


def test_device_and_dtype(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="but torch finds no CUDA device; use auto or cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # with an index, which torch.cuda.set_per_process_memory_fraction requires
    assert pick_device("auto") == pick_device("cuda") == gpu
    assert pick_dtype("auto", CPU) == torch.float32
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert pick_dtype(name, CPU) == dtype
    # a T4 has no bf16 arithmetic
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_dtype("auto", gpu) == torch.float16
    with pytest.raises(ValueError, match="bf16: this GPU has no bf16 arithmetic; use fp16 or auto"):
        pick_dtype("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert pick_dtype("auto", gpu) == pick_dtype("bf16", gpu) == torch.bfloat16
