"""Weights & Biases: one run over resumes, files in the run folder, and nobody waits for its server."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_transformers.folders import new_sibling
from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking.record import FAILED, KILLED, RecordFile
from dynamic_transformers.tracking.store import FILE_TIMEOUT, first_line

if TYPE_CHECKING:
    from wandb import Artifact, Run  # type: ignore[import-not-found]  # an extra

logger = logging.getLogger("dynamic_transformers")

ANSWER_TIMEOUT = 2  # seconds for a first sign of the server
INIT_TIMEOUT = 15  # seconds; nobody waits for them
FINISH_TIMEOUT = 3  # seconds that W&B may take for what is left when a run ends
PATIENCE = 4.5  # seconds that the run waits for that, and for a sign of checkpoints that are being uploaded
LIVING_TIMEOUT = 1  # seconds for a sign of the server while they are


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
        self._waiting = self.run_dir / "wandb" / "checkpoints"  # links to what is to be sent
        self._uploads: list[threading.Thread] = []
        self._left = False  # some of them will not arrive
        self._deadline = 0.0  # of the end, by time.monotonic
        self._told: set[type[Exception]] = set()
        self._exit_code = 0
        for folder in sorted(self._waiting.glob("*")):  # which a run that was killed did not get to
            if folder.name.startswith("."):  # half linked
                shutil.rmtree(folder)
            else:
                self._tasks.put(partial(self._upload, folder))
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step."""
        self._tasks.put(lambda run: run.log(metrics, step=step))

    def log_checkpoint(self, folder: Path) -> None:
        """Send a checkpoint as an artifact, where `tracking.wandb_checkpoints` asks for it.

        Until it has been sent hard links keep its files, whatever becomes of the checkpoint.
        """
        place = self._waiting / folder.name
        if not self.settings.wandb_checkpoints or place.exists():
            return
        try:
            keep(folder, place)
        except OSError as error:
            logger.warning("W&B: %s is not sent (%s)", folder, error.strerror)
        else:
            self._tasks.put(partial(self._upload, place))

    def end(self, status: str | None) -> None:
        """Let the run end."""
        self._exit_code = int(status in (FAILED, KILLED))
        self._tasks.put(None)

    def wait(self, start: float) -> None:
        """Wait for that: PATIENCE from `start`, by time.monotonic, and longer while checkpoints are sent."""
        while self._thread.is_alive() and time.monotonic() < max(start + PATIENCE, self._deadline):
            self._thread.join(0.1)
        if self._thread.is_alive() or self._left:
            logger.warning("W&B: does not answer; `wandb sync %s/wandb/*run-*` sends the rest", self.run_dir)

    def _run(self) -> None:
        try:
            run = self._started()
        except Exception as error:
            logger.warning("W&B: off (%s)", first_line(error))
            return
        try:
            while (task := self._tasks.get()) is not None:
                self._try(partial(task, run))
            self._try(partial(self._wait_for_uploads, run))
        finally:
            self._try(partial(run.finish, exit_code=self._exit_code))

    def _try(self, task: Callable[[], None]) -> None:
        """Do a task. Its failure, told once for each kind of error, stops no other task."""
        try:
            task()
        except Exception as error:
            if type(error) not in self._told:
                logger.warning("W&B: not everything is sent (%s)", first_line(error))
            self._told.add(type(error))

    def _upload(self, folder: Path, run: Run) -> None:
        """Log a checkpoint, which waits until it is sent; offline, beside the run for `wandb sync`."""
        import wandb  # type: ignore[import-not-found]

        place = folder
        if run.offline:
            place = Path(run.dir).parent / "checkpoints" / folder.name
            keep(folder, place)
        artifact = wandb.Artifact(f"{run.id}-checkpoint", type="model")
        self._deadline = time.monotonic() + FILE_TIMEOUT  # reading takes time, wherever the server is
        try:
            artifact.add_dir(str(place), policy="immutable", skip_cache=True)  # else W&B copies it, twice
        finally:
            self._deadline = 0.0
        logged = run.log_artifact(artifact, aliases=["latest", folder.name])
        if run.offline:
            shutil.rmtree(folder)
        else:
            ended = partial(self._try, partial(_remove_when_uploaded, folder, logged))
            self._uploads.append(threading.Thread(target=ended, name="wandb upload", daemon=True))
            self._uploads[-1].start()

    def _wait_for_uploads(self, run: Run) -> None:
        """Give each upload FILE_TIMEOUT, as long as the server answers."""
        for upload in self._uploads:
            end = time.monotonic() + FILE_TIMEOUT
            while upload.is_alive() and time.monotonic() < end:
                if not _answers(run.settings.base_url, LIVING_TIMEOUT):
                    break
                self._deadline = time.monotonic() + PATIENCE
                upload.join(2)
            if upload.is_alive():
                self._left = True
                return

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
        if _answers(chosen.base_url, ANSWER_TIMEOUT):
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


def _remove_when_uploaded(folder: Path, artifact: Artifact) -> None:
    artifact.wait()
    shutil.rmtree(folder)


def keep(folder: Path, place: Path) -> None:
    """Let `place` hold what `folder` holds, by hard links where there are some.

    Raises:
        OSError: it cannot be done, or what `folder` holds fits no more than twice on the disk: the files
            remain on the disk when the checkpoint is pruned.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    if shutil.disk_usage(folder).free < 3 * size:
        raise OSError(errno.ENOSPC, "the disk is nearly full")
    place.parent.mkdir(parents=True, exist_ok=True)
    new = new_sibling(place)
    shutil.copytree(folder, new, copy_function=_link, dirs_exist_ok=True)
    new.rename(place)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # this file system has none
        shutil.copy2(source, target)


def _answers(address: str, timeout: float) -> bool:
    """Whether a server answers to a question, be it with a refusal.

    `wandb.init` takes longer to notice, and so does the end of the process afterwards.
    """
    question = json.dumps({"query": "{ viewer { id } }"}).encode()
    request = urllib.request.Request(f"{address}/graphql", question, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
