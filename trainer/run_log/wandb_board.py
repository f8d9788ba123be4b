"""Weights & Biases, if log.wandb asks for it: the same names, steps, pictures and settings as TensorBoard.

A thread talks to the wandb package, so that neither its start, a slow network nor a failure of its own holds up a step:
whatever it raises is said once, and the run goes on without it. What is uploaded is what is written here: wandb's
reports of the machine, its packages, git and the terminal are off.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.run_log.boards import Pictures
from safelight.untrusted import is_link_out, path_in, read_json_object

# in the run folder: the id by which a resume goes on with the same W&B run
RECORD_NAME = "wandb.json"
FOLDER = "wandb"
# lines that wait for the thread; a run writes far fewer than it can take
MAX_WAITING = 10_000
# how long the end of a run waits for what is still to be sent
CLOSE_TIMEOUT_S = 60.0
INIT_TIMEOUT_S = 60.0
_ID = re.compile("[a-z0-9]{8,64}")


def check_wandb(config: Config) -> None:
    """Raise UserError if log.wandb is on and the package is not installed."""
    if config.log.wandb is False:
        return
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb needs the wandb package: pip install wandb, or set log.wandb = false")


class WandbBoard:
    """A run on W&B, or in RUN/wandb for later (log.wandb = "offline").

    say: called with a line about a failure, by the thread that writes. step: from which the run goes on.
    """

    def __init__(self, run_dir: Path, config: Config, say: Callable[[str], None]):
        self._run_dir, self._config, self._say = run_dir, config, say
        self._jobs: queue.Queue[Callable | None] = queue.Queue(MAX_WAITING)
        self._failed = threading.Event()
        self._message = ""
        self._run_id = _run_id(run_dir, config)
        # a daemon: a network that hangs must not keep a finished run from ending
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if scalars:
            self._put(lambda run: run.log({"step": step, **scalars}))

    def write_images(self, step: int, pictures: Pictures) -> None:
        copies = [(tag, prompt, image.copy()) for tag, prompt, image in pictures]
        self._put(lambda run: run.log({"step": step, **{tag: _image(image, text) for tag, text, image in copies}}))

    def flush(self) -> None:
        self._tell()

    def close(self) -> None:
        """Send what waits, for a minute at most."""
        self._put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive() and not self._failed.is_set():
            where = self._run_dir / FOLDER
            self._message = self._message or f"W&B has not taken everything yet; `wandb sync {where}/*run-*` sends it"
        self._tell()

    def _put(self, job: Callable | None) -> None:
        self._tell()
        if self._failed.is_set():
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._fail("it takes nothing")

    def _tell(self) -> None:
        """Print the message that waits. Called by the training thread, which alone writes to the terminal."""
        if self._message:
            message, self._message = self._message, ""
            self._say(message)

    def _fail(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._message = f"W&B is off for the rest of this run: {reason}; training goes on"

    def _work(self) -> None:
        # whatever a service or its package does must not end a run
        try:
            run = self._begin()
            while (job := self._jobs.get()) is not None:
                job(run)
            run.finish()
            self._drop_links_out()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self._fail(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)

    def _drop_links_out(self) -> None:
        """Delete the links that wandb makes to its own logs, outside the run's folder, where no run may have any."""
        for path in (self._run_dir / FOLDER).glob("*/logs/*"):
            if is_link_out(path, self._run_dir):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _begin(self):
        """Return the wandb run, begun or gone on with. Never asks anything on the terminal."""
        import wandb

        log, config = self._config.log, self._config
        is_offline = log.wandb == "offline"
        if not is_offline and not wandb.api.api_key:
            raise UserError("no API key; `wandb login` stores one, and log.wandb = offline needs none")
        settings = wandb.Settings(
            mode="offline" if is_offline else "online",
            root_dir=str(self._run_dir),
            silent=True,
            symlink=False,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=CLOSE_TIMEOUT_S,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        run = wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity or None,
            name=log.wandb_name or config.run.title or self._run_dir.resolve().name,
            notes=config.run.notes or None,
            id=self._run_id,
            resume="allow",
            config=_without_places(config),
            # a resumed run may have other settings
            allow_val_change=True,
            settings=settings,
        )
        self._drop_links_out()
        # a resumed run writes the steps after its checkpoint again, which wandb's own step would refuse
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def _image(image: Image.Image, prompt: str):
    import wandb

    return wandb.Image(image, caption=prompt, file_type="png")


def _without_places(config: Config) -> dict:
    """Return a config's tables without paths of this computer."""
    tables = config.model_dump(by_alias=True, mode="json")
    tables["run"].pop("dir")
    tables["run"].pop("notes")
    tables["data"]["path"] = Path(config.data.path).name
    tables["sample"]["prompts_file"] = Path(config.sample.prompts_file).name
    for name in ("base", "vae", "config", "tokenizer"):
        if Path(value := tables["model"][name]).is_absolute():
            tables["model"][name] = Path(value).name
    return tables


def _run_id(run_dir: Path, config: Config) -> str:
    """Return the id of the run on W&B, recorded in its folder so that a resume goes on with it."""
    try:
        record = read_json_object(path_in(run_dir, RECORD_NAME))
        if record.get("project") == config.log.wandb_project and _ID.fullmatch(str(record.get("id"))):
            return record["id"]
    except (OSError, ValueError):
        pass
    run_id = secrets.token_hex(8)
    record = {"id": run_id, "project": config.log.wandb_project, "entity": config.log.wandb_entity}
    atomic_write_text(run_dir / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    return run_id
