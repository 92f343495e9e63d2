"""What was tracked, found again: evaluated runs, their reports and files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking.record import FAILED, FINISHED
from dynamic_transformers.tracking.store import (
    experiment_id,
    explained,
    given_run,
    open_store,
    time_for_files,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("dynamic_transformers")

COMPARISON_TAG = "comparison"  # what an evaluated run shares with those it is compared to
RUN_TAG = "run"  # `run.name`, whatever MLflow calls the run
REPORT_TAG = "report"  # of a compared run: id of the run that holds the report
PARENT_NOTE = (
    "One comparison: its runs hang below, one for each variant, point and seed. Select them and compare "
    "`test/loss`, `bench/…` and `efficiency/…`; the step axis of the curves is training tokens, and "
    "`progress/training_flops` is the x axis for equal work. The report is among the artifacts."
)


def track_comparison(
    settings: TrackingSettings, output_dir: str | Path, name: str, run_ids: Sequence[str], report: Path
) -> None:
    """Log a comparison's report folder to a run of its own, under which the compared runs then hang.

    In a task that has been given an MLflow run (MLFLOW_RUN_ID) that one takes the report, and the compared
    runs stay where whoever gave it has hung them. Either way their tag `report` names that run.
    """
    if not settings.mlflow:
        return
    uri = tracking_uri(settings, output_dir)
    try:
        client = open_store(uri)
        given = given_run(settings)
        run_id = given or _comparison_run(client, settings, output_dir, name)
        arrived = False
        try:
            with time_for_files():
                client.log_artifacts(run_id, str(report), "report")
            for child in run_ids:
                for tag in [REPORT_TAG] if given else [REPORT_TAG, "mlflow.parentRunId"]:
                    client.set_tag(child, tag, run_id)
            arrived = True
        finally:
            if not given:
                client.set_terminated(run_id, FINISHED if arrived else FAILED)
    except Exception as error:
        logger.warning("MLflow: the report was not logged (%s)", explained(error, uri)[0])


def _comparison_run(
    client: MlflowClient, settings: TrackingSettings, output_dir: str | Path, name: str
) -> str:
    experiment = experiment_id(client, settings.experiment, output_dir)
    note = {"mlflow.note.content": PARENT_NOTE}
    return client.create_run(experiment, run_name=name, tags=note).info.run_id


def find_evaluated(settings: TrackingSettings, output_dir: str | Path, comparison: str) -> dict[str, str]:
    """`run.name` → id of the newest run that was evaluated with this `comparison` tag.

    Where a task has been given an MLflow run (MLFLOW_RUN_ID) others have been too: its experiment counts.

    Raises:
        UserError: the server cannot be reached.
    """
    found: dict[str, str] = {}
    if not settings.mlflow:
        logger.warning("tracking.mlflow=false: nothing is known of what has finished")
        return found
    with _told(tracking_uri(settings, output_dir)) as client:
        experiment = client.get_experiment_by_name(settings.experiment)
        experiments = {experiment.experiment_id} if experiment else set()
        if given := given_run(settings):
            experiments.add(client.get_run(given).info.experiment_id)
        query = f"tags.{COMPARISON_TAG} = '{comparison}'"
        for run in client.search_runs(list(experiments), query, order_by=["start_time DESC"]):
            if name := run.data.tags.get(RUN_TAG):
                found.setdefault(name, run.info.run_id)
    return found


def report_of(settings: TrackingSettings, output_dir: str | Path, run_ids: Sequence[str]) -> str | None:
    """Id of the run that holds one report of all these runs.

    None where they were not compared together, or where nothing is tracked.

    Raises:
        UserError: the server cannot be reached.
    """
    if not settings.mlflow:
        return None
    with _told(tracking_uri(settings, output_dir)) as client:
        reports = {client.get_run(run_id).data.tags.get(REPORT_TAG) for run_id in run_ids}
    return reports.pop() if len(reports) == 1 else None


def download(settings: TrackingSettings, output_dir: str | Path, run_id: str, path: str, to: Path) -> Path:
    """A folder of a run's artifacts, copied below `to`.

    Raises:
        UserError: it is not there, or the server cannot be reached.
    """
    to.mkdir(parents=True, exist_ok=True)
    with _told(tracking_uri(settings, output_dir), f"{path} of run {run_id}: ") as client, time_for_files():
        return Path(client.download_artifacts(run_id, path, str(to)))


@contextmanager
def _told(uri: str, what: str = "") -> Iterator[MlflowClient]:
    """A client whose errors are a user's.

    Raises:
        UserError: whatever goes wrong.
    """
    try:
        yield open_store(uri)
    except Exception as error:
        # Not `from error`: a traceback would show the server's address, and with it a password.
        raise UserError(f"MLflow: {what}{explained(error, uri)[0]}") from None
