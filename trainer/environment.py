"""What a run ran on: versions, device, command. For environment.json and the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import safelight
from safelight.data.printable import counted

PACKAGES = ("torch", "triton", "xformers", "bitsandbytes", "diffusers", "transformers", "numpy", "Pillow")


def _git_commit() -> str:
    root = Path(safelight.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, str]:
    """Return a flat record of versions, machine and command."""
    record = {"safelight": safelight.__version__, "git_commit": _git_commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            record[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            record[package] = "not installed"
    is_gpu = device.type == "cuda"
    record["device"] = torch.cuda.get_device_name(device) if is_gpu else "CPU"
    cores, threads = counted(os.cpu_count(), "core"), counted(torch.get_num_threads(), "thread")
    record["cpu"] = f"{_cpu_name()}, {cores}, {threads} used"
    record["platform"] = platform.platform()
    record["command"] = " ".join(["safelight", *sys.argv[1:]])
    record["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    return record
