"""A SQLite store for each test, copied from one: to make one takes MLflow seconds."""

import shutil

import pytest
from servers import SlowServer, closed_port, serving

from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking.store import open_store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(tmp_path, monkeypatch, empty_database):
    """Tracking settings, and an output folder with an empty database."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty_database, tmp_path / "outputs" / "mlflow.db")
    return TrackingSettings(experiment="test"), tmp_path / "outputs"


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "outputs" / "run"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def address():
    """Of a `SlowServer`."""
    with serving(SlowServer) as place:
        yield place


@pytest.fixture
def nowhere():
    """Address at which nothing answers."""
    return closed_port()
