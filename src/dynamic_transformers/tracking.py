"""MLflow (and Weights & Biases) behind one small face, which an outage cannot stop or slow.

`metrics.jsonl` in the run folder is the truth. `RunTracker.sync` pushes what the server has not seen yet;
a background thread calls it during training, and any later step that opens the same run folder goes on
where it stopped. Only rank 0 tracks.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dynamic_transformers.settings import TrackingSettings, UserError

logger = logging.getLogger("dynamic_transformers")

STATE = "tracking.json"
METRICS = "metrics.jsonl"
CHUNK = 200  # lines of metrics.jsonl in one request
MAX_PARAM_LENGTH = 500
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # which MLflow reads for each request
REQUEST_TIMEOUT = 10  # seconds; short, since an outage must not hold a run up
# A server answers to a file when its object store has all of it, and begins to send one when it has it: time
# for 6 GB at 10 MB/s.
FILE_TIMEOUT = 600
PARENT_NOTE = (
    "One comparison: its runs hang below, one for each architecture and seed. Select them and compare "
    "`test/loss`, `bench/…` and `efficiency/…`; the step axis of the curves is training tokens, and "
    "`progress/training_flops` is the x axis for equal work. The report is among the artifacts."
)
RESERVED = ("step", "time")
COMPARISON_TAG = "comparison"  # what an evaluated run shares with those it is compared to
REPORT_TAG = "report"  # of a compared run: id of the run that holds the report


def tracking_uri(settings: TrackingSettings, output_dir: str | Path) -> str:
    """`tracking.mlflow_uri`, else MLFLOW_TRACKING_URI, else a SQLite file in `output_dir`."""
    if uri := settings.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters `a.b.c`, cut at what every server accepts."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)[:MAX_PARAM_LENGTH]
    return flat


def track_comparison(
    settings: TrackingSettings, output_dir: str | Path, name: str, run_ids: Sequence[str], report: Path
) -> None:
    """Log a comparison's report folder to a run of its own, under which the compared runs then hang.

    In a task that has been given an MLflow run (MLFLOW_RUN_ID) that one takes the report, and the compared
    runs stay where whoever gave it has hung them. Either way their tag `report` names that run.
    """
    if not settings.mlflow:
        return
    try:
        from mlflow.entities import RunTag

        client = _client(tracking_uri(settings, output_dir))
        given = _given_run(settings)
        if given:
            run_id = given
        else:
            experiment = _experiment_id(client, settings.experiment, output_dir)
            note = {"mlflow.note.content": PARENT_NOTE}
            run_id = client.create_run(experiment, run_name=name, tags=note).info.run_id
        with _time_for_files():
            client.log_artifacts(run_id, str(report), "report")
        names = [REPORT_TAG] if given else [REPORT_TAG, "mlflow.parentRunId"]
        for child in run_ids:
            client.log_batch(child, tags=[RunTag(name, run_id) for name in names])
        if not given:
            client.set_terminated(run_id)
    except Exception as error:
        logger.warning("MLflow: the report was not logged (%s)", _first_line(error))


def find_evaluated(settings: TrackingSettings, output_dir: str | Path, comparison: str) -> dict[str, str]:
    """`architecture:seed` → id of the newest run that was evaluated with this `comparison` tag.

    Where a task has been given an MLflow run (MLFLOW_RUN_ID) others have been too: its experiment counts.

    Raises:
        UserError: the server cannot be reached.
    """
    found: dict[str, str] = {}
    if not settings.mlflow:
        logger.warning("tracking.mlflow=false: nothing is known of what has finished")
        return found
    try:
        client = _client(tracking_uri(settings, output_dir))
        experiment = client.get_experiment_by_name(settings.experiment)
        experiments = {experiment.experiment_id} if experiment else set()
        if given := _given_run(settings):
            experiments.add(client.get_run(given).info.experiment_id)
        query = f"tags.{COMPARISON_TAG} = '{comparison}'"
        for run in client.search_runs(list(experiments), query, order_by=["start_time DESC"]):
            tags = run.data.tags
            found.setdefault(f"{tags['architecture']}:{tags['seed']}", run.info.run_id)
    except Exception as error:
        # Not `from error`: a traceback would show the server's address, and with it a password.
        raise UserError(f"MLflow: {_first_line(error)}") from None
    return found


def report_of(settings: TrackingSettings, output_dir: str | Path, run_ids: Sequence[str]) -> str | None:
    """Id of the run that holds one report of all these runs; None where they were not compared together.

    Raises:
        UserError: the server cannot be reached.
    """
    try:
        client = _client(tracking_uri(settings, output_dir))
        reports = {client.get_run(run_id).data.tags.get(REPORT_TAG) for run_id in run_ids}
    except Exception as error:
        raise UserError(f"MLflow: {_first_line(error)}") from None
    return reports.pop() if len(reports) == 1 else None


def download(settings: TrackingSettings, output_dir: str | Path, run_id: str, path: str, to: Path) -> Path:
    """A folder of a run's artifacts, copied below `to`.

    Raises:
        UserError: it is not there, or the server cannot be reached.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
        client = _client(tracking_uri(settings, output_dir))
        with _time_for_files():
            return Path(client.download_artifacts(run_id, path, str(to)))
    except Exception as error:
        raise UserError(f"MLflow: {path} of run {run_id}: {_first_line(error)}") from None


def forget_after(run_dir: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint of `step`, from which it goes on.

    MLflow keeps every value, so when it has seen some of it the run goes on under a new id.
    """
    path, state_path = run_dir / METRICS, run_dir / STATE
    if not path.is_file():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(kept))
    state = json.loads(state_path.read_text()) if state_path.is_file() else {"synced_lines": 0}
    if state["synced_lines"] > len(kept):
        changed = {"run_id": None, "described": False, "attach": False, "synced_lines": 0}
        state_path.write_text(json.dumps(state | changed, indent=2))


class RunTracker:
    """One training run, from `train` to `evaluate`, tied to its run folder.

    Where a task has been given an MLflow run (MLFLOW_RUN_ID) it goes on in that one.

    Args:
        run_dir: holds metrics.jsonl, and tracking.json with what has been sent.
        settings, output_dir: where to track; needed by the first step only.
        name, params, tags: of the run; needed by the first step only.
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
        enabled: bool = True,
    ):
        self.run_dir = run_dir
        self.settings, self.output_dir = settings, output_dir
        self.enabled = enabled and settings.mlflow
        self.wandb = _wandb_run(settings, name, params) if enabled and settings.wandb and name else None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        path = run_dir / STATE
        if path.is_file():
            self.state = json.loads(path.read_text())
        else:
            self.state = {
                "run_id": None,
                "described": False,
                "name": name,
                "params": flatten(params or {}),
                "tags": tags or {},
                "attach": True,
                "synced_lines": 0,
            }

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until one has been given or made."""
        return self.state["run_id"]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and let the background thread send it.

        Args:
            step: optimizer step; the line also carries `tokens` and `training_flops`.
        """
        with (self.run_dir / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if self.enabled:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            self._wake.set()

    def sync(self) -> bool:
        """Send every line that the server has not seen; False, and a warning, when it cannot be reached."""
        if not self.enabled:
            return True
        with self._lock:
            try:
                self._push()
                return True
            except Exception as error:
                logger.warning("MLflow: will be synced later (%s)", _first_line(error))
                return False

    def log_final(self, axis: int, metrics: dict[str, float], comparison: str | None) -> None:
        """Send figures of a finished model, which are kept in the step's own output.

        Args:
            axis: the run's training tokens.
            comparison: what the run can be found by afterwards; None where it lacks what one would look for.
        """
        if self.enabled and self.sync() and self.run_id:
            try:
                from mlflow.entities import Metric, RunTag

                stamp = int(time.time() * 1000)
                entries = [Metric(key, float(value), stamp, axis) for key, value in metrics.items()]
                tags = [RunTag(COMPARISON_TAG, comparison)] if comparison else []
                _client(self._uri()).log_batch(self.run_id, metrics=entries, tags=tags)
            except Exception as error:
                logger.warning("MLflow: figures were not logged (%s)", _first_line(error))

    def log_artifacts(self, path: Path, artifact_path: str, large: bool = False) -> bool:
        """Copy a file or folder to the run's artifacts; whether it has arrived.

        Args:
            large: it holds files that may take FILE_TIMEOUT each.
        """
        if not (self.enabled and self.sync() and self.run_id):
            return False
        try:
            client = _client(self._uri())
            send = client.log_artifacts if path.is_dir() else client.log_artifact
            with _time_for_files() if large else nullcontext():
                send(self.run_id, str(path), artifact_path)
            return True
        except Exception as error:
            logger.warning("MLflow: %s was not logged (%s)", path.name, _first_line(error))
            return False

    def log_data(self, data_dir: Path, manifest: dict[str, Any]) -> None:
        """Record the data folder as the run's input."""
        if not (self.enabled and self.sync() and self.run_id):
            return
        try:
            from mlflow.entities import Dataset, DatasetInput

            profile = json.dumps({"splits": manifest["splits"]})
            dataset = Dataset(
                name=data_dir.name,
                digest=manifest["digest"][:36],
                source_type="local",
                source=json.dumps({"uri": str(data_dir)}),
                profile=profile,
            )
            _client(self._uri()).log_inputs(self.run_id, [DatasetInput(dataset=dataset, tags=[])])
        except Exception as error:
            logger.warning("MLflow: the data set was not logged (%s)", _first_line(error))

    def close(self, finished: bool) -> None:
        """Send what is left, wait for the background thread, and close the run when it is `finished`."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
        if self.sync() and finished and self.run_id:
            try:
                _client(self._uri()).set_terminated(self.run_id)
            except Exception as error:
                logger.warning("MLflow: the run was not closed (%s)", _first_line(error))
        if self.wandb is not None:
            self.wandb.finish()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            if not self.sync():
                time.sleep(5)

    def _uri(self) -> str:
        return tracking_uri(self.settings, self.output_dir)

    def _push(self) -> None:
        from mlflow.entities import Metric

        path = self.run_dir / METRICS
        lines = path.read_text().splitlines()[self.state["synced_lines"] :] if path.is_file() else []
        if self.state["described"] and not lines:
            return
        client = _client(self._uri())
        run_id = self._described_run(client)
        for first in range(0, len(lines), CHUNK):
            chunk = lines[first : first + CHUNK]
            metrics = []
            for record in map(json.loads, chunk):
                stamp = int(record["time"] * 1000)
                values = {
                    f"progress/{key}": record[key]
                    for key in ("step", "tokens", "training_flops")
                    if key in record
                }
                values |= {
                    k: v for k, v in record.items() if k not in (*RESERVED, "tokens", "training_flops")
                }
                # The step axis is tokens; steps and training FLOPs are metrics to choose as the x axis.
                axis = int(record.get("tokens", record["step"]))
                metrics += [Metric(key, float(value), stamp, axis) for key, value in values.items()]
            for start in range(0, len(metrics), 1000):
                client.log_batch(run_id, metrics=metrics[start : start + 1000])
            self.state["synced_lines"] += len(chunk)
            self._save()

    def _described_run(self, client) -> str:
        """Id of the run, with its parameters and tags; made where none has been given."""
        from mlflow.entities import Param, RunTag

        run_id = self.run_id or (_given_run(self.settings) if self.state["attach"] else None)
        if not run_id:
            experiment = _experiment_id(client, self.settings.experiment, self.output_dir)
            run_id = client.create_run(experiment, run_name=self.state["name"]).info.run_id
        if not self.state["described"]:
            self.state["run_id"] = run_id
            self._save()  # at once: when the rest fails the next attempt must not make another run
            params = [Param(key, value) for key, value in self.state["params"].items()]
            for first in range(0, len(params), 100):
                client.log_batch(run_id, params=params[first : first + 100])
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in self.state["tags"].items()])
            self.state["described"] = True
            self._save()
        return run_id

    def _save(self) -> None:
        path = self.run_dir / STATE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=2))
        temporary.replace(path)


def _given_run(settings: TrackingSettings) -> str | None:
    """MLFLOW_RUN_ID, where the settings name no other server than the one that it came with."""
    same_server = not settings.mlflow_uri or settings.mlflow_uri == os.environ.get("MLFLOW_TRACKING_URI")
    return os.environ.get("MLFLOW_RUN_ID") if same_server else None


def _client(uri: str):
    os.environ.setdefault(TIMEOUT, str(REQUEST_TIMEOUT))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # The addresses that MLflow prints hold whatever password MLFLOW_TRACKING_URI holds.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


@contextmanager
def _time_for_files() -> Iterator[None]:
    """Requests within wait as long as files may take, or longer where the environment says so."""
    given = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(max(FILE_TIMEOUT, int(given)))
    try:
        yield
    finally:
        os.environ[TIMEOUT] = given


def _experiment_id(client, name: str, output_dir: str | Path) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    local = str(client.tracking_uri).startswith("sqlite:")
    artifacts = (Path(output_dir).resolve() / "mlartifacts").as_uri() if local else None
    # Opens the pages of training runs instead of those of GenAI traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return client.create_experiment(name, artifact_location=artifacts, tags=tags)


def _wandb_run(settings: TrackingSettings, name: str, params: dict[str, Any] | None):
    try:
        import wandb  # type: ignore[import-not-found]  # an extra

        return wandb.init(project=settings.wandb_project, name=name, config=params)
    except Exception as error:
        logger.warning("W&B: off (%s)", _first_line(error))
        return None


def _first_line(error: Exception) -> str:
    """Of the error's message, without the user and password of an address."""
    line = re.sub(r"//\S*@", "//***@", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {line[:200]}"
