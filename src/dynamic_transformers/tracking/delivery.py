"""Brings what a run's record holds to MLflow, from where the last time ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking.record import KILLED, METRICS, RUNNING, RecordFile
from dynamic_transformers.tracking.store import (
    FILE_TIMEOUT,
    experiment_id,
    given_run,
    store_name,
    time_for_files,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger("dynamic_transformers")
T = TypeVar("T")

CHUNK = 200  # lines of metrics.jsonl between two notes of how far it went
REQUEST_METRICS, REQUEST_PARAMS = 1000, 100  # MLflow's limits of one request
KEY_TAG = "dynamic_transformers.key"
REPLACED_TAG = "replaced_by"
CHANGED_TAG = "changed."  # before the name of a parameter
EVAL_FLOPS = "eval/training_flops"
WORK = ("step", "tokens", "training_flops")  # of a line: shown below `progress/`


class Delivery:
    """One run folder and one open store.

    Args:
        answered: called at each answer, with the seconds that the next one may take where they are many.
    """

    def __init__(
        self,
        client: MlflowClient,
        file: RecordFile,
        settings: TrackingSettings,
        output_dir: str | Path,
        answered: Callable[..., None],
    ):
        self.client, self.file, self.record = client, file, file.record
        self.settings, self.output_dir, self.answered = settings, output_dir, answered
        self.run_dir = file.path.parent
        if self.record.run_id:
            self._look_for(self.record.run_id)
        if self.record.store != (store := store_name(client.tracking_uri)):
            with self.file.changing() as record:
                record.store = store

    def send(self) -> None:
        """Send everything that has not been sent.

        Raises:
            Exception: MLflow's own; what was sent before is noted.
        """
        record = self.record
        run_id = self._described_run()
        self._send_lines(run_id)
        if (status := record.status) != record.sent_status:
            self._send_status(run_id, status)
            with self.file.changing():
                record.sent_status = status
        for place in range(record.sent_replaced, len(record.replaced)):
            self._mark_replaced(record.replaced[place], run_id)
            with self.file.changing():
                record.sent_replaced = place + 1
        for place in range(record.sent_attachments, len(record.attachments)):
            self._attach(run_id, **record.attachments[place])
            self.answered()
            with self.file.changing():
                record.sent_attachments = place + 1

    def _look_for(self, run_id: str) -> None:
        """Let a run that this store does not know begin anew there.

        Raises:
            UserError: it was deleted.
        """
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow: knows no run %s; %s is sent anew, all of it", run_id, self.run_dir)
            with self.file.changing() as record:
                record.begin_anew()
            return
        if run.info.lifecycle_stage == "deleted":
            raise UserError(f"run {run_id} was deleted: restore it (`mlflow runs restore --run-id {run_id}`)")

    def _described_run(self) -> str:
        """Id of the run, with its parameters and tags; made where none has been given."""
        record = self.record
        if record.run_id and record.described:
            return record.run_id
        run_id = record.run_id
        if run_id is None:
            given = given_run(self.settings)
            run_id = self._made_run() if given is None or given in record.replaced else given
            with self.file.changing():  # at once: when the rest fails the next attempt goes on with it
                record.run_id = run_id
            self.answered()
        self._describe(run_id)
        with self.file.changing():
            record.described = True
        return run_id

    def _describe(self, run_id: str) -> None:
        """Log parameters and tags. MLflow lets no parameter change: another value than it has is a tag."""
        from mlflow.entities import Param, RunTag

        client, record = self.client, self.record
        known = client.get_run(run_id).data.params
        new = [Param(*item) for item in record.params.items() if item[0] not in known]
        for params in batched(new, REQUEST_PARAMS):
            client.log_batch(run_id, params=params)
        changed = {key: value for key, value in record.params.items() if known.get(key, value) != value}
        if changed:
            logger.warning(
                "MLflow: run %s has other values of %s; those of now are its tags `%s…`",
                run_id,
                ", ".join(changed),
                CHANGED_TAG,
            )
        tags = record.tags | {f"{CHANGED_TAG}{key}": value for key, value in changed.items()}
        for some in batched(tags.items(), REQUEST_PARAMS):
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in some])

    def _made_run(self) -> str:
        """A new run, or that which an earlier attempt made without hearing of it."""
        client, record = self.client, self.record
        experiment = experiment_id(client, self.settings.experiment, self.output_dir)
        found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{record.key}'")
        if found:
            return found[0].info.run_id
        run = client.create_run(
            experiment, run_name=record.name or self.run_dir.name, tags={KEY_TAG: record.key}
        )
        return run.info.run_id

    def _send_lines(self, run_id: str) -> None:
        for lines, end in self._unsent_lines():
            metrics: list[Metric] = []
            done = self.record.sent_work
            for values in map(json.loads, lines):
                metrics += self._metrics(values, with_work=values["step"] > done)
                done = max(done, values["step"])
            for some in batched(metrics, REQUEST_METRICS):
                self.client.log_batch(run_id, metrics=list(some))
                self.answered()
            with self.file.changing() as record:
                record.sent_bytes, record.sent_work = end, done

    def _unsent_lines(self) -> Iterator[tuple[list[bytes], int]]:
        """Whole lines, CHUNK at a time, each with the place of their end in the file."""
        path, end = self.run_dir / METRICS, self.record.sent_bytes
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(end)
            for lines in batched(file, CHUNK):
                whole = [line for line in lines if line.endswith(b"\n")]
                end += sum(map(len, whole))
                if whole:
                    yield whole, end

    def _metrics(self, line: dict[str, Any], with_work: bool) -> list[Metric]:
        """Of one line, without what was sent before the line was cut off and came again.

        MLflow draws one metric over another as long as each has one value at a step: the work is sent once,
        and once more for evaluations, which may be few among many steps.
        """
        from mlflow.entities import Metric

        step, stamp = line["step"], int(line["time"] * 1000)
        # The step axis is tokens; steps and training FLOPs are metrics to choose as the x axis.
        axis = int(line.get("tokens", step))
        named = {
            f"progress/{key}" if key in WORK else key: value
            for key, value in line.items()
            if key != "time" and step > self.record.sent_steps.get(key, -1) and (with_work or key not in WORK)
        }
        if "eval/loss" in named and "training_flops" in line:
            named[EVAL_FLOPS] = line["training_flops"]
        return [Metric(name, float(value), stamp, axis) for name, value in named.items()]

    def _send_status(self, run_id: str, status: str) -> None:
        if status == RUNNING:
            self.client.update_run(run_id, status)
        else:
            self.client.set_terminated(run_id, status)

    def _mark_replaced(self, old: str, run_id: str) -> None:
        """Tag the run that this one took the place of; end it, since nobody else will."""
        from mlflow.exceptions import MlflowException

        try:
            status = self.client.get_run(old).info.status
            self.client.set_tag(old, REPLACED_TAG, run_id)
            if status == RUNNING:
                self.client.set_terminated(old, KILLED)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            logger.info("MLflow: run %s, which was replaced, is gone", old)

    def _attach(self, run_id: str, kind: str, **values: Any) -> None:
        {
            "data": self._attach_data,
            "figures": self._attach_figures,
            "files": self._attach_files,
            "tags": self._attach_tags,
        }[kind](run_id, **values)

    def _attach_data(self, run_id: str, tags: dict[str, str] | None = None, **dataset: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entries = [InputTag(*tag) for tag in (tags or {}).items()]
        self.client.log_inputs(run_id, [DatasetInput(dataset=Dataset(**dataset), tags=entries)])

    def _attach_figures(self, run_id: str, axis: int, time: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        entries = [Metric(key, value, time, axis) for key, value in metrics.items()]
        self.client.log_batch(run_id, metrics=entries)

    def _attach_tags(self, run_id: str, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)

    def _attach_files(self, run_id: str, path: str, place: str, large: bool) -> None:
        source = self.run_dir / path  # an absolute path stays what it is
        if not source.exists():
            logger.warning("MLflow: %s is gone, and was not sent", source)
            return
        send = self.client.log_artifacts if source.is_dir() else self.client.log_artifact
        with time_for_files() if large else nullcontext():
            if large:
                self.answered(FILE_TIMEOUT)
            send(run_id, str(source), place)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut into lists of `size`, the last of which may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
