"""`safelight profile`: profile a run, analyse it, and write the trace, a page and the figures into a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safelight.bench.core.ceilings import ceilings
from safelight.bench.core.results import make_record
from safelight.bench.counting.costs import step_costs
from safelight.bench.profile.analysis import Analysis, analyse, figures
from safelight.bench.profile.profile_page import render
from safelight.bench.profile.profiling_session import ProfileSession, run_session
from safelight.data.atomic import atomic_write_text
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import base_of
from safelight.trainer.models.device import PRECISIONS, pick_device, pick_dtype
from safelight.trainer.run_log.terminal import Terminal

PAGE_NAME, FIGURES_NAME = "profile.html", "profile.json"


@dataclass(frozen=True)
class Profile:
    """A profiled run, its result line (record), and the files written, the page first."""

    session: ProfileSession
    analysis: Analysis
    record: dict
    files: list[Path]


def profile_run(config: Config, num_steps: int, out: Path, terminal: Terminal | None = None) -> Profile:
    """Profile steps of a run and write the results into a folder. Raises UserError as run_session does."""
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.model.precision, device)
    terminal = terminal or Terminal()
    session = run_session(config, num_steps, out, terminal)
    terminal.pause()
    terminal.say("measuring this machine's compute and bandwidth limits, and reading the trace")
    if device.type == "cuda":
        # our kernels are not operators: their bytes are counted on meta tensors, where launches are recorded
        batch, _, height, width = session.shape
        on_meta = step_costs(
            MetaRun(config, base_of(config.model), device, dtype), batch, height, width, session.accumulate
        )
        session.costs |= {key: cost for key, cost in on_meta.items() if cost.is_kernel}
    limits = ceilings(device, dtype, small=device.type == "cpu")
    analysis = analyse(session, limits)
    settings = {
        "base": config.model.base,
        "resolution": config.data.max_resolution,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "precision": PRECISIONS[dtype],
        "optimizer": config.optimizer.name,
        "memory": config.optimizer.memory,
        "kernels": config.train.kernels,
        "checkpointing": config.train.checkpointing,
        "steps": num_steps,
    }
    record = make_record("profile", settings, figures(session, analysis, limits), device)
    title = f"{config.model.base} at {config.data.max_resolution} px, batch {config.train.batch_size}"
    machine = record["machine"]
    name = machine["cpu"] if device.type == "cpu" else machine["device"]
    subtitle = (
        f"{name}; {settings['precision']}, {settings['optimizer']}, torch {machine['torch']}, {record['date'][:10]}"
    )
    atomic_write_text(out / PAGE_NAME, render(session, analysis, limits, title, subtitle))
    atomic_write_text(out / FIGURES_NAME, json.dumps(record, indent=1) + "\n")
    return Profile(session, analysis, record, [out / PAGE_NAME, *session.files, out / FIGURES_NAME])
