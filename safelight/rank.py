"""One process of `--gpus`: `python -m safelight.rank train run.toml`, as launch.py starts it.

It leaves its process number and its exit status in the launcher's folder. It exits with 0 for every status that
starting again would not change, so that torch's launcher does not start it again.
"""

from __future__ import annotations

import os

from safelight.trainer.distributed import started


def main() -> int:
    folder = started.launch_folder()
    pid = started.pid_file(folder, started.rank())
    pid.write_text(str(os.getpid()))
    try:
        if started.stop_file(folder).exists():
            # stopped while the processes were being started again
            return 0
        from safelight.__main__ import main as run

        status = run()
    finally:
        # the number may become another process's
        pid.unlink(missing_ok=True)
    if status not in started.FINAL_STATUSES:
        return status
    started.status_file(folder, started.rank()).write_text(str(status))
    return 0


if __name__ == "__main__":
    from safelight.__main__ import leave

    leave(main())
