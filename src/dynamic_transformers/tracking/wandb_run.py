"""Weights & Biases: one run over resumes, files in the run folder, and nobody waits for its server."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking.record import FAILED, KILLED, RecordFile

if TYPE_CHECKING:
    from wandb import Run  # type: ignore[import-not-found]  # an extra

logger = logging.getLogger("dynamic_transformers")

ANSWER_TIMEOUT = 2  # seconds for a first sign of the server
INIT_TIMEOUT = 15  # seconds; nobody waits for them
FINISH_TIMEOUT = 3  # seconds that W&B may take for what is left when a run ends
PATIENCE = 4.5  # seconds that the run waits for that


class WandbRun:
    """A run of W&B, served by a thread of its own.

    Where the server does not answer, or nobody has logged in, the run is written to the run folder alone. A
    line says how to send it then.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, file: RecordFile, settings: TrackingSettings, params: dict[str, Any]):
        if importlib.util.find_spec("wandb") is None:
            raise UserError("tracking.wandb=true: the package wandb is not installed; pip install wandb")
        self.settings, self.run_dir = settings, file.path.parent
        self.options: dict[str, Any] = {
            "project": settings.wandb_project,
            "name": file.record.name,
            "id": file.record.wandb_id,
            "resume": "allow",
            "config": params,
            "dir": str(self.run_dir),
        }
        self._tasks: queue.Queue[Callable[[Run], None] | None] = queue.Queue()
        self._exit_code = 0
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step."""
        self._tasks.put(lambda run: run.log(metrics, step=step))

    def log_checkpoint(self, folder: Path) -> None:
        """Send a checkpoint as an artifact, where `tracking.wandb_checkpoints` asks for it."""

        def send(run: Run) -> None:
            import wandb  # type: ignore[import-not-found]

            artifact = wandb.Artifact(f"{run.id}-checkpoint", type="model")
            artifact.add_dir(str(folder))
            run.log_artifact(artifact, aliases=["latest", folder.name])

        if self.settings.wandb_checkpoints:
            self._tasks.put(send)

    def end(self, status: str | None) -> None:
        """Let the run end."""
        self._exit_code = int(status in (FAILED, KILLED))
        self._tasks.put(None)

    def wait(self, start: float) -> None:
        """Wait for that until PATIENCE after `start`, by time.monotonic."""
        self._thread.join(max(0.0, start + PATIENCE - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("W&B: does not answer; `wandb sync %s/wandb/*run-*` sends the rest", self.run_dir)

    def _run(self) -> None:
        try:
            run = self._started()
            while (task := self._tasks.get()) is not None:
                task(run)
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            logger.warning("W&B: off (%s: %s)", type(error).__name__, str(error).partition("\n")[0][:200])

    def _started(self) -> Run:
        import wandb

        os.environ.setdefault("WANDB_DATA_DIR", str(self.run_dir / "wandb"))  # where artifacts wait
        limits = wandb.Settings(
            init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, console="off", silent=True
        )
        chosen = wandb.setup(limits).settings
        if chosen.mode != "online":
            return wandb.init(settings=limits, **self.options)  # WANDB_MODE, or `wandb offline`
        why = f"{chosen.base_url} does not answer"
        if _answers(chosen.base_url):
            why = "nobody has logged in (WANDB_API_KEY, or `wandb login`)"
            if wandb.login(prompt=False, verify=False):
                try:
                    return wandb.init(settings=limits, **self.options)
                except wandb.Error as error:
                    why = str(error).partition("\n")[0][:200]
                    wandb.teardown()  # else the run's id is "in use"
        run = wandb.init(settings=limits, mode="offline", **self.options)
        logger.warning("W&B: %s; `wandb sync %s` sends what is kept there", why, Path(run.dir).parent)
        return run


def _answers(address: str) -> bool:
    """Whether a server answers to a question, be it with a refusal.

    `wandb.init` takes longer to notice, and so does the end of the process afterwards.
    """
    question = json.dumps({"query": "{ viewer { id } }"}).encode()
    request = urllib.request.Request(f"{address}/graphql", question, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
