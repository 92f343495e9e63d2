"""What a run tells of itself, whatever stands behind it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from dynamic_transformers.settings import Settings, TrackingSettings
from dynamic_transformers.tracking.inputs import inputs_of
from dynamic_transformers.tracking.record import METRICS, RUNNING, Record, RecordFile, flatten
from dynamic_transformers.tracking.search import COMPARISON_TAG, RUN_TAG
from dynamic_transformers.tracking.sender import Sender
from dynamic_transformers.tracking.wandb_run import WandbRun

logger = logging.getLogger("dynamic_transformers")


def description(settings: Settings) -> dict[str, Any]:
    """What `RunTracker` is told of a run by the step that trains it."""
    tags = {
        RUN_TAG: settings.run.name,
        "architecture": settings.model.type,
        "variant": settings.study.variant or settings.model.type,
        "seed": str(settings.run.seed),
    }
    return {"name": settings.run.name, "params": settings.to_record(), "tags": tags}


class RunTracker:
    """One training run, from `train` to `evaluate`, tied to its run folder.

    Only `close` and `sync` wait for a store. A thread sends; what it could not send is sent by the next step
    that opens the run folder, or by `dynamic-transformers sync`. Where a task has been given an MLflow run
    (MLFLOW_RUN_ID) it goes on in that one.

    How a run ends: who made the tracker calls `close` with FINISHED at the end of training, KILLED when a
    signal ended it, FAILED after an exception, None where a later step will end it. A run that goes on is
    RUNNING again, in the MLflow run that it had. What `kill -9` leaves RUNNING is ended by
    `dynamic-transformers sync`, or by the run that takes its place (`replace_run`).

    Args:
        run_dir: holds metrics.jsonl, and tracking.json with what has been sent.
        settings, output_dir: where to track.
        name: of the run; given by the step that trains. Without it a later step adds to what there is.
        params, tags: of the run; needed by the first step only.
        trained: a later step gives the name, which only counts where no earlier one has told it.
        enabled: false on ranks other than 0.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrackingSettings,
        output_dir: str | Path,
        name: str = "",
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        trained: bool = False,
        enabled: bool = True,
    ):
        self.run_dir = run_dir
        self.file = RecordFile(run_dir, Record())
        self.sender = Sender(self.file, settings, output_dir) if enabled and settings.mlflow else None
        self.wandb = None
        with_wandb = bool(name) and enabled and settings.wandb and not trained
        if name and (self.sender or with_wandb):
            with self.file.changing() as record:
                record.status = record.status if trained else RUNNING
                if not record.described:
                    record.name, record.params, record.tags = name, flatten(params or {}), tags or {}
        if with_wandb:
            self.wandb = WandbRun(self.file, settings, params or {})
        if self.sender:
            self.sender.wake()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until one has been given or made."""
        return self.file.record.run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and let it be sent.

        Args:
            step: optimizer step; the line also carries `tokens` and `training_flops`.
        """
        with (self.run_dir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(step, metrics)
        if self.sender:
            self.sender.wake()

    def log_data(self, data_dir: Path, manifest: dict[str, Any]) -> None:
        """Record the data folder, and each source of it, as inputs of the run.

        Args:
            manifest: of the data folder.
        """
        for dataset in inputs_of(data_dir, manifest):
            self._attach("data", **dataset)

    def log_artifacts(self, path: Path, artifact_path: str, large: bool = False) -> None:
        """Let a file or folder be copied to the run's artifacts, after those named before.

        Args:
            large: it holds files that may take FILE_TIMEOUT each.
        """
        path, run_dir = path.resolve(), self.run_dir.resolve()
        inside = path.is_relative_to(run_dir)  # then it may move with the run folder
        place = path.relative_to(run_dir) if inside else path
        self._attach("files", path=str(place), place=artifact_path, large=large)

    def log_final(self, axis: int, metrics: dict[str, float]) -> None:
        """Send figures of a finished model, which are kept in the step's own output.

        Args:
            axis: the run's training tokens.
        """
        self._attach("figures", axis=axis, time=int(time.time() * 1000), metrics=metrics)

    def log_comparison(self, comparison: str) -> None:
        """Let the run be found by `comparison`, once everything that was named before has arrived."""
        self._attach("tags", tags={COMPARISON_TAG: comparison})

    def log_checkpoint(self, folder: Path) -> None:
        """Send a checkpoint to W&B, where `tracking.wandb_checkpoints` asks for it."""
        if self.wandb:
            self.wandb.log_checkpoint(folder)

    def sync(self) -> bool:
        """Send everything and wait for it; False, and a warning, when it has not all arrived."""
        return self.sender is None or self.sender.flush()

    def close(self, status: str | None) -> bool:
        """Send what is left, with how the run has ended; whether all has arrived.

        A store that does not answer is waited for a few seconds, whatever is left to send.

        Args:
            status: FINISHED, FAILED or KILLED; None: a later step goes on.
        """
        start, arrived = time.monotonic(), True
        if self.wandb:
            self.wandb.end(status)
        if self.sender:
            with self.file.changing() as record:
                record.status = status or record.status
            arrived = self.sender.flush()
            self.sender.stop()
            self.file.frozen = True
        if self.wandb:
            self.wandb.wait(start)
        return arrived

    def _attach(self, kind: str, **values: Any) -> None:
        if self.sender is None:
            return
        attachment = {"kind": kind, **values}
        with self.file.changing() as record:
            known = record.attachments if kind == "data" else record.attachments[record.sent_attachments :]
            if attachment not in known:
                record.attachments.append(attachment)
        self.sender.wake()
