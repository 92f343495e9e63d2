"""A finished comparison in MLflow: its report, names and colours of its runs, and a view of all in charts."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking.record import FAILED, FINISHED
from dynamic_transformers.tracking.registry import ComparedRun, register
from dynamic_transformers.tracking.search import REPORT_TAG
from dynamic_transformers.tracking.store import (
    experiment_id,
    explained,
    given_run,
    open_store,
    time_for_files,
    tracking_uri,
)
from dynamic_transformers.tracking.view import STATE_TAG, VIEW_TAG, full_link, saved_view, view_link

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("dynamic_transformers")

COLOUR_TAG = "mlflow.runColor"
KIND_TAG = "kind"  # of the run that holds a report: the others are models


def track_comparison(
    settings: TrackingSettings,
    output_dir: str | Path,
    name: str,
    runs: Sequence[ComparedRun],
    report: Path,
    bars: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Log a comparison's report to a run of its own, save a view of all its runs, register their models.

    In a task that has been given an MLflow run (MLFLOW_RUN_ID) that one takes the report. Either way the tag
    `report` of the compared runs names it. No run hangs under another: the pages fold such runs away.

    Args:
        bars: metrics that the view shows as bars, by section.
    """
    if not settings.mlflow:
        return
    uri = tracking_uri(settings, output_dir)
    try:
        client = open_store(uri)
        given = given_run(settings)
        run_id = given or _report_run(client, settings, output_dir, name)
        arrived = False
        try:
            with time_for_files():
                client.log_artifacts(run_id, str(report), "report")
            link = _save_view(client, name, runs, bars or {}, run_id)
            for run in runs:
                _add_figures(client, run)
            register(client, name, runs, [metric for metrics in (bars or {}).values() for metric in metrics])
            for run in runs:
                _show(client, run, run_id)
            arrived = True
        finally:
            if not given:
                client.set_terminated(run_id, FINISHED if arrived else FAILED)
        if uri.startswith("http"):
            logger.info("MLflow: all runs in charts: %s", full_link(uri, link))
    except Exception as error:
        logger.warning("MLflow: the report was not logged (%s)", explained(error, uri)[0])


def _report_run(client: MlflowClient, settings: TrackingSettings, output_dir: str | Path, name: str) -> str:
    experiment = experiment_id(client, settings.experiment, output_dir)
    return client.create_run(experiment, run_name=f"{name} report", tags={KIND_TAG: "report"}).info.run_id


def _add_figures(client: MlflowClient, run: ComparedRun) -> None:
    from mlflow.entities import Metric

    stamp = int(time.time() * 1000)
    client.log_batch(run.run_id, metrics=[Metric(*item, stamp, run.axis) for item in run.figures.items()])


def _show(client: MlflowClient, run: ComparedRun, report: str) -> None:
    """Name and colour a run. Its last tag, by which it is found, says that all arrived."""
    client.update_run(run.run_id, name=run.name)
    client.set_tag(run.run_id, COLOUR_TAG, run.colour)
    client.set_tag(run.run_id, REPORT_TAG, report)


def _save_view(
    client: MlflowClient,
    name: str,
    runs: Sequence[ComparedRun],
    bars: Mapping[str, Sequence[str]],
    report: str,
) -> str:
    """Save the view with the experiment of the runs; the link to it, which the report's run keeps."""
    holder = client.get_run(runs[0].run_id if runs else report)
    experiment = holder.info.experiment_id
    view = saved_view(name, f"tags.{REPORT_TAG} = '{report}'", bars, len(runs))
    client.set_experiment_tag(experiment, f"{STATE_TAG}{report}", view)
    link = view_link(experiment, report)
    note = f"The report is among the artifacts. [All runs in charts]({link})"
    client.set_tag(report, "mlflow.note.content", note)
    client.set_tag(report, VIEW_TAG, link)
    return link
