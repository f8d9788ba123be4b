"""Checks that all processes of a run see one and the same run folder."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from safelight.errors import UserError
from safelight.trainer.distributed import outputs
from safelight.trainer.distributed.meeting import name
from safelight.trainer.distributed.world import World

# how long a network folder may take to show a file that another machine has just written
SHOWN_WITHIN_S = 5.0
POLL_S = 0.1


def check_shared(world: World, run_dir: Path) -> None:
    """Raise UserError in rank 0 if a process does not see its run folder, and let the other ranks' lines go there."""
    if world.size == 1:
        return
    logs = run_dir / outputs.FOLDER
    is_new = world.is_main and not logs.exists()
    if world.is_main:
        logs.mkdir(parents=True, exist_ok=True)
    token = str(world.from_main(f".seen-{secrets.token_hex(8)}"))
    if world.is_main:
        (logs / token).touch()
    world.barrier()
    ends_at = time.monotonic() + SHOWN_WITHIN_S
    while not (is_seen := _is_listed(logs, token)) and time.monotonic() < ends_at:
        time.sleep(POLL_S)
    blind = [(rank, folder) for rank, (seen, folder) in enumerate(world.gather([is_seen, str(run_dir)])) if not seen]
    if world.is_main:
        (logs / token).unlink()
        if blind and is_new:
            with suppress(OSError):
                logs.rmdir()
    if blind:
        rank, folder = blind[0]
        raise UserError(
            f"run.dir {folder} of {name(world.peers, rank)} is not the folder of {name(world.peers, 0)}; put the "
            "run into a folder that all machines share, such as one on NFS"
        )
    if not world.is_main:
        outputs.write_to(logs)


def _is_listed(folder: Path, token: str) -> bool:
    # listing asks the server, which opening a file need not
    with suppress(OSError):
        return any(path.name == token for path in folder.iterdir())
    return False
