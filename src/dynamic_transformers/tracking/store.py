"""MLflow's client: how it is opened, what it may take, and what its errors ask of the user."""

from __future__ import annotations

import http.client
import logging
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dynamic_transformers.folders import new_sibling, sole_writer
from dynamic_transformers.settings import TrackingSettings, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("dynamic_transformers")

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # which MLflow reads for each request
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
REQUEST_TIMEOUT = 10  # seconds
FIRST_TIMEOUT = 3  # seconds for a first answer: a store that is away costs a run less than 5 in all
# A server answers to a file when its object store has all of it, and begins to send one when it has it: time
# for 6 GB at 10 MB/s.
FILE_TIMEOUT = 600
# What waiting does not mend. MLflow names every error of a database TEMPORARILY_UNAVAILABLE.
HINTS = (
    (
        r"out-of-date database schema",
        "the schema of {uri} is old: back it up, then `mlflow db upgrade {uri}`",
    ),
    (r"file is not a database", "{uri} is no database: move it away"),
    (
        r"(readonly|read-only) database|unable to open database|Permission denied|Read-only file system",
        "{uri} cannot be written: change its mode, or set tracking.mlflow_uri",
    ),
    (r"disk is full|No space left", "the disk of {uri} is full: make room"),
    (r"already exists|no such table|Can't locate revision", "{uri} is half made or damaged: move it away"),
    (
        r"filesystem tracking backend",
        "MLflow no longer writes into folders such as {uri}: name a server or sqlite:///FILE",
    ),
    (
        r"error code 40[13]|PERMISSION_DENIED|UNAUTHENTICATED",
        "{uri} refuses the credentials: see MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN",
    ),
    (
        r"error code 404|valid JSON format|unsupported URI|No module named|Invalid url",
        "{uri} is no MLflow server that can be used: see tracking.mlflow_uri and MLFLOW_TRACKING_URI",
    ),
)
OUTAGES = (
    (r"Connection refused", "{uri} cannot be reached: connection refused"),
    (r"[Tt]imed out|timeout", "{uri} does not answer"),
    (r"[Nn]ame resolution|resolve|not known", "{uri} cannot be found: misspelt, or the network is away"),
    (r"(error code|too many) (429|5\d\d)", "{uri} is in trouble"),
    (r"database is locked", "{uri} is being written by others"),
)
LASTING = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


def tracking_uri(settings: TrackingSettings, output_dir: str | Path) -> str:
    """`tracking.mlflow_uri`, else MLFLOW_TRACKING_URI, else a SQLite file in `output_dir`."""
    if uri := settings.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def store_name(uri: str) -> str:
    """The address without a secret: what tells one store from another, and may be shown."""
    return _hidden(uri).rstrip("/")


def given_run(settings: TrackingSettings) -> str | None:
    """MLFLOW_RUN_ID, where the settings name no other server than the one that it came with."""
    same_server = not settings.mlflow_uri or settings.mlflow_uri == os.environ.get("MLFLOW_TRACKING_URI")
    return os.environ.get("MLFLOW_RUN_ID") if same_server else None


def notice_absence(uri: str) -> None:
    """Ask whether a server is there, before the import of MLflow: that takes longer than an answer may.

    Raises:
        OSError: nothing answers.
    """
    if not uri.startswith("http") or "mlflow" in sys.modules:
        return
    parts = urlsplit(uri)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health")
    try:
        with urllib.request.urlopen(address.geturl(), timeout=FIRST_TIMEOUT):
            return
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, (ConnectionError, TimeoutError, socket.gaierror)):
            raise  # all else is an answer, of which MLflow makes what it can


def load_mlflow(uri: str) -> None:
    """Import what a store of this address needs, which takes seconds, and set it up."""
    os.environ.setdefault(TIMEOUT, str(REQUEST_TIMEOUT))
    os.environ.setdefault(RETRIES, "1")
    # The addresses that MLflow prints hold whatever password MLFLOW_TRACKING_URI holds.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    if not uri.startswith("http"):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # else 100 seconds for a database that cannot be opened
        for name, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.CRITICAL)):
            logging.getLogger(name).setLevel(level)  # it prints each error's traceback; `explained` is enough


def open_store(uri: str) -> MlflowClient:
    """A client of a store that has answered.

    Raises:
        Exception: MLflow's own; `explained` says what it means.
    """
    notice_absence(uri)
    load_mlflow(uri)
    path = local_database(uri)
    if path is None:
        with _environment({TIMEOUT: str(min(FIRST_TIMEOUT, int(os.environ[TIMEOUT]))), RETRIES: "0"}):
            return _answering(uri)
    with sole_writer(path, wait=True):
        if not path.exists():
            _make_database(path)
        return _answering(uri)


def local_database(uri: str) -> Path | None:
    """The file of a SQLite address; None: it is none, or one with options of its own."""
    name = uri.removeprefix("sqlite:///")
    return Path(name) if name not in (uri, "", ":memory:") and "?" not in name else None


def _make_database(path: Path) -> None:
    """Make the tables, which takes MLflow dozens of migrations, where nobody sees them half made."""
    place = new_sibling(path)
    _answering(f"sqlite:///{place / path.name}")
    (place / path.name).replace(path)
    place.rmdir()


def _answering(uri: str) -> MlflowClient:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    return client


@contextmanager
def time_for_files() -> Iterator[None]:
    """Requests within wait as long as files may take, or longer where the environment says so."""
    with _environment({TIMEOUT: str(max(FILE_TIMEOUT, int(os.environ[TIMEOUT])))}):
        yield


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    given = {name: os.environ[name] for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.update(given)


def experiment_id(client: MlflowClient, name: str, output_dir: str | Path) -> str:
    """The experiment's id; the experiment is made if need be.

    Raises:
        UserError: it was deleted.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = str(client.tracking_uri).startswith("sqlite:")
        artifacts = (Path(output_dir).resolve() / "mlartifacts").as_uri() if local else None
        # Opens the pages of training runs instead of those of GenAI traces.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=tags)
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another run may have made it meanwhile
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        raise UserError(
            f"the experiment {name!r} was deleted: restore it (`mlflow experiments restore -x {number}`), "
            "or set tracking.experiment"
        )
    return experiment.experiment_id


def explained(error: Exception, uri: str) -> tuple[str, bool]:
    """One line without any password that says what is wrong and what to change; whether waiting helps."""
    if isinstance(error, UserError):
        return str(error), False
    code = getattr(error, "error_code", "")
    for pattern, hint in HINTS:
        if re.search(pattern, f"{code} {error}"):
            return f"{_hidden(hint.format(uri=uri))} ({first_line(error)})", False
    waiting_helps = code not in LASTING
    for pattern, what in OUTAGES if waiting_helps else ():
        if re.search(pattern, str(error)):
            return _hidden(what.format(uri=uri)), True
    return first_line(error), waiting_helps


def first_line(error: Exception) -> str:
    """Of the error's message, without the user and password of an address."""
    return f"{type(error).__name__}: {_hidden((str(error).splitlines() or [''])[0])[:200]}"


def _hidden(line: str) -> str:
    line = re.sub(r"//\S*@", "//***@", line)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|token|secret)[^=&\s]*=)[^&\s]*", r"\1***", line)
