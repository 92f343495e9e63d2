"""Compared models in MLflow: a LoggedModel with its figures for each, and versions of one registered model.

The files of a model stay artifacts of its run, where a version's source points: they are sent once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynamic_transformers.tracking.inputs import is_source

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BEST = "best"  # alias of the causal model with the lowest test loss
DIGEST_TAG = "digest"
FILES = "model"  # of a run's artifacts


@dataclass(frozen=True)
class ComparedRun:
    """A run as the pages of MLflow show it.

    Attributes:
        run_id: MLflow's.
        name: of the run in charts.
        colour: `#rrggbb`.
        axis: its training tokens.
        figures: what was measured when the runs were compared, by metric.
        tags: of its model: variant, point, seed and digest.
        loss: on the test data; None where it may not be called the best, since it is not causal.
    """

    run_id: str
    name: str
    colour: str
    axis: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    loss: float | None = None


def register(
    client: MlflowClient, comparison: str, runs: Sequence[ComparedRun], linked: Iterable[str]
) -> None:
    """Make the LoggedModel and the version of each run that has none yet; call the best one so.

    Args:
        comparison: whose name the registered model has.
        linked: metrics of the runs that become the models' too.
    """
    name = re.sub(r"[/:]", ".", comparison)
    versions: dict[str, str] = {}
    for compared in runs:
        run = client.get_run(compared.run_id)
        model_id = _logged_model(client, compared, run)
        _link(client, model_id, compared, run, linked)
        versions[compared.run_id] = _version(client, name, compared, run, model_id)
    causal = [(run.loss, run.run_id) for run in runs if run.loss is not None]
    if causal:
        client.set_registered_model_alias(name, BEST, versions[min(causal)[1]])


def _logged_model(client: MlflowClient, compared: ComparedRun, run: Run) -> str:
    """Id of the LoggedModel of a run, as it was exported; made where there is none."""
    from mlflow.entities import LoggedModelOutput

    experiment, digest = run.info.experiment_id, compared.tags.get(DIGEST_TAG, "")
    same = f"source_run_id = '{compared.run_id}' AND tags.{DIGEST_TAG} = '{digest}'"
    found = client.search_logged_models([experiment], filter_string=same)
    if found:
        model_id = found[0].model_id
    else:
        name = re.sub(r"[/:.%\"']", "-", compared.name)
        tags = compared.tags | {DIGEST_TAG: digest, "files": f"runs:/{compared.run_id}/{FILES}"}
        model_id = client.create_logged_model(
            experiment, name, source_run_id=compared.run_id, tags=tags, model_type="causal-lm"
        ).model_id
    outputs = run.outputs.model_outputs if run.outputs else []
    if model_id not in {output.model_id for output in outputs}:
        client.log_outputs(compared.run_id, [LoggedModelOutput(model_id, compared.axis)])
        client.finalize_logged_model(model_id, "READY")
    return model_id


def _link(
    client: MlflowClient, model_id: str, compared: ComparedRun, run: Run, linked: Iterable[str]
) -> None:
    """Make figures of a run those of its model. The run, which has the very same, does not get them twice."""
    from mlflow.entities import Metric

    entries = run.inputs.dataset_inputs if run.inputs else []
    data = [entry.dataset for entry in entries if not is_source(entry)]
    dataset: dict[str, Any] = (
        {"dataset_name": data[-1].name, "dataset_digest": data[-1].digest} if data else {}
    )
    metrics = []
    for key in linked:
        if key in run.data.metrics:
            last = client.get_metric_history(compared.run_id, key)[-1]
            place = {"model_id": model_id, "run_id": compared.run_id, **dataset}
            metrics.append(Metric(key, last.value, last.timestamp, last.step, **place))
    if metrics:
        client.log_batch(compared.run_id, metrics=metrics)


def _version(client: MlflowClient, name: str, compared: ComparedRun, run: Run, model_id: str) -> str:
    """Number of the version of a run's model; made where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}' AND run_id = '{compared.run_id}'"):
        if version.tags.get(DIGEST_TAG) == compared.tags.get(DIGEST_TAG):
            return str(version.version)
    tags = compared.tags | {"logged_model": model_id}
    source = f"{run.info.artifact_uri}/{FILES}"
    return str(client.create_model_version(name, source, compared.run_id, tags).version)
