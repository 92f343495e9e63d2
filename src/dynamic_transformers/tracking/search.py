"""What was tracked, found again: evaluated runs, their reports and files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking.store import (
    explained,
    given_run,
    open_store,
    time_for_files,
    tracking_uri,
)
from dynamic_transformers.tracking.view import VIEW_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("dynamic_transformers")

COMPARISON_TAG = "comparison"  # what an evaluated run shares with those it is compared to
RUN_TAG = "run"  # `run.name`, whatever MLflow calls the run
REPORT_TAG = "report"  # of a compared run: id of the run that holds the report


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


def view_of(settings: TrackingSettings, output_dir: str | Path, run_id: str | None = None) -> str | None:
    """The link to the charts of the comparison whose report a run holds, behind the server's address.

    Args:
        run_id: without it, the newest comparison of the whole store.

    Raises:
        UserError: the server cannot be reached.
    """
    with _told(tracking_uri(settings, output_dir)) as client:
        if run_id:
            return client.get_run(run_id).data.tags.get(VIEW_TAG)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        newest = client.search_runs(
            experiments, f"tags.{VIEW_TAG} LIKE '#%'", order_by=["start_time DESC"], max_results=1
        )
        return newest[0].data.tags[VIEW_TAG] if newest else None


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
