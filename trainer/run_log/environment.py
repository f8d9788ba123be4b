"""Versions, device and command of a run, for environment.json and the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import safelight
from safelight.text import counted
from safelight.trainer.distributed import started
from safelight.untrusted import path_in, read_json_object

FILE_NAME = "environment.json"
# keys of environment.json: the order of an epoch's batches, what choose_attention decided, the plan of the GPU's
# memory, the base by its content (trainer/models/base_record.py), and the precision of the autoencoder
EPOCH_ORDER = "epoch_order"
ATTENTION = "attention_choice"
MEMORY_PLAN = "memory_plan"
BASE = "base"
AUTOENCODER = "autoencoder"
# the settings by their names, and what resumes have changed of them: step -> in words
SETTINGS = "settings"
CHANGES = "changed_settings"

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
    """Return versions, machine and command as a flat dict."""
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
    given = sys.argv[1:]
    if (num := started.world_size()) > 1:
        record["processes"] = str(num)
        # torchrun starts the command itself, and --gpus starts one process each without it
        given += [] if "--gpus" in given else started.options_to_resume()
    record["command"] = shlex.join(["safelight", *given])
    record["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    return record


def recorded_attention(run_dir: Path) -> dict | None:
    """Return the attention choice that a run recorded, or None; the `previous` argument of choose_attention."""
    return recorded(run_dir, ATTENTION)


def recorded(run_dir: Path, key: str) -> dict | None:
    """Return a table of a run's environment.json; None if missing, {"unreadable": path} if the file is damaged."""
    try:
        value = _entry(run_dir, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        value = ""
    # choose_attention reports it
    return value if value is None or isinstance(value, dict) else {"unreadable": str(run_dir / FILE_NAME)}


def recorded_start(run_dir: Path) -> str | None:
    """Return when a run was started first, as its environment.json says; None if that is unknown."""
    try:
        value = _entry(run_dir, "started")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None


def _entry(run_dir: Path, key: str) -> object:
    return read_json_object(path_in(run_dir, FILE_NAME)).get(key)
